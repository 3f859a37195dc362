"""Short configs in AutoTrain's form."""

from __future__ import annotations

from collections.abc import Callable

from launcher.config import Run

Read = Callable[..., Run]  # the type of the fixture read_config


def sft(*params: str) -> str:
    """Return a short config. Its parameters start in line 5."""
    return "task: llm-sft\ndata:\n  path: data\nparams:\n" + "".join(
        f"  {p}\n" for p in (*params, "seed: 42")
    )
