"""Whether a distribution is installed."""

from __future__ import annotations

from trainers.config.packages import installed


def test_installed() -> None:
    assert installed("pyyaml")
    assert not installed("no-such-distribution")
