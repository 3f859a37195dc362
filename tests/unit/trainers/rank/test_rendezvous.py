"""Where the store of the process group listens. tests/faults checks the sockets of real ranks."""

from __future__ import annotations

import socket

import pytest

from launcher.plan.topology import free_port
from trainers.rank.rendezvous import meet_on_loopback

ONE_MACHINE = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "GROUP_WORLD_SIZE": "1",
    "TORCHELASTIC_USE_AGENT_STORE": "False",
}


@pytest.fixture
def meets(monkeypatch: pytest.MonkeyPatch):
    """`meets(port, NAME=value)` returns the store of rank 0 on one machine, with other variables."""

    def make(port: int, **other: str):
        for name, value in {
            **ONE_MACHINE,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **other,
        }.items():
            monkeypatch.setenv(name, value)
        return meet_on_loopback()

    return make


def test_rank_0_of_one_machine_creates_the_store(meets):
    store = meets(free_port())
    store.set("name", "value")
    assert store.get("name") == b"value"


@pytest.mark.parametrize(
    "other",
    [
        {"RANK": "1"},
        {"WORLD_SIZE": "1"},
        {"TORCHELASTIC_USE_AGENT_STORE": "True"},
        {"GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.1.1"},  # the machine's own name, on Debian
        {"MASTER_ADDR": "192.0.2.1"},
    ],
)
def test_other_ranks_and_several_machines_do_not_create_a_store(meets, other: dict[str, str]):
    assert meets(free_port(), **other) is None


def test_if_the_port_is_taken_torch_reports_it(meets):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert meets(taken.getsockname()[1]) is None
