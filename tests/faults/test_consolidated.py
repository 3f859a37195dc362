"""`phalanx consolidate`: the shards of real ranks give the same model as the run saved."""

from __future__ import annotations

import os
import shutil
import sys

import pytest
from planted import LORA, STEPS


@pytest.mark.parametrize(
    ("backend", "flags"),
    [
        ("fsdp", ()),
        ("zero2", ()),
        pytest.param("ddp", (), marks=pytest.mark.slow),
        pytest.param("ddp", LORA, marks=pytest.mark.slow),
        pytest.param("fsdp", LORA, marks=pytest.mark.slow),
        pytest.param("zero3", (), marks=pytest.mark.slow),
    ],
    ids=lambda part: part if isinstance(part, str) else "lora" if part else "full",
)
def test_consolidate_gives_the_model_that_the_run_saved(faults, bench, tmp_path, backend, flags):
    import torch
    from safetensors.torch import load_file

    run = faults.uninterrupted(backend, *flags)
    made = tmp_path / "made"
    argv = [sys.executable, "-m", "launcher", "consolidate", run.folder.name, "--output", str(made)]
    done = bench.finish(run.folder.name, argv)
    assert done.code == 0, done.out + done.err
    assert f"consolidated: {made}" in done.out
    name = "adapter_model.safetensors" if flags else "model.safetensors"
    ours, saved = load_file(made / name), load_file(run.folder / name)
    assert ours.keys() == saved.keys()
    for key, tensor in saved.items():
        assert torch.equal(ours[key], tensor), key  # the newest checkpoint is that of the last step


def test_a_rank_whose_file_is_missing_or_broken_is_an_error(faults, tmp_path, capsys, monkeypatch):
    from trainers import consolidate

    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")  # it is set for the full process
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    checkpoint = tmp_path / f"checkpoint-{STEPS}"
    shutil.copytree(faults.uninterrupted("zero2").folder / checkpoint.name, checkpoint)
    path = next(checkpoint.glob("global_step*/*_pp_rank_1_*optim_states.pt"))
    os.truncate(path, path.stat().st_size // 2)
    assert consolidate.main([str(checkpoint), str(tmp_path / "out")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    path.unlink()
    assert consolidate.main([str(checkpoint), str(tmp_path / "out")]) == 2
    assert "files of 1 rank, but it was written by 2 ranks" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == [checkpoint.name]


def test_a_folder_without_a_run_is_refused(bench):
    argv = [sys.executable, "-m", "launcher", "consolidate", "nowhere"]
    done = bench.finish("nowhere", argv)
    assert done.code == 2
    assert "error: nowhere: there is no checkpoint that verifies." in done.err
