"""A run before it begins, and a step of it once more."""
