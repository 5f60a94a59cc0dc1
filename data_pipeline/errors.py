"""Errors of reading a dataset: one example is damaged, or the files of a split are missing."""

from __future__ import annotations

from pixellm_jax.errors import InputError


class DamagedError(Exception):
    """One example is damaged: the caller skips it, counts it and lists it with the reason.

    The message is the reason: one line that says what was found and what was expected. Damage to a
    file that a whole dataset depends on (an index, a list of classes) raises `InputError` instead.
    """


class AbsentError(InputError):
    """The files of a dataset or split are missing, or contain no entry of the split.

    This is not a failure when all datasets of a folder are prepared: the split is reported and
    skipped. A file that exists but is damaged raises plain `InputError`.
    """
