"""The names of optimisers and schedulers in transformers, so that the launcher knows them without torch.

A test compares them with the library.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

OPTIMIZERS = (
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_torch_4bit",
    "adamw_torch_8bit", "adamw_anyprecision", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit",
    "paged_adamw_32bit", "ademamix", "ademamix_8bit", "paged_ademamix_8bit", "paged_ademamix_32bit",
    "lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit", "sgd", "adagrad", "adafactor",
    "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "galore_adamw", "galore_adamw_8bit",
    "galore_adafactor", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise",
    "apollo_adamw", "apollo_adamw_layerwise", "lomo", "adalomo", "grokadamw", "schedule_free_adamw",
    "schedule_free_radam", "schedule_free_sgd", "stable_adamw",
)  # fmt: skip
SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt", "reduce_lr_on_plateau", "greedy",
)  # fmt: skip
# The library refuses these without lr_scheduler_kwargs, which a config does not have.
SCHEDULERS_WITH_ARGUMENTS = ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay")


def nearest_names(name: str, names: Sequence[str]) -> list[str]:
    """Return the five names that are most like a name: first those that begin with it."""

    def unlike(other: str) -> tuple[bool, float]:
        return not other.startswith(name), -SequenceMatcher(None, name, other).ratio()

    return sorted(names, key=unlike)[:5]
