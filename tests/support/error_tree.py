"""The errors that cross a wire."""

from __future__ import annotations

from dswire.errors import DsError


def leaves(cls: type[DsError]) -> list[type[DsError]]:
    """``cls`` and all below it; a tool's own errors hang in the tree too, but cross no wire."""
    known = [child for child in cls.__subclasses__() if child.__module__ == DsError.__module__]
    return [cls, *(leaf for child in known for leaf in leaves(child))]
