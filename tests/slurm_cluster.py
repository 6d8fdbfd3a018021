"""A cluster of Slurm on one machine, without systemd or cgroups: two nodes, and partitions `low` and `high`, of which
the latter preempts. Needs Debian's slurm-wlm and munge; all files, keys and ports are its own."""

import contextlib
import getpass
import os
import pathlib
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator

PROGRAMS = ("setpriv", "munged", "munge", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
GRACE = 120  # seconds between a preemption's SIGTERM and its SIGKILL
# config_overrides: the nodes may have more CPUs than the machine that they share.
CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={place}/munge.socket
CredType=cred/munge
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool-%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd-%n.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd-%n.log
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
JobRequeue=1
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={nodes[0]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName={nodes[1]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=low Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""


class Missing(Exception):
    """Why no cluster can be had here."""


class Cluster:
    """One that runs. environment: of the commands that ask it."""

    def __init__(self, place: pathlib.Path, nodes: tuple[str, str]):
        self.place, self.nodes = place, nodes
        self.environment = {"SLURM_CONF": str(place / "slurm.conf")}

    def ask(self, *words: str) -> str:
        """What a command of Slurm says."""
        told = subprocess.run(words, env=os.environ | self.environment, capture_output=True, text=True, timeout=60)
        if told.returncode:
            raise RuntimeError(f"{' '.join(words)}: {told.stdout}{told.stderr}")
        return told.stdout

    def job(self, number: int) -> dict[str, str]:
        """What Slurm knows of a job, by its own words: JobState, Reason, ExitCode, Restarts, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", str(number))))

    def until(self, happened: Callable[[], bool], told: Callable[[], str], timeout: float = 600) -> None:
        """Waits until `happened()`; fails with what `told()` says."""
        limit = time.monotonic() + timeout
        while not happened():
            assert time.monotonic() < limit, f"did not happen in {timeout:.0f} s: {told()}"
            time.sleep(0.1)

    def start_again(self, number: int) -> None:
        """Starts a job that was queued again at once: Slurm lets it wait for two minutes."""
        time.sleep(5)  # its credential of before must be gone, or the node is drained
        self.ask("scontrol", "update", f"jobid={number}", "StartTime=now")


@contextlib.contextmanager
def running(place: pathlib.Path) -> Iterator[Cluster]:
    """The cluster, until the block ends; its files lie in `place`. Raises Missing with the reason where none can be."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    programs = {name: shutil.which(name, path=path) for name in PROGRAMS}
    if missing := [name for name, found in programs.items() if not found]:
        raise Missing(f"there is no {', '.join(missing)}: apt-get install slurm-wlm munge")
    host = socket.gethostname()  # the first node is the one that tasks look for: its name must resolve
    try:
        socket.gethostbyname(host)
    except OSError as error:
        raise Missing(f"this host's name {host} does not resolve ({error})") from error
    place.mkdir(mode=0o755)
    (place / "state").mkdir()
    nodes = host, f"{host}b"
    settings = dict(place=place, user=getpass.getuser(), host=host, nodes=nodes, grace=GRACE, ports=_free_ports(3))
    (place / "slurm.conf").write_text(CONF.format(**settings))
    (place / "munge.key").write_bytes(os.urandom(128))
    (place / "munge.key").chmod(0o400)
    cluster, started = Cluster(place, nodes), []
    munge = [f"--{name}={place}/munge.{name.split('-')[0]}" for name in ("socket", "key-file", "pid-file", "seed-file")]
    commands = [
        [programs["munged"], "--foreground", "--force", *munge, f"--log-file={place}/munged.log"],
        [programs["slurmctld"], "-D", "-c"],
        *([programs["slurmd"], "-D", "-N", node] for node in nodes),
    ]
    try:
        for command in commands:
            with (place / "daemons.log").open("a") as log:
                environment = os.environ | cluster.environment | {"PATH": path}
                tied = ["setpriv", "--pdeathsig", "TERM", *command]  # none outlives a test that is killed
                started.append(subprocess.Popen(tied, stdout=log, stderr=log, env=environment))
            if command is commands[0]:
                _until(lambda: (place / "munge.socket").exists(), started, place)
        states = "sinfo", "-h", "-N", "-p", "low", "-o", "%t"
        _until(lambda: cluster.ask(*states).split() == ["idle", "idle"], started, place)
        yield cluster
    finally:
        if len(started) == len(commands) and started[1].poll() is None:
            with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
                cluster.ask("scancel", "--full", "--signal=KILL", f"--user={getpass.getuser()}")
        for daemon in reversed(started):
            daemon.terminate()
        for daemon in started:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _until(happened: Callable[[], bool], started: list[subprocess.Popen], place: pathlib.Path) -> None:
    """Waits for daemons, of which none may end."""
    limit, said = time.monotonic() + 60, ""
    while True:
        try:
            if happened():
                return
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            said = str(error)
        ended = [daemon.args[3] for daemon in started if daemon.poll() is not None]
        if ended or time.monotonic() > limit:
            logs = "".join(path.read_text()[-2000:] for path in sorted(place.glob("*.log")))
            raise Missing(f"the daemons of Slurm do not come up here ({ended or said}): {logs}")
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as open_ones:
        sockets = [open_ones.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
