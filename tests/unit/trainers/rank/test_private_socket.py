"""A socket of one user: both sides check the place and the other side before a byte is sent."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from places import REPO
from users import OTHER, needs_root, script

from launcher.supervise import warm_parent
from trainers.config.errors import ConfigError
from trainers.rank.private_socket import LONGEST, accept, check_free, connect, listen, peer
from trainers.rank.protocol import WARM

# Says how many bytes the process that connects has sent, when that process has closed the connection.
COUNTS = """
print("ready")
channel, _ = listener.accept()
count = 0
while chunk := channel.recv(1 << 16):
    count += len(chunk)
print(count)
"""
# In place of subprocess in the launcher: the run does not start its own process.
NOTHING = SimpleNamespace(Popen=lambda *_, **__: SimpleNamespace(pid=0), DEVNULL=None, STDOUT=None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of mode 700 with a short path."""
    made = tmp_path / "own"
    made.mkdir(mode=0o700)
    return made


@pytest.fixture
def listening(folder: Path) -> Iterator[Callable[[], socket.socket]]:
    """`listening()` listens on `s` in the folder."""
    made = []

    def start() -> socket.socket:
        made.append(listen(folder / "s"))
        return made[-1]

    yield start
    for listener in made:
        listener.close()


def refusal(action: Callable[[Path], object], path: Path) -> str:
    with pytest.raises(ConfigError) as raised:
        action(path)
    return str(raised.value)


def test_two_processes_of_one_user_connect(folder: Path, listening: Callable[[], socket.socket]) -> None:
    listener = listening()
    with connect(folder / "s") as client:
        server = accept(listener)
        assert server is not None
        with server:
            assert peer(server) == peer(client) == (os.getpid(), os.geteuid())
            client.sendall(b"hello")
            assert server.recv(16) == b"hello"


def test_the_socket_is_only_for_this_user_even_if_the_umask_allows_more(
    folder: Path, listening: Callable[[], socket.socket]
) -> None:
    before = os.umask(0)
    try:
        listening()
        assert os.umask(0) == 0
    finally:
        os.umask(before)
    assert (folder / "s").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777, 0o2775])
def test_a_folder_that_others_can_write_to_is_refused_by_both_sides(
    folder: Path, listening: Callable[[], socket.socket], mode: int
) -> None:
    listening()
    folder.chmod(mode)
    for action in (connect, check_free, listen):
        assert f"other users can write to {folder} (mode {mode:o})" in refusal(action, folder / "s")


def test_a_sticky_folder_is_accepted(folder: Path, listening: Callable[[], socket.socket]) -> None:
    folder.chmod(0o1777)
    listener = listening()
    with connect(folder / "s") as client:
        server = accept(listener)
        assert server is not None
        server.close()
        assert peer(client)[1] == os.geteuid()


def test_the_folder_behind_a_link_is_checked(
    folder: Path, tmp_path: Path, listening: Callable[[], socket.socket]
) -> None:
    listening()
    (tmp_path / "link").symlink_to(folder)
    connect(tmp_path / "link" / "s").close()
    folder.chmod(0o777)
    assert f"other users can write to {folder}" in refusal(connect, tmp_path / "link" / "s")


def test_a_socket_that_others_can_open_is_refused(
    folder: Path, listening: Callable[[], socket.socket]
) -> None:
    listening()
    (folder / "s").chmod(0o666)
    assert "writable by other users (mode 666)" in refusal(connect, folder / "s")


@needs_root
def test_a_socket_or_folder_of_another_user_is_refused(
    folder: Path, listening: Callable[[], socket.socket]
) -> None:
    listening()
    os.chown(folder / "s", OTHER, OTHER)
    assert f"belongs to user {OTHER}" in refusal(connect, folder / "s")
    assert f"is a socket of user {OTHER}" in refusal(listen, folder / "s")
    os.chown(folder, OTHER, OTHER)
    for action in (connect, check_free, listen):
        assert f"{folder} belongs to user {OTHER}" in refusal(action, folder / "s")
    assert (folder / "s").exists()


@needs_root
def test_a_listener_of_another_user_gets_no_byte(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The socket and its folder look right; only the process is another user's. The run starts anyway."""
    monkeypatch.setattr(warm_parent, "subprocess", NOTHING)
    environ = {WARM: str(folder / "s"), "HF_TOKEN": "secret"}
    code = "listener = socket.socket(socket.AF_UNIX)\nlistener.bind('s')\nos.chmod('s', 0o600)\n"
    code += "become_another_user()\nlistener.listen()\n" + COUNTS
    with script(code, folder) as process, (folder / "lock").open("w") as lock:
        joined = warm_parent.WarmParent("probe", False, environ, folder / "log", [lock.fileno()])
        assert process.stdout is not None and process.stdout.readline() == b"0\n"
        joined.socket.close()
    assert f"PHALANX_WARM: a process of user {OTHER} listens on {folder / 's'}" in capsys.readouterr().err


@needs_root
def test_a_client_of_another_user_is_not_served(folder: Path, listening: Callable[[], socket.socket]) -> None:
    folder.chmod(0o1777)
    listener = listening()
    (folder / "s").chmod(0o666)  # as if the file system did not keep the mode
    code = "become_another_user()\nclient = socket.socket(socket.AF_UNIX)\nclient.connect('s')\n"
    code += "print('ready')\nprint(len(client.recv(1)))\n"
    with script(code, folder) as process:
        assert accept(listener) is None
        assert process.stdout is not None and process.stdout.readline() == b"0\n"


def make_file(path: Path) -> None:
    path.write_text("precious")


def make_link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def make_link_to_a_file(path: Path) -> None:
    (path.parent / "target").write_text("precious")
    path.symlink_to("target")


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (make_file, "a file"),
        (Path.mkdir, "a folder"),
        (os.mkfifo, "a pipe"),
        (make_link_to_nothing, "a link"),
        (make_link_to_a_file, "a link"),
    ],
)
def test_what_is_not_a_socket_stays(folder: Path, make: Callable[[Path], object], kind: str) -> None:
    make(folder / "s")
    before = os.lstat(folder / "s")
    for action in (check_free, listen):
        assert f"{folder / 's'} is {kind}. It is not removed" in refusal(action, folder / "s")
    assert os.lstat(folder / "s") == before


def test_a_socket_on_which_a_process_listens_stays(
    folder: Path, listening: Callable[[], socket.socket]
) -> None:
    listening()
    for action in (check_free, listen):
        assert f"process {os.getpid()} listens on {folder / 's'}" in refusal(action, folder / "s")
    connect(folder / "s").close()


def test_a_listener_with_a_full_queue_is_a_listener(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
        listener.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(str(folder / "s"))
            assert "a process listens" in refusal(listen, folder / "s")


def test_a_socket_of_another_kind_stays(folder: Path) -> None:
    """Such as /run/systemd/notify, to which messages are sent without a connection."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(folder / "s"))
        assert "is a socket of another program" in refusal(listen, folder / "s")
    assert (folder / "s").exists()


def test_a_socket_that_an_ended_process_left_is_replaced(
    folder: Path, listening: Callable[[], socket.socket]
) -> None:
    listening().close()
    assert (folder / "s").exists()
    with pytest.raises(ConnectionRefusedError):
        connect(folder / "s")
    check_free(folder / "s")
    listening()
    connect(folder / "s").close()


def test_of_several_that_start_at_once_one_listens(folder: Path) -> None:
    """A socket was left. If two could replace it, one of them would remove the socket of the other."""
    listen(folder / "s").close()
    listeners, refused = [], []

    def start() -> None:
        try:
            listeners.append(listen(folder / "s"))
        except ConfigError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(listeners) == 1 and len(refused) == 7
    connect(folder / "s").close()
    listeners[0].close()


def test_a_path_that_no_socket_can_have_is_refused(folder: Path) -> None:
    assert f"at most {LONGEST} bytes" in refusal(listen, folder / ("s" * LONGEST))
    assert f"{folder / 'gone'} is not a folder" in refusal(connect, folder / "gone" / "s")


def keep(path: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "trainers.warm", "--keep", str(path)]
    return subprocess.run(argv, cwd=REPO, text=True, capture_output=True)


def test_the_process_that_keeps_the_imports_refuses_a_path_in_one_line(folder: Path) -> None:
    make_file(folder / "s")
    done = keep(folder / "s")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: --keep {folder / 's'}: {folder / 's'} is a file. It is not removed; give another path.\n"
    )
    assert (folder / "s").read_text() == "precious"


def test_a_kept_process_that_gives_no_answer_is_not_waited_for(
    folder: Path,
    listening: Callable[[], socket.socket],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(warm_parent, "subprocess", NOTHING)
    monkeypatch.setattr(warm_parent, "ANSWER_SECONDS", 0.1)
    listening()
    joined = warm_parent.WarmParent("probe", False, {WARM: str(folder / "s")}, folder / "log", [])
    joined.socket.close()
    assert "PHALANX_WARM: it gave no answer for" in capsys.readouterr().out
