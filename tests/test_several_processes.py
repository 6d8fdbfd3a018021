"""Two processes of two devices train as one, stop as one, fail as one, and go on from what others have saved."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import sys

import commands
import jax
import numpy as np
import pytest
import restoring
import tiny

from lab.train import checkpoint, compiled

pytestmark = pytest.mark.slow
CELLS = 'product(vary("model.position.ratio", (0.0, 1.0)), vary("data.draw", ("1-3",)))'
SCRIPT = commands.REPOSITORY / "launch" / "local.sh"
LAST = commands.STEPS


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def study(place):
    return commands.write_study(place / "tiny.py", commands.write_corpus(place / "corpus.jsonl"), CELLS)


def launched(study, work, log, *arguments):
    return commands.Process([SCRIPT, 2, f"--config={study}", f"--workdir={work}", *arguments], log, DEVICES="2")


@pytest.fixture(scope="module")
def together(place, study):
    """The directory of the study, run by two processes."""
    run = launched(study, place / "together", place / "together-log")
    assert run.wait() == 0, run.told()
    assert "2 runs on 4 cpu devices" in run.out
    found = "JAX's variables: 2 processes; 4 cpu devices, 2 here; mesh data 4; 2 rows of a batch for each process\n"
    assert run.out.count(found) == 1
    assert run.out.count("2 of 2 runs done, 0 failed") == 1, "one process speaks for both"
    assert "launch/local.sh" not in run.err and "Traceback" not in run.err, run.told()
    return place / "together"


@pytest.mark.long
@pytest.mark.parametrize("devices", [1, pytest.param(4, marks=pytest.mark.whole)])
def test_one_process_finds_the_same(place, study, together, devices):
    work = place / f"alone{devices}"
    environment = {"JAX_NUM_CPU_DEVICES": str(devices)}
    commands.finished("main", f"--config={study}", f"--workdir={work}", log=place / "alone-log", **environment)
    ours, theirs = commands.runs(together), commands.runs(work)
    assert ours.keys() == theirs.keys() and len(ours) == 2
    for name, run in ours.items():
        lines, others = commands.metrics(run), commands.metrics(theirs[name])
        assert [line["step"] for line in lines] == list(range(LAST))
        for field in ("text_hash", "tokens", "fill", "learning_rate"):
            assert [line[field] for line in lines] == [line[field] for line in others], field
        for field in ("loss", "grad_norm"):
            np.testing.assert_allclose([line[field] for line in lines], [line[field] for line in others], rtol=1e-4)
        assert bytes_asked(run) == bytes_asked(theirs[name]) and min(bytes_asked(run)) > 0
    ours, theirs = ((path / "results.csv").read_text().splitlines() for path in (together, work))
    assert len(ours) == len(theirs) == 1 + 2 * 3
    for line, other in zip(ours[1:], theirs[1:], strict=True):
        line, other = line.split(","), other.split(",")
        assert line[:4] + line[6:] == other[:4] + other[6:]
        np.testing.assert_allclose(float(line[4]), float(other[4]), atol=1e-4)


def bytes_asked(run):
    """Of labelled text, by condition: each process counts its own rows."""
    (path,) = run.glob("evaluations/loss-*.json")
    return [row["bytes"] for row in json.loads(path.read_text())["conditions"]]


def test_files_are_written_once(together):
    for run in commands.runs(together).values():
        assert len(list((run / "tensorboard").iterdir())) == 2  # of its training, and of what it was asked
        assert max(commands.steps_saved(run)) == LAST


def children(process) -> dict[int, int]:
    """Process ids by the number that the script gave each."""
    found = {}
    for pid in map(int, pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()):
        number = re.search(rb"\0JAX_PROCESS_ID=(\d+)\0", pathlib.Path(f"/proc/{pid}/environ").read_bytes())
        if number:
            found[int(number[1])] = pid
    return found


def test_stopped_then_killed_then_stopped_again_then_finished(place, study, together):
    """SIGTERM to the script stops both at one step; a process that is killed ends the other; nothing is lost.

    The second stop comes while they evaluate: steps begin again with every run, and what the processes agree on to
    stop must not.
    """
    work = place / "stopped"
    process = launched(study, work, place / "stopped-log")
    assert process.until(lambda: commands.steps_logged(work) > LAST // 3), process.told()
    process.signal(signal.SIGTERM)
    assert process.wait() == 75, process.told()
    step = int(re.search(r"stopped and saved at step (\d+); run the same command again", process.out)[1])
    assert "Traceback" not in process.err
    stopped = [run for run in commands.runs(work).values() if not (run / "result.json").exists()]
    assert step == max(commands.steps_saved(stopped[-1])) == len(commands.metrics(stopped[-1]))

    process = launched(study, work, place / "killed-log")
    assert process.until(lambda: "seed 0: " in process.out and commands.steps_logged(work) > step + 2), process.told()
    os.kill(children(process)[1], signal.SIGKILL)
    assert process.wait(60) == 128 + signal.SIGKILL, process.told()
    assert "launch/local.sh: process 1 ended with code 137" in process.err

    process = launched(study, work, place / "evaluating-log")
    assert process.until(lambda: commands.evaluating(work)), process.told()
    process.signal(signal.SIGTERM)
    assert process.wait() == 75, process.told()
    assert re.search(r": from step \d+", process.out)
    assert "stopped and saved at " in process.out and not any(map(commands.asked, work.glob("cells/*ratio=1*/*")))

    process = launched(study, work, place / "finished-log")
    assert process.wait() == 0, process.told()
    commands.same_results(work, together)


@pytest.mark.long
def test_a_run_of_eight_devices_goes_on_over_two_processes(place):
    """From its tenth step, in microbatches. Batches, rates and seeds are those of the run on eight; losses drift."""
    study = commands.write_study(place / "one.py", commands.write_corpus(place / "one.jsonl"), commands.ONE_CELL)
    over_eight, eight = ["--config.run.mesh.data=4", "--config.run.mesh.tensor=2"], place / "eight"
    drops, kept = "--config.train.dropout.residual=0.1", "--config.run.checkpoint.keep=9"
    arguments = f"--config={study}", f"--workdir={eight}", *over_eight, drops, kept
    commands.finished("main", *arguments, log=place / "eight-log", JAX_NUM_CPU_DEVICES="8")
    shutil.copytree(eight, place / "rewound")
    (undisturbed,), (run,) = (commands.runs(work).values() for work in (eight, place / "rewound"))
    log = run / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:10]))
    (run / "result.json").unlink()

    over_four = "--config.run.mesh.data=2", "--config.run.mesh.tensor=2", "--config.run.microbatches=2"
    process = launched(study, place / "rewound", place / "rewound-log", *over_four, drops)
    assert process.wait() == 0, process.told()
    assert "goes on from step 10 in another way (" in process.out and "devices 8 -> 4" in process.out
    made = json.loads((run / "segments.json").read_text())["segments"]
    assert [(one["first_step"], one["processes"], one["microbatches"]) for one in made] == [(0, 1, 1), (10, 2, 2)]
    lines, others = commands.metrics(run), commands.metrics(undisturbed)
    assert lines[:10] == others[:10] and [line["step"] for line in lines] == list(range(LAST))
    for field in ("text_hash", "tokens", "fill", "learning_rate"):
        assert [line[field] for line in lines] == [line[field] for line in others], field
    losses, expected = (np.array([line["loss"] for line in each[10:]]) for each in (lines, others))
    np.testing.assert_allclose(losses[:20], expected[:20], rtol=1e-6)
    np.testing.assert_allclose(losses, expected, rtol=1e-3)


def test_each_process_reads_and_holds_its_share_of_a_checkpoint(tmp_path):
    """As TensorStore counts the bytes that it reads. Eight devices wrote them, cut along another axis too."""
    state = compiled.initial_state(restoring.config(), restoring.PROGRAM, tiny.mesh(fsdp=4, tensor=2))
    rng = np.random.default_rng(0)  # zeros would be compressed to nothing
    drawn = lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype), x.sharding)  # noqa: E731
    state = state._replace(optimizer=jax.tree.map(drawn, state.optimizer))
    checkpoints = checkpoint.Checkpoints(tmp_path / "saved", keep=1)
    checkpoints.save(checkpoint.Position(1, 0), state)
    checkpoints.close()
    command = [
        sys.executable,
        commands.REPOSITORY / "tests" / "restoring.py",
        tmp_path / "saved",
        f"127.0.0.1:{free_port()}",
    ]
    where = dict(PYTHONPATH=str(commands.REPOSITORY))
    processes = [commands.Process([*command, number], tmp_path / f"log{number}", **where) for number in (0, 1)]
    assert [process.wait() for process in processes] == [0, 0], processes[0].told()
    for process in processes:
        found = json.loads(process.out.splitlines()[-1])  # behind what Gloo says
        assert found["held"] < 0.51 * found["whole"] and found["read"] < 0.55 * found["whole"], found


LATE = """
import os, sys, time
os.dup2(2, 1)  # Gloo and the lab write to one file, in order
from lab import main
from lab.study.run import hosts
from lab.train import compiled
connect, train_step = hosts.connect, compiled.train_step

def told(*arguments):
    connect(*arguments)
    os.write(2, b"all is connected\\n")

def late(*arguments):
    time.sleep(float(sys.argv[1]))
    return train_step(*arguments)

hosts.connect, compiled.train_step = told, late
sys.exit(main.main(sys.argv[2:]))
"""


@pytest.mark.long
def test_a_process_that_compiles_for_long_is_waited_for(place, study):
    """Gloo waits for 30 seconds where it connects, so all of its connections are there before anything else is done."""
    arguments = [f"--config={study}", f"--workdir={place / 'late'}", "--cells=1/2"]
    arguments += [f"--config.run.mesh.{axis}={size}" for axis, size in (("data", 1), ("fsdp", 2), ("tensor", 2))]
    joined = dict(JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{free_port()}", JAX_NUM_PROCESSES="2")
    both = [
        commands.Process(
            [sys.executable, "-c", LATE, seconds, *arguments], place / f"late{number}", **joined, JAX_PROCESS_ID=number
        )
        for number, seconds in (("0", 0), ("1", 35))
    ]
    try:
        assert [process.wait() for process in both] == [0, 0], "".join(process.told() for process in both)
    finally:
        for process in both:
            process.end()
    for process in both:
        before, after = process.err.split("all is connected")
        several = r"connected to [1-9]\d* peer"  # a group of one device waits for none
        assert re.search(several, before) and not re.search(several, after), process.told()
    assert "1 of 1 runs done, 0 failed" in both[0].err


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_process_with_another_config_is_refused(place, study):
    """They join as tasks of a step of Slurm."""
    port = str(free_port())
    work = place / "differing"
    arguments = [f"--config={study}", f"--workdir={work}"]
    step = dict(SLURM_JOB_ID="7", SLURM_STEP_NODELIST="localhost", SLURM_NTASKS="2", JAX_COORDINATOR_PORT=port)
    tasks = [step | dict(SLURM_PROCID=number, SLURM_LOCALID=number) for number in "01"]
    with (
        commands.started("main", *arguments, log=place / "host0", **tasks[0]) as one,
        commands.started(
            "main", *arguments, "--config.run.checkpoint.every=7", log=place / "host1", **tasks[1]
        ) as other,
    ):
        assert (one.wait(), other.wait()) == (2, 2), one.told() + other.told()
    host = socket.gethostname()
    for process in (one, other):
        assert process.err == (
            f"lab: process 1 on host {host} has other config than process 0 on {host}; give all hosts the same command "
            "and the same files\n"
        )
    assert not work.exists()


def test_a_mistake_ends_all_processes(place):
    process = commands.Process([SCRIPT, 2, "--config=configs/none.py"], place / "mistake-log")
    assert process.wait() == 2
    assert "there is no file 'configs/none.py'" in process.err and "ended with code 2" in process.err


@pytest.mark.parametrize("arguments", [[], ["two"], ["0"], ["--config=configs/rope_ablation.py"]])
def test_the_script_says_how_it_is_used(place, arguments):
    process = commands.Process([SCRIPT, *arguments], place / "usage-log")
    assert process.wait() == 2
    assert process.err.count("\n") == 1 and "usage: DEVICES=1 launch/local.sh 2 --config=" in process.err
