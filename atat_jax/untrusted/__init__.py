"""Reading of files that somebody else may have written.

No code in a file is run, nothing is written, and memory stays in proportion to
the size of the file on the disk. `docs/untrusted.md` has the limits.
"""
