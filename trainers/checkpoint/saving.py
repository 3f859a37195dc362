"""Write checkpoints that are always complete: a mixin for transformers' Trainer.

resuming.py reads them, and best_model.py chooses the best of them.

    saving/checkpoint-N/   all ranks write here, then hash the files; then rank 0 lists them in a manifest
    checkpoint-N/          and renames the folder to this

The files are those of transformers: with DDP one model.safetensors and optimizer.pt, with DeepSpeed its
shards. With FSDP they are shards of torch.distributed.checkpoint (fsdp_shards.py), which a thread writes
while training continues.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainers.checkpoint import fsdp_shards, zero_shards
from trainers.checkpoint.best_model import BestModel
from trainers.checkpoint.nan_watch import FiniteWatch
from trainers.checkpoint.publishing import make_room, publish, rotate
from trainers.checkpoint.resuming import SCHEDULER
from trainers.config.packages import versions
from trainers.config.text import format_bytes
from trainers.rank.failures import disk_is_full, too_large
from trainers.rank.heartbeat import heart
from trainers.rank.process import rank, world_size
from trainers.rank.say import say
from trainers.rank.signals import stop
from trainers.storage import run_files
from trainers.storage.manifest import (
    CHECKPOINT_PREFIX,
    MANIFEST,
    FileEntry,
    Manifest,
    checkpoint_folders,
    entry_of,
    read_manifest,
    why_unusable,
)
from trainers.storage.run_folder import SAVING
from trainers.storage.sizes import ADAM_BYTES, FLOAT32_BYTES

UNREAD = "training_args.bin"  # a pickle that nothing reads


class StopTraining(Exception):
    """All ranks have agreed to stop. The last checkpoint may not be written yet."""


Hashed = tuple[list[FileEntry], Exception | None]  # a rank's share of the files, or the error


@dataclass
class Save:
    """A checkpoint that is being written."""

    step: int
    position: dict[str, Any]  # position in the data
    part: Path  # the folder in saving/
    totals: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    shards: Future[Any] | None = None  # FSDP's shards, which a thread writes
    failure: Exception | None = None  # set if the disk is full
    pending: Future[Hashed] | None = None  # set once this rank has written, or its thread continues


class Durable(BestModel):
    """A mixin that saves checkpoints. In a class definition it comes before TRL's trainer."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.watch = FiniteWatch(self.config.mixed_precision == "fp16")
        self.due_evaluation = False  # whether an evaluation is due at the next saved step; a resume does it
        self.saved_step = 0  # step of the last checkpoint of this start
        self.save_seconds = 30.0  # duration of the last save; before the first one, a guess
        self._saving = Save(0, self._position, self.run_folder)
        self._stager = fsdp_shards.make_stager()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        # torch's checksums cost as much time as the rest of a save. The manifest has better ones.
        torch.serialization.set_crc32_options(False)

    def train(self, *arguments: Any, **named: Any) -> Any:
        try:
            return super().train(*arguments, **named)
        except StopTraining:
            self.conclude()
            step = self.state.global_step
            if step and self.saved_step != step:
                self._save_checkpoint(self.model_wrapped, None)
                self.conclude()
            # Without a checkpoint of this step (the disk is full), a resume uses the newest one.
            stop.saved = f"saved at step {step}" if self.saved_step == step and step else ""
            return None

    def _run_epoch(self, *arguments: Any, **named: Any) -> None:
        """Train an epoch. After a resume at the last step there is nothing to train.

        transformers looks at max_steps only after a step, so it would train one more.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*arguments, **named)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.watch.record_loss(inputs, loss)
        heart.beat()
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self.watch.record_norm(norm)
        return norm

    def evaluation_loop(self, *arguments: Any, **named: Any) -> Any:
        with heart.during("evaluate"):
            return super().evaluation_loop(*arguments, **named)

    def _get_output_dir(self, trial: Any) -> str:
        """Return the folder for checkpoint-N. transformers uses it for saves and at the end of train()."""
        return str(self.run_folder / SAVING)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with heart.during("save"):
            self.conclude()
            step = self.state.global_step
            part = self.run_folder / SAVING / f"{CHECKPOINT_PREFIX}{step}"
            self._saving = save = Save(step, self._position, part, self.totals.now())
            if not self._has_room():
                return
            if rank() == 0:
                run_files.fresh_folder(self.run_folder, SAVING)
                run_files.make_folder(self.run_folder, f"{SAVING}/{part.name}")
            self.agreement.barrier()
            with self._tolerating():
                super()._save_checkpoint(model, trial)
                self._name_best(step)
                if rank() == 0 and self.state.best_global_step and save.failure is None:
                    self.state.save_to_json(str(part / "trainer_state.json"))
            if save.shards is not None:
                save.pending = self._pool.submit(self._settle, save)
                return
            save.pending = Future()
            save.pending.set_result(self._settle(save))
            self.conclude()

    @property
    def is_saving(self) -> bool:
        """Whether this rank's thread still writes a checkpoint."""
        return self._saving.pending is not None and not self._saving.pending.done()

    @property
    def has_unpublished_save(self) -> bool:
        """Whether a checkpoint is written or being written, and is not renamed yet."""
        return self._saving.pending is not None

    @contextmanager
    def _tolerating(self) -> Iterator[None]:
        """Record a full disk in the block instead of raising. conclude() informs the other ranks.

        A full disk ends this save, but not the run. Each part of a save has its own block, since the next
        part may wait for the other ranks.

        Raises:
            OSError: a file reached the limit on its size. No save of this run would succeed.
        """
        try:
            yield
        except Exception as error:
            if limited := too_large(error, self._saving.part):
                raise limited from error
            if not disk_is_full(error):
                raise
            self._saving.failure = error

    def create_model_card(self, *arguments: Any, **named: Any) -> None:
        """Do nothing. TRL calls this on rank 0 before each save; model_card.py writes the card at the end."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not _internal_call:
            self._save_final_model(output_dir)
            return
        assert output_dir is not None
        with self._tolerating():
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                self._save_shape(output_dir)
            else:
                super().save_model(output_dir, _internal_call)
                if rank() == 0 and self.config.peft:  # peft writes only the adapter
                    self._save_config(output_dir)

    def _save_final_model(self, folder: str | None) -> None:
        """Save the final model. Old checkpoints give way to it.

        Raises:
            OSError: the disk is full, or the limit on the size of a file is too low.
        """
        model: Any = self.model
        saved = [p for p in model.parameters() if self._trains_all or p.requires_grad]
        needed = sum(_numel(p) * p.element_size() for p in saved)
        free = self._make_room(needed)
        try:
            super().save_model(folder)
        except Exception as error:
            if limited := too_large(error, Path(folder or self.run_folder)):
                raise limited from error
            if not disk_is_full(error):
                raise
            raise OSError(
                errno.ENOSPC,
                f"the final model needs about {format_bytes(needed)}, and the disk had {format_bytes(free)} "
                "left. The checkpoints are kept. Free some space, and continue with --resume: it trains "
                "nothing again",
                str(self.run_folder),
            ) from error

    def _save_shape(self, folder: str) -> None:
        """Write what a model needs in addition to the shards: its config, the adapter's, the tokenizer."""
        if rank() != 0:
            return
        if self.config.peft:
            model: Any = self.accelerator.unwrap_model(self.model)
            model.peft_config["default"].save_pretrained(folder)
        self._save_config(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _save_config(self, folder: str) -> None:
        """Write the model's config, also with an adapter: consolidate.py needs it to know the weights."""
        model: Any = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if self.config.peft else model
        model.config.architectures = [type(model).__name__.removeprefix("FSDP")]  # as save_pretrained does
        model.config.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder = Path(output_dir)
        with self._tolerating():
            if self.is_deepspeed_enabled:
                engine: Any = self.model_wrapped
                zero_shards.save(engine, folder, self._saving.step, self._tolerating, self._trains_all)
            elif self.is_fsdp_enabled:
                self._saving.shards = fsdp_shards.save(
                    self.model,
                    self.optimizer,
                    folder,
                    self.agreement.background,
                    self._stager,
                    self._trains_all,
                )
            else:
                super()._save_optimizer_and_scheduler(output_dir)
                return
            if rank() == 0:
                scheduler: Any = self.lr_scheduler
                torch.save(scheduler.state_dict(), folder / SCHEDULER)

    def _save_rng_state(self, output_dir: str) -> None:
        with self._tolerating():
            super()._save_rng_state(output_dir)

    def _settle(self, save: Save) -> Hashed:
        """Wait until all ranks have written, then hash this rank's share of the files.

        With FSDP this runs in a thread.
        """
        if save.shards is not None:
            try:
                fsdp_shards.finish(save.shards)
            except Exception as error:
                if limited := too_large(error, save.part):
                    raise limited from error
                if not disk_is_full(error):
                    raise
                save.failure = error
        self.agreement.barrier(background=save.shards is not None)
        (save.part / UNREAD).unlink(missing_ok=True)
        if save.failure is not None:
            return [], save.failure
        files = sorted(p for p in save.part.rglob("*") if p.is_file() and p.name != UNREAD)
        try:
            return [entry_of(save.part, path) for path in files[rank() :: world_size()]], None
        except OSError as error:
            return [], error

    def conclude(self) -> None:
        """Wait for a save in progress, if there is one. Publish its checkpoint, or remove it on failure."""
        if self._saving.pending is not None:
            with heart.during("save"):
                self._conclude(self._saving.pending)

    def _conclude(self, pending: Future[Hashed]) -> None:
        save, self._saving.pending = self._saving, None
        results = self.agreement.gather(_plain(pending.result()))
        problem = next((problem for _, problem in results if problem), None)
        if rank() == 0:
            if problem is None:
                problem = self._publish([entry for entries, _ in results for entry in entries])
            if problem is not None:
                with suppress(OSError):  # the disk may fail again; the next save removes it
                    run_files.remove(self.run_folder, SAVING)
                self._say(f"it could not be written: {problem}")
        if self.agreement.from_rank_0(problem) is None:
            self.saved_step = save.step
            self.save_seconds = time.monotonic() - save.began
            self.due_evaluation = False

    def _publish(self, entries: list[FileEntry]) -> str | None:
        """Write the manifest, rename the folder, delete old checkpoints. Returns the error of a full disk."""
        manifest = Manifest(
            step=self._saving.step,
            layout=self.layout(),
            position=self._saving.position,
            versions=versions(),
            data=self.inputs.rows,
            files=sorted(entries, key=lambda entry: entry.path),
            config=self.config.public(),
            weights=self.inputs.weights,
            totals=self._saving.totals,
            run=self.run_id,
        )
        try:
            publish(self._saving.part, manifest)
        except OSError as error:
            if not disk_is_full(error):
                raise
            return str(error)
        best = Path(self.state.best_model_checkpoint or "").name
        rotate(self.run_folder, self._saving.step, self.config.save_total_limit, best)
        run_files.remove(self.run_folder, SAVING)
        return None

    @property
    def _position(self) -> dict[str, Any]:
        return {
            "epoch": self.state.epoch,
            "data_seed": self.args.data_seed,
            "evaluation_due": self.due_evaluation,
        }

    def _has_room(self) -> bool:
        """Return whether there is enough space for a checkpoint. If not, print a warning."""
        needed = self._predicted_bytes()
        free = self._make_room(needed)
        if needed > free:
            self._say(
                f"it needs about {format_bytes(needed)}, but {self.run_folder} has {format_bytes(free)} left"
            )
        return needed <= free

    def _make_room(self, needed: int) -> int:
        """Let old checkpoints give way to `needed` bytes, and return the free space that rank 0 finds."""
        if rank() == 0:
            best = Path(self.state.best_model_checkpoint or "").name
            for old in make_room(self.run_folder, needed, best):
                say("warning", f"{old} was deleted: the disk has no room for the next save.")
        free: int = self.agreement.from_rank_0(shutil.disk_usage(self.run_folder).free)
        return free

    def _say(self, why: str) -> None:
        if rank() == 0:
            kept = checkpoint_folders(self.run_folder)
            newest = f"the newest checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
            say(
                "warning",
                f"no checkpoint at step {self._saving.step}: {why}. Training continues; {newest}. "
                "Free disk space, lower save_total_limit, or save less often.",
            )

    def _predicted_bytes(self) -> int:
        """Return the size of the last checkpoint; if there is none, that of weights and Adam's moments."""
        for folder in reversed(checkpoint_folders(self.run_folder)):
            if (folder / MANIFEST).exists() and why_unusable(folder, content=False) is None:
                return read_manifest(folder).bytes
        model: Any = self.model
        parameters = [(_numel(p), p.element_size(), p.requires_grad) for p in model.parameters()]
        trained = sum(count for count, _, trained in parameters if trained)
        kept = sum(count * size for count, size, trained in parameters if trained or self._trains_all)
        copy = FLOAT32_BYTES if self.is_deepspeed_enabled else 0  # ZeRO also keeps the weights in float32
        return int(kept + trained * (ADAM_BYTES + copy))


def _plain(result: Hashed) -> tuple[list[FileEntry], str | None]:
    entries, error = result
    return entries, None if error is None else str(error).strip().splitlines()[-1]


def _numel(parameter: Any) -> int:
    """Return the size of the full parameter. ZeRO-3 has an empty placeholder, a DTensor the full size."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
