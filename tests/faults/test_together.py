"""Two runs at once, a port in use, and a run that resumes with another number of ranks."""

from __future__ import annotations

import shutil
import socket

import psutil
import pytest
from planted import EVERY, STEPS
from ranks import BACKENDS


@pytest.mark.slow
def test_two_runs_on_one_machine(faults):
    running = [faults.start(f"both-{number}", "ddp") for number in (1, 2)]
    for one in running:
        faults.same_end(one.end(), "ddp")


def test_two_runs_in_one_folder(faults):
    first = faults.start("shared", "ddp", pause=1.0)
    first.wait_for_step(1)
    for flags in ((), ("--resume",), ("--overwrite",)):
        second = faults.run("shared", "ddp", *flags)
        assert second.code == 2
        assert "error: " in second.err
        if flags:
            assert f"project_name: shared is in use by another run (process {first.process.pid}" in second.err
    faults.same_end(first.end(), "ddp")


@pytest.mark.parametrize("backend", ["ddp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_the_ranks_of_one_machine_listen_only_on_loopback(faults, backend):
    """torch's rendezvous and Gloo ask for no password."""
    running = faults.start(f"loopback-{backend}", backend, pause=0.2)
    running.wait_for_step(1)
    ranks = [psutil.Process(running.pid(rank)) for rank in (0, 1)]
    addresses = {
        found.laddr.ip
        for process in ranks
        for found in process.net_connections("inet")
        if found.status == psutil.CONN_LISTEN
    }
    assert addresses == {"127.0.0.1"}
    faults.same_end(running.end(), backend)


def test_a_port_in_use_is_refused(faults):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        run = faults.run("port", "ddp", "--main-process-port", port)
    assert run.code == 2
    assert f"launch.main_process_port: {port} is in use on this machine." in run.err
    assert not run.folder.exists()


@pytest.mark.parametrize("backend", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_fewer_ranks_resume_with_the_same_global_batch(faults, bench, backend):
    uninterrupted = faults.uninterrupted(backend)
    name = f"fewer-{backend}"
    shutil.copytree(uninterrupted.folder, bench.root / name)
    shutil.rmtree(bench.root / name / "checkpoint-12")
    (bench.root / name / "finished.json").unlink()  # else nothing is trained again
    run = faults.run(name, backend, "--resume", "--num-processes", "1")
    assert run.code == 0, run.out + run.err
    assert "note: gradient_accumulation: 4, because checkpoint-8 was written by 2 ranks" in run.out
    assert run.record["world_size"] == 1 and run.record["global_batch"] == 4
    assert run.losses == pytest.approx(uninterrupted.losses, abs=1e-4)


def test_zero_on_another_number_of_ranks_and_another_backend_are_refused(faults, bench):
    uninterrupted = faults.uninterrupted("zero2")
    shutil.copytree(uninterrupted.folder, bench.root / "other")
    run = faults.run("other", "zero2", "--resume", "--num-processes", "1")
    assert run.code == 2
    assert (
        "the ZeRO shards of 2 ranks, but this run has a world size of 1. Continue with num_processes: 2"
        in run.err
    )
    length = ("--max-steps", str(STEPS), "--save-steps", str(EVERY))
    run = bench.train("other", *BACKENDS["fsdp"], *length, "--resume")
    assert run.code == 2
    assert "it was written by ZeRO 2, which fsdp cannot read" in run.err
