"""Write the model card: what a run trained, from which data, with which parameters, and what is not known.

The card has only values that the run measured and recorded.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from trainers.config.mix import data_configs, sources_of
from trainers.config.packages import versions
from trainers.config.schema import SECRET_FIELDS, TrainConfig
from trainers.config.text import count_of
from trainers.data.files import is_hub_id
from trainers.storage import run_files
from trainers.storage.metrics_log import read_metrics
from trainers.storage.saved_model import ADAPTER

HEADINGS = {
    "kept": "samples",
    "supervised_tokens": "tokens in the loss",
    "longest": "longest sample",
    "truncated": "samples cut",
    "taken": "samples in an epoch of the mix",
}
# Stated elsewhere in the card, or not relevant to those who load the model.
UNSHOWN = SECRET_FIELDS | {
    "model", "project_name", "trainer", "data_path", "log", "run_name", "wandb_project", "wandb_entity",
    "resume", "overwrite", "push_to_hub", "username",
}  # fmt: skip
SPEEDS = ("_runtime", "_per_second", "_num_tokens")  # endings of names that do not measure quality


def write_card(folder: Path, config: TrainConfig, facts: dict[str, Any]) -> None:
    """Write README.md, the model card.

    It replaces the card that the libraries write, which names folders of this machine. `facts` is what
    run.json records about the run; `facts["data"]` has the counts of each split, and `facts["model_step"]` is
    the step whose weights the model has.
    """
    entries = read_metrics(folder)
    data: dict[str, dict[str, Any]] = facts.get("data") or {}
    best = _best(config, entries, facts.get("model_step"))
    parts = [
        "---\n" + _yaml(_front_matter(folder, config)) + "---",
        f"# {name_of(folder)}",
        "## What it is\n\n" + _about(folder, config, facts, entries),
        "## Data\n\n" + _data(config, data),
        "## Parameters\n\n" + _parameters(config),
        "## Metrics\n\n" + _metrics(best, entries),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(config, best, data, entries)),
        "## How to load it\n\n" + f"```python\n{_snippet(folder, config)}```",
        "## Versions\n\n" + _listed((facts.get("versions") or versions()).items()),
    ]
    run_files.write(folder, "README.md", "\n\n".join(parts) + "\n")


def _front_matter(folder: Path, config: TrainConfig) -> dict[str, Any]:
    """Return the metadata of the card. There is no licence, because this project cannot grant one."""
    front: dict[str, Any] = {"library_name": "peft" if (folder / ADAPTER).is_file() else "transformers"}
    if is_hub_id(config.model):
        front["base_model"] = config.model
    paths = dict.fromkeys(source.data_path for source in data_configs(config))
    if names := [path for path in paths if is_hub_id(path)]:
        front["datasets"] = names
    front["tags"] = ["phalanx", config.trainer]
    front["pipeline_tag"] = config.kind.pipeline
    return front


def _about(folder: Path, config: TrainConfig, facts: dict[str, Any], entries: list[dict[str, Any]]) -> str:
    if not config.peft:
        trained = "All weights were trained."
    else:
        kind = "DoRA" if config.use_dora else "LoRA"
        trained = f"{kind} adapters (rank {config.lora_r}, alpha {config.lora_alpha}) were trained"
        if config.quantization:
            trained += f" over a base model quantised to {config.quantization}"
        if (folder / ADAPTER).is_file():
            trained += "; this folder contains only the adapter, so the base model is needed too."
        else:
            trained += " and merged into the base model."
    rows = {
        "Base model": _named(config.model) + (f", revision {config.revision}" if config.revision else ""),
        "Trainer": f"{config.trainer} ({config.kind.summary})",
        "Steps": max((entry["step"] for entry in entries), default=None),
        "Packs (or samples) per step": facts.get("global_batch"),
        "Tokens per step, at most": facts.get("global_batch_tokens"),
        "Processes": facts.get("world_size"),
        "Distributed by": facts.get("distributed_type"),
        "Device": facts.get("device"),
        "Seed": config.seed,
    }
    return f"{trained}\n\n" + _listed((name, value) for name, value in rows.items() if value is not None)


def _data(config: TrainConfig, data: dict[str, dict[str, Any]]) -> str:
    text = _origin(config)
    if not data:
        return text + ("\n\n" if config.mix else " ") + "Their counts were not recorded."
    data = {name: counts for part in data for name, counts in _with_sources(part, data[part])}
    counted = [(key, value) for counts in data.values() for key, value in counts.items() if key != "dropped"]
    keys = list(dict.fromkeys(key for key, value in counted if isinstance(value, (int, float))))
    table = [["split", *(HEADINGS.get(key, key.replace("_", " ")) for key in keys), "rows dropped"]]
    table += [
        [split, *(_number(counts.get(key)) for key in keys), str(_dropped(counts))]
        for split, counts in data.items()
    ]
    lines = [
        f"- Dropped from {split}: {count} ({reason})."
        for split, counts in data.items()
        if isinstance(counts.get("dropped"), dict)
        for reason, count in counts["dropped"].items()
        if count
    ]
    return "\n\n".join([text, _table(table), *(["\n".join(lines)] if lines else [])])


def _origin(config: TrainConfig) -> str:
    """Return where the rows are from."""
    if not (sources := sources_of(config)):
        return f"Rows from {_named(config.data_path)}, split `{config.train_split}`."
    lines = [f"- {s.name}: {_named(s.config.data_path)}, split `{s.config.train_split}`" for s in sources]
    return "Rows from several sources:\n\n" + "\n".join(lines)


def _with_sources(part: str, counts: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield the counts of a split, and of each source of a mix."""
    yield part, counts
    for name, own in (counts.get("sources") or {}).items():
        yield f"{part}, {name}", own


def _parameters(config: TrainConfig) -> str:
    chosen = {
        name: _without_folders(value)
        for name, value in config.model_dump(mode="json").items()
        if name not in UNSHOWN and value != TrainConfig.model_fields[name].default
    }
    if not chosen:
        return "All parameters have their defaults."
    return f"Parameters that differ from the defaults:\n\n```yaml\n{_yaml(chosen)}```"


def _metrics(best: dict[str, Any] | None, entries: list[dict[str, Any]]) -> str:
    """Return the table of the last value of each measure.

    The values of `best`, the evaluation that chose the model, come before later ones.
    """
    found: dict[str, tuple[Any, int]] = {}
    for entry in entries:
        for name, value in entry.items():
            measured = name == "loss" or name.startswith(("eval_", "test_"))
            if measured and not name.endswith(SPEEDS):
                found[name] = (value, entry["step"])
    if best is not None:
        found |= {name: (best[name], best["step"]) for name in found if name in best and name != "loss"}
    if not found:
        return "Nothing was measured."
    table = [["measure", "value", "step"], *([n, _number(v), str(s)] for n, (v, s) in found.items())]
    notes = ["`loss` is the training loss at the last logged step."] if "loss" in found else []
    if best is not None:
        notes.append(f"The saved model is that of step {best['step']}, chosen by its eval_loss.")
    return "\n\n".join([_table(table), *([" ".join(notes)] if notes else [])])


def _limits(
    config: TrainConfig,
    best: dict[str, Any] | None,
    data: dict[str, dict[str, Any]],
    entries: list[dict[str, Any]],
) -> Iterable[str]:
    held_out = [word for word in ("eval", "test") if any(f"{word}_loss" in entry for entry in entries)]
    if held_out:
        yield (
            f"It was evaluated ({', '.join(held_out)}) only on held-out rows of its own data. Its quality on "
            "other data or tasks, or compared to its base model, was not measured."
        )
    else:
        yield "It was not evaluated: no row was held out. The training loss does not show how good it is."
    if best is not None:
        yield "Its checkpoint was chosen by eval_loss, so the values on new rows are probably somewhat worse."
    yield "Safety, bias and truthfulness were not evaluated. It may have the problems of its base model."
    for split, counts in data.items():
        if cut := counts.get("truncated"):  # a row may become several samples
            yield f"Cut to block_size: {count_of(cut, 'sample')} of {split}."
        if dropped := _dropped(counts):
            yield f"Dropped: {dropped} of the {counts.get('rows', '?')} rows of {split}."
    if config.quantization:
        yield f"It was trained with {config.quantization} weights; with others its outputs differ a little."
    yield "No licence is stated here: those of the base model and of the data apply."


def _snippet(folder: Path, config: TrainConfig) -> str:
    loader = config.kind.auto_class
    name = f"{config.username}/{name_of(folder)}" if config.push_to_hub else name_of(folder)
    extra = ", num_labels=1" if config.kind.scores else ""
    if config.trust_remote_code:
        extra += ", trust_remote_code=True"
    code = f"from transformers import {loader}, AutoTokenizer\n\nname = {name!r}\n"
    tokenizer = "tokenizer = AutoTokenizer.from_pretrained(name)\n"
    if not (folder / ADAPTER).is_file():
        trust = ", trust_remote_code=True" if config.trust_remote_code else ""
        return f"{code}{tokenizer}model = {loader}.from_pretrained(name{trust})\n"
    base = config.model if is_hub_id(config.model) else last_part(config.model)
    revision = f", revision={config.revision!r}" if config.revision else ""
    return (
        f"from peft import PeftModel\n{code}{tokenizer}"
        f"base = {loader}.from_pretrained({base!r}{revision}{extra})\n"
        "if len(tokenizer) > base.get_input_embeddings().num_embeddings:  # the training added tokens\n"
        "    base.resize_token_embeddings(len(tokenizer))\n"
        "model = PeftModel.from_pretrained(base, name)\n"
    )


def _best(config: TrainConfig, entries: list[dict[str, Any]], step: int | None) -> dict[str, Any] | None:
    """Return the evaluation by which the final model, that of `step`, was chosen, or None if none was."""
    scored = [entry for entry in entries if "eval_loss" in entry and entry["step"] == step]
    return scored[-1] if config.load_best_model_at_end and scored else None


def _dropped(counts: dict[str, Any]) -> int:
    dropped = counts.get("dropped") or 0
    return sum(dropped.values()) if isinstance(dropped, dict) else int(dropped)


def name_of(folder: Path) -> str:
    return folder.resolve().name


def last_part(path: str) -> str:
    """Return the last part of a local path. The folders above it may name a user and a machine."""
    return os.path.basename(os.path.abspath(os.path.expanduser(path)))


def _named(source: str) -> str:
    return f"`{source}`" if is_hub_id(source) else f"`{last_part(source)}` (local)"


def _without_folders(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if isinstance(value, dict):  # a source of a mix, or variables of a template
        plain = {key: _without_folders(item) for key, item in value.items()}
        local = "path" in plain and not is_hub_id(str(plain["path"]))
        return plain | ({"path": last_part(str(plain["path"]))} if local else {})
    return last_part(value) if isinstance(value, str) and value.startswith(("/", "~", "./", "../")) else value


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _yaml(value: dict[str, Any]) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def _listed(pairs: Iterable[tuple[str, Any]]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in pairs)


def _table(rows: list[list[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
