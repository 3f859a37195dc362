"""A rank that trainers.warm forks equals one that `accelerate launch` starts; an unsafe fork is refused."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fakes import machine
from places import REPO
from ranks import kept_warm

from launcher.config import load_run
from launcher.plan.accelerate_config import build_accelerate_config, build_deepspeed_config
from launcher.plan.backend import resolve_backend
from launcher.plan.command import build_command
from launcher.plan.topology import free_port, resolve_topology
from launcher.supervise import warm_parent
from launcher.supervise.launches import WarmLaunch
from launcher.supervise.warm_parent import Refused, WarmParent
from trainers.rank.inherited import inherited
from trainers.rank.proc_stat import read_stat
from trainers.rank.protocol import WARM, AttemptFiles

THREADS = "3"  # threads of a rank: not the default of any machine
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
PROBE = """
import ctypes, json, os, signal, sys, time
from pathlib import Path
from trainers.rank.inherited import inherited

def main(argv):
    folder, code, seconds = Path(argv[0]), int(argv[1]), float(argv[2])
    threads = None
    if "PROBE_THREADS" in os.environ:
        import torch
        threads = torch.get_num_threads()
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    numbers = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
    facts = {
        "environ": dict(os.environ),
        "as C sees it": {name: getenv(name.encode()).decode() for name in os.environ},
        "argv": sys.argv,
        "path": list(dict.fromkeys(sys.path)),
        "folder": os.getcwd(),
        "threads": threads,
        "leads its session": os.getsid(0) == os.getpid(),
        "signals": {int(number): str(signal.getsignal(number)) for number in numbers},
        "blocked": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
        "inherited": inherited(),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }
    (folder / f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(facts))
    time.sleep(seconds)
    return code

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""
# Variables that only torchrun's agent sets for its workers, and why a forked rank does not need them.
AGENT = {
    "TORCHELASTIC_ERROR_FILE": "where the agent looks for a traceback; the launcher has rank-N.error.json",
    "TORCHELASTIC_SIGNALS_TO_HANDLE": "the signals that the agent itself handles",
    "TORCHELASTIC_USE_AGENT_STORE": "the agent holds the store; without one rank 0 makes it",
}
TWO = {"num_processes": 2}
# Variables that libraries set at import. Launched ranks have them too, but the probe imports none of them.
IMPORTS = {"PYTORCH_NVML_BASED_CUDA_CHECK": "deepspeed", "TORCHINDUCTOR_CACHE_DIR": "torch._inductor"}
DIFFERENT = AGENT | IMPORTS
ZERO = {**TWO, "distributed_backend": "deepspeed"}
CASES = {
    "single": {},
    "ddp": {**TWO, "distributed_backend": "ddp"},
    "fsdp": {**TWO, "distributed_backend": "fsdp"},
    "zero1": {**ZERO, "zero_stage": 1},
    "zero2": {**ZERO, "zero_stage": 2},
    "zero3": {**ZERO, "zero_stage": 3},
    "machine": {**TWO, "distributed_backend": "ddp", "num_machines": 2, "main_process_ip": "127.0.0.1"},
}


# Cases in which the probe reads torch's threads. accelerate sets none for DeepSpeed; torchrun then sets 1.
COUNTED = ("ddp", "zero1")


class Warm:
    """The launcher's side of the connection to one parent."""

    def __init__(self, environ: dict[str, str], *modules: str) -> None:
        self.environ = environ
        self.channel, theirs = socket.socketpair()
        self.channel.settimeout(90)
        argv = [sys.executable, "-m", "trainers.warm", str(theirs.fileno()), *modules]
        self.process = subprocess.Popen(
            argv, cwd=REPO, env=environ, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )
        theirs.close()
        self.lines = self.channel.makefile()
        assert self.read()["imported"] > 0

    def read(self) -> dict[str, Any]:
        """Return the next message. The socket to a spare is dropped, so the spare ends."""
        message: dict[str, Any] = json.loads(self.lines.readline())
        return self.read() if "spare" in message else message

    def start(self, arguments: list[str], **environ: str) -> dict[str, Any]:
        own = {name: value for name, value in self.environ.items() if name != "OMP_NUM_THREADS"}
        request = {"start": {"argv": arguments, "environ": own | environ}}
        self.channel.sendall(json.dumps(request).encode() + b"\n")
        return self.read()

    def finish(self, arguments: list[str], **environ: str) -> dict[int, int]:
        """Start ranks, wait until they end, and return rank -> exit code."""
        started = self.start(arguments, **environ)["started"]
        ends = [self.read()["exited"] for _ in started]
        return {end["rank"]: end["code"] for end in ends}

    def close(self) -> int:
        self.lines.close()
        self.channel.close()
        return self.process.wait(timeout=30)


@pytest.fixture(scope="module", autouse=True)
def listens() -> Iterator[None]:
    """Handle signals as in a terminal: a forked rank does not inherit what nohup or a shell's & ignores."""
    numbers = (signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    interrupt = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in {**before, signal.SIGINT: interrupt}.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of the launch and of the parent. `probe` is a module that their ranks can run."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "probe.py").write_text(PROBE)
    base = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return {**base, "PYTHONPATH": str(folder), "lower_case": "accelerate adds LOWER_CASE"}


@pytest.fixture(scope="module")
def parent(environ: dict[str, str]) -> Iterator[Warm]:
    warm = Warm(environ | {"OMP_NUM_THREADS": THREADS}, "probe", "deepspeed")
    yield warm
    assert warm.close() == 0


@pytest.fixture
def arguments(work: Path) -> Callable[..., list[str]]:
    """arguments("ddp", code=0, seconds=0, **flags): make the files, return the arguments of the launch."""
    port = free_port()

    def make(case: str, code: int = 0, seconds: float = 0, **flags: object) -> list[str]:
        given = {"trainer": "sft", "model": "model", "main_process_port": port, **CASES[case], **flags}
        run = load_run(None, {name: str(value) for name, value in given.items()})
        topology = resolve_topology(run.launch, machine(), {})
        chosen = resolve_backend(run, topology)
        folder = work / f"{case}-{topology.machine_rank}"
        folder.mkdir(exist_ok=True)
        deepspeed = folder / "deepspeed.json"
        deepspeed.write_text(json.dumps(build_deepspeed_config(chosen)))
        config = build_accelerate_config(chosen, topology, run.launch, deepspeed)
        (folder / "accelerate.yaml").write_text(yaml.safe_dump(config))
        argv = build_command(run, topology, chosen, AttemptFiles(folder))
        assert argv[:3] == LAUNCH
        argv[argv.index("--num_cpu_threads_per_process") + 1] = THREADS
        return [*argv[3:-2], "probe", str(folder), str(code), str(seconds)]

    return make


def facts_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return rank -> what its probe recorded, and delete the files."""
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("[0-9].json")}
    for rank in found:
        (folder / f"{rank}.json").unlink()
    return found


# Among the ZeRO stages only the name of a file differs.
RARE = ("zero2", "zero3")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in RARE else []) for case in CASES]
)
def test_a_forked_rank_equals_a_launched_rank(
    parent: Warm, environ: dict[str, str], arguments: Callable[..., list[str]], work: Path, case: str
) -> None:
    several = case == "machine"
    launches = [arguments(case, machine_rank=rank) for rank in (0, 1)] if several else [arguments(case)]
    folders = [work / f"{case}-{rank}" for rank in range(len(launches))]
    extra = {"PROBE_THREADS": "1"} if case in COUNTED else {}  # it costs an import of torch
    forked: dict[str, Any] = {}
    for argv, folder in zip(launches, folders, strict=True):
        assert set(parent.finish(argv, **extra).values()) == {0}
        forked |= facts_of(folder)
    running = [subprocess.Popen([*LAUNCH, *argv], cwd=REPO, env=environ | extra) for argv in launches]
    assert [process.wait(timeout=90) for process in running] == [0] * len(running)
    launched: dict[str, Any] = {}
    for folder in folders:
        launched |= facts_of(folder)

    assert set(forked) == set(launched) == ({"0"} if case == "single" else {"0", "1"})
    for rank, facts in forked.items():
        other = launched[rank]
        assert facts["leads its session"]
        if case != "single":  # the launched rank has an agent
            assert other["environ"]["TORCHELASTIC_USE_AGENT_STORE"] == "True"
            assert facts["environ"]["TORCHELASTIC_USE_AGENT_STORE"] == "False"
            assert other["leads its session"]
            assert facts["environ"]["RANK"] == rank
        for view in ("environ", "as C sees it"):
            mine, theirs = (
                {k: v for k, v in it[view].items() if k not in DIFFERENT} for it in (facts, other)
            )
            assert mine == theirs
        if case.startswith("zero"):
            assert facts["environ"]["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"
        for same in ("threads", "argv", "path", "folder", "signals", "blocked", "inherited", "descriptors"):
            assert facts[same] == other[same], same


def test_a_port_taken_meanwhile_is_not_used(
    parent: Warm, arguments: Callable[..., list[str]], work: Path
) -> None:
    port = free_port()
    ddp = arguments("ddp", main_process_port=port)
    machine_0 = arguments("machine", machine_rank=0, main_process_port=port)
    with socket.create_server(("127.0.0.1", port)):
        assert parent.finish(ddp) == {0: 0, 1: 0}
        ports = {facts["environ"]["MASTER_PORT"] for facts in facts_of(work / "ddp-0").values()}
        assert len(ports) == 1 and ports != {str(port)}
        assert f"port `{port}`" in parent.start(machine_0)["refused"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "import threading, time\nthreading.Thread(target=time.sleep, args=[60], daemon=True).start()",
            "threads",
        ),
        ("opened = open(__file__.replace('unsafe_module.py', 'dev/nvidia-uvm'), 'w')", "CUDA"),
    ],
)
def test_an_unsafe_fork_is_refused(
    environ: dict[str, str], arguments: Callable[..., list[str]], tmp_path: Path, text: str, reason: str
) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "unsafe_module.py").write_text(text)
    warm = Warm(environ | {"PYTHONPATH": f"{tmp_path}:{environ['PYTHONPATH']}"}, "unsafe_module")
    assert reason in warm.start(arguments("ddp"))["refused"]
    assert warm.close() == 0


def test_ranks_report_their_exit_and_are_killed_at_close(
    environ: dict[str, str], arguments: Callable[..., list[str]]
) -> None:
    warm = Warm(environ)
    assert warm.finish(arguments("ddp", code=3)) == {0: 3, 1: 3}
    lasting = arguments("ddp", seconds=600)
    pids = warm.start(lasting)["started"]
    os.kill(pids["1"], signal.SIGKILL)
    assert warm.read() == {"exited": {"rank": 1, "code": -signal.SIGKILL}}
    assert warm.start(lasting)["refused"] == "the last start has 1 rank left"
    os.kill(pids["0"], signal.SIGTERM)
    assert warm.read() == {"exited": {"rank": 0, "code": -signal.SIGTERM}}

    again = warm.start(lasting)["started"]
    warm.process.send_signal(signal.SIGUSR1)  # as SLURM does, to every process of a job
    warm.process.send_signal(signal.SIGTERM)
    assert warm.close() == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in again.values())


def test_ranks_do_not_outlive_their_parent(
    environ: dict[str, str], arguments: Callable[..., list[str]]
) -> None:
    warm = Warm(environ)
    pids = warm.start(arguments("ddp", seconds=600))["started"].values()
    watched = [os.pidfd_open(pid) for pid in pids]
    warm.process.kill()
    assert warm.close() == -signal.SIGKILL
    for descriptor in watched:
        assert select.select([descriptor], [], [], 10)[0]
        os.close(descriptor)


def no() -> bool:
    return False


def until_ended(launch: WarmLaunch) -> int:
    """Wait until the ranks have ended, and return the exit code of the launch."""
    while (code := launch.wait(30)) is None:
        pass
    return code


def lives(pid: int) -> bool:
    try:
        return read_stat(pid).state not in "ZX"
    except OSError:
        return False


@pytest.fixture
def started(environ: dict[str, str], work: Path) -> Iterator[WarmParent]:
    """A process that imports the libraries for this test."""
    parent = WarmParent("probe", False, environ, work / "warm.log", [])
    yield parent
    parent.close()


def test_a_spare_takes_over_from_a_killed_process(
    started: WarmParent,
    environ: dict[str, str],
    arguments: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    lasting = arguments("ddp", seconds=600)
    ended: set[int] = set()
    for others in (0, 1, 2):  # the spare of the spare takes over too
        launch = WarmLaunch(started, lasting, environ, no)
        assert capsys.readouterr().out.count("a spare of the killed process forks the ranks") == bool(others)
        forks = {read_stat(pid).parent for pid in launch.ranks().values()}
        assert len(forks) == 1 and not forks & ended
        pids = [*forks, *launch.ranks().values()]
        os.kill(pids[0], signal.SIGKILL)
        assert until_ended(launch) == -signal.SIGKILL
        assert not any(map(lives, pids)), "its ranks are there"
        ended |= forks
    launch = WarmLaunch(started, arguments("ddp", code=3), environ, no)
    assert until_ended(launch) == 3 and launch.exits() == {0: 3, 1: 3}
    last = {started.serving.watched, started.spare.watched}
    assert len(last) == 2
    watched = [os.dup(descriptor) for descriptor in last]
    started.close()
    for descriptor in watched:
        assert select.select([descriptor], [], [], 0)[0], "a process is left"
        os.close(descriptor)


def test_without_a_spare_a_killed_process_is_refused_and_its_ranks_end(
    started: WarmParent, environ: dict[str, str], arguments: Callable[..., list[str]]
) -> None:
    launch = WarmLaunch(started, arguments("ddp", seconds=600), environ, no)
    started.spare.end()
    os.kill(started.process.pid, signal.SIGKILL)
    assert until_ended(launch) == -signal.SIGKILL
    assert not started.take_over()
    with pytest.raises(Refused, match="the process that imports the libraries ended"):
        started.start(arguments("ddp"), environ, no)


@pytest.fixture(scope="module")
def kept(environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of launchers that share one kept process."""
    with kept_warm(tmp_path_factory.mktemp("kept"), environ, ["probe"]) as path:
        yield environ | {WARM: path}


def joined(environ: dict[str, str]) -> WarmParent:
    return WarmParent("probe", False, environ, Path("warm.log").resolve(), [])


def ends(parent: WarmParent, number: int) -> dict[int, int]:
    """Wait for the ends of `number` ranks, and return rank -> exit code."""
    found: dict[int, int] = {}
    while len(found) < number:
        for answer in parent.answers(30):
            found[answer["exited"]["rank"]] = answer["exited"]["code"]
    return found


def test_a_kept_process_serves_two_launchers_at_once(
    kept: dict[str, str], arguments: Callable[..., list[str]], work: Path
) -> None:
    assert stat.S_IMODE(Path(kept[WARM]).stat().st_mode) & 0o077 == 0, "other users can open the socket"
    one, two = joined(kept), joined(kept)
    assert one.process is two.process is None, "the libraries were imported again"
    try:
        pids = two.start(arguments("ddp", seconds=600), kept, lambda: False)
        one.start(arguments("fsdp", code=3), kept, lambda: False)
        assert ends(one, 2) == {0: 3, 1: 3}
        facts = facts_of(work / "fsdp-0")
        assert {fact["folder"] for fact in facts.values()} == {str(work)}
    finally:
        two.close()
        one.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())


def test_a_run_outlives_the_kept_process(
    environ: dict[str, str], arguments: Callable[..., list[str]], work: Path
) -> None:
    """The terminal of the kept process closes, and the run is in another one."""
    with kept_warm(work, environ, ["probe"]) as path:
        parent = joined(environ | {WARM: path})
        try:
            pids = parent.start(arguments("ddp", seconds=5), environ, lambda: False)
            credentials = parent.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            pid, _, _ = struct.unpack("3i", credentials)  # of the process that listens
            assert parent.process is None and pid != os.getpid()
            watched = os.pidfd_open(pid)
            os.kill(pid, signal.SIGHUP)
            assert select.select([watched], [], [], 30)[0]
            os.close(watched)
            assert ends(parent, len(pids)) == {0: 0, 1: 0}
        finally:
            parent.close()


# A launcher that starts ranks, then perhaps a child that still has the connections, and is killed.
LAUNCHER = """
import os, json, subprocess, sys
from pathlib import Path
from launcher.supervise.warm_parent import WarmParent

folder, lasts, argv = Path(sys.argv[1]), sys.argv[2] == "with a child", sys.argv[3:]
parent = WarmParent("probe", False, os.environ, folder / "warm.log", [])
assert (parent.process is None) == ("PHALANX_WARM" in os.environ), "the libraries were imported again"
pids = parent.start(argv, os.environ, lambda: False)
held = [parent.socket.fileno()]
if parent.process is not None:
    pids |= {"warm": parent.process.pid, "spare": parent.spare.pid}
    held += [parent.spare.connection.fileno()]
if lasts:
    child = subprocess.Popen(["sleep", "600"], pass_fds=held, stdout=subprocess.DEVNULL)
    pids["child"] = child.pid
print(json.dumps(pids), flush=True)
sys.stdin.read()
"""


def kill_a_launcher(environ: dict[str, str], work: Path, child: str, probes: list[str]) -> set[str]:
    """Start a launcher, kill it, and wait until all others have ended. Returns their names."""
    argv = [sys.executable, "-c", LAUNCHER, str(work), child, *probes]
    with subprocess.Popen(
        argv, cwd=REPO, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        pids: dict[str, int] = json.loads(launcher.stdout.readline())
        watched = {name: os.pidfd_open(pid) for name, pid in pids.items() if name != "child"}
        launcher.kill()
    for name, descriptor in watched.items():
        assert select.select([descriptor], [], [], 30)[0], name
        os.close(descriptor)
    if "child" in pids:
        os.kill(pids["child"], signal.SIGKILL)
    return set(watched)


@pytest.mark.parametrize("child", ["with a child", pytest.param("alone", marks=pytest.mark.slow)])
def test_nothing_outlives_a_launcher_that_is_killed(
    environ: dict[str, str], arguments: Callable[..., list[str]], work: Path, child: str
) -> None:
    """Not the spare either, whose parent is not the launcher."""
    ended = kill_a_launcher(environ, work, child, arguments("ddp", seconds=600))
    assert ended == {"0", "1", "warm", "spare"}


@pytest.mark.parametrize("child", ["with a child", "alone"])
def test_no_rank_of_a_kept_process_outlives_a_launcher_that_is_killed(
    kept: dict[str, str], arguments: Callable[..., list[str]], work: Path, child: str
) -> None:
    assert kill_a_launcher(kept, work, child, arguments("ddp", seconds=600)) == {"0", "1"}
    again = joined(kept)
    again.close()
    assert again.process is None, "the kept process does not serve the next launcher"


def test_ranks_of_a_kept_process_inherit_from_the_launcher(
    kept: dict[str, str], arguments: Callable[..., list[str]], work: Path
) -> None:
    """The kept process has the umask, limits, CPUs and niceness of another terminal."""
    cpu = max(os.sched_getaffinity(0))
    limits = f"umask 027; ulimit -Sn 333; ulimit -Sf 4444; ulimit -Hc 0; exec taskset -c {cpu} nice -n 3"
    argv = ["bash", "-c", f'{limits} {sys.executable} "$@"', "bash"]
    argv += ["-c", LAUNCHER, str(work), "alone", *arguments("ddp")]
    with subprocess.Popen(
        argv, cwd=REPO, env=kept, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as launcher:
        assert launcher.stdout is not None
        watched = [os.pidfd_open(pid) for pid in json.loads(launcher.stdout.readline()).values()]
        for descriptor in watched:
            assert select.select([descriptor], [], [], 60)[0]
            os.close(descriptor)
        launcher.communicate()
    found = facts_of(work / "ddp-0")
    assert set(found) == {"0", "1"}
    for facts in found.values():
        got = facts["inherited"]
        assert (got["umask"], got["cpus"], got["niceness"]) == (0o027, [cpu], 3)
        assert got["limits"]["RLIMIT_NOFILE"][0] == 333
        assert got["limits"]["RLIMIT_FSIZE"][0] == 4444 * 1024
        assert got["limits"]["RLIMIT_CORE"][1] == 0


def test_a_kept_process_refuses_a_limit_that_it_may_not_have(
    kept: dict[str, str], work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even root may open so many files."""
    wanted = inherited()
    wanted["limits"] |= {"RLIMIT_NOFILE": [64, 1 << 40]}
    monkeypatch.setattr(warm_parent, "inherited", lambda: wanted)
    parent = joined(kept)
    parent.close()
    assert parent.process is not None
    assert re.search(
        r"PHALANX_WARM: its limit RLIMIT_NOFILE is \d+ \d+, and cannot be 64 1099511627776 as here; the run "
        "imports the libraries itself",
        capsys.readouterr().out,
    )


def test_a_kept_process_refuses_another_import_environment(
    kept: dict[str, str], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = joined(kept | {"HF_HOME": str(work)})
    parent.close()
    assert parent.process is not None
    assert "PHALANX_WARM: its imports used other values of HF_HOME; the run imports the libraries itself" in (
        capsys.readouterr().out
    )


def test_without_the_kept_process_the_libraries_are_imported_again(
    environ: dict[str, str], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = joined(environ | {WARM: str(work / "gone")})
    parent.close()
    assert parent.process is not None
    assert "gone: No such file or directory; the run imports the libraries itself" in capsys.readouterr().out
