"""Warnings, requeues, kills, lost nodes: a job comes back, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
from jobsite import EVALUATE, STEPS, slowly
from tiny import write_evaluation
from tracked import wandb_files, wandb_history, wandb_run


def under_way(site, name, *flags, nodes=1, **environ):
    """A job that has taken five steps, and goes on."""
    job = site.submit(name, *flags, nodes=nodes, **slowly(), **environ)
    job.wait(lambda: site.step(name) >= 5, "it does not reach step 5")
    return job


def finished(site, job, name, nodes=1, restarts=1):
    state, code, output = job.end()
    assert (state, code) == ("COMPLETED", 0), output
    assert job.facts["Restarts"] == str(restarts)
    site.same_end(name, nodes=nodes)


def test_a_warning_saves_and_requeues_and_the_job_goes_on(site):
    job = under_way(site, "warned", nodes=2)
    site.cluster.ask("scancel", "--signal=USR1", job.number)  # as --signal=USR1@180 does, to the tasks
    finished(site, job, "warned", nodes=2)
    assert f"job {job.number} goes back into the queue" in job.output
    assert "resume: warned/checkpoint-" in job.output


def test_a_requeue_from_outside(site):
    job = under_way(site, "requeued", "--log", "wandb", WANDB_MODE="offline")
    site.cluster.ask("scontrol", "requeue", job.number)
    finished(site, job, "requeued")
    killed, last = wandb_files(site.folder / "requeued")
    assert killed.name == last.name == f"run-{wandb_run(last).run_id}.wandb", "one run in the tracker"
    assert wandb_history(last)[-1]["step"] == STEPS


def test_a_job_that_makes_room_for_another_comes_back(site):
    """The partition of the other is preferred; this one's gives a minute to end."""
    job = under_way(site, "preempted")
    other = site.cluster.submit(
        site.folder, "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    )
    finished(site, job, "preempted")
    assert other.end()[0] == "COMPLETED"
    assert "stopped by SIGTERM: saved at step" in job.output
    assert f"job {job.number} goes back into the queue" in job.output


def test_a_job_that_was_suspended_does_not_hang(site):
    """Its clock goes on meanwhile, and no rank gives a sign of life."""
    job = under_way(site, "suspended", "--hang-timeout", "15", nodes=2)
    sent = site.cluster.ask("scontrol", "suspend", job.number)
    job.wait(lambda: job.state == "SUSPENDED", f"it is not suspended: {sent}")
    time.sleep(25)  # longer than ASLEEP and hang_timeout
    site.cluster.ask("scontrol", "resume", job.number)
    finished(site, job, "suspended", nodes=2, restarts=0)
    assert "failed first" not in job.output


def test_the_time_limit_with_no_signal(site):
    """The ranks know when it comes. Without it, twelve steps of 15 s would pass the two minutes by far."""
    job = site.submit("limited", sbatch=("--time=2", "--signal=CONT@1"), **slowly(15.0))
    job.wait(lambda: "the job ends in" in job.output, "nothing is said of the limit", 200)
    job.wait(lambda: job.facts["Restarts"] == "1", "it is not requeued")
    site.cluster.ask("scancel", job.number)
    assert "stopped by SIGUSR1: saved at step" in job.output


def test_a_killed_rank_is_started_again_within_the_job(site):
    fault = {"what": "kill", "rank": 1, "step": 6, "once": str(site.folder / "killed.once")}
    job = site.submit("killed", nodes=2, **slowly(0.0, **fault))
    finished(site, job, "killed", nodes=2, restarts=0)
    assert "rank 1 failed first: killed by SIGKILL" in job.output


def test_what_would_only_repeat_does_not_come_back(site):
    fault = {"what": "mistake", "rank": 1, "step": 2, "once": str(site.folder / "mistake.once")}
    state, code, output = site.submit("mistake", nodes=2, **slowly(0.0, **fault)).end()
    assert (state, code) == ("FAILED", 1), output
    assert output.count("error: rank 1 failed first: TypeError: planted mistake") == 1


def test_scancel_and_cancel(site):
    """phalanx cancel saves first, and the job does not come back."""
    job = under_way(site, "cancelled")
    code, out, err = site.phalanx("cancel", "cancelled")
    assert (code, out) == (0, f"cancelled: job {job.number} saves and ends\n"), err
    state, code, output = job.end()
    assert (state, code, job.facts["Restarts"]) == ("FAILED", 75, "0"), output
    assert "stopped by SIGTERM: saved at step" in output
    again = site.submit("cancelled", "--resume")
    finished(site, again, "cancelled", restarts=0)
    waiting = site.submit("waits", sbatch=("--hold",))
    site.cluster.ask("scancel", waiting.number)
    assert waiting.end()[0] == "CANCELLED"


def test_status_and_logs(site):
    flags = ("--dependency", "singleton", "--num-processes", "2", "--cpus-per-task", "1", "--parsable")
    code, out, err = site.phalanx("submit", site.config("seen"), *flags)
    assert code == 0, err
    job = out.strip()
    site.cluster.wait(lambda: site.step("seen") >= 12, "it does not end", 240)
    site.cluster.wait(lambda: "COMPLETED" in site.phalanx("status", job)[1], "it does not end")
    code, out, err = site.phalanx("status", "seen", "--json")
    (told,) = json.loads(out)
    assert (told["step"], told["max_steps"], told["job"]) == (12, 12, job)
    code, out, err = site.phalanx("logs", "seen", "--rank", "0")
    assert code == 0 and "step 12/12" in out
    assert site.phalanx("logs", "nothing")[0] == 2


def test_what_depends_on_a_job(site):
    """A run that goes on from its model, and its evaluation."""
    first = site.submit("before", "--max-steps", "1", "--save-strategy", "no")
    after = f"afterok:{first.number}"
    flags = ("--dependency", after, "--max-steps", "1", "--save-strategy", "no", "--cpus-per-task", "1")
    code, _, err = site.phalanx("submit", site.config("after"), *flags)
    assert code == 0, err
    assert "Dependency" in site.phalanx("status", "after")[1]
    tasks = write_evaluation(site.folder / "tasks")
    argv = (f"--dependency={after}", EVALUATE, "before", "--tasks", "capitals", "--include_path", str(tasks))
    state, code, output = site.cluster.run(site.folder, *argv, **site.environ)
    assert (state, code) == ("COMPLETED", 0), output
    assert first.end()[0] == "COMPLETED"
    assert list((site.folder / "before" / "evaluation").glob("**/results_*.json"))
    site.cluster.wait(lambda: "COMPLETED" in site.phalanx("status", "after")[1], "it does not end", 120)


@pytest.mark.slow
def test_a_job_that_comes_back_in_vain_ends(site):
    """The third start in a row that finds nothing new is the last."""
    job = site.submit("in-vain", **slowly(20.0))
    for count in range(3):
        job.wait(lambda count=count: job.output.count("example: ") > count, f"start {count} does not train")
        site.cluster.ask("scontrol", "requeue", job.number)
        job.wait(lambda count=count: job.facts["Restarts"] == str(count + 1), "it is not requeued")
    state, code, output = job.end()
    assert (state, code, job.facts["Restarts"]) == ("FAILED", 2, "3"), output
    assert f"error: job {job.number}: 3 starts in a row came no further; it does not come back" in output


@pytest.mark.slow
def test_slurmd_is_killed_and_comes_back(site):
    """The job does not notice."""
    node = list(site.cluster.nodes)[1]
    job = under_way(site, "daemon", nodes=2)
    site.cluster.kill_slurmd(node)
    site.cluster.start_slurmd(node)
    finished(site, job, "daemon", nodes=2, restarts=0)


@pytest.mark.slow
def test_the_link_between_the_nodes_is_cut(site):
    """The node is lost to SLURM too: the job comes back when there are two again."""
    node = list(site.cluster.nodes)[1]
    job = under_way(site, "cut", nodes=2)
    site.cluster.cut(node)
    try:
        site.cluster.wait(lambda: job.facts.get("Restarts") == "1", "it is not requeued", 120)
    finally:
        site.cluster.mend(node)
    for path in (site.folder / "cut" / "launch").glob("attempt-*/machine-1/rank-*.pid"):
        pid = int(path.read_text())
        if os.path.exists(f"/proc/{pid}"):  # what a real node, cut off, would keep
            os.kill(pid, signal.SIGKILL)
    finished(site, job, "cut", nodes=2)
