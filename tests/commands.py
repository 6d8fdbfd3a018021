"""Runs the lab's commands as users do, on a study so small that starting Python is most of what it costs."""

import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import unittest.mock

import compiling
import pytest

from lab import command

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
STEPS = 40
CELLS = 'product(vary("model.position.ratio", (0.0, 1.0)), vary("data.draw", ("fixed1", "1-3")))'
LABELS = (("model.position.ratio", "rope_ratio"), ("data.draw", "train_branch"))
ONE_CELL = 'product(vary("model.position.ratio", (1.0,)), vary("data.draw", ("1-3",)))'

_STUDY = """\
\"\"\"Does a tiny study run?\"\"\"

from lab.config import base, branches
from lab.study.define.cells import chain, named, product, vary


def get_config():
    config = branches(base())
    config.study.update(name="tiny", question="Does it run?", labels={labels!r}, sections={sections!r})
    config.study.cells = {cells}
    config.model.update(dim=16, layers=1)
    config.model.mixer.update(heads=2, kv_heads=1, head_dim=8)
    config.model.feedforward.width = 32
    config.data.update(corpus="jsonl", path={corpus!r}, text_length=16, texts_per_row=4, rows=4, draw="1-3")
    config.train.update(steps={steps}, warmup=2)
    config.evaluate.loss.update(branches=(1, 2, 4), texts=16, texts_per_row=4, rows=4)
    config.run.checkpoint.every = 10
    return config
"""


def write_corpus(path: pathlib.Path, texts: int = 1500) -> pathlib.Path:
    """JSON lines of random words, always the same."""
    words = random.Random(0)
    vocabulary = ["".join(words.choices("etaoinshrdlu", k=words.randint(2, 7))) for _ in range(60)]
    lines = (json.dumps({"text": " ".join(words.choices(vocabulary, k=4))}) for _ in range(texts))
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def write_study(
    path: pathlib.Path,
    corpus: pathlib.Path,
    cells: str = CELLS,
    labels=LABELS,
    sections=(("branches", "rope_ratio", "train_branch"), "curves"),
    steps: int = STEPS,
) -> pathlib.Path:
    """A config file; `cells` is the expression that makes them."""
    path.write_text(_STUDY.format(corpus=str(corpus), cells=cells, labels=labels, sections=sections, steps=steps))
    return path


class Process:
    """A command in a process group of its own. stdout and stderr go to files, so that nothing can block on a pipe."""

    def __init__(self, arguments, log: pathlib.Path, **environment):
        self._logs = log.with_suffix(".out"), log.with_suffix(".err")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
        settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PYTHON": sys.executable}
        settings |= compiling.FAST | environment
        with self._logs[0].open("w") as out, self._logs[1].open("w") as err:
            self._popen = subprocess.Popen(
                [*map(str, arguments)],
                cwd=REPOSITORY,
                env=inherited | settings,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def out(self) -> str:
        return self._logs[0].read_text()

    @property
    def err(self) -> str:
        return self._logs[1].read_text()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def code(self) -> int | None:
        return self._popen.poll()

    def wait(self, timeout: float = 400) -> int:
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s: {self.told()}") from None
        finally:
            self.end()

    def signal(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def until(self, happened, timeout: float = 400) -> bool:
        """Waits until `happened()`; False if the process ended first."""
        limit = time.monotonic() + timeout
        while not happened():
            if self.code is not None:
                return False
            assert time.monotonic() < limit, f"did not happen in {timeout} s: {self.told()}"
            time.sleep(0.002)
        return True

    def end(self) -> None:
        """Kills what is left of the group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()

    def told(self) -> str:
        return f"code {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


@contextlib.contextmanager
def started(command: str, *arguments, log: pathlib.Path, **environment):
    """`python -m lab.<command>`, killed at the end of the block if it still runs."""
    process = Process([sys.executable, "-m", f"lab.{command}", *arguments], log, **environment)
    try:
        yield process
    finally:
        process.end()


def finished(command: str, *arguments, log: pathlib.Path, code: int = 0, **environment) -> Process:
    """`python -m lab.<command>`, run to its end, which must be `code`."""
    with started(command, *arguments, log=log, **environment) as process:
        assert process.wait() == code, process.told()
    return process


def ended(main, *arguments) -> int:
    """The exit code of a command that is run in this process."""
    with unittest.mock.patch.object(sys, "argv", ["lab", *map(str, arguments)]), pytest.raises(SystemExit) as left:
        command.run(main)
    return left.value.code or 0


def metrics(run: pathlib.Path) -> list[dict]:
    """Of one run: what was logged of each step."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def runs(workdir: pathlib.Path) -> dict[str, pathlib.Path]:
    """Directories of the runs that a study has begun, by name."""
    return {
        path.parent.relative_to(workdir).as_posix(): path.parent for path in workdir.glob("cells/*/*/metrics.jsonl")
    }


def steps_saved(run: pathlib.Path) -> list[int]:
    """The checkpoints that stand."""
    return sorted(int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit())


def steps_logged(workdir: pathlib.Path) -> int:
    """Over all runs."""
    return sum(path.read_text().count("\n") for path in workdir.glob("cells/*/*/metrics.jsonl"))


def evaluating(workdir: pathlib.Path) -> bool:
    """Whether some run is trained and not asked everything yet."""
    return any(STEPS in steps_saved(run) and not asked(run) for run in runs(workdir).values())


def asked(run: pathlib.Path) -> bool:
    """Whether a run has all rows of an ask."""
    return any(json.loads(path.read_text())["complete"] for path in run.glob("evaluations/*.json"))


def same_results(workdir: pathlib.Path, undisturbed: pathlib.Path) -> None:
    """Asserts the same bytes of results, and the same steps, each once."""
    assert (workdir / "results.csv").read_bytes() == (undisturbed / "results.csv").read_bytes()
    ours, theirs = runs(workdir), runs(undisturbed)
    assert ours.keys() == theirs.keys()
    for name, run in ours.items():
        assert [line["step"] for line in metrics(run)] == list(range(STEPS)), name
        assert metrics(run) == metrics(theirs[name]), name
        assert all(path.name.isdigit() for path in (run / "checkpoints").iterdir()), name
