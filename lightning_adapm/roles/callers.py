"""Warnings of the line that called the package."""

import contextlib
import os
import sys
import warnings
from pathlib import Path

import torch

_BETWEEN = (str(Path(__file__).parents[1]) + os.sep, str(Path(torch.__file__).parent) + os.sep, contextlib.__file__)
"""Beginnings of the files whose lines are not the caller's: torch wraps steps, and contexts are entered in one."""


def warn_caller(message: str) -> None:
    """Warn of the innermost line outside the package and torch. Python shows the same words once for each line.

    From Python 3.12 on, ``warnings.warn(message, skip_file_prefixes=...)`` is the same.
    """
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
