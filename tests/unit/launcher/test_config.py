"""The full config of a run: flags override the file, and each value has a source."""

from __future__ import annotations

import pytest
from configs import Read, sft

from trainers.config.schema import TrainConfig


def test_each_value_has_a_source(read_config: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PX_DATA", "rows")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    run = read_config(
        sft("lr: 0.1").replace("path: data", "path: ${PX_DATA}"), learning_rate="0.2", num_processes="2"
    )
    sources = run.settings.sources
    assert run.train.lr == 0.2, "flags override the file"
    assert sources["lr"] == "flag --learning-rate"
    assert sources["trainer"] == "c.yaml:1"
    assert sources["seed"] == "c.yaml:6"
    assert sources["data_path"] == "c.yaml:3 (${PX_DATA})"
    assert sources["token"] == "environment HF_TOKEN"
    assert sources["weight_decay"] == "default"
    assert sources["data_seed"] == "derived: seed"
    assert set(sources) == set(TrainConfig.model_fields)
    assert run.launch_sources["num_processes"] == "flag --num-processes"
    assert run.launch_sources["offload"] == "default"


def test_the_sections_launch_and_slurm_are_read(read_config: Read) -> None:
    run = read_config(
        sft() + "launch:\n  num_processes: 4\n  zero_stage: 2\nslurm:\n  nodes: 2\n", zero_stage="3"
    )
    assert (run.launch.num_processes, run.launch.zero_stage, run.slurm.nodes) == (4, 3, 2)
    assert run.launch_sources["num_processes"] == "c.yaml:7"
    assert run.launch_sources["zero_stage"] == "flag --zero-stage"


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("base_model", "model"),
        ("data.path", "data_path"),
        ("data.train_split", "train_split"),
        ("data.column_mapping.text_column", "text_column"),
        ("project_name", "project_name"),
        ("quantization", "quantization"),
    ],
)
def test_a_message_has_the_source_of_its_key(read_config: Read, key: str, name: str) -> None:
    run = read_config(sft(), **{name: "int4" if name == "quantization" else "x", "peft": "true"})
    assert run.source_of(key) == f"flag --{name.replace('_', '-')}"
    assert run.source_of("launch.num_processes") == "default"
    assert run.source_of("data/train.jsonl:2") == ""


def test_a_flag_overrides_a_key_with_another_name(read_config: Read) -> None:
    assert read_config(sft("learning_rate: 0.1"), lr="0.2").train.lr == 0.2
    given = read_config(sft("gradient_checkpointing: true"), disable_gradient_checkpointing="true").train
    assert given.activation_checkpointing == "none"
