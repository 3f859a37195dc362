"""Run lm-eval with secrets hidden in all that it prints: `python -m trainers.evaluate MODULE ARGUMENTS`.

`phalanx evaluate` starts it. MODULE is lm_eval, or that of `accelerate launch`, which starts it again with
lm_eval on each GPU.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

from trainers.config.errors import USAGE_ERROR
from trainers.config.redaction import hide_in_output, remember_flags
from trainers.rank.say import say
from trainers.rank.terminal import outlive_readers

LM_EVAL, ACCELERATE = "lm_eval", "accelerate.commands.launch"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the module. Return 2 for a mistake of the user: an error before lm-eval evaluates anything.

    Other errors end the process with their traceback.
    """
    module, *arguments = sys.argv[1:] if argv is None else argv
    outlive_readers()
    remember_flags(arguments)
    hide_in_output()
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Exception as error:
        if module == ACCELERATE:  # the processes that it started have said why
            return _code_of_child(error)
        if _has_begun(error):
            raise
        say("error", *f"evaluate: {type(error).__name__}: {error}".splitlines())
        return USAGE_ERROR
    return 0


def _has_begun(error: Exception) -> bool:
    """Return whether lm-eval was evaluating: the error was raised in its evaluator.evaluate()."""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_name == "evaluate" and code.co_filename.endswith("lm_eval/evaluator.py"):
            return True
        trace = trace.tb_next
    return False


def _code_of_child(error: Exception) -> int:
    """Return the exit code of the process that failed first, from torchrun's error."""
    first = getattr(error, "get_first_failure", None)
    code = first()[1].exitcode if first is not None else getattr(error, "returncode", 1)
    return code if code > 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
