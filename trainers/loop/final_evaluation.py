"""Evaluate the final model on the test split: on all ranks, after the model is saved.

finished.json records it. So a failure or a signal in it costs no step: a resume loads the final model, and
repeats only what is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainers.loop.context import Context
from trainers.loop.finish import record, unfinished
from trainers.rank.failures import batch_memory_errors, is_lost_peer, ran_out_of_memory
from trainers.rank.signals import stop
from trainers.storage.ending import EVALUATION, MERGE, Ending

if TYPE_CHECKING:
    from trainers.checkpoint.saving import Durable


def is_due(context: Context, ending: Ending) -> bool:
    """Return whether the run has a test split on which its final model is not evaluated yet."""
    return _is_left(context, ending) and MERGE not in ending.done


def is_too_late(context: Context, ending: Ending) -> bool:
    """Return whether the evaluation is left, but impossible: the run had no test split before its merge."""
    return _is_left(context, ending) and MERGE in ending.done


def _is_left(context: Context, ending: Ending) -> bool:
    return "test" in context.data and EVALUATION not in ending.done


def evaluate(trainer: Durable, context: Context, ending: Ending) -> None:
    """Evaluate on the test split, and record it. After a signal, stop.saved is set.

    Raises:
        Unfinished: it failed. The model is saved.
    """
    from trainers.checkpoint.saving import StopTraining

    trainer.eval_dataset = {"test": context.data["test"].dataset}
    try:
        with batch_memory_errors():
            found = trainer.evaluate("test", metric_key_prefix="test")  # type: ignore[arg-type]  # a name in it
    except StopTraining:
        stop.saved = ending.kept
        return
    except Exception as error:
        if is_lost_peer(error) or ran_out_of_memory(error):
            raise  # the launcher knows the cause, and may start it again
        raise unfinished(EVALUATION, error) from error
    ending.metrics |= {name: value for name, value in found.items() if name.endswith("loss")}
    if trainer.is_world_process_zero():
        record(ending, EVALUATION, context.folder)
