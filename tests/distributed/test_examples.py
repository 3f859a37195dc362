"""Every example config runs to its end, and writes a model that opens with its class, a record and a card.

The models are the tiny ones. The causal model is at the path that the examples name; a flag sets the masked
one.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from places import REPO

from trainers.config.kinds import KINDS

# The commands of the pages run the others.
EXAMPLES = sorted(p.stem for p in (REPO / "examples").glob("*.yaml") if p.stem not in ("demo", "mix"))
OPENED_AS = {"reward": "SequenceClassification", "mlm": "MaskedLM"}  # others: CausalLM


def config_of(name: str) -> dict:
    return yaml.safe_load((REPO / "examples" / f"{name}.yaml").read_text())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, tiny_model) -> Path:
    root = tmp_path_factory.mktemp("examples")
    shutil.copytree(REPO / "examples", root / "examples")
    shutil.copytree(tiny_model, root / ".demo" / "SmolLM2-135M-Instruct")
    return root


def opened(folder: Path, kind: str, adapter: bool):
    """Open the saved model with the class that a user takes."""
    import peft
    import transformers

    if not adapter:
        return getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder)
    more = {"num_labels": 1} if kind == "SequenceClassification" else {}
    return getattr(peft, f"AutoPeftModelFor{kind}").from_pretrained(folder, **more)


def test_each_trainer_has_an_example():
    assert sorted(EXAMPLES) == sorted(kind.module for kind in KINDS.values())


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs_to_its_end(bench, checkout, tiny_masked_model, monkeypatch, name):
    config = config_of(name)
    adapter = bool(config["params"].get("peft"))
    more = ["--model", str(tiny_masked_model)] if name == "mlm" else []
    argv = [sys.executable, "-m", "launcher", "train", f"examples/{name}.yaml"]
    argv += ["--num-processes", "1", "--max-steps", "2", *more]
    done = subprocess.run(argv, cwd=checkout, env=bench.environ, text=True, capture_output=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^train: .* dropped 0$", done.stdout, re.M), "a row of the example was dropped"

    monkeypatch.chdir(checkout)  # an adapter names its base model by the same relative path as the config
    folder = checkout / config["project_name"]
    record = json.loads((folder / "run.json").read_text())
    assert record["config"]["trainer"]["value"] == ("default" if name == "clm" else name)
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any("loss" in entry for entry in logged) and any("eval_loss" in entry for entry in logged)
    assert (folder / "README.md").read_text().startswith("---\n")
    assert (folder / "adapter_config.json").exists() == adapter
    model = opened(folder, OPENED_AS.get(name, "CausalLM"), adapter)
    if name == "reward":
        assert model.config.num_labels == 1


def test_pairs_have_different_prompts_and_two_different_answers():
    lines = (REPO / "examples" / "data" / "pairs.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len({row["prompt"] for row in rows}) == len(rows) == 40
    assert all(row["chosen"] != row["rejected"] for row in rows)
