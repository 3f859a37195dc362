"""SLURM's short form of node names."""

from __future__ import annotations

import pytest

from launcher.plan.nodelist import expand_nodelist


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node1", ["node1"]),
        ("node[1-3,7]", ["node1", "node2", "node3", "node7"]),
        ("node[008-010]", ["node008", "node009", "node010"]),
        ("a[1-2]b[0-1]", ["a1b0", "a1b1", "a2b0", "a2b1"]),
        ("gpu-a[1,3]-ib,login", ["gpu-a1-ib", "gpu-a3-ib", "login"]),
        ("n[9-11].cluster.org", ["n9.cluster.org", "n10.cluster.org", "n11.cluster.org"]),
        ("", []),
    ],
)
def test_a_list_is_expanded(text: str, names: list[str]) -> None:
    assert expand_nodelist(text) == names


@pytest.mark.parametrize("text", ["node[1-3", "node[a-b]", "node[]", "node[1-]"])
def test_a_malformed_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"bracket|numbers"):
        expand_nodelist(text)


def test_1024_nodes_are_expanded() -> None:
    names = expand_nodelist("r[01-32]n[01-32]")
    assert len(set(names)) == 1024
    assert (names[0], names[-1]) == ("r01n01", "r32n32")
