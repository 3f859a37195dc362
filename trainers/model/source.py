"""Where a model comes from: the arguments for transformers, the class, and the config of the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.config.errors import ConfigError
from trainers.config.schema import TrainConfig
from trainers.model.trust import check_config, check_tokenizer, why_not_loaded

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
        ConfigError: it cannot be loaded, or needs code that the run's config does not allow.
    """
    from transformers import AutoConfig

    try:
        check_names(name, config)
        loaded: PreTrainedConfig = AutoConfig.from_pretrained(name, **source_arguments(name, config))
    except (OSError, ValueError) as error:
        raise ConfigError(f"base_model: {name} cannot be loaded: {why_not_loaded(error)}") from error
    return loaded


def model_folder(name: str, config: TrainConfig) -> Path:
    """Return the folder with the files of a loaded model, which may be in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return Path(name)
    found = try_to_load_from_cache(name, "config.json", revision=source_arguments(name, config)["revision"])
    assert isinstance(found, str)  # it is loaded already
    return Path(found).parent


def check_names(name: str, config: TrainConfig) -> None:
    """Check what the files of a model name. Call it before each load of its config or tokenizer.

    Raises:
        ConfigError: they name something that does not belong there, or that the run's config does not allow.
        OSError: the model has no config.json.
    """
    from transformers import PreTrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    place = {key: source_arguments(name, config)[key] for key in ("token", "revision")}
    check_config(name, PreTrainedConfig.get_config_dict(name, **place)[0], config.use_kernels)
    word = get_tokenizer_config(name, **place).get("tokenizer_class")
    if isinstance(word, str):
        check_tokenizer(name, word)
