"""A merged model is checked against its adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from inprocess import PEFT, build, logged, outputs

MERGES = {
    "lora": {"trainer": "sft"},
    "dora": {"trainer": "sft", "use_dora": True},
    "rslora": {"trainer": "sft", "use_rslora": True},
    "reward": {"trainer": "reward"},
    "dpo": {"trainer": "dpo"},
    "int4": {"trainer": "sft", "quantization": "int4"},
    "int4 twice": {"trainer": "sft", "quantization": "int4", "double_quantization": True},
    "int8": {"trainer": "sft", "quantization": "int8"},
    "int4 reward": {"trainer": "reward", "quantization": "int4"},
    "new tokens": {"trainer": "sft", "chat_template": "zephyr", "prompt_text_column": "prompt",
                   "text_column": "completion"},
}  # fmt: skip


def finish(tmp_path: Path, model: Path, **config):
    """Train and save, as a run does at its end. Return what was built, and the run's folder."""
    from trainers.loop import finish

    built = build(tmp_path, model, **{**PEFT, **config})
    logged(built)
    finish.save_final_model(built.trainer, built.context)
    return built, built.context.folder


def merge(built) -> None:
    from trainers.loop.finish import merge_saved
    from trainers.storage.ending import read_ending

    folder = built.context.folder
    merge_saved(built.context, read_ending(folder))
    ended = read_ending(folder)
    assert ended.why_damaged(folder) is None, "it lists the merged files"
    assert not any("adapter" in name for name in ended.names(folder))


@pytest.mark.parametrize("name", MERGES)
def test_a_merged_model_has_the_outputs_of_the_adapter(tmp_path, tiny_model, name, capsys):
    from trainers.data.preview import first_tokens
    from trainers.model.source import model_class

    built, folder = finish(tmp_path, tiny_model, **MERGES[name])
    ids = first_tokens(built.context.rows("train")[0])
    trained = outputs(built.trainer.model, ids)
    merge(built)
    assert not (folder / "adapter_config.json").exists() and not (folder / "merged.part").exists()
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config, "a merged model is an ordinary one"
    more = {"num_labels": 1} if "reward" in name else {}
    merged = model_class(built.context.config).from_pretrained(folder, dtype=torch.float32, **more)
    assert merged.get_input_embeddings().num_embeddings >= len(built.context.tokenizer)
    scale = trained.abs().max()
    # int8 also rounds the activations; the dequantised model does not.
    tolerance = 2e-2 if name == "int8" else 1e-3
    assert ((outputs(merged, ids) - trained).abs().max() / scale) < tolerance
    assert "merge: outputs differ by" in capsys.readouterr().out


def test_a_merge_that_changes_the_outputs_is_refused_and_the_adapter_is_kept(
    tmp_path, tiny_model, monkeypatch
):
    from peft import LoraModel

    from trainers.output.merge import MergeRefused

    built, folder = finish(tmp_path, tiny_model, trainer="sft")
    before = (folder / "adapter_model.safetensors").read_bytes()
    merge_and_unload = LoraModel.merge_and_unload

    def spoil(self, **kwargs):
        merged = merge_and_unload(self, **kwargs)
        with torch.no_grad():
            merged.get_output_embeddings().weight.mul_(1.5)
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", spoil)
    with pytest.raises(MergeRefused, match="It was not kept; the adapter is in the run's folder"):
        merge(built)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert not (folder / "model.safetensors").exists() and not (folder / "merged.part").exists()


@pytest.mark.parametrize("value", [8e36, float("nan"), float("inf")])
def test_an_adapter_with_an_absurd_weight_is_not_merged(tmp_path, tiny_model, value):
    """A model normalises what it computes, so the outputs before and after a merge may be equal."""
    from safetensors.torch import load_file, save_file

    from trainers.output.merge import MergeRefused

    built, folder = finish(tmp_path, tiny_model, trainer="sft")
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "lora_B" in name)
    weights[name].view(-1)[0] = value
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(MergeRefused, match=r"of the adapter has the value .*, so it is damaged"):
        merge(built)
    assert file.exists() and not (folder / "model.safetensors").exists()


def test_a_merge_that_stopped_after_its_files_were_listed_only_removes_the_adapter(
    tmp_path, tiny_model, monkeypatch
):
    from trainers.output import merge as module
    from trainers.storage.ending import read_ending

    built, folder = finish(tmp_path, tiny_model, trainer="sft")
    with monkeypatch.context() as patched:
        patched.setattr(module, "remove_adapter", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge(built)
    assert (folder / "adapter_config.json").exists() and read_ending(folder).why_damaged(folder) is None
    before = (folder / "model.safetensors").stat().st_mtime_ns
    merge(built)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert not list(folder.glob("adapter*"))
