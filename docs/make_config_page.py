"""Writes docs/config.md from the schema, so that no field is described twice.

python docs/make_config_page.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import BaseModel

from launcher.config import LaunchConfig, SlurmConfig
from trainers.config import ALIASES, NEGATED, TrainConfig

PAGE = Path(__file__).parent / "config.md"
HEAD = """\
# The config file

This page is made from the schema by `make docs`. `phalanx schema` prints the same as JSON schema, for
editors.

```yaml
task: llm-sft                  # llm-sft, or llm with params.trainer
base_model: org/name           # hub id or folder
project_name: my-run           # the run's folder
log: none                      # none, tensorboard, wandb
backend: local                 # AutoTrain's key; only local
data:
  path: data                   # folder, file or hub id
  train_split: train
  valid_split: null
  chat_template: tokenizer
  column_mapping:
    text_column: text
params: {}                     # the table below, by name
hub:                           # only to push the model
  username: ${HF_USERNAME}
  token: ${HF_TOKEN}
  push_to_hub: false
launch: {}                     # machines, ranks and sharding
slurm: {}                      # what phalanx show turns into sbatch's flags
```

A flag overrides the file: `--lr 1e-4`, `--batch-size 8`, `--num-processes 4`. `${VAR}` works in every
string. An unknown key is an error.
"""


def table(schema: type[BaseModel], names: dict[str, list[str]]) -> str:
    rows = ["| name | default | meaning |", "| --- | --- | --- |"]
    for name, field in schema.model_fields.items():
        also = f" Also: {', '.join(f'`{alias}`' for alias in names[name])}." if name in names else ""
        default = {None: "null", True: "true", False: "false"}.get(field.default, field.default)
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            default = field.default
        rows.append(f"| `{name}` | `{default}` | {(field.description or '').replace('|', '/')}{also} |")
    return "\n".join(rows)


def page() -> str:
    """The whole page."""
    names: dict[str, list[str]] = {}
    for alias, name in ALIASES.items():
        names.setdefault(name, []).append(alias)
    for alias, name in NEGATED.items():
        names.setdefault(name, []).append(f"{alias} (the opposite)")
    parts = [
        HEAD,
        "## Training: `params`, and the keys of `data` and `hub`\n",
        table(TrainConfig, names),
        "\n## `launch`\n",
        table(LaunchConfig, {}),
        "\n## `slurm`\n",
        table(SlurmConfig, {}),
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.exit(0)
