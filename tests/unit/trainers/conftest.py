"""Fixtures of the trainers: the folder of a finished run, a checkpoint, and the tokenizer of a run."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
from fakes import fake_checkpoint
from saved_run import make_adapter, write_run

from trainers.config.schema import TrainConfig


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of step 5 that verifies."""
    return fake_checkpoint(tmp_path, 5)


@pytest.fixture
def saved_run(tmp_path: Path, tiny_model: Path) -> Path:
    """The folder of a finished run."""
    return write_run(tmp_path / "home" / "my-run", tiny_model)


@pytest.fixture
def saved_adapter(saved_run: Path) -> Path:
    """The folder of the same run with an adapter."""
    return make_adapter(saved_run)


@pytest.fixture
def run_tokenizer(tiny_model, tokenizer, tmp_path):
    """`run_tokenizer(pad=..., **config)`: the tokenizer as a run loads it. Its folder says `pad`."""
    from trainers.model.tokenizer import load_tokenizer

    def loaded(pad="<pad>", **config):
        own = deepcopy(tokenizer)
        own.pad_token = pad
        own.save_pretrained(tmp_path / "tokenizer")
        for file in ("config.json", "model.safetensors"):
            (tmp_path / "tokenizer" / file).write_bytes((tiny_model / file).read_bytes())
        return load_tokenizer(TrainConfig(model=str(tmp_path / "tokenizer"), **config))[0]

    return loaded


@pytest.fixture
def own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo after the test what consolidate, safe_pickle and trust change for their process."""
    from transformers import dynamic_module_utils
    from transformers.integrations import hub_kernels

    for owner, name in (
        (dynamic_module_utils, "TIME_OUT_REMOTE_CODE"),
        (hub_kernels, "_kernels_enabled"),
        (hub_kernels, "get_kernel"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
