"""Going on from a checkpoint: which one, and how its state is read. A mixin over transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import Trainer

from trainers.checkpoint import fsdp_shards
from trainers.config.errors import ConfigError
from trainers.config.schema import TrainConfig
from trainers.rank.agreement import Agreement
from trainers.rank.heartbeat import heart
from trainers.rank.process import rank, world_size
from trainers.storage.manifest import Layout, checkpoint_folders, complaint, faults, misfit, read_manifest
from trainers.storage.run_folder import resume_checkpoint

SCHEDULER = "scheduler.pt"


class Resuming(Trainer):
    """Durable's other half (saving.py)."""

    def __init__(self, *arguments: Any, config: TrainConfig, data_key: str, **named: Any) -> None:
        """`data_key` names the rows and how they are tokenized, so that a resume can compare them."""
        self.config, self.data_key = config, data_key
        super().__init__(*arguments, **named)
        self.agreement = Agreement()

    @property
    def run_folder(self) -> Path:
        return Path(self.args.output_dir or ".")

    @property
    def _trains_all(self) -> bool:
        return not self.config.peft

    def layout(self) -> Layout:
        """How this run is spread."""
        kind = self.accelerator.distributed_type
        name = "ddp" if world_size() > 1 else "none"
        stage = None
        if kind == DistributedType.DEEPSPEED:
            name, stage = "deepspeed", self.accelerator.state.deepspeed_plugin.zero_stage
        elif self.is_fsdp_enabled:
            name = "fsdp"
        return Layout(name, stage, world_size(), self.config.batch_size, self.config.gradient_accumulation)

    def find_checkpoint(self) -> tuple[Path | None, list[str]]:
        """The checkpoint to go on from, and why newer ones were passed over; each rank reads a share."""
        config = self.config
        if not config.resume:
            return None, []
        if isinstance(config.resume, str):
            named = self._fitting(resume_checkpoint(self.run_folder, config)[0])
            return named, self._other_rows(named) if named else []
        passed: list[str] = []
        for folder in reversed(checkpoint_folders(self.run_folder)):
            why = self._complaint(folder)
            if why is None:
                return self._fitting(folder), passed + self._other_rows(folder)
            passed.append(f"passed over {folder}: {why}")
        return None, [*passed, "no checkpoint can be used; it begins anew"]

    def _other_rows(self, folder: Path) -> list[str]:
        """A line where the rows are not those that the run was trained on until there."""
        if read_manifest(folder).data == self.data_key:
            return []
        return [f"the rows, or how they are tokenized, are not those that {folder} was written with"]

    def _fitting(self, folder: Path | None) -> Path | None:
        """The launcher has seen to it that a checkpoint fits; ranks started by hand may not."""
        if folder is not None and (why := misfit(read_manifest(folder).layout, self.layout())):
            raise ConfigError(f"resume: {folder}: {why}")
        return folder

    def _complaint(self, folder: Path) -> str | None:
        """Why a checkpoint cannot be used, found by all ranks together."""
        why = self.agreement.first(complaint(folder, content=False))
        if why is not None:
            return why
        share = read_manifest(folder).files[rank() :: world_size()]
        found = [fault for part in self.agreement.gathered(faults(folder, share, True)) for fault in part]
        return found[0] if found else None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_fsdp_enabled:  # FSDP's weights come with the optimiser's state, below
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        fsdp_shards.load(self.model, self.optimizer, folder, self._trains_all)
        scheduler: Any = self.lr_scheduler
        scheduler.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))

    def _load_best_model(self) -> None:
        with heart.during("load"):
            if not self.is_fsdp_enabled:
                super()._load_best_model()
                return
            fsdp_shards.load_weights(
                self.model, Path(str(self.state.best_model_checkpoint)), self._trains_all
            )
