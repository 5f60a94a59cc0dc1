"""The errors of reading a dataset: one example is damaged, or nothing of a split is there."""

from __future__ import annotations

from pixellm_jax.errors import InputError


class DamagedError(Exception):
    """One example is damaged: skip it, count it and list it with its reason.

    The message is the reason: one line that names what was found and what was expected. A file that
    whole datasets depend on (an index, a list of classes) raises `InputError` instead.
    """


class AbsentError(InputError):
    """The files of a dataset or split are not there (or hold none of its entries).

    When everything in a folder is prepared, this is no fault: it is named and passed over. A file
    that is there and damaged raises plain `InputError`.
    """
