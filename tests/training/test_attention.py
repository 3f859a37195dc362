"""Packed documents give the same logits, losses and gradients as single ones, in each attention of a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from inprocess import ROWS, build, logged, settings_of
from transformers import GPT2Config, LlamaConfig

import trainers.model.document_attention
from trainers.config import packages as installed_packages
from trainers.config.errors import ConfigError
from trainers.model.attention import choose_attention, implementation
from trainers.model.isolation_probe import probe
from trainers.model.padding_free import flat_inputs, flatten_body, padded

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # GQA
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {**SIZES, "head_dim": 16, "sliding_window": 8}
MODELS = {
    "llama": ("Llama", SIZES),
    "qwen2": ("Qwen2", SIZES),
    "mistral with a window": ("Mistral", WINDOW),
    "gemma2 with a window and capped scores": ("Gemma2", WINDOW),
    "gemma3 with a window": ("Gemma3Text", WINDOW),
    "gpt2 with learnt positions": (
        "GPT2",
        {"vocab_size": 100, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
    ),
}
HEADS = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}
ATTENTIONS = ("documents", "sdpa", "eager")
LENGTHS = torch.tensor([30, 20, 11])  # longer than the window, twice


def build_model(name: str, attention: str = "eager") -> Any:
    kind, sizes = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, HEADS.get(kind, f"{kind}ForCausalLM"))(
        getattr(transformers, f"{kind}Config")(**sizes)
    ).eval()
    model.set_attn_implementation(implementation(attention))
    return model


@pytest.fixture
def rows():
    """Ids and mask of three documents, padded to one length."""
    torch.manual_seed(1)
    ids = torch.randint(3, 100, (3, 30))
    return ids, torch.arange(30) < LENGTHS[:, None]


def gradients(model: Any) -> torch.Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the summed cross-entropy of a document."""
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_a_flat_sequence_gives_the_same_as_its_single_documents(name, attention, rows):
    if attention == "sdpa" and "capped" in name:
        pytest.skip("transformers has no sdpa with capped scores")
    ids, mask = rows
    single, model = build_model(name), build_model(name, attention)
    loss = torch.zeros(())
    for row, length in zip(ids, LENGTHS, strict=True):
        loss = loss + loss_of(single(input_ids=row[None, :length]).logits[0], row[:length])
    loss.backward()
    flat = model(**flat_inputs(ids, mask)).logits[0]
    found = torch.zeros(())
    for part, row, length in zip(flat.split(LENGTHS.tolist()), ids, LENGTHS, strict=True):
        found = found + loss_of(part, row[:length])
    found.backward()
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(model), gradients(single), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_a_padded_batch_is_computed_without_its_padding(name, attention, rows):
    """The body sees only tokens that are not padding, and its output has the padded shape."""
    if attention == "sdpa" and "capped" in name:
        pytest.skip("transformers has no sdpa with capped scores")
    ids, mask = rows
    expected = build_model(name)(input_ids=ids, attention_mask=mask.long()).logits
    model, seen = build_model(name, attention), []
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].numel()))
    flatten_body(model)
    found = model(input_ids=ids, attention_mask=mask.long()).logits
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-5, atol=1e-5)
    assert seen == [int(mask.sum())]
    with padded():
        found = model(input_ids=ids, attention_mask=mask.long()).logits
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-5, atol=1e-5)
    assert seen[1:] == [mask.numel()]


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_is_computed_once_for_both_answers(name, rows):
    """Loss and gradients of pairs whose prompts have 12, 1 and 19 tokens, and of one without a prompt."""
    ids, mask = rows
    other, prompts = torch.randint(3, 100, ids.shape), torch.tensor([12, 1, 19])
    other = torch.where(torch.arange(30) < prompts[:, None], ids, other)
    other[:, 19] = (ids[:, 19] + 1).clamp(max=99)
    both = torch.cat([ids, ids[:1], other, other[:1].flip(1)])
    lengths = torch.tensor([30, 20, 24, 30, 15, 26, 30, 30])
    mask = torch.arange(30) < lengths[:, None]
    found, seen = [], []
    for share in (False, True):
        model = build_model(name, "documents")
        model.get_input_embeddings().register_forward_hook(
            lambda _, inputs, __: seen.append(inputs[0].numel())
        )
        flatten_body(model, share_prompts=share)
        logits = model(input_ids=both, attention_mask=mask.long()).logits[mask]
        (logits.log_softmax(-1)[:, 5] * torch.linspace(0, 1, len(logits))).mean().backward()
        found.append((logits, gradients(model)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert seen[0] == mask.sum() and seen[0] - seen[1] >= 12 + 1 + 19


def test_documents_need_no_mask_of_tokens_by_tokens(rows, monkeypatch):
    model = build_model("mistral with a window", "documents")
    ids, mask = rows
    sizes = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, *others, **named):
        sizes.append(0 if attn_mask is None else attn_mask.numel())
        return attend(query, key, value, attn_mask, *others, **named)

    monkeypatch.setattr(trainers.model.document_attention, "scaled_dot_product_attention", spy)
    model(**flat_inputs(ids, mask))
    assert sizes and max(sizes) <= 8 * 15, "a stretch of queries with the keys in its window"


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_probe_accepts_isolated_documents(attention):
    assert probe(build_model("llama", attention)) < 1e-5


def test_the_probe_stops_a_run_whose_documents_see_each_other(rows):
    model = build_model("llama", "documents")
    forward = model.model.forward

    def contaminated(*args, position_ids=None, cu_seq_lens_q=None, **kwargs):
        return forward(*args, **kwargs)

    model.model.forward = contaminated
    with pytest.raises(ConfigError, match="two documents of one sequence see each other"):
        probe(model)


def test_a_model_that_counts_positions_by_itself_is_refused():
    config = transformers.BloomConfig(vocab_size=100, hidden_size=32, n_layer=1, n_head=2)
    with pytest.raises(ConfigError, match="BloomModel takes no position_ids"):
        flatten_body(transformers.BloomForCausalLM(config))


def test_a_packed_run_is_probed_before_its_first_step(tmp_path, tiny_model, monkeypatch):
    import trainers.model.isolation_probe

    asked = []
    monkeypatch.setattr(trainers.model.isolation_probe, "probe", lambda *arguments: asked.append(arguments))
    logged(build(tmp_path / "packed", tiny_model, trainer="sft"))
    assert len(asked) == 1
    logged(build(tmp_path / "padded", tiny_model, trainer="sft", packing="none"))
    assert len(asked) == 1


def chosen(model: Any, **values: Any) -> tuple[str, str]:
    return choose_attention(settings_of(model="m", **values).train, model)


def test_without_a_gpu_documents_is_chosen():
    name, why = chosen(LlamaConfig(), trainer="sft")
    assert name == "documents"
    assert why == "flash_attention_2, varlen, flex_attention: there is no GPU"


def test_the_attention_of_the_config_is_chosen():
    assert chosen(LlamaConfig(), trainer="sft", attention="eager") == ("eager", "attention")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_flash_attention_2": True}, "use_flash_attention_2: flash_attention_2 cannot be used: there is "
         "no GPU. Set use_flash_attention_2: false, which selects documents here."),
        ({"attention": "varlen"}, "attention: varlen cannot be used: there is no GPU"),
        ({"attention": "flex_attention"}, "attention: flex_attention cannot be used: there is no GPU"),
    ],
)  # fmt: skip
def test_an_attention_that_is_not_available_is_an_error_with_the_reason(values, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        chosen(LlamaConfig(), trainer="sft", **values)


class Ampere:
    """A machine with such a GPU, as far as the choice of the attention checks."""

    def __init__(self, monkeypatch, packages=(), capability=(8, 0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(installed_packages, "installed", lambda name: name in packages)


HALF = {"trainer": "sft", "mixed_precision": "bf16"}


def test_flash_attention_is_chosen_if_the_package_and_the_gpu_allow_it(monkeypatch):
    Ampere(monkeypatch, packages=("flash-attn",))
    assert chosen(LlamaConfig(), **HALF) == ("flash_attention_2", "the fastest for packed documents")


def test_without_flash_attention_varlen_is_chosen(monkeypatch):
    Ampere(monkeypatch)
    name, why = chosen(LlamaConfig(), **HALF)
    assert (name, why) == (
        "varlen",
        "flash_attention_2: the package flash-attn is not installed (pip install 'phalanx[flash-attn]')",
    )


def test_without_varlen_flex_attention_is_chosen(monkeypatch):
    Ampere(monkeypatch, capability=(7, 5))
    assert chosen(LlamaConfig(), **HALF)[0] == "flex_attention"
    Ampere(monkeypatch)
    assert chosen(LlamaConfig(), trainer="sft")[0] == "flex_attention", "float32 has no flash kernel"
    assert chosen(transformers.Gemma2Config(), **HALF)[0] == "flex_attention", "varlen cannot cap scores"


def test_a_model_that_attends_in_chunks_gets_a_mask(monkeypatch):
    config = LlamaConfig(layer_types=["chunked_attention"] * 32)
    assert chosen(config, trainer="sft") == (
        "sdpa",
        "flash_attention_2: there is no GPU; varlen: llama attends in chunks; "
        "flex_attention: there is no GPU; documents: llama attends in chunks",
    )


def test_a_masked_lm_keeps_its_own_attention():
    assert chosen(GPT2Config(), trainer="mlm")[0] == "sdpa"


TRAINERS = {
    "default": {"packing": "bfd"},
    "sft": {"prompt_text_column": "prompt", "text_column": "completion"},
    "reward": {"text_column": "chosen", "rejected_text_column": "rejected"},
    "dpo": {"prompt_text_column": "prompt", "text_column": "chosen", "rejected_text_column": "rejected"},
    "orpo": {"prompt_text_column": "prompt", "text_column": "chosen", "rejected_text_column": "rejected"},
    "kto": {"prompt_text_column": "prompt", "text_column": "completion"},
}


def step(work: Path, model: Path, **values: Any) -> tuple[float, torch.Tensor]:
    """Return the loss and the gradient of a step over all rows."""
    found: list[torch.Tensor] = []
    built = build(work, model, max_grad_norm=0.0, lr=0.0, **values)

    class Keep(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
            found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))

    built.trainer.add_callback(Keep())
    return logged(built)[0]["loss"], found[0]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_packed_step_has_the_loss_and_gradient_of_an_unpacked_one(tmp_path, tiny_model, trainer):
    values = TRAINERS[trainer]
    plain = step(tmp_path / "plain", tiny_model, trainer=trainer, **{**values, "packing": "none"})
    variants: dict[str, dict[str, Any]] = {a: {"attention": a} for a in ATTENTIONS}
    if trainer != "kto":
        variants["filled to a budget"] = {
            "tokens_per_batch": 260, "gradient_accumulation": 8, "attention": "documents"
        }  # fmt: skip
    for name, own in variants.items():
        loss, gradient = step(tmp_path / name.replace(" ", "-"), tiny_model, trainer=trainer, **values, **own)
        assert loss == pytest.approx(plain[0], abs=1e-5), name
        torch.testing.assert_close(gradient, plain[1], rtol=1e-4, atol=1e-5, msg=name)


# Not kto: its loss is defined over a micro-batch (arXiv 2402.01306, section 4.1).
@pytest.mark.parametrize(
    ("trainer", "size"),
    [
        pytest.param(trainer, size, marks=pytest.mark.slow if size == 1 and trainer != "sft" else [])
        for trainer in ("default", "sft", "reward", "dpo", "orpo", "mlm")
        for size in (1, 4)
    ],
)
def test_evaluation_does_not_depend_on_how_it_is_batched(
    tmp_path, tiny_model, tiny_masked_model, trainer, size
):
    model = tiny_masked_model if trainer == "mlm" else tiny_model
    values = {**TRAINERS.get(trainer, {}), "trainer": trainer, "valid_split": "train"}

    def evaluated(name: str, **more: Any) -> float:
        built = build(tmp_path / name, model, **{**values, **more})
        return float(built.trainer.evaluate()["eval_loss"])

    expected = evaluated("all", per_device_eval_batch_size=len(ROWS))
    found = [evaluated("packed", per_device_eval_batch_size=size)]
    if trainer != "mlm":
        found.append(evaluated("padded", per_device_eval_batch_size=size, eval_packing=False))
        found.append(evaluated("none", per_device_eval_batch_size=size, packing="none"))
    assert found == pytest.approx([expected] * len(found), abs=1e-5)
