"""benchmarks/recovery.py without a measurement: how it reads logs, computes from times, and checks flags."""

from __future__ import annotations

from pathlib import Path

import pytest
from places import REPO


@pytest.fixture(scope="module")
def recovery():
    import killed_run
    import recovery

    recovery.killed_run = killed_run
    return recovery


def test_the_step_lines_of_both_sides_are_parsed(recovery):
    assert recovery.killed_run.step_number("step 12/100000  loss 2.3456  310 tokens/s  ETA 3:07\n") == 12
    assert recovery.killed_run.step_number("step 3/100000  loss 21.0111\n") == 3
    assert recovery.killed_run.step_number("step 12/100000  eval_loss 2.3456\n") is None
    assert recovery.killed_run.step_number("resume: run/checkpoint-10\n") is None


def test_the_bare_script_prints_step_lines_that_are_parsed(recovery):
    """Its line is written like the one of trainers/output/metrics.py."""
    script = (REPO / "benchmarks" / "bare_resuming.py").read_text()
    assert 'f"step {state.global_step}/{state.max_steps}  loss ' in script


def test_the_launcher_names_a_rank_in_a_line_that_is_parsed(recovery):
    from launcher.supervise.diagnosis import Failure

    line = (
        f"{Failure(1, 'killed by SIGKILL (host memory ran out, or by hand)').line}; restart 3 of at most 9, "
    )
    assert recovery.killed_run.named_rank(line + "from run/checkpoint-4") == 1
    assert (
        recovery.killed_run.named_rank(f"error: {Failure(0, 'killed by SIGKILL').line}") is None
    )  # the last line of a run


def test_torchrun_names_a_rank(recovery):
    line = (
        "E1125 19:45:18 28423 api.py:1002] failed (exitcode: -9) local_rank: 0 (pid: 28431) of binary: python"
    )
    assert recovery.killed_run.named_rank(line) == 0
    assert recovery.killed_run.named_rank("Sending process 28432 closing signal SIGTERM") is None


def steps(recovery, *triples):
    return [recovery.Step(*triple) for triple in triples]


def test_goodput_counts_what_the_last_step_builds_on(recovery):
    """A kill after step 5 resumes from checkpoint 4: step 5 is taken twice."""
    seen = steps(
        recovery, (0, 0, 1), (1, 0, 2), (5, 0, 3), (6, 0, 4), (9, 0, 5), (20, 1, 5), (24, 1, 6), (25, 1, 7)
    )
    found = recovery.goodput(seen, save_steps=2)
    assert (found.kept, found.taken) == (6, 7)
    # Between steps 1 and 2, 3 and 4, and 5 and 6 in the second attempt; there is a save after 2, 4 and 6.
    assert found.step_seconds == 1
    assert found.share == pytest.approx(6 * 1 / 25)


def test_goodput_without_a_kill_is_one(recovery):
    seen = steps(recovery, *((second, 0, second) for second in range(1, 12)))
    assert recovery.goodput(seen, save_steps=5).share == pytest.approx(1)


def ends(count, step, every=0, wait=0.0, slower=0.0):
    """Return the ends of steps.

    The first step takes 9 s more. After a save, the first step takes `wait` more and the second `slower`.
    """
    at, found = 9.0, []
    for number in range(1, count + 1):
        saved = every and number > 1
        at += step + (wait if saved and (number - 1) % every == 0 else 0)
        at += slower if saved and number > every and (number - 2) % every == 0 else 0
        found.append(at)
    return found


def test_stall_of_a_save_that_blocks_its_step(recovery):
    found = recovery.stall(ends(21, 1.0, every=4, wait=0.5), ends(21, 1.0), every=4)
    assert (found.step, found.wait, found.added) == pytest.approx((1.0, 0.5, 0.5))


def test_stall_of_a_save_that_slows_later_steps(recovery):
    found = recovery.stall(ends(21, 1.0, every=4, wait=0.1, slower=0.3), ends(21, 1.0), every=4)
    assert (found.step, found.wait, found.added) == pytest.approx((1.0, 0.1, 0.4))


@pytest.mark.parametrize(("total", "turns", "shares"), [(20, 4, [5] * 4), (3, 2, [1, 2]), (1, 1, [1])])
def test_turns_share_the_kills(recovery, total, turns, shares):
    assert [recovery.share_of(turn, turns, total) for turn in range(turns)] == shares


def test_a_goal_is_met_if_the_worst_kill_meets_it(recovery):
    def kill(noticed, first, at_save=False):
        return recovery.Kill(1, at_save, noticed, first, named=True)

    good = [[kill(0.5, 6.0), kill(1.0, 7.0, at_save=True)], [kill(0.9, 8.0)]]
    name, recovered, at_save, named, noticed, first, goal = recovery.kills_row("warm", good)
    assert (name, recovered, at_save, named) == ("phalanx, warm", "3 of 3", "1 of 1", "3 of 3")
    assert (noticed, first) == ("0.90 (0.50 to 1.00) s", "7.00 (6.00 to 8.00) s")
    assert goal == "all, 2 s, 8 s: met"
    for late in (kill(0.5, 8.5), kill(2.5, 6.0), kill(0.5, None)):
        assert "MISSED" in recovery.kills_row("warm", [*good, [late]])[-1]
    lost = [recovery.Kill(0, True, None, None, named=False)]
    assert recovery.kills_row("torchrun", [lost])[1:] == ["0 of 1", "0 of 1", "0 of 1", "never", "never", ""]


def test_both_sides_get_the_same_job(recovery, tmp_path):
    """Length, learning rate, saves and steps; a start by hand resumes an existing run."""
    import json

    argv = recovery.killed_run.command("torchrun", tmp_path, Path("model"), 2)
    flags = dict(zip(argv[argv.index("--length") :: 2], argv[argv.index("--length") + 1 :: 2], strict=True))
    argv = recovery.killed_run.command("warm", tmp_path, Path("model"), 2)
    config = json.loads((tmp_path / "config.yaml").read_text())
    params = config["params"]
    assert config["launch"]["start"] == "warm"
    assert int(flags["--length"]) == params["block_size"]
    assert float(flags["--lr"]) == params["lr"]
    assert int(flags["--kept"]) == params["save_total_limit"]
    assert int(flags["--steps"]) == params["max_steps"]
    assert int(flags["--save-steps"]) == params["save_steps"] == 2
    assert "--resume" not in argv
    (tmp_path / "run").mkdir()
    assert recovery.killed_run.command("warm", tmp_path, Path("model"), 2)[-1] == "--resume"


def test_the_config_is_accepted_by_phalanx(recovery, tmp_path, monkeypatch):
    from launcher.config import load_run

    monkeypatch.chdir(tmp_path)
    recovery.killed_run.command("accelerate", tmp_path, Path("model"), 2)
    run = load_run(tmp_path / "config.yaml", {})
    assert (run.launch.start, run.launch.num_processes, run.train.save_steps) == ("accelerate", 2, 2)
    recovery.write_config(tmp_path, Path("model"), {}, max_steps=4, save_strategy="no")
    assert load_run(tmp_path / "config.yaml", {}).train.save_strategy == "no"


@pytest.mark.parametrize("argv", [["--only", "warm,cold"], ["--kills", "0"], ["--minutes", "0"]])
def test_flags_that_are_refused(recovery, argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        recovery.parse(argv)
    assert argv[0] in capsys.readouterr().err


def test_without_the_model_it_says_how_to_get_one(recovery, tmp_path):
    with pytest.raises(SystemExit, match="get_model"):
        recovery.main(["--model", str(tmp_path / "none")])
