"""The model card shows what was done and measured, and claims nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from saved_run import FACTS

from trainers.config.kinds import KINDS
from trainers.config.schema import TrainConfig
from trainers.output.model_card import write_card

TOKEN = "hf_canaryCanaryCanaryCanaryCanary"


def card(folder: Path, config: TrainConfig, facts: dict) -> tuple[dict, str]:
    """Write the card; return its metadata and its text."""
    write_card(folder, config, facts)
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_card_shows_what_was_done_and_measured(saved_run, tmp_path):
    data = tmp_path / "home" / "secret-folder" / "rows"
    data.mkdir(parents=True)
    secret = {"push_to_hub": True, "username": "me", "token": TOKEN, "data_path": str(data)}
    chosen = {"lr": 1e-3, "valid_split": "valid", "block_size": 64}
    config = TrainConfig(trainer="sft", model="org/base", **secret, **chosen)
    front, text = card(saved_run, config, FACTS)
    assert front == {
        "library_name": "transformers",
        "base_model": "org/base",
        "tags": ["phalanx", "sft"],
        "pipeline_tag": "text-generation",
    }
    assert "All weights were trained" in text and "`org/base`" in text and "`rows` (local)" in text
    assert "| train | 40 | 2120 | 1138 | 68 | 3 | 2 |" in text
    assert "Dropped from train: 2 (no trained token)." in text and "duplicate" not in text
    assert "lr: 0.001\n" in text and "block_size: 64\n" in text and "epochs" not in text
    assert "| loss | 5.25 | 2 |" in text and "| eval_loss | 5.75 | 4 |" in text
    assert "runtime" not in text and "num_tokens" not in text and "train_loss" not in text
    assert "Cut to block_size: 3 samples of train" in text and "Dropped: 2 of the 40 rows of train" in text
    assert "Safety, bias and truthfulness were not evaluated" in text
    assert "- torch: 1.2.3" in text
    assert "licen" not in str(front)
    assert TOKEN not in text and str(tmp_path) not in text and "secret-folder" not in text


def test_the_card_shows_the_evaluation_that_chose_the_model(saved_run):
    _, text = card(
        saved_run, TrainConfig(valid_split="valid", load_best_model_at_end=True), {**FACTS, "model_step": 2}
    )
    assert "| eval_loss | 5.5 | 2 |" in text and "The saved model is that of step 2" in text


def test_the_card_claims_nothing_that_was_not_measured(saved_run):
    (saved_run / "metrics.jsonl").unlink()
    _, text = card(saved_run, TrainConfig(data_path="org/rows"), {})
    assert "Nothing was measured" in text and "It was not evaluated" in text
    assert "counts were not recorded" in text
    assert "transformers: " in text


def test_the_card_of_an_adapter_names_no_folder_above_its_base(saved_adapter, tmp_path):
    base = tmp_path / "home" / "base"
    config = TrainConfig(
        model=str(base),
        model_ref=str(base),
        trainer="dpo",
        peft=True,
        quantization="int4",
        data_path="org/rows",
    )
    front, text = card(saved_adapter, config, FACTS)
    assert front["library_name"] == "peft" and front["datasets"] == ["org/rows"]
    assert "base_model" not in front
    assert "LoRA adapters (rank 16, alpha 32)" in text and "quantised to int4" in text
    assert "PeftModel.from_pretrained(base, name)" in text and "'base'" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("trainer", KINDS)
@pytest.mark.parametrize("kind", ["run", "adapter"])
def test_the_snippet_of_every_trainer_is_valid_python(trainer, kind, request):
    folder = request.getfixturevalue(f"saved_{kind}")
    front, text = card(folder, TrainConfig(trainer=trainer, peft=kind == "adapter"), FACTS)
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    loader = {"reward": "AutoModelForSequenceClassification", "mlm": "AutoModelForMaskedLM"}
    assert loader.get(trainer, "AutoModelForCausalLM") in code
    expected = {"reward": "text-classification", "mlm": "fill-mask"}.get(trainer, "text-generation")
    assert front["pipeline_tag"] == expected


def test_the_snippet_loads_the_model(saved_run, monkeypatch):
    _, text = card(saved_run, TrainConfig(), FACTS)
    monkeypatch.chdir(saved_run.parent)
    found: dict = {}
    exec(text.split("```python\n")[1].split("```")[0], found)
    assert found["model"].num_parameters() > 0 and len(found["tokenizer"]) == 384
