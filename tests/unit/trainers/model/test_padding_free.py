"""A padded batch is computed as one flat sequence."""

from __future__ import annotations

import pytest
import torch
import transformers
from architectures import IN_EACH_ATTENTION, MODELS, build_model, gradients

from trainers.config.errors import ConfigError
from trainers.model.padding_free import flatten_body, padded


@pytest.mark.parametrize(("name", "attention"), IN_EACH_ATTENTION)
def test_a_padded_batch_is_computed_without_its_padding(name, attention, documents):
    """The body sees only tokens that are not padding, and its output has the padded shape."""
    ids, mask = documents
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
def test_a_prompt_is_computed_once_for_both_answers(name, documents):
    """Loss and gradients of pairs whose prompts have 12, 1 and 19 tokens, and of one without a prompt."""
    ids, mask = documents
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


def test_a_model_that_counts_positions_by_itself_is_refused():
    config = transformers.BloomConfig(vocab_size=100, hidden_size=32, n_layer=1, n_head=2)
    with pytest.raises(ConfigError, match="BloomModel takes no position_ids"):
        flatten_body(transformers.BloomForCausalLM(config))
