"""A larger study through many kills, and shared by several processes: every run is made once, results are the same."""

import contextlib
import random
import signal
import time

import commands
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.whole]  # each commit does the like to four cells: test_study_runs.py
KILLS = 20
TWELVE = (
    'product(vary("model.position.ratio", (0.0, 0.5, 1.0)), vary("data.draw", ("fixed1", "fixed2", "fixed4", "1-3")))'
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("survival")


@pytest.fixture(scope="module")
def study(place):
    corpus = commands.write_corpus(place / "corpus.jsonl")
    return commands.write_study(place / "twelve.py", corpus, cells=TWELVE, sections=("curves",))


@pytest.fixture(scope="module")
def undisturbed(place, study):
    work = place / "undisturbed"
    commands.finished("main", f"--config={study}", f"--workdir={work}", log=place / "undisturbed-log")
    assert len(commands.runs(work)) == 12
    return work


def test_twenty_kills_over_twelve_cells(place, study, undisturbed):
    """At random after the first step of each attempt, so that every attempt gets somewhere."""
    work, chance, killed = place / "killed", random.Random(), 0
    for attempt in range(KILLS):
        before = commands.steps_logged(work)
        with commands.started(
            "main", f"--config={study}", f"--workdir={work}", log=place / f"killed-{attempt}"
        ) as process:
            if process.until(lambda: commands.steps_logged(work) != before):  # noqa: B023
                time.sleep(chance.uniform(0, 1.5))
            if process.code is None:
                process.signal(signal.SIGKILL)
                killed += 1
            process.wait()
    assert killed > KILLS // 2, "the study was over too soon to be killed often"
    commands.finished("main", f"--config={study}", f"--workdir={work}", log=place / "killed-last")
    commands.same_results(work, undisturbed)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_a_study(place, study, undisturbed, processes):
    work = place / f"shared{processes}"
    with contextlib.ExitStack() as running:
        sharing = [
            running.enter_context(
                commands.started(
                    "main", f"--config={study}", f"--workdir={work}", log=place / f"shared{processes}-{number}"
                )
            )
            for number in range(processes)
        ]
        for process in sharing:
            assert process.wait(400) == 0, process.told()
        made = [sum(" tokens/s" in line and "] " in line for line in process.out.splitlines()) for process in sharing]
    assert sum(made) == 12, "each run is made by one process"
    assert sum(count > 0 for count in made) > 1, "more than one process took part"
    commands.same_results(work, undisturbed)
