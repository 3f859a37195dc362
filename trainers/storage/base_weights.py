"""A key of a model's weights, to notice that they are not the same any more. Does not import torch.

It is a hash of the config, and of the name, size and header of each weight file with samples of its data. So
it costs a few milliseconds, also for a large model, and is the same wherever the files are. A file of up to
SAMPLES * SAMPLE_BYTES is read completely. Of a larger one a change of a few weights may be missed, but not a
fine-tuned, converted or other model.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import xxhash

from trainers.config.json_text import parse_json

SAMPLES, SAMPLE_BYTES = 256, 4096  # of each file, at equal distances
MAX_HEADER = 100_000_000  # bytes; safetensors has the same limit
UNRELATED = ("_name_or_path", "transformers_version")  # keys of config.json that do not change the model


def weights_key(folder: Path) -> str:
    """Return the key of the model in a folder (128 bits, in hex).

    Raises:
        OSError: a file cannot be read.
    """
    digest = xxhash.xxh3_128()
    config = _read_json(folder / "config.json")
    described = {name: value for name, value in config.items() if name not in UNRELATED}
    digest.update(json.dumps(described, sort_keys=True).encode())
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(f"\n{path.name} {size}\n".encode())
        _add_samples(digest, path, size)
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers loads: one file, or those of an index; safetensors come first."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            placed: dict[str, str] = _read_json(index).get("weight_map", {})
            return [folder / part for part in sorted(set(placed.values()))]
    return sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin")))


def _add_samples(digest: Any, path: Path, size: int) -> None:
    """Hash the header of a safetensors file, and samples of the file."""
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
            digest.update(file.read(min(length, MAX_HEADER)))
        distance = max(SAMPLE_BYTES, size // SAMPLES)
        for start in range(0, size, distance):
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
        file.seek(max(size - SAMPLE_BYTES, 0))
        digest.update(file.read(SAMPLE_BYTES))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
