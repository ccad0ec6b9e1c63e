"""Errors that a user can fix; commands print them in one line, no traceback."""


class UserError(ValueError):
  """Invalid input; the message names the field, its value and what is allowed."""


class TrainingDivergedError(UserError):
  """A loss term or a gradient is no longer finite."""
