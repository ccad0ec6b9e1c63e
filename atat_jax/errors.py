"""Errors that are the user's to mend: one clear line, no traceback."""


class UserError(ValueError):
  """Bad input: names the field, its value and what is allowed."""


class TrainingDivergedError(UserError):
  """A loss term or a gradient stopped being finite."""
