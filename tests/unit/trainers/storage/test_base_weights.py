"""The key of a model's weights: the same for the same content wherever it is, another for any other model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from trainers.storage.base_weights import SAMPLE_BYTES, SAMPLES, weight_files, weights_key


def model(folder: Path, seed: int = 0, values: int = 1000, name: str = "a", **config: object) -> Path:
    folder.mkdir(parents=True)
    weights = np.random.default_rng(seed).standard_normal(values).astype("float32")
    save_file({name: weights}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, **config}))
    return folder


def test_a_copy_has_the_same_key(tmp_path):
    key = weights_key(model(tmp_path / "a", _name_or_path="a", transformers_version="5.0"))
    copy = model(tmp_path / "b", _name_or_path="b", transformers_version="5.1")
    (copy / "training_args.bin").write_bytes(b"not a weight")
    assert weights_key(copy) == key


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"name": "b"}, {"values": 1001}, {"hidden_size": 9}], ids=str
)
def test_another_model_has_another_key(tmp_path, change):
    assert weights_key(model(tmp_path / "a")) != weights_key(model(tmp_path / "b", **change))


def test_of_a_small_file_each_bit_counts(tmp_path):
    folder = model(tmp_path / "a")
    file, key = folder / "model.safetensors", weights_key(folder)
    content = file.read_bytes()
    for place in range(0, len(content), 251):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert weights_key(folder) != key, place


def test_a_large_file_is_sampled_and_not_read_completely(tmp_path, monkeypatch):
    folder = model(tmp_path / "a", values=SAMPLES * SAMPLE_BYTES)
    file, key = folder / "model.safetensors", weights_key(folder)
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1  # the end is in a sample
    file.write_bytes(content)
    assert weights_key(folder) != key
    retrained = model(tmp_path / "b", values=SAMPLES * SAMPLE_BYTES, seed=1)
    assert weights_key(retrained) != key
    read = []
    opened = Path.open

    class Counted:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def seek(self, place):
            self.file.seek(place)

        def read(self, size):
            read.append(size)
            return self.file.read(size)

    monkeypatch.setattr(Path, "open", lambda self, mode="r", **named: (
        Counted(opened(self, mode)) if mode == "rb" else opened(self, mode, **named)
    ))  # fmt: skip
    weights_key(folder)
    assert sum(read) < 2 * SAMPLES * SAMPLE_BYTES < len(content)


def test_the_files_are_those_that_are_loaded(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("b.safetensors", "consolidated.safetensors", "a.safetensors", "pytorch_model.bin"):
        (folder / name).write_bytes(b"")
    index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [path.name for path in weight_files(folder)] == ["a.safetensors", "b.safetensors"]
    (folder / "model.safetensors.index.json").unlink()
    assert [path.name for path in weight_files(folder)] == ["pytorch_model.bin"]
    (folder / "pytorch_model.bin").unlink()
    assert [path.name for path in weight_files(folder)] == [
        "a.safetensors", "b.safetensors", "consolidated.safetensors",
    ]  # fmt: skip
