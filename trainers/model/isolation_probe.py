"""Before the first step of a packed run: do the documents of a pack see each other in this very model?

Two documents in one flat sequence must give what each gives alone under transformers' own attention.
Contamination does not show in a loss; it is an error here, never a warning.
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
# How far packed may be from single documents, as a share of how the values spread. Documents that see each
# other differ by about as much as they spread.
TOLERANCES = {"float32": 5e-3, "bf16": 0.1, "fp16": 0.03}


class ProbeIsolation(TrainerCallback):
    """Asks at the start of training, when the model is where it will be trained; on all ranks alike."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # As it is called in training: ZeRO-3 foresees which parameters come next.
        read = _last_states if model.get_output_embeddings() is None else _log_probs
        computed = "bf16" if args.bf16 else "fp16" if args.fp16 else "float32"
        probe(model, lambda **inputs: read(self.trainer.model_wrapped, **inputs), args.seed, computed)


def probe(
    model: Any, read: Callable[..., torch.Tensor] | None = None, seed: int = 0, computed: str = "float32"
) -> float:
    """The difference of packed and single documents, as a share.

    `read` takes inputs of the model and returns values of each token, (tokens, values); `computed` is the
    type of the matrix products.

    Raises:
        ConfigError: it is too large for the type the model computes in.
    """
    import torch

    read = read or partial(_last_states, model)
    generator = torch.Generator().manual_seed(seed)
    size = model.config.get_text_config().vocab_size
    rows = torch.randint(size, (2, max(LENGTHS)), generator=generator).to(model.device)
    lengths = torch.tensor(LENGTHS, device=model.device)
    rectangle = torch.arange(max(LENGTHS), device=model.device) < lengths[:, None]
    with torch.no_grad(), _evaluated(model):
        packed = read(**flat_inputs(rows, rectangle))
        with _plain_attention(model):
            alone = [read(input_ids=row[None, :n]) for row, n in zip(rows, LENGTHS, strict=True)]
    # The last token of the first document predicts nothing that it has alone.
    packed = torch.cat([packed[: len(alone[0])], packed[-len(alone[1]) :]]).float()
    expected = torch.cat(alone).float()
    difference = float((packed - expected).norm() / (expected - expected.mean()).norm())
    allowed = TOLERANCES[computed]
    if not difference <= allowed:
        raise ConfigError(
            f"packing: two documents of one sequence see each other in this model (what it computes differs "
            f"by {difference:.2g} of its spread; allowed {allowed}). Set packing: none, or another attention "
            "(attention: sdpa)."
        )
    return difference


def _last_states(model: Any, **inputs: Any) -> torch.Tensor:
    """The last hidden states: (tokens, hidden)."""
    output = model(**inputs | {"use_cache": False}, output_hidden_states=True)
    states: torch.Tensor = output.hidden_states[-1][0]
    return states


def _log_probs(model: Any, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Log-probabilities of the next tokens, of TRL's fused head: (tokens - 1, 1)."""
    output = model(input_ids=input_ids, labels=input_ids, fused_lm_head=True, **inputs | {"use_cache": False})
    log_probs: torch.Tensor = output.log_probs[0][:, None]
    return log_probs


@contextmanager
def _evaluated(model: Any) -> Iterator[None]:
    """Without dropout."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _plain_attention(model: Any) -> Iterator[None]:
    """transformers' own attention in all parts of the model."""
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
