"""Names of the networks of a run, as its files and tables have them."""

TEACHER = "teacher"
STUDENT = "student"

MODELS = (TEACHER, STUDENT)
"""The order in which a run's networks are shown."""
