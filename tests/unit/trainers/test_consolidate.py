"""The shards of a checkpoint become an ordinary folder: all values, little memory, complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shards import checkpoint_of, plant_code, shard
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from trainers import consolidate as module
from trainers.consolidate import consolidate, main

TINY = 100_000  # bytes; the tiny model has 492,000
pytestmark = pytest.mark.usefixtures("own_process")


def adapter_of(folder: Path, tiny: Path, **lora) -> tuple[Path, object]:
    """Return a LoRA checkpoint, which has only the trained weights, and the model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    reward = lora.get("task_type") == "SEQ_CLS"
    kind = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    base = kind.from_pretrained(tiny, **({"num_labels": 1} if reward else {}))
    if lora.pop("tied", False):
        base.config.tie_word_embeddings = True
        base.lm_head.weight = base.model.embed_tokens.weight
    base.config.architectures = [type(base).__name__]
    base.config.save_pretrained(folder)
    model = get_peft_model(base, LoraConfig(r=4, **{"target_modules": "all-linear", **lora}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.peft_config["default"].save_pretrained(folder)
    return shard(folder, model, only_trained=True), model


def test_every_weight_is_written_to_several_files(tmp_path, tiny_model, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, model = checkpoint_of(tmp_path / "checkpoint-3", tiny_model)
    (tmp_path / "out").mkdir()  # it may exist if it is empty
    assert main([str(folder), str(tmp_path / "out"), "--max-shard-size", "100KB"]) == 0
    out = tmp_path / "out"
    files = list(out.glob("model-*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(files) > 3 and set(index["weight_map"]) == set(model.state_dict())
    again = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    assert len(AutoTokenizer.from_pretrained(out)) == model.config.vocab_size
    assert not {"manifest.json", "trainer_state.json"} & {path.name for path in out.iterdir()}
    size = sum(path.stat().st_size for path in files)
    assert capsys.readouterr().out == f"consolidated: {out} (21 tensors, {size} bytes)\n"
    assert not (tmp_path / "out.part").exists()


def test_no_output_is_written_to_a_place_of_a_run(tmp_path, tiny_model, capsys):
    folder, _ = checkpoint_of(tmp_path / "checkpoint-3", tiny_model)
    assert main([str(folder), str(tmp_path / "launch" / "x")]) == 2
    assert f"{tmp_path / 'launch' / 'x'} belongs to the run in {tmp_path}" in capsys.readouterr().err
    assert not (tmp_path / "launch").exists()


def test_a_tied_weight_is_written_once_under_any_stored_name(tmp_path, tiny_model):
    from transformers import AutoModelForCausalLM

    folder, model = checkpoint_of(tmp_path / "checkpoint-3", tiny_model, tie_word_embeddings=True)
    for kept in (("model.embed_tokens.weight", "lm_head.weight"), ("lm_head.weight",)):
        state = model.state_dict()
        for name in {"model.embed_tokens.weight", "lm_head.weight"} - {*kept}:
            del state[name]
        shutil.rmtree(folder / "shards")
        save({"model": state}, storage_writer=FileSystemWriter(folder / "shards"), no_dist=True)
        out = tmp_path / f"out-{len(kept)}"
        assert consolidate(folder, out).tensors == 20
        again = AutoModelForCausalLM.from_pretrained(out)
        assert again.lm_head.weight is again.model.embed_tokens.weight
        assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


def test_weights_are_cast_to_the_half_precision_of_the_config(tmp_path, tiny_model):
    folder, model = checkpoint_of(tmp_path / "checkpoint-3", tiny_model)
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    consolidate(folder, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[n], value.bfloat16()) for n, value in model.state_dict().items())


def test_a_masked_language_model_keeps_its_class(tmp_path, tiny_masked_model):
    from transformers import AutoModelForMaskedLM

    folder = tmp_path / "checkpoint-3"
    shutil.copytree(tiny_masked_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model = AutoModelForMaskedLM.from_pretrained(tiny_masked_model)
    consolidate(shard(folder, model), tmp_path / "out", TINY)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_experts_that_are_joined_in_memory_are_written_separately(tmp_path, tiny_model):
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path / "checkpoint-3"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_local_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=384, **small, **heads))
    model.config.architectures = ["MixtralForCausalLM"]
    model.config.save_pretrained(folder)
    consolidate(shard(folder, model), tmp_path / "out", TINY)
    model.save_pretrained(tmp_path / "ordinary")
    ordinary = load_file(tmp_path / "ordinary" / "model.safetensors")
    written = {n: v for f in (tmp_path / "out").glob("*.safetensors") for n, v in load_file(f).items()}
    assert written.keys() == ordinary.keys()
    assert all(torch.equal(written[name], value) for name, value in ordinary.items())


LORA = {
    "plain": {},
    "dora": {"use_dora": True},
    "reward": {"task_type": "SEQ_CLS"},
    "module": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 5]}},
    "tied tokens": {"trainable_token_indices": [3, 5], "tied": True},
    "tied": {"tied": True},
}


@pytest.mark.parametrize("name", LORA)
def test_an_adapter_equals_what_peft_saves(tmp_path, tiny_model, name):
    folder, model = adapter_of(tmp_path / "checkpoint-3", tiny_model, **LORA[name])
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    consolidate(folder, tmp_path / "out", TINY)
    expected = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], value) for key, value in expected.items())
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_adapter_opens_with_peft(tmp_path, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, model = adapter_of(tmp_path / "checkpoint-3", tiny_model)
    consolidate(folder, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    again = PeftModel.from_pretrained(base, tmp_path / "out").state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_ordinary_files_are_copied(tmp_path, tiny_model):
    shutil.copytree(tiny_model, tmp_path / "checkpoint-3")
    consolidate(tmp_path / "checkpoint-3", tmp_path / "out")
    written, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", tiny_model))
    assert written.keys() == original.keys() and all(torch.equal(written[n], original[n]) for n in original)


def test_memory_holds_one_file_of_the_output(tmp_path, tiny_model, monkeypatch):
    """The test counts the allocated bytes at each allocation."""
    import weakref

    live: dict[int, int] = {}
    most = 0
    allocate = module._allocate

    def counted(like):
        nonlocal most
        tensor = allocate(like)
        key = id(tensor)
        live[key] = tensor.nbytes
        weakref.finalize(tensor, live.pop, key)
        most = max(most, sum(live.values()))
        return tensor

    monkeypatch.setattr(module, "_allocate", counted)
    folder, _ = checkpoint_of(tmp_path / "checkpoint-3", tiny_model)
    made = consolidate(folder, tmp_path / "out", TINY)
    assert 0 < most <= TINY < made.bytes / 4
    assert not live


def refused(capsys, *argv) -> str:
    """Run a command that must end with exit code 2 and write nothing, and return its error."""
    out = Path(argv[1])
    before = sorted(out.parent.rglob("*"))
    assert main([str(word) for word in argv]) == 2
    assert sorted(out.parent.rglob("*")) == before
    text = capsys.readouterr().err.splitlines()[-1]
    assert text.startswith("error: ")
    return text


def test_an_output_that_is_not_empty_is_refused(tmp_path, tiny_model, capsys):
    folder, _ = checkpoint_of(tmp_path / "checkpoint-3", tiny_model)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    assert "not empty" in refused(capsys, folder, tmp_path / "out")


@pytest.mark.parametrize("cut", [False, True])
def test_a_missing_or_truncated_shard_is_named(tmp_path, tiny_model, capsys, cut):
    folder, _ = checkpoint_of(tmp_path / "checkpoint-3", tiny_model)
    path = next((folder / "shards").glob("*.distcp"))
    if cut:
        os.truncate(path, path.stat().st_size - 1000)
    else:
        path.unlink()
    assert path.name in refused(capsys, folder, tmp_path / "out")


def test_a_damaged_shard_is_an_error_of_one_line(tmp_path, tiny_model, capsys):
    folder, _ = checkpoint_of(tmp_path / "checkpoint-3", tiny_model)
    path = next((folder / "shards").glob("*.distcp"))
    path.write_bytes(bytes(path.stat().st_size))
    assert "cannot be read" in refused(capsys, folder, tmp_path / "out")


def test_a_checkpoint_without_weights_is_refused(tmp_path, tiny_model, capsys):
    folder, _ = checkpoint_of(tmp_path / "checkpoint-3", tiny_model)
    shutil.rmtree(folder / "shards")
    assert "no weights" in refused(capsys, folder, tmp_path / "out")
    (folder / "config.json").unlink()
    assert "config.json is missing" in refused(capsys, folder, tmp_path / "out")
    assert "is not a folder" in refused(capsys, tmp_path / "nothing", tmp_path / "out")


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path, tiny_model, capsys):
    from transformers import LlamaConfig

    folder, _ = checkpoint_of(tmp_path / "checkpoint-3", tiny_model)
    config = LlamaConfig.from_pretrained(folder, num_hidden_layers=3, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    assert "lacks model.layers.2" in refused(capsys, folder, tmp_path / "out")


def test_too_little_disk_space_is_an_error_before_the_start(tmp_path, tiny_model, monkeypatch, capsys):
    folder, _ = checkpoint_of(tmp_path / "checkpoint-3", tiny_model)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage(10, 9, 1))
    assert "free" in refused(capsys, folder, tmp_path / "out")


def test_a_failure_leaves_no_files(tmp_path, tiny_model, monkeypatch):
    folder, _ = checkpoint_of(tmp_path / "checkpoint-3", tiny_model)

    def broken(_):
        raise RuntimeError("broken")

    monkeypatch.setattr(module, "check_saved", broken)
    assert main([str(folder), str(tmp_path / "out")]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_an_index_with_code_is_refused(tmp_path, tiny_model, capsys):
    folder, _ = checkpoint_of(tmp_path / "checkpoint-3", tiny_model)
    mark = tmp_path / "ran"
    plant_code(folder / "shards", mark)
    assert ".system, which an index" in refused(capsys, folder, tmp_path / "out")
    assert not mark.exists()
