"""torch.compile of the repeated layers: each kind of layer is compiled once, and the rest stays as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainers.config.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compile_layers(model: PreTrainedModel) -> None:
    """Compiles the layers when they are first called; the layers share what was compiled for one.

    In place, as accelerate does it for FSDP2 and DeepSpeed: accelerate's other way makes a new model, whose
    weights have other names, and compiles the embedding and the output too.

    Raises:
        ConfigError: the layers of the model cannot be told apart from the rest.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(f"torch_compile: no layers were found in {type(model).__name__}. Use false.")
    for layer in layers:
        layer.compile()
