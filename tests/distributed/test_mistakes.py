"""Mistakes that are noticed inside a rank: one line, no traceback."""

from __future__ import annotations

from ranks import BACKENDS


def test_a_mistake_that_only_a_rank_can_see_is_one_line(bench, tmp_path):
    from tiny import build_tiny_model

    model = build_tiny_model(tmp_path / "bare", chat_template=False)
    run = bench.train("no-template", *BACKENDS["ddp"], "--model", str(model))
    assert run.code == 2
    assert (
        run.err.strip().splitlines()[-1].startswith("error: chat_template: this model's tokenizer has none.")
    )
    assert "Traceback" not in run.out + run.err


def test_by_hand_a_taken_folder_is_refused(bench, trained):
    taken = trained("one", "full").folder.name
    argv = ["accelerate", "launch", "--num_processes", "1", "-m", "trainers.sft", str(bench.config(taken))]
    run = bench.finish(taken, argv)
    assert run.code != 0
    assert f"project_name: {taken} holds another run" in run.err
