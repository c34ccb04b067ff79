"""The one exception a wrong input ends in."""


class InputError(Exception):
    """What the user gave cannot be used; the message is one line that says what, where and how to fix it.

    The command line prints it without a traceback and exits with code 2. Anything else that escapes is a bug.
    """
