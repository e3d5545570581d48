"""Warnings that point to the line that called the package."""

import contextlib
import os
import sys
import warnings
from pathlib import Path

import torch

_BETWEEN = (str(Path(__file__).parents[1]) + os.sep, str(Path(torch.__file__).parent) + os.sep, contextlib.__file__)
"""Prefixes of files whose lines are not the caller's: torch wraps steps, contextlib enters contexts."""


def warn_caller(message: str) -> None:
    """Warn, pointing to the innermost line outside the package and torch.

    Python shows the same message once for each line.
    From Python 3.12 on, ``warnings.warn(message, skip_file_prefixes=...)`` is the same.
    """
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
