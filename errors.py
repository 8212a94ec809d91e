"""Mistakes a user can mend."""


class EpalmError(Exception):
    """Bad input, said in one message that names file, field and remedy.

    The command line prints the message without a traceback and exits with code 2.
    """


class NotHereError(EpalmError):
    """Weights or data that are neither on this machine nor can be fetched now."""


def first_line(error: Exception) -> str:
    """The first line of what another's exception says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
