"""Merge a LoRA adapter into its base model: on rank 0, once, and only if the outputs stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.config.schema import TrainConfig
from trainers.model.load import fit_vocabulary
from trainers.model.quantization import compute_dtype, keep_layout, quantization_config
from trainers.model.source import model_class, model_config, source_arguments
from trainers.rank.say import say
from trainers.storage import run_files
from trainers.storage.manifest import FileEntry, entry_of
from trainers.storage.saved_model import ADAPTER

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# The largest difference of an output, as a share of the largest output. A merged weight is rounded to the
# dtype that it is saved in: float32 keeps 24 bits, float16 11, bfloat16 8.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
# LLM.int8 also rounds the activations to 8 bits (arXiv 2208.07339); a merged model does not.
INT8_TOLERANCE = 5e-2
ABSURD = 1e5  # no trained weight of an adapter is as large
PROBE_TOKENS = 128
ADAPTER_FILES = (ADAPTER, "adapter_model.safetensors")
MERGED = "merged.part"  # in the run's folder, until it is known to be right


class MergeRefused(RuntimeError):
    """The outputs of the merged model differ from those of the adapter, so the adapter is kept."""


def merge_adapter(
    config: TrainConfig, folder: Path, tokenizer: PreTrainedTokenizerBase, probe: list[int]
) -> list[FileEntry]:
    """Write the full model next to the adapter in `folder`, from the saved files. Return the new files.

    The base of a quantised run is quantised again and then dequantised, because the adapter has learnt to
    correct its rounding. The merged model is written to a folder of its own, loaded again, and compared on
    the tokens of `probe`.

    Raises:
        MergeRefused: the outputs differ by more than the rounding of the saved type; the adapter is kept.
    """
    try:
        part = run_files.fresh_folder(folder, MERGED)
        _merge(config, folder, part, tokenizer, probe)
        files = [entry_of(part, path) for path in sorted(part.rglob("*")) if path.is_file()]
        run_files.move_in(folder, MERGED)
    finally:
        run_files.remove(folder, MERGED)
    return files


def remove_adapter(folder: Path) -> None:
    """Remove the adapter of a run, its config before its weights: AutoTrain leaves only the merged model."""
    for name in ADAPTER_FILES:
        run_files.remove(folder, name)


def _merge(
    config: TrainConfig, folder: Path, part: Path, tokenizer: PreTrainedTokenizerBase, probe: list[int]
) -> None:
    """Write the merged model to `part`, and check it."""
    import torch
    from peft import PeftModel

    ids = torch.tensor([probe[:PROBE_TOKENS]])
    base = _base(config, tokenizer)
    adapted = PeftModel.from_pretrained(base, folder).eval()
    _refuse_absurd(adapted)
    expected = _outputs(adapted, ids)
    if config.quantization is not None:
        adapted.unload()
        base = base.dequantize().to(compute_dtype(config))
        adapted = PeftModel.from_pretrained(base, folder).eval()
    merged = adapted.merge_and_unload(safe_merge=True)
    merged.save_pretrained(part)
    dtype = str(compute_dtype(config)).removeprefix("torch.")
    del base, adapted, merged
    kwargs = {"trust_remote_code": config.trust_remote_code, "attn_implementation": None}
    reopened = model_class(config).from_pretrained(part, dtype=compute_dtype(config), **kwargs).eval()
    tolerance = max(TOLERANCE[dtype], INT8_TOLERANCE if config.quantization == "int8" else 0.0)
    _compare(expected, _outputs(reopened, ids), tolerance)


def _base(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Load the base model as it was in training."""
    model_config(config.model, config)  # checks what its config.json names
    kwargs: dict[str, Any] = {
        "dtype": compute_dtype(config),
        "attn_implementation": None,  # that of transformers for this model, not one that config.json names
        **source_arguments(config.model, config),
    }
    if config.kind.scores:
        kwargs["num_labels"] = 1  # the head itself is part of the adapter
    if config.quantization is not None:
        kwargs["quantization_config"] = quantization_config(config)
        kwargs["device_map"] = {"": "cpu"}  # dequantised, it may be too large for a GPU
    base = model_class(config).from_pretrained(config.model, **kwargs)
    if config.quantization == "int4":
        keep_layout(base)
    fit_vocabulary(base, tokenizer, config.seed)
    return base


def _outputs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    import torch

    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids.to(model.device)).logits
    return logits.float().cpu()


def _refuse_absurd(adapted: Any) -> None:
    """Refuse an adapter with a weight that no training gives.

    A model normalises what it computes, so that its outputs may look right, and equal, with any weights.
    """
    for name, weight in adapted.named_parameters():
        if ".lora_" in name or "modules_to_save" in name:
            largest = float(weight.abs().max()) if weight.numel() else 0.0
            if not largest <= ABSURD:  # true for NaN
                raise MergeRefused(
                    f"merge_adapter: {name} of the adapter has the value {largest:.0e}, so it is damaged. It "
                    "was not merged; the adapter is in the run's folder, unchanged."
                )


def _compare(expected: torch.Tensor, found: torch.Tensor, tolerance: float) -> None:
    scale = max(float(expected.abs().max()), 1e-6)
    difference = float((expected - found).abs().max()) / scale
    if difference <= tolerance:  # false for NaN
        say("merge", f"outputs differ by {difference:.1e} of the largest (allowed: {tolerance:.0e})")
        return
    raise MergeRefused(
        f"merge_adapter: the outputs of the merged model differ by {difference:.1e} of the largest (allowed: "
        f"{tolerance:.0e}). It was not kept; the adapter is in the run's folder, unchanged."
    )
