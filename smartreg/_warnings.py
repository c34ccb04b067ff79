"""The one warning class of the library, and how it finds the line to point at."""

import contextlib
import sys
import warnings
from pathlib import Path

import torch

# What stands between a line of the user's and a warning of ours: this package, the modules' `__call__`, `with` blocks.
_NOT_THE_CALLER = (
    str(Path(__file__).parent),
    str(Path(torch.__file__).parent),
    contextlib.__file__,
)


class SmartWarning(UserWarning):
    """Something runs, but probably does not do what was meant; the message says what to change."""


def warn(message: str) -> None:
    """Give a `SmartWarning` at the first line outside of this package (and of torch) that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_CALLER):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, SmartWarning, stacklevel=level)
