"""The rules for machine, packages and backend. tests/unit/launcher/test_bad_input.py breaks them."""

from __future__ import annotations

from launcher.config import LaunchConfig
from trainers.config.packages import installed
from trainers.config.requirements import RULES
from trainers.config.schema import TrainConfig


def test_every_rule_names_a_key_and_a_fix() -> None:
    for rule in RULES:
        section, _, name = rule.key.rpartition(".")
        assert name in {"": TrainConfig, "launch": LaunchConfig}[section].model_fields
        assert rule.reason.endswith(".")
        assert rule.fix.endswith(".")


def test_installed() -> None:
    assert installed("pyyaml")
    assert not installed("no-such-distribution")
