"""Convert a checkpoint to a Hugging Face model folder: `python -m trainers.consolidate CHECKPOINT OUTPUT`.

It needs no GPU, and memory for only one file of the output. So any machine with enough disk space can convert
a model that was trained on many machines. The values are those of the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainers.checkpoint.shard_reader import LATEST, Source, open_shards
from trainers.config.errors import RUN_FAILED, USAGE_ERROR, ConfigError
from trainers.config.redaction import hide_in_tracebacks
from trainers.config.text import first_line
from trainers.model.trust import check_config, model_named, refuse_foreign_code, refuse_kernels_at_imports
from trainers.rank import no_links
from trainers.rank.failures import for_user
from trainers.rank.say import say
from trainers.rank.terminal import outlive_readers
from trainers.storage.manifest import SHARDS
from trainers.storage.run_place import check_output
from trainers.storage.saved_model import ADAPTER, VOCABULARIES, check_saved, read_object

TOKENIZER = (*VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
OPEN = {"trust_remote_code": False, "attn_implementation": "eager"}  # nothing that config.json names
MARGIN = 64 * 2**20  # bytes of disk in addition to the weights: tokenizer, headers, index


@dataclass
class Written:
    """The folder that was written, and its size."""

    folder: Path
    tensors: int
    bytes: int  # of the weight files


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns 0 if the folder is written, 1 if the result does not open, 2 for a mistake of the user. Prints one
    line with the result or the error.
    """
    parser = argparse.ArgumentParser(prog="trainers.consolidate", description=__doc__.split(":")[0])
    parser.add_argument("checkpoint", type=Path, help="folder checkpoint-N of a run")
    parser.add_argument("output", type=Path, help="folder to create; it may exist if it is empty")
    parser.add_argument(
        "--max-shard-size", default="5GB", help="largest weight file (500MB, 5GB). Default: 5GB"
    )
    outlive_readers()
    hide_in_tracebacks()
    refuse_kernels_at_imports()
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # deprecation warnings in the libraries do not concern the user
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # peft imports it; nothing here needs its kernels
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # transformers is not imported yet
    try:
        made = consolidate(options.checkpoint, options.output, options.max_shard_size)
    except (ConfigError, RuntimeError) as error:
        say("error", str(error))
        return USAGE_ERROR if isinstance(error, ConfigError) else RUN_FAILED
    except OSError as error:
        if (found := for_user(error)) is None:
            raise
        say("error", found[0])
        return found[1]
    say("consolidated", f"{made.folder} ({made.tensors} tensors, {made.bytes} bytes)")
    return 0


def consolidate(checkpoint: Path, output: Path, max_shard_size: int | str = "5GB") -> Written:
    """Write the model or adapter of a checkpoint to `output`.

    The output is complete and was opened as a check, or it does not exist. `max_shard_size` limits the size
    of a weight file. An adapter is always one file, since peft cannot read several.

    Raises:
        ConfigError: the checkpoint is incomplete, the output exists, or the disk has too little space.
        RuntimeError: the output does not open as the model that config.json describes.
    """
    if not checkpoint.is_dir():
        raise ConfigError(f"{checkpoint} is not a folder. Give a folder checkpoint-N of a run.")
    if output.is_symlink():
        raise ConfigError(f"{output} is a link. Give a folder.")
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ConfigError(f"{output} exists and is not empty. Give another folder.")
    check_output(output)
    adapter = (checkpoint / ADAPTER).is_file()
    model = _model(checkpoint, adapter)
    source = open_shards(checkpoint)
    target = output.absolute()
    part = target.with_name(f"{target.name}.part")
    no_links.remove(part.parent, part)
    try:
        if source is None:
            _copy_weights(checkpoint, part, adapter)
        else:
            _write(source, _names(source, model, adapter), model, adapter, part, max_shard_size)
        settings = (ADAPTER,) if adapter else ("config.json", "generation_config.json")
        for pattern in (*settings, *TOKENIZER):
            for path in checkpoint.glob(pattern):
                shutil.copyfile(path, part / path.name)
        no_links.follow_umask(part)
        check_saved(part)
        _check_opens(part, model, adapter)
        tensors = len(_shapes(part))
        size = sum(path.stat().st_size for path in part.glob("*.safetensors"))
        no_links.rename(part.parent, part, target)  # this also replaces an empty folder
    except BaseException:
        no_links.remove(part.parent, part)
        raise
    return Written(output, tensors, size)


def _model(checkpoint: Path, adapter: bool) -> Any:
    """Build the model of config.json without values. It has the names, shapes and ties of the weights.

    Raises:
        ConfigError: transformers does not have this model.
    """
    from transformers import AutoConfig

    path = checkpoint / "config.json"
    if not path.is_file():
        raise ConfigError(f"{checkpoint} is not a checkpoint: config.json is missing.")
    values = read_object(path)
    check_config(str(checkpoint), values, use_kernels=False)
    kind = model_named(path, values.get("architectures"))
    refuse_foreign_code(use_kernels=False)
    try:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {first_line(error)} Remote code is not run.") from error
    config._attn_implementation = "eager"  # names and shapes of the weights do not depend on it
    with torch.device("meta"):
        model: Any = kind(config)
        if adapter:
            from peft import PeftConfig, get_peft_model

            model = get_peft_model(model, PeftConfig.from_pretrained(str(checkpoint)), low_cpu_mem_usage=True)
    return model


def _saved(model: Any, adapter: bool, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values under the names of save_pretrained, without those that it does not save."""
    if adapter:
        from peft.utils import get_peft_model_state_dict

        # With new tokens, the frozen embedding belongs to the base model; no checkpoint has it.
        return dict(get_peft_model_state_dict(model, state_dict=values, save_embedding_layers=False))
    left_out = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
    return {name: value for name, value in values.items() if name not in left_out}


def _names(source: Source, model: Any, adapter: bool) -> dict[str, str]:
    """Return the name in the output -> name in the checkpoint, for each weight.

    Raises:
        ConfigError: a weight of the model is missing, unknown, or has another shape.
    """
    weights = model.state_dict()
    names: dict[str, str] = _saved(model, adapter, {name: name for name in weights})
    if not adapter:
        for alias, name in model.all_tied_weights_keys.items():
            if name not in source.stored and alias in source.stored:  # the tied tensor has its other name
                names[name] = alias
    for stored in names.values():
        if stored not in source.stored:
            raise ConfigError(f"the checkpoint lacks {stored} of {type(model).__name__}.")
        if source.stored[stored].shape != weights[stored].shape:
            raise ConfigError(
                f"{stored} has shape {tuple(source.stored[stored].shape)} in the checkpoint, but "
                f"{tuple(weights[stored].shape)} according to its config.json."
            )
    if unknown := sorted(source.stored.keys() - weights.keys()):
        raise ConfigError(f"the checkpoint has {unknown[0]}, which {type(model).__name__} does not have.")
    return names


def _write(
    source: Source, names: dict[str, str], model: Any, adapter: bool, part: Path, max_size: int | str
) -> None:
    """Write one weight file after the other. The memory of each is free before the next one starts."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from transformers.core_model_loading import revert_weight_conversion

    half = model.config.dtype if not adapter else None
    empty = {name: _cast(source.stored[stored], half) for name, stored in names.items()}
    total = sum(tensor.nbytes for tensor in empty.values())
    _make(part, total)
    stem = "adapter_model" if adapter else "model"
    split = split_torch_state_dict_into_shards(
        empty,
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=total if adapter else max_size,
    )
    placed: dict[str, str] = {}
    for file, members in split.filename_to_tensors.items():
        values = {name: _allocate(empty[name]) for name in members}
        source.fill({names[name]: value for name, value in values.items()})
        if not adapter:  # some models join weights that are separate in files
            values = {name: t.contiguous() for name, t in revert_weight_conversion(model, values).items()}
        save_file(values, part / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(values, file)
        del values
    if split.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (part / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def _copy_weights(checkpoint: Path, part: Path, adapter: bool) -> None:
    """Copy the weights of a checkpoint that has ordinary files: those of DDP and of one process."""
    stem = "adapter_model" if adapter else "model"
    files = sorted(checkpoint.glob(f"{stem}*.safetensors*"))
    if not files:
        raise ConfigError(f"{checkpoint} has no weights: no {SHARDS}/, no {LATEST}, no {stem}.safetensors.")
    _make(part, sum(path.stat().st_size for path in files))
    for path in files:
        shutil.copyfile(path, part / path.name)


def _make(part: Path, weights: int) -> None:
    """Create the folder.

    Raises:
        ConfigError: the disk has no space for weights of this many bytes.
    """
    parent = next(folder for folder in part.parents if folder.is_dir())
    needed, free = weights + MARGIN, shutil.disk_usage(parent).free
    if free < needed:
        raise ConfigError(
            f"the output needs {needed / 1e9:.2f} GB, but {parent} has only {free / 1e9:.2f} GB free. Free "
            "disk space, or give another folder."
        )
    no_links.make_folder(part.parent, part)


def _allocate(like: torch.Tensor) -> torch.Tensor:
    """Allocate a tensor. This is the only place that allocates memory for weights."""
    return torch.empty(like.shape, dtype=like.dtype)


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return the tensor in the half precision of config.json, if it has one; else as it is stored."""
    half = dtype in (torch.bfloat16, torch.float16) and tensor.is_floating_point()
    return tensor.to(dtype) if half else tensor


def _check_opens(folder: Path, model: Any, adapter: bool) -> None:
    """Open the folder as a user will, without reading values.

    Raises:
        RuntimeError: a weight is missing, unexpected, or has another shape.
    """
    if adapter:
        expected, found = _saved(model, True, model.state_dict()), _shapes(folder)
        wrong = [n for n, t in expected.items() if n not in found or found[n] != [*t.shape]]
    else:
        _, info = type(model).from_pretrained(folder, device_map="meta", output_loading_info=True, **OPEN)
        wrong = sorted({*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]})
    if wrong:
        raise RuntimeError(
            f"the output is broken: {wrong[0]} ({len(wrong)} in total) is missing, unexpected or of a wrong "
            "shape."
        )


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Return the shapes of the weights in a folder, read from the headers of its files."""
    from safetensors import safe_open

    found: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            names = file.keys()
            found |= {name: file.get_slice(name).get_shape() for name in names}
    return found


if __name__ == "__main__":
    sys.exit(main())
