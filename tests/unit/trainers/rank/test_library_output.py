"""Which lines of the libraries a rank prints."""

import logging
from collections.abc import Iterator

import pytest

from trainers.rank import library_output


@pytest.fixture
def loggers(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.LogCaptureFixture]:
    """Log as the libraries do, to caplog. After the test, filters and environment are as before."""
    for name in ("TQDM_DISABLE", "TRL_EXPERIMENTAL_SILENCE"):
        monkeypatch.setenv(name, "")
    before = {name: list(logging.getLogger(name).filters) for name in library_output.HIDDEN}
    for name in library_output.HIDDEN:
        logging.getLogger(name).addHandler(caplog.handler)
    yield caplog
    for name, filters in before.items():
        logging.getLogger(name).removeHandler(caplog.handler)
        logging.getLogger(name).filters = filters


def test_only_the_known_warnings_are_hidden(loggers: pytest.LogCaptureFixture) -> None:
    library_output.quieten_libraries()
    for name, text in library_output.HIDDEN.items():
        logging.getLogger(name).warning(f"[RANK 0] {text}. And more.")
        logging.getLogger(name).warning("out of disk")
    assert {record.getMessage() for record in loggers.records} == {"out of disk"}


def test_the_libraries_still_say_the_hidden_lines() -> None:
    """A line that a library no longer has can leave the table."""
    accelerate = pytest.importorskip("accelerate.accelerator")
    deepspeed = pytest.importorskip("deepspeed.accelerator.real_accelerator")
    bitsandbytes = pytest.importorskip("bitsandbytes.backends.cpu.ops")
    transformers = pytest.importorskip("transformers.trainer_utils")
    for module, text in zip(
        (deepspeed, accelerate, bitsandbytes, transformers), library_output.HIDDEN.values(), strict=True
    ):
        with open(module.__file__, encoding="utf-8") as source:
            assert text in source.read()
