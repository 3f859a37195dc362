"""Checkpoints that are whole or not there: a mixin over transformers' Trainer (resuming.py reads them).

    saving/checkpoint-N/   written here by all ranks, then hashed, then named in a manifest,
    checkpoint-N/          then renamed to this

What is in it is transformers' own: DDP one model.safetensors and optimizer.pt, DeepSpeed its shards. FSDP's
shards are torch.distributed.checkpoint's (fsdp_shards.py), which a thread writes while training goes on.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trainers.checkpoint import fsdp_shards, zero_shards
from trainers.checkpoint.nan_watch import FiniteWatch
from trainers.checkpoint.resuming import SCHEDULER, Resuming
from trainers.config.packages import versions
from trainers.config.schema import TrainConfig
from trainers.rank.agreement import Agreement
from trainers.rank.failures import disk_is_full
from trainers.rank.heartbeat import heart
from trainers.rank.process import rank, world_size
from trainers.rank.say import say
from trainers.rank.signals import stop
from trainers.storage.manifest import (
    CHECKPOINT_PREFIX,
    MANIFEST,
    FileEntry,
    Manifest,
    checkpoint_folders,
    complaint,
    entry_of,
    read_manifest,
)
from trainers.storage.run_folder import SAVING
from trainers.storage.sizes import ADAM_BYTES, FLOAT32_BYTES, in_words

UNREAD = "training_args.bin"  # a pickle that nothing reads


class StopTraining(Exception):
    """All ranks agreed to stop; the last checkpoint may still have to be written."""


class Durable(Resuming):
    """A mixin, named before the trainer of TRL. protect() completes it when the trainer is built."""

    watch: FiniteWatch

    def protect(self, config: TrainConfig, data_key: str) -> None:
        """Before training: `data_key` names the rows, so that a resume can tell whether they are the same."""
        self.agreement = Agreement()
        self.watch = FiniteWatch(config.mixed_precision == "fp16")
        self.config, self.data_key = config, data_key
        self.due_evaluation = False  # at the step that is saved next; a resume makes up for it
        self._pending: Future[tuple[list[FileEntry], Exception | None]] | None = None
        self._written: Future[Any] | None = None  # FSDP's shards, being written
        self._stager = fsdp_shards.make_stager()
        self._failure: Exception | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        # torch's own checksums of what it pickles cost as much as the rest; the manifest has better ones.
        torch.serialization.set_crc32_options(False)
        self._saving_step, self._saving_position = 0, self._position
        self.saved_step = 0  # of the last checkpoint of this start
        self.save_seconds, self._save_began = 30.0, 0.0  # of the last save; before one, a guess

    # ------------------------------------------------------------------------------------- stopping

    def train(self, *arguments: Any, **named: Any) -> Any:
        try:
            return super().train(*arguments, **named)
        except StopTraining:
            self.conclude()
            step = self.state.global_step
            if step and self.saved_step != step:
                self._save_checkpoint(self.model_wrapped, None)
                self.conclude()
            # Without a checkpoint of this step (a full disk) the newest one is what a resume finds.
            stop.saved = f"saved at step {step}" if self.saved_step == step and step else ""
            return None

    # ------------------------------------------------------------------------------------- a step

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.watch.saw(inputs, loss)
        heart.beat()
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self.watch.saw_norm(norm)
        return norm

    def evaluation_loop(self, *arguments: Any, **named: Any) -> Any:
        with heart.during("evaluate"):
            return super().evaluation_loop(*arguments, **named)

    def _load_best_model(self) -> None:
        self.conclude()  # it may be the one that is being written
        super()._load_best_model()

    # ------------------------------------------------------------------------------------- saving

    def _get_output_dir(self, trial: Any) -> str:
        """Where transformers writes checkpoint-N; nothing else asks for it but the end of train()."""
        return str(self.run_folder / SAVING)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with heart.during("save"):
            self.conclude()
            self._save_began = time.monotonic()
            self._saving_step, self._saving_position = self.state.global_step, self._position
            if not self._has_room():
                return
            if rank() == 0:
                shutil.rmtree(self.run_folder / SAVING, ignore_errors=True)
                self._part.mkdir(parents=True)
            self.agreement.barrier()
            self._failure, self._written = None, None
            with self._tolerating():
                super()._save_checkpoint(model, trial)
                self._name_best()
            if self._written is not None:
                self._pending = self._pool.submit(self._settle)
                return
            self._pending = Future()
            self._pending.set_result(self._settle())
            self.conclude()

    @property
    def _part(self) -> Path:
        return self.run_folder / SAVING / f"{CHECKPOINT_PREFIX}{self._saving_step}"

    @property
    def saving_goes_on(self) -> bool:
        """Whether this rank's thread still writes a checkpoint."""
        return self._pending is not None and not self._pending.done()

    @property
    def saving_waits(self) -> bool:
        """Whether a checkpoint was written or is being written, and has not got its name yet."""
        return self._pending is not None

    @contextmanager
    def _tolerating(self) -> Iterator[None]:
        """A full disk costs this save, not the run; the ranks hear of it when they conclude.

        Each step of a save is in one of its own, since what follows may wait for the other ranks.
        """
        try:
            yield
        except Exception as error:
            if not disk_is_full(error):
                raise
            self._failure = error

    def create_model_card(self, *arguments: Any, **named: Any) -> None:
        """TRL's, before each save, on rank 0 alone; ours is written once, at the end (model_card.py)."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not _internal_call:  # the final model, which all of run.py is about
            super().save_model(output_dir, _internal_call)
            return
        assert output_dir is not None
        with self._tolerating():
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                self._save_shape(output_dir)
            else:
                super().save_model(output_dir, _internal_call)
                if rank() == 0 and self.config.peft:  # peft writes the adapter alone
                    self._save_config(output_dir)

    def _save_shape(self, folder: str) -> None:
        """What beside the shards makes a model of them: its config, the adapter's, the tokenizer."""
        if rank() != 0:
            return
        if self.config.peft:
            model: Any = self.accelerator.unwrap_model(self.model)
            model.peft_config["default"].save_pretrained(folder)
        self._save_config(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _save_config(self, folder: str) -> None:
        """Of the model, under an adapter too: it tells which weights there are (trainers/consolidate.py)."""
        model: Any = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if self.config.peft else model
        model.config.architectures = [type(model).__name__.removeprefix("FSDP")]  # as save_pretrained does
        model.config.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder = Path(output_dir)
        with self._tolerating():
            if self.is_deepspeed_enabled:
                engine: Any = self.model_wrapped
                zero_shards.save(engine, folder, self._saving_step, self._tolerating, self._trains_all)
            elif self.is_fsdp_enabled:
                self._written = fsdp_shards.save(
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
                torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER)  # type: ignore[union-attr]

    def _save_rng_state(self, output_dir: str) -> None:
        with self._tolerating():
            super()._save_rng_state(output_dir)

    def _name_best(self) -> None:
        """transformers asks each rank whether the folder of the best step exists; rank 0 says it for all.

        One rank may see it and another not, and at the end some would load the best model and some not.
        """
        state, best = self.state, self.state.best_global_step
        if best:
            folder = self.run_folder / f"{CHECKPOINT_PREFIX}{best}"
            there = best == self._saving_step or folder.exists()
            state.best_model_checkpoint = self.agreement.first(
                str(folder) if there else state.best_model_checkpoint
            )
            if rank() == 0 and self._failure is None:
                state.save_to_json(str(self._part / "trainer_state.json"))

    def _settle(self) -> tuple[list[FileEntry], Exception | None]:
        """After all ranks have written: this rank's share of the hashes. Runs in a thread under FSDP."""
        background = self._written is not None
        if self._written is not None:
            try:
                fsdp_shards.finish(self._written)
            except Exception as error:
                if not disk_is_full(error):
                    raise
                self._failure = error
        self.agreement.barrier(background)
        (self._part / UNREAD).unlink(missing_ok=True)
        if self._failure is not None:
            return [], self._failure
        files = sorted(p for p in self._part.rglob("*") if p.is_file() and p.name != UNREAD)
        try:
            return [entry_of(self._part, path) for path in files[rank() :: world_size()]], None
        except OSError as error:
            return [], error

    def conclude(self) -> None:
        """Waits for the save that goes on, if one does: the checkpoint gets its name, or is given up."""
        if self._pending is not None:
            with heart.during("save"):
                self._conclude(self._pending)

    def _conclude(self, pending: Future[tuple[list[FileEntry], Exception | None]]) -> None:
        self._pending = None
        results = self.agreement.gathered(_plain(pending.result()))
        problem = next((problem for _, problem in results if problem), None)
        if rank() == 0:
            if problem is None:
                problem = self._publish([entry for entries, _ in results for entry in entries])
            if problem is not None:
                shutil.rmtree(self.run_folder / SAVING, ignore_errors=True)
                self._say(f"it could not be written: {problem}")
        if self.agreement.first(problem) is None:
            self.saved_step = self._saving_step
            self.save_seconds = time.monotonic() - self._save_began
            self.due_evaluation = False

    def _publish(self, entries: list[FileEntry]) -> str | None:
        """Names the files in a manifest, renames the folder, and deletes what is kept no longer."""
        manifest = Manifest(
            step=self._saving_step,
            layout=self.layout(),
            position=self._saving_position,
            versions=versions(),
            data=self.data_key,
            files=sorted(entries, key=lambda entry: entry.path),
        )
        target = self.run_folder / self._part.name
        try:
            manifest.write(self._part)
            if target.exists():  # of the same step: the run went on from it, or it did not verify
                self._discard(target)
            self._part.rename(target)
            for folder in (target, self.run_folder):
                _sync_folder(folder)
        except OSError as error:
            if not disk_is_full(error):
                raise
            return str(error)
        self._rotate()
        (self.run_folder / SAVING).rmdir()
        return None

    @property
    def _position(self) -> dict[str, Any]:
        return {
            "epoch": self.state.epoch,
            "data_seed": self.args.data_seed,
            "evaluation_due": self.due_evaluation,
        }

    def _rotate(self) -> None:
        """Keeps the newest save_total_limit checkpoints and the best one; the newest was hashed just now."""
        folders = checkpoint_folders(self.run_folder)
        best = Path(self.state.best_model_checkpoint or "").name
        for folder in folders[: -self.config.save_total_limit]:
            if folder.name != best:
                self._discard(folder)

    def _discard(self, folder: Path) -> None:
        """A half-deleted folder must not look like a checkpoint, so it loses its name first."""
        old = self.run_folder / SAVING / f"old-{folder.name}"
        shutil.rmtree(old, ignore_errors=True)
        old.parent.mkdir(exist_ok=True)
        folder.rename(old)
        shutil.rmtree(old)

    def _has_room(self) -> bool:
        """Whether the file system has room for a checkpoint, as rank 0 sees it; else says so."""
        needed, free = self._predicted_bytes(), shutil.disk_usage(self.run_folder).free
        enough = self.agreement.first(needed <= free)
        if not enough:
            self._say(f"it needs about {in_words(needed)}, and {self.run_folder} has {in_words(free)} left")
        return enough

    def _say(self, why: str) -> None:
        if rank() == 0:
            kept = checkpoint_folders(self.run_folder)
            newest = f"the newest is {kept[-1]}" if kept else "there is none yet"
            say(
                "warning",
                f"no checkpoint at step {self._saving_step}: {why}. Training goes on; {newest}. "
                "Make room, lower save_total_limit, or save less often.",
            )

    def _predicted_bytes(self) -> int:
        """The size of the last checkpoint; before there is one, what weights and Adam's moments take."""
        for folder in reversed(checkpoint_folders(self.run_folder)):
            if (folder / MANIFEST).exists() and complaint(folder, content=False) is None:
                return read_manifest(folder).bytes
        model: Any = self.model
        parameters = [(_numel(p), p.element_size(), p.requires_grad) for p in model.parameters()]
        trained = sum(count for count, _, trained in parameters if trained)
        kept = sum(count * size for count, size, trained in parameters if trained or self._trains_all)
        copy = FLOAT32_BYTES if self.is_deepspeed_enabled else 0  # ZeRO keeps the weights in float32 too
        return int(kept + trained * (ADAM_BYTES + copy))


def _plain(result: tuple[list[FileEntry], Exception | None]) -> tuple[list[FileEntry], str | None]:
    entries, error = result
    return entries, None if error is None else str(error).strip().splitlines()[-1]


def _numel(parameter: Any) -> int:
    """Numbers in the whole parameter; ZeRO-3 leaves an empty stand-in, a DTensor counts as a whole."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk only when its folder is."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
