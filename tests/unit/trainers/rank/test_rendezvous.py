"""Where the store of the process group listens: tests/faults sees the sockets of real ranks."""

from __future__ import annotations

import socket

import pytest

from launcher.plan.topology import free_port
from trainers.rank.rendezvous import meet_on_loopback

ALONE = {"RANK": "0", "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_USE_AGENT_STORE": "False"}


@pytest.fixture
def meets(monkeypatch: pytest.MonkeyPatch):
    """`meets(port, NAME=value)`: what rank 0 of one machine makes, with these differences."""

    def make(port: int, **other: str):
        for name, value in {**ALONE, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **other}.items():
            monkeypatch.setenv(name, value)
        return meet_on_loopback()

    return make


def test_rank_0_of_one_machine_makes_it(meets):
    store = meets(free_port())
    store.set("name", "value")
    assert store.get("name") == b"value"


@pytest.mark.parametrize(
    "other",
    [
        {"RANK": "1"},
        {"WORLD_SIZE": "1"},
        {"TORCHELASTIC_USE_AGENT_STORE": "True"},
        {"GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.1.1"},  # a machine's own name, on Debian
        {"MASTER_ADDR": "192.0.2.1"},
    ],
)
def test_who_makes_none(meets, other: dict[str, str]):
    assert meets(free_port(), **other) is None


def test_a_port_that_is_taken_is_left_to_torch(meets):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert meets(taken.getsockname()[1]) is None
