"""The error that speaks to the user."""


class UserError(Exception):
    """Something in the user's files, values or machine: one sentence with the file, the value and the way out.

    The command line prints the sentence and exits 1, without a traceback.
    """


class DamagedError(UserError):
    """A file that this tool wrote is not as it was: another one like it may be whole."""
