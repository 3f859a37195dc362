"""Settings that contradict each other are refused, and a setting without effect has a note."""

from __future__ import annotations

import pytest
from configs import Read, sft
from inprocess import settings_of

from trainers.config.errors import ConfigError
from trainers.config.settings import resolve
from trainers.config.values import Value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trainer": "dpo", "packing": "wrapped"}, "packing: wrapped would cut the answers of dpo"),
        ({"trainer": "mlm", "packing": "bfd"}, "packing: in a masked LM each token sees the full sequence"),
        ({"tokens_per_batch": 512}, "tokens_per_batch: 512 is below block_size"),
        ({"tokens_per_batch": 4096, "packing": "none"}, "tokens_per_batch: it counts no padding"),
        (
            {"tokens_per_batch": 4096, "auto_find_batch_size": True},
            "auto_find_batch_size: tokens_per_batch already sets",
        ),
        ({"packing": "none", "eval_packing": True, "valid_split": "v"}, "eval_packing: packing is none"),
    ],
)
def test_contradictory_settings_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        settings_of(**{"model": "m", "trainer": "sft", "block_size": 1024, **values})


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("dpo_beta", 0.2, "it belongs to dpo"),
        ("lora_r", 8, "peft is off"),
        ("eval_steps", 5, "no valid_split"),
        ("save_steps", 5, "save_strategy is not steps"),
        ("epochs", 2, "max_steps is set"),
        ("warmup_ratio", 0.2, "warmup_steps is set"),
    ],
)
def test_a_parameter_without_effect_has_a_note(name, value, why):
    others = {"trainer": "sft", "save_strategy": "epoch", "max_steps": 4, "warmup_steps": 1, name: value}
    settings = resolve({key: Value(entry, "f:1", key) for key, entry in others.items()})
    assert f"{name}: has no effect" in "\n".join(settings.notes)
    assert why in next(note for note in settings.notes if note.startswith(name))


@pytest.mark.parametrize(("minutes", "idle"), [(None, True), (30, False)])
def test_save_total_limit_has_an_effect_with_save_minutes(minutes, idle):
    values = {"trainer": "sft", "save_strategy": "no", "save_total_limit": 3, "save_minutes": minutes}
    settings = resolve({key: Value(entry, "f:1", key) for key, entry in values.items()})
    assert any(note.startswith("save_total_limit: has no effect") for note in settings.notes) == idle


def test_unsloth_has_a_note(read_config: Read) -> None:
    assert any(
        note.startswith("unsloth: has no effect, since its kernels and its loader")
        for note in read_config(sft("unsloth: true")).settings.notes
    )
