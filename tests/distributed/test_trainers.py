"""Every trainer, on every backend: the losses of one process, and a model that opens with its class."""

from __future__ import annotations

import json

import pytest
from ranks import BACKENDS, TRAINERS

SEVERAL = ["ddp", "fsdp", "zero2", "zero3"]
OTHERS = [name for name in TRAINERS if name != "sft"]  # test_matrix tests sft


def loaded(folder, trainer: str, adapter: bool):
    """Open the saved model with the class that a user takes."""
    import peft
    import torch
    import transformers

    kind = {"reward": "SequenceClassification", "mlm": "MaskedLM"}.get(trainer, "CausalLM")
    if adapter and trainer == "mlm":  # peft has no auto class for it
        import json

        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        model = transformers.AutoModelForMaskedLM.from_pretrained(base, dtype=torch.float32)
        return peft.PeftModel.from_pretrained(model, folder).eval()
    prefix, library = ("AutoPeft", peft) if adapter else ("Auto", transformers)
    more = {"num_labels": 1} if adapter and trainer == "reward" else {}
    return (
        getattr(library, f"{prefix}ModelFor{kind}")
        .from_pretrained(folder, dtype=torch.float32, **more)
        .eval()
    )


def outputs(folder, trainer: str, adapter: bool):
    import torch

    with torch.no_grad():
        return loaded(folder, trainer, adapter)(input_ids=torch.arange(5, 37)[None]).logits


def check_equal(one, many, trainer, adapter):
    import torch

    assert len(one.losses) == 6
    assert many.losses == pytest.approx(one.losses, abs=1e-4)
    norms = [[entry["grad_norm"] for entry in run.metrics if "loss" in entry] for run in (one, many)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-2, abs=1e-3)
    assert abs(one.losses[0] - one.losses[-1]) > 1e-3, (
        "the run learned nothing, so equal losses prove nothing"
    )
    evaluated = [[entry["eval_loss"] for entry in run.metrics if "eval_loss" in entry] for run in (one, many)]
    assert len(evaluated[0]) == 2
    # kto's eval_loss is a mean over batches, which have other sizes on one process than on two.
    assert evaluated[1] == pytest.approx(evaluated[0], abs=0.05)
    expected, found = (outputs(run.folder, trainer, adapter) for run in (one, many))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def cells(always: dict[str, list[str]]) -> list[object]:
    """Return every trainer on every backend. Only make test-all runs those that are not in `always`."""
    return [
        pytest.param(trainer, backend, marks=[] if backend in always.get(trainer, []) else pytest.mark.slow)
        for trainer in OTHERS
        for backend in SEVERAL
    ]


# dpo has a second model on each backend, and reward a new head. The others differ only in their loss.
# test_matrix has sft on every backend.
FULL = {
    "default": [],  # the loss of sft, on other tokens
    "reward": ["fsdp"],
    "dpo": ["ddp", "fsdp", "zero3"],
    "orpo": ["fsdp"],
    "kto": ["ddp"],
    "mlm": ["fsdp"],
}
LORA = {"reward": ["zero3"], "dpo": ["fsdp"]}


@pytest.mark.parametrize(("trainer", "backend"), cells(FULL))
def test_losses_and_model_equal_those_of_one_process(trained, trainer, backend):
    check_equal(trained("one", "full", trainer), trained(backend, "full", trainer), trainer, adapter=False)


@pytest.mark.parametrize(("trainer", "backend"), cells(LORA))
def test_lora_losses_and_adapter_equal_those_of_one_process(trained, trainer, backend):
    check_equal(trained("one", "lora", trainer), trained(backend, "lora", trainer), trainer, adapter=True)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_metrics_of_a_trainer_are_logged(trained, trainer):
    own = {
        "reward": ("accuracy", "margin", "mean_reward"),
        "dpo": ("rewards/accuracies", "rewards/margins", "rewards/chosen", "logps/chosen"),
        "orpo": ("rewards/accuracies", "nll_loss", "log_odds_ratio"),
        "kto": ("rewards/margins", "kl"),
    }.get(trainer, ())
    run = trained("one", "full", trainer)
    steps = [entry for entry in run.metrics if "loss" in entry]
    for key in ("grad_norm", "learning_rate", "tokens", "tokens_per_second", *own):
        assert all(key in entry for entry in steps), key
    evaluations = [entry for entry in run.metrics if "eval_loss" in entry]
    for key in own:
        assert all(f"eval_{key}" in entry for entry in evaluations), key
    assert run.record["trainer"] and run.record["config"]["trainer"]["value"] == trainer
    assert "example" in run.out and f"done: {run.folder.name}" in run.out
    assert set(BACKENDS) >= {"one", *SEVERAL}


@pytest.mark.parametrize("backend", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp", "zero3"])
def test_precomputed_log_probabilities_do_not_change_the_losses_of_dpo(trained, bench, backend):
    run = bench.train(f"early-{backend}", *bench.flags(backend, "full", "dpo"), "--precompute-ref-log-probs")
    assert run.code == 0, run.err
    assert run.losses == pytest.approx(trained("one", "full", "dpo").losses, abs=1e-4)


def test_a_test_split_is_evaluated_once_at_the_end(bench):
    more = ["--valid-split", "none", "--valid-fraction", "0.1", "--test-fraction", "0.1"]
    run = bench.train("held-out", *bench.flags("fsdp", "full", "dpo"), *more, "--save-steps", "6")
    assert run.code == 0, run.err
    tested = [entry for entry in run.metrics if "test_loss" in entry]
    assert [entry["step"] for entry in tested] == [6]
    assert "test_rewards/accuracies" in tested[0] and "eval_loss" not in tested[0]
    assert "train: 32 rows" in run.out and "valid: 4 rows" in run.out and "test: 4 rows" in run.out
    assert f"test_loss {tested[0]['test_loss']:.4f}" in run.out


def test_masked_evaluation_hides_the_same_tokens_each_time_on_any_number_of_ranks(bench):
    """Four rows in batches of three: the second is not full. With lr 0 the loss must not change."""
    found = []
    for backend, size in (("one", "1"), ("ddp", "3")):
        more = ["--lr", "0", "--per-device-eval-batch-size", size, "--eval-on-start"]
        run = bench.train(f"hidden-{backend}", *bench.flags(backend, "full", "mlm"), *more)
        assert run.code == 0, run.err
        found.append([entry["eval_loss"] for entry in run.metrics if "eval_loss" in entry])
        assert len(found[-1]) == 3 and len(set(found[-1])) == 1
    assert found[1][0] == pytest.approx(found[0][0], abs=0.05)


@pytest.mark.parametrize("backend", ["ddp", "fsdp", "zero2"])
def test_new_tokens_are_trained_the_same_on_every_backend(bench, backend):
    """LoRA with a template that adds tokens: their rows in the embedding and in the output are trained."""
    many = bench.train(f"tokens-{backend}", *bench.flags(backend, "lora", "sft"), "--chat-template", "phi3")
    assert many.code == 0, many.err
    one = bench.root / "tokens-one" / "metrics.jsonl"
    if not one.exists():
        flags = [*bench.flags("one", "lora", "sft"), "--chat-template", "phi3"]
        assert bench.train("tokens-one", *flags).code == 0
    expected = [json.loads(line)["loss"] for line in one.read_text().splitlines() if '"loss"' in line]
    assert many.losses == pytest.approx(expected, abs=1e-4)
    assert many.losses[0] - many.losses[-1] > 0.01


def test_new_tokens_with_an_adapter_under_zero_3_are_refused(bench):
    run = bench.train("tokens-zero3", *bench.flags("zero3", "lora", "sft"), "--chat-template", "phi3")
    assert run.code == 2
    assert "phi3 adds tokens" in run.err and "Use distributed_backend: fsdp" in run.err
