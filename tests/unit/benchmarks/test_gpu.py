"""benchmarks/gpu.py: its arithmetic and its flags."""

from __future__ import annotations

import subprocess
import sys

import pytest
from places import REPO


@pytest.mark.parametrize("size", ["0.1B", "1B", "8B"])
def test_parameters_of_a_shape_are_those_of_the_model(size):
    import torch
    from gpu import RANK, SHAPES
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    shape = SHAPES[size]
    with torch.device("meta"):
        model = LlamaForCausalLM(shape.config())
    embedding = model.get_input_embeddings().weight.numel()
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    assert shape.parameters - embedding == shape.counted
    adapted = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))
    assert adapted.get_nb_trainable_parameters()[0] == shape.adapter


def test_flops_of_a_token():
    from gpu import SHAPES, Shape, flops_per_token

    tiny = Shape(layers=1, hidden=4, heads=2, kv_heads=1, intermediate=8, vocabulary=10, packs=1)
    weights = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 8  # q, k and v, o, three of the mlp
    norms, head = 3 * 4, 4 * 10
    assert tiny.counted == weights + norms + head
    assert flops_per_token(tiny, 0, lora=False) == 6 * tiny.counted
    assert flops_per_token(tiny, 0, lora=True) == 4 * tiny.counted + 6 * tiny.adapter
    # Attention: q k^T and its product with v, 2 h flops each for a key; three times for forward and backward.
    assert flops_per_token(tiny, 8, lora=False) - 6 * tiny.counted == 3 * 2 * 2 * 4 * 8 / 2
    assert 6.6 < flops_per_token(SHAPES["1B"], 4096, lora=False) / 1e9 < 7.5


def test_a_token_attends_to_its_own_document():
    from gpu import attended

    assert attended([5, 5]) == 5
    assert attended([1, 9]) == 8.2


def test_peak_is_found_by_the_device_name():
    from gpu import peak_flops

    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H20") is None
    assert peak_flops("NVIDIA A10") is None


def test_lora_is_used_where_full_training_does_not_fit():
    from gpu import SHAPES, needs_lora

    assert not needs_lora(SHAPES["1B"], 80 * 2**30)
    assert needs_lora(SHAPES["8B"], 80 * 2**30)
    with pytest.raises(ValueError, match="do not fit"):
        needs_lora(SHAPES["8B"], 16 * 2**30)


def test_gpu_benchmark_without_a_gpu_says_so():
    argv = [sys.executable, str(REPO / "benchmarks" / "gpu.py"), "--sizes", "0.1B"]
    environ = {"PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(argv, env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "no GPU found: nothing was measured\n"), done.stderr


@pytest.mark.parametrize(
    "argv", [["--dropped", "0"], ["--steps", "5", "--dropped", "5"], ["--attention", "none"]]
)
def test_gpu_benchmark_refuses_wrong_flags(argv):
    import gpu

    with pytest.raises(SystemExit, match="2"):
        gpu.parse(argv)
