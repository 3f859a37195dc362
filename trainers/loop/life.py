"""The course of a run in a rank: settings, data, seed, resume, train, save, evaluate, teardown.

A trainer module provides `build`, which makes its Trainer from a Context. Everything else is here.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.config.errors import RUN_FAILED, ConfigError
from trainers.config.file import load_settings
from trainers.config.packages import version_of
from trainers.config.requirements import check_requirements
from trainers.config.settings import Settings
from trainers.loop.arguments import logging_steps, training_arguments
from trainers.loop.context import Build, Context
from trainers.loop.final_evaluation import evaluate, is_due, is_too_late
from trainers.loop.finish import finish, leave_group, save_final_model
from trainers.loop.record import ended_before, of_all_ranks, record_start
from trainers.model import fsdp
from trainers.model.place import place_of_rank
from trainers.model.trust import refuse_foreign_code, refuse_kernels_at_imports
from trainers.rank.data_workers import keep_workers
from trainers.rank.failures import batch_memory_errors
from trainers.rank.library_output import quieten_libraries
from trainers.rank.process import after_failure, live_terminal, log_folder, rank, run_rank
from trainers.rank.say import say
from trainers.rank.signals import stop
from trainers.storage.ending import Ending
from trainers.storage.folder_lock import lock_folder
from trainers.storage.manifest import step_of
from trainers.storage.resumed import check_resume
from trainers.storage.run_folder import check_free, claim
from trainers.storage.run_place import check_place
from trainers.storage.shipped import SHIPPED

if TYPE_CHECKING:
    from trainers.checkpoint.saving import Durable
    from trainers.output.trackers import Tracker


def run(trainer_name: str, build: Build, argv: Sequence[str] | None = None) -> int:
    """Run a trainer module, such as `accelerate launch -m trainers.sft config.yaml`. Return the exit code."""
    parser = argparse.ArgumentParser(prog=f"trainers.{trainer_name}")
    parser.add_argument("config", type=Path, help="config file (YAML, in AutoTrain's format)")
    options = parser.parse_args(argv)
    return run_rank(lambda: _run(options.config, trainer_name, build))


def _run(config_file: Path, trainer_name: str, build: Build) -> int:
    settings = load_settings(config_file)
    config, folder = settings.train, Path(settings.train.project_name)
    if config.trainer != trainer_name:
        raise ConfigError(
            f"task: the config asks for trainer '{config.trainer}', but the module for '{trainer_name}' was "
            "started. Change task, or start the other module."
        )
    if log_folder() is None and rank() == 0:  # the launcher has claimed it already
        check_place(folder, config, config_file)
        check_free(folder, config, config_file)  # before the folder is made
        check_resume(folder, config)
        lock_folder(folder)
        claim(folder, config, config_file)
    refuse_kernels_at_imports()
    quieten_libraries()
    keep_workers()
    from transformers import set_seed

    from trainers.checkpoint.safe_pickle import allow_deepspeed, weights_only
    from trainers.model.deepspeed_builds import skip_inference_operator, write_owners
    from trainers.output.trackers import open_tracker
    from trainers.rank.agreement import check_alike
    from trainers.rank.rendezvous import meet_on_loopback

    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        allow_deepspeed()
        write_owners()  # before it compiles
        skip_inference_operator()
    else:
        weights_only()
    refuse_foreign_code(config.use_kernels)

    set_seed(config.seed)  # before the model: embeddings of new tokens are random
    _resolve_deepspeed_pointer()
    context = _prepare(settings, folder)  # before the process group exists
    store = meet_on_loopback()
    with batch_memory_errors() if config.precompute_ref_log_probs else nullcontext():
        trainer = build(context)
    del store  # the process group has it now
    complete(trainer, context)
    check_alike(trainer.agreement, of_all_ranks(trainer, settings, context))
    ending, first = ended_before(trainer, folder), trainer.is_world_process_zero()
    checkpoint, passed = (None, []) if ending else trainer.find_checkpoint()
    trained, stop.kept = ending is not None, ending.kept if ending else ""
    works = ending is None or is_due(context, ending)
    tracker = None
    facts: dict[str, Any] = {}
    if first:
        facts = record_start(trainer, context, settings, ending, checkpoint)
        if works:
            tracker = open_tracker(
                config, folder, context.config.public(), ending.step if ending else step_of(checkpoint)
            )
    with _finished(tracker):
        for line in passed if first else ():
            say("resume", line)
        if first and ending is not None:
            values = ", ".join(f"{name} {value:.4g}" for name, value in ending.metrics.items())
            say("finished", f"at step {ending.step} already ({values}); nothing is trained again")
            if is_too_late(context, ending):
                say("note", "test_split: not evaluated, because the adapter is merged already.")
        if works:
            _report(trainer, folder, checkpoint, tracker, ending)
        if ending is None:
            ending = _train(trainer, context, checkpoint)
        if ending is not None and is_due(context, ending):
            if trained:
                stop.training()  # all ranks stop together
                trainer.load_final_model(folder, ending.names(folder))
            evaluate(trainer, context, ending)
        ended = ending if stop.saved is None else None
        if ended is not None:
            stop.agreed(*trainer.agreement.maximum(stop.requested))  # only one rank may have got it
        leave_group()
        del trainer  # a merge needs the memory
        if ended is not None:
            stop.finishing(ended.kept)
            if first:
                finish(context, facts, ended)
    return 0


def _train(trainer: Durable, context: Context, checkpoint: Path | None) -> Ending | None:
    """Train, and save the final model. Return None if a signal stopped it."""
    with batch_memory_errors():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.saved is not None:
        return None
    return save_final_model(trainer, context)


@contextmanager
def _finished(tracker: Tracker | None) -> Iterator[None]:
    """Report the end of the run to the tracker.

    After a failure this is the last action of the rank, because the upload may take minutes.
    """
    if tracker is None:
        yield
        return
    after_failure(lambda: tracker.finish(RUN_FAILED))
    yield
    tracker.finish()


def _resolve_deepspeed_pointer() -> None:
    """Replace the relative path to deepspeed_configs/ in a shipped accelerate config by the full path.

    So the accelerate config works from any folder.
    """
    pointer = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if pointer and not Path(pointer).exists():
        shipped = SHIPPED / pointer
        if shipped.exists():
            os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(shipped)


def _prepare(settings: Settings, folder: Path) -> Context:
    """Load the tokenizer and the data, and print what the run uses."""
    from trainers.data.mixing import prepare_all
    from trainers.data.preview import show_example
    from trainers.model.attention import choose_attention
    from trainers.model.hub_access import use_cache_if_silent
    from trainers.model.source import model_config
    from trainers.model.tokenizer import load_tokenizer, tokenizers_of_sources
    from trainers.storage.data_cache import mark_prepared, wait_for_machine_0

    config = settings.train
    check_requirements(config, place_of_rank())
    use_cache_if_silent(config)
    tokenizer, new_tokens = load_tokenizer(config)
    wait_for_machine_0()
    data = prepare_all(config, tokenizer, tokenizers_of_sources(config, tokenizer))
    mark_prepared()
    if rank() == 0:
        if log_folder() is None:  # otherwise the launcher has printed it
            for note in settings.notes:
                say("note", note)
            if config.auto_find_batch_size:
                say("note", "auto_find_batch_size: has no effect without the launcher (phalanx train).")
        say("attention", "{} ({})".format(*choose_attention(config, model_config(config.model, config))))
        for part, prepared in data.items():
            for name, counts in prepared.summary.sources.items():
                say(f"{part}, {name}", counts.line)
            say(part, prepared.summary.line)
        for name, source in (data["train"].sources or {"": data["train"]}).items():
            print(show_example(source.dataset[0], tokenizer, live_terminal(), name), flush=True)
    arguments = training_arguments(config, folder, logging_steps(config, data))
    return Context(config, folder, tokenizer, new_tokens, data, arguments)


def complete(trainer: Durable, context: Context) -> None:
    """Complete a trainer before it starts: the isolation probe, the output layer, float32 weights.

    Raises:
        RuntimeError: accelerate did not enable FSDP.
    """
    from trainers.model.isolation_probe import ProbeIsolation
    from trainers.model.lora import adapt_output

    config = context.config
    if config.packed != "none":
        trainer.add_callback(ProbeIsolation(trainer))
    if trainer.is_fsdp_enabled != fsdp.requested():
        raise RuntimeError(
            f"FSDP was requested, but the ranks run {trainer.accelerator.distributed_type.value}: accelerate "
            f"{version_of('accelerate')} did not enable it. Install the tested versions: pip install -c "
            "constraints.txt."
        )
    adapt_output(trainer.model)
    if not trainer.is_deepspeed_enabled:  # DeepSpeed keeps its own float32 copy
        _master_weights(trainer.model)


def _master_weights(model: Any) -> None:
    """Make the trained weights float32. TRL makes the adapters of a quantised model bfloat16."""
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def _report(
    trainer: Durable, folder: Path, checkpoint: Path | None, tracker: Tracker | None, ending: Ending | None
) -> None:
    """Add the callbacks that report progress and act at the step boundary."""
    from transformers.trainer_callback import PrinterCallback

    from trainers.loop.step_boundary import StepBoundary
    from trainers.output.metrics import Report

    trainer.remove_callback(PrinterCallback)
    if trainer.is_world_process_zero():
        if checkpoint:
            say("resume", str(checkpoint))
        step = ending.step if ending else step_of(checkpoint)
        trainer.add_callback(Report(folder, live_terminal(), step, tracker, trained=ending is not None))
    trainer.add_callback(StepBoundary(trainer, checkpoint))
