"""`InputError`, the error that a user can correct."""

from __future__ import annotations


class InputError(Exception):
    """Bad input: a file, key, tensor or option that the user can correct.

    The message is one line. It should name what was found (with its path, key or tensor), what was
    expected and what to do. The command line prints it without a traceback and exits with code 2.
    """
