"""Ask a model, or a model with a LoRA adapter, one question and print the greedy answer.

    python examples/ask.py .demo/run --question "What is Phalanx?"

It prints only the answer: the libraries' warnings and progress bars are off.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAX_NEW_TOKENS = 48


def ask(folder: Path, question: str) -> str:
    """Return the model's answer to a question, which is one chat turn."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    # Only code of the libraries runs, whatever the files of the model name.
    kwargs: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False, "attn_implementation": "sdpa"}
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if (folder / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM

        model: Any = AutoPeftModelForCausalLM.from_pretrained(folder, **kwargs)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    turns = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(answer).strip()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Print a model's greedy answer to a question.")
    parser.add_argument("folder", type=Path, help="model folder, or LoRA adapter folder")
    parser.add_argument("--question", required=True, help="what to ask")
    options = parser.parse_args(argv)
    if not any((options.folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        print(f"error: {options.folder} has no model and no adapter. Give another folder.", file=sys.stderr)
        return 2
    os.environ["TQDM_DISABLE"] = "1"  # read when the libraries are imported
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    try:
        print(ask(options.folder, options.question))
    except (OSError, ValueError) as error:
        print(f"error: {options.folder}: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
