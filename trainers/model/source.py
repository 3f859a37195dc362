"""Where a model comes from: the arguments for transformers, the class, and the config of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainers.config.errors import ConfigError
from trainers.config.schema import TrainConfig
from trainers.config.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def source_arguments(model: str, config: TrainConfig) -> dict[str, Any]:
    """Return the arguments of from_pretrained. revision and trust_remote_code are only for base_model."""
    own = model == config.model
    return {
        "token": config.token,
        "revision": config.revision if own and config.revision else "main",
        "trust_remote_code": config.trust_remote_code and own,
    }


def model_class(config: TrainConfig) -> Any:
    """Return the auto class of transformers that loads the model of a trainer."""
    import transformers

    return getattr(transformers, config.kind.auto_class)


def model_config(name: str, config: TrainConfig) -> PreTrainedConfig:
    """Return the config of a model, without its weights.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from transformers import AutoConfig

    try:
        loaded: PreTrainedConfig = AutoConfig.from_pretrained(name, **source_arguments(name, config))
    except (OSError, ValueError) as error:
        raise ConfigError(f"base_model: {name} cannot be loaded: {first_line(error)}") from error
    return loaded
