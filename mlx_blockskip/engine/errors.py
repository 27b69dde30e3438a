"""The error that speaks to the user."""


class UserError(Exception):
    """Something in the user's files, values or machine: one sentence with the file, the value and the way out.

    The command line prints the sentence and exits 1, without a traceback.
    """
