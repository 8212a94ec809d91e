"""The one exception for mistakes a user can mend."""


class EpalmError(Exception):
    """Bad input, said in one message that names file, field and remedy.

    The command line prints the message without a traceback and exits with code 2.
    """
