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


def kill(recovery, phase="step", first=6.0, noticed=0.5, at_save=False):
    return recovery.Kill(1, at_save, noticed, first, named=True, phase=phase)


@pytest.mark.parametrize(
    ("kills", "targets"),
    [
        (1, ["merge"]),
        (2, ["final save", "merge"]),
        (5, ["training", "training", "training", "final save", "merge"]),
    ],
)
def test_the_last_kills_of_a_turn_hit_the_final_save_and_the_merge(recovery, kills, targets):
    assert recovery.recovery_to_end.targets(kills) == targets


def test_a_backend_meets_its_goal_if_every_kill_and_every_end_does(recovery):
    to_end = recovery.recovery_to_end

    def row(*turns, planned=4):
        return to_end.row(planned, "fsdp", [to_end.Turn(kills, equal) for kills, equal in turns])

    late = [kill(recovery, "end", first=9.0), kill(recovery, "merge", first=10.0)]
    good = ([kill(recovery, "save", at_save=True), kill(recovery), *late], True)
    name, recovered, at_save, final, merge, named, noticed, first, done, equal, goal = row(good)
    assert (name, recovered, at_save, final, merge) == (
        "phalanx, fsdp",
        "4 of 4",
        "1 of 1",
        "1 of 1",
        "1 of 1",
    )
    assert (named, noticed, first) == ("4 of 4", "0.50 (0.50 to 0.50) s", "6.00 (6.00 to 6.00) s")
    assert (done, equal) == ("9.50 (9.00 to 10.00) s", "1 of 1")
    assert goal == "all, 2 s, 8 s, equal: met"
    kills = good[0]
    for missed in (
        row((kills, False)),
        row(([*kills[:1], kill(recovery, first=8.5), *late], True)),
        row(([*kills[:1], kill(recovery, first=None), *late], True)),
        row(([*kills[:2], late[0], kill(recovery, "merge", first=None)], True)),
        row(([kill(recovery), kill(recovery), *late], True)),  # none at a save
        row((kills[:3], True), planned=3),  # none in the merge
        row(good, planned=5),
    ):
        assert missed[-1].endswith("MISSED")


def test_a_side_reads_the_phase_of_a_rank_and_what_is_done(recovery, tmp_path):
    from trainers.rank.heartbeat import Heart
    from trainers.rank.protocol import HEARTBEATS

    side = recovery.Side("warm", tmp_path, Path("model"), 2)
    assert (side.phase(0), side.ending) == ("", None)
    folder = side.mark / "phalanx-heartbeats-1-x"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HEARTBEATS, str(folder))
        heart = Heart()
        heart.start(0)
    heart.enter("merge")
    assert side.phase(0) == "merge"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "finished.json").write_text('{"done": ["merge"]}')
    assert side.ending == ["merge"]


def test_a_parent_meets_its_goal_if_every_kill_does(recovery):
    parents = recovery.recovery_parents
    turn = parents.Turn([3.0, 4.0], (30 * 2**20, 5 * 2**20))
    row = parents.row("parent", [turn])
    assert row == ["the warm process", "2 of 2", "3.50 (3.00 to 4.00) s", "30 MiB", "5 MiB", "8 s: met"]
    assert parents.row("launcher", [parents.Turn([8.5], None)])[-1] == "8 s: MISSED"
    assert parents.row("kept", [parents.Turn([None], None)])[1:] == [
        "0 of 1",
        "never",
        "no spare",
        "no spare",
        "8 s: MISSED",
    ]


def test_the_config_of_a_run_that_goes_to_its_end_is_accepted(recovery, tmp_path, monkeypatch):
    from launcher.config import load_run

    monkeypatch.chdir(tmp_path)
    for backend, name in recovery.recovery_to_end.BACKENDS.items():
        sections = recovery.recovery_to_end.sections(backend, 30)
        recovery.killed_run.command("warm", tmp_path, Path("model"), 2, sections)
        run = load_run(tmp_path / "config.yaml", {})
        assert (run.train.max_steps, run.train.scheduler, run.train.merge_adapter) == (30, "constant", True)
        assert run.train.distributed_backend == name
