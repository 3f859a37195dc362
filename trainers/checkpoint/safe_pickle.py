"""What the pickles of a checkpoint may hold: tensors, plain values, and the few classes named here.

A pickle can run any code. torch's `weights_only` refuses that, but DeepSpeed asks for the contrary, and so
does torch.distributed.checkpoint (DCP) of values that are no tensors; DCP's index is a plain pickle.
"""

from __future__ import annotations

import os
import pickle
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

# All that DCP's index is made of: torch's records of which tensor lies where, and the path it was written to.
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
    "torch.serialization": ("_get_layout",),  # how torch pickles torch.strided; looks a name up
    "torch": ("Size",),
    "pathlib": ("Path", "PosixPath"),
    "pathlib._local": ("PosixPath",),  # its name from Python 3.13 on
}


def weights_only() -> None:
    """From now on each torch.load of this process refuses code, whatever a library asks for."""
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"


def allow_deepspeed() -> None:
    """As weights_only, and the classes that DeepSpeed's own checkpoints hold are let through.

    Found in checkpoints of ZeRO 1, 2 and 3; each is a plain record, whose making runs nothing.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    weights_only()
    torch.serialization.add_safe_globals(
        [
            ZeroStageEnum,  # the stage, in each rank's optimiser file
            LossScaler,  # the fixed scale of float32 and bfloat16, there too
            DynamicLossScaler,  # in its place with float16
            fragment_address,  # ZeRO 1 and 2: where a parameter lies in a rank's part
        ]
    )


class SafeReader(FileSystemReader):
    """DCP's reader of a folder, which reads an index only if it is one.

    Making one turns weights_only on: DCP would unpickle what is no tensor (an optimiser's step) without.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        weights_only()
        super().__init__(path)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index of the checkpoint.

        Raises:
            pickle.UnpicklingError: it holds something else; nothing of that was built.
        """
        path = self._get_metadata_path(kwargs.get("rank"))
        with open(path, "rb") as file:
            metadata = _IndexUnpickler(file, str(path)).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"{path} is no index of a checkpoint.")
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
                f"{self.path} asks for {module}.{name}, which no index of a checkpoint has. It was not read."
            )
        return super().find_class(module, name)
