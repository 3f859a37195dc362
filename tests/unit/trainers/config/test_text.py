"""Values as text, in messages."""

from __future__ import annotations

import pytest

from trainers.config.text import count_of, first_line, format_bytes


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 ranks"), (1, "1 rank"), (2, "2 ranks"), (11, "11 ranks")]
)
def test_a_noun_agrees_with_its_count(number: int, text: str) -> None:
    assert count_of(number, "rank") == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0.0 MB"),
        (1_450_000, "1.4 MB"),
        (999_000_000, "999.0 MB"),
        (1_000_000_000, "1.0 GB"),
        (2_270_000_000_000, "2270.0 GB"),
    ],
)
def test_sizes_are_in_megabytes_below_a_gigabyte(size: int, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("the first\nthe second"), "the first"),
        (ValueError("\n  the first\nthe second"), "the first"),
        (ValueError(), "ValueError"),
        (KeyError(""), "''"),
        (RuntimeError("\n \n"), "RuntimeError"),
    ],
)
def test_an_error_is_its_first_line_or_the_name_of_its_class(error: Exception, text: str) -> None:
    assert first_line(error) == text
