"""Models whose weights have other names in files than in memory: a restart has every weight."""

from __future__ import annotations

import pytest
from tiny import ARCHITECTURES, build_architecture

OTHERS = [name for name in ARCHITECTURES if name != "llama"]  # the other tests train a llama
BEST = ("--eval-strategy", "steps", "--eval-steps", "4", "--load-best-model-at-end")


@pytest.fixture(scope="session")
def architecture(tmp_path_factory, tiny_model):
    """`architecture("mixtral")` returns the folder of such a model."""
    made = {}

    def get(name: str) -> str:
        if name not in made:
            made[name] = build_architecture(
                name, tiny_model, tmp_path_factory.mktemp("architecture") / "model"
            )
        return str(made[name])

    return get


@pytest.mark.parametrize(
    "best", [pytest.param((), id="last"), pytest.param(BEST, id="best", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("backend", "name"),
    [
        pytest.param(backend, name, marks=[] if (backend, name) == ("ddp", "qwen3_moe") else pytest.mark.slow)
        for backend in ("one", "ddp", "fsdp", "zero2", "zero3")
        for name in OTHERS
        # Rows of text do not reach the vision tower, and DDP and FSDP2 want a gradient for each weight.
        if not (backend in ("ddp", "fsdp") and "vision" in name)
    ],
)
def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(
    faults, architecture, backend, name, best
):
    flags = ("--model", architecture(name), *best)
    run = faults.run(
        f"{backend}-{name.replace(' ', '-')}-{len(best)}", backend, *flags, what="kill", rank=0, step=7
    )
    assert "restart 1 of at most 10, from" in run.err and "checkpoint-4" in run.err, run.out + run.err
    faults.same_end(run, backend, *flags)
    assert "missing" not in run.out + run.err and "unexpected" not in run.out + run.err
