"""A flat sequence gives the losses and gradients of its single documents, in each attention of a CPU."""

from __future__ import annotations

import pytest
import torch
from architectures import IN_EACH_ATTENTION, LENGTHS, build_model, gradients

import trainers.model.document_attention
from trainers.model.padding_free import flat_inputs


def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the summed cross-entropy of a document."""
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")


@pytest.mark.parametrize(("name", "attention"), IN_EACH_ATTENTION)
def test_a_flat_sequence_gives_the_same_as_its_single_documents(name, attention, documents):
    ids, mask = documents
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


def test_documents_need_no_mask_of_tokens_by_tokens(documents, monkeypatch):
    model = build_model("mistral with a window", "documents")
    ids, mask = documents
    sizes = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, *others, **named):
        sizes.append(0 if attn_mask is None else attn_mask.numel())
        return attend(query, key, value, attn_mask, *others, **named)

    monkeypatch.setattr(trainers.model.document_attention, "scaled_dot_product_attention", spy)
    model(**flat_inputs(ids, mask))
    assert sizes and max(sizes) <= 8 * 15, "a stretch of queries with the keys in its window"
