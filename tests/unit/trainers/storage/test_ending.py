"""finished.json: how a run ended, and whether its final files are as they were saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from trainers.config.errors import ConfigError
from trainers.storage.ending import MERGE, Ending, read_ending
from trainers.storage.run_folder import FINISHED

ENDING = Ending(step=20, metrics={"loss": 1.5}, model_step=15, done=[MERGE])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 64
    path.write_bytes(content)


def test_an_ending_is_read_as_it_was_written(saved_run: Path) -> None:
    found = read_ending(saved_run)
    assert found is not None and found.files
    found.write(saved_run)
    assert read_ending(saved_run) == found and found.why_damaged(saved_run) is None
    (saved_run / FINISHED).unlink()
    assert read_ending(saved_run) is None


@pytest.mark.parametrize(
    ("name", "damage", "why"),
    [
        ("model.safetensors", flip, "has changed since it was written"),
        ("model.safetensors", cut, "bytes instead of"),
        ("model.safetensors", Path.unlink, "is missing"),
        ("tokenizer.json", flip, "has changed since it was written"),
        ("config.json", flip, "has changed since it was written"),
    ],
)
def test_a_damaged_final_file_is_named(
    saved_run: Path, name: str, damage: Callable[[Path], object], why: str
) -> None:
    ending = read_ending(saved_run)
    assert ending is not None
    damage(saved_run / name)
    found = ending.why_damaged(saved_run)
    assert found is not None and found.startswith(name) and why in found


def test_the_files_of_an_earlier_version_are_opened(saved_run: Path) -> None:
    """It listed none, so only what cannot be opened is noticed."""
    ENDING.write(saved_run)
    ending = read_ending(saved_run)
    assert ending == ENDING and ending.why_damaged(saved_run) is None
    cut(saved_run / "model.safetensors")
    assert "model.safetensors cannot be opened" in str(ending.why_damaged(saved_run))


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("name", ["other.safetensors", "model.safetensors.index.json", "adapter_config.json"])
def test_a_file_of_the_user_does_not_count(saved_run: Path, name: str, listed: bool) -> None:
    if not listed:
        ENDING.write(saved_run)
    (saved_run / name).write_text("notes")
    ending = read_ending(saved_run)
    assert ending is not None and ending.why_damaged(saved_run) is None
    assert name not in ending.names(saved_run)


WRONG = [
    ("{", "line 1 is not JSON"),
    ("[]", "it does not hold a JSON object"),
    ('{"step": 20}', "it has other keys"),
    ('{"step": "20", "metrics": {}, "model_step": 20}', "step has another type"),
    ('{"step": 20, "metrics": [], "model_step": 20}', "metrics has another type"),
    ('{"step": 20, "metrics": {"loss": "x"}, "model_step": 20}', "metrics has another type"),
    ('{"step": 20, "metrics": {}, "model_step": null}', "model_step has another type"),
    ('{"step": 20, "metrics": {}, "model_step": 20, "done": {"merge": 1}}', "done has another type"),
    ('{"step": 20, "metrics": {}, "model_step": 20, "files": 7}', "it has other keys"),
    ('{"step": 20, "metrics": {}, "model_step": 20, "files": [{"path": 1}]}', "it has other keys"),
    (
        '{"step": 20, "metrics": {}, "model_step": 20, "files": [{"path": "../x", "bytes": 1, "xxh3": ""}]}',
        "files has another type",
    ),
]


@pytest.mark.parametrize(("text", "why"), WRONG)
def test_a_damaged_record_is_named(saved_run: Path, text: str, why: str) -> None:
    (saved_run / FINISHED).write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_ending(saved_run)
    message = str(raised.value)
    assert message.startswith(f"{saved_run / FINISHED} is damaged: ") and why in message
    assert "Restore it from a copy, or remove it" in message


def test_a_record_that_is_not_text_is_named(saved_run: Path) -> None:
    (saved_run / FINISHED).write_bytes(b"{\n\xff\n}")
    with pytest.raises(ConfigError, match="line 2 is not UTF-8"):
        read_ending(saved_run)
    (saved_run / FINISHED).unlink()
    (saved_run / FINISHED).mkdir()
    with pytest.raises(ConfigError, match="Is a directory"):
        read_ending(saved_run)
