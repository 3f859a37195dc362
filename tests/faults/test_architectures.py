"""Models whose weights have other names in files than in memory: a restart has every weight."""

from __future__ import annotations

import pytest
from planted import LORA
from safetensors.torch import load_file
from tiny import ARCHITECTURES, build_architecture
from transformers import AutoModelForCausalLM

SEES = "gemma3 with a vision tower"
FAST = {("ddp", "qwen3_moe"), ("fsdp", SEES)}
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
        pytest.param(backend, name, marks=[] if (backend, name) in FAST else pytest.mark.slow)
        for backend in ("one", "ddp", "fsdp", "zero2", "zero3")
        for name in OTHERS
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


@pytest.mark.parametrize(
    "backend",
    ["fsdp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("one", "ddp", "zero2", "zero3"))],
)
def test_what_text_does_not_reach_keeps_the_weights_of_the_base_model(faults, architecture, backend):
    """DDP would wait for their gradients, and ZeRO would apply weight decay to them."""
    flags = ("--model", architecture(SEES), "--weight-decay", "0.1")
    run = faults.uninterrupted(backend, *flags)
    [line] = [line for line in run.out.splitlines() if line.startswith("frozen: ")]
    assert line.startswith("frozen: model.vision_tower, model.multi_modal_projector, 0.0M weights: ")
    base, trained = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (architecture(SEES), run.folder)
    )
    kept = {name for name, weight in base.items() if weight.equal(trained[name])}
    assert kept == {name for name in base if "vision_tower" in name or "multi_modal_projector" in name}
    assert run.losses == pytest.approx(faults.uninterrupted("one", *flags).losses, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "name"), [("fsdp", "tied llama"), ("ddp", SEES), ("fsdp", SEES), ("zero2", SEES)]
)
def test_a_killed_adapter_run_has_only_what_is_trained_and_text_reaches(faults, architecture, backend, name):
    """A frozen weight that is tied has two names; a vision tower has linear layers."""
    flags = ("--model", architecture(name), *LORA, "--target-modules", "all-linear")
    run = faults.run(f"adapter-{backend}-{name[:4]}", backend, *flags, what="kill", rank=0, step=7)
    assert "restart 1 of at most 10, from" in run.err and "checkpoint-4" in run.err, run.out + run.err
    faults.same_end(run, backend, *flags)
    names = load_file(run.folder / "adapter_model.safetensors").keys()
    assert names and not [name for name in names if "lora" not in name or "vision" in name]
