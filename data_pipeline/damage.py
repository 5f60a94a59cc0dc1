"""The error for one example of a dataset that cannot be used while the rest can."""

from __future__ import annotations


class Damaged(Exception):  # noqa: N818 - a verdict on an example, not a fault of the program
    """One example is damaged: skip it, count it and list it with its reason.

    The message is the reason: one line that names what was found and what was expected. A file that
    whole datasets depend on (an index, a list of classes) raises `InputError` instead.
    """
