"""The shared life of a run: settings, data, seed, resume, train, evaluate, save, teardown.

A trainer module gives `build`, which makes its Trainer from a Context; everything else is here.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trainers.config.errors import RUN_FAILED, ConfigError, first_line
from trainers.config.file import load_settings
from trainers.config.schema import TrainConfig
from trainers.config.settings import Settings
from trainers.model import fsdp
from trainers.rank.out_of_memory import taking_batches
from trainers.rank.process import after_failure, live_terminal, log_folder, rank, run_rank, world_size
from trainers.rank.signals import stop
from trainers.storage.manifest import step_of
from trainers.storage.run_folder import check_free, claim, hold, remove_model, versions, write_record
from trainers.storage.shipped import SHIPPED

if TYPE_CHECKING:
    from datasets import Dataset
    from torch.nn import Module
    from transformers import PreTrainedTokenizerBase, Trainer

    from trainers.checkpoint.saving import Durable
    from trainers.data.prepare import Part, Prepared
    from trainers.output.trackers import Tracker


@dataclass
class Context:
    """What a trainer module builds its Trainer from."""

    config: TrainConfig
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    new_tokens: list[int]
    data: dict[Part, Prepared]  # train, and valid and test where the config has them
    arguments: dict[str, Any]  # for TrainingArguments and its subclasses

    def rows(self, part: Part) -> Dataset | None:
        """The prepared rows of a part, or None where the run has none."""
        return self.data[part].dataset if part in self.data else None


Build = Callable[[Context], "Durable"]
Arguments = TypeVar("Arguments")


def run(trainer_name: str, build: Build, argv: Sequence[str] | None = None) -> int:
    """A trainer module's main: `accelerate launch -m trainers.sft config.yaml`. Returns the exit code."""
    parser = argparse.ArgumentParser(prog=f"trainers.{trainer_name}")
    parser.add_argument("config", type=Path, help="config file (YAML, AutoTrain's form)")
    options = parser.parse_args(argv)
    return run_rank(lambda: _train(load_settings(options.config), trainer_name, build))


def _train(settings: Settings, trainer_name: str, build: Build) -> int:
    config, folder = settings.train, Path(settings.train.project_name)
    if config.trainer != trainer_name:
        raise ConfigError(
            f"task: the config asks for trainer '{config.trainer}', and trainers.{trainer_name} was started."
        )
    if log_folder() is None and rank() == 0:  # under the launcher it was claimed already
        check_free(folder, config)  # before the folder is made
        hold(folder)
        claim(folder, config)
    _quiet()
    from transformers import set_seed

    from trainers.checkpoint.safe_pickle import allow_deepspeed, weights_only
    from trainers.output.trackers import open_tracker
    from trainers.rank.agreement import check_alike
    from trainers.rank.rendezvous import meet_on_loopback

    allow_deepspeed() if "ACCELERATE_USE_DEEPSPEED" in os.environ else weights_only()

    set_seed(config.seed)  # before the model: rows that a vocabulary gains are drawn at random
    _resolve_deepspeed_pointer()
    context = _prepare(settings, folder)  # before the process group exists
    store = meet_on_loopback()
    with taking_batches() if config.precompute_ref_log_probs else nullcontext():
        trainer = build(context)
    del store  # the process group has it now
    complete(trainer, context)
    check_alike(trainer.agreement, _of_all_ranks(settings, context))
    checkpoint, passed = trainer.find_checkpoint()
    facts = _facts(trainer, context)
    tracker = None
    if trainer.is_world_process_zero():
        write_record(folder, settings, facts)
        tracker = open_tracker(config, folder, settings.public(), step_of(checkpoint))
    with _finished(tracker):
        for line in passed if trainer.is_world_process_zero() else ():
            print(f"resume: {line}", flush=True)
        _report(trainer, folder, checkpoint, tracker)
        with taking_batches():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if stop.saved is not None:
                _leave()
                return 0
            if (held_out := context.rows("test")) is not None:
                trainer.eval_dataset = {"test": held_out}
                trainer.evaluate("test", metric_key_prefix="test")  # type: ignore[arg-type]
        _save(trainer, context)
        _leave()
        first = trainer.is_world_process_zero()
        del trainer  # a merge needs its memory
        if first:
            _finish(context, facts)
    return 0


@contextmanager
def _finished(tracker: Tracker | None) -> Iterator[None]:
    """The tracker learns how the run ended; of a failure last, since its upload may take minutes."""
    if tracker is None:
        yield
        return
    after_failure(lambda: tracker.finish(RUN_FAILED))
    yield
    tracker.finish()


def _quiet() -> None:
    """Rank 0 alone speaks for the libraries, and only of warnings; their progress bars stay off."""
    import warnings

    import datasets
    import transformers

    # Deprecations inside the libraries are addressed to their authors; a user can mend none of them.
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(torch|transformers|deepspeed|accelerate)\b"
    )
    os.environ |= {"TQDM_DISABLE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    if rank() != 0:
        transformers.logging.set_verbosity_error()


def _resolve_deepspeed_pointer() -> None:
    """A shipped accelerate config points to deepspeed_configs/ beside it, from whatever folder it is used."""
    pointer = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if pointer and not Path(pointer).exists():
        shipped = SHIPPED / pointer
        if shipped.exists():
            os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(shipped)


def _prepare(settings: Settings, folder: Path) -> Context:
    from trainers.data.prepare import parts, prepare
    from trainers.data.preview import show_example
    from trainers.model.attention import choose_attention
    from trainers.model.source import model_config
    from trainers.model.tokenizer import load_tokenizer
    from trainers.storage.data_cache import tell_prepared, wait_for_machine_0

    config = settings.train
    tokenizer, new_tokens = load_tokenizer(config)
    wait_for_machine_0()
    data = {part: prepare(config, tokenizer, part) for part in parts(config)}
    tell_prepared()
    if rank() == 0:
        if log_folder() is None:  # else the launcher has said it
            for note in settings.notes:
                print(f"note: {note}")
            if config.auto_find_batch_size:
                print("note: auto_find_batch_size: has no effect without the launcher (phalanx train).")
        print("attention: {} ({})".format(*choose_attention(config, model_config(config.model, config))))
        for part, prepared in data.items():
            print(prepared.summary.line(part))
        print(show_example(data["train"].dataset[0], tokenizer, live_terminal()), flush=True)
    arguments = training_arguments(config, folder, logging_steps(config, data))
    return Context(config, folder, tokenizer, new_tokens, data, arguments)


def logging_steps(config: TrainConfig, data: dict[Part, Prepared]) -> int:
    """AutoTrain's rule for logging_steps -1.

    A fifth of the evaluated (else trained) batches, from 1 to 25.
    """
    if config.logging_steps > 0:
        return config.logging_steps
    rows = len(data.get("valid", data["train"]).dataset)
    return min(max(int(0.2 * rows / config.batch_size), 1), 25)


def make_arguments(schema: Callable[..., Arguments], **values: Any) -> Arguments:
    """Builds TrainingArguments; what they refuse (an optimiser that does not exist) is the user's to mend."""
    try:
        arguments = schema(**values)
    except ValueError as error:
        raise ConfigError(f"params: {first_line(error)}") from error
    fsdp.enable_on_cpu("bf16" if values["bf16"] else "no")  # a CPU has no fp16
    return arguments


def training_arguments(config: TrainConfig, folder: Path, logging: int) -> dict[str, Any]:
    """The config in the words of transformers' TrainingArguments."""
    import torch

    from trainers.model.activation_checkpointing import checkpointing_arguments

    # warmup_steps below 1 is a ratio (transformers 5); a ratio of 1.0 must not become one step.
    warmup = config.warmup_steps if config.warmup_steps is not None else min(config.warmup_ratio, 0.999999)
    return {
        "output_dir": str(folder),
        "seed": config.seed,
        "data_seed": config.data_seed,  # unset, the order depends on the backend
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.per_device_eval_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "learning_rate": config.lr,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps,
        "lr_scheduler_type": config.scheduler,
        "optim": config.optimizer,
        "warmup_steps": warmup,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "adam_beta1": config.adam_beta1,
        "adam_beta2": config.adam_beta2,
        "adam_epsilon": config.adam_epsilon,
        "bf16": config.mixed_precision == "bf16",
        "fp16": config.mixed_precision == "fp16",
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": logging,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "eval_strategy": config.eval_strategy if config.validates else "no",
        "eval_steps": config.eval_steps,
        "eval_on_start": config.eval_on_start and config.validates,
        "save_strategy": config.save_strategy,
        "save_steps": config.save_steps or 500,  # read only with save_strategy: steps, which needs save_steps
        "load_best_model_at_end": config.load_best_model_at_end,
        "metric_for_best_model": "eval_loss" if config.load_best_model_at_end else None,
        "greater_is_better": False if config.load_best_model_at_end else None,
        "report_to": "none",  # trainers/output/trackers.py has them
        "dataloader_num_workers": config.dataloader_num_workers,
        "ddp_find_unused_parameters": False,
        "disable_tqdm": True,
        **checkpointing_arguments(config),
    }


def complete(trainer: Durable, context: Context) -> None:
    """What a trainer that was built lacks before it may start."""
    from trainers.loop.planned_batches import balance
    from trainers.model.isolation_probe import ProbeIsolation
    from trainers.model.lora import adapt_output

    config = context.config
    trainer.protect(config, context.data["train"].key)
    balance(trainer, config)
    if config.packed != "none":
        trainer.add_callback(ProbeIsolation(trainer))
    assert trainer.is_fsdp_enabled == fsdp.asked_for(), "FSDP was asked for, and the ranks run DDP"
    assert trainer.model is not None
    adapt_output(trainer.model)
    if not trainer.is_deepspeed_enabled:  # it keeps a float32 copy of its own
        _master_weights(trainer.model)


def _master_weights(model: Module) -> None:
    """Weights that are trained are float32; TRL makes the adapters of a quantised model bfloat16."""
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def _facts(trainer: Durable, context: Context) -> dict[str, Any]:
    """What run.json says of this start beyond the config."""
    accelerator = trainer.accelerator
    return {
        "trainer": type(trainer).__name__,
        "distributed_type": str(accelerator.distributed_type.value),
        "world_size": world_size(),
        "device": str(accelerator.device.type),
        "seed": trainer.args.seed,
        **_global_batch(context.config, world_size()),
        "command": sys.argv,
        "data": {part: asdict(prepared.summary) for part, prepared in context.data.items()},
    }


def _of_all_ranks(settings: Settings, context: Context) -> dict[str, str]:
    """What must be the same on every rank."""
    from trainers.rank.agreement import digest

    data = {f"data ({part})": prepared.key for part, prepared in context.data.items()}
    return {"config": digest(settings.public()), **data, **versions()}


def _global_batch(config: TrainConfig, ranks: int) -> dict[str, int]:
    """What a step holds: packs or rows, or at most so many tokens."""
    micro_batches = ranks * config.gradient_accumulation
    if config.token_budget is not None:
        return {"global_batch_tokens": config.token_budget * micro_batches}
    return {"global_batch": config.batch_size * micro_batches}


def _report(trainer: Durable, folder: Path, checkpoint: Path | None, tracker: Tracker | None) -> None:
    from transformers.trainer_callback import PrinterCallback

    from trainers.loop.step_boundary import StepBoundary
    from trainers.output.metrics import Report

    trainer.remove_callback(PrinterCallback)
    if trainer.is_world_process_zero():
        if checkpoint:
            print(f"resume: {checkpoint}", flush=True)
        trainer.add_callback(Report(folder, live_terminal(), step_of(checkpoint), tracker))
    trainer.add_callback(StepBoundary(trainer, checkpoint))


def _save(trainer: Trainer, context: Context) -> None:
    """The final model as an ordinary Hugging Face folder, gathered from the shards; and the tokenizer."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    if trainer.is_world_process_zero():
        remove_model(
            context.folder
        )  # a merged model of an earlier start, beside which an adapter counts twice
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(context.folder))
    if trainer.is_world_process_zero():
        context.tokenizer.save_pretrained(context.folder)
        trainer.state.save_to_json(str(context.folder / "trainer_state.json"))


def _leave() -> None:
    """All ranks are done with each other: what follows happens on rank 0 alone, with no collective open."""
    import torch.distributed
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # else ZeRO-3 would split the model of a merge, and wait for the other ranks
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _finish(context: Context, facts: dict[str, Any]) -> None:
    """What rank 0 does with the saved files, alone."""
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
