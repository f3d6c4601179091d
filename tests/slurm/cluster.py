"""A SLURM cluster of four virtual nodes on this machine: munged, slurmctld, four slurmd, private to one test session.

Partition cpu is what tests use; a job in urgent, on the same nodes, preempts those of cpu; calm, a node apart, is for
what takes long and goes on beside the tests.

Ports, sockets, logs and state are its own, in a scratch folder; a SLURM or munge of the machine's own is not touched.
The one thing outside is /etc/hosts: jax looks for the first node of a job by name, so that n1 to n4 must resolve. Lines
are added only where they are missing, and what was added is taken out again.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

NODES = ("n1", "n2", "n3", "n4")
CPUS = 4
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
HOSTS = Path("/etc/hosts")
MARK = "# recscale tests"
SEARCH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
KILL_WAIT = 30

# cred_expire: how long SLURM holds a requeued job back before it may start again: 5 is the least, 120 the default.
# config_overrides: the nodes have the size written here, whatever this machine has.
CONFIGURATION = """
ClusterName=recscale
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=cred_expire=5,socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=500000,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait={kill_wait}
MinJobAge=300
InactiveLimit=0
SlurmctldTimeout=300
SlurmdTimeout=300
SwitchType=switch/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
NodeName=n[1-4] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cpus} RealMemory=4000 State=UNKNOWN
PartitionName=cpu Nodes=n[1-3] Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=n[1-3] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=calm Nodes=n4 MaxTime=INFINITE State=UP PriorityTier=20 PreemptMode=OFF
"""


def missing() -> str:
    """What keeps a cluster from being started here: one line, "" for nothing."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=SEARCH) is None]
    if absent:
        return f"real SLURM: {', '.join(absent)} not found; .ci/install-slurm installs them (Debian, Ubuntu)"
    if unknown_nodes() and not os.access(HOSTS, os.W_OK):
        return f"real SLURM: {', '.join(unknown_nodes())} do not resolve, and {HOSTS} cannot be written: add 127.0.0.1"
    return ""


def unknown_nodes() -> list[str]:
    """Nodes whose names do not resolve, or only by the grace of another session of these tests."""
    lines = [line for line in HOSTS.read_text().splitlines() if MARK not in line]
    if all(any(node in line.split() for line in lines) for node in NODES):
        return []
    found = []
    for node in NODES:
        try:
            socket.gethostbyname(node)
        except OSError:
            found.append(node)
    return list(NODES) if any(MARK in line for line in HOSTS.read_text().splitlines()) else found


def _left_behind(line: str) -> bool:
    """Whether a line of the hosts file was added by a session that was killed."""
    _, mark, process = line.partition(MARK)
    return bool(mark) and not Path("/proc", process.strip()).exists()


def free_ports(count: int) -> int:
    """The first of `count` free ports in a row, below those that the system gives to outgoing connections."""
    for first in range(17100 + os.getpid() % 50 * 20, 30000, count):
        probes = [socket.socket() for _ in range(count)]
        try:
            for offset, probe in enumerate(probes):
                probe.bind(("0.0.0.0", first + offset))
            return first
        except OSError:
            continue
        finally:
            for probe in probes:
                probe.close()
    raise OSError("no free ports between 17100 and 30000")


class Cluster:
    """Start with `start()`, end with `stop()`; `environment` is what a command needs to speak with it."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="rs-slurm-", dir="/tmp"))  # short: the path of a socket is limited
        self.folder.chmod(0o755)  # munged wants its socket to be within everybody's reach
        self.environment = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": SEARCH}
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.hosts_line = ""

    def start(self) -> None:
        """Raises RuntimeError with the logs where a daemon ends or the nodes do not come up within a minute."""
        self._add_hosts()
        port = free_ports(1 + len(NODES))
        values = {
            "host": socket.gethostname().split(".")[0],
            "port": port,
            "first": port + 1,
            "last": port + len(NODES),
        }
        values |= {"user": getpass.getuser(), "folder": self.folder, "cpus": CPUS, "kill_wait": KILL_WAIT}
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(**values).lstrip())
        (self.folder / "state").mkdir(mode=0o700)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        paths = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *paths)
        self._wait(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            (self.folder / f"spool.{node}").mkdir()
            self._daemon("slurmd", "-D", "-N", node)
        self._wait(lambda: self.ask("sinfo", "-h", "-o", "%D %T") == f"{len(NODES)} idle", "the four nodes")

    def stop(self) -> None:
        """End every job and every daemon, and take back what was added to /etc/hosts. Safe to call twice."""
        if self.daemons:
            self.empty("cpu", "urgent", "calm")
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self.daemons):
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons.clear()
        if self.hosts_line:
            lines = HOSTS.read_text().splitlines(keepends=True)
            HOSTS.write_text("".join(line for line in lines if not _left_behind(line) and line != self.hosts_line))
            self.hosts_line = ""
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: str, check: bool = True, timeout: float = 60.0, **arguments) -> subprocess.CompletedProcess:
        """A command with the cluster's environment; its output as text."""
        arguments = {"env": self.environment, "capture_output": True, "text": True, "timeout": timeout} | arguments
        result = subprocess.run(command, **arguments)
        assert not check or result.returncode == 0, f"{' '.join(command)}: {result.stdout}{result.stderr}"
        return result

    def ask(self, *command: str) -> str:
        return self.run(*command, check=False).stdout.strip()

    def _daemon(self, program: str, *arguments: str) -> None:
        path = shutil.which(program, path=SEARCH)
        with (self.folder / "daemons.log").open("ab") as log:
            process = subprocess.Popen(
                [str(path), *arguments], env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.daemons.append(process)

    def batch(self, folder: Path, *options: str, seconds: float = 90.0) -> str:
        """Submit a batch job, wait for its end (sbatch --wait looks too seldom), and return what it wrote."""
        out = folder / "batch.out"
        job = self.run("sbatch", "--parsable", f"--output={out}", *options, cwd=Path.cwd()).stdout.strip()
        end = time.monotonic() + seconds
        while self.ask("squeue", "-h", f"--jobs={job}"):
            assert time.monotonic() < end, f"job {job}: waited {seconds} s\n{out.read_text()}"
            time.sleep(0.2)
        return out.read_text()

    def empty(self, *partitions: str) -> None:
        """Cancel whatever is in the queue of these partitions, without patience, and wait until it is gone."""
        end = time.monotonic() + 20
        while self.ask("squeue", "-h", f"--partition={','.join(partitions)}") and time.monotonic() < end:
            for partition in partitions:
                self.run("scancel", f"--partition={partition}", check=False)
                self.run("scancel", "--full", "--signal=KILL", f"--partition={partition}", check=False)
            time.sleep(0.2)

    def _wait(self, ready, what: str) -> None:
        end = time.monotonic() + 60
        while not ready():
            dead = [daemon.args for daemon in self.daemons if daemon.poll() is not None]
            if dead or time.monotonic() > end:
                logs = sorted(self.folder.glob("*.log"))
                tails = "\n".join(f"-- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)
                raise RuntimeError(f"{what} did not come up ({dead or 'waited 60 s'})\n{tails}")
            time.sleep(0.1)

    def _add_hosts(self) -> None:
        """A line of this session's own: another that ends meanwhile takes its line with it."""
        if unknown := unknown_nodes():
            self.hosts_line = f"127.0.0.1 {' '.join(unknown)} {MARK} {os.getpid()}\n"
            text = HOSTS.read_text()
            with HOSTS.open("a") as hosts:  # in place: in a container the file is often a mount of its own
                hosts.write(self.hosts_line if text.endswith("\n") or not text else "\n" + self.hosts_line)
