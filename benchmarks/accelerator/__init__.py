"""Runs that need an accelerator, prepared so that none of its time is lost."""
