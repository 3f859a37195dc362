"""`phalanx show` accepts AutoTrain's example configs for language models without changes.

The table has the content of the examples, in AutoTrain's keys; the text of the files is our own. Values are
written as in AutoTrain's YAML: a YAML parser reads 3e-5 (without a dot) as text, and Phalanx as a number.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fakes import machine, run_command

from launcher.plan.topology import Hardware

TOKEN = "hf_plantedPlantedPlantedPlanted"
FORM = """\
task: {task}
base_model: {model}
project_name: autotrain-{name}
log: tensorboard
backend: {backend}

data:
  path: {data}
  train_split: {train_split}
  valid_split: {valid_split}
  chat_template: {template}
  column_mapping:
{columns}

params:
{params}

hub:
  username: ${{HF_USERNAME}}
  token: ${{HF_TOKEN}}
  push_to_hub: {push}
"""
LLAMA3 = "meta-llama/Meta-Llama-3-8B-Instruct"
LLAMA3_70B = "meta-llama/Meta-Llama-3-70B-Instruct"
CAPYBARA = "argilla/distilabel-capybara-dpo-7k-binarized"
GUANACO = "timdettmers/openassistant-guanaco"
METAMATH = "rishiraj/guanaco-style-metamath-40k"
PAIRS = {"text_column": "chosen", "rejected_text_column": "rejected", "prompt_text_column": "prompt"}
QLORA = {"peft": "true", "quantization": "int4", "target_modules": "all-linear"}
LORA = QLORA | {"quantization": "null"}
# How the notes begin that an example must give. The other examples must give none.
DROPPED = "quantization: AutoTrain's default int4 is not used"
NO_ADAPTER = "merge_adapter: has no effect"
NO_PROMPT = "max_prompt_length: has no effect, since it belongs to dpo, orpo, kto"
NO_PUSH = "username: has no effect, since push_to_hub is off"
UNSLOTH = "unsloth: has no effect, since its kernels and its loader are not used"


def params(block: int, limit: int, rows: str, lr: str, how: dict[str, str], **more: str) -> dict[str, str]:
    """Return the keys that every example has. `rows` is epochs, batch_size and gradient_accumulation."""
    epochs, batch, accumulation = rows.split()
    fixed = {"block_size": str(block), "model_max_length": str(limit), "epochs": epochs, "batch_size": batch}
    fixed |= {"lr": lr, "padding": "right", "gradient_accumulation": accumulation}
    usual = {"optimizer": "adamw_torch", "scheduler": "linear", "mixed_precision": "fp16"}
    return fixed | usual | how | more


@dataclass(frozen=True)
class Example:
    """A config: what it trains, the model and data, and the notes that it must give."""

    task: str
    model: str
    data: str
    params: dict[str, str]
    template: str = "chatml"
    columns: dict[str, str] = field(default_factory=lambda: PAIRS)
    train_split: str = "train"
    valid_split: str = "null"
    push: str = "true"
    backend: str = "local"
    notes: tuple[str, ...] = ()
    ranks: tuple[int, ...] = (1, 8)

    @property
    def trainer(self) -> str:
        return self.params.get("trainer", self.task.removeprefix("llm-"))

    def text(self, name: str) -> str:
        def lines(values: dict[str, str], indent: str) -> str:
            return "\n".join(f"{indent}{key}: {value}" for key, value in values.items())

        return FORM.format(
            name=name,
            **{key: getattr(self, key) for key in ("task", "model", "backend", "data", "template", "push")},
            train_split=self.train_split,
            valid_split=self.valid_split,
            columns=lines(self.columns, "    "),
            params=lines(self.params, "  "),
        )


TEXT = {"template": "null", "columns": {"text_column": "text"}}
CHAT = {"template": "tokenizer", "columns": {"text_column": "messages"}}
BF16 = {"mixed_precision": "bf16", "optimizer": "paged_adamw_8bit"}
EXAMPLES = {
    "llama3-8b-orpo": Example(
        "llm-orpo", LLAMA3, CAPYBARA, params(1024, 8192, "3 2 4", "3e-5", QLORA, max_prompt_length="512")
    ),
    "llama3-70b-orpo": Example(
        "llm-orpo", LLAMA3_70B, CAPYBARA,
        params(2048, 8192, "3 1 4", "1e-5", LORA, max_prompt_length="1024", scheduler="cosine", **BF16),
        valid_split="valid",
    ),
    "smollm2-orpo": Example(
        "llm-orpo", "HuggingFaceTB/SmolLM2-1.7B-Instruct", CAPYBARA,
        params(1024, 2048, "3 2 4", "3e-5", QLORA, max_prompt_length="512"), push="false",
        notes=(NO_PUSH,),
    ),
    "llama3-8b-dpo-qlora": Example(
        "llm-dpo", LLAMA3, "mlabonne/orpo-dpo-mix-40k",
        params(1024, 2048, "3 2 4", "3e-5", QLORA, max_prompt_length="512"), push="false",
        notes=(NO_PUSH,),
    ),
    "gpt2-sft": Example(
        "lm_training", "openai-community/gpt2", GUANACO,
        params(1024, 2048, "3 2 4", "3e-5", {}, trainer="sft", max_prompt_length="512", merge_adapter="true"),
        **TEXT, backend="local-cli", notes=(DROPPED, NO_ADAPTER, NO_PROMPT),
    ),
    "smollm2-guanaco": Example(
        "llm-sft", "HuggingFaceTB/SmolLM2-135M-Instruct", GUANACO,
        params(1024, 2048, "1 1 8", "1e-5", QLORA, merge_adapter="true", **BF16), **TEXT,
    ),
    "llama32-1b-sft": Example(
        "llm-sft", "meta-llama/Llama-3.2-1B", "HuggingFaceH4/no_robots",
        params(2048, 4096, "2 1 8", "1e-5", QLORA, merge_adapter="true", scheduler="cosine", **BF16), **CHAT,
    ),
    "qwen": Example(
        "llm-sft", "Qwen/Qwen2.5-Coder-7B-Instruct", "HuggingFaceH4/no_robots",
        params(2048, 4096, "1 1 1", "1e-5", QLORA, merge_adapter="true", scheduler="cosine"),
        **CHAT, train_split="test",
    ),
    "llama3-70b-sft": Example(
        "llm", LLAMA3_70B, METAMATH,
        params(2048, 8192, "2 1 8", "1e-5", LORA, trainer="sft", scheduler="cosine", **BF16),
        **TEXT, backend="local-cli",
    ),
    "llama3-8b-sft-unsloth": Example(
        "llm-sft", LLAMA3, METAMATH,
        params(1024, 8192, "3 2 4", "3e-5", QLORA, max_prompt_length="512", unsloth="true", lora_dropout="0"),
        **TEXT, notes=(NO_PROMPT, UNSLOTH), ranks=(1,),
    ),
}  # fmt: skip
CASES = [(name, ranks) for name, example in EXAMPLES.items() for ranks in example.ranks]
Show = Callable[..., tuple[int, str, str]]


@pytest.fixture
def show(
    work: Path,
    hardware: Callable[[Hardware], None],
    packages: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Show:
    """Return show(name, gpus, *flags): exit code, stdout and stderr of `phalanx show` on that example."""
    monkeypatch.setenv("HF_USERNAME", "me")
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def run(name: str, gpus: int, *flags: str) -> tuple[int, str, str]:
        (work / "c.yaml").write_text(EXAMPLES[name].text(name))
        hardware(machine(gpus=gpus))
        code = run_command(["show", "c.yaml", *flags], monkeypatch)
        out, err = capsys.readouterr()
        assert TOKEN not in out + err
        return code, out, err

    return run


@pytest.mark.parametrize(("name", "gpus"), CASES)
def test_an_example_is_accepted_unchanged(show: Show, name: str, gpus: int) -> None:
    example = EXAMPLES[name]
    code, out, err = show(name, gpus, "--json")
    assert (code, err) == (0, "")
    plan = json.loads(out)
    assert plan["ranks"] == {"num_processes": gpus, "num_machines": 1, "device": "cuda"}
    # The size of a model that is not downloaded is unknown. Then fsdp is chosen, or deepspeed for a paged
    # optimiser, which fsdp does not support.
    sharded = "deepspeed" if plan["config"]["optimizer"]["value"].startswith("paged_") else "fsdp"
    assert plan["backend"]["name"] == ("none" if gpus == 1 else sharded)

    config = {key: entry["value"] for key, entry in plan["config"].items()}
    assert config["trainer"] == example.trainer
    assert (config["model"], config["data_path"]) == (example.model, example.data)
    assert (config["username"], config["push_to_hub"]) == ("me", example.push == "true")
    assert config["train_split"] == example.train_split
    assert _means(config["valid_split"], example.valid_split)
    assert _means(config["chat_template"], example.template)
    assert {key: config[key] for key in example.columns} == example.columns
    assert config["eval_strategy"] == ("no" if example.valid_split == "null" else "epoch")
    assert _means(config["quantization"], example.params.get("quantization", "null"))
    changed = {"quantization", "merge_adapter"} if "peft" not in example.params else set()
    for key in example.params.keys() - changed:
        assert _means(config[key], example.params[key]), key
        assert plan["config"][key]["source"].startswith("c.yaml:"), key
    assert "token" not in config


def _means(found: object, word: str) -> bool:
    """Whether an effective value equals the table's value, which is text."""
    if isinstance(found, int | float) and not isinstance(found, bool):
        return found == float(word)
    return found == {"null": None, "true": True, "false": False}.get(word, word)


@pytest.mark.parametrize("name", EXAMPLES)
def test_notes_report_what_differs_from_autotrain(show: Show, name: str) -> None:
    _, out, _ = show(name, 1, "--json")
    notes = json.loads(out)["notes"]
    expected = EXAMPLES[name].notes
    assert {note.split(":")[0] for note in notes} == {words.split(":")[0] for words in expected}
    for words in expected:
        assert any(note.startswith(words) for note in notes), (words, notes)


@pytest.mark.parametrize(("name", "gpus"), CASES)
def test_the_plan_as_text_has_no_token(show: Show, name: str, gpus: int) -> None:
    code, out, err = show(name, gpus)
    assert (code, err) == (0, "") and f"autotrain-{name}" in out


def test_unsloth_is_refused_on_several_ranks(show: Show) -> None:
    code, out, err = show("llama3-8b-sft-unsloth", 8)
    assert (code, out) == (2, "")
    assert err.startswith("error: c.yaml:") and "Use unsloth: false." in err
