"""Unpickle only what a checkpoint needs: tensors, plain values, and the few classes listed here.

A pickle can run any code. torch's `weights_only` refuses this, but DeepSpeed switches it off. So does
torch.distributed.checkpoint (DCP) for values that are not tensors. DCP's index is a plain pickle.
"""

from __future__ import annotations

import os
import pickle
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

# All classes in DCP's index: torch's records of where each tensor is, and the path of the checkpoint.
INDEX = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),  # how torch pickles torch.strided; only looks up a name
    "torch": ("Size",),
    "pathlib": ("Path", "PosixPath"),
    "pathlib._local": ("PosixPath",),  # its module since Python 3.13
}


def weights_only() -> None:
    """Make every later torch.load of this process refuse code, even if a library allows it."""
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"


def allow_deepspeed() -> None:
    """Do the same as weights_only(), but allow the classes in DeepSpeed's checkpoints.

    They were found in checkpoints of ZeRO 1, 2 and 3. Each is a plain record; creating one runs no code.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    weights_only()
    torch.serialization.add_safe_globals(
        [
            ZeroStageEnum,  # the stage, in the optimiser file of each rank
            LossScaler,  # the fixed scale of float32 and bfloat16, in the same file
            DynamicLossScaler,  # instead of LossScaler, with float16
            fragment_address,  # ZeRO 1 and 2: where a parameter is in the part of a rank
        ]
    )


class SafeReader(FileSystemReader):
    """A reader for DCP, which accepts only the classes of INDEX in an index.

    Creating one calls weights_only(), since DCP unpickles values that are not tensors (an optimiser's step)
    without `weights_only`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        weights_only()
        super().__init__(path)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the index of the checkpoint.

        Raises:
            pickle.UnpicklingError: it contains another class; no object of it is created.
        """
        path = self._get_metadata_path(kwargs.get("rank"))
        with open(path, "rb") as file:
            metadata = _IndexUnpickler(file, str(path)).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"{path} is not the index of a checkpoint.")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], path: str) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and name not in INDEX.get(module, ()):
            raise pickle.UnpicklingError(
                f"{self.path} contains {module}.{name}, which an index of a checkpoint never has. It was not "
                "read."
            )
        return super().find_class(module, name)
