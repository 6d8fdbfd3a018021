"""The scripts of launch/: what each would do, and that shells, Slurm and Kubernetes would take it."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import commands
import jsonschema
import kubernetes_validate
import pytest
import yaml

from lab import cluster, command
from lab.study.open import open as open_study
from lab.study.run import runs

LAUNCH = commands.REPOSITORY / "launch"
SCRIPTS = sorted(LAUNCH.rglob("*.sh"))
STUDY = "--config=configs/rope_ablation.py:gpu"
AWKWARD = [STUDY, '--config.study.name=it\'s $HOME & "more"\\']
POD = dict(ZONE="us-west4-a", SHARED="", TYPE="v5litepod-16", VERSION="v2-alpha-tpuv5-lite")
GKE = dict(IMAGE="europe-docker.pkg.dev/lab/lab:1", CLAIM="results")


def ran(script: str, *arguments: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess:
    """launch/<script>, on its own: no Slurm, no gcloud and no kubectl are there."""
    settings = {"PATH": os.environ["PATH"], "PYTHON": sys.executable} | environment
    told = subprocess.run(
        [LAUNCH / script, *arguments], capture_output=True, text=True, env=settings, cwd=LAUNCH.parent
    )
    assert told.returncode == code, told.stdout + told.stderr
    return told


def test_shellcheck_finds_nothing():
    found = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, "make .venv/.tests installs it"
    assert {"local.sh", "slurm.sh", "tpu_pod.sh", "submit.sh"} <= {path.name for path in SCRIPTS}
    told = subprocess.run([found, *SCRIPTS, commands.REPOSITORY / ".ci" / "run"], capture_output=True, text=True)
    assert told.returncode == 0, told.stdout


def test_scripts_are_short():
    for path in SCRIPTS:
        assert len(path.read_text().splitlines()) < 100 and os.access(path, os.X_OK), path


def test_local_processes_share_the_gpus(tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '0\\n1\\n2\\n3\\n'\n")
    smi.chmod(0o755)
    path = dict(PATH=f"{tmp_path}:{os.environ['PATH']}")
    shares = [re.findall(r"IDS=(\S+)", ran("local.sh", "--dry-run", "2", STUDY, **path, **more).stdout) for more in (
        {}, dict(CUDA_VISIBLE_DEVICES="6,7"), dict(JAX_PLATFORMS="cpu"), dict(CUDA_VISIBLE_DEVICES=""),
    )]  # fmt: skip
    assert shares == [["0,1", "2,3"], ["0", "1"], [], []]
    told = ran("local.sh", "--dry-run", "3", STUDY, code=2, **path).stderr
    assert told.startswith("launch/local.sh: 3 processes cannot share 4 GPUs") and told.count("\n") == 1


def test_local_processes():
    assert ran("local.sh", "2", "--dry-run", *AWKWARD, PORT="1234", PYTHON="py", DEVICES="4").stdout == "".join(
        f"JAX_COORDINATOR_ADDRESS=127.0.0.1:1234 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID={process} JAX_NUM_CPU_DEVICES=4 "
        f'py -m lab.main {STUDY} --config.study.name=it\\\'s\\ \\$HOME\\ \\&\\ \\"more\\"\\\\ &\n'
        for process in (0, 1)
    )


PROCESS = """#!/bin/bash
echo "host h$JAX_PROCESS_ID, at step 7" >"$LAB_PROGRESS/$JAX_PROCESS_ID"
trap 'exit 75' TERM
sleep 0.4  # the other has begun
eval "$(cat "$ACTS/$JAX_PROCESS_ID")"
"""
SAYS = 'echo "process 1 of 2 on h1 stands still" >"$LAB_PROGRESS/0"; '
WAITS = "while :; do sleep 0.1; done"
KILLED = "ended with code 137: killed by signal 9; host"
ENDS = {  # what processes 0 and 1 do; the code, and the last line
    "one is killed": (WAITS, "kill -9 $$", 137, f"1 {KILLED} h1, at step 7"),
    "of the coordinator": ("kill -9 $$", "sleep 0.2; exit 134", 137, f"0 {KILLED} h0, at step 7"),
    "another is aborted before": (
        "trap '' TERM; sleep 0.5; kill -9 $$", "sleep 0.2; exit 134", 137, f"0 {KILLED} h0, at step 7"
    ),
    "one tells of a process that stands still": (
        f"sleep 0.2; {SAYS} exit 69", f"trap '' TERM; {WAITS}", 69,
        "0 ended with code 69: process 1 of 2 on h1 stands still",
    ),
    "both stop": ("exit 75", "sleep 0.2; exit 75", 75, ""),
    "one stops before it joins": ("exit 75", WAITS, 75, ""),
    "all is well": ("exit 0", "sleep 0.2; exit 0", 0, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_who_ended_first_is_said_last(tmp_path, name):
    """Of processes that end as those of lab.main do; the directory of what they say is gone in the end."""
    *acts, code, told = ENDS[name]
    python = tmp_path / "python"
    python.write_text(PROCESS)
    python.chmod(0o755)
    for number, act in enumerate(acts):
        (tmp_path / str(number)).write_text(act)
    (tmp_path / "told").mkdir()
    more = dict(PYTHON=str(python), PORT="1", JAX_PLATFORMS="cpu", ACTS=str(tmp_path), TMPDIR=str(tmp_path / "told"))
    last = f"launch/local.sh: process {told}" if told else ""
    assert ran("local.sh", "2", STUDY, code=code, **more).stderr.strip().rpartition("\n")[2] == last
    assert not any((tmp_path / "told").iterdir())


JOB = """\
sbatch {options} <<'JOB'
#!/usr/bin/env bash
#SBATCH --job-name=lab --ntasks-per-node=1 --requeue --open-mode=append --signal=TERM@120
trap : TERM
cd {folder}
limit=$(squeue -h -o %l -j "$SLURM_JOB_ID")
if [[ $limit == [1-3]:?? ]]; then
  echo "lab: job $SLURM_JOB_ID ended with code 2: it has $limit minutes, and is stopped up to 3 before its end: \
--time=4 or more"
  exit 2
fi
[[ -z ${{SLURM_CPUS_PER_TASK:-}} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
export LAB_PROGRESS=$PWD/runs/.job-$SLURM_JOB_ID
mkdir -p "$LAB_PROGRESS"
code=0 errors=$(mktemp)
exec 3> >(trap '' TERM; exec tee "$errors" >&2); tee=$!
srun --kill-on-bad-exit=0 --wait=60 --gpu-bind=none py -m lab.main {arguments} 2>&3 || code=$?
exec 3>&-; wait $tee
died=$(grep -m1 '^srun: error: .*: task' "$errors"; rm "$errors")
if ((code != 0 && code != 75)); then
  (cd "$LAB_PROGRESS" && ls -t | while read -r task; do echo "lab: task $task: $(<"$task")"; done)
fi
rm -rf "$LAB_PROGRESS"
echo "lab: job $SLURM_JOB_ID ended with code $code${{died:+ (first: ${{died#srun: error: }})}}"
if ((code == 75)); then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
JOB
"""


@pytest.mark.parametrize(
    ("options", "more"),
    [("--nodes=4 --gpus-per-node=8", ""), ("--array=1-16%4 --gpus=1", " --cells=$SLURM_ARRAY_TASK_ID/16")],
)
def test_a_job_of_slurm(options, more):
    told = ran("slurm.sh", "--dry-run", *options.split(), "--", STUDY, PYTHON="py").stdout
    assert told == JOB.format(options=options, folder=commands.REPOSITORY, arguments=STUDY + more)


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True), (137, False)])
def test_a_job_that_stopped_is_queued_again(tmp_path, code, requeued):
    """The job as bash runs it, beside a srun that notes its arguments. Its last line names the task that died first."""
    died = 'echo "srun: error: n2: task 1: Killed\nsrun: error: n1: task 0: Killed" >&2; ' if code == 137 else ""
    for name, script in (
        (
            "srun",
            f'printf "%s\\n" "$@" >"{tmp_path}/srun-arguments"; echo "host b, at step 8" >"$LAB_PROGRESS/1"; '
            f'touch -d "10 seconds ago" "$LAB_PROGRESS/1"; echo "last words" >"$LAB_PROGRESS/0"; {died}exit {code}',
        ),
        ("scontrol", f'echo "$@" >"{tmp_path}/scontrol-arguments"'),
        ("squeue", "echo UNLIMITED"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    told = ran("slurm.sh", "--array=1-3", "--dry-run", "--", *AWKWARD).stdout.splitlines()
    where = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    job = "\n".join(told[1:-1])
    done = subprocess.run(["bash", "-c", job], env=where, capture_output=True, text=True)
    assert done.returncode == code and done.stderr.count("Killed") == 2 * bool(died)
    words = ["lab: task 0: last words", "lab: task 1: host b, at step 8"] if code not in (0, 75) else []
    ends = f"lab: job 7 ended with code {code}{' (first: n2: task 1: Killed)' * bool(died)}"
    assert done.stdout.splitlines() == [*words, ends]
    assert not (LAUNCH.parent / "runs" / ".job-7").exists()
    assert (tmp_path / "srun-arguments").read_text().splitlines()[-4:] == ["lab.main", *AWKWARD, "--cells=2/3"]
    asked = tmp_path / "scontrol-arguments"
    assert asked.exists() == requeued and (not requeued or asked.read_text() == "requeue 7\n")


@pytest.mark.parametrize("limit", ["1:00", "3:30", "4:00", "1:00:00", "UNLIMITED"])
def test_a_job_that_would_be_stopped_as_it_starts_runs_nothing(tmp_path, limit):
    for name, script in (
        ("srun", f'touch "{tmp_path}/ran"'),
        ("squeue", f'[ "$*" = "-h -o %l -j 7" ] && echo {limit}'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    job = "\n".join(ran("slurm.sh", "--dry-run", "--", STUDY).stdout.splitlines()[1:-1])
    where = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", "-c", job], env=where, capture_output=True, text=True)
    short = limit in ("1:00", "3:30")
    assert (tmp_path / "ran").exists() != short and done.returncode == 2 * short
    told = f"2: it has {limit} minutes, and is stopped up to 3 before its end: --time=4 or more" if short else "0"
    assert done.stdout == f"lab: job 7 ended with code {told}\n"


@pytest.mark.parametrize(("time", "refused"), [
    *((short, True) for short in ("1", "3", "03", "2:00", "0:03:00", "00:01:00")),
    *((long, False) for long in ("0", "4", "30", "10", "3:00:00", "1-00", "1-0:2", "0:30:00", "UNLIMITED")),
])  # fmt: skip
def test_times_too_short_to_get_anywhere_are_refused(time, refused):
    told = ran("slurm.sh", "--dry-run", f"--time={time}", "--", STUDY, code=2 * refused)
    says = f"a job is stopped up to 3 minutes before its end: --time=4 or more, not --time={time}"
    assert told.stderr.startswith(f"launch/slurm.sh: {says}; usage: ") if refused else f"--time={time}" in told.stdout


def test_a_slice_of_a_pod(tmp_path):
    def told(*arguments, **more):
        return ran("tpu_pod.sh", "--dry-run", *arguments, **POD | more).stdout

    assert told("create", "s-1", "--preemptible") == (
        "gcloud compute tpus tpu-vm create s-1 --zone=us-west4-a --accelerator-type=v5litepod-16 "
        "--version=v2-alpha-tpuv5-lite --preemptible \n"
    )
    assert told("queue", "s-1", "--spot") == (
        "gcloud compute tpus queued-resources create s-1 --node-id=s-1 --zone=us-west4-a "
        "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot \n"
    )
    assert told("fetch", "s-1", "rope_ablation").splitlines() == [
        "mkdir -p runs ",
        "gcloud compute tpus tpu-vm scp --recurse s-1:lab/runs/rope_ablation runs --zone=us-west4-a --worker=0 ",
    ]
    assert told("delete", "s-1") == "gcloud compute tpus tpu-vm delete s-1 --zone=us-west4-a --quiet \n"
    archive, copied, removed, run = told("run", "s-1", *AWKWARD, SHARED="nfs-0:/lab").splitlines()
    assert archive == "git archive --output=lab-s-1.tar.gz HEAD " and removed == "rm lab-s-1.tar.gz "
    assert copied == "gcloud compute tpus tpu-vm scp lab-s-1.tar.gz s-1: --zone=us-west4-a --worker=all "
    words = subprocess.run(["bash", "-c", f'printf "%s\\0" {run}'], capture_output=True, text=True).stdout.split("\0")
    assert words[:-2] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "s-1", "--zone=us-west4-a", "--worker=all"]
    remote = words[-2].removeprefix("--command=")
    assert "mount -t nfs nfs-0:/lab runs" in remote and "mount" not in told("run", "s-1", STUDY)
    subprocess.run(["bash", "-n"], input=remote, text=True, check=True)
    # Where the shared directory cannot be mounted, nothing is trained on disks that nobody else sees.
    (tmp_path / "lab").mkdir()
    for name, code in (("tar", 0), ("mountpoint", 1), ("sudo", 1), ("python3.11", 0)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    where = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    stopped = subprocess.run(["bash", "-c", remote], cwd=tmp_path, env=where, capture_output=True)
    assert stopped.returncode == 1 and not (tmp_path / "lab" / ".venv").exists()
    started = remote.splitlines()[-1].replace("exec .venv/bin/python -m lab.main", 'printf "%s\\0"')
    passed = subprocess.run(["bash", "-c", started], capture_output=True, text=True).stdout
    assert passed.split("\0")[:-1] == AWKWARD


def test_sets_of_jobs_are_what_kubernetes_takes():
    schema = strict(json.loads((commands.REPOSITORY / "tests" / "jobset_v1alpha2.json").read_text()))
    manifests = {}
    for kind, more in (("tpu", dict(SLICES="3", TOPOLOGY="4x4")), ("gpu", dict(HOSTS="5"))):
        manifest = yaml.safe_load(ran("gke/submit.sh", "--dry-run", kind, "rope", *AWKWARD, **GKE | more).stdout)
        jsonschema.validate(manifest, schema)
        (jobs,) = manifest["spec"]["replicatedJobs"]
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "rope"}, **jobs["template"]}
        kubernetes_validate.validate(job, "1.31", strict=True)
        (container,) = jobs["template"]["spec"]["template"]["spec"]["containers"]
        assert container["args"] == AWKWARD and container["image"] == GKE["IMAGE"]
        manifests[kind] = manifest, jobs, container
    _, jobs, _ = manifests["tpu"]
    assert jobs["replicas"] == 3
    manifest, jobs, container = manifests["gpu"]
    # The pod's own environment, and what Kubernetes adds.
    pod = {each["name"]: each["value"] for each in container["env"]} | {"JOB_COMPLETION_INDEX": "4"}
    host = f"{manifest['metadata']['name']}-{jobs['name']}-0-0.{manifest['metadata']['name']}"
    assert cluster.find(pod) == cluster.Cluster("JAX's variables", f"{host}:8482", 5, 4)
    for misspelt in ("replicatedJob", "failurepolicy"):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(manifest | {"spec": manifest["spec"] | {misspelt: {}}}, schema)


def strict(schema):
    """The same, and unknown fields refused: Kubernetes drops them without a word."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {"additionalProperties": False} if isinstance(schema.get("properties"), dict) else {}
    return closed | {name: strict(each) for name, each in schema.items()}


@pytest.mark.parametrize(("script", "arguments", "told"), [
    ("slurm.sh", [], "the study's arguments are missing behind --"),
    ("slurm.sh", ["--nodes=2", STUDY], f"arguments of the study stand behind --, and {STUDY} does not"),
    ("slurm.sh", ["--array=0-3", "--", STUDY], "cells are numbered from 1 on: --array=1-N or --array=1-N%AT_ONCE, not"),
    ("slurm.sh", ["--array", "1-3", "--", STUDY], "write --array=1-N and --time=MINUTES, not --array"),
    ("slurm.sh", ["-t", "2", "--", STUDY], "write --array=1-N and --time=MINUTES, not -t"),
    ("tpu_pod.sh", ["make", "s-1"], "there is no 'make'"),
    ("tpu_pod.sh", ["run", "S 1", STUDY], "'S 1' is no name of a slice"),
    ("tpu_pod.sh", ["run", "s-1"], "the study's arguments are missing"),
    ("gke/submit.sh", ["cpu", "rope", STUDY], "'cpu' is neither tpu nor gpu"),
    ("gke/submit.sh", ["gpu", "rope"], "the study's arguments are missing"),
    ("gke/submit.sh", ["gpu", "Rope", STUDY], "'Rope' is no name of a JobSet"),
])  # fmt: skip
def test_a_script_says_how_it_is_used(script, arguments, told):
    process = ran(script, *arguments, code=2, **POD, **GKE)
    assert process.stderr.startswith(f"launch/{script}: {told}") and process.stderr.count("\n") == 1
    assert "; usage: " in process.stderr and process.stdout == ""


SEVERAL = {  # commands of the README that run one study over several devices, and how many these are
    r"^python -m lab.main --config=(\S+) --config.run.mesh.fsdp=2": 2,
    r"^DEVICES=1 launch/local.sh 2 --config=(\S+)": 2,
    r"^launch/slurm.sh --nodes=4 --gpus-per-node=8 -- --config=(\S+)": 32,
    r"^launch/tpu_pod.sh run \S+ --config=(\S+)": 16,
    r"^launch/gke/submit.sh gpu \S+ --config=(\S+)": 16,
}


@pytest.mark.parametrize("shown", SEVERAL)
def test_batches_of_the_studies_that_readme_runs_over_devices_divide_over_them(shown):
    (path,) = re.findall(shown, (commands.REPOSITORY / "README.md").read_text(), re.MULTILINE)
    mesh = types.SimpleNamespace(shape=dict(data=SEVERAL[shown], fsdp=1, tensor=1, context=1))
    for cell in open_study(command.load_config(path), path, []).cells:
        runs.check_mesh(cell.config, mesh)
