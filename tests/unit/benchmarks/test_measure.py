"""benchmarks/measure.py: speeds from the ends of steps, and runs that fail."""

from __future__ import annotations


def test_tokens_per_second_leaves_the_first_steps_out():
    from measure import Observed

    seen = Observed(ends=[10.0, 12.0, 16.0], tokens=[100, 300, 700], losses=[], memory=0, gpu_memory=None)
    assert seen.tokens_per_second(1) == 100
    assert seen.tokens_per_second(2) == 100
    assert seen.seconds_per_step(1) == 3


def test_a_kind_that_fails_is_not_tried_again():
    from measure import Failed, alternate

    def fails(repeat):
        raise Failed("Traceback\n[rank0]: RuntimeError: out of memory\nraise ChildFailedError: no")

    turns = []
    results, failed = alternate({"a": lambda n: turns.append(n) or n, "b": fails}, 2)
    assert (results, turns) == ({"a": [0, 1]}, [0, 1])
    assert failed["b"].reason == "[rank0]: RuntimeError: out of memory"
