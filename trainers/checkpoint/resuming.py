"""Resume from a checkpoint: choose it, and load its state. A mixin for transformers' Trainer."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from trainers.checkpoint import fsdp_shards
from trainers.checkpoint.readable import why_unreadable
from trainers.checkpoint.strict_weights import check_shards, load_weights
from trainers.checkpoint.totals import Counting
from trainers.config.errors import ConfigError
from trainers.config.schema import TrainConfig
from trainers.rank.agreement import Agreement
from trainers.rank.heartbeat import heart
from trainers.rank.process import rank, world_size
from trainers.storage.manifest import (
    Layout,
    checkpoint_folders,
    damaged_files,
    read_manifest,
    why_layouts_differ,
    why_unusable,
)
from trainers.storage.resumed import Inputs, check_checkpoint
from trainers.storage.run_folder import INSTEAD, no_usable_checkpoint, resume_checkpoint

SCHEDULER = "scheduler.pt"


class Prepared(Exception):
    """The model is wrapped as for training. No step is taken."""


class Resuming(Trainer):
    """A mixin that finds and loads checkpoints. Durable (saving.py) adds saving."""

    def __init__(self, *arguments: Any, config: TrainConfig, inputs: Inputs, **named: Any) -> None:
        """`inputs`: what the run reads, which a resume compares."""
        self.config, self.inputs = config, inputs
        self.only_prepares = False
        self.run_id = ""  # of the run's record; only on the rank that writes manifests
        super().__init__(*arguments, **named)
        self.agreement = Agreement()
        self.totals = Counting(self, self.agreement)

    @property
    def run_folder(self) -> Path:
        """The folder of the run."""
        return Path(self.args.output_dir or ".")

    @property
    def _trains_all(self) -> bool:
        return not self.config.peft

    @property
    def last_step(self) -> int:
        """The step at which this run's training ends."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return int(self.set_initial_training_values(self.args, self.get_train_dataloader())[-1])

    def layout(self) -> Layout:
        """Return how this run is distributed."""
        kind = self.accelerator.distributed_type
        name = "ddp" if world_size() > 1 else "none"
        stage = None
        if kind == DistributedType.DEEPSPEED:
            name, stage = "deepspeed", self.accelerator.state.deepspeed_plugin.zero_stage
        elif self.is_fsdp_enabled:
            name = "fsdp"
        return Layout(name, stage, world_size(), self.config.batch_size, self.config.gradient_accumulation)

    def find_checkpoint(self) -> tuple[Path | None, list[str]]:
        """Return the checkpoint to resume from, and why newer ones are skipped.

        Each rank reads a share of the files.

        Raises:
            ConfigError: the named checkpoint cannot be used, or none of the run's; or the layout of this run
                does not fit.
        """
        config = self.config
        if not config.resume:
            return None, []
        if isinstance(config.resume, str):
            named = Path(config.resume)
            resume_checkpoint(self.run_folder, config, content=False)
            if why := self._complaint(named):
                raise ConfigError(f"resume: {named} cannot be used: {why}. {INSTEAD}")
            return self._check_layout(named), self._unknown(named)
        skipped: list[str] = []
        for folder in reversed(checkpoint_folders(self.run_folder)):
            why = self._complaint(folder)
            if why is None:
                return self._check_layout(folder), skipped + self._unknown(folder)
            skipped.append(f"skipped {folder}: {why}")
        if skipped:
            raise no_usable_checkpoint(self.run_folder, skipped)
        return None, []

    def _unknown(self, folder: Path) -> list[str]:
        """Return a line if an earlier version wrote the checkpoint, which recorded less."""
        if read_manifest(folder).config is not None:
            return []
        return [f"{folder} records no config, so it is not known whether this run changes it"]

    def _check_layout(self, folder: Path) -> Path:
        """Return the checkpoint if this run can load it.

        The launcher has already checked this. Ranks that a user starts without it have not.

        Raises:
            ConfigError: the layout of this run does not fit, or its config changes what cannot change.
        """
        check_checkpoint(folder, self.config, self.last_step, self.inputs)
        layout = self.layout()
        if why := why_layouts_differ(read_manifest(folder).layout, layout):
            raise ConfigError(f"resume: {folder}: {why}")
        if why := self.agreement.from_rank_0(self._why_shards_differ(folder, layout) if rank() == 0 else ""):
            raise ConfigError(f"resume: {why}")
        return folder

    def _why_shards_differ(self, folder: Path, layout: Layout) -> str:
        """Return which weight is missing or unknown, or an empty string. A load checks other files."""
        if layout.backend not in ("fsdp", "deepspeed"):
            return ""
        try:
            check_shards(self.model, folder, self._trains_all)
        except ConfigError as error:
            return str(error)
        return ""

    def _complaint(self, folder: Path) -> str | None:
        """Return why a checkpoint cannot be used, or None. All ranks check it together."""
        why = self.agreement.from_rank_0(why_unusable(folder, content=False))
        if why is not None:
            return why
        written = read_manifest(folder)
        share = written.files[rank() :: world_size()]
        found = damaged_files(folder, share, content=True)
        if not why_layouts_differ(written.layout, self.layout()):  # another backend has files of its own
            found += [f"{e.path} {why}" for e in share if (why := why_unreadable(folder / e.path))]
        return next((fault for part in self.agreement.gather(found) for fault in part), None)

    def load_final_model(self, folder: Path, names: Collection[str]) -> None:
        """Load the final model of a finished run, for an evaluation, and wrap it as training does.

        `names` are its files; the user may have others in the folder.

        Raises:
            ConfigError: a weight is missing, unknown, or has another shape.
        """
        with heart.during("load"):
            load_weights(self.model, folder, names)
            self.only_prepares = True
            with suppress(Prepared):
                super().train()
        self.is_in_train = False
        ended = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        self.state.global_step, self.state.max_steps = ended.global_step, ended.max_steps
        self.state.epoch = ended.epoch

    def _prepare_for_training(self, *arguments: Any, **named: Any) -> Any:
        prepared = super()._prepare_for_training(*arguments, **named)
        if self.only_prepares:
            raise Prepared
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_fsdp_enabled:  # FSDP's weights are loaded with the optimiser's state, below
            load_weights(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        fsdp_shards.load(self.model, self.optimizer, folder, self._trains_all)
        scheduler: Any = self.lr_scheduler
        scheduler.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))

    def _load_best_model(self) -> None:
        folder = Path(str(self.state.best_model_checkpoint))
        with heart.during("load"):
            if self.is_deepspeed_enabled:
                super()._load_best_model()
            elif self.is_fsdp_enabled:
                fsdp_shards.load_weights(self.model, folder, self._trains_all)
            else:
                load_weights(self.model, folder)
