"""Check before the first step of a packed run that the documents of a pack do not see each other.

Two documents in one flat sequence must give the same values as each of them separately under transformers'
own attention. Contamination does not show in the loss, so here it is an error, never a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from trainers.config.errors import ConfigError
from trainers.model.padding_free import flat_inputs

if TYPE_CHECKING:
    import torch
    from transformers import Trainer

LENGTHS = (23, 14)  # tokens of the two documents
# The largest difference between packed and single documents, as a share of the spread of the values. If
# documents see each other, the difference is about as large as the spread.
TOLERANCES = {"float32": 5e-3, "bf16": 0.1, "fp16": 0.03}


class ProbeIsolation(TrainerCallback):
    """A callback that probes the model at the start of training, on all ranks.

    At that time the model is on the device, and sharded, as it is in training.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # Call the model as training does, because ZeRO-3 predicts which parameters come next.
        read = _last_states if model.get_output_embeddings() is None else _log_probs
        computed = "bf16" if args.bf16 else "fp16" if args.fp16 else "float32"
        probe(model, lambda **inputs: read(self.trainer.model_wrapped, **inputs), args.seed, computed)


def probe(
    model: Any, read: Callable[..., torch.Tensor] | None = None, seed: int = 0, computed: str = "float32"
) -> float:
    """Return the difference between packed and single documents, as a share of the spread of the values.

    `read` takes inputs of the model and returns the values of each token, (tokens, values). `computed` is the
    dtype of the matrix products.

    Raises:
        ConfigError: the difference is too large for this dtype.
    """
    import torch

    read = read or partial(_last_states, model)
    generator = torch.Generator().manual_seed(seed)
    size = model.config.get_text_config().vocab_size
    rows = torch.randint(size, (2, max(LENGTHS)), generator=generator).to(model.device)
    lengths = torch.tensor(LENGTHS, device=model.device)
    mask = torch.arange(max(LENGTHS), device=model.device) < lengths[:, None]
    with torch.no_grad(), _evaluated(model):
        packed = read(**flat_inputs(rows, mask))
        with _plain_attention(model):
            single = [read(input_ids=row[None, :n]) for row, n in zip(rows, LENGTHS, strict=True)]
    # Packed, the last token of the first document also predicts a token. It has no counterpart.
    packed = torch.cat([packed[: len(single[0])], packed[-len(single[1]) :]]).float()
    expected = torch.cat(single).float()
    difference = float((packed - expected).norm() / (expected - expected.mean()).norm())
    allowed = TOLERANCES[computed]
    if not difference <= allowed:
        raise ConfigError(
            f"packing: two documents of one sequence see each other in this model (its outputs differ by "
            f"{difference:.2g} of their spread; allowed: {allowed}). Set packing: none, or another attention "
            "(for example attention: sdpa)."
        )
    return difference


def _last_states(model: Any, **inputs: Any) -> torch.Tensor:
    """Return the last hidden states: (tokens, hidden)."""
    output = model(**inputs | {"use_cache": False}, output_hidden_states=True)
    states: torch.Tensor = output.hidden_states[-1][0]
    return states


def _log_probs(model: Any, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Return the log-probabilities of the next tokens, from TRL's fused head: (tokens - 1, 1)."""
    output = model(input_ids=input_ids, labels=input_ids, fused_lm_head=True, **inputs | {"use_cache": False})
    log_probs: torch.Tensor = output.log_probs[0][:, None]
    return log_probs


@contextmanager
def _evaluated(model: Any) -> Iterator[None]:
    """Switch dropout off while the block runs."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _plain_attention(model: Any) -> Iterator[None]:
    """Use transformers' own attention in all parts of the model while the block runs."""
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    plain = "eager" if any(getattr(c, "attn_logit_softcapping", None) for c in configs.values()) else "sdpa"
    try:
        for config in configs.values():
            config._attn_implementation = plain
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
