"""The processes of one program on several hosts: who names them (Slurm, Open MPI, TPUs, variables), how they join.

JAX's own runtime joins them. What is done here is what it does not say: which of the variables it went by, and why a
process cannot reach process 0, the coordinator.
"""

import dataclasses
import glob
import ipaddress
import math
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping

from lab.errors import UserError

PATIENT = 15  # seconds that a coordinator may take to come up before a word is said
ANSWER = 5  # seconds in which it answers a connection
# HTTP/2, which its gRPC speaks: what a client begins with, an empty frame of settings, and the kind of such a frame
GREETING, SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5), 4


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes that this one is one of.

    kind: who named them. address: host:port of process 0; empty where there is nobody to join. hosts: how many, None
    where nobody says. devices: the GPUs that this process takes of those it sees; None: all.
    """

    kind: str = "no cluster"
    address: str = ""
    processes: int = 1
    process: int = 0
    hosts: int | None = None
    devices: tuple[int, ...] | None = None

    def __str__(self) -> str:
        hosts = f" on {self.hosts} host{'s' * (self.hosts > 1)}" if self.hosts else ""
        return f"{self.kind}: {self.processes} process{'es' * (self.processes > 1)}{hosts}"


def find(environment: Mapping[str, str]) -> Cluster:
    """What the environment says. JAX_COORDINATOR_ADDRESS is taken before the address that a launcher means.

    Raises UserError, naming the variable, for what names no process, variables that contradict each other, and a
    coordinator that only its own host can reach.
    """
    launched = next((found for of in (_open_mpi, _slurm, _tpu, _tpu_vm) if (found := of(environment))), None)
    found = _given(environment, launched or Cluster())
    if found.processes > 1 and not found.address:
        raise UserError(f"{found.kind} names no address of process 0: set JAX_COORDINATOR_ADDRESS to its host:port")
    if found.address:
        port = parts(found.address)[1]
        if not 0 < port < 2**16:
            raise UserError(f"the coordinator's port {port} must lie in 1..65535: JAX_COORDINATOR_PORT sets it")
    if (found.hosts or 1) > 1 and loopback(parts(found.address)[0]):
        raise UserError(
            f"the coordinator's address {found.address} is every host's own, and {found.kind} has {found.hosts} hosts: "
            "set JAX_COORDINATOR_ADDRESS to host:port of process 0 as the others reach it"
        )
    return found


def _given(environment: Mapping[str, str], launched: Cluster) -> Cluster:
    """What JAX's variables say, beside what a launcher does: an address alone, or everything."""
    address, names = environment.get("JAX_COORDINATOR_ADDRESS", ""), ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    named = {name: environment[name] for name in names if environment.get(name, "")}
    port = re.fullmatch(r"[^\s/]+:(\d{1,9})", address, re.ASCII)
    if address and not (port and 0 < int(port[1]) < 2**16):
        raise UserError(f"JAX_COORDINATOR_ADDRESS = {address!r} is no host:port of process 0, such as host-0:1234")
    if launched.processes > 1 and (not address or "JAX_PROCESS_ID" not in named):
        for name, ours in zip(names, (launched.processes, launched.process), strict=True):
            if name in named and _whole(environment, name) != ours:
                raise UserError(f"{name} = {named[name]} contradicts {launched.kind}, which says {ours}: unset it")
        return dataclasses.replace(launched, address=address or launched.address)
    if not address:
        if found := [name for name, value in named.items() if value not in ("0", "1")]:
            raise UserError(
                f"{found[0]} = {named[found[0]]} means nothing without JAX_COORDINATOR_ADDRESS: set it to the "
                "host:port of process 0, or unset both"
            )
        return launched if launched.processes > 1 else dataclasses.replace(launched, address="")
    indexed = "JOB_COMPLETION_INDEX" in environment and "JAX_PROCESS_ID" not in environment  # a pod of Kubernetes
    names = names[0], "JOB_COMPLETION_INDEX" if indexed else names[1]
    found = Cluster("JAX's variables", address, _whole(environment, names[0], "1"), _whole(environment, names[1]))
    if (found.processes, found.process) == (launched.processes, launched.process):
        found = dataclasses.replace(found, hosts=launched.hosts, devices=launched.devices)
    return _counted(found, *names)


def _counted(found: Cluster, processes: str, process: str) -> Cluster:
    if found.processes < 1:
        raise UserError(f"{processes} = {found.processes} must be at least 1")
    if found.process >= found.processes:
        raise UserError(
            f"{process} = {found.process} must lie in 0..{found.processes - 1} ({processes} = {found.processes})"
        )
    return found


def _slurm(environment: Mapping[str, str]) -> Cluster | None:
    """Of a step (srun): what runs in a batch script beside its steps is one process."""
    needed = ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if "SLURM_JOB_ID" not in environment:
        return None
    job = _whole(environment, "SLURM_JOB_ID")
    if not all(name in environment for name in needed):
        return Cluster(f"Slurm job {job}, without srun")
    processes, process, local = (_whole(environment, name) for name in needed[1:])
    nodes = _nodes(environment["SLURM_STEP_NODELIST"])
    if len(nodes) > processes:
        raise UserError(f"SLURM_NTASKS = {processes} contradicts the {len(nodes)} nodes of SLURM_STEP_NODELIST")
    here = _here(environment, -(-processes // len(nodes)))
    if local >= here:
        raise UserError(f"SLURM_LOCALID = {local} must lie in 0..{here - 1}: {here} tasks run on this node")
    on_node = _whole(environment, "SLURM_GPUS_ON_NODE", "0")
    port = environment.get("JAX_COORDINATOR_PORT") or job % 2**12 + 2**16 - 2**12  # as JAX chooses it
    return _counted(
        Cluster(
            f"Slurm job {job}", f"{nodes[0]}:{port}", processes, process, len(nodes),
            gpus(environment, local, here, on_node),
        ),
        "SLURM_NTASKS",
        "SLURM_PROCID",
    )  # fmt: skip


def _here(environment: Mapping[str, str], mostly: int) -> int:
    """Tasks of a step on this node: SLURM_STEP_TASKS_PER_NODE is 2(x3),1 for nodes of 2, 2, 2 and 1."""
    counts = [
        int(count)
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
        for _ in range(int(times or 1))
    ]
    node = environment.get("SLURM_NODEID", "")
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else mostly


def _nodes(listed: str) -> list[str]:
    """The names that Slurm's list means: n[01-03,7],m is n01, n02, n03, n7 and m."""
    found = []
    for each in re.findall(r"(?:[^,\[\]\s]|\[[\d,-]+\])+", listed):
        made = [""]
        for ranges, plain in re.findall(r"\[([^\]]+)\]|([^\[]+)", each):
            spans = [span.split("-") for span in ranges.split(",")] if ranges else []
            texts = [f"{n:0{len(low)}}" for low, *high in spans for n in range(int(low), int((high or [low])[0]) + 1)]
            made = [before + text for before in made for text in texts or [plain]]
        found += made
    if not found:
        raise UserError(f"SLURM_STEP_NODELIST = {listed!r} names no node")
    return found


def _open_mpi(environment: Mapping[str, str]) -> Cluster | None:
    if "OMPI_COMM_WORLD_SIZE" not in environment:
        return None
    names = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
    processes, process, local, here = (_whole(environment, name) for name in names)
    # Open MPI 4 says where it was launched, on the host of rank 0: 1531576320.0;tcp://HOST,HOST:34911
    uri = re.match(r"(\d+)\.\d+;tcp6?://\[?([^,\]]+?)(?:[,\]]|:\d+$)", environment.get("OMPI_MCA_orte_hnp_uri", ""))
    port = environment.get("JAX_COORDINATOR_PORT") or (uri and (int(uri[1]) >> 12) % 2**12 + 2**16 - 2**12)
    host = uri and (f"[{uri[2]}]" if ":" in uri[2] else uri[2])
    found = Cluster(
        "Open MPI", f"{host}:{port}" if host else "", processes, process, -(-processes // max(here, 1)),
        gpus(environment, local, here),
    )  # fmt: skip
    return _counted(found, *names[:2])


def _tpu(environment: Mapping[str, str]) -> Cluster | None:
    """Of what Kubernetes Engine sets in the pods of a slice, and of several slices."""
    listed = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if not listed:
        return None
    hosts = [parts(host)[0] for host in listed.split(",")]
    slices, number = (_whole(environment, name, default) for name, default in (
        ("MEGASCALE_NUM_SLICES", "1"), ("MEGASCALE_SLICE_ID", "0")
    ))  # fmt: skip
    if number >= slices:
        raise UserError(f"MEGASCALE_SLICE_ID = {number} must lie in 0..{slices - 1} (MEGASCALE_NUM_SLICES = {slices})")
    worker = _whole(environment, "TPU_WORKER_ID", "0" if len(hosts) == 1 else "")
    if worker >= len(hosts):
        raise UserError(f"TPU_WORKER_ID = {worker} must lie in 0..{len(hosts) - 1}: TPU_WORKER_HOSTNAMES = {listed}")
    first = parts(environment.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0])[0]
    port = environment.get("JAX_COORDINATOR_PORT") or 8482  # as JAX chooses it
    processes = slices * len(hosts)
    address = f"{first}:{port}" if processes > 1 else ""
    return Cluster("TPU", address, processes, number * len(hosts) + worker, slices * len(set(hosts)))


def _tpu_vm(environment: Mapping[str, str]) -> Cluster | None:
    """Of a TPU VM: its metadata server says which worker of the slice it is, and JAX knows how to ask."""
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    if not chips or "tpu" not in (environment.get("JAX_PLATFORMS") or "tpu"):
        return None
    from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster as VM  # nothing public tells without joining

    try:
        if not VM.is_env_present():
            return None
        processes, process = VM.get_process_count(), VM.get_process_id()
        port = environment.get("JAX_COORDINATOR_PORT")
        address = VM.get_coordinator_address(timeout_secs=ANSWER, override_coordinator_port=port)
    except (ImportError, OSError):  # chips that are not of a VM: there is no such server
        return None
    except RuntimeError as error:
        raise UserError(f"the metadata of this TPU VM name no coordinator that can be found ({error})") from error
    return Cluster("TPU VM", address if processes > 1 else "", processes, process, processes)


def gpus(environment: Mapping[str, str], local: int, tasks: int, on_node: int = 0) -> tuple[int, ...] | None:
    """Which of the GPUs that it sees the task `local` of a node takes; None: all, as a node's only task does.

    JAX alone gives every task the one of its number, and so a node's only task one GPU of eight. on_node: how many the
    step has on this node, if that is known; a task that sees fewer was bound to its own.
    """
    platforms = environment.get("JAX_PLATFORMS", "") or "cuda"
    if tasks < 2 or "JAX_LOCAL_DEVICE_IDS" in environment or not re.search("cuda|gpu", platforms):
        return None
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    seen = len(glob.glob("/dev/nvidia[0-9]*") if listed is None else [one for one in listed.split(",") if one])
    if not seen or seen < on_node:
        return None
    if seen % tasks:
        raise UserError(f"{tasks} tasks of a node cannot share its {seen} GPUs: start one task on each node")
    share = seen // tasks
    return tuple(range(local * share, (local + 1) * share))


def _whole(environment: Mapping[str, str], name: str, default: str = "") -> int:
    text = environment.get(name, default)
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        own = "; every process needs its own JAX_PROCESS_ID, from 0 on" if name.startswith("JAX_") else ""
        raise UserError(f"{name} = {text!r} is no whole number{own}")
    return int(text)


def parts(address: str) -> tuple[str, int]:
    """Host and port of host:port, and port 0 of a host alone; an IPv6 host stands in brackets."""
    host, port = re.fullmatch(r"(\[[^\]]*\]|[^:]*|.*?)(?::(\d+))?", address, re.ASCII).groups()
    return host.strip("[]"), int(port or 0)


def loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def unreached(address: str) -> str:
    """Why no coordinator answers at host:port, in words; empty where one does."""
    host, port = parts(address)
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return f"host {host!r} (port {port}) is unresolvable ({getattr(error, 'strerror', None) or error})"
    at = f"{host} port {port}" + (f", which is {places[0][4][0]}," if places[0][4][0] != host else "")
    own = " (a loopback address: every host's own)" if loopback(places[0][4][0]) else ""
    try:
        with socket.create_connection((host, port), ANSWER) as line:
            line.sendall(GREETING)
            answer = line.recv(9)
    except ConnectionRefusedError:
        return f"{at} is refused: nothing listens there{own}"
    except TimeoutError:
        return f"{at} is silent: no answer in {ANSWER} s{own}"
    except OSError as error:
        return f"{at} is unreachable ({error.strerror or error}){own}"
    return "" if answer[3:4] == bytes([SETTINGS]) else f"{at} answers, and is no coordinator{own}"


def join(found: Cluster, patience: int, heartbeat: int, say: Callable[[str], None] | None = None) -> None:
    """Joins the other processes. What keeps a process waiting is said; after `patience` seconds it ends the process.
    heartbeat: seconds without a word from a process after which the lab ends the program; JAX's own end comes later.

    Raises UserError for a coordinator that is not reached in that time, and for what JAX refuses.
    """
    import jax

    say = say or (lambda text: print(f"lab: {text}", file=sys.stderr, flush=True))
    me, begun = f"process {found.process} of {found.processes}", time.monotonic()
    left = lambda: patience - (time.monotonic() - begun)  # noqa: E731
    told = ""
    while found.process and (wrong := unreached(found.address)):
        if left() <= 0:
            raise UserError(f"{me} could not reach the coordinator in {patience} s (run.join_timeout): {wrong}")
        if wrong != told and time.monotonic() - begun >= PATIENT:
            say(f"{me} cannot reach the coordinator yet: {wrong}; it tries for {patience} s (run.join_timeout)")
            told = wrong
        time.sleep(min(1, max(left(), 0)))
    failed = []

    def initialize() -> None:
        try:
            jax.distributed.initialize(
                found.address, found.processes, found.process, found.devices, cluster_detection_method="deactivate",
                # JAX's own ends are aborts that name no host: ours come first.
                initialization_timeout=math.ceil(left()) + 600, heartbeat_timeout_seconds=2 * heartbeat,
            )  # fmt: skip
        except Exception as error:  # of the network, and of what JAX reads in further variables
            failed.append(error)

    # In a thread, so that signals and our own patience reach this one.
    joining = threading.Thread(target=initialize, daemon=True)
    joining.start()
    joining.join(min(2 * PATIENT, left()))
    if joining.is_alive():
        say(f"{me} waits for the others: {_missing(found)}; it goes on for {patience} s in all (run.join_timeout)")
        joining.join(max(left(), 0))
    if joining.is_alive():  # left without JAX's own end, which waits for the others again
        say(f"{me} waited {patience} s (run.join_timeout) for the others in vain: {_missing(found)}")
        os._exit(2)
    if failed:
        said = (str(failed[0]).strip().splitlines() or [""])[0]
        raise UserError(
            f"{me} cannot join the others at {found.address}: {type(failed[0]).__name__}: {said}"
        ) from failed[0]


def _missing(found: Cluster) -> str:
    return unreached(found.address) or f"not all {found.processes} have come to {found.address}"
