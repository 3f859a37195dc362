"""Packed runs on real ranks: the steps of one process, epochs that end with idle ranks, and a resume."""

from __future__ import annotations

import shutil

import pytest
from ranks import BACKENDS, TRAINERS

# One process accumulates the micro-batches that two ranks share.
SUMMED = {"one": ["--gradient-accumulation", "4"], "two": ["--gradient-accumulation", "2"]}
# 40 rows are 17 packs of 128 tokens. 17 is a prime number, so the last step of an epoch is not full.
RUNS = {
    "packs": ["--packing", "bfd", "--batch-size", "1"],
    "a budget": ["--packing", "bfd", "--tokens-per-batch", "256"],
    "pairs to a budget": [*TRAINERS["dpo"], "--packing", "bfd", "--tokens-per-batch", "512"],
    "pairs": [*TRAINERS["reward"], "--packing", "bfd", "--batch-size", "3"],
}


def train(bench, name, backend, run, *flags):
    ranks = SUMMED["one" if backend == "one" else "two"]
    done = bench.train(
        f"{name}-{run.replace(' ', '-')}-{backend}", *BACKENDS[backend], *ranks, *RUNS[run], *flags
    )
    assert done.code == 0, done.out + done.err
    return done


@pytest.fixture(scope="module")
def one_process(bench):
    made = {}

    def run(name):
        if name not in made:
            made[name] = train(bench, "packed", "one", name)
        return made[name]

    return run


@pytest.mark.parametrize(
    ("backend", "run"),
    [
        ("ddp", "pairs to a budget"),
        ("fsdp", "a budget"),
        pytest.param("ddp", "packs", marks=pytest.mark.slow),
        pytest.param("zero3", "pairs to a budget", marks=pytest.mark.slow),
        pytest.param("ddp", "a budget", marks=pytest.mark.slow),
        pytest.param("ddp", "pairs", marks=pytest.mark.slow),
        pytest.param("fsdp", "packs", marks=pytest.mark.slow),
        pytest.param("fsdp", "pairs to a budget", marks=pytest.mark.slow),
        pytest.param("zero2", "packs", marks=pytest.mark.slow),
        pytest.param("zero2", "pairs", marks=pytest.mark.slow),
    ],
)
def test_packed_losses_equal_those_of_one_process(bench, one_process, backend, run):
    expected, found = one_process(run), train(bench, "packed", backend, run)
    assert found.losses == pytest.approx(expected.losses, abs=1e-4)
    values = [
        [entry["eval_loss"] for entry in done.metrics if "eval_loss" in entry] for done in (expected, found)
    ]
    assert values[0] and values[1] == pytest.approx(values[0], abs=1e-4)


@pytest.mark.parametrize("backend", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_resume_in_the_middle_of_a_later_epoch_continues_with_the_next_pack(bench, backend):
    saved = ["--save-steps", "6", "--eval-steps", "6", "--max-steps", "8"]
    uninterrupted = train(bench, "uninterrupted", backend, "packs", *saved)
    epochs = [entry["epoch"] for entry in uninterrupted.metrics if entry["step"] == 6]
    assert 1 < epochs[0] < 2, "the checkpoint is not inside the second epoch"
    target = bench.root / "packed-resumed"
    shutil.copytree(uninterrupted.folder, target)
    shutil.rmtree(target / "checkpoint-8")
    (target / "model.safetensors").unlink()
    (target / "finished.json").unlink()  # else nothing is trained again
    run = bench.train(target.name, *BACKENDS[backend], *SUMMED["two"], *RUNS["packs"], *saved, "--resume")
    assert run.code == 0, run.err
    assert "checkpoint-6" in run.out
    assert run.losses == uninterrupted.losses
    assert (target / "model.safetensors").read_bytes() == (
        uninterrupted.folder / "model.safetensors"
    ).read_bytes()
