"""Names of the networks of a run, in its files and tables."""

TEACHER = "teacher"
STUDENT = "student"

MODELS = (TEACHER, STUDENT)
"""Order in which the networks of a run are shown."""
