"""The end of a run: write the final model, and process it on rank 0.

finished.json (storage/ending.py) records that the model is saved, and what was done with it. So a failure or
a signal in what follows never costs a step: a resume repeats only what is left.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.config.errors import ConfigError, Unfinished
from trainers.config.text import first_line
from trainers.loop.context import Context
from trainers.rank.heartbeat import heart
from trainers.rank.process import wait_for
from trainers.storage import run_files
from trainers.storage.ending import MERGE, UPLOAD, Ending, entries_of_model
from trainers.storage.resumed import INPUTS, check_weights

if TYPE_CHECKING:
    from trainers.checkpoint.saving import Durable

FINAL = "final.part"  # in the run's folder, until the final model is complete


def save_final_model(trainer: Durable, context: Context) -> Ending:
    """Write the final model, gathered from its shards, and the tokenizer as a Hugging Face folder.

    Rank 0 records it in finished.json.
    """
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    if trainer.is_world_process_zero():
        run_files.fresh_folder(context.folder, FINAL)
    trainer.accelerator.wait_for_everyone()
    part = context.folder / FINAL
    trainer.save_model(str(part))
    if trainer.is_world_process_zero():
        context.tokenizer.save_pretrained(part)
        trainer.state.save_to_json(str(part / "trainer_state.json"))
        files = entries_of_model(part)
        # An earlier start may have left a merged model. Next to it, an adapter would count twice.
        run_files.remove_model(context.folder)
        run_files.move_in(context.folder, FINAL)
    step = trainer.state.global_step
    ending = Ending(step, _last_metrics(trainer.state.log_history), trainer.model_step or step)
    if trainer.is_world_process_zero():
        ending.files = files
        ending.write(context.folder)
    return ending


def _last_metrics(history: list[dict[str, Any]]) -> dict[str, float]:
    """Return the last value of each loss and metric that was logged."""
    found: dict[str, float] = {}
    for entry in history:
        found |= {name: value for name, value in entry.items() if name.endswith("loss")}
    return found


def leave_group() -> None:
    """Leave the process group after all ranks are done.

    What follows happens only on rank 0, and no collective is open.
    """
    import torch.distributed
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # or ZeRO-3 shards the model of a merge, and waits for other ranks
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def finish(context: Context, facts: dict[str, Any], ending: Ending) -> None:
    """Process the saved files on rank 0: check them, write the model card, merge, upload.

    What `ending` lists as done is not repeated, except the card, which is cheap.

    Raises:
        Unfinished: one of these failed. The model is saved.
    """
    import torch

    from trainers.loop.ingredients import weights_keys
    from trainers.output.hub import push
    from trainers.output.model_card import write_card
    from trainers.storage.saved_model import check_saved

    config, folder = context.config, context.folder
    gc.collect()
    torch.cuda.empty_cache()

    def write_checked_card() -> None:
        check_saved(folder, ending.names(folder))
        write_card(folder, config, {**facts, "model_step": ending.model_step})

    def merge() -> None:
        now = weights_keys(config, base_model=config.model)  # training may have taken weeks
        check_weights(str(folder), facts.get(INPUTS, {}).get("weights", {}), now)
        merge_saved(context, ending)
        write_checked_card()

    actions: list[tuple[str, Callable[[], object]]] = []
    if config.merge_adapter:
        actions.append((MERGE, merge))
    if config.push_to_hub:
        actions.append((UPLOAD, lambda: wait_for(lambda: push(config, folder))))
    with _reported("model card"):
        write_checked_card()
    for name, action in actions:
        if name not in ending.done:
            with _reported(name), heart.during(name):
                action()
            record(ending, name, folder)


def merge_saved(context: Context, ending: Ending) -> None:
    """Replace the saved adapter by the merged model, and list its files.

    A merge that was stopped can be repeated: the adapter is removed after the merged files are listed.
    """
    from trainers.data.preview import first_tokens
    from trainers.output.merge import ADAPTER_FILES, merge_adapter, remove_adapter
    from trainers.storage.saved_model import ADAPTER

    config, folder = context.config, context.folder
    if ADAPTER in ending.names(folder):
        probe = first_tokens(context.data["train"].dataset[0])
        merged = merge_adapter(config, folder, context.tokenizer, probe)
        if ending.files:
            ending.replace(ADAPTER_FILES, merged)
            ending.write(folder)
    remove_adapter(folder)


@contextmanager
def _reported(name: str) -> Iterator[None]:
    """Turn an error in the block into Unfinished, with the name of what failed."""
    try:
        yield
    except Exception as error:
        raise unfinished(name, error) from error


def unfinished(name: str, error: Exception) -> Unfinished:
    """Return the error that ends a run whose model is saved. `name` is what failed."""
    reason = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {first_line(error)}"
    return Unfinished(f"trained and saved; {name} failed: {reason}")


def record(ending: Ending, name: str, folder: Path) -> None:
    """Record in finished.json that something is done.

    Raises:
        Unfinished: the disk is full. A resume does it again.
    """
    ending.done.append(name)
    with _reported(f"the record of the {name}"):
        ending.write(folder)
