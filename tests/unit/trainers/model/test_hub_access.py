"""A model in the cache of the hub is loaded also if connections to the hub hang."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, is_offline_mode

from trainers.config.schema import TrainConfig
from trainers.model import hub_access
from trainers.model.hub_access import ask_again, use_cache_if_silent
from trainers.model.source import model_config
from trainers.model.tokenizer import load_tokenizer

Hub = Callable[[bytes], list[socket.socket]]
CONFIG = TrainConfig(model="org/tiny", data_path="rows", chat_template="tokenizer")


@pytest.fixture
def hub(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[bytes], list[socket.socket]]]:
    """`hub(answer)`: a hub that gives this answer to each request, or none. Returns its connections.

    The cache has the model org/tiny.
    """
    folder = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(tiny_model, folder / "snapshots" / ("a" * 40))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    listener = socket.create_server(("127.0.0.1", 0))
    connections: list[socket.socket] = []

    def start(answer: bytes) -> list[socket.socket]:
        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                connections.append(connection)
                connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        return connections

    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(hub_access.OFFLINE, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    yield start
    ask_again()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    for connection in connections:
        connection.close()


def test_a_hub_that_does_not_answer_is_asked_once(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    connections = hub(b"")
    use_cache_if_silent(CONFIG)
    assert f"{constants.ENDPOINT} does not answer (" in capsys.readouterr().err
    assert is_offline_mode() and os.environ[hub_access.OFFLINE] == "1"  # else the next lines may hang
    tokenizer, _ = load_tokenizer(CONFIG)
    assert len(tokenizer) > 0 and model_config("org/tiny", CONFIG).model_type == "llama"
    assert len(connections) == 1
    ask_again()
    assert not is_offline_mode() and hub_access.OFFLINE not in os.environ


@pytest.mark.parametrize("status", [b"200 OK", b"500 Internal Server Error"])
def test_a_hub_that_answers_anything_is_used(hub: Hub, status: bytes) -> None:
    connections = hub(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")
    use_cache_if_silent(CONFIG)
    assert len(connections) == 1 and not is_offline_mode()


@pytest.mark.parametrize("values", [{"model": "org/other"}, {"model_ref": "org/other"}, {"revision": "v1"}])
def test_without_cached_files_the_library_asks(hub: Hub, values: dict[str, str]) -> None:
    connections = hub(b"")
    use_cache_if_silent(CONFIG.model_copy(update=values))
    assert connections == [] and not is_offline_mode()


def test_an_offline_mode_of_the_user_stays(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    connections = hub(b"")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    use_cache_if_silent(CONFIG)
    ask_again()
    assert connections == [] and is_offline_mode()
