"""A real two-node SLURM on this machine: slurmctld, munged, and a slurmd in a network namespace a node.

    host  10.S.T.1 -- bridge --+-- 10.S.T.11  phx<id>n1  (own network, host name, /etc/hosts, disk)
                               +-- 10.S.T.12  phx<id>n2

Each node has a second interface that is not connected. S, T, the names and the port are random, so that
several clusters can run at once. With ipv6 the only addresses are fd00:S:T::11. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "ip", "nsenter", "unshare")
PATIENCE = 60.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def missing() -> str | None:
    """Return why a cluster cannot run here, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install slurm-wlm munge iproute2 util-linux)"
    if os.geteuid() != 0:
        return "starting a SLURM cluster needs root"
    probe = subprocess.run(["unshare", "--net", "--mount", "--uts", "true"], capture_output=True)
    return "network namespaces are not allowed here" if probe.returncode else None


@dataclass
class Job:
    """A job of a cluster, and the folder of its output."""

    cluster: Cluster
    folder: Path
    number: str

    @property
    def facts(self) -> dict[str, str]:
        words = self.cluster.ask("scontrol", "show", "job", "-o", self.number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    @property
    def state(self) -> str:
        return self.facts.get("JobState", "")

    @property
    def output(self) -> str:
        path = self.folder / f"phalanx-{self.number}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, condition: Callable[[], bool], what: str, patience: float = 240) -> None:
        """Wait for a condition; fail if the job ends before."""

        def is_met() -> bool:
            if condition():
                return True
            assert self.state not in ENDED, f"job {self.number}: {self.state}\n{self.output}"
            return False

        self.cluster.wait(is_met, f"job {self.number}: {what}\n{self.output}", patience)

    def end(self) -> tuple[str, int, str]:
        self.cluster.wait(lambda: self.state in ENDED, f"job {self.number} does not end\n{self.output}", 240)
        return self.state, int(self.facts["ExitCode"].split(":")[0]), self.output


class Cluster:
    """Two nodes of `cpus` cores. `up` starts them; `down` removes all processes, namespaces and links."""

    def __init__(self, cpus: int = 4, ipv6: bool = False) -> None:
        # Not below pytest's folder: munge needs a path that all users can traverse.
        self.root, self.cpus = Path(tempfile.mkdtemp(prefix="phalanx-slurm-")), cpus
        draw = random.SystemRandom()
        self.id = f"{draw.randrange(16**4):04x}"
        numbers = draw.randrange(64, 250), draw.randrange(1, 250)
        self.ipv6, self.bits = ipv6, 64 if ipv6 else 24
        self.net = "fd00:{}:{}::".format(*numbers) if ipv6 else "10.{}.{}.".format(*numbers)
        self.port = draw.randrange(30000, 32000)
        self.bridge = f"phx{self.id}"
        self.nodes = {f"phx{self.id}n{number}": f"{self.net}{10 + number}" for number in (1, 2)}
        self.conf = self.root / "etc" / "slurm.conf"
        self.disk = self.root / "disk"  # each node mounts its own disk here
        self.environ = dict(os.environ) | {"SLURM_CONF": str(self.conf)}

    def up(self) -> None:
        for name in ("etc", "run", "log", "state", "munge", "disk"):
            (self.root / name).mkdir(parents=True)
        self.root.chmod(0o755)
        self._write_files()
        self._network()
        key = self.root / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        key.parent.chmod(0o700)
        run, log = self.root / "run", self.root / "log"
        _call("munged", f"--key-file={key}", f"--socket={run}/munge", f"--pid-file={run}/munged.pid",
              f"--log-file={log}/munged.log", f"--seed-file={self.root}/munge/seed")  # fmt: skip
        _call("slurmctld", "-f", str(self.conf))
        for node in self.nodes:
            self._start_node(node)
        self.wait(
            lambda: self.ask("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", "the nodes are not idle"
        )

    def _write_files(self) -> None:
        host, root = socket.gethostname().split(".")[0], self.root
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={name} NodeAddr={address} Port={self.port + 1} CPUs={self.cpus} "
            "RealMemory=4000 Gres=gpu:8 State=UNKNOWN"
            for name, address in self.nodes.items()
        )
        self.conf.write_text(
            f"""\
ClusterName=phx{self.id}
SlurmctldHost={host}({self.net}1)
{"CommunicationParameters=EnableIPv6,DisableIPv4" if self.ipv6 else ""}
SlurmctldPort={self.port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/run/munge,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
GresTypes=gpu
JobRequeue=1
SlurmdTimeout=10
ReturnToService=2
MinJobAge=3600
KillWait=10
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2 MaxTime=INFINITE DefaultTime=10 State=UP
"""
        )
        # GPUs must be device files: with plain files CUDA_VISIBLE_DEVICES would stay empty.
        for number in range(8):
            os.mknod(root / "etc" / f"card{number}", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        (root / "etc" / "gres.conf").write_text(f"Name=gpu File={root}/etc/card[0-7]\n")
        (root / "etc" / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nConstrainDevices=no\n")
        hosts = [
            f"127.0.0.1 localhost {host}",
            *(f"{address} {name}" for name, address in self.nodes.items()),
        ]
        (root / "etc" / "hosts").write_text("\n".join(hosts) + "\n")

    def _network(self) -> None:
        _call("ip", "link", "add", self.bridge, "type", "bridge")
        self._address(self.net + "1", self.bridge)
        _call("ip", "link", "set", self.bridge, "up")
        for number, (name, address) in enumerate(self.nodes.items()):
            link = f"{self.bridge}v{number}"
            _call("ip", "netns", "add", name)
            _call("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
            _call("ip", "link", "set", link, "master", self.bridge, "up")
            _call("ip", "-n", name, "link", "set", "lo", "up")
            self._address(address, "eth0", name)
            _call("ip", "-n", name, "link", "set", "eth0", "up")
            _call("ip", "-n", name, "link", "add", "astray0", "type", "veth", "peer", "name", "astray1")
            _call("ip", "-n", name, "addr", "add", "192.168.77.1/24", "dev", "astray0")
            for end in ("astray0", "astray1"):
                _call("ip", "-n", name, "link", "set", end, "up")

    def _address(self, address: str, device: str, node: str | None = None) -> None:
        where = ("-n", node) if node else ()
        at_once = ("nodad",) if self.ipv6 else ()  # without a second of duplicate address detection
        _call("ip", *where, "addr", "add", f"{address}/{self.bits}", "dev", device, *at_once)

    def _start_node(self, name: str) -> None:
        (self.root / f"spool.{name}").mkdir(exist_ok=True)
        # slurmd 22.05 needs cgroups although no plugin uses them: mount an empty hierarchy in this namespace.
        inside = (
            'hostname "$1" && mount --bind "$2/etc/hosts" /etc/hosts && '
            'mount -t tmpfs none "$2/disk" && '
            "mount -t tmpfs none /sys/fs/cgroup && mkdir /sys/fs/cgroup/systemd && "
            'exec slurmd -N "$1" -f "$2/etc/slurm.conf"'
        )
        _call("nsenter", f"--net=/run/netns/{name}", "unshare", "--uts", "--mount", "bash", "-c", inside, "_",
              name, str(self.root))  # fmt: skip

    def ask(self, *argv: str) -> str:
        """Return the output of a SLURM command, or an empty string if it fails."""
        done = subprocess.run(argv, env=self.environ, text=True, capture_output=True, timeout=30)
        return done.stdout if done.returncode == 0 else ""

    def wait(self, condition, message: str, patience: float = PATIENCE) -> None:
        end = time.monotonic() + patience
        while not condition():
            assert time.monotonic() < end, f"{message}\n{self.ask('sinfo', '-N', '-l')}{self.logs()}"
            time.sleep(0.2)

    def submit(self, folder: Path, *argv: str, **environ: str) -> Job:
        """Run `sbatch argv` in a folder."""
        done = self.call(folder, "sbatch", "--parsable", *argv, **environ)
        assert done.returncode == 0, done.stderr
        return Job(self, folder, done.stdout.strip())

    def call(self, folder: Path, *argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run a command as a user does on the login node."""
        return subprocess.run(
            argv, cwd=folder, env=self.environ | environ, text=True, capture_output=True, timeout=60
        )

    def run(self, folder: Path, *argv: str, **environ: str) -> tuple[str, int, str]:
        """Submit a job, wait for its end, and return its state, exit code and output."""
        return self.submit(folder, *argv, **environ).end()

    def start_slurmd(self, name: str) -> None:
        """Start slurmd again after it was killed."""
        self._start_node(name)

    def kill_slurmd(self, name: str) -> None:
        os.kill(int((self.root / "run" / f"slurmd.{name}.pid").read_text()), signal.SIGKILL)

    def cut(self, name: str) -> None:
        """Take the node's link down. reconnect() brings it up again."""
        _call("ip", "link", "set", self._link(name), "down")

    def reconnect(self, name: str) -> None:
        _call("ip", "link", "set", self._link(name), "up")

    def _link(self, name: str) -> str:
        return f"{self.bridge}v{list(self.nodes).index(name)}"

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-2000:]}"
            for path in (self.root / "log").glob("*.log")
        )

    def down(self) -> None:
        pids = []
        for path in (self.root / "run").glob("*.pid"):
            with contextlib.suppress(OSError, ValueError):
                pids.append(int(path.read_text()))
        for name in self.nodes:
            pids += [int(pid) for pid in self.ask("ip", "netns", "pids", name).split()]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for name in self.nodes:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)
        shutil.rmtree(self.root, ignore_errors=True)


def _call(*argv: str) -> None:
    done = subprocess.run(argv, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
