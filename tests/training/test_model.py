"""The model that a run builds and saves: vocabulary, padding, quantisation, LoRA, and a checked merge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from inprocess import build, logged, settings_of
from tiny import build_tiny_model

from trainers.config.errors import ConfigError

PEFT = {"peft": True, "quantization": None, "lora_r": 4, "max_steps": 3, "lr": 1e-2}
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
    from trainers.data.preview import first_tokens
    from trainers.output.merge import merge_adapter

    context = built.context
    merge_adapter(context.config, context.folder, context.tokenizer, first_tokens(context.rows("train")[0]))


def outputs(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits


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


@pytest.mark.parametrize("trainer", ["default", "sft", "dpo", "orpo", "kto", "reward"])
def test_new_tokens_are_trained_in_the_embedding_and_in_the_output(tmp_path, tiny_model, trainer):
    """The output of this model is not tied to its embedding. The frozen reference must not change."""
    asked = (
        {"prompt_text_column": "prompt", "text_column": "completion"} if trainer in ("default", "sft") else {}
    )
    built = build(tmp_path, tiny_model, trainer=trainer, chat_template="phi3", **PEFT, **asked)
    model = built.trainer.model
    rows = {name: p for name, p in model.named_parameters() if p.requires_grad and "trainable_tokens" in name}
    assert {name.split(".token_adapter")[0].rpartition(".")[2] for name in rows} == (
        {"embed_tokens"} if trainer == "reward" else {"embed_tokens", "lm_head"}
    )
    before = {name: p.detach().clone() for name, p in rows.items()}
    assert {p.shape[0] for p in before.values()} == {4}
    first = logged(built)[0]["loss"]
    assert first == pytest.approx({"dpo": 0.6931, "kto": 0.5}.get(trainer, first), abs=1e-3)
    for name, p in rows.items():
        assert not torch.equal(p, before[name]), name
    if trainer in ("dpo", "kto"):
        ids = built.context.rows("train")[0]["prompt_ids"]
        with model.disable_adapter():
            as_it_was = outputs(model, ids)
        fresh = build(tmp_path, tiny_model, trainer=trainer, chat_template="phi3", **PEFT).trainer.model
        with fresh.disable_adapter():
            torch.testing.assert_close(as_it_was, outputs(fresh, ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("trainer", ["dpo", "kto"])
def test_policy_and_reference_have_the_same_embeddings_of_new_tokens(tmp_path, tiny_model, trainer):
    built = build(tmp_path, tiny_model, trainer=trainer, chat_template="zephyr")
    policy, reference = built.trainer.model, built.trainer.ref_model
    assert len(built.context.new_tokens) == 3
    for one, other in zip(policy.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)
    assert logged(built)[0]["loss"] == pytest.approx({"dpo": 0.6931, "kto": 0.5}[trainer], abs=1e-3)


def test_model_ref_is_used_with_an_adapter_too(tmp_path, tiny_model, tmp_path_factory):
    """AutoTrain sets it to None in this case, without a message."""
    other = build_tiny_model(tmp_path_factory.mktemp("other") / "model", seed=1)
    built = build(tmp_path, tiny_model, trainer="dpo", model_ref=str(other), **(PEFT | {"max_steps": 1}))
    assert logged(built)[0]["loss"] != pytest.approx(0.6931, abs=1e-3)


def test_the_head_of_a_reward_model_depends_only_on_the_seed(tmp_path, tiny_model):
    heads = []
    for seed, noise in ((1, 5), (1, 6), (2, 5)):
        torch.manual_seed(noise)
        heads.append(build(tmp_path, tiny_model, trainer="reward", seed=seed).trainer.model.score.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_a_reward_model_that_has_its_head_keeps_it(tmp_path, tiny_model):
    built = build(tmp_path, tiny_model, trainer="reward")
    with torch.no_grad():
        built.trainer.model.score.weight.fill_(0.5)
    built.trainer.model.save_pretrained(tmp_path / "classifier")
    built.context.tokenizer.save_pretrained(tmp_path / "classifier")
    again = build(tmp_path, tmp_path / "classifier", trainer="reward", seed=7)
    assert torch.all(again.trainer.model.score.weight == 0.5)


@pytest.mark.parametrize(
    ("targets", "trained"),
    [
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("q_proj,v_proj", {"q_proj", "v_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (r".*\.layers\.1\..*(q|k)_proj", {"q_proj", "k_proj"}),
    ],
)
def test_target_modules_are_all_linear_a_list_or_a_regular_expression(tmp_path, tiny_model, targets, trained):
    built = build(tmp_path, tiny_model, trainer="sft", target_modules=targets, **PEFT)
    names = {name for name, p in built.trainer.model.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == trained
    if "layers" in targets:
        assert all(".layers.1." in name for name in names)


@pytest.mark.parametrize("quantization", [None, "int4", "int8"])
def test_trained_weights_are_float32(tmp_path, tiny_model, quantization):
    config = {**PEFT, "quantization": quantization}
    model = build(tmp_path, tiny_model, trainer="sft", **config).trainer.model
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_int4_is_nf4_stored_in_the_compute_type():
    from trainers.model.quantization import quantization_config

    for name, dtype in ((None, torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        config = settings_of(trainer="sft", peft=True, quantization="int4", mixed_precision=name).train
        found = quantization_config(config)
        assert (found.bnb_4bit_quant_type, found.bnb_4bit_compute_dtype) == ("nf4", dtype)
        assert found.bnb_4bit_quant_storage == dtype, "otherwise FSDP cannot shard it"


def test_padding_is_not_the_token_that_ends_an_answer(tmp_path, tiny_model):
    from transformers import AutoTokenizer

    from trainers.model.tokenizer import load_tokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    found, gained = load_tokenizer(settings_of(trainer="sft", model=str(tmp_path / "tokenizer")).train)
    assert found.pad_token == "<pad>" != found.eos_token
    assert gained == [] and len(found) == len(tokenizer), "no token is added for it"


@pytest.mark.parametrize(
    ("trainer", "targets", "words"),
    [
        ("sft", "q_prok,v_proj", "q_prok matches no module of .* q_proj"),
        ("sft", r".*\.layers\.9\..*", "matches no module"),
        ("dpo", ".*", r"it matches lm_head\. The loss of dpo reads its weight without the adapter"),
    ],
)
def test_target_modules_that_do_not_exist_or_would_not_train_are_refused(
    tmp_path, tiny_model, trainer, targets, words
):
    with pytest.raises(ConfigError, match=words):
        build(tmp_path, tiny_model, trainer=trainer, target_modules=targets, **PEFT)


def test_preparing_rows_leaves_no_truncation_in_the_saved_tokenizer(tmp_path, tiny_masked_model):
    for _ in ("empty cache", "full cache"):
        built = build(tmp_path, tiny_masked_model, trainer="mlm", block_size=32)
        built.context.tokenizer.save_pretrained(tmp_path / "saved")
        saved = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
        assert saved["truncation"] is None and saved["padding"] is None
