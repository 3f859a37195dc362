"""`phalanx evaluate` runs lm-eval with local rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tiny import write_evaluation


def test_a_real_evaluation(work: Path, tiny_model: Path) -> None:
    Path("run").symlink_to(tiny_model)
    tasks = write_evaluation(Path("tasks"))
    argv = ["evaluate", "run", "--tasks", "capitals", "--include_path", str(tasks), "-o", "out"]
    done = subprocess.run([sys.executable, "-m", "launcher", *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [results] = Path("out").glob("**/results_*.json")
    assert json.loads(results.read_text())["results"]["capitals"]["acc,none"] in (0.0, 0.5, 1.0)
