"""auto_find_batch_size with real ranks: it trains as the smaller batch would have from the start."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from places import REPO
from ranks import BACKENDS, Bench, Finished

from launcher.plan.topology import free_port

# A device whose memory holds FITS rows: from step SINCE on, rank 1 (or the only one) has no room for more.
SMALL_DEVICE = """
import importlib.machinery, os, sys, time

def wrap(Trainer, OutOfMemoryError):
    step = Trainer.training_step
    def training_step(self, model, inputs, *rest, **named):
        rows = inputs["input_ids"].shape[0]
        if os.environ["SINCE"] != "1":
            time.sleep(0.3)  # FSDP's shards are written while training goes on: the steps leave them the time
        if rows > int(os.environ["FITS"]) and self.state.global_step + 1 >= int(os.environ["SINCE"]):
            if os.environ.get("RANK", "0") == os.environ["SMALL_RANK"]:
                raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(self, model, inputs, *rest, **named)
    Trainer.training_step = training_step

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "transformers.trainer":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            import torch
            wrap(module.Trainer, torch.OutOfMemoryError)
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""
FIRST, LATER = "1", "5"  # the checkpoint of step 3 is there by step 5
TWICE = ["--batch-size", "2", "--gradient-accumulation", "1"]  # what the run of the matrix takes one by one


def on_small_device(folder: Path, fits: int, since: str = FIRST, small_rank: str = "1") -> dict[str, str]:
    (folder / "sitecustomize.py").write_text(SMALL_DEVICE)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, "FITS": str(fits), "SINCE": since, "SMALL_RANK": small_rank}


def attempts(run: Finished) -> list[tuple[int, int]]:
    """batch_size and gradient_accumulation of each attempt, as its ranks read them."""
    found = []
    for folder in sorted((run.folder / "launch").glob("attempt-*")):
        config = json.loads((folder / "config.json").read_text())["config"]
        found.append((config["batch_size"], config["gradient_accumulation"]))
    return found


def eval_losses(run: Finished) -> list[float]:
    return [metric["eval_loss"] for metric in run.metrics if "eval_loss" in metric]


def slow(*values: str) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("backend", "since"),
    [
        ("ddp", FIRST),
        ("fsdp", LATER),
        slow("ddp", LATER),
        slow("fsdp", FIRST),
        slow("zero2", FIRST),
        slow("zero2", LATER),
        slow("zero3", LATER),
    ],
)
def test_it_ends_as_the_smaller_batch_would(bench: Bench, trained, tmp_path: Path, backend: str, since: str):
    import torch
    from safetensors.torch import load_file

    small = on_small_device(tmp_path, 1, since)
    name = f"search-{backend}-{since}"
    # The loss of an evaluation is a mean over its batches, and depends on their size.
    flags = [*BACKENDS[backend], *TWICE, "--per-device-eval-batch-size", "1"]
    run = bench.train(name, *flags, "--auto-find-batch-size", **small)
    assert run.code == 0, run.out + run.err
    assert attempts(run) == [(2, 1), (1, 2)]
    begun = "the start" if since == FIRST else f"{name}/checkpoint-3"
    assert (
        "rank 1 ran out of memory with batch_size 2: trying batch_size 1 and gradient_accumulation 2 (the "
        f"same global batch), from {begun}"
    ) in run.out.splitlines()
    assert f"done: {name}" in run.out

    entry = run.record["config"]["batch_size"]
    assert entry == {"value": 1, "source": "auto_find_batch_size (2 ran out of memory)"}
    assert run.record["global_batch"] == 4
    expected = trained(backend, "full")
    steps = [metric["step"] for metric in run.metrics if "loss" in metric]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert run.losses == pytest.approx(expected.losses, abs=1e-6)
    assert eval_losses(run) == pytest.approx(eval_losses(expected), abs=1e-6)
    weights, same = (load_file(r.folder / "model.safetensors") for r in (run, expected))
    torch.testing.assert_close(weights, same, atol=0 if since == FIRST else 1e-4, rtol=0)


def test_unasked_the_run_ends_with_the_mend(bench: Bench, tmp_path: Path):
    small = on_small_device(tmp_path, 1)
    run = bench.train("small-device", *BACKENDS["ddp"], *TWICE, **small)
    assert run.code == 3
    assert "error: rank 1 failed first (out of memory): BatchTooLarge: CUDA out of memory." in run.err
    assert "Set batch_size: 1 and gradient_accumulation: 2 (the same global batch), or auto_find" in run.err
    assert attempts(run) == [(2, 1)]


@pytest.mark.slow
def test_one_process_gives_up_at_one_row(bench: Bench, tmp_path: Path):
    small = on_small_device(tmp_path, 0, small_rank="0")
    run = bench.train("no-room", *BACKENDS["one"], "--auto-find-batch-size", **small)
    assert run.code == 3
    assert "auto_find_batch_size tried batch_size 2 and 1; 1 is the smallest." in run.err
    assert "What needs less memory: a block_size below 128; peft: true" in run.err


@pytest.mark.slow
def test_by_hand_the_rank_says_that_the_launcher_searches(bench: Bench, tmp_path: Path):
    template = REPO / "accelerate_configs" / "ddp.yaml"
    config = bench.config("small-by-hand")
    config.write_text(config.read_text() + "  auto_find_batch_size: true\n")
    argv = ["accelerate", "launch", "--config_file", str(template), "--num_processes", "2"]
    argv += ["--main_process_port", str(free_port()), "-m", "trainers.sft", str(config)]
    run = bench.finish("small-by-hand", argv, **on_small_device(tmp_path, 0))
    assert run.code != 0
    assert "note: auto_find_batch_size: has no effect without the launcher" in run.out
    assert "error: rank 1 ran out of memory. Lower batch_size" in run.err
    assert "phalanx train config.yaml --auto-find-batch-size" in run.err


def test_two_machines_search_together(bench: Bench, trained, tmp_path: Path):
    """The rank whose memory runs out is on the second."""
    small = on_small_device(tmp_path, 1)
    flags = [*BACKENDS["ddp"], *TWICE, "--per-device-eval-batch-size", "1", "--auto-find-batch-size"]
    flags += ["--num-machines", "2", "--main-process-ip", "127.0.0.1", "--machine-rank"]
    first, second = [bench.start("search-together", *flags, str(number), **small) for number in (0, 1)]
    out, err = first.communicate(timeout=300)
    assert second.wait(timeout=60) == 0, second.communicate()
    assert first.returncode == 0, out + err
    assert (
        "rank 1 ran out of memory with batch_size 2: trying batch_size 1 and gradient_accumulation 2" in out
    )
    run = Finished(bench.root / "search-together", 0, out, err)
    configs = sorted((run.folder / "launch").glob("attempt-*/machine-*/config.json"))
    sizes = [json.loads(path.read_text())["config"]["batch_size"] for path in configs]
    assert sizes == [2, 2, 1, 1]
    assert run.losses == pytest.approx(trained("ddp", "full").losses, abs=1e-6)
