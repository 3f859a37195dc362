"""Models run in one thread, on documents of several lengths."""

from __future__ import annotations

import pytest
import torch
from architectures import LENGTHS


@pytest.fixture
def documents() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of three documents, padded to one length."""
    torch.manual_seed(1)
    ids = torch.randint(3, 100, (3, 30))
    return ids, torch.arange(30) < LENGTHS[:, None]


@pytest.fixture(autouse=True)
def in_one_thread(one_thread: None) -> None:
    """Run models in one thread."""
