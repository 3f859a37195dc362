"""Each field of the config has one rule for a resume, and docs/checkpoints.md lists all of them."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args, get_origin

import pytest
from fakes import fake_checkpoint, fake_run
from inprocess import settings_of
from places import REPO

from trainers.config.errors import ConfigError
from trainers.config.on_resume import (
    COMPARED,
    FIXED,
    RULES,
    TRAINING,
    USED,
    Rule,
    as_trained,
    why_refused,
    why_too_short,
)
from trainers.config.schema import TrainConfig
from trainers.storage.identity import RECORD
from trainers.storage.resumed import Inputs, check_inputs, check_resume
from trainers.storage.run_folder import FINISHED, write_record

ROWS = {"fixed": FIXED, "training": TRAINING, "used": USED, "compared": COMPARED}


def test_each_field_has_one_rule():
    """A new field needs a decision: add it to a list of trainers/config/on_resume.py, and to the table."""
    listed = [name for names in ROWS.values() for name in names]
    assert sorted(listed) == sorted(TrainConfig.model_fields)
    assert set(RULES.values()) == set(get_args(Rule))


def test_the_table_of_the_page_has_each_field_under_its_rule():
    text = (REPO / "docs" / "checkpoints.md").read_text()
    found = {
        match[1]: tuple(re.findall(r"`(\w+)`", match[2]))
        for match in re.finditer(r"^\| \*\*(\w+)\*\*[^|]*\|[^|]*\| ([^|]*) \|$", text, re.M)
    }
    assert found == ROWS


def another(name: str, value: Any) -> Any:
    """Return a value of the field other than `value`."""
    annotation = TrainConfig.model_fields[name].annotation
    choices = [arg for arg in (annotation, *get_args(annotation)) if get_origin(arg) is Literal]
    if choices:
        return next(choice for choice in get_args(choices[0]) if choice != value)
    if isinstance(value, bool) or value is None:
        return not value
    return value + 1 if isinstance(value, (int, float)) else f"{value}-other"


@pytest.mark.parametrize("name", TrainConfig.model_fields)
def test_another_value_is_refused_exactly_if_the_field_is_fixed(name):
    now = TrainConfig()
    then = {**now.public(), name: another(name, getattr(now, name))}
    why = why_refused("run/checkpoint-5", then, now)
    assert (why is not None) == (RULES[name] == "fixed")
    if why is not None:
        assert why.startswith(f"{name}: it is ") and "the training of run/checkpoint-5" in why
        assert "Give the old one, or start anew with --overwrite or another project_name." in why


def test_all_fields_that_differ_are_named_with_both_values():
    now = settings_of(lr=1e-3, optimizer="sgd", trainer="sft").train
    why = why_refused("run", {**now.public(), "lr": 1e-2, "optimizer": "adamw_torch"}, now)
    assert why is not None and why.startswith(
        "lr: it is 0.001, but 0.01 in the training of run; optimizer: it is sgd, but adamw_torch in the "
        "training of run. A resume cannot change these values."
    )


def test_a_field_that_the_checkpoint_does_not_record_is_not_compared():
    assert why_refused("run", {}, TrainConfig()) is None


@pytest.mark.parametrize(("length", "field"), [({"max_steps": 4}, "max_steps"), ({"epochs": 1}, "epochs")])
def test_a_run_that_would_end_before_the_checkpoint_is_refused(length, field):
    now = settings_of(**length).train
    assert why_too_short("run/checkpoint-5", 5, now, 5) is None
    assert str(why_too_short("run/checkpoint-5", 5, now, 4)).startswith(
        f"{field}: the run would end at step 4, but run/checkpoint-5 is trained to step 5."
    )


def test_the_config_of_a_finished_run_keeps_what_describes_the_training():
    trained = settings_of(max_steps=12, save_steps=4).train.public()
    now = settings_of(max_steps=12, save_steps=3, save_total_limit=9, merge_adapter=True, peft=True).train
    config, note = as_trained(trained, now, merged=False)
    assert (config.save_steps, config.save_total_limit, config.merge_adapter) == (4, 1, True)
    assert note.startswith("save_steps, save_total_limit: have no effect, since the run is trained")
    assert as_trained(now.public(), now, merged=False) == (now, "")
    assert as_trained(trained, now, merged=True)[0].merge_adapter is False  # it cannot be merged again


def test_a_resume_is_compared_with_its_checkpoint(tmp_path):
    old = settings_of(lr=1e-2, trainer="sft").train
    run = tmp_path / "run"
    checkpoint = fake_checkpoint(run, 5, config=old.public())
    check_resume(run, settings_of(lr=1e-2, trainer="sft", resume=True, save_steps=2, max_steps=9).train)
    for resume in (True, str(checkpoint)):
        with pytest.raises(ConfigError, match=r"^lr: it is 0\.1, but 0\.01 in the train.*checkpoint-5"):
            check_resume(run, settings_of(lr=1e-1, trainer="sft", resume=resume).train)
        with pytest.raises(ConfigError, match=r"^max_steps: the run would end at.* 4, but .*checkpoint-5"):
            check_resume(run, settings_of(lr=1e-2, trainer="sft", resume=resume, max_steps=4).train)


def test_a_resume_of_a_finished_run_is_compared_with_its_record(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = fake_run("run")
    write_record(run, settings_of(trainer="sft", max_steps=5, lr=1e-2), {})
    given = {"trainer": "sft", "max_steps": 5, "resume": True}
    check_resume(run, settings_of(**given, lr=1e-3).train)  # not finished and no checkpoint: it starts anew
    (run / FINISHED).write_text("{}")
    check_resume(run, settings_of(**given, lr=1e-2, push_to_hub=True, username="me", token="hf_x").train)
    for change in ({"lr": 1e-3}, {"lr": 1e-2, "peft": True, "merge_adapter": True, "quantization": None}):
        with pytest.raises(ConfigError, match="in the training of run"):
            check_resume(run, settings_of(**{**given, **change}).train)
    (run / RECORD).write_text("{")
    check_resume(run, settings_of(**given, lr=1e-3).train)  # nothing to compare with; the rank warns


@pytest.mark.parametrize(
    ("now", "why"),
    [
        (
            Inputs("rows", {"base_model": "b", "model_ref": "a"}),
            r"^base_model: it is not the model of the training of run",
        ),
        (Inputs("rows", {"base_model": "a", "model_ref": "b"}), r"^model_ref: it is not the model"),
        (Inputs("rows", {"base_model": "a"}), r"^model_ref: there was one in the training of run"),
        (
            Inputs("others", {"base_model": "a", "model_ref": "a"}),
            r"^data\.path: the rows, or how they are tokenized",
        ),
    ],
)
def test_other_rows_or_weights_are_refused(now, why):
    then = Inputs("rows", {"base_model": "a", "model_ref": "a"})
    check_inputs("run", then, then)
    check_inputs("run", Inputs("rows"), Inputs("rows", then.weights))  # it records no weights
    with pytest.raises(ConfigError, match=why):
        check_inputs("run", then, now)
    with pytest.raises(ConfigError, match=r"^model_ref: there was none in the training of run"):
        check_inputs("run", Inputs("rows", {"base_model": "a"}), then)
