"""Write docs/config.md from the schema, so that each field is described in one place.

python docs/make_config_page.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel

from launcher.config import LaunchConfig, SlurmConfig
from trainers.config.consistency import CONDITIONS
from trainers.config.kinds import trainers
from trainers.config.names import ALIASES, SWITCHES
from trainers.config.schema import TrainConfig, acts_for, sections

PAGE = Path(__file__).parent / "config.md"
HEAD = """\
# The config file

`make docs` generates this page from the schema. `phalanx schema` prints the same as a JSON schema, for
editors.

```yaml
task: llm-sft                  # llm-default, llm-sft, llm-reward, llm-dpo, llm-orpo, llm-kto, llm-mlm
base_model: org/name           # hub id or folder
project_name: my-run           # the run's folder
log: none                      # none, tensorboard, wandb
backend: local                 # AutoTrain's key; only local
data:
  path: data                   # folder, file or hub id
  train_split: train
  mix: null                    # several sources instead of path (docs/mixing.md)
  valid_split: null            # evaluated during the run; or valid_fraction
  test_split: null             # evaluated once, at its end; or test_fraction
  valid_fraction: 0.0          # hold out this part of the training rows instead
  test_fraction: 0.0
  chat_template: tokenizer     # tokenizer, chatml, zephyr, phi3, alpaca, or null
  prompt_format: null          # a prompt made of several columns: "Q: {question}"
  column_mapping:
    text_column: text
    prompt_text_column: null   # the completion is then in text_column
    rejected_text_column: null # reward, dpo, orpo, kto
    label_column: label        # kto
params: {}                     # the parameters below
hub:                           # only to upload the model
  username: ${HF_USERNAME}
  token: ${HF_TOKEN}
  push_to_hub: false
launch: {}                     # machines, ranks and sharding
slurm: {}                      # sbatch's flags: phalanx submit uses them, phalanx show prints them
```

A flag overrides the file: `--lr 1e-4`, `--batch-size 8`, `--num-processes 4`. `phalanx train --help` lists
the flags in the sections of this page; `phalanx submit --help` lists those of `slurm` too.
`phalanx completion bash|zsh|fish` prints a script that completes commands and flags in your shell. `${VAR}`
works in every value except `task` and `backend`. An unknown key is an error.
"""
DASH = "\u2013"
ACTS = f"""
## Which parameter has an effect for which trainer

All other parameters have an effect for every trainer. A parameter that the trainer does not use ({DASH})
changes nothing. If you set it, a note says so at the start of the run, in `phalanx show` and in `run.json`.
"""
CONDITIONAL = """
Under these conditions a parameter has no effect for any trainer. The same note says so:
"""


def table(schema: type[BaseModel], chosen: Iterable[str], names: dict[str, list[str]]) -> str:
    """Return the table of these fields. `names` has their other names."""
    rows = ["| name | default | meaning |", "| --- | --- | --- |"]
    for name in chosen:
        field = schema.model_fields[name]
        also = f" Also: {', '.join(f'`{alias}`' for alias in names[name])}." if name in names else ""
        default = ", ".join(field.default) if isinstance(field.default, list) else field.default
        default = {None: "null", True: "true", False: "false"}.get(default, default)
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            default = field.default
        rows.append(f"| `{name}` | `{default}` | {(field.description or '').replace('|', '/')}{also} |")
    return "\n".join(rows)


def trainers_table() -> str:
    """Return the table trainer x parameter, for the parameters that not all trainers read."""
    rows = [f"| name | {' | '.join(trainers())} |", f"| --- |{' --- |' * len(trainers())}"]
    for name in TrainConfig.model_fields:
        acts = acts_for(name)
        if acts != trainers():
            cells = ("yes" if trainer in acts else DASH for trainer in trainers())
            rows.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(rows)


def conditions_table() -> str:
    """Return the table of the conditions under which a parameter has no effect."""
    rows = ["| when | no effect |", "| --- | --- |"]
    for why, names, _ in CONDITIONS:
        rows.append(f"| {why} | {', '.join(f'`{name}`' for name in names)} |")
    return "\n".join(rows)


def page() -> str:
    """Return the full page."""
    names: dict[str, list[str]] = {}
    for alias, name in ALIASES.items():
        names.setdefault(name, []).append(alias)
    for alias, (name, on, off) in SWITCHES.items():
        names.setdefault(name, []).append(f"{alias}: true ({on}), false ({off})")
    parts = [
        HEAD,
        "## Training: `params`, and the keys of `data` and `hub`",
        *(f"\n### {title}\n\n{table(TrainConfig, chosen, names)}" for title, chosen in sections()),
        ACTS,
        trainers_table(),
        CONDITIONAL,
        conditions_table(),
        "\n## `launch`\n",
        table(LaunchConfig, LaunchConfig.model_fields, {}),
        "\n## `slurm`\n",
        table(SlurmConfig, SlurmConfig.model_fields, {}),
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.exit(0)
