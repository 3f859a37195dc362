"""Write the owner into the locks of torch's compiler, which DeepSpeed uses (rank/build_lock.py)."""

from __future__ import annotations

import json
from pathlib import Path

from trainers.rank.build_lock import this_process
from trainers.rank.library_patches import replace_in


def write_owners() -> None:
    """Let torch's compiler write the owner into each lock that this process takes."""
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
