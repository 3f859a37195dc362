"""A padded batch computed without its padding, whatever the trainer.

TRL's preference trainers hand the model a rectangle of rows and padding. The body of the model (all but its
head) sees one flat sequence instead, in which documents are kept apart as when they are packed; its output is
laid out as the rectangle again. So no trainer has to know, and no layer computes a padding token.

Where the first half of the rows are chosen answers and the second half the rejected ones, a prompt is the
same in both, and in a causal model so is all that is computed of it: it is computed once, where the attention
allows it.

    rows                 p p p c c .          flat    p p p c c r
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
    """Gives bodies their rectangles as they are, for a while."""
    token = _padded.set(on)
    try:
        yield
    finally:
        _padded.reset(token)


def flatten_body(model: PreTrainedModel, share_prompts: bool = False) -> None:
    """Replaces the forward of the model's body; call it before the model is wrapped by peft or a backend.

    `share_prompts`: the attention is documents_attention, and rows are chosen answers, then rejected ones.

    Raises:
        ConfigError: the model counts its positions by itself.
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
        if _padded.get() or not _is_rectangle(asked):
            return original(*args, **kwargs)
        ids, rectangle = asked["input_ids"], asked["attention_mask"].bool()
        others = {name: value for name, value in asked.items() if name not in ("input_ids", "attention_mask")}
        flat, source = share_flat(ids, rectangle) if share_prompts else (flat_inputs(ids, rectangle), None)
        output = original(**others | flat)
        hidden = output["last_hidden_state"][0]
        output["last_hidden_state"] = _laid_out(
            hidden if source is None else hidden.index_select(0, source), rectangle
        )
        return output

    body.forward = forward


def _is_rectangle(asked: dict[str, Any]) -> bool:
    """Rows with a mask of theirs, and nothing that belongs to positions of the rectangle."""
    mask = asked.get("attention_mask")
    special = ("past_key_values", "inputs_embeds", "token_type_ids", "position_ids")
    return (
        asked.get("input_ids") is not None
        and mask is not None
        and mask.dim() == 2
        and all(asked.get(name) is None for name in special)
        and not asked.get("output_router_logits")  # their loss wants the rectangle
        and not asked.get("output_hidden_states")
    )


def flat_inputs(input_ids: torch.Tensor, rectangle: torch.Tensor) -> dict[str, Any]:
    """The tokens of a (rows, length) batch in one row, with the positions and bounds of its documents."""
    return _flat(input_ids, rectangle, rectangle.cumsum(1) - 1)


def _flat(ids: torch.Tensor, kept: torch.Tensor, positions: torch.Tensor) -> dict[str, Any]:
    """The kept tokens of each row, one row after the other."""
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


def share_flat(
    input_ids: torch.Tensor, rectangle: torch.Tensor
) -> tuple[dict[str, Any], torch.Tensor | None]:
    """As flat_inputs, each pair (row i, row i + pairs) without the second copy of what both begin with.

    Returns with it, for each token of the rectangle in its order, where the flat sequence has it.
    """
    import torch

    pairs, odd = divmod(len(input_ids), 2)
    if odd or not bool(rectangle[:, 0].all()):  # padded at the left
        return flat_inputs(input_ids, rectangle), None
    chosen, rejected = rectangle[:pairs], rectangle[pairs:]
    same = (input_ids[:pairs] == input_ids[pairs:]) & chosen & rejected
    # At least the last token of each is its own, so that no document is empty.
    most = torch.minimum(chosen.sum(1), rejected.sum(1)) - 1
    prompts = torch.minimum(same.long().cumprod(1).sum(1), most)
    columns = torch.arange(rectangle.shape[1], device=input_ids.device)
    shared = columns < prompts[:, None]
    kept = torch.stack([chosen, rejected & ~shared], dim=1).flatten(0, 1)
    turned = torch.stack([input_ids[:pairs], input_ids[pairs:]], dim=1).flatten(0, 1)
    flat = _flat(turned, kept, columns.expand_as(kept)) | {"shared_prompts": prompts}
    place = (kept.flatten().cumsum(0) - 1).view(pairs, 2, -1)
    source = torch.cat([place[:, 0], torch.where(shared, place[:, 0], place[:, 1])])
    return flat, source[rectangle]


def _laid_out(hidden: torch.Tensor, rectangle: torch.Tensor) -> torch.Tensor:
    """(tokens, hidden) -> (rows, length, hidden), zeros where there is padding."""
    whole = hidden.new_zeros((rectangle.numel(), hidden.shape[-1]))
    where = rectangle.flatten().nonzero()[:, 0]
    return whole.index_copy(0, where, hidden).view(*rectangle.shape, -1)
