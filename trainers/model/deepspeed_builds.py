"""What DeepSpeed compiles at the start of a run: only what training uses, in locks that name their owner."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from trainers.rank.build_lock import this_process
from trainers.rank.library_patches import replace_in


def write_owners() -> None:
    """Let torch's compiler write the owner into each lock that this process takes (rank/build_lock.py)."""
    from torch.utils import cpp_extension
    from torch.utils.file_baton import FileBaton

    class OwnedBaton(FileBaton):
        """A lock with its owner."""

        def try_acquire(self) -> bool | None:
            taken = super().try_acquire()
            if taken:
                Path(self.lock_file_path).write_text(json.dumps(this_process()), encoding="utf-8")
            return taken

    replace_in(cpp_extension, "FileBaton", OwnedBaton)


def skip_inference_operator() -> None:
    """Let DeepSpeed not compile its all-reduce through shared memory at the first start of CPU ranks.

    Only its inference calls it (`inference_all_reduce`). Without it DeepSpeed uses torch's all-reduce.
    """
    # `from deepspeed.comm import torch` would give torch itself, which that package imports.
    backend = importlib.import_module("deepspeed.comm.torch")
    replace_in(backend, "build_shm_op", lambda: None)
