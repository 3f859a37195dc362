"""Whether activation checkpointing is reentrant: one decision, which the launcher reads too."""

from __future__ import annotations

# (ZeRO-3, adapter) -> (reentrant, why); what is not here is not reentrant.
TABLE = {
    # What runs again finds parameters that DeepSpeed has put away, of another shape than in the forward.
    (True, True): (True, "ZeRO-3 with an adapter must be (trl#2514)"),
}
# Reentrant under DDP, an adapter's parameter is ready twice in a backward, which DDP refuses.
OTHERWISE = (False, "torch recommends it, and DDP with an adapter needs it")


def reentrancy(zero3: bool, peft: bool) -> tuple[bool, str]:
    """Whether it is reentrant for a run, and why."""
    return TABLE.get((zero3, peft), OTHERWISE)
