"""Causal attention inside each document of a flat batch: sdpa, one document after the other.

There is never a mask of tokens x tokens. Neighbouring documents of equal length are one call. With a sliding
window, a stretch of queries is one call with the keys that it sees. Two answers to one prompt can share the
computed prompt (trainers/model/padding_free.py): each sees the prompt and itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention

from trainers.config.errors import ConfigError

QKV = tuple[Tensor, Tensor, Tensor]  # (batch, heads, queries, d), and twice (batch, kv heads, keys, d)


@dataclass(frozen=True)
class Scores:
    """How a model computes its attention scores."""

    scaling: float | None
    dropout: float
    softcap: float | None  # the scores are capped to softcap * tanh(scores / softcap)
    window: int | None  # how many of the last keys a query sees, with its own


def documents_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    shared_prompts: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute attention, with the interface that transformers registers.

    query: (batch, heads, tokens, d); key and value: (batch, kv heads, tokens, d); returns (batch, tokens,
    heads, d). `cu_seq_lens_q`, the bounds of the documents, needs a batch of one. Without it, each sequence
    is a document. `shared_prompts` (pairs,): documents 2i and 2i + 1 are a pair. The second one lacks its
    first shared_prompts[i] tokens, because they are those of the first one.

    Raises:
        ConfigError: the model adds something to its scores that is not supported here.
    """
    refuse(others)
    qkv, scores = (query, key, value), Scores(scaling, dropout, softcap, sliding_window)
    if attention_mask is not None:
        return _attend(qkv, scores, attention_mask).transpose(1, 2).contiguous(), None
    if cu_seq_lens_q is None:
        return _causal(qkv, scores).transpose(1, 2).contiguous(), None
    lengths = cu_seq_lens_q.diff().tolist()
    parts = (
        _runs(qkv, scores, lengths)
        if shared_prompts is None
        else _pairs(qkv, scores, lengths, shared_prompts.tolist())
    )
    return torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])[None], None


def refuse(others: dict[str, Any]) -> None:
    """Check that the model adds nothing to its scores that this attention would ignore.

    Raises:
        ConfigError: it adds something.
    """
    for name in ("s_aux", "position_bias"):
        if others.get(name) is not None:
            raise ConfigError(
                f"attention: the model adds {name} to its scores, which this attention does not support. "
                "Use attention: eager."
            )


def _split(qkv: QKV, lengths: list[int]) -> Iterator[QKV]:
    """Yield stretches of tokens. Uses split: the gradient of a slice is as large as the full tensor."""
    yield from zip(*(tensor.split(lengths, dim=2) for tensor in qkv), strict=True)


def _runs(qkv: QKV, scores: Scores, lengths: list[int]) -> Iterator[Tensor]:
    """Yield the results of all documents. Neighbours of equal length are the batch of one call."""
    runs = [(len(list(run)), length) for length, run in groupby(lengths)]
    for (number, length), part in zip(runs, _split(qkv, [n * size for n, size in runs]), strict=True):
        q, k, v = (tensor[0].unflatten(1, (number, length)).transpose(0, 1) for tensor in part)
        yield _causal((q, k, v), scores)


def _pairs(qkv: QKV, scores: Scores, lengths: list[int], prompts: list[int]) -> Iterator[Tensor]:
    """Yield the results of pairs of documents. The second continues where the first one's prompt ends."""
    parts = _split(qkv, lengths)
    for (first, second), prompt in zip(zip(parts, parts, strict=True), prompts, strict=True):
        yield _causal(first, scores)
        q, *others = second
        k, v = (
            torch.cat([own[:, :, :prompt], other], dim=2)
            for own, other in zip(first[1:], others, strict=True)
        )
        yield _causal((q, k, v), scores)


def _causal(qkv: QKV, scores: Scores) -> Tensor:
    """Compute causal attention. The last query sees all keys, the one before it all but the last, and so on.

    There may be more keys than queries.
    """
    query, key, value = qkv
    queries, keys = query.shape[2], key.shape[2]
    before, window = keys - queries, scores.window or keys
    if before == 0 and keys <= window and scores.softcap is None:
        return _attend(qkv, scores, causal=True)
    parts = []
    for begin in range(0, queries, window):
        end = min(begin + window, queries)
        span = slice(max(0, before + begin - window + 1), before + end)
        rows = torch.arange(before + begin, before + end, device=query.device)[:, None]
        columns = torch.arange(span.start, span.stop, device=query.device)
        mask = (columns <= rows) & (columns > rows - window)
        parts.append(_attend((query[:, :, begin:end], key[:, :, span], value[:, :, span]), scores, mask))
    return torch.cat(parts, dim=2)


def _attend(qkv: QKV, scores: Scores, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Return softmax(q k^T) v."""
    query, key, value = qkv
    heads = query.shape[1] // key.shape[1]
    if scores.softcap is None:
        return scaled_dot_product_attention(
            query, key, value, mask, scores.dropout, causal, scale=scores.scaling, enable_gqa=heads > 1
        )
    key, value = (tensor.repeat_interleave(heads, dim=1) for tensor in (key, value))
    scaling = query.shape[-1] ** -0.5 if scores.scaling is None else scores.scaling
    weights = torch.tanh(query @ key.transpose(2, 3) * scaling / scores.softcap) * scores.softcap
    if mask is not None:
        weights = weights.masked_fill(~mask, torch.finfo(weights.dtype).min)  # not -inf: padding sees no key
    return drop(weights.softmax(-1, dtype=torch.float32), scores.dropout).to(value.dtype) @ value
