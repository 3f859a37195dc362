"""Choose the attention of a run, and give the reason.

    flash_attention_2   the flash-attn package (CUDA, fp16 or bf16)
    varlen              torch's own varlen_attn: FlashAttention-2 inside torch, nothing to build (CUDA)
    flex_attention      torch's compiled attention with a block mask (CUDA)
    documents           causal sdpa, one document after the other, without a mask of tokens x tokens
    sdpa, eager         transformers' own, with a dense mask where documents are packed

A document is a piece of a pack, or a sequence of a padded batch. All of these keep documents apart; they
differ in time and memory. `varlen` and `documents` are registered with transformers, so that any model that
looks up its attention there can use them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainers.config import requirements
from trainers.config.schema import TrainConfig
from trainers.model.place import place_of_rank

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

VARLEN, DOCUMENTS = "phalanx_varlen", "phalanx_documents"  # their names in transformers
OWN = {"varlen": VARLEN, "documents": DOCUMENTS}


def choose_attention(config: TrainConfig, model: PreTrainedConfig) -> tuple[str, str]:
    """Return the attention of a run (a name from the list above), and why it was chosen.

    Raises:
        ConfigError: the attention in the config cannot be used. The message has the reason and the one that
            would be used instead.
    """
    text = model.get_text_config()

    def unfit(name: str) -> str | None:
        if name in OWN and "chunked_attention" in (getattr(text, "layer_types", None) or ()):
            return f"{text.model_type} attends in chunks"
        if name == "varlen" and getattr(text, "attn_logit_softcapping", None) is not None:
            return f"{text.model_type} caps its attention scores"
        return None

    return requirements.choose_attention(config, place_of_rank(), unfit)


def implementation(name: str) -> str:
    """Return the name of an attention in transformers. Registers those of this project first."""
    if name not in OWN:
        return name
    from transformers import AttentionInterface, AttentionMaskInterface

    from trainers.model.document_attention import documents_attention

    AttentionInterface.register(VARLEN, _varlen)
    AttentionInterface.register(DOCUMENTS, documents_attention)
    for own in OWN.values():
        AttentionMaskInterface.register(own, _mask)
    return OWN[name]


def _mask(attention_mask: torch.Tensor | None = None, **arguments: Any) -> torch.Tensor | None:
    """Return a mask only if there is padding: the attention itself handles documents and windows."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None or bool(attention_mask.all()):
        return None
    return sdpa_mask(attention_mask=attention_mask, **arguments | {"allow_is_causal_skip": False})


def _varlen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Run torch's varlen_attn on a flat batch, and documents_attention, with the same shapes, on others."""
    from torch.nn.attention.varlen import varlen_attn

    from trainers.model.document_attention import documents_attention, refuse

    if cu_seq_lens_q is None or attention_mask is not None or dropout:
        return documents_attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, cu_seq_lens_q=cu_seq_lens_q, **others,
        )  # fmt: skip
    refuse(others)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out: Any = varlen_attn(
        q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out[None], None
