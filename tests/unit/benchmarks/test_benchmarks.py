"""The benchmarks without a GPU and without a measurement: their arithmetic, random draws and arguments."""

from __future__ import annotations

import subprocess
import sys

import pytest
from places import REPO


@pytest.fixture(scope="module", autouse=True)
def path():
    """The benchmarks are scripts that import each other by name."""
    sys.path.insert(0, str(REPO / "benchmarks"))
    yield
    sys.path.remove(str(REPO / "benchmarks"))
    for name in ("gpu", "measure", "packing", "throughput"):
        sys.modules.pop(name, None)


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


def test_best_fit_decreasing():
    from throughput import packs_needed

    assert packs_needed([6, 5, 5, 4], 10) == 2
    assert packs_needed([7, 7, 6, 3], 10) == 3


def test_draw_fills_one_pack_for_each_rank():
    from throughput import draw, packs_needed

    lengths = [40, 70, 90, 110, 200, 330] * 20
    for ranks, batch in ((1, 1), (2, 2), (2, 64)):
        chosen = draw(lengths, ranks, 1024, batch, seed=1)
        assert len(chosen) % (ranks * min(batch, len(chosen) // ranks)) == 0
        assert packs_needed([lengths[number] for number in chosen], 1024) == ranks
    assert draw(lengths, 1, 1024, 1, seed=2) != draw(lengths, 1, 1024, 1, seed=3)
    with pytest.raises(ValueError, match="fewer than 1 rows"):
        draw([500], 1, 400, 1, seed=0)


def test_documents_are_joined_in_their_order():
    from throughput import documents

    data = [
        {"instruction": f"ask {n}", "input": "", "output": f"say {n}", "chosen": "yes", "rejected": "no"}
        for n in range(5)
    ]
    first, second = documents(data, "sft", joined=2)
    assert first["prompt"].index("say 0") < first["prompt"].index("ask 1")
    assert (first["completion"], second["completion"]) == ("say 1", "say 3")
    data[0]["rejected"] = "yes"
    assert len(documents(data, "dpo", joined=1)) == 4


def test_tokens_per_second_leaves_the_first_steps_out():
    from measure import Observed

    seen = Observed(ends=[10.0, 12.0, 16.0], tokens=[100, 300, 700], losses=[], memory=0, gpu_memory=None)
    assert seen.tokens_per_second(1) == 100
    assert seen.tokens_per_second(2) == 100
    assert seen.seconds_per_step(1) == 3


def test_a_kind_that_fails_is_not_tried_again():
    from measure import Failed, alternate

    def fails(repeat):
        raise Failed("Traceback\n[rank0]: RuntimeError: out of memory\nraise ChildFailedError: no")

    turns = []
    results, failed = alternate({"a": lambda n: turns.append(n) or n, "b": fails}, 2)
    assert (results, turns) == ({"a": [0, 1]}, [0, 1])
    assert failed["b"].reason == "[rank0]: RuntimeError: out of memory"
