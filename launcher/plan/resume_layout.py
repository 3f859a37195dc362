"""A run that goes on from a checkpoint on another number of ranks keeps its global batch, or is refused."""

from __future__ import annotations

from dataclasses import replace

from launcher.config import Run
from launcher.plan.backend import AUTOTRAIN_ZERO_STAGE, Backend
from launcher.plan.topology import Topology
from trainers.config.errors import ConfigError
from trainers.storage.manifest import Layout, misfit, read_manifest
from trainers.storage.run_folder import resume_checkpoint


def fitted(run: Run, topology: Topology, backend: Backend) -> Run:
    """The run as it can go on from its checkpoint.

    Raises:
        ConfigError: what is sharded otherwise cannot be read; or the global batch cannot be kept.
    """
    checkpoint, _ = resume_checkpoint(run.folder, run.train, content=False)
    if checkpoint is None:
        return run
    then, now = read_manifest(checkpoint).layout, layout(run, topology, backend)
    accumulation, rest = divmod(then.global_batch, now.world_size * now.batch_size)
    if now.world_size != then.world_size and accumulation and not rest:
        now = replace(now, gradient_accumulation=accumulation)
    if why := misfit(then, now):
        raise ConfigError(f"resume: {checkpoint}: {why}")
    if now.gradient_accumulation == run.train.gradient_accumulation:
        if now.global_batch != then.global_batch and run.train.token_budget is None:
            run.settings.notes.append(
                f"a step of {checkpoint} held {then.batch_in_words}, and one of this run holds "
                f"{now.batch_in_words}: the data goes on by steps, so rows are left out or seen again."
            )
        return run
    kept = f"{checkpoint.name} was written by {then.world_size} ranks and the global batch is kept"
    run = run.changed(f"resume ({kept})", gradient_accumulation=accumulation)
    run.settings.notes.append(
        f"gradient_accumulation: {accumulation}, since {kept}. Random numbers (dropout) are not those of the "
        "unbroken run."
    )
    return run


def layout(run: Run, topology: Topology, backend: Backend) -> Layout:
    """How this run is going to be spread."""
    stage = None
    if backend.name == "deepspeed":
        stage = run.launch.zero_stage or AUTOTRAIN_ZERO_STAGE
    sizes = (topology.num_processes, run.train.batch_size, run.train.gradient_accumulation)
    return Layout(backend.name, stage, *sizes)
