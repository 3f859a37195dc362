"""The names of optimisers and schedulers are those of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from trainers.config.optimizers import OPTIMIZERS, SCHEDULERS, SCHEDULERS_WITH_ARGUMENTS


def test_the_names_are_those_of_the_library() -> None:
    assert sorted(OPTIMIZERS) == sorted(member.value for member in OptimizerNames)
    known = sorted(member.value for member in SchedulerType)
    assert sorted((*SCHEDULERS, *SCHEDULERS_WITH_ARGUMENTS)) == known


@pytest.mark.parametrize("name", [*SCHEDULERS, *SCHEDULERS_WITH_ARGUMENTS])
def test_a_scheduler_is_allowed_if_it_needs_no_arguments(name: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if name in SCHEDULERS:
        get_scheduler(name, optimizer, 2, 10)
    else:
        with pytest.raises((ValueError, TypeError)):
            get_scheduler(name, optimizer, 2, 10)
