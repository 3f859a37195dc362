"""The loss of the first step equals the loss computed here from the logits, by the formulas of the papers.

The data is six fixed rows, the model is tiny and fixed, in float32. The computation here uses nothing from
trainers/ but the run itself, and what the run drew at random (the mask, the reward head, the order of kto).
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from inprocess import ROWS, build, logged
from tiny import SIZES, build_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from trainers.config.kinds import KINDS

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model(tiny_model: Path):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Another model with the same tokenizer, so that log-ratios are not zero: (folder, model)."""
    folder = build_tiny_model(tmp_path_factory.mktemp("reference") / "model", seed=1)
    return folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path):
    return AutoTokenizer.from_pretrained(tiny_model)


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def token_logps(model, ids: list[int]) -> torch.Tensor:
    """Return log p of each token but the first, for a batch of one: shape (len(ids) - 1,)."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def answer_logps(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    return token_logps(model, prompt + answer)[len(prompt) - 1 :]


@pytest.fixture
def pairs(tokenizer):
    """(prompt, chosen, rejected) ids of ROWS as plain text, with EOS at the end of each answer."""
    end = [tokenizer.eos_token_id]
    return [
        tuple(ids_of(tokenizer, row[name]) + ([] if name == "prompt" else end) for name in
              ("prompt", "chosen", "rejected"))
        for row in ROWS
    ]  # fmt: skip


def first_loss(tmp_path, tiny_model, **config) -> float:
    return logged(build(tmp_path, tiny_model, **config))[0]["loss"]


@pytest.mark.parametrize("packing", ["none", "bfd"])
def test_sft_is_the_cross_entropy_of_completions_and_their_eos(
    tmp_path, tiny_model, model, tokenizer, pairs, packing
):
    expected = torch.cat([answer_logps(model, prompt, chosen) for prompt, chosen, _ in pairs])
    found = first_loss(tmp_path, tiny_model, trainer="sft", packing=packing, prompt_text_column="prompt",
                       text_column="chosen")  # fmt: skip
    assert found == pytest.approx(-expected.mean().item(), abs=TOLERANCE)


def test_sft_on_messages_supervises_the_answer_and_the_end_of_its_turn(
    tmp_path, tiny_model, model, tokenizer
):
    rows, logps = [], []
    for row in ROWS:
        turns = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        rows.append({"messages": turns})
        before = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        prompt, answer = ids_of(tokenizer, before), ids_of(tokenizer, row["completion"] + "<|im_end|>")
        logps.append(answer_logps(model, prompt, answer))
    found = first_loss(tmp_path, tiny_model, rows=rows, trainer="sft", chat_template="tokenizer")
    assert found == pytest.approx(-torch.cat(logps).mean().item(), abs=TOLERANCE)


def test_default_joins_documents_and_cuts_them_into_full_packs(tmp_path, tiny_model, model, tokenizer):
    block, logps, room = 32, [], 32
    texts = [ids_of(tokenizer, row["text"]) for row in ROWS]
    for ids in texts:
        document = [*ids, tokenizer.eos_token_id]
        # A piece sees only itself: the part of the document in its pack.
        while document:
            piece, document = document[:room], document[room:]
            logps.append(token_logps(model, piece))
            room = room - len(piece) or block
    built = build(tmp_path, tiny_model, trainer="default", block_size=block, batch_size=100)
    (batch,) = built.trainer.get_train_dataloader()
    assert batch["input_ids"].numel() == sum(len(ids) + 1 for ids in texts), "nothing is dropped"
    assert logged(built)[0]["loss"] == pytest.approx(-torch.cat(logps).mean().item(), abs=TOLERANCE)


def test_mlm_is_the_cross_entropy_of_the_masked_tokens(tmp_path, tiny_masked_model):
    built = build(tmp_path, tiny_masked_model, trainer="mlm")
    samples = [{**sample, "number": n} for n, sample in enumerate(built.context.rows("train"))]
    batch = built.trainer.data_collator(samples)
    bert = AutoModelForMaskedLM.from_pretrained(tiny_masked_model, dtype=torch.float32).eval()
    losses = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        length = int((ids != 0).sum())  # [PAD] is 0
        with torch.no_grad():
            logits = bert(input_ids=ids[None, :length]).logits[0]
        asked = labels[:length] != -100
        losses.append(F.cross_entropy(logits[asked], labels[:length][asked], reduction="none"))
    assert logged(built)[0]["loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=TOLERANCE)


def test_reward_is_the_bradley_terry_loss(tmp_path, tiny_model, model, pairs):
    """-log sigmoid(r_chosen - r_rejected), Bradley and Terry 1952; arXiv 2203.02155, eq. 1."""
    built = build(tmp_path, tiny_model, trainer="reward")
    head = built.trainer.model.score.weight.detach().clone()
    assert head.std() > 0

    def score(ids):
        with torch.no_grad():
            return model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] @ head[0]

    margins = torch.stack([score(p + chosen) - score(p + rejected) for p, chosen, rejected in pairs])
    log = logged(built)[0]
    assert log["loss"] == pytest.approx(-F.logsigmoid(margins).mean().item(), abs=TOLERANCE)
    assert log["margin"] == pytest.approx(margins.mean().item(), abs=TOLERANCE)
    assert log["accuracy"] == pytest.approx((margins > 0).float().mean().item())


def ratios(model, other, pairs):
    """Return log-ratios of policy to reference without beta, summed over an answer: (chosen, rejected)."""

    def total(side):
        return torch.stack([
            answer_logps(model, pair[0], pair[side]).sum() - answer_logps(other, pair[0], pair[side]).sum()
            for pair in pairs
        ])  # fmt: skip

    return total(1), total(2)


DPO_LOSSES = {
    # arXiv 2305.18290, eq. 7
    "sigmoid": lambda chosen, rejected: -F.logsigmoid(0.3 * (chosen - rejected)),
    # arXiv 2305.10425: the hinge of SLiC
    "hinge": lambda chosen, rejected: F.relu(1 - 0.3 * (chosen - rejected)),
}


@pytest.mark.parametrize("loss", DPO_LOSSES)
def test_dpo_compares_with_the_reference_model(tmp_path, tiny_model, model, reference, pairs, loss):
    folder, other = reference
    chosen, rejected = ratios(model, other, pairs)
    built = build(tmp_path, tiny_model, trainer="dpo", model_ref=str(folder), dpo_beta=0.3, loss_type=loss)
    log = logged(built)[0]
    assert log["loss"] == pytest.approx(DPO_LOSSES[loss](chosen, rejected).mean().item(), abs=TOLERANCE)
    assert log["rewards/margins"] == pytest.approx(0.3 * (chosen - rejected).mean().item(), abs=1e-3)


@pytest.mark.parametrize("loss", [*KINDS["dpo"].losses, ["sigmoid", "sft"]])
def test_every_loss_of_dpo_trains(tmp_path, tiny_model, reference, loss):
    more = {"label_smoothing": 0.01} if loss == "exo_pair" else {}
    built = build(tmp_path, tiny_model, trainer="dpo", loss_type=loss, model_ref=str(reference[0]), **more)
    log = logged(built)[0]
    assert math.isfinite(log["loss"]) and log["grad_norm"] > 0


@pytest.mark.parametrize(
    "more", [{}, {"peft": True, "quantization": None}, {"precompute_ref_log_probs": True}]
)
def test_dpo_against_itself_starts_at_log_two(tmp_path, tiny_model, more):
    found = first_loss(tmp_path, tiny_model, trainer="dpo", **more)
    assert found == pytest.approx(math.log(2), abs=TOLERANCE)


def test_precomputed_log_probabilities_give_the_same_dpo_loss(tmp_path, tiny_model, reference):
    config = {"trainer": "dpo", "model_ref": str(reference[0]), "dpo_beta": 0.3, "max_steps": 3}
    losses = []
    for precompute in (False, True):
        built = build(tmp_path, tiny_model, precompute_ref_log_probs=precompute, **config)
        losses.append([entry["loss"] for entry in logged(built)])
        assert (built.trainer.ref_model is None) == precompute, "precomputed: its memory is freed"
    assert losses[1] == pytest.approx(losses[0], abs=TOLERANCE)


@pytest.mark.parametrize("train_on", ["auto", "all"])
def test_orpo_adds_the_odds_ratio_to_the_likelihood(tmp_path, tiny_model, model, pairs, train_on):
    """arXiv 2403.07691, eq. 4, 6 and 7; log p is the mean over the tokens of an answer (eq. 2)."""
    losses = []
    for prompt, chosen, rejected in pairs:
        logp = {
            side: answer_logps(model, prompt, ids).mean() for side, ids in (("w", chosen), ("l", rejected))
        }
        log_odds = {side: value - torch.log1p(-value.exp()) for side, value in logp.items()}
        nll = -token_logps(model, prompt + chosen).mean() if train_on == "all" else -logp["w"]
        losses.append(nll - 0.5 * F.logsigmoid(log_odds["w"] - log_odds["l"]))
    found = first_loss(tmp_path, tiny_model, trainer="orpo", orpo_beta=0.5, train_on=train_on)
    assert found == pytest.approx(torch.stack(losses).mean().item(), abs=TOLERANCE)


def test_kto_weighs_gains_and_losses_against_the_divergence(tmp_path, tiny_model, model, reference):
    """arXiv 2402.01306, eq. 7 and 8. z0 comes from each prompt with the answer of the sample before it."""
    folder, other = reference
    beta, wanted, unwanted = 0.3, 1.5, 0.7
    built = build(tmp_path, tiny_model, trainer="kto", model_ref=str(folder), kto_beta=beta,
                  desirable_weight=wanted, undesirable_weight=unwanted)  # fmt: skip
    rows = list(built.context.rows("train"))
    assert sorted(row["label"] for row in rows) == sorted(row["label"] for row in ROWS)

    def ratio(prompt, answer):
        return answer_logps(model, prompt, answer).sum() - answer_logps(other, prompt, answer).sum()

    mismatched = [
        ratio(row["prompt_ids"], rows[index - 1]["completion_ids"]) for index, row in enumerate(rows)
    ]
    z0 = torch.stack(mismatched).mean().clamp(min=0)
    losses = []
    for row in rows:
        r = ratio(row["prompt_ids"], row["completion_ids"])
        value = torch.sigmoid(beta * ((r - z0) if row["label"] else (z0 - r)))
        losses.append((wanted if row["label"] else unwanted) * (1 - value))
    log = logged(built)[0]
    assert log["loss"] == pytest.approx(torch.stack(losses).mean().item(), abs=TOLERANCE)
    assert log["kl"] == pytest.approx(z0.item(), abs=1e-3)


LONG_AND_SHORT = [
    {
        "prompt": f"What is {i}? ",
        "completion": "The answer. " * (1 if i % 2 else 12) + str(i),
        "label": i % 3 != 0,
        "chosen": "The answer. " * (1 if i % 2 else 12) + str(i),
        "rejected": "Ranks. " * (9 if i % 3 else 1),
        "text": "Gradients are averaged. " * (1 if i % 2 else 12),
    }
    for i in range(8)
]


@pytest.mark.parametrize("trainer", ["default", "sft", "reward", "dpo", "orpo", "kto", "mlm"])
def test_accumulation_gives_the_loss_and_gradient_of_one_large_batch(
    tmp_path, tiny_model, tiny_masked_model, reference, trainer
):
    """The rows have very different lengths, as in transformers#35203."""
    small = 2 if trainer == "kto" else 1
    config = {"trainer": trainer, "block_size": 128, "max_grad_norm": 1e9}
    if trainer in ("default", "sft"):
        config["packing"] = "none"
    if trainer in ("dpo", "kto"):
        config["model_ref"] = str(reference[0])
    found = []
    for batch, accumulation in ((small, 8 // small), (8, 1)):
        built = build(
            tmp_path, tiny_masked_model if trainer == "mlm" else tiny_model, rows=LONG_AND_SHORT,
            batch_size=batch, gradient_accumulation=accumulation, **config,
        )  # fmt: skip
        found.append(logged(built)[0])
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], abs=TOLERANCE)
    assert found[0]["grad_norm"] == pytest.approx(found[1]["grad_norm"], rel=1e-3)


def test_a_step_is_the_mean_over_all_tokens_for_a_model_that_declares_otherwise(tmp_path, tiny_model):
    """Gemma 4 declares that it takes no number of tokens, since it leaves out images."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    count = len(tokenizer)
    sizes = {"vocab_size": count, "vocab_size_per_layer_input": count, "global_head_dim": 16,
             "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}  # fmt: skip
    config = AutoConfig.for_model("gemma4", text_config=SIZES | ids | sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    found = []
    for batch in (1, 4, 8):
        built = build(
            tmp_path, tmp_path / "model", rows=LONG_AND_SHORT, trainer="sft", block_size=128, packing="none",
            batch_size=batch, gradient_accumulation=8 // batch, max_grad_norm=1e9,
        )  # fmt: skip
        found.append(logged(built)[0])
    for step in found[1:]:
        assert step["loss"] == pytest.approx(found[0]["loss"], abs=TOLERANCE)
        assert step["grad_norm"] == pytest.approx(found[0]["grad_norm"], rel=1e-3)
