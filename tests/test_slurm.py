"""launch/slurm.sh on a real Slurm: `make test-slurm`, where Debian's slurm-wlm and munge are installed.

Two nodes of one machine run a study; a killed task ends the step, and is named; a job that is preempted saves, is
queued again, and ends as one that nobody disturbed; one whose time is too short for anything ends at once.
"""

import os
import pathlib
import re
import signal
import subprocess
import sys

import commands
import compiling
import pytest
import slurm_cluster

pytestmark = pytest.mark.skipif(not os.environ.get("LAB_SLURM"), reason="make test-slurm runs it: minutes")
CELLS = 'product(vary("model.position.ratio", (0.0, 1.0)), vary("data.draw", ("1-3",)))'
STEPS = 400
SCRIPT = commands.REPOSITORY / "launch" / "slurm.sh"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module")
def slurm(place):
    try:
        with slurm_cluster.running(place / "cluster") as cluster:
            yield cluster
    except slurm_cluster.Missing as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def study(place):
    return commands.write_study(place / "tiny.py", commands.write_corpus(place / "corpus.jsonl"), CELLS, steps=STEPS)


class Job:
    """A job that launch/slurm.sh submits: the study over both nodes, in the partition that may be preempted."""

    def __init__(self, slurm: slurm_cluster.Cluster, study: pathlib.Path, work: pathlib.Path, name: str, *more: str):
        self._slurm, self._log = slurm, work.parent / f"{name}.log"
        settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PYTHON": sys.executable}
        settings |= compiling.FAST | slurm.environment
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "SLURM_"))}
        arguments = [f"--config={study}", f"--workdir={work}", "--config.run.checkpoint.every=100"]
        options = ["--partition=low", "--nodes=2", "--exclusive", f"--output={self._log}", *more]
        told = subprocess.run(
            [SCRIPT, *options, "--", *arguments], env=inherited | settings, capture_output=True, text=True
        )
        assert told.returncode == 0, told.stdout + told.stderr
        self.number = int(re.fullmatch(r"Submitted batch job (\d+)\n", told.stdout)[1])

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    @property
    def state(self) -> str:
        return self._slurm.job(self.number)["JobState"]

    def until(self, happened, timeout: float = 900) -> None:
        self._slurm.until(happened, lambda: f"{self._slurm.job(self.number)}\n{self.log}", timeout)

    def trains(self, work: pathlib.Path, more: int) -> None:
        """Waits until so many more steps are logged."""
        there = commands.steps_logged(work)
        self.until(lambda: commands.steps_logged(work) > there + more or self.state not in ("PENDING", "RUNNING"))
        assert self.state == "RUNNING", self.log

    def end(self, state: str) -> None:
        self.until(lambda: self.state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"))
        assert self.state == state, self.log

    def task(self, number: int) -> int:
        """The process id of a task."""
        ours = {f"SLURM_JOB_ID={self.number}".encode(), f"SLURM_PROCID={number}".encode()}
        for path in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                words, settings = ((path / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
            except OSError:  # it has ended
                continue
            if b"lab.main" in words and ours <= {*settings}:
                return int(path.name)
        raise AssertionError(f"task {number} does not run: {self.log}")


@pytest.fixture(scope="module")
def undisturbed(slurm, study, place):
    """The directory of the study, made by a job that nobody disturbed."""
    work = place / "undisturbed"
    job = Job(slurm, study, work, "undisturbed")
    job.end("COMPLETED")
    found = f"Slurm job {job.number}: 2 processes on 2 hosts; 4 cpu devices, 2 here; mesh data 4; 2 rows of a batch"
    assert job.log.count(found) == 1
    assert job.log.count("2 of 2 runs done, 0 failed") == 1 and "ended with code 0" in job.log
    assert "Traceback" not in job.log, job.log
    return work


def test_a_job_that_would_be_stopped_as_it_starts_ends_and_says_so(slurm, study, place):
    job = Job(slurm, study, place / "short", "short", "-t2")
    job.end("FAILED")
    told = "it has 2:00 minutes, and is stopped up to 3 before its end: --time=4 or more"
    assert job.log == f"lab: job {job.number} ended with code 2: {told}\n"
    assert slurm.job(job.number)["Restarts"] == "0" and not (place / "short").exists()


def test_a_killed_task_is_named_and_a_preempted_job_goes_on(slurm, study, place, undisturbed):
    work = place / "disturbed"
    job = Job(slurm, study, work, "killed")
    job.trains(work, STEPS // 4)
    os.kill(job.task(1), signal.SIGKILL)
    job.end("FAILED")
    killed = f"lab: job {job.number} ended with code 137 (first: {slurm.nodes[1]}: task 1: Killed)"
    assert job.log.splitlines()[-1] == killed
    assert slurm.job(job.number)["Restarts"] == "0"

    job = Job(slurm, study, work, "preempted")
    job.trains(work, STEPS // 4)
    assert ": from step " in job.log, job.log
    other = slurm.ask("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    other = int(other.split()[-1])
    job.until(lambda: slurm.job(job.number)["Restarts"] == "1" and job.state == "PENDING")
    stopped = re.search(r"stopped and saved at (.+); run the same command again", job.log)[1]
    assert f"lab: job {job.number} ended with code 75" in job.log
    job.until(lambda: slurm.job(other)["JobState"] == "COMPLETED")
    slurm.start_again(job.number)
    job.end("COMPLETED")
    assert f"from {stopped}" in job.log or stopped.startswith("the ask"), job.log
    assert (work / "results.csv").read_bytes() == (undisturbed / "results.csv").read_bytes()
    ours, theirs = commands.runs(work), commands.runs(undisturbed)
    assert ours.keys() == theirs.keys() and len(ours) == 2
    for name, run in ours.items():
        assert commands.metrics(run) == commands.metrics(theirs[name]), name
