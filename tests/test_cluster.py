"""Which processes the environment names, as JAX's own detectors find them, and what is said where they do not join."""

import contextlib
import os
import signal
import socket
import threading
import time

import commands
import pytest
import tiny
from jax._src import clusters
from jax._src.clusters import cloud_tpu_cluster

from lab import cluster, runtime
from lab.errors import UserError

ADDRESS = "localhost:1234"
HOSTS = [
    (dict(JAX_NUM_PROCESSES="two"), "JAX_NUM_PROCESSES = 'two' is no whole number"),
    (dict(JAX_NUM_PROCESSES="2.0"), "JAX_NUM_PROCESSES = '2.0' is no whole number"),
    (dict(JAX_NUM_PROCESSES=""), "JAX_NUM_PROCESSES = '' is no whole number"),
    (dict(JAX_NUM_PROCESSES="-1"), "JAX_NUM_PROCESSES = '-1' is no whole number"),
    (dict(JAX_NUM_PROCESSES="0"), "JAX_NUM_PROCESSES = 0 must be at least 1"),
    (dict(JAX_PROCESS_ID="zero"), "JAX_PROCESS_ID = 'zero' is no whole number"),
    (dict(JAX_PROCESS_ID=None), "JAX_PROCESS_ID = '' is no whole number; every process needs its own"),
    (dict(JAX_PROCESS_ID="²"), "JAX_PROCESS_ID = '²' is no whole number"),
    (dict(JAX_PROCESS_ID="2"), r"JAX_PROCESS_ID = 2 must lie in 0\.\.1"),
    (dict(JAX_PROCESS_ID=None, JOB_COMPLETION_INDEX="2"), r"JOB_COMPLETION_INDEX = 2 must lie in 0\.\.1"),
    (dict(JAX_COORDINATOR_ADDRESS="localhost"), "JAX_COORDINATOR_ADDRESS = 'localhost' is no host:port"),
    (dict(JAX_COORDINATOR_ADDRESS="localhost:port"), "is no host:port"),
    (dict(JAX_COORDINATOR_ADDRESS="localhost:99999"), "is no host:port"),
    (dict(JAX_COORDINATOR_ADDRESS="http://localhost:80"), "is no host:port"),
    (dict(JAX_COORDINATOR_ADDRESS=None), "JAX_NUM_PROCESSES = 2 means nothing without JAX_COORDINATOR_ADDRESS"),
]
SLURM = dict(
    SLURM_JOB_ID="4711", SLURM_STEP_NODELIST="n[001-002]", SLURM_NTASKS="2", SLURM_PROCID="1", SLURM_LOCALID="0"
)
MPI = dict(
    OMPI_MCA_orte_hnp_uri="1531576320.0;tcp://head-a,head-b:34911", OMPI_COMM_WORLD_SIZE="6",
    OMPI_COMM_WORLD_RANK="4", OMPI_COMM_WORLD_LOCAL_RANK="1", OMPI_COMM_WORLD_LOCAL_SIZE="3",
)  # fmt: skip
TPU = dict(TPU_WORKER_HOSTNAMES="t-0.lab,t-1.lab,t-2.lab,t-3.lab", TPU_WORKER_ID="2")
SLICES = dict(MEGASCALE_COORDINATOR_ADDRESS="s-0.lab:8080", MEGASCALE_NUM_SLICES="3", MEGASCALE_SLICE_ID="2")


def changed(environment: dict, changes: dict) -> dict:
    return {name: value for name, value in (environment | changes).items() if value is not None}


@pytest.mark.parametrize(("changes", "told"), HOSTS)
def test_hosts_that_are_named_wrongly_are_refused(changes, told):
    named = dict(JAX_COORDINATOR_ADDRESS=ADDRESS, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1")
    assert cluster.find(named) == cluster.Cluster("JAX's variables", ADDRESS, 2, 1)
    with pytest.raises(UserError, match=told) as error:
        cluster.find(changed(named, changes))
    assert "\n" not in str(error.value)


def test_hosts_that_are_not_named_are_one():
    alone = [{}, {"JAX_COORDINATOR_ADDRESS": ""}, {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}]
    assert [cluster.find(environment) for environment in alone] == [cluster.Cluster()] * 3
    for launched in (
        changed(SLURM, dict(SLURM_STEP_NODELIST="n1", SLURM_NTASKS="1", SLURM_PROCID="0")),
        changed(SLURM, dict(SLURM_STEP_NODELIST=None)),  # in the batch script
        dict(TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0"),
        dict(JOB_COMPLETION_INDEX="3"),  # of a job whose pods take a cell each
    ):
        assert (cluster.find(launched).address, cluster.find(launched).processes) == ("", 1)
    one = cluster.find({"JAX_COORDINATOR_ADDRESS": "[::1]:80", "JAX_PROCESS_ID": "0"})
    assert (one.address, one.processes, one.process) == ("[::1]:80", 1, 0)


@pytest.mark.parametrize(
    ("environment", "hosts"),
    [
        (SLURM, 2),
        (SLURM | dict(JAX_COORDINATOR_PORT="4321"), 2),
        (SLURM | dict(SLURM_STEP_NODELIST="node9,m[1-3]", SLURM_NTASKS="8", SLURM_LOCALID="1"), 4),
        (SLURM | dict(SLURM_STEP_NODELIST="gpu-a[007,010-011]"), 3),
        (MPI, 2),
        (MPI | dict(OMPI_MCA_orte_hnp_uri="1314521088.0;tcp6://[2001:db8::7,2001:db8::8]:43370"), 2),
        (TPU, 4),
        (TPU | SLICES, 12),
        (dict(TPU_PROCESS_ADDRESSES="t-0.lab:8476,t-1.lab:8476", TPU_WORKER_ID="1"), 2),
    ],
)
def test_a_cluster_is_the_one_that_jax_would_join(monkeypatch, environment, hosts):
    environment = environment | dict(SLURM_NTASKS="3") if "gpu-a" in str(environment) else environment
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster.BaseTpuCluster, "wait_for_coordinator", lambda *_: None)
    monkeypatch.setattr(cloud_tpu_cluster, "get_tpu_env_value", os.environ.get)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    given = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, [0], None, 1)
    found = cluster.find(environment)
    assert (found.address.replace("[", "").replace("]", ""), found.processes, found.process) == given[:3]
    assert found.hosts == hosts


def test_a_tpu_vm_asks_its_metadata(monkeypatch):
    told = {"agent-worker-number": "1", "worker-network-endpoints": "a:b:w0,a:b:w1", "tpu-env": "X: '1'"}
    monkeypatch.setattr(cluster.glob, "glob", lambda pattern: ["chip"] * pattern.startswith("/dev/accel"))
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (told[key], 200))
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    monkeypatch.setattr(cloud_tpu_cluster.BaseTpuCluster, "wait_for_coordinator", lambda *_: None)
    assert cluster.find({}) == cluster.Cluster("TPU VM", "w0:8482", 2, 1, 2)
    assert cluster.find({"JAX_PLATFORMS": "cpu"}) == cluster.Cluster()

    def unanswered(key):
        raise OSError("no such server")

    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", unanswered)
    assert cluster.find({}) == cluster.Cluster()


def test_an_address_is_taken_before_that_of_a_launcher():
    found = cluster.find(SLURM | dict(JAX_COORDINATOR_ADDRESS="other:99"))
    assert (found.kind, found.address, found.processes, found.process) == ("Slurm job 4711", "other:99", 2, 1)
    everything = dict(JAX_COORDINATOR_ADDRESS=ADDRESS, JAX_NUM_PROCESSES="4", JAX_PROCESS_ID="3")
    assert cluster.find(SLURM | everything) == cluster.Cluster("JAX's variables", ADDRESS, 4, 3)
    pod = dict(JAX_COORDINATOR_ADDRESS="lab-0:99", JAX_NUM_PROCESSES="4", JOB_COMPLETION_INDEX="3")
    assert cluster.find(pod).process == 3


@pytest.mark.parametrize(("environment", "told"), [
    (SLURM | dict(JAX_NUM_PROCESSES="4"), "JAX_NUM_PROCESSES = 4 contradicts Slurm job 4711, which says 2: unset it"),
    (SLURM | dict(JAX_PROCESS_ID="0"), "JAX_PROCESS_ID = 0 contradicts Slurm job 4711, which says 1"),
    (SLURM | dict(SLURM_PROCID="2"), r"SLURM_PROCID = 2 must lie in 0\.\.1 \(SLURM_NTASKS = 2\)"),
    (SLURM | dict(SLURM_NTASKS="1"), "SLURM_NTASKS = 1 contradicts the 2 nodes of SLURM_STEP_NODELIST"),
    (SLURM | dict(SLURM_LOCALID="1"), r"SLURM_LOCALID = 1 must lie in 0\.\.0: 1 tasks run on this node"),
    (SLURM | dict(SLURM_NTASKS="many"), "SLURM_NTASKS = 'many' is no whole number"),
    (SLURM | dict(SLURM_STEP_NODELIST=""), "SLURM_STEP_NODELIST = '' names no node"),
    (SLURM | dict(JAX_COORDINATOR_PORT="70000"), r"port 70000 must lie in 1\.\.65535: JAX_COORDINATOR_PORT sets it"),
    (SLURM | dict(JAX_COORDINATOR_ADDRESS="127.0.0.1:99"), "127.0.0.1:99 is every host's own, and Slurm job"),
    (SLURM | dict(JAX_COORDINATOR_ADDRESS="[::1]:99"), "is every host's own"),
    (SLURM | dict(JAX_COORDINATOR_ADDRESS=ADDRESS, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1"), "is every host's own"),
    (TPU | dict(TPU_WORKER_HOSTNAMES="localhost,t-1"), "TPU_WORKER_ID = 2 must lie in 0..1"),
    (dict(TPU_WORKER_HOSTNAMES="localhost,t-1", TPU_WORKER_ID="1"), "localhost:8482 is every host's own, and TPU"),
    (TPU | dict(TPU_WORKER_ID=None), "TPU_WORKER_ID = '' is no whole number"),
    (TPU | SLICES | dict(MEGASCALE_SLICE_ID="3"), r"MEGASCALE_SLICE_ID = 3 must lie in 0\.\.2"),
    (MPI | dict(OMPI_MCA_orte_hnp_uri=None), "Open MPI names no address of process 0: set JAX_COORDINATOR_ADDRESS"),
    (MPI | dict(OMPI_COMM_WORLD_RANK="6"), r"OMPI_COMM_WORLD_RANK = 6 must lie in 0\.\.5"),
])  # fmt: skip
def test_variables_that_contradict_each_other_are_one_line(environment, told):
    with pytest.raises(UserError, match=told) as error:
        cluster.find(changed(environment, {}))
    assert "\n" not in str(error.value)


def test_a_list_of_nodes_is_what_slurm_means():
    assert cluster._nodes("n[08-10,7],m,r[0-1]c[1-2]-x") == (
        ["n08", "n09", "n10", "n7", "m", "r0c1-x", "r0c2-x", "r1c1-x", "r1c2-x"]
    )


EIGHT = dict(CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7", SLURM_GPUS_ON_NODE="8")
ON_ONE = dict(SLURM_STEP_NODELIST="n1", SLURM_STEP_TASKS_PER_NODE="2", SLURM_NODEID="0", SLURM_LOCALID="1")


@pytest.mark.parametrize(("more", "devices"), [
    (EIGHT, None),  # a node's only task: all, where JAX alone takes the first
    (EIGHT | ON_ONE, (4, 5, 6, 7)),
    (EIGHT | ON_ONE | dict(SLURM_LOCALID="0"), (0, 1, 2, 3)),
    (ON_ONE | dict(CUDA_VISIBLE_DEVICES="5", SLURM_GPUS_ON_NODE="2"), None),  # bound to its own
    (ON_ONE | dict(SLURM_GPUS_ON_NODE="0", CUDA_VISIBLE_DEVICES=""), None),
    (EIGHT | dict(SLURM_NTASKS="3", SLURM_STEP_TASKS_PER_NODE="2,1", SLURM_NODEID="0"), (0, 1, 2, 3)),
    (EIGHT | dict(SLURM_NTASKS="3", SLURM_STEP_TASKS_PER_NODE="2,1", SLURM_NODEID="1"), None),
    (EIGHT | ON_ONE | dict(JAX_PLATFORMS="cpu"), None),
    (EIGHT | ON_ONE | dict(JAX_LOCAL_DEVICE_IDS="3"), None),
])  # fmt: skip
def test_every_gpu_of_a_node_is_used_once(more, devices):
    assert cluster.find(SLURM | more).devices == devices


def test_gpus_that_cannot_be_shared_are_refused(monkeypatch):
    with pytest.raises(UserError, match="3 tasks of a node cannot share its 8 GPUs: start one task on each node"):
        cluster.gpus(EIGHT, 0, 3)
    monkeypatch.setattr(cluster.glob, "glob", lambda pattern: [f"/dev/nvidia{n}" for n in range(4)])
    assert cluster.gpus({}, 1, 2) == (2, 3), "nobody says which are seen: those of the machine"


@contextlib.contextmanager
def listening(answer: bytes | None = None):
    """A port that takes connections, and says `answer` or nothing to them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        if answer is not None:

            def serve():
                with contextlib.suppress(OSError):
                    while True:
                        line, _ = server.accept()
                        with line:
                            line.recv(64)
                            line.sendall(answer)

            threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]


def unused() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_why_no_coordinator_answers(monkeypatch):
    monkeypatch.setattr(cluster, "ANSWER", 0.2)
    assert cluster.unreached("nowhere.invalid:99").startswith("host 'nowhere.invalid' (port 99) is unresolvable (")
    port = unused()
    assert cluster.unreached(f"127.0.0.1:{port}") == (
        f"127.0.0.1 port {port} is refused: nothing listens there (a loopback address: every host's own)"
    )
    with listening() as port:
        assert f"127.0.0.1 port {port} is silent: no answer in 0.2 s" in cluster.unreached(f"127.0.0.1:{port}")
    with listening(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        assert "answers, and is no coordinator" in cluster.unreached(f"127.0.0.1:{port}")
    with listening(bytes(3) + b"\x04" + bytes(5)) as port:
        assert cluster.unreached(f"localhost:{port}") == ""


def test_waiting_is_said_once_and_ends(monkeypatch):
    """The coordinator comes up while process 1 tries; then the others do not come."""
    monkeypatch.setattr(cluster, "PATIENT", 0)
    reasons, said, joined = iter(["is refused", "is refused", "is silent", ""]), [], []
    monkeypatch.setattr(cluster, "unreached", lambda address: next(reasons, ""))
    monkeypatch.setattr(cluster.time, "sleep", lambda seconds: None)
    monkeypatch.setattr("jax.distributed.initialize", lambda *given, **more: joined.append((given, more)))
    found = cluster.Cluster("Slurm job 1", "n1:99", 2, 1, 2, (4, 5))
    cluster.join(found, 5000, 100, said.append)
    assert [line.partition(": ")[2].partition(";")[0] for line in said] == ["is refused", "is silent"]
    assert said[0] == (
        "process 1 of 2 cannot reach the coordinator yet: is refused; it tries for 5000 s (run.join_timeout)"
    )
    ((given, more),) = joined
    assert given == ("n1:99", 2, 1, (4, 5)) and more["cluster_detection_method"] == "deactivate"
    assert more["initialization_timeout"] > 5000, "JAX aborts then"

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr("jax.distributed.initialize", lambda *given, **more: time.sleep(0) or never.wait(20))
    monkeypatch.setattr(cluster.os, "_exit", leave)
    never = threading.Event()
    with pytest.raises(SystemExit, match="2"):
        cluster.join(found, 1, 100, said.append)
    never.set()
    assert said[-2:] == [
        f"process 1 of 2 {told} not all 2 have come to n1:99{end}"
        for told, end in (
            ("waits for the others:", "; it goes on for 1 s in all (run.join_timeout)"),
            ("waited 1 s (run.join_timeout) for the others in vain:", ""),
        )
    ]


@pytest.mark.parametrize(
    "error", [ValueError("invalid literal for int(): 'x'\nmore"), KeyError("SLURM"), RuntimeError()]
)
def test_hosts_that_cannot_be_joined_are_one_line(monkeypatch, error):
    def fail(*arguments, **more):
        raise error

    monkeypatch.setattr(cluster, "find", lambda environment: cluster.Cluster("x", ADDRESS, 2, 1))
    monkeypatch.setattr(cluster, "unreached", lambda address: "")
    monkeypatch.setattr("jax.distributed.initialize", fail)
    monkeypatch.setattr("jax.config.update", lambda name, value: None)
    with pytest.raises(UserError, match="process 1 of 2 cannot join the others at") as told:
        runtime.start(tiny.config())
    assert "\n" not in str(told.value) and type(error).__name__ in str(told.value)


def test_a_worker_without_its_coordinator_ends_with_one_line(tmp_path):
    study = commands.write_study(tmp_path / "tiny.py", tmp_path / "none.jsonl", commands.ONE_CELL)
    port = unused()
    hosts = dict(JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1")
    arguments = f"--config={study}", f"--workdir={tmp_path / 'work'}", "--config.run.join_timeout=1"
    process = commands.finished("main", *arguments, log=tmp_path / "log", code=2, **hosts)
    assert process.err == (
        f"lab: process 1 of 2 could not reach the coordinator in 1 s (run.join_timeout): 127.0.0.1 port {port} is "
        "refused: nothing listens there (a loopback address: every host's own)\n"
    )


def test_a_stop_while_the_others_are_awaited_asks_to_be_run_again(tmp_path):
    study = commands.write_study(tmp_path / "tiny.py", tmp_path / "none.jsonl", commands.ONE_CELL)
    port = unused()
    hosts = dict(JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="0")
    with commands.started("main", f"--config={study}", log=tmp_path / "log", **hosts) as process:
        assert process.until(lambda: cluster.unreached(f"127.0.0.1:{port}") == ""), process.told()
        process.signal(signal.SIGTERM)
        assert process.wait(60) == 75, process.told()
    assert "Traceback" not in process.err
