"""benchmarks/throughput.py: its draws and its rows."""

from __future__ import annotations

import pytest


def test_best_fit_decreasing():
    from throughput import packs_needed

    assert packs_needed([6, 5, 5, 4], 10) == 2
    assert packs_needed([7, 7, 6, 3], 10) == 3


def test_draw_fills_one_pack_for_each_rank():
    from throughput import draw, packs_needed

    lengths = [40, 70, 90, 110, 200, 330] * 20
    for ranks, batch in ((1, 1), (2, 2), (2, 64)):
        chosen = draw(lengths, ranks, 1024, batch, seed=1)
        assert len(chosen) % (ranks * min(batch, len(chosen) // ranks)) == 0
        assert packs_needed([lengths[number] for number in chosen], 1024) == ranks
    assert draw(lengths, 1, 1024, 1, seed=2) != draw(lengths, 1, 1024, 1, seed=3)
    with pytest.raises(ValueError, match="fewer than 1 rows"):
        draw([500], 1, 400, 1, seed=0)


def test_documents_are_joined_in_their_order():
    from throughput import documents

    data = [
        {"instruction": f"ask {n}", "input": "", "output": f"say {n}", "chosen": "yes", "rejected": "no"}
        for n in range(5)
    ]
    first, second = documents(data, "sft", joined=2)
    assert first["prompt"].index("say 0") < first["prompt"].index("ask 1")
    assert (first["completion"], second["completion"]) == ("say 1", "say 3")
    data[0]["rejected"] = "yes"
    assert len(documents(data, "dpo", joined=1)) == 4
