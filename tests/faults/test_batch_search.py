"""auto_find_batch_size with real ranks: the result is that of the smaller batch from the start."""

from __future__ import annotations

import json
from typing import Any

import pytest
from places import REPO
from planted import Faults
from ranks import BACKENDS, Finished

from launcher.plan.topology import free_port

FIRST, LATER = 1, 5  # at step 5 the checkpoint of step 3 exists
TWICE = ["--batch-size", "2", "--gradient-accumulation", "1"]  # test_matrix takes one row


def small_device(fits: int, since: int = FIRST, rank: int = 1) -> dict[str, Any]:
    """Return the fault of a rank whose device fits no more rows, from a step on."""
    return {"what": "small device", "fits": fits, "step": since, "rank": rank}


def attempts(run: Finished) -> list[tuple[int, int]]:
    """Return batch_size and gradient_accumulation of each attempt, as its ranks read them."""
    found = []
    for folder in sorted((run.folder / "launch").glob("attempt-*")):
        config = json.loads((folder / "config.json").read_text())["config"]
        found.append((config["batch_size"], config["gradient_accumulation"]))
    return found


def eval_losses(run: Finished) -> list[float]:
    return [metric["eval_loss"] for metric in run.metrics if "eval_loss" in metric]


def slow(*values: Any) -> object:
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
def test_it_trains_as_the_smaller_batch_does(faults: Faults, trained, backend: str, since: int):
    import torch
    from safetensors.torch import load_file

    name = f"search-{backend}-{since}"
    small = faults.environ(name, **small_device(1, since))
    # The same evaluation batches as in the run with the smaller batch.
    flags = [*BACKENDS[backend], *TWICE, "--per-device-eval-batch-size", "1"]
    run = faults.bench.train(name, *flags, "--auto-find-batch-size", **small)
    assert run.code == 0, run.out + run.err
    assert attempts(run) == [(2, 1), (1, 2)]
    begun = "the start" if since == FIRST else f"{name}/checkpoint-3"
    assert (
        "auto_find_batch_size: rank 1 ran out of memory with batch_size 2: trying batch_size 1 and "
        f"gradient_accumulation 2 (the same global batch), from {begun}"
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


def test_without_auto_find_batch_size_the_run_ends_with_advice(faults: Faults):
    small = faults.environ("small-device", **small_device(1))
    run = faults.bench.train("small-device", *BACKENDS["ddp"], *TWICE, **small)
    assert run.code == 3
    assert "error: rank 1 failed first (out of memory): BatchTooLarge: CUDA out of memory." in run.err
    assert "Set batch_size: 1 and gradient_accumulation: 2 (the same global batch), or auto_find" in run.err
    assert attempts(run) == [(2, 1)]


@pytest.mark.slow
def test_one_process_ends_when_one_row_does_not_fit(faults: Faults):
    small = faults.environ("no-room", **small_device(0, rank=0))
    run = faults.bench.train("no-room", *BACKENDS["one"], "--auto-find-batch-size", **small)
    assert run.code == 3
    assert "auto_find_batch_size tried batch_size 2 and 1; 1 is the smallest." in run.err
    assert "What needs less memory: a block_size below 128; peft: true" in run.err


@pytest.mark.slow
def test_a_rank_started_by_hand_says_that_only_the_launcher_searches(faults: Faults):
    bench = faults.bench
    template = REPO / "accelerate_configs" / "ddp.yaml"
    config = bench.config("small-by-hand")
    config.write_text(config.read_text() + "  auto_find_batch_size: true\n")
    argv = ["accelerate", "launch", "--config_file", str(template), "--num_processes", "2"]
    argv += ["--main_process_port", str(free_port()), "-m", "trainers.sft", str(config)]
    run = bench.finish("small-by-hand", argv, **faults.environ("small-by-hand", **small_device(0)))
    assert run.code != 0
    assert "note: auto_find_batch_size: has no effect without the launcher" in run.out
    assert "error: rank 1 ran out of memory. Lower batch_size" in run.err
    assert "phalanx train config.yaml --auto-find-batch-size" in run.err


def test_two_machines_search_together(faults: Faults, trained):
    """The rank that runs out of memory is on the second machine."""
    bench, small = faults.bench, faults.environ("search-together", **small_device(1))
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
