"""The same config gives the same losses and the same model on every backend."""

from __future__ import annotations

import json
import re

import pytest
from places import REPO
from ranks import BACKENDS, MODES
from safetensors import safe_open
from tracked import scalars, wandb_files, wandb_history, wandb_run

from launcher.plan.topology import free_port

DISTRIBUTED_TYPES = {"one": "NO", "ddp": "MULTI_CPU", "fsdp": "FSDP"} | dict.fromkeys(
    ("zero1", "zero2", "zero3"), "DEEPSPEED"
)
SEVERAL = [name for name in BACKENDS if name != "one"]


def logits(folder, adapter: bool):
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    loader = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    model = loader.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(4, 36)[None]
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize(
    ("backend", "mode"),
    [
        pytest.param(name, mode, marks=pytest.mark.slow if (name, mode) == ("zero1", "lora") else [])
        for name in SEVERAL
        for mode in MODES
    ],
)
def test_losses_and_model_equal_those_of_one_process(trained, backend, mode):
    import torch

    one, many = trained("one", mode), trained(backend, mode)
    assert len(one.losses) == 6
    assert many.losses == pytest.approx(one.losses, abs=1e-4)
    assert one.losses[0] - one.losses[-1] > 0.1, "the run learned nothing, so equal losses prove nothing"
    expected, found = (logits(run.folder, mode == "lora") for run in (one, many))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_run_folder_is_complete(trained, backend):
    run = trained(backend, "full")
    names = {path.name for path in run.folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "run.json", "metrics.jsonl"} <= names
    assert {"checkpoint-3", "checkpoint-6", "launch"} <= names
    record = run.record
    assert record["world_size"] == (1 if backend == "one" else 2)
    assert record["global_batch"] == 4
    assert record["distributed_type"] == DISTRIBUTED_TYPES[backend], "it ran on another backend"
    assert record["config"]["lr"]["source"].endswith("-full.yaml:14")
    assert set(record["versions"]) >= {"torch", "transformers", "trl", "accelerate", "peft", "datasets"}
    assert "token" not in record["config"]


def test_a_zero_checkpoint_has_no_recovery_script(trained):
    """DeepSpeed copies zero_to_fp32.py into each; phalanx consolidate does the same."""
    for folder in (trained("zero2", "full").folder / name for name in ("checkpoint-3", "checkpoint-6")):
        assert list(folder.glob("global_step*")) and not list(folder.rglob("*.py"))


def test_metrics_have_every_logged_value(trained):
    entries = trained("ddp", "full").metrics
    steps = [entry for entry in entries if "loss" in entry]
    for key in ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second"):
        assert all(key in entry for entry in steps), key
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5, 6]
    tokens = [entry["tokens"] for entry in steps]
    assert tokens == sorted(tokens) and tokens[0] > 0
    assert [entry["step"] for entry in entries if "eval_loss" in entry] == [3, 6]


def test_each_rank_has_a_log_and_rank_0_writes_to_the_terminal(trained):
    run = trained("fsdp", "full")
    logs = run.folder / "launch" / "attempt-1"
    assert {path.name for path in logs.glob("rank-*.log")} == {"rank-0.log", "rank-1.log"}
    assert re.search(r"step 6/6  loss \d\.\d+  \d+ tokens/s  ETA 0:00", run.out)
    assert "step 6/6" not in (logs / "rank-1.log").read_text()
    assert run.out.count("train: 40 rows") == 1
    assert "--config_file" in (logs / "command.txt").read_text()


# tests/faults resumes on the other backends.
@pytest.mark.parametrize(
    "backend", ["zero3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "fsdp", "zero2"))]
)
def test_resume_ends_with_the_weights_of_an_uninterrupted_run(trained, bench, backend):
    import shutil

    uninterrupted = trained(backend, "full")
    name = f"resumed-{backend}"
    target = bench.root / name
    shutil.copytree(uninterrupted.folder, target)
    shutil.rmtree(target / "checkpoint-6")
    (target / "model.safetensors").unlink()
    (target / "finished.json").unlink()  # else nothing is trained again
    run = bench.train(name, *BACKENDS[backend], "--resume")
    assert run.code == 0, run.err
    assert "resume: " in run.out and "checkpoint-3" in run.out
    assert (target / "model.safetensors").read_bytes() == (
        uninterrupted.folder / "model.safetensors"
    ).read_bytes()
    assert run.losses == uninterrupted.losses
    assert [entry.get("tokens") for entry in run.metrics] == [
        entry.get("tokens") for entry in uninterrupted.metrics
    ]


def test_overwrite_replaces_the_earlier_run(trained, bench):
    run = bench.train("again", *BACKENDS["one"], "--max-steps", "2")
    assert run.code == 0
    run = bench.train("again", *BACKENDS["one"], "--max-steps", "1", "--overwrite")
    assert run.code == 0, run.err
    assert [entry["step"] for entry in run.metrics if "loss" in entry] == [1]
    assert not (run.folder / "checkpoint-2").exists()


@pytest.mark.parametrize("backend", ["fsdp", "zero3"])
def test_merged_model_has_the_outputs_of_the_adapter(trained, bench, backend):
    import torch

    run = bench.train(f"merged-{backend}", *BACKENDS[backend], *MODES["lora"], "--merge-adapter")
    assert run.code == 0, run.err
    assert not (run.folder / "adapter_config.json").exists()
    expected, found = logits(trained(backend, "lora").folder, True), logits(run.folder, False)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param([*BACKENDS["fsdp"], "--sharding", "shard_grad_op"], id="fsdp-shard-grad-op"),
        pytest.param([*BACKENDS["zero2"], "--offload", "cpu"], id="zero2-offload"),
        pytest.param([*BACKENDS["zero3"], "--offload", "cpu"], id="zero3-offload"),
        pytest.param([*BACKENDS["ddp"], "--disable-gradient-checkpointing"], id="no-checkpointing"),
        pytest.param([*BACKENDS["fsdp"], "--activation-checkpointing", "selective"], id="fsdp-selective"),
        pytest.param([*BACKENDS["zero3"], "--activation-checkpointing", "selective"], id="zero3-selective"),
        pytest.param([*BACKENDS["one"], "--torch-compile"], id="one-compiled", marks=pytest.mark.slow),
        pytest.param([*BACKENDS["ddp"], "--torch-compile"], id="ddp-compiled", marks=pytest.mark.slow),
        pytest.param([*BACKENDS["fsdp"], "--torch-compile"], id="fsdp-compiled", marks=pytest.mark.slow),
        pytest.param([*BACKENDS["fsdp"], "--optimizer", "adamw_torch_fused"], id="fsdp-fused"),
    ],
)
def test_variants_of_a_backend_have_the_same_losses(trained, bench, flags, request):
    run = bench.train(request.node.callspec.id, *flags)
    assert run.code == 0, run.err
    assert run.losses == pytest.approx(trained("one", "full").losses, abs=1e-4)
    with safe_open(run.folder / "model.safetensors", "pt") as saved, \
         safe_open(trained("one", "full").folder / "model.safetensors", "pt") as plain:  # fmt: skip
        assert set(saved.keys()) == set(plain.keys())


@pytest.mark.parametrize("backend", ["ddp", "fsdp", "zero3"])
def test_int4_has_the_same_losses_on_every_backend(bench, backend):
    flags = [*MODES["lora"][:-1], "int4"]
    many = bench.train(f"int4-{backend}", *BACKENDS[backend], *flags)
    assert many.code == 0, many.err
    one = bench.root / "int4-one"
    if not one.exists():
        assert bench.train("int4-one", *BACKENDS["one"], *flags).code == 0
    lines = (one / "metrics.jsonl").read_text().splitlines()
    expected = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    # TRL makes the adapters of a quantised model bf16. They stay so under DeepSpeed; else they are float32.
    assert many.losses == pytest.approx(expected, abs=2e-3 if backend == "zero3" else 1e-4)


def test_two_machines_without_slurm(trained, bench):
    flags = ["--distributed-backend", "ddp", "--num-machines", "2", "--num-processes", "2"]
    flags += ["--main-process-ip", "127.0.0.1"]
    second = bench.start("two-machines", *flags, "--machine-rank", "1")
    first = bench.train("two-machines", *flags, "--machine-rank", "0")
    second.communicate(timeout=120)
    assert (first.code, second.returncode) == (0, 0), first.err
    assert first.losses == pytest.approx(trained("one", "full").losses, abs=1e-4)
    logs = first.folder / "launch" / "attempt-1"
    assert (logs / "machine-0" / "rank-0.log").exists() and (logs / "machine-1" / "rank-1.log").exists()


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_two_ranks_and_a_resume_are_one_run_in_the_tracker(bench, tracker):
    """The tracker has every number of metrics.jsonl, with the same name and step."""
    name = f"log-{tracker}"
    flags = [*BACKENDS["ddp"], "--log", tracker]
    for more in (["--max-steps", "3"], ["--max-steps", "6", "--resume"]):
        run = bench.train(name, *flags, *more, WANDB_MODE="offline")
        assert run.code == 0, run.err
    logged = {
        (key, entry["step"], value)
        for entry in run.metrics
        for key, value in entry.items()
        if key != "step" and not key.startswith("train_")  # logged at the end of each start
    }
    assert any(key == "eval_loss" for key, _, _ in logged)
    if tracker == "wandb":
        files = wandb_files(run.folder)
        assert len({file.stem for file in files}) == 1 and len(files) == 2, "one id, a file for each start"
        rows = [row for file in files for row in wandb_history(file)]
        found = {(key, row["step"], value) for row in rows for key, value in row.items() if key != "step"}
        assert logged <= found
        assert wandb_run(files[0]).project == name
        assert len(re.findall("wandb sync", run.out)) == 1
        return
    found = {key: dict(points) for key, points in scalars(run.folder / "runs").items()}
    for key, step, value in logged:
        assert found[key][step] == pytest.approx(value, rel=1e-6), key
    assert {step for key, step, _ in logged if key == "loss"} == set(found["loss"]) == {1, 2, 3, 4, 5, 6}


STATIC = [
    pytest.param("ddp", marks=pytest.mark.slow),  # test_docs_commands starts it so
    pytest.param("fsdp", marks=pytest.mark.slow),
    pytest.param("deepspeed_zero1", marks=pytest.mark.slow),
    pytest.param("deepspeed_zero2", marks=pytest.mark.slow),
    pytest.param("deepspeed_zero3", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", STATIC)
def test_ranks_started_by_hand_have_the_same_losses(trained, bench, name):
    """The command of the README, in a folder that is not the repository."""
    template = REPO / "accelerate_configs" / f"{name}.yaml"
    config = bench.config(f"hand-{name}")
    argv = ["accelerate", "launch", "--config_file", str(template), "--num_processes", "2"]
    argv += ["--main_process_port", str(free_port()), "-m", "trainers.sft", str(config)]
    run = bench.finish(f"hand-{name}", argv)
    assert run.code == 0, run.err
    assert run.losses == pytest.approx(trained("one", "full").losses, abs=1e-4)
    assert run.record["world_size"] == 2
