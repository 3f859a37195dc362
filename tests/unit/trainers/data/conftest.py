"""Fixtures for the tests of the data: what a preparation drops and refuses, and the texts of a sample."""

from __future__ import annotations

import pytest

from trainers.config.errors import ConfigError


@pytest.fixture
def dropped(prepare):
    """`dropped(rows, ...)`: the count per reason. The line of the summary must contain the reasons."""

    def check(rows, **config):
        summary = prepare(rows, **config).summary
        assert summary.rows == len(rows)
        for reason, count in summary.dropped.items():
            assert f"{count} ({reason})" in summary.line
        return summary.dropped

    return check


@pytest.fixture
def refused(prepare):
    """`refused(rows, words, ...)`: prepare raises a ConfigError of one line that holds all the words."""

    def check(rows, *words, **config):
        with pytest.raises(ConfigError) as error:
            prepare(rows, **config)
        message = str(error.value)
        assert "\n" not in message
        for word in words:
            assert word in message

    return check


@pytest.fixture
def texts(prepare, tokenizer):
    """`texts(row, ...)`: the decoded columns of the first sample."""

    def read(row, **config):
        found = prepare([row], **config).dataset[0]
        return {name.removesuffix("_ids"): tokenizer.decode(ids) for name, ids in found.items()}

    return read
