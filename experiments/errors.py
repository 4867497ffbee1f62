"""The error that scripts tell their user. Needs nothing installed."""


class UserError(Exception):
  """What the user can mend. It is told in one line, without a traceback."""
