"""The flat micro-batch of the pieces of a pack."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainers.data.collators import FlatCollator


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_flat_batches_restart_positions_and_mask_the_first_token_of_each_piece(lengths):
    rows = [{"input_ids": np.arange(n) + 1, "labels": np.arange(n) + 1} for n in lengths]
    batch = FlatCollator()(rows)
    lengths = sorted(lengths, reverse=True)
    positions = [place for n in lengths for place in range(n)]
    assert batch["position_ids"].tolist() == [positions]
    assert batch["input_ids"].tolist() == [[place + 1 for place in positions]]
    assert batch["labels"].tolist() == [[place + 1 if place else -100 for place in positions]]
    assert batch["cu_seq_lens_q"].tolist() == [0, *np.cumsum(lengths)]
    assert batch["max_length_q"] == max(lengths)
