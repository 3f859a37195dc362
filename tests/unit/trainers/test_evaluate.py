"""No secret is in what lm-eval prints, and a user's mistake has no traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SECRET = "hf_abcdefghijklmnopqrstuvwxyz0123"
LM_EVAL = """\
import logging, sys
from lm_eval.evaluator import evaluate
print("table", *sys.argv[1:])
logging.basicConfig(format="%(message)s")
logging.warning("arguments: %s", sys.argv[1:])
if sys.argv[1] == "exit":
    sys.exit(5)
if sys.argv[1] == "mistake":
    raise ValueError(f"Tasks not found: {sys.argv[2]}")
evaluate(sys.argv[2])
"""
EVALUATOR = """\
def evaluate(task):
    raise RuntimeError(f"{task} failed")
"""


@pytest.mark.parametrize(("kind", "code", "traceback"), [("mistake", 2, False), ("failure", 1, True)])
def test_a_mistake_is_one_line_and_a_failure_a_traceback_and_both_hide_secrets(
    tmp_path: Path, kind: str, code: int, traceback: bool
) -> None:
    done = evaluated(tmp_path, kind, SECRET)
    assert done.returncode == code
    assert done.stdout == f"table {kind} (hidden)\n"
    assert done.stderr.startswith(f"arguments: ['{kind}', '(hidden)']\n")
    assert ("Traceback" in done.stderr) == traceback
    mistake = "error: evaluate: ValueError: Tasks not found: (hidden)"
    assert done.stderr.splitlines()[-1] == ("RuntimeError: (hidden) failed" if traceback else mistake)


def test_the_exit_code_of_lm_eval_is_kept(tmp_path: Path) -> None:
    done = evaluated(tmp_path, "exit", "--api_key", "horse-battery")
    assert (done.returncode, done.stdout) == (5, "table exit --api_key (hidden)\n")


def evaluated(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run trainers.evaluate with an lm_eval that prints its arguments."""
    package = folder / "lm_eval"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(LM_EVAL)
    (package / "evaluator.py").write_text(EVALUATOR)
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); "
    code += "from trainers.evaluate import main; sys.exit(main())"
    argv = [sys.executable, "-c", code, "lm_eval", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, check=False)
