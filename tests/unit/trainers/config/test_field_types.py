"""How YAML values and the text of flags become the values of fields."""

from __future__ import annotations

import pytest
from configs import Read, sft


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("lr: 3e-5", "lr", 3e-5),  # a string for PyYAML
        ("lr: 1", "lr", 1.0),
        ("epochs: 0.5", "epochs", 0.5),
        ("eval_strategy: no", "eval_strategy", "no"),  # false for PyYAML
        ("save_strategy: no", "save_strategy", "no"),
        ("mixed_precision: none", "mixed_precision", None),
        ("mixed_precision: null", "mixed_precision", None),
        ("quantization: none", "quantization", None),
        ("block_size: '512'", "block_size", 512),
        ("peft: yes", "peft", True),
        ("resume: true", "resume", True),
        ("resume: run/checkpoint-3", "resume", "run/checkpoint-3"),
        ("weight_decay: 1e-2", "weight_decay", 0.01),
    ],
)
def test_yaml_values_are_converted(read_config: Read, line: str, name: str, value: object) -> None:
    params = [line, "peft: true"] if line.startswith("quantization") else [line]
    assert getattr(read_config(sft(*params)).train, name) == value


@pytest.mark.parametrize("line", ["block_size: 512,256", "block_size: [512, 256]"])
def test_block_size_may_be_a_list(read_config: Read, line: str) -> None:
    config = read_config(sft(line).replace("llm-sft", "llm-dpo")).train
    assert (config.block_size, config.sequence_length, config.max_prompt_length) == ([512, 256], 512, 256)


@pytest.mark.parametrize(
    ("written", "meant"), [("true", "full"), ("false", "none"), ("no", "none"), ("selective", "selective")]
)
def test_activation_checkpointing_accepts_the_spelling_of_transformers(
    read_config: Read, written: str, meant: str
) -> None:
    assert read_config(sft(f"activation_checkpointing: {written}")).train.activation_checkpointing == meant
    assert read_config(sft(), activation_checkpointing=written).train.activation_checkpointing == meant
