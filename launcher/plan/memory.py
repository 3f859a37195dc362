"""Predict memory: the number of parameters from the headers of the weight files, times bytes per parameter.

These are predictions, not measurements.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

from trainers.config.errors import ConfigError
from trainers.config.hub_paths import hub_cache
from trainers.config.json_text import parse_json
from trainers.config.schema import TrainConfig
from trainers.storage.sizes import ADAM_BYTES, FLOAT32_BYTES

MAX_HEADER = 100_000_000  # bytes; safetensors has the same limit
TRAINED_BYTES = 2 * FLOAT32_BYTES + ADAM_BYTES  # weight, gradient, moments


def model_folder(model: str) -> Path | None:
    """Return the folder of a local model, or of a hub id that is in the hub cache already; else None."""
    if Path(model).is_dir():
        return Path(model)
    cache = hub_cache() / f"models--{model.replace('/', '--')}"
    snapshots = sorted((cache / "snapshots").glob("*/config.json"))
    return snapshots[-1].parent if snapshots else None


def size_of_model(model: str) -> int | None:
    """Return the number of parameters of a model, or None if its files are not on this machine.

    Raises:
        ConfigError: the weights cannot be read.
    """
    folder = model_folder(model)
    if folder is None:
        return None
    files = list(folder.glob("*.safetensors"))
    if files:
        return sum(_safetensors_size(file) for file in files)
    # .bin files have no header that can be read without unpickling. At two bytes per parameter the number
    # is too high for float32 weights, which is the safe side.
    pickled = list(folder.glob("pytorch_model*.bin"))
    return sum(file.stat().st_size for file in pickled) // 2 or None


def _safetensors_size(file: Path) -> int:
    """Return the number of parameters from the header.

    The header is 8 bytes of length, then JSON (safetensors' format page).
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > MAX_HEADER:
                raise ValueError("the header is too long")
            header = parse_json(stream.read(length))
    except (struct.error, ValueError):
        raise ConfigError(
            f"base_model: {file} is not a safetensors file (perhaps a Git LFS pointer). Download it again."
        ) from None
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def predict_bytes_per_rank(parameters: int, config: TrainConfig) -> int:
    """Return the predicted bytes of an unsharded rank: weights, gradients and optimiser state.

    Activations are not counted.
    """
    if not config.peft:
        reference = parameters * FLOAT32_BYTES if _holds_reference(config) else 0
        return parameters * TRAINED_BYTES + reference
    base = {"int4": 0.6, "int8": 1.1}.get(config.quantization or "", 2.0 if config.mixed_precision else 4.0)
    # LoRA on all linear layers trains about r * 2 / hidden of the weights. 2 % is more than r = 64 needs.
    models = 2 if _holds_reference(config) else 1
    return int(parameters * (models * base + 0.02 * TRAINED_BYTES))


def predict_disk(parameters: int, config: TrainConfig) -> tuple[int, int]:
    """Return lower bounds for the bytes of a checkpoint (0 if none is saved) and of the final model.

    Counted are float32 weights and, in a checkpoint, Adam's two moments, but not the state of other
    optimisers. An adapter is assumed to have 0.2 % of the weights.
    """
    trained = 0.002 * parameters if config.peft else parameters
    moments = (
        ADAM_BYTES if config.optimizer in ("adamw_torch", "adamw_torch_fused", "adamw_apex_fused") else 0
    )
    saves = config.save_strategy != "no" or config.save_minutes is not None
    return int(trained * (FLOAT32_BYTES + moments)) if saves else 0, int(trained * FLOAT32_BYTES)


def predict_merged(parameters: int, config: TrainConfig) -> int:
    """Return the bytes of a merged model: it has the dtype of the matrix products."""
    return parameters * (FLOAT32_BYTES // 2 if config.mixed_precision else FLOAT32_BYTES)


def _holds_reference(config: TrainConfig) -> bool:
    """Whether a second, frozen model stays in memory. With an adapter, the base model is the reference."""
    kept = config.kind.reference and not config.precompute_ref_log_probs
    return kept and (config.model_ref is not None or not config.peft)
