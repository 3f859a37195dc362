"""Tiny models of many architectures, without files."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from trainers.model.attention import implementation

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
# transformers has no sdpa with capped scores.
IN_EACH_ATTENTION = [
    (name, attention)
    for name in MODELS
    for attention in ATTENTIONS
    if attention != "sdpa" or "capped" not in name
]
LENGTHS = torch.tensor([30, 20, 11])  # longer than the window, twice


def build_model(name: str, attention: str = "eager") -> Any:
    kind, sizes = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, HEADS.get(kind, f"{kind}ForCausalLM"))(
        getattr(transformers, f"{kind}Config")(**sizes)
    ).eval()
    model.set_attn_implementation(implementation(attention))
    return model


def gradients(model: Any) -> torch.Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found
