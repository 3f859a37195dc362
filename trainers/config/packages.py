"""The installed distributions and their versions, read without an import of them."""

from __future__ import annotations

import importlib.metadata

# The packages whose version can change the numbers of a run.
RECORDED = (
    "torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "bitsandbytes", "phalanx",
)  # fmt: skip


def version_of(distribution: str) -> str | None:
    """Return the installed version of a distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed(distribution: str) -> bool:
    """Whether a distribution is installed."""
    return version_of(distribution) is not None


def versions() -> dict[str, str]:
    """Return the versions of the packages of RECORDED that are installed."""
    return {name: version for name in RECORDED if (version := version_of(name)) is not None}
