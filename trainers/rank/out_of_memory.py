"""Memory that ran out in a rank: the one place that knows such an error, whatever library raises it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# What torch's allocators and the libraries below them say; each comes as a RuntimeError.
SIGNS = (
    "out of memory",  # CUDA, HIP, XPU, MPS, and the CUDA errors that NCCL passes on
    "DefaultCPUAllocator: can't allocate memory",
    "_STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN, cuSOLVER, hipBLAS
)


class BatchTooLarge(RuntimeError):
    """Memory ran out while batches were taken: a smaller micro-batch needs less of it."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the device, or of the host, did not suffice."""
    if not isinstance(error, RuntimeError):
        return False
    # torch.OutOfMemoryError by its name: the launcher reads modules that import this one, and has no torch.
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return named or isinstance(error, BatchTooLarge) or any(sign in str(error) for sign in SIGNS)


@contextmanager
def taking_batches() -> Iterator[None]:
    """Memory that runs out in here is BatchTooLarge; elsewhere (loading, saving) a batch is not to blame."""
    try:
        yield
    except RuntimeError as error:
        if ran_out_of_memory(error):
            raise BatchTooLarge(str(error)) from error
        raise
