"""Train on a mix: an evaluation has the loss of each source, and a resume keeps the mix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from inprocess import ROWS, build, train, write_split

from trainers.config.errors import ConfigError
from trainers.config.kinds import KINDS
from trainers.loop import final_evaluation
from trainers.output.model_card import write_card
from trainers.storage.ending import Ending

SLOW = [name for name in KINDS if name not in ("default", "kto", "mlm")]


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    """Two sources with other rows: code and chat."""
    made = {}
    for name, rows in (("code", ROWS[:4]), ("chat", ROWS[2:])):
        folder = tmp_path / name
        folder.mkdir()
        for split, own in (("train", rows), ("valid", rows[1:]), ("test", rows[::2])):
            write_split(folder / f"{split}.jsonl", own)
        made[name] = str(folder)
    return made


def mix(folders: dict[str, str], *weights: float) -> list[dict[str, Any]]:
    """Return the two sources with these weights."""
    return [{"path": path, "weight": weight} for path, weight in zip(folders.values(), weights, strict=True)]


@pytest.mark.parametrize(
    "trainer", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else []) for name in KINDS]
)
def test_the_loss_of_a_source_is_that_of_a_run_with_it_alone(
    tmp_path, tiny_model, tiny_masked_model, folders, trainer
):
    """eval_loss is the mean over all of them."""
    model = tiny_masked_model if trainer == "mlm" else tiny_model
    values = {"trainer": trainer, "valid_split": "valid", "batch_size": 2, "lr": 0.1, "model_max_length": 96}
    alone, weights = {}, {}
    for name, path in folders.items():
        trainer_of_one = build(tmp_path, model, data_path=path, **values).trainer
        alone[name] = trainer_of_one.evaluate()["eval_loss"]
        weights[name] = getattr(trainer_of_one, "_evaluated", [0, 3.0])[1]
    found = build(tmp_path, model, mix=mix(folders, 1, 1), **values).trainer.evaluate()
    assert {name: found[f"eval_{name}_loss"] for name in folders} == alone
    mean = sum(alone[n] * weights[n] for n in folders) / sum(weights.values())
    assert found["eval_loss"] == pytest.approx(mean, rel=1e-9)


def test_a_mix_is_evaluated_and_its_best_model_is_kept(tmp_path, tiny_model, folders):
    """The step of the best eval_loss, the test split, the record and the card have all sources."""
    built = build(
        tmp_path,
        tiny_model,
        mix=mix(folders, 3, 1),
        trainer="sft",
        valid_split="valid",
        test_split="test",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=2,
    )
    train(built)
    scored = [entry for entry in built.trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in scored] == [1, 2]
    assert all({"eval_code_loss", "eval_chat_loss"} <= set(entry) for entry in scored)
    assert built.trainer.state.best_metric == min(entry["eval_loss"] for entry in scored)
    ending = Ending(2, {}, 2)
    final_evaluation.evaluate(built.trainer, built.context, ending)
    assert set(ending.metrics) == {"test_loss", "test_code_loss", "test_chat_loss"}


@pytest.mark.parametrize(
    ("weights", "why"),
    [((3, 1), None), ((2, 1), r"mix\.code\.weight: it is 2\.0, but 3\.0 in the training of .*checkpoint-1")],
)
def test_a_rank_refuses_another_weight_at_a_resume(tmp_path, tiny_model, folders, weights, why):
    saves = {"trainer": "sft", "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    train(build(tmp_path, tiny_model, mix=mix(folders, 3, 1), **saves))
    again = build(tmp_path, tiny_model, mix=mix(folders, *weights), resume=True, **saves).trainer
    if why is None:
        assert again.find_checkpoint() == (tmp_path / "run" / "checkpoint-1", [])
    else:
        with pytest.raises(ConfigError, match=why):
            again.find_checkpoint()


def test_a_resume_refuses_other_rows_of_a_source(tmp_path, tiny_model, folders):
    saves = {"trainer": "sft", "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    train(build(tmp_path, tiny_model, mix=mix(folders, 3, 1), **saves))
    write_split(Path(folders["chat"]) / "train.jsonl", ROWS[1:5])
    again = build(tmp_path, tiny_model, mix=mix(folders, 3, 1), resume=True, **saves).trainer
    with pytest.raises(ConfigError, match=r"^data\.path: the rows, or how they are tokenized, have changed"):
        again.find_checkpoint()


@pytest.mark.parametrize("trainer", ["dpo", "kto"])
def test_a_reference_scores_a_mix_before_training(tmp_path, tiny_model, folders, trainer):
    """The samples of an epoch are a file then. The losses are those of a reference that is kept."""
    values = {"trainer": trainer, "valid_split": "valid", "batch_size": 2, "mix": mix(folders, 3, 1)}
    losses = []
    for early in (False, True):
        built = build(tmp_path, tiny_model, precompute_ref_log_probs=early, max_steps=3, **values)
        train(built)
        history = built.trainer.state.log_history
        losses.append(
            [entry[name] for entry in history for name in ("loss", "eval_code_loss") if name in entry]
        )
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_the_card_lists_the_sources(tmp_path, tiny_model, folders):
    from trainers.config.schema import TrainConfig

    sources = [
        {"name": "code", "path": "org/code", "weight": 3.0, "chat_template": None},
        {"name": "chat", "path": "/home/me/chat", "weight": 1.0, "chat_template": "/home/me/own.jinja"},
    ]
    counts = {"rows": 4, "kept": 4, "tokens": 10, "dropped": {}}
    own = {name: {**counts, "taken": taken} for name, taken in (("code", 6), ("chat", 2))}
    (tmp_path / "run").mkdir()
    facts = {"data": {"train": {**counts, "kept": 8, "sources": own}}}
    write_card(tmp_path / "run", TrainConfig(mix=sources), facts)
    text = (tmp_path / "run" / "README.md").read_text()
    assert "datasets:\n- org/code\n" in text
    assert "- code: `org/code`, split `train`" in text and "- chat: `chat` (local)" in text
    assert "| train, code |" in text and "samples in an epoch of the mix" in text
    assert "weight: 3.0" in text and "/home/me" not in text
