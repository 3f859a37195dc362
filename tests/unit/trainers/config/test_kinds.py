"""The records of the trainers agree with the schema, with the modules of trainers/, and with the examples."""

from __future__ import annotations

import re
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
from places import REPO

from trainers.config.file import read_config_file
from trainers.config.kinds import KINDS, ROW_COLUMNS, RowKind, TrainerName, trainers
from trainers.config.schema import TrainConfig, acts_for
from trainers.loop import life

# Modules at the top of trainers/ that train nothing.
NO_TRAINERS = {"__init__", "consolidate", "evaluate", "push", "show_data", "warm"}


def test_each_trainer_of_the_schema_has_a_record() -> None:
    assert TrainConfig.model_fields["trainer"].annotation == TrainerName
    assert set(get_args(TrainerName)) == set(KINDS)


def test_each_module_at_the_top_is_that_of_one_trainer() -> None:
    found = sorted(path.stem for path in (REPO / "trainers").glob("*.py") if path.stem not in NO_TRAINERS)
    assert sorted(kind.module for kind in KINDS.values()) == found


@pytest.mark.parametrize("trainer", KINDS)
def test_the_module_runs_its_trainer(trainer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def run(name: str, build: Any, argv: Sequence[str] | None = None) -> int:
        started.append((name, callable(build)))
        return 7

    monkeypatch.setattr(life, "run", run)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPO / "trainers" / f"{KINDS[trainer].module}.py"), run_name="__main__")
    assert (started, end.value.code) == ([(trainer, True)], 7)


def test_each_kind_of_row_has_columns() -> None:
    assert set(ROW_COLUMNS) == set(get_args(RowKind))


def test_loss_type_has_an_effect_for_the_trainers_with_several_losses() -> None:
    assert acts_for("loss_type") == trainers(lambda kind: bool(kind.losses))


@pytest.mark.parametrize("trainer", KINDS)
def test_the_losses_that_need_two_samples_are_losses_of_the_trainer(trainer: str) -> None:
    assert set(KINDS[trainer].batch_losses) <= set(KINDS[trainer].losses)


@pytest.mark.parametrize("trainer", KINDS)
def test_the_default_packing_is_one_that_the_trainer_supports(trainer: str) -> None:
    kind = KINDS[trainer]
    assert kind.default_packing != "wrapped" or kind.wraps
    assert not (kind.planned or kind.wraps) or kind.packs, "only packs can be filled or cut"


@pytest.mark.parametrize("trainer", KINDS)
def test_each_trainer_has_an_example_and_is_in_the_documentation(trainer: str) -> None:
    example = Path("examples", f"{KINDS[trainer].module}.yaml")
    assert read_config_file(REPO / example).train["trainer"].value == trainer
    row = re.search(rf"^\| .*`llm-{trainer}`.*$", (REPO / "docs/trainers.md").read_text(), re.M)
    assert row is not None and f"`{example}`" in row[0]
    tasks = re.search(r"^task: .*$", (REPO / "docs/config.md").read_text(), re.M)
    assert tasks is not None and f"llm-{trainer}" in tasks[0].replace(",", "").split()
