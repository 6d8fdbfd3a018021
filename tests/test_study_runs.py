"""Studies through real processes: killed, stopped, damaged, extended, divided, failing; and always the same results."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import commands
import matrix
import pytest

from lab import cluster, main, runtime

pytestmark = pytest.mark.slow
LAST = commands.STEPS


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("studies")


@pytest.fixture(scope="module")
def corpus(place):
    return commands.write_corpus(place / "corpus.jsonl")


@pytest.fixture(scope="module")
def study(place, corpus):
    return commands.write_study(place / "tiny.py", corpus)


@pytest.fixture(scope="module")
def undisturbed(place, study):
    """The directory of the study, run to its end in one go."""
    run = commands.finished(
        "main", f"--config={study}", f"--workdir={place / 'undisturbed'}", log=place / "undisturbed-log"
    )
    assert run.err == "", "a normal run has nothing to complain about"
    return place / "undisturbed"


def copied(directory, to):
    return shutil.copytree(directory, to)


# When to kill: a condition on the directory and on what was printed, and how long after it at most.
MOMENTS = {
    "starting": (lambda work, process: True, 3.0),
    "planned": (lambda work, process: (work / "plan.json").exists(), 0.02),
    "compiling": (lambda work, process: ": begins" in process.out, 2.0),
    "training": (lambda work, process: commands.steps_logged(work) % LAST > LAST // 3, 0.5),
    "saving": (lambda work, process: any(work.glob("cells/*/*/checkpoints/*tmp*")), 0.01),
    "evaluating": (lambda work, process: commands.evaluating(work), 0.4),
    "reporting": (lambda work, process: "[" in process.out and "/4]" in process.out, 0.6),
}


def kill_at(moments, study, work, place, chance, **environment):
    """Runs the study again and again, and kills it at each moment; the moments that were met."""
    met = []
    for number, name in enumerate(moments):
        happened, most = MOMENTS[name]
        arguments = (f"--config={study}", f"--workdir={work}")
        with commands.started("main", *arguments, log=place / f"{work.name}-{number}", **environment) as process:
            if process.until(lambda: happened(work, process)):  # noqa: B023
                time.sleep(chance.uniform(0, most))
                if process.code is None:
                    process.signal(signal.SIGKILL)
                    met.append(name)
            process.wait()
            assert "Traceback" not in process.err, process.told()
    return met


def test_killed_at_every_kind_of_moment_with_nothing_cached(place, study, undisturbed, request):
    """The caches of texts and of compiled programs are filled by processes that are killed while they fill them. Each
    commit draws some of the moments."""
    work, chance = place / "killed", random.Random(matrix.seed(request.config))
    moments = matrix.some([*MOMENTS], 3, request.config)
    cold = {"LAB_CACHE": str(place / "cold")}
    met = kill_at(moments, study, work, place, chance, **cold)
    assert len(met) >= max(2, len(moments) - 2), f"the study was over too soon to be killed at {moments[len(met) :]}"
    last = commands.finished("main", f"--config={study}", f"--workdir={work}", log=place / "killed-log", **cold)
    assert "4 of 4 runs done, 0 failed" in last.out
    commands.same_results(work, undisturbed)


@pytest.mark.whole  # the commit kills at every kind of moment, and over twelve cells
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random(place, study, undisturbed, seed):
    work, chance = place / f"random{seed}", random.Random(seed)
    for attempt in range(4):
        log = place / f"random{seed}-{attempt}"
        with commands.started("main", f"--config={study}", f"--workdir={work}", log=log) as process:
            process.until(lambda: ": " in process.out)
            time.sleep(chance.uniform(0, 6))
            process.signal(signal.SIGKILL)
            process.wait()
            assert "Traceback" not in process.err, process.told()
    commands.finished("main", f"--config={study}", f"--workdir={work}", log=place / f"random{seed}-log")
    commands.same_results(work, undisturbed)


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGTERM, marks=pytest.mark.whole), signal.SIGINT], ids=lambda number: number.name
)
def test_a_stop_saves_and_the_same_command_goes_on(place, study, undisturbed, number):
    """While it trains, and then while it evaluates."""
    work = place / f"stopped-{number.name}"
    arguments = (f"--config={study}", f"--workdir={work}")
    with commands.started("main", *arguments, log=place / "stopped-log") as process:
        assert process.until(lambda: commands.steps_logged(work) > LAST // 3), process.told()
        process.signal(number)
        assert process.wait() == 75, process.told()
    step = int(re.search(r"stopped and saved at step (\d+); run the same command again", process.out)[1])
    (run,) = commands.runs(work).values()
    assert LAST // 3 < step < LAST and step == max(commands.steps_saved(run)) == len(commands.metrics(run))
    assert process.err.split("\n") == ["", "lab: stopping after this step, with a checkpoint", ""], process.err

    with commands.started("main", *arguments, log=place / "stopped-log") as process:
        assert process.until(lambda: commands.evaluating(work)), process.told()
        process.signal(number)
        assert process.wait() in (0, 75), process.told()  # 0: it was past the last evaluation
    assert f"from step {step}" in process.out and "Traceback" not in process.err

    commands.finished("main", *arguments, log=place / "stopped-log")
    commands.same_results(work, undisturbed)


def damage_halves(checkpoint):
    """Every file cut in half: what a disk does that lost its last writes."""
    for path in checkpoint.rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)


def damage_largest(checkpoint):
    """The file that holds the weights, emptied."""
    largest = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(largest, 0)


def damage_state(checkpoint):
    """A directory missing."""
    shutil.rmtree(checkpoint / "state")


@pytest.fixture(scope="module")
def halfway(place, study):
    """A study stopped in its first run."""
    work = place / "halfway"
    with commands.started("main", f"--config={study}", f"--workdir={work}", log=place / "halfway-log") as process:
        assert process.until(lambda: commands.steps_logged(work) > LAST // 3), process.told()
        process.signal(signal.SIGTERM)
        assert process.wait() == 75, process.told()
    return work


@pytest.mark.parametrize(
    "damage",
    [damage_halves, *(pytest.param(damage, marks=pytest.mark.whole) for damage in (damage_largest, damage_state))],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(place, study, undisturbed, halfway, damage):
    work = copied(halfway, place / damage.__name__)
    (run,) = commands.runs(work).values()
    before, newest = commands.steps_saved(run)
    damage(run / "checkpoints" / str(newest))
    again = commands.finished("main", f"--config={study}", f"--workdir={work}", log=place / "damaged-log")
    # Orbax's own readers, given up halfway, may complain to stderr now and then.
    (line,) = (line for line in again.err.splitlines() if "checkpoint" in line and "taking" in line)
    assert f"checkpoints/{newest} cannot be read (" in line and "taking the one before" in line
    assert f": from step {before}\n" in again.out
    commands.same_results(work, undisturbed)


@pytest.mark.long
def test_a_run_goes_on_in_another_way(place, study, undisturbed, halfway):
    """Under other run fields it begins a new segment in the same directory, and says so; new runs do not."""
    work = copied(halfway, place / "another-way")
    (name,) = commands.runs(work)
    command = ("main", f"--config={study}", f"--workdir={work}", "--config.run.remat=full", "--config.run.scan=true")
    again = commands.finished(*command, log=place / "another-way-log")
    assert len(re.findall("goes on from step .* in another way .*remat none -> full", again.out)) == 1
    made = {
        key: json.loads((run / "segments.json").read_text())["segments"] for key, run in commands.runs(work).items()
    }
    assert made.keys() == commands.runs(undisturbed).keys()
    assert [one["remat"] for one in made[name]] == ["none", "full"] and made[name][0]["first_step"] == 0
    assert all(len(segments) == 1 for key, segments in made.items() if key != name)
    ours, theirs = (commands.metrics(commands.runs(of)[name]) for of in (work, undisturbed))
    assert abs(ours[-1]["loss"] - theirs[-1]["loss"]) < 1e-3 and ours[0] == theirs[0]


@pytest.mark.long
def test_two_processes_divide_a_study(place, study, undisturbed):
    work = place / "divided"
    arguments = (f"--config={study}", f"--workdir={work}")
    logs = [place / "divided-a", place / "divided-b"]
    with commands.started("main", *arguments, log=logs[0]) as a, commands.started("main", *arguments, log=logs[1]) as b:
        assert (a.wait(), b.wait()) == (0, 0), a.told() + b.told()
    new = [int(re.search(r"for (\d+) new runs", process.out)[1]) for process in (a, b)]
    assert sum(new) == 4 and min(new) >= 1, (a.told(), b.told())
    commands.same_results(work, undisturbed)


@pytest.mark.whole  # lab/command.py's tests say which cells a share has
def test_shares_of_a_study_add_up_to_it(place, study, undisturbed):
    """What a job array does: disjoint shares, one after another here."""
    work = place / "array"
    for share in ("1/2", "2/2"):
        arguments = (f"--config={study}", f"--workdir={work}", f"--cells={share}")
        assert "for 2 new runs" in commands.finished("main", *arguments, log=place / f"array-{share[0]}").out
    commands.same_results(work, undisturbed)


def results_written(work):
    return {path: path.stat().st_mtime_ns for path in work.glob("cells/*/*/result.json")}


@pytest.mark.long
def test_only_what_is_new_is_run(place, corpus, study, undisturbed):
    work = copied(undisturbed, place / "extended")
    before = results_written(work)
    more = commands.write_study(place / "more.py", corpus, commands.CELLS.replace("(0.0, 1.0)", "(0.0, 0.5, 1.0)"))
    extended = commands.finished("main", f"--config={more}", f"--workdir={work}", log=place / "extended-log")
    assert ", for 2 new runs" in extended.out and "6 of 6 runs done" in extended.out
    after = results_written(work)
    assert {path: after[path] for path in before} == before and len(after) == 6
    table = (work / "results.csv").read_text()
    assert len(table.splitlines()) == 1 + 6 * 3 and "\n0.5,fixed1,0,1," in table
    # What the cells that were there found is there still, to the last digit.
    assert set((undisturbed / "results.csv").read_text().splitlines()) < set(table.splitlines())

    changed = commands.finished(
        "main",
        f"--config={study}",
        f"--workdir={work}",
        "--config.evaluate.loss.texts=32",
        "--cells=1/4",
        log=place / "extended-log",
    )
    assert "compiled: train_step 0 (0.0 s)" in changed.out and ", for 1 new runs" in changed.out
    assert results_written(work) == after  # it is asked anew, and not trained
    retrained = commands.finished(
        "main",
        f"--config={study}",
        f"--workdir={work}",
        "--config.train.steps=41",
        "--cells=1/4",
        log=place / "extended-log",
    )
    assert ", for 1 new runs" in retrained.out and len(results_written(work)) == 7


NUMBERS = """chain(
        named("plain", ("model.position.ratio", 0.5)),
        named("diverges", ("train.schedule", "constant"), ("train.warmup", 40), ("train.weight_decay", 3500.0)),
        named("theta", ("model.position.theta", 100.0)),
        named("stride", ("model.position.stride", 7)),
        named("rate", ("train.learning_rate", 4e-4), ("train.schedule", "linear"), ("train.weight_decay", 0.1)),
        named("draw", ("data.draw", "fixed4"), ("data.stagger", False)),
    )"""


@pytest.mark.long
def test_a_run_that_is_not_finite_stops_alone_and_all_share_one_program(place, corpus):
    """Decay grows with the rate while that warms up: past 2 it blows the weights up, more each step."""
    study = commands.write_study(
        place / "numbers.py", corpus, NUMBERS, labels=(("name", "case"),), sections=("curves",)
    )
    work = place / "numbers"
    arguments = (f"--config={study}", f"--workdir={work}")
    run = commands.finished("main", *arguments, code=1, log=place / "numbers-log")
    assert "compiled: train_step 1 (" in run.out and ", evaluation_step 1 (" in run.out and "for 6 new runs" in run.out
    assert "5 of 6 runs done, 1 failed" in run.out and run.err == ""

    (failed,) = (path.parent for path in work.glob("cells/*/*/failure.json"))
    assert "diverges" in failed.parent.name and not (failed / "result.json").exists()
    failure = json.loads((failed / "failure.json").read_text())
    reason = failure["reason"]
    told = re.fullmatch(
        r"step (\d+): loss (\S+), gradient norm (\S+), batch (\w{16}); last good checkpoint: (\d+)", reason
    )
    step, good = int(told[1]), int(told[5])
    assert failure["step"] == step and 32 < step < LAST and {"nan", "inf"} & {told[2], told[3]}
    others = [commands.metrics(path) for name, path in commands.runs(work).items() if "diverges" not in name]
    assert len(others) == 5
    assert {lines[step]["text_hash"] for lines in others} == {told[4]}  # the texts that every other cell read then
    assert good == max(commands.steps_saved(failed)) and good <= step < good + 10
    assert [line["step"] for line in commands.metrics(failed)] == list(range(step))
    for page in ("report.md", "report.html"):
        text = (work / page).read_text()
        assert "diverges" in text and told[4] in text and f"step {step}" in text, page
    table = (work / "results.csv").read_text().splitlines()
    assert len(table) == 1 + 5 * 3 and not any(line.startswith("diverges") for line in table)

    retried = commands.finished("main", *arguments, "--retry-failed", code=1, log=place / "numbers-log")
    assert "for 1 new runs" in retried.out and f": from step {good}\n" in retried.out
    assert json.loads((failed / "failure.json").read_text())["reason"] == reason
    assert (work / "results.csv").read_text().splitlines() == table


def test_the_report_is_rebuilt_from_the_directory(place, undisturbed):
    work = copied(undisturbed, place / "rebuilt")
    results, timings = ((work / name).read_bytes() for name in ("results.csv", "timings.csv"))
    pages = [work / name for name in ("results.csv", "timings.csv", "report.md", "report.html")]
    for path in pages:
        path.unlink()
    shutil.rmtree(work / "figures")
    run = commands.finished("report", work, log=place / "rebuilt-log")
    assert run.err == "" and all(str(path) in run.out for path in pages)
    assert (work / "results.csv").read_bytes() == results and (work / "timings.csv").read_bytes() == timings
    assert len(list((work / "figures").glob("*.png"))) >= 4
    refused = commands.finished("report", place / "nowhere", log=place / "rebuilt-log", code=2)
    assert refused.err.count("\n") == 1 and "has no plan.json" in refused.err


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("--config.train.stepz=1", "did you mean 'train.steps'?"),
        ("--config.data.path=none/*.txt", "matches no file"),
    ],
)
def test_a_mistake_ends_the_process_with_one_line(place, study, override, told):
    """As on a user's machine: the number of devices is left to the lab."""
    work = place / "mistaken"
    arguments = [sys.executable, "-m", "lab.main", f"--config={study}", f"--workdir={work}", override]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    run = subprocess.run(arguments, cwd=commands.REPOSITORY, env=environment, capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == "" and not work.exists()
    assert run.stderr.count("\n") == 1 and told in run.stderr


@pytest.fixture
def small_disk(tmp_path):
    """A file system of some megabytes: a page has its script in it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs rights; tests/test_command.py injects a full disk everywhere")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def fill(disk):
    """Takes all that is left."""
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return


@pytest.mark.long
@pytest.mark.parametrize("moment", [pytest.param("begins", marks=pytest.mark.whole), "trains"])
def test_a_full_disk_loses_nothing(place, study, undisturbed, small_disk, moment):
    work = small_disk / "runs"
    arguments = (f"--config={study}", f"--workdir={work}")
    with commands.started("main", *arguments, log=place / f"full-{moment}") as process:
        full = 1 if moment == "begins" else LAST + 8
        assert process.until(lambda: results_written(work) and commands.steps_logged(work) >= full), process.told()
        fill(small_disk)
        assert process.wait() == 1, process.told()
    assert process.err.startswith("lab: the disk is full") and process.err.count("\n") == 1, process.err
    assert "run the same command again" in process.err
    finished = results_written(work)
    assert finished
    (small_disk / "filler").unlink()
    commands.finished("main", *arguments, log=place / f"full-{moment}")
    assert {path: results_written(work)[path] for path in finished} == finished
    commands.same_results(work, undisturbed)


def test_cells_that_differ_in_numbers_compile_once(place, corpus, monkeypatch):
    """Counted by JAX itself, in this process: the log cannot flatter."""
    counts = runtime.CompileCounts()
    monkeypatch.setattr(runtime, "start", lambda config: cluster.Cluster())
    monkeypatch.setattr(runtime, "stop_requests", lambda: lambda step: False)
    study = commands.write_study(
        place / "counted.py", corpus, NUMBERS, labels=(("name", "case"),), sections=("curves",)
    )
    sizes = (
        "--config.data.rows=8",
        "--config.evaluate.loss.rows=8",
        "--config.evaluate.loss.texts=32",
        "--config.model.feedforward.width=40",
    )
    assert main.main([f"--config={study}", f"--workdir={place / 'counted'}", "--cells=1/2", *sizes]) == 0
    assert (counts.counts["train_step"], counts.counts["evaluation_step"]) == (1, 1)
    assert len(list((place / "counted").glob("cells/*/*/metrics.jsonl"))) == 3
