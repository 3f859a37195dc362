"""Mistakes that only a rank can find: one line, no traceback."""

from __future__ import annotations

from ranks import BACKENDS


def test_a_mistake_that_only_a_rank_can_find_is_one_line(bench, tmp_path):
    from tiny import build_tiny_model

    model = build_tiny_model(tmp_path / "bare", chat_template=False)
    run = bench.train("no-template", *BACKENDS["ddp"], "--model", str(model))
    assert run.code == 2
    assert (
        run.err.strip()
        .splitlines()[-1]
        .startswith("error: chat_template: the tokenizer of this model has none.")
    )
    assert "Traceback" not in run.out + run.err


def test_a_rank_started_by_hand_refuses_a_used_folder(bench, trained):
    taken = trained("one", "full").folder.name
    argv = ["accelerate", "launch", "--num_processes", "1", "-m", "trainers.sft", str(bench.config(taken))]
    run = bench.finish(taken, argv)
    assert run.code != 0
    assert f"project_name: {taken} already contains a run" in run.err
