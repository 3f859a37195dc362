"""`phalanx status`: a run seen from any node that sees its folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from launcher.slurm.run_state import find_runs, read_status


def show_status(name: str | None, as_json: bool) -> int:
    found = [read_status(target.folder, target.job) for target in find_runs(name)]
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=2))
        return 0
    if not found:
        print(f"no runs below {Path.cwd()}")
    for one in found:
        print(one.line)
    return 0
