"""Where a model comes from: how transformers is asked for it, its class, and its shape."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainers.config.errors import ConfigError, first_line
from trainers.config.schema import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def source_arguments(model: str, config: TrainConfig) -> dict[str, Any]:
    """How a model is asked for: revision and remote code are said of base_model alone."""
    own = model == config.model
    return {
        "token": config.token,
        "revision": config.revision if own and config.revision else "main",
        "trust_remote_code": config.trust_remote_code and own,
    }


def model_class(config: TrainConfig) -> Any:
    """The auto class of transformers that a trainer's model is loaded with."""
    import transformers

    return getattr(transformers, config.kind.auto_class)


def model_config(name: str, config: TrainConfig) -> PreTrainedConfig:
    """The shape of a model, without its weights.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from transformers import AutoConfig

    try:
        loaded: PreTrainedConfig = AutoConfig.from_pretrained(name, **source_arguments(name, config))
    except (OSError, ValueError) as error:
        raise ConfigError(f"base_model: {name} cannot be loaded: {first_line(error)}") from error
    return loaded
