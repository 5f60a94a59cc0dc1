"""The one error that a person, not a programmer, can put right."""

from __future__ import annotations


class InputError(Exception):
    """Bad input: a file, key, tensor or option that the caller can correct.

    The message is one line. It names what was found (with its path, key or tensor), what was
    expected and what to do. The command line prints it without a traceback and exits with code 2.
    """
