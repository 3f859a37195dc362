"""Run torch.compile on the repeated layers. Each kind of layer is compiled once; the rest is not compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainers.config.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compile_layers(model: PreTrainedModel) -> None:
    """Compile the layers at their first call. Layers of one kind share the compiled code.

    The layers are compiled in place, as accelerate does for FSDP2 and DeepSpeed. accelerate's other method
    makes a new model, whose weights have other names, and compiles the embedding and the output too.

    Raises:
        ConfigError: the model has no layers that can be recognised.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"torch_compile: no layers were found in {type(model).__name__}. Set torch_compile: false."
        )
    for layer in layers:
        layer.compile()
