"""The one exception that means "you can fix this"."""


class UserError(ValueError):
    """A user's mistake, told in one line: what was got, what was expected, what to do.

    The command line prints the message alone and exits with status 2.
    """
