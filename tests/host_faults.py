"""Faults injected into a study that two processes train, one after another: what ends, what is said, what is lost.

    python tests/host_faults.py --faults 100 --out faults.jsonl

Each fault is drawn (kind, process, phase, step), strikes two processes that launch/local.sh started, and must end both
within a limit, with a last line that names the cause, the host and the step. The next start goes on from what was
saved, and meets the next fault; when a study is done, its losses, its answers and the bits of its last checkpoint are
compared with those of an undisturbed one. A line of JSON for each fault goes to --out, a table to standard output.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from typing import NamedTuple

import commands
import compiling
import forked

STEPS, EVERY = 24, 4  # of the study; between checkpoints
STUCK, HEARTBEAT, GRACE = 10, 20, 90  # seconds: run.stuck_timeout, run.heartbeat_timeout, run.grace
LONGEST = 600  # seconds that a start of two processes may take
PHASES = ("starts", "compiles", "trains", "saves", "asks")


class Fault(NamedTuple):
    kind: str
    process: int
    phase: str
    step: int  # at which a process is, or that has been made when it saves; 0: before the first


class Kind(NamedTuple):
    """phases: in which it may strike. seconds: in which all must have ended. said: of the last line, a pattern; in it
    {process} and {place}. processes: that it may strike."""

    phases: tuple[str, ...]
    seconds: float
    said: str
    processes: tuple[int, ...] = (0, 1)


KILLED = r"process {process} ended with code 137: killed by signal 9; host \S+, {place}"
STANDS = r"process \d ended with code 69: process {process} of 2 on \S+ stands still {place}"
KINDS = {
    "killed": Kind(("compiles", "trains", "saves", "asks"), 15, KILLED, (1,)),
    "coordinator gone": Kind(("compiles", "trains", "saves", "asks"), 15, KILLED, (0,)),
    "stopped": Kind(
        ("trains", "asks"), HEARTBEAT + 25,
        r"process \d ended with code 69: process {process} of 2 on \S+ does not answer, last {place}",
    ),
    "stuck": Kind(("trains", "asks"), STUCK + 15, STANDS),
    "missing collective": Kind(("trains", "asks"), STUCK + 15, STANDS),
    "disk full": Kind(("saves",), 15, r"process \d ended with code \d+: .*the disk is full"),
    "asked to stop": Kind(("starts", "compiles", "trains", "saves", "asks"), GRACE + 10, ""),
    "clock skewed": Kind(("trains",), LONGEST, ""),
    "checkpoint flipped": Kind(("trains",), 15, KILLED, (1,)),
    "checkpoint truncated": Kind(("trains",), 15, KILLED, (1,)),
    "shard missing": Kind(("compiles",), LONGEST, r"process {process} ended with code 2: .*nowhere\S* matches no file"),
}  # fmt: skip


# ---- in a process of the study


def arm(fault: Fault, struck: pathlib.Path) -> None:
    """Lets the fault strike this process: where it notes its phase and step, which it does everywhere."""
    from lab import watch

    done = []

    def strike() -> None:
        if done:
            return
        done.append(True)
        time.sleep(1.5 if fault.kind != "asked to stop" else 0)  # so that the others have heard of this step
        struck.write_text(json.dumps(dict(time=time.clock_gettime(time.CLOCK_MONOTONIC), place=watch._note.place())))
        if fault.kind == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault.kind == "stuck":
            while True:
                time.sleep(0.01)
        elif fault.kind == "missing collective":  # one that no other takes part in
            from jax._src import distributed

            distributed.global_state.client.wait_at_barrier("of one", 10**9)
        elif fault.kind == "asked to stop":
            os.kill(os.getpid(), signal.SIGTERM)
        elif fault.kind == "disk full":
            raise OSError(28, "No space left on device")
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    tell, phase, begin = watch.tell, watch.phase, watch.begin

    def beginning(*arguments, **more) -> None:
        if fault.phase == "starts":
            strike()
        begin(*arguments, **more)

    asked = []

    def telling(step: int) -> None:
        tell(step)
        if done:  # asked to stop: a study this small would be done before the processes agree on a step
            time.sleep(0.2)
        asked.extend(["piece"] * watch._note.phase.startswith("asks"))
        if fault.phase == "asks" and len(asked) == (1 if fault.kind == "asked to stop" else 3):
            # The third: by then it is known how long a piece takes.
            strike()
        if fault.phase == "trains" == watch._note.phase and watch._note.step >= fault.step:
            strike()

    @contextlib.contextmanager
    def noting(name: str):
        with phase(name):
            if name == fault.phase and watch._note.step >= fault.step:
                strike()
            yield

    if fault.kind == "clock skewed":
        real = time.time
        time.time = lambda: real() - 7200
        struck.write_text(json.dumps(dict(time=time.clock_gettime(time.CLOCK_MONOTONIC), place="")))
    elif fault.kind == "shard missing":
        struck.write_text(json.dumps(dict(time=time.clock_gettime(time.CLOCK_MONOTONIC), place="")))
        sys.argv.append("--config.data.path=nowhere/*.jsonl")
    else:
        watch.tell, watch.phase, watch.begin = telling, noting, beginning


def before() -> None:
    """In a forked process, before it becomes one of the study's."""
    from jax._src import compiler

    from lab import main

    main.Reporter.rebuild = lambda self: None  # a third of what a start costs, and nothing that is compared
    # JAX keeps compiled programs of process 0 alone, and half of what a start costs is to compile those of process 1.
    compiler.distributed = types.SimpleNamespace(global_state=types.SimpleNamespace(process_id=0))
    if text := os.environ.get("HOST_FAULT"):
        fault = Fault(*json.loads(text))
        if str(fault.process) == os.environ["JAX_PROCESS_ID"]:
            arm(fault, pathlib.Path(os.environ["HOST_STRUCK"]))


# ---- what injects


class Injector:
    """Starts two processes of a study on a directory, with a fault or without, and says how they ended."""

    def __init__(self, place: pathlib.Path):
        self.place = place
        self.study = commands.write_study(
            place / "tiny.py", commands.write_corpus(place / "corpus.jsonl"), commands.ONE_CELL, sections=("curves",),
            steps=STEPS,
        )  # fmt: skip
        of_jax = dict(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="1") | compiling.FAST
        self.environment = {name: x for name, x in os.environ.items() if not name.startswith("JAX_")} | of_jax
        self.server = forked.Server(place, self.environment)

    def start(self, work: pathlib.Path, fault: Fault | None = None) -> dict:
        """code, last line, seconds from the fault to the end of all."""
        struck = self.place / "struck"
        struck.unlink(missing_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        more = {forked.HOOK: "host_faults"} | dict(PYTHON=str(self.server.python), PORT=str(port), DEVICES="1")
        if fault:
            more |= dict(HOST_FAULT=json.dumps(fault), HOST_STRUCK=str(struck))
        options = dict(stuck_timeout=STUCK, heartbeat_timeout=HEARTBEAT, grace=GRACE) | {"checkpoint.every": EVERY}
        told = subprocess.run(
            [commands.REPOSITORY / "launch" / "local.sh", "2", f"--config={self.study}", f"--workdir={work}",
             *(f"--config.run.{name}={value}" for name, value in options.items())],
            env=self.environment | more, capture_output=True, text=True, timeout=LONGEST,
        )  # fmt: skip
        ended = time.clock_gettime(time.CLOCK_MONOTONIC)
        found = json.loads(struck.read_text()) if struck.exists() else None
        return dict(
            code=told.returncode, last=told.stderr.strip().rpartition("\n")[2], out=told.stdout, err=told.stderr,
            seconds=found and round(ended - found["time"], 1), place=found and found["place"],
        )  # fmt: skip

    def strike(self, work: pathlib.Path, fault: Fault) -> dict:
        """The outcome of one fault: when all had ended, and what was said; "wrong": what was not as it must be."""
        kind, found = KINDS[fault.kind], self.start(work, fault)
        wrong = []
        if found["seconds"] is None:
            wrong.append("it did not strike")
        elif not kind.said:
            # One that is asked to stop at the last piece of its last ask may be done.
            right = ((75, 0) if fault.phase == "asks" else (75,)) if fault.kind == "asked to stop" else (0,)
            wrong += [f"code {found['code']}"] * (found["code"] not in right)
        else:
            said = kind.said.format(process=fault.process, place=re.escape(found["place"]))
            if not re.search(rf"launch/local.sh: {said}", found["last"]):
                wrong.append(f"the last line: {found['last']}")
        slow = re.search(r"\((\d+) s are allowed", found["last"])
        if found["seconds"] and found["seconds"] > kind.seconds + (int(slow[1]) - STUCK if slow else 0):
            wrong.append(f"{found['seconds']} s")
        if fault.kind.startswith("checkpoint"):
            damage(work, fault.kind)
        outcome = dict(seconds=found["seconds"], last=found["last"], wrong=wrong, err=found["err"], out=found["out"])
        return fault._asdict() | outcome


def damage(work: pathlib.Path, kind: str) -> None:
    """Changes a byte of, or halves, the largest file of the newest checkpoint."""
    (run,) = commands.runs(work).values()
    newest = run / "checkpoints" / str(max(commands.steps_saved(run)))
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    if kind.endswith("flipped"):
        data[len(data) // 2] ^= 16
    else:
        del data[len(data) // 2 :]
    largest.write_bytes(data)


def newest(work: pathlib.Path) -> int:
    """The newest checkpoint that stands; 0 of none."""
    return max((step for run in commands.runs(work).values() for step in commands.steps_saved(run)), default=0)


BEGAN = re.compile(r"seed 0: (?:begins|from step (\d+))\n")
FELL_BACK = "taking the one before"


def check_start(found: dict, saved: int, damaged: dict | None) -> dict | None:
    """A start goes on from the newest checkpoint, if any step is left to make, and from no older one; of one that was
    `damaged` by a fault it says so. Returns the fault whose damage is still to be met."""
    began, fell_back = BEGAN.search(found["out"]), FELL_BACK in found["err"]
    if began and int(began[1] or 0) != saved and not fell_back:
        found["wrong"].append(f"the start went on from {began[1] or 0}, and {saved} was saved")
    if damaged and began and not fell_back:
        damaged["wrong"].append("the next start says nothing of the checkpoint")
    return None if began or fell_back else damaged


def bits(work: pathlib.Path) -> dict:
    """What a study has found, as far as it is: losses by step, sums of the bits of its last checkpoint, answers."""
    found = dict(losses=[], sums=None, answers=None)
    for run in commands.runs(work).values():
        found["losses"] = commands.metrics(run)
        if STEPS in commands.steps_saved(run):
            found["sums"] = json.loads((run / "checkpoints" / str(STEPS) / "position" / "metadata").read_text())
        for path in run.glob("evaluations/*.json"):
            if (rows := json.loads(path.read_text()))["complete"]:
                found["answers"] = rows["conditions"]
    return found


def lives(count: int, chance: random.Random) -> list[list[Fault]]:
    """Faults of studies, one after another: each meets some at steps that grow, and one while it is asked, mostly."""
    every = [name for name in KINDS for _ in range(count // len(KINDS) + 1)]
    chance.shuffle(every)
    found, life, step = [], [], 0
    for name in every[:count]:
        kind = KINDS[name]
        phase = chance.choice(kind.phases)
        made = step // EVERY * EVERY  # at least so many are saved
        at = {"starts": step, "compiles": step, "saves": made + EVERY, "asks": STEPS}.get(
            phase, made + chance.randint(3, EVERY + 2)
        )
        if name.startswith("checkpoint"):
            at = max(at, 2 * EVERY + 1)
        at = min(at, STEPS)
        life.append(Fault(name, chance.choice(kind.processes), phase, 0 if phase in ("starts", "compiles") else at))
        step = max(step, at + 6 * (name == "asked to stop"))  # the hosts agree on one within a second: 5 steps, and 1
        if name == "clock skewed" or phase == "asks" or step > STEPS - EVERY:  # the study is done, or nearly
            found.append(life)
            life, step = [], 0
    return found + [life] * bool(life)


def run(injector: Injector, faults: list[list[Fault]], undisturbed: dict, keep) -> list[dict]:
    """Outcomes of all faults; keep(outcome) comes with those of a study once it is done."""
    outcomes = []
    for life in faults:
        work, met, saved, damaged = pathlib.Path(tempfile.mkdtemp(prefix="life-", dir=injector.place)), [], 0, None
        for fault in life:
            met.append(injector.strike(work, fault))
            damaged = check_start(met[-1], saved, damaged)
            saved = newest(work)
            if fault.kind.startswith("checkpoint"):
                damaged = met[-1]
            ours = bits(work)["losses"]
            if ours != undisturbed["losses"][: len(ours)]:
                met[-1]["wrong"].append("the losses so far are others")
            print(
                f"{fault}: {met[-1]['wrong'] or 'as it must be'}; {met[-1]['seconds']} s", file=sys.stderr, flush=True
            )
        last = injector.start(work)
        check_start(last | dict(wrong=met[-1]["wrong"]), saved, damaged)
        same = bits(work) == undisturbed
        if last["code"]:
            met[-1]["wrong"].append(f"the last start: code {last['code']}, {last['err'][-2000:]}")
        for one in met:
            one["identical"] = same
            keep(one)
        outcomes += met
    return outcomes


def table(outcomes: list[dict]) -> str:
    """By kind and phase: how many, of how many all was right, seconds to the end of all, in how many restarts were
    identical."""
    lines = [
        "| kind | phase | faults | ended and named | seconds to the end: most | restart identical |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for kind in KINDS:
        for phase in PHASES:
            of = [one for one in outcomes if (one["kind"], one["phase"]) == (kind, phase)]
            if of:
                most = max((one["seconds"] or 0 for one in of if KINDS[kind].said), default=0)
                lines.append(
                    f"| {kind} | {phase} | {len(of)} | {sum(not one['wrong'] for one in of)} | {most or '—'} | "
                    f"{sum(one['identical'] for one in of)} |"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--place", type=pathlib.Path, help="a directory for the studies (default: a temporary one)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("host_faults.jsonl"))
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        injector = Injector(flags.place or pathlib.Path(made))
        try:
            first = injector.start(injector.place / "undisturbed")
            assert first["code"] == 0, first["err"]
            undisturbed = bits(injector.place / "undisturbed")
            with flags.out.open("a") as file:
                run(
                    injector, lives(flags.faults, random.Random(flags.seed)), undisturbed,
                    lambda one: print(json.dumps(one), file=file, flush=True),
                )  # fmt: skip
        finally:
            injector.server.close()
    print(table([json.loads(line) for line in flags.out.read_text().splitlines()]))


if __name__ == "__main__":
    main()
