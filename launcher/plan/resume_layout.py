"""Resume on another number of ranks: keep the global batch of the checkpoint, or refuse the run."""

from __future__ import annotations

from dataclasses import replace

from launcher.config import Run
from launcher.plan.backend import AUTOTRAIN_ZERO_STAGE, Backend
from launcher.plan.topology import Topology
from trainers.config.errors import ConfigError
from trainers.config.text import count_of
from trainers.storage.manifest import Layout, read_manifest, why_layouts_differ
from trainers.storage.run_folder import resume_checkpoint


def with_kept_global_batch(run: Run, topology: Topology, backend: Backend) -> Run:
    """Return the run with the gradient_accumulation that keeps the global batch of its checkpoint.

    Raises:
        ConfigError: the checkpoint is sharded in a way that this run cannot read, or the global batch cannot
            be kept.
    """
    checkpoint, _ = resume_checkpoint(run.folder, run.train, content=False)
    if checkpoint is None:
        return run
    then, now = read_manifest(checkpoint).layout, layout(run, topology, backend)
    accumulation, rest = divmod(then.global_batch, now.world_size * now.batch_size)
    if now.world_size != then.world_size and accumulation and not rest:
        now = replace(now, gradient_accumulation=accumulation)
    if why := why_layouts_differ(then, now):
        raise ConfigError(f"resume: {checkpoint}: {why}")
    if now.gradient_accumulation == run.train.gradient_accumulation:
        if now.global_batch != then.global_batch and run.train.token_budget is None:
            run.settings.notes.append(
                f"a step of {checkpoint} had {then.batch_text}, and a step of this run has "
                f"{now.batch_text}: the data continues by steps, so some rows are skipped or repeated."
            )
        return run
    kept = (
        f"{checkpoint.name} was written by {count_of(then.world_size, 'rank')} and the global batch is kept"
    )
    run = run.changed(f"resume ({kept})", gradient_accumulation=accumulation)
    run.settings.notes.append(
        f"gradient_accumulation: {accumulation}, because {kept}. Random numbers (dropout) differ from those "
        "of an uninterrupted run."
    )
    return run


def layout(run: Run, topology: Topology, backend: Backend) -> Layout:
    """Return how this run is distributed over its ranks."""
    stage = None
    if backend.name == "deepspeed":
        stage = run.launch.zero_stage or AUTOTRAIN_ZERO_STAGE
    sizes = (topology.num_processes, run.train.batch_size, run.train.gradient_accumulation)
    return Layout(backend.name, stage, *sizes)
