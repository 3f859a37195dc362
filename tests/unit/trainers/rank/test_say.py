"""Lines for the user: the kind comes first, further lines are indented, and what went wrong is on stderr."""

from __future__ import annotations

import io

import pytest

from trainers.rank.say import say


@pytest.mark.parametrize(
    ("kind", "to_stderr"),
    [
        ("error", True),
        ("warning", True),
        ("stopped by SIGTERM", True),
        ("note", False),
        ("backend", False),
        ("done", False),
        ("auto_find_batch_size", False),
        ("errors", False),  # a property with a longer name
    ],
)
def test_errors_warnings_and_stops_go_to_stderr(
    capsys: pytest.CaptureFixture[str], kind: str, to_stderr: bool
) -> None:
    say(kind, "the text")
    line = f"{kind}: the text\n"
    assert capsys.readouterr() == (("", line) if to_stderr else (line, ""))


def test_further_lines_are_indented_below_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    say("error", "rank 1 failed first", "Lower lr.", "logs: here")
    assert capsys.readouterr().err.splitlines() == [
        "error: rank 1 failed first",
        "       Lower lr.",
        "       logs: here",
    ]


def test_lines_are_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank's log is read while the rank runs, and a killed rank writes no more."""

    class Buffered(io.StringIO):
        flushed = ""

        def flush(self) -> None:
            self.flushed = self.getvalue()

    stream = Buffered()
    monkeypatch.setattr("sys.stdout", stream)
    say("note", "the text", "and more")
    assert stream.flushed == "note: the text\n       and more\n"
