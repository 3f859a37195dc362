"""Warnings, requeues, kills, lost nodes: a job is requeued, and ends with the same result."""

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
    """Start a job, and return it after five steps, while it runs."""
    job = site.submit(name, *flags, nodes=nodes, **slowly(), **environ)
    job.wait(lambda: site.step(name) >= 5, "it does not reach step 5")
    return job


def finished(site, job, name, nodes=1, restarts=1):
    state, code, output = job.end()
    assert (state, code) == ("COMPLETED", 0), output
    assert job.facts["Restarts"] == str(restarts)
    site.same_end(name, nodes=nodes)


def test_a_warning_saves_and_requeues_and_the_job_resumes(site):
    job = under_way(site, "warned", nodes=2)
    site.cluster.ask("scancel", "--signal=USR1", job.number)  # as --signal=USR1@180 does, to the tasks
    finished(site, job, "warned", nodes=2)
    assert f"job {job.number} is requeued" in job.output
    assert "resume: warned/checkpoint-" in job.output


def test_scontrol_requeue_resumes_the_run(site):
    job = under_way(site, "requeued", "--log", "wandb", WANDB_MODE="offline")
    site.cluster.ask("scontrol", "requeue", job.number)
    finished(site, job, "requeued")
    killed, last = wandb_files(site.folder / "requeued")
    assert killed.name == last.name == f"run-{wandb_run(last).run_id}.wandb", "one run in the tracker"
    assert wandb_history(last)[-1]["step"] == STEPS


def test_a_preempted_job_is_requeued_and_resumes(site):
    """The other job's partition has priority. This job's partition gives it a minute to end."""
    job = under_way(site, "preempted")
    other = site.cluster.submit(
        site.folder, "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    )
    finished(site, job, "preempted")
    assert other.end()[0] == "COMPLETED"
    assert "stopped by SIGTERM: saved at step" in job.output
    assert f"job {job.number} is requeued" in job.output


def test_a_suspended_job_is_not_reported_as_hung(site):
    """The clock continues while the job is suspended, and no rank sends a heartbeat."""
    job = under_way(site, "suspended", "--hang-timeout", "15", nodes=2)
    sent = site.cluster.ask("scontrol", "suspend", job.number)
    job.wait(lambda: job.state == "SUSPENDED", f"it is not suspended: {sent}")
    time.sleep(25)  # longer than ASLEEP and hang_timeout
    site.cluster.ask("scontrol", "resume", job.number)
    finished(site, job, "suspended", nodes=2, restarts=0)
    assert "failed first" not in job.output


def test_ranks_save_before_the_time_limit_without_a_signal(site):
    """The ranks know the limit. Twelve steps of 15 s and the start take longer than three minutes."""
    job = site.submit("limited", sbatch=("--time=3", "--signal=CONT@1"), **slowly(15.0))
    job.wait(lambda: "the job ends in" in job.output, "the limit is not logged", 200)
    job.wait(lambda: job.facts["Restarts"] == "1", "it is not requeued")
    site.cluster.ask("scancel", job.number)
    assert "stopped by SIGUSR1: saved at step" in job.output


def test_a_killed_rank_is_restarted_within_the_job(site):
    fault = {"what": "kill", "rank": 1, "step": 6, "once": str(site.folder / "killed.once")}
    job = site.submit("killed", nodes=2, **slowly(0.0, **fault))
    finished(site, job, "killed", nodes=2, restarts=0)
    assert "rank 1 failed first: killed by SIGKILL" in job.output


def test_a_failure_that_would_repeat_is_not_requeued(site):
    fault = {"what": "mistake", "rank": 1, "step": 2, "once": str(site.folder / "mistake.once")}
    state, code, output = site.submit("mistake", nodes=2, **slowly(0.0, **fault)).end()
    assert (state, code) == ("FAILED", 1), output
    assert output.count("error: rank 1 failed first: TypeError: planted mistake") == 1


def test_cancel_saves_and_does_not_requeue(site):
    """phalanx cancel saves first, and the job is not requeued."""
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
    (status,) = json.loads(out)
    assert (status["step"], status["max_steps"], status["job"]) == (12, 12, job)
    code, out, err = site.phalanx("logs", "seen", "--rank", "0")
    assert code == 0 and "step 12/12" in out
    assert site.phalanx("logs", "nothing")[0] == 2


def test_jobs_that_depend_on_a_job(site):
    """A run after a run, and its evaluation."""
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
def test_a_job_that_is_requeued_without_progress_ends(site):
    """The third start in a row without a new checkpoint is the last."""
    job = site.submit("no-progress", **slowly(20.0))
    for count in range(3):
        job.wait(lambda count=count: job.output.count("example: ") > count, f"start {count} does not train")
        site.cluster.ask("scontrol", "requeue", job.number)
        job.wait(lambda count=count: job.facts["Restarts"] == str(count + 1), "it is not requeued")
    state, code, output = job.end()
    assert (state, code, job.facts["Restarts"]) == ("FAILED", 2, "3"), output
    assert f"error: job {job.number}: 3 starts in a row made no progress; it is not requeued" in output


@pytest.mark.slow
def test_a_job_survives_a_restart_of_slurmd(site):
    """The job continues."""
    node = list(site.cluster.nodes)[1]
    job = under_way(site, "daemon", nodes=2)
    site.cluster.kill_slurmd(node)
    site.cluster.start_slurmd(node)
    finished(site, job, "daemon", nodes=2, restarts=0)


@pytest.mark.slow
def test_a_job_is_requeued_when_the_link_between_the_nodes_is_cut(site):
    """SLURM loses the node too: the job is requeued, and starts when there are two nodes again."""
    node = list(site.cluster.nodes)[1]
    job = under_way(site, "cut", nodes=2)
    site.cluster.cut(node)
    try:
        site.cluster.wait(lambda: job.facts.get("Restarts") == "1", "it is not requeued", 120)
    finally:
        site.cluster.reconnect(node)
    for path in (site.folder / "cut" / "launch").glob("attempt-*/machine-1/rank-*.pid"):
        pid = int(path.read_text())
        if os.path.exists(f"/proc/{pid}"):  # on a real node that is cut off it would continue
            os.kill(pid, signal.SIGKILL)
    finished(site, job, "cut", nodes=2)
