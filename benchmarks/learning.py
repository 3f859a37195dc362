"""Check that training improves the model, on held-out rows: before the first step and after the last.

    python examples/get_model.py .demo/SmolLM2-135M-Instruct
    python benchmarks/learning.py --instructions instructions.jsonl --preferences preferences.jsonl

instructions: rows of instruction, input, output. preferences: the same with chosen and rejected. A tenth of
the rows is held out. The script prints a table, and exits with 1 if a trainer did not improve the measure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

# trainer -> the measure, whether a higher value is better, and the trainer's parameters.
TRAINERS = {
    "sft": ("eval_loss", False, {"lr": 2e-4}),
    "reward": ("eval_accuracy", True, {"lr": 2e-4}),
    "dpo": ("eval_rewards/accuracies", True, {"lr": 1e-4}),
    "orpo": ("eval_rewards/accuracies", True, {"lr": 2e-4, "orpo_beta": 0.5}),
    "kto": ("eval_rewards/margins", True, {"lr": 1e-4}),
}


def config(trainer: str, model: str, data: Path, steps: int) -> dict[str, object]:
    return {
        "task": f"llm-{trainer}",
        "base_model": model,
        "project_name": trainer,
        "data": {
            "path": str(data),
            "train_split": "train",
            "valid_fraction": 0.1,
            "chat_template": "tokenizer",
        },
        "params": {
            "peft": True,
            "quantization": None,
            "lora_r": 16,
            "lora_dropout": 0.0,
            "max_steps": steps,
            "batch_size": 4,
            "gradient_accumulation": 1,
            "block_size": 256,
            "packing": "none",
            "max_prompt_length": 192,
            "logging_steps": 5,
            "eval_strategy": "steps",
            "eval_steps": steps,
            "eval_on_start": True,
            "save_strategy": "no",
            "disable_gradient_checkpointing": True,
            **TRAINERS[trainer][2],
        },
    }


def measure(trainer: str, model: str, data: Path, steps: int, work: Path) -> tuple[float, float]:
    """Train in `work`; return the measure on held-out rows at the start and at the end."""
    path = work / f"{trainer}.yaml"
    path.write_text(yaml.safe_dump(config(trainer, model, data, steps)))
    subprocess.run([sys.executable, "-m", "launcher", "train", str(path)], cwd=work, check=True)
    lines = (work / trainer / "metrics.jsonl").read_text().splitlines()
    name = TRAINERS[trainer][0]
    values = [entry[name] for entry in map(json.loads, lines) if name in entry]
    return values[0], values[-1]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(".demo/SmolLM2-135M-Instruct"))
    parser.add_argument("--instructions", type=Path, required=True)
    parser.add_argument("--preferences", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    options = parser.parse_args(argv)
    lines, worse = [], []
    with tempfile.TemporaryDirectory() as folder:
        for trainer in options.trainers:
            data = options.instructions if trainer == "sft" else options.preferences
            start, end = measure(
                trainer, str(options.model.resolve()), data.resolve(), options.steps, Path(folder)
            )
            name, more, _ = TRAINERS[trainer]
            lines.append(f"| {trainer} | {name} | {start:.3f} | {end:.3f} |")
            # DPO starts equal to its reference, with accuracy 0. So it must also beat chance (0.5).
            floor = max(start, 0.5) if name.endswith("accuracies") else start
            if not (end > floor if more else end < start):
                worse.append(trainer)
    print(
        f"\n| trainer | on held-out rows | before | after {options.steps} steps |\n| --- | --- | --- | --- |"
    )
    print("\n".join(lines))
    if worse:
        print(f"error: did not improve: {', '.join(worse)}", file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
