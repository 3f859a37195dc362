"""Real ZeRO checkpoints of two ranks become Hugging Face folders with the same values.

Under torchrun this file runs in the ranks, and writes every checkpoint that the tests read.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import HELPERS, REPO

# tests/faults/test_consolidated.py has runs of make test; here are DoRA, tied weights and every value.
pytestmark = pytest.mark.slow
# name -> ZeRO stage, whether only LoRA's weights are trained, whether embedding and output layer are tied,
# whether a layer is frozen.
CELLS = {
    "zero1-lora": (1, True, False, False),
    "zero2": (2, False, True, True),
    "zero3": (3, False, False, True),
    "zero3-lora": (3, True, False, False),
}


def write_checkpoint(base: Path, folder: Path, stage: int, lora: bool, tied: bool, frozen: bool) -> None:
    """Train one step in a rank, then write DeepSpeed's checkpoint and, in a file next to it, the weights."""
    import deepspeed
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(AutoConfig.from_pretrained(base, tie_word_embeddings=tied))
    model.model.layers[0].requires_grad_(not frozen)
    config = model.config
    config.architectures = ["LlamaForCausalLM"]
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", use_dora=stage == 1))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's: DeepSpeed would compile its Adam for a minute
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(trained, lr=1e-2), config=settings
    )
    ids = torch.arange(8).view(1, 8) + torch.distributed.get_rank()
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    engine.save_checkpoint(str(folder), exclude_frozen_parameters=lora)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        weights = {name: value.detach().float().clone() for name, value in model.state_dict().items()}
    if torch.distributed.get_rank() == 0:
        torch.save(weights, folder.with_suffix(".pt"))
        config.save_pretrained(folder)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
        if lora:
            model.peft_config["default"].save_pretrained(folder)


@pytest.fixture(scope="module")
def written(bench, tmp_path_factory) -> Path:
    """The folder with a checkpoint for each cell, which two ranks write."""
    folder = tmp_path_factory.mktemp("zero")
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = {
        "PYTHONPATH": str(HELPERS),
        "DS_ACCELERATOR": "cpu",
    }
    done = subprocess.run(
        [*ranks, __file__, str(bench.model), str(folder)],
        env=bench.environ | paths,
        cwd=REPO,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("name", CELLS)
def test_a_zero_checkpoint_becomes_a_hugging_face_folder(written, bench, tmp_path, name):
    """The command runs in its own process, which may load only weights."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    command = [sys.executable, "-m", "trainers.consolidate", str(written / name), str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--max-shard-size", "200KB"], env=bench.environ, cwd=REPO, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"consolidated: {tmp_path / 'out'} (")
    expected = torch.load(written / f"{name}.pt", weights_only=True)
    if CELLS[name][1]:
        base = AutoModelForCausalLM.from_pretrained(bench.model)
        found = PeftModel.from_pretrained(base, tmp_path / "out").state_dict()
        expected = {key: value for key, value in expected.items() if "lora_" in key}
        assert len(expected) >= 28
    else:
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
        assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
        assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


if __name__ == "__main__":
    import deepspeed

    deepspeed.init_distributed("gloo")
    for name, cell in CELLS.items():
        write_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]) / name, *cell)
    torch.distributed.destroy_process_group()
    sys.exit()
