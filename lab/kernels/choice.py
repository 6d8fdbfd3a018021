"""Which implementation of attention a study takes on this machine, found by trial.

Trials (lab.kernels.trial) are processes of their own, one after another, so that a kernel which crashes, hangs or takes
all memory costs itself alone; nothing here touches a device. One implementation serves a whole study: among those that
are right on every problem the one of the least time over all calls, and of those within a tenth the most trusted.
"""

import collections
import contextlib
import json
import os
import pathlib
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

# The most trusted first. Libraries may add in any order, so that their gradients do not repeat themselves to the bit.
TRUSTED = ("cudnn", "pallas_tpu", "pallas_gpu", "tokamax", "pallas_triton", "tiled", "reference")
LIBRARIES = ("cudnn", "tokamax")
BUDGET, SILENCE = 300.0, 75.0  # seconds of all trials; of one that says nothing, which is taken to hang
NEAR = 1.1  # times the least time: as good
AGREE = 4e-2  # of a norm: how far two right implementations are apart on large shapes
COMMAND = (sys.executable, "-m", "lab.kernels.trial")


class Tried(NamedTuple):
    """An implementation that was tried. refused: why it is not taken, "" if it is right on every problem.

    seconds: of a call of each problem that was timed; errors: the worst of each output; same: whether it repeats itself
    to the last bit.
    """

    name: str
    refused: str
    seconds: dict[int, float]
    errors: dict[str, float]
    same: bool = True
    sums: dict[int, dict] | None = None

    def total(self, calls: Sequence[int]) -> float:
        """Seconds that a study spends in it."""
        return sum(self.seconds[place] * count for place, count in enumerate(calls))


def tried(name: str, problems: pathlib.Path, count: int, until: float, command: Sequence[str] = COMMAND) -> Tried:
    """Tries an implementation on the pickled problems; ends what hangs, or is not done by then (time.monotonic())."""
    with tempfile.TemporaryFile("w+") as log:
        options = dict(stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True, env=_environment())
        process = subprocess.Popen([*command, "--problems", str(problems), name], **options)
        lines, why = _read(process, until)
        log.seek(0)
        tail = " ".join(log.read()[-2000:].split())[-300:]
    found = collections.defaultdict(dict)
    for line in lines:
        found[line.get("problem")].update(line)
    refused = next((line["refused"] for line in lines if "refused" in line), "")
    places = [found[place] for place in range(count)]
    worst = {}
    for place in places:
        found_errors = place.get("errors", {})
        for output, error in found_errors.items():
            worst[output] = max(worst.get(output, 0.0), error)
        if _wrong(place):
            output = max(found_errors, key=lambda output: found_errors[output] / place["allowed"][output])
            told = f"wrong: {output} is off by {found_errors[output]:.1e} on problem {place['problem'] + 1}"
            refused = refused or told
    same = all(place.get("same", True) for place in places)
    if not same and name not in LIBRARIES:
        refused = refused or "does not give the same bits twice"
    if not refused and not all("seconds" in place for place in places):
        refused = why or f"ended with code {process.returncode}: {tail}"
    seconds = {i: place["seconds"] for i, place in enumerate(places) if "seconds" in place}
    return Tried(name, refused, seconds, worst, same, {i: place.get("sums", {}) for i, place in enumerate(places)})


def _environment() -> dict[str, str]:
    return {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}


def _read(process: subprocess.Popen, until: float) -> tuple[list[dict], str]:
    """What a trial said, until it ends or is ended; why it was ended, "" if it was not."""
    arrived: queue.Queue = queue.Queue()

    def follow():
        for line in process.stdout:
            with contextlib.suppress(ValueError):  # cut off, or not of ours
                arrived.put(json.loads(line))
        arrived.put(None)

    threading.Thread(target=follow, daemon=True).start()
    lines, why = [], ""
    while True:
        wait = min(SILENCE, until - time.monotonic())
        try:
            line = arrived.get(timeout=max(wait, 0.01))
        except queue.Empty:
            why = f"hangs: said nothing for {SILENCE:.0f} s" if wait == SILENCE else "was not done in time"
            break
        if line is None:
            break
        if isinstance(line, dict):
            lines.append(line)
            if _wrong(line) or "refused" in line:  # it need not go on
                break
    if process.poll() is None and (why or line is not None):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    return lines, why


def _wrong(line: dict) -> bool:
    return any(not error <= line["allowed"][output] for output, error in line.get("errors", {}).items())


class Decision(NamedTuple):
    """name: what is taken; warning: what a user should know of it, "" if nothing."""

    name: str
    tried: list[Tried]
    warning: str = ""


def choose(
    problems: Sequence,
    names: Sequence[str],
    say: Callable[[str], None] = lambda line: None,
    budget: float = BUDGET,
    command: Sequence[str] = COMMAND,
) -> Decision:
    """Tries the implementations, the most trusted first, for `budget` seconds, and takes the best of what was found by
    then; "tiled", with a warning, if none is right."""
    until, found = time.monotonic() + budget, []
    with tempfile.TemporaryDirectory(prefix="lab-attention-") as scratch:
        path = pathlib.Path(scratch) / "problems"
        path.write_bytes(pickle.dumps(list(problems)))
        for name in sorted(names, key=TRUSTED.index):
            if time.monotonic() > until:
                found.append(Tried(name, "was not tried: no time was left", {}, {}))
                continue
            say(f"attention: trying {name} ({len(found) + 1} of {len(names)})")
            found.append(tried(name, path, len(problems), until, command))
    return best(found, [problem.calls for problem in problems])


def best(found: list[Tried], calls: Sequence[int]) -> Decision:
    """The best of what was tried."""
    right = sorted((one for one in found if not one.refused), key=lambda one: one.total(calls))
    if not right:
        return Decision(
            "tiled", found, "no implementation of attention passed its trial here; taking tiled, which is slow"
        )
    good = [one for one in right if one.total(calls) <= NEAR * right[0].total(calls)]
    taken = min(good, key=lambda one: TRUSTED.index(one.name))
    others = [one for one in right if one is not taken]
    if others and not any(_agree(taken, other) for other in others):
        trusted = min(right, key=lambda one: TRUSTED.index(one.name))
        told = f"{taken.name} and {others[0].name} are right on small inputs and differ on the study's own; taking"
        return Decision(trusted.name, found, f"{told} {trusted.name}, the most trusted")
    warning = "" if taken.same else f"{taken.name} does not repeat itself to the last bit: nor do runs"
    return Decision(taken.name, found, warning)


def _agree(one: Tried, other: Tried) -> bool:
    """Whether two gave the same on the study's own shapes, as far as a few numbers of it tell."""
    for place, sums in (one.sums or {}).items():
        for output, (norm, wave) in sums.items():
            theirs = (other.sums or {}).get(place, {}).get(output)
            if theirs and max(abs(norm - theirs[0]), abs(wave - theirs[1])) > AGREE * max(norm, 1e-6):
                return False
    return True
