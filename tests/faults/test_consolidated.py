"""`phalanx consolidate`: the shards of real ranks become the model that the run itself saved."""

from __future__ import annotations

import sys

import pytest
from planted import LORA


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
def test_a_run_is_consolidated(faults, bench, tmp_path, backend, flags):
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
        assert torch.equal(ours[key], tensor), key  # the newest checkpoint is of the last step


def test_what_is_no_run_is_refused(bench):
    argv = [sys.executable, "-m", "launcher", "consolidate", "nowhere"]
    done = bench.finish("nowhere", argv)
    assert done.code == 2
    assert "error: nowhere: there is no checkpoint that verifies." in done.err
