"""What a start records in run.json, and how it compares with what the run has recorded before."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.config.errors import ConfigError
from trainers.config.on_resume import as_trained
from trainers.config.packages import versions
from trainers.config.schema import TrainConfig
from trainers.config.settings import Settings
from trainers.loop.context import Context
from trainers.rank.process import world_size
from trainers.rank.say import say
from trainers.storage import run_files
from trainers.storage.ending import MERGE, Ending, damaged_model, good_copy, read_ending
from trainers.storage.identity import ID, RECORD, new_id, recorded_id
from trainers.storage.manifest import read_manifest
from trainers.storage.resumed import (
    INPUTS,
    MODEL_FOLDERS,
    check_finished,
    has_steps_left,
    model_folders,
    read_record,
    trained_config,
    update_record,
)
from trainers.storage.run_folder import FINISHED, write_record

if TYPE_CHECKING:
    from trainers.checkpoint.saving import Durable


def ended_before(trainer: Durable, folder: Path) -> Ending | None:
    """Return how the resumed run ended, or None if there are steps to train. All ranks get the same.

    Raises:
        ConfigError: the config changes what a resume cannot change, or the final model is damaged and no
            checkpoint has a copy.
    """
    config, agreement = trainer.config, trainer.agreement
    if config.resume is not True:
        return None
    first = trainer.is_world_process_zero()
    ending, record, why = agreement.from_rank_0(_read_end(folder) if first else (None, None, ""))
    if why:
        raise ConfigError(why)
    if ending is None:
        return None
    if record is not None:
        check_finished(folder, record, config, trainer.inputs)
    if has_steps_left(folder, ending, record, config, trainer.last_step):
        return None
    verifies, why = agreement.from_rank_0(_verify(folder, ending) if first else (True, ""))
    if why:
        raise ConfigError(why)
    return ending if verifies else None


def _read_end(folder: Path) -> tuple[Ending | None, dict[str, Any] | None, str]:
    """Return what finished.json and run.json say, or why a resume is refused."""
    try:
        return read_ending(folder), read_record(folder), ""
    except ConfigError as error:
        return None, None, str(error)


def _verify(folder: Path, ending: Ending) -> tuple[bool, str]:
    """Return whether the final model verifies, or why a resume is refused.

    A damaged one is saved again, without training, if the checkpoint of its step verifies.
    """
    why = ending.why_damaged(folder)
    if why is None:
        return True, ""
    copy = good_copy(folder, ending)
    if copy is None:
        return False, str(damaged_model(folder, ending, why))
    say("warning", f"the final model is damaged: {why}. It is saved again, from {copy}.")
    return False, ""


def record_start(
    trainer: Durable,
    context: Context,
    settings: Settings,
    ending: Ending | None,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Write run.json, and return what it records. `ending`: of a run that is trained already.

    `checkpoint` is that from which the run continues.

    Once the run is trained, run.json keeps what describes its training. So does the config of the context,
    from which the model card is written.
    """
    folder, record = context.folder, None
    trainer.run_id = _id_of(folder, checkpoint)
    if ending is None:  # first the end of an earlier training: with run.json it describes a finished run
        run_files.remove(folder, FINISHED)
    else:
        record = read_record(folder)
        if record is None:
            say("warning", f"{folder / RECORD} cannot be read: it gets the values of this start")
    if ending is None or record is None:
        return write_record(folder, settings, facts_of(trainer, context))
    merged = MERGE in ending.done
    context.config, note = as_trained(trained_config(record), settings.train, merged)
    if note:
        say("note", note)
    return update_record(folder, settings, record, merged)


def _id_of(folder: Path, checkpoint: Path | None) -> str:
    """Return the id of the run. If run.json is lost, that of the checkpoint in its folder; else a new one."""
    own = checkpoint is not None and checkpoint.resolve().parent == folder.resolve()
    written = read_manifest(checkpoint).run if checkpoint is not None and own else ""
    return recorded_id(folder) or written or new_id()


def facts_of(trainer: Durable, context: Context) -> dict[str, Any]:
    """Return what run.json records about this start, in addition to the config."""
    accelerator = trainer.accelerator
    return {
        ID: trainer.run_id,
        "trainer": type(trainer).__name__,
        "distributed_type": str(accelerator.distributed_type.value),
        "world_size": world_size(),
        "device": str(accelerator.device.type),
        "seed": trainer.args.seed,
        **_global_batch(context.config, world_size()),
        INPUTS: asdict(trainer.inputs),
        MODEL_FOLDERS: model_folders(context.config),
        "command": sys.argv,
        "data": {part: asdict(prepared.summary) for part, prepared in context.data.items()},
    }


def of_all_ranks(trainer: Durable, settings: Settings, context: Context) -> dict[str, str]:
    """Return what must be the same on every rank."""
    from trainers.rank.agreement import digest

    data = {f"data ({part})": prepared.key for part, prepared in context.data.items()}
    return {"config": digest(settings.public()), **data, **trainer.inputs.weights, **versions()}


def _global_batch(config: TrainConfig, ranks: int) -> dict[str, int]:
    """Return the size of a step: the packs (or samples), or the largest number of tokens."""
    micro_batches = ranks * config.gradient_accumulation
    if config.token_budget is not None:
        return {"global_batch_tokens": config.token_budget * micro_batches}
    return {"global_batch": config.batch_size * micro_batches}
