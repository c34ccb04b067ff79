"""The one warning class of the library."""


class SmartWarning(UserWarning):
    """Something runs, but probably does not do what was meant; the message says what to change."""
