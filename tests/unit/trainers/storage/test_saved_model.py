"""The check of the files of a final model."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from trainers.storage.saved_model import check_saved


def test_a_saved_model_and_a_saved_adapter_pass_the_check(saved_adapter):
    check_saved(saved_adapter)
    (saved_adapter / "adapter_config.json").unlink()
    (saved_adapter / "adapter_model.safetensors").rename(saved_adapter / "model.safetensors")
    (saved_adapter / "config.json").write_text("{}")
    check_saved(saved_adapter)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", None),
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("model.safetensors", None),
        ("model.safetensors", b""),
        ("model.safetensors", "cut"),
        ("model.safetensors", "longer"),
        ("tokenizer_config.json", None),
        ("tokenizer.json", None),
        ("tokenizer.json", b'{"model"'),
        ("extra.safetensors", b"xxxx"),
    ],
)
def test_a_broken_file_is_named(saved_run, name, content):
    path = saved_run / name
    if content is None:
        path.unlink()
    elif content == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    elif content == "longer":
        path.write_bytes(path.read_bytes() + b"more")
    else:
        path.write_bytes(content)
    with pytest.raises(RuntimeError, match="the saved model is broken") as raised:
        check_saved(saved_run)
    assert (str(saved_run) if name == "tokenizer.json" and content is None else name) in str(raised.value)


def write_weights(path: Path, **shapes: list[int]) -> None:
    """Write a weight file of float32 zeros."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def test_the_files_and_tensors_of_an_index_must_exist(saved_run):
    (saved_run / "model.safetensors").unlink()
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index = {"weight_map": {"a": first, "b": second}}
    (saved_run / "model.safetensors.index.json").write_text(json.dumps(index))
    write_weights(saved_run / first, a=[2])
    with pytest.raises(RuntimeError, match=f"{second} is missing"):
        check_saved(saved_run)
    write_weights(saved_run / second, c=[2])
    with pytest.raises(RuntimeError, match=f"{second} lacks b"):
        check_saved(saved_run)
    write_weights(saved_run / second, b=[2])
    check_saved(saved_run)


@pytest.mark.parametrize(("shapes", "words"), [({}, "no tensor"), ({"a": [2], "b": [0]}, "b has no values")])
def test_weights_that_were_not_gathered_fail_the_check(saved_run, shapes, words):
    write_weights(saved_run / "model.safetensors", **shapes)
    with pytest.raises(RuntimeError, match=words):
        check_saved(saved_run)
