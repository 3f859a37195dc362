"""The end of a run: write the final model, and process it on rank 0."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

from trainers.loop.context import Context
from trainers.storage.run_folder import remove_model

if TYPE_CHECKING:
    from transformers import Trainer


def save_final_model(trainer: Trainer, context: Context) -> None:
    """Write the final model, gathered from its shards, and the tokenizer as a Hugging Face folder."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    if trainer.is_world_process_zero():
        # An earlier start may have left a merged model. Next to it, an adapter would count twice.
        remove_model(context.folder)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(context.folder))
    if trainer.is_world_process_zero():
        context.tokenizer.save_pretrained(context.folder)
        trainer.state.save_to_json(str(context.folder / "trainer_state.json"))


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


def finish(context: Context, facts: dict[str, Any]) -> None:
    """Process the saved files on rank 0: check them, write the model card, merge, upload."""
    import torch

    from trainers.data.preview import first_tokens
    from trainers.output.hub import push
    from trainers.output.merge import merge_adapter
    from trainers.output.model_card import write_card
    from trainers.storage.saved_model import check_saved

    config, folder = context.config, context.folder
    gc.collect()
    torch.cuda.empty_cache()
    check_saved(folder)
    write_card(folder, config, facts)
    if config.merge_adapter:
        merge_adapter(config, folder, context.tokenizer, first_tokens(context.data["train"].dataset[0]))
        check_saved(folder)
        write_card(folder, config, facts)
    if config.push_to_hub:
        push(config, folder)
