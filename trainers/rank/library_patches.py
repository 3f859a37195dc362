"""Replace a part of a library, or raise an error if a release no longer has it (docs/upgrading.md)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from trainers.config.packages import version_of


class LibraryMoved(RuntimeError):
    """An installed library does not have the name that Phalanx replaces."""


def replace_in(owner: ModuleType, name: str, new: Any) -> Any:
    """Replace a function or class of a library's module, and return the old one.

    Raises:
        LibraryMoved: the module has nothing of that name.
    """
    if not hasattr(owner, name):
        library = owner.__name__.partition(".")[0]
        raise LibraryMoved(
            f"{library} {version_of(library)} has no {owner.__name__}.{name}, which Phalanx replaces. "
            "Install the tested versions: pip install -c constraints.txt."
        )
    old = getattr(owner, name)
    setattr(owner, name, new)
    return old


@contextmanager
def replaced(owner: ModuleType, name: str, new: Any) -> Iterator[None]:
    """Replace a function or class of a library's module while the block runs.

    Raises:
        LibraryMoved: the module has nothing of that name.
    """
    old = replace_in(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, old)
