"""A checkpoint is unpickled without running its code."""

from __future__ import annotations

import pickle

import pytest
import torch
from shards import Malice, checkpoint_of, plant_code
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from trainers.checkpoint import safe_pickle
from trainers.checkpoint.safe_pickle import SafeReader, allow_deepspeed

pytestmark = pytest.mark.usefixtures("own_process")


def test_an_index_with_code_is_refused_before_the_code_runs(tmp_path, tiny_model):
    folder, _ = checkpoint_of(tmp_path / "checkpoint-3", tiny_model)
    mark = tmp_path / "ran"
    plant_code(folder / "shards", mark)
    with pytest.raises(pickle.UnpicklingError):
        SafeReader(folder / "shards").read_metadata()
    assert not mark.exists()


def test_an_optimiser_state_with_code_is_refused(tmp_path):
    """DCP unpickles values that are not tensors, and a resume reads them."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    save({"step": Malice(tmp_path / "ran")}, storage_writer=FileSystemWriter(tmp_path / "s"), no_dist=True)
    with pytest.raises(CheckpointException, match=r"posix\.system"):
        load({"step": 0}, storage_reader=SafeReader(tmp_path / "s"), no_dist=True)
    assert not (tmp_path / "ran").exists()


def test_our_reader_reads_an_index_as_torch_does(tmp_path, tiny_model):
    folder, _ = checkpoint_of(tmp_path / "checkpoint-3", tiny_model)
    ours = SafeReader(folder / "shards").read_metadata()
    theirs = FileSystemReader(folder / "shards").read_metadata()
    ours.storage_meta = theirs.storage_meta
    assert ours == theirs


def test_the_classes_that_an_index_may_have_exist():
    import importlib

    for name, members in safe_pickle.INDEX.items():
        if name != "pathlib._local":  # only in Python 3.13
            assert all(hasattr(importlib.import_module(name), member) for member in members)


def test_deepspeed_may_load_its_classes_but_no_code(tmp_path):
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    allow_deepspeed()
    scaler = DynamicLossScaler(2.0**16, 2.0, 1000, 1.0, 2)
    torch.save({"loss_scaler": scaler}, tmp_path / "scaler.pt")
    loaded = torch.load(tmp_path / "scaler.pt", weights_only=False)["loss_scaler"]
    assert vars(loaded) == vars(scaler)
    torch.save({"loss_scaler": Malice(tmp_path / "ran")}, tmp_path / "code.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "code.pt", weights_only=False)
    assert not (tmp_path / "ran").exists()
