"""Train a small model to call functions, with Qwen3's template; count the calls on held-out prompts.

    python examples/get_model.py .demo/SmolLM2-135M-Instruct
    python benchmarks/function_calling.py [--steps 60] [--show]

40 rows with a `tools` column: five functions, eight prompts each. 10 prompts with other values are held out.
The model answers them greedily before the first step and after the last. The table counts the answers with a
call that parses, one to the right function, and one with the right arguments too. The template is the file
that trl ships. The script exits with 1 if no answer parses after the training.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from measure import MODEL, Failed, need_model, provenance, run, table, write_rows

TRAINED, HELD_OUT = 40, 10
MAX_NEW_TOKENS = 96
CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
CITIES = ["Oslo", "Lima", "Cairo", "Kyoto", "Dublin", "Nairobi", "Quito", "Tallinn", "Hanoi", "Porto"]
NAMES = ["Ada", "Boris", "Chen", "Dina", "Emeka", "Farah", "Goran", "Hana", "Ines", "Jamal"]
TITLES = [
    "Dune",
    "Emma",
    "Ulysses",
    "Beloved",
    "Walden",
    "Persuasion",
    "Middlemarch",
    "Solaris",
    "Utopia",
    "Nostromo",
]
AMOUNTS = (15, 40, 75, 120, 200, 250, 330, 480, 600, 950)
CURRENCIES = ["EUR", "USD", "JPY", "NOK", "INR", "CHF"]
# function -> what it does, the prompt, and its arguments with a list of values each
FUNCTIONS: dict[str, tuple[str, str, dict[str, Sequence[Any]]]] = {
    "get_weather": ("Weather of a city.", "What is the weather in {city}?", {"city": CITIES}),
    "set_timer": ("Start a timer.", "Wake me in {minutes} minutes.", {"minutes": AMOUNTS}),
    "send_message": (
        "Send a text.",
        "Tell {to} that I am in {text}.",
        {"to": NAMES, "text": CITIES},
    ),
    "convert": (
        "Convert money.",
        "How much are {amount} {source} in {target}?",
        {"amount": AMOUNTS, "source": CURRENCIES[:3], "target": CURRENCIES[3:]},
    ),
    "find_book": ("Find a book.", "Is {title} in the library of {city}?", {"title": TITLES, "city": CITIES}),
}
Row = dict[str, Any]


def schema(name: str) -> Row:
    """Return a function as the template shows it to the model."""
    what, _, values = FUNCTIONS[name]
    types = {key: {"type": "integer" if isinstance(of[0], int) else "string"} for key, of in values.items()}
    parameters = {"type": "object", "properties": types, "required": list(types)}
    return {"type": "function", "function": {"name": name, "description": what, "parameters": parameters}}


def rows(seed: int) -> Iterator[Row]:
    """Yield conversations with one call each. The functions take turns; no two prompts are the same."""
    draw, seen = random.Random(seed), set()
    names = list(FUNCTIONS)
    while True:
        name = names[len(seen) % len(names)]
        _, prompt, values = FUNCTIONS[name]
        arguments = {key: draw.choice(of) for key, of in values.items()}
        asked = prompt.format(**arguments)
        if asked in seen:
            continue
        seen.add(asked)
        other = draw.choice([each for each in names if each != name])
        offered = [schema(each) for each in draw.sample([name, other], 2)]
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        yield {
            "messages": [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": None, "tool_calls": [call]},
            ],
            # As text: `datasets` gives the objects of a column the union of all their keys.
            "tools": json.dumps(offered),
        }


def config(model: Path, data: Path, steps: int) -> dict[str, Any]:
    return {
        "task": "llm-sft",
        "base_model": str(model),
        "project_name": "calls",
        "data": {
            "path": str(data),
            "chat_template": str(files("trl") / "chat_templates" / "qwen3.jinja"),
            "column_mapping": {"text_column": "messages"},
        },
        "params": {
            "peft": True,
            "quantization": None,
            "merge_adapter": True,
            "lora_r": 16,
            "lora_dropout": 0.0,
            "lr": 1e-3,
            "max_steps": steps,
            "batch_size": 2,
            "gradient_accumulation": 1,
            "packing": "none",
            "block_size": 512,
            "mixed_precision": None,
            "logging_steps": 10,
            "save_strategy": "no",
            "disable_gradient_checkpointing": True,
        },
    }


def answers(folder: Path, asked: Sequence[Row], template: str) -> list[str]:
    """Return the model's greedy answer to the first message of each row."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = []
    for row in asked:
        ids = tokenizer.apply_chat_template(
            row["messages"][:1], tools=json.loads(row["tools"]), chat_template=template,
            add_generation_prompt=True, return_tensors="pt", return_dict=True,
        )  # fmt: skip
        with torch.inference_mode():
            out = model.generate(**ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=end)
        found.append(str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :])))
    return found


def parsed(answer: str) -> Row | None:
    """Return the call in an answer, or None if there is none, or if it is not the JSON of a call."""
    match = CALL.search(answer)
    try:
        call = json.loads(match[1]) if match else None
    except json.JSONDecodeError:
        return None
    return call if isinstance(call, dict) and {"name", "arguments"} <= set(call) else None


def score(found: Sequence[str], asked: Sequence[Row]) -> list[str]:
    calls = [parsed(answer) for answer in found]
    meant = [row["messages"][1]["tool_calls"][0]["function"] for row in asked]
    names = sum(
        call is not None and call["name"] == right["name"] for call, right in zip(calls, meant, strict=True)
    )
    whole = sum(call == right for call, right in zip(calls, meant, strict=True))
    return [f"{count} of {len(asked)}" for count in (len(calls) - calls.count(None), names, whole)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="print the answers")
    options = parser.parse_args(argv)
    model = need_model(options.model)
    template = (files("trl") / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    drawn = rows(options.seed)
    trained = [next(drawn) for _ in range(TRAINED)]
    asked = [next(drawn) for _ in range(HELD_OUT)]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "data").mkdir()
        write_rows(work / "data" / "train.jsonl", trained)
        (work / "calls.yaml").write_text(yaml.safe_dump(config(model, work / "data", options.steps)))
        try:
            run([sys.executable, "-m", "launcher", "train", "calls.yaml"], work)
        except Failed as failed:
            print(failed, file=sys.stderr)
            return 1
        before, after = answers(model, asked, template), answers(work / "calls", asked, template)
    if options.show:
        for row, answer in zip(asked, after, strict=True):
            print(f"{row['messages'][0]['content']}\n    {answer!r}", file=sys.stderr)
    print(provenance("transformers", "trl", "torch"))
    print(table(
        ["answers to held-out prompts", "a call that parses", "the right function", "and arguments"],
        [["before", *score(before, asked)], [f"after {options.steps} steps", *score(after, asked)]],
    ))  # fmt: skip
    return 0 if any(parsed(answer) for answer in after) else 1


if __name__ == "__main__":
    sys.exit(main())
