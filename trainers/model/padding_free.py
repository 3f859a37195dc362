"""Compute a padded batch without its padding, for any trainer.

TRL's preference trainers pass the model a padded batch. The body of the model (all but its head) sees one
flat sequence instead, in which documents are kept apart as in a pack. Its output gets the shape of the padded
batch again. So the trainers need no change, and no layer computes a padding token.

The first half of a batch may be chosen answers, and the second half the rejected ones, with the same prompts.
In a causal model everything computed from a prompt is then the same in both. It is computed once, if the
attention supports it.

    padded               p p p c c .          flat    p p p c c r
                         p p p r . .       position   0 1 2 3 4 3
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from trainers.config.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_padded = ContextVar("padded", default=False)


@contextmanager
def padded(on: bool = True) -> Iterator[None]:
    """Pass padded batches to the bodies unchanged while the block runs."""
    token = _padded.set(on)
    try:
        yield
    finally:
        _padded.reset(token)


def flatten_body(model: PreTrainedModel, share_prompts: bool = False) -> None:
    """Replace the forward of the model's body. Call it before peft or a backend wraps the model.

    `share_prompts`: the attention is documents_attention, and a batch is chosen answers, then rejected ones.

    Raises:
        ConfigError: the model takes no positions, because it counts them itself.
    """
    body: Any = model.base_model
    original = body.forward
    signature = inspect.signature(original)
    if "position_ids" not in signature.parameters:
        raise ConfigError(
            f"packing: {type(body).__name__} takes no position_ids, so documents of one sequence cannot be "
            "kept apart. Set packing: none."
        )

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        asked = signature.bind(*args, **kwargs).arguments
        asked |= asked.pop("kwargs", {})
        if _padded.get() or not _is_padded_batch(asked):
            return original(*args, **kwargs)
        ids, mask = asked["input_ids"], asked["attention_mask"].bool()
        others = {name: value for name, value in asked.items() if name not in ("input_ids", "attention_mask")}
        flat, source = share_flat(ids, mask) if share_prompts else (flat_inputs(ids, mask), None)
        output = original(**others | flat)
        hidden = output["last_hidden_state"][0]
        output["last_hidden_state"] = _padded_states(
            hidden if source is None else hidden.index_select(0, source), mask
        )
        return output

    body.forward = forward


def _is_padded_batch(asked: dict[str, Any]) -> bool:
    """Return whether the inputs are ids and their mask, and nothing else that depends on the padded shape."""
    mask = asked.get("attention_mask")
    special = ("past_key_values", "inputs_embeds", "token_type_ids", "position_ids")
    return (
        asked.get("input_ids") is not None
        and mask is not None
        and mask.dim() == 2
        and all(asked.get(name) is None for name in special)
        and not asked.get("output_router_logits")  # their loss needs the padded batch
        and not asked.get("output_hidden_states")
    )


def flat_inputs(input_ids: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    """Return a (batch, length) batch as one flat sequence, with the positions and bounds of its documents."""
    return _flat(input_ids, mask, mask.cumsum(1) - 1)


def _flat(ids: torch.Tensor, kept: torch.Tensor, positions: torch.Tensor) -> dict[str, Any]:
    """Return the kept tokens of each sequence, one sequence after the other."""
    import torch

    lengths = kept.sum(1)
    lengths = lengths[lengths > 0]
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    return {
        "input_ids": ids[kept][None],
        "position_ids": positions[kept][None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        "use_cache": False,  # a cache would mix the documents
    }


def share_flat(input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor | None]:
    """Return a batch as flat_inputs does, but with the common start of a pair only once.

    Sequences i and i + pairs are a pair. Also returns the index in the flat sequence of each token of the
    padded batch, in its order, or None if nothing is shared.
    """
    import torch

    pairs, odd = divmod(len(input_ids), 2)
    if odd or not bool(mask[:, 0].all()):  # padded on the left
        return flat_inputs(input_ids, mask), None
    chosen, rejected = mask[:pairs], mask[pairs:]
    same = (input_ids[:pairs] == input_ids[pairs:]) & chosen & rejected
    # The last token of each sequence is never shared, so that no document is empty.
    most = torch.minimum(chosen.sum(1), rejected.sum(1)) - 1
    prompts = torch.minimum(same.long().cumprod(1).sum(1), most)
    columns = torch.arange(mask.shape[1], device=input_ids.device)
    shared = columns < prompts[:, None]
    kept = torch.stack([chosen, rejected & ~shared], dim=1).flatten(0, 1)
    turned = torch.stack([input_ids[:pairs], input_ids[pairs:]], dim=1).flatten(0, 1)
    flat = _flat(turned, kept, columns.expand_as(kept)) | {"shared_prompts": prompts}
    place = (kept.flatten().cumsum(0) - 1).view(pairs, 2, -1)
    source = torch.cat([place[:, 0], torch.where(shared, place[:, 0], place[:, 1])])
    return flat, source[mask]


def _padded_states(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return states in the shape of the batch: (tokens, hidden) -> (batch, length, hidden), padding is 0."""
    states = hidden.new_zeros((mask.numel(), hidden.shape[-1]))
    where = mask.flatten().nonzero()[:, 0]
    return states.index_copy(0, where, hidden).view(*mask.shape, -1)
