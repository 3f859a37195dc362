"""A replaced part of a library: it is exchanged and restored, and a library that moved is an error."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from types import ModuleType

import pytest

from trainers.rank.library_patches import LibraryMoved, replace_in, replaced


@pytest.fixture
def library() -> ModuleType:
    """A stub of a module of pyyaml, whose version is known."""
    module = ModuleType("pyyaml.inner.part")
    module.function = old
    return module


def old() -> str:
    return "old"


def new() -> str:
    return "new"


def test_replace_in_exchanges_the_function_and_returns_the_old_one(library: ModuleType) -> None:
    assert replace_in(library, "function", new) is old
    assert library.function is new


def test_replaced_lasts_as_long_as_its_block(library: ModuleType) -> None:
    with replaced(library, "function", new):
        assert library.function is new
    assert library.function is old


def test_after_an_error_in_the_block_the_old_function_is_back(library: ModuleType) -> None:
    with pytest.raises(KeyError), replaced(library, "function", new):
        raise KeyError
    assert library.function is old


def test_blocks_may_be_nested(library: ModuleType) -> None:
    with replaced(library, "function", new):
        with replaced(library, "function", None):
            assert library.function is None
        assert library.function is new
    assert library.function is old


def test_a_value_that_is_none_or_false_can_be_replaced(library: ModuleType) -> None:
    library.switch = None
    assert replace_in(library, "switch", True) is None
    assert library.switch is True


@pytest.mark.parametrize(
    "replace",
    [replace_in, lambda *given: replaced(*given).__enter__()],
    ids=["replace_in", "replaced"],
)
def test_a_name_that_the_library_does_not_have_is_an_error_that_says_what_to_install(
    library: ModuleType, replace: Callable[..., object]
) -> None:
    with pytest.raises(LibraryMoved) as moved:
        replace(library, "gone", new)
    assert str(moved.value) == (
        f"pyyaml {version('pyyaml')} has no pyyaml.inner.part.gone, which Phalanx replaces. Install the "
        "tested versions: pip install -c constraints.txt."
    )
    assert not hasattr(library, "gone"), "nothing is added to a library"
