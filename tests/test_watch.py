"""Who of several processes is named as the one that keeps all from going on; and that they end, and say so.

The processes here are real and do no more than wait for each other, through a key-value store of files: that costs
little. What they do under JAX is in tests/test_host_faults.py.
"""

import json
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import threading

import commands
import pytest

from lab import watch
from lab.watch import Heard, Note

TIMEOUT, HEARTBEAT = 10.0, 30.0
STEPS = dict(run="r seed 0", phase="trains", long=False, expected=1.0)


def view(process: int, step: int = 7, still: float = 0.0, silent: float = 0.0, said=None, at="", waits=True, **note):
    return Heard(f"h{process}", Note(**STEPS | dict(step=step, count=step) | note), still, silent, at, waits, said)


FAILED = dict(code=1, text="disk", place="at step 8")
LOOPS = dict(at="lab/x.py line 3", waits=False, still=11.1)
CASES = {
    "all go on": ([view(0), view(1, 8)], None),
    "one is slow, and may be": ([view(0, still=10.9), view(1, 8, still=99)], None),
    "a loop": ([view(0, 8, still=11.2), view(1, **LOOPS)], (1, "step 7 of r seed 0 (trains): 11 s in lab/x.py")),
    "a loop behind others in a long phase": ([view(0, 8, long=True), view(1, **LOOPS)], (1, "stands still")),
    "a loop, and one that saves waits for it": ([view(0, long=True, still=12), view(1, **LOOPS)], (1, "stands still")),
    "a loop, at the step of the others": ([view(0, still=12), view(1, **LOOPS), view(2, still=12)], (1, "lab/x.py")),
    "a collective of one": ([view(0, 7, still=12), view(1, 9, still=12)], (0, "where it waits for the others")),
    "what is allowed is said": ([view(0, 8), view(1, **LOOPS | dict(expected=0.5))], (1, "(10 s are allowed, by run.")),
    "all wait": ([view(0, still=12), view(1, still=12)], (0, "process 1 of 2 on h1 stands still at step 7")),
    "one compiles": ([view(0, long=True, still=99), view(1, still=99)], None),
    "one compiles too long": ([view(0, long=True, still=101), view(1, still=101)], (0, "stands still")),
    "the first step may be slow": ([view(0, expected=None, still=99), view(1, 8, still=99)], None),
    "the slowest step was slow": ([view(0, expected=200, still=209), view(1, 8, still=209)], None),
    "data is opened": ([view(0, long=None, still=10**6), view(1, 8, still=10**6)], None),
    "one has ended well": ([view(0, 5, still=99, long=None), view(1, 2, 99, 99, dict(code=0, text=""))], None),
    "one was stopped": ([view(0, 5), view(1, 2, 99, 99, dict(code=75, text=""))], None),
    "one failed": ([view(0), view(1, said=FAILED)], (1, "ended at step 8: disk")),
    "one tells of another": (
        [view(0, said=dict(code=69, text="process 2 of 3 on h2 x")), view(1), view(2, silent=9)], (2, "x")
    ),
    "one failed, and another tells of it": (
        [view(0, said=dict(code=69, text="process 1 ...")), view(1, said=FAILED)], (1, "disk")
    ),
    "one is silent": ([view(0), view(1, silent=31), view(2)], (1, "does not answer, last at step 7")),
    "one was killed": ([view(0), view(1, 0, silent=31)], (1, "does not answer, last before its first step")),
    "the coordinator is silent": ([view(0, silent=31), view(1), view(2, silent=32)], (0, "does not answer")),
    "the coordinator is silent, and another told less": (
        [view(0, 9, 12, 6), view(1, 9), view(2, 6, 12, 6)], (0, "does not answer, last at step 9")
    ),
    "two are silent": ([view(0), view(1, silent=40), view(2, silent=31), view(3)], (1, "does not answer")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_who_is_named(name):
    views, found = CASES[name]
    told = watch.verdict(dict(enumerate(views)), TIMEOUT, HEARTBEAT)
    if found is None:
        assert told == ""
    else:
        assert told.startswith(f"process {found[0]} of {len(views)} on h{found[0]} ") and found[1] in told
        assert "\n" not in told


def test_notes_of_a_run(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(watch, "_note", Note())

    def after(seconds):
        clock[0] += seconds

    assert watch._note.place() == "before its first step (starts)" and watch.allowed(watch._note, 1) == float("inf")
    watch.begin("r", watch.BEGINS)
    with watch.phase("compiles"):
        after(50)
        assert watch._note.place() == "before its first step of r (compiles)" and watch.allowed(watch._note, 3) == 30
    watch.tell(4)
    assert watch._note.place() == "at step 5 of r (trains)" and watch.allowed(watch._note, 3) == 30  # none is measured
    for seconds, most in ((2, 2), (5, 5), (1, 5)):
        after(seconds)
        watch.tell(5)
        assert watch.allowed(watch._note, 3) == 3 + most
    with watch.phase("saves"):
        after(70)
        assert watch.allowed(watch._note, 3) == 30
    assert watch.allowed(watch._note, 3) == 8 and "(trains)" in watch._note.place()
    watch.tell(6)
    assert watch.allowed(watch._note, 3) == 8, "what a save took is of no step"
    watch.begin("r", "asks loss")
    watch.tell(40)
    assert watch._note.place() == "at step 40 of r (asks loss)" and watch._note.count == 6


GRACE = 5.0


def judged(monkeypatch, seconds: float, stands_still: float = 0.0, **known) -> list[tuple[float, int, str]]:
    """(seconds after its start, code, last words) of a watch that judges for so long, by a clock that waits for nobody.
    stands_still: seconds for which this process itself is stopped, behind the first three."""
    clock = [1000.0]

    class Beats(threading.Event):
        def wait(self, seconds):
            clock[0] += seconds + stands_still * (clock[0] <= 1003 < clock[0] + seconds)
            return self.is_set() or clock[0] > until

    until, left = clock[0] + seconds + stands_still, []
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    one = watch.Watch(None, 0, 2, TIMEOUT, HEARTBEAT, GRACE)
    one.over = Beats()
    monkeypatch.setattr(one, "leave", lambda *told: (left.append((clock[0] - 1000, *told)), one.over.set()))
    for name, value in known.items():
        setattr(one, name, value)
    one._judge()
    return left


def test_a_stop_waits_for_its_step_as_long_as_the_grace(monkeypatch):
    assert judged(monkeypatch, GRACE, _asked=1000.0) == []
    ((when, code, text),) = judged(monkeypatch, 20, _asked=1000.0)
    assert GRACE < when <= GRACE + TIMEOUT / watch.BEATS and code == watch.STOPPED
    assert text.startswith("a stop was asked for 6 s ago (run.grace), ")


def test_who_fails_leaves_and_who_was_stopped_itself_blames_nobody(monkeypatch):
    ((when, *told),) = judged(monkeypatch, 20, failed="the disk is full")
    assert told == [1, "the disk is full"] and when < TIMEOUT
    ((when, code, text),) = judged(monkeypatch, 2 * HEARTBEAT)
    assert HEARTBEAT < when < HEARTBEAT + 2 and code == watch.LOST and "process 1 of 2 on ? does not answer" in text
    assert judged(monkeypatch, HEARTBEAT, stands_still=2 * HEARTBEAT) == []


class Store(dict):
    """The runtime's, of one process."""

    def key_value_set(self, key, value, allow_overwrite=False):
        self[key] = value

    def key_value_dir_get(self, key):
        return [one for one in self.items() if one[0].startswith(key)]

    key_value_try_get = dict.__getitem__


def test_the_threads_end_before_python_does(monkeypatch):
    at_the_end, before = [], threading.active_count()
    monkeypatch.setattr(watch.atexit, "register", at_the_end.append)
    one = watch.Watch(Store(), 0, 2, 2.0, HEARTBEAT, GRACE)
    one.start()
    assert threading.active_count() == before + 2
    for work in at_the_end:
        work()
    left = threading.active_count() - before
    one.end()
    assert left == 0


PROCESS = """
    import atexit, os, pathlib, signal, sys, threading, time
    # One that lives within the runtime's C++ while Python ends would abort the process.
    atexit.register(lambda: threading.active_count() > 1 and os._exit(99))
    place, process, count, fault = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    if fault == "clock": time.time = lambda real=time.time: real() - 3600
    from lab import command, watch
    from lab.errors import UserError

    class Store:
        def key_value_set(self, key, value, allow_overwrite=False):
            while (place / "gone").exists(): time.sleep(0.1)  # as where the coordinator is stopped
            path = place / key.replace("/", "+")
            if path.exists() and not allow_overwrite: raise RuntimeError("ALREADY_EXISTS")
            draft = place / f".{process}{threading.get_ident()}"
            draft.write_text(value); draft.replace(path)
        def key_value_dir_get(self, key):
            while (place / "gone").exists(): time.sleep(0.1)
            start = key.replace("/", "+")
            return [(p.name.replace("+", "/"), p.read_text()) for p in place.iterdir() if p.name.startswith(start)]
        def key_value_try_get(self, key): return (place / key).read_text()

    (place / f"up-{process}").touch()
    while not all((place / f"up-{i}").exists() for i in range(count)): time.sleep(0.05)  # as the runtime joins them
    watch._watch = watch.Watch(Store(), process, count, 4.0, 8.0, 2.0)
    watch._watch.start()
    sys.path.insert(0, str(place))
    from jax.wait import wait

    def main(argv):
        watch.begin("r", watch.BEGINS)
        for step in range(12):
            if step == 6:
                if fault in ("kill", "stop", "gone"): time.sleep(1)  # so that the others have heard of this step
                if fault == "kill": os.kill(os.getpid(), signal.SIGKILL)
                if fault == "stop": os.kill(os.getpid(), signal.SIGSTOP)
                if fault == "loop":
                    while True: time.sleep(0.01)
                if fault == "barrier": threading.Event().wait()
                if fault == "disk": raise UserError("the disk is full")
                if fault == "bug": raise ValueError("a bug\\nof two lines")
                if fault == "gone": (place / "gone").touch(); os.kill(os.getpid(), signal.SIGSTOP)
                if fault == "notice": (place / watch.NOTICE).write_text("now"); threading.Event().wait()
            watch.tell(step)
            (place / f"at-{process}").write_text(str(step))
            wait(place, count, step)
            time.sleep(0.05)
        return 0
    command.run(main)
"""
WAIT = """
    import time
    def wait(place, count, step):
        while any(not (p := place / f"at-{i}").exists() or int(p.read_text() or -1) < step for i in range(count)):
            time.sleep(0.02)
            if step and any(p.name.startswith("dead") for p in place.iterdir()):
                raise RuntimeError("connection closed by peer")
"""
FAULTS = {
    "none": (0, ""),
    "clock": (0, ""),
    "kill": (None, "process 1 of 3 on {host} does not answer, last at step"),
    "stop": (None, "process 1 of 3 on {host} does not answer, last at step"),
    "loop": (watch.LOST, "process 1 of 3 on {host} stands still at step 6 of r (trains)"),
    "barrier": (watch.LOST, "process 1 of 3 on {host} stands still at step 6 of r (trains)"),
    "disk": (2, "process 1 of 3 on {host} ended at step 6 of r (trains): the disk is full"),
    "bug": (1, "process 1 of 3 on {host} ended at step 6 of r (trains): ValueError: a bug of two lines"),
    "notice": (75, "a stop was asked for"),
    "gone": (None, "process 0 of 3 on {host} does not answer, last at step"),
}
STRUCK = {"gone": 0}  # else process 1


@pytest.mark.slow
def test_processes_end_and_name_who_is_to_blame(tmp_path):
    """All faults at once: they wait most of the time. Process 0 is the last to end: it is the coordinator."""
    running = {}
    for fault in FAULTS:
        place = tmp_path / fault
        (place / "jax").mkdir(parents=True)
        (place / "jax" / "__init__.py").touch()
        (place / "jax" / "wait.py").write_text(textwrap.dedent(WAIT))
        (place / "process.py").write_text(textwrap.dedent(PROCESS))
        started = [
            subprocess.Popen(
                [sys.executable, place / "process.py", place, str(number), "3",
                 fault if number == STRUCK.get(fault, 1) else ""],
                cwd=place, env={"PYTHONPATH": str(commands.REPOSITORY), "LAB_PROGRESS": str(place)},
                stderr=subprocess.PIPE, text=True,
            ) for number in range(3)
        ]  # fmt: skip
        running[fault] = started
    host = pathlib.Path("/proc/sys/kernel/hostname").read_text().strip()
    try:
        for fault, (code, told) in FAULTS.items():
            one = running[fault].pop(STRUCK.get(fault, 1))
            ends = {each.args[3]: each.communicate(timeout=400)[1] for each in running[fault]}
            expected = {"none": 0, "clock": 0, "notice": 75}.get(fault, watch.LOST)
            assert [each.returncode for each in running[fault]] == [expected] * 2, (fault, ends)
            for text in ends.values():
                last = text.strip().rpartition("\n")[2]
                assert last.startswith(f"lab: {told.format(host=host)}" if told else ""), (fault, text)
            if code is None:
                one.kill()
            one.communicate(timeout=100)
            running[fault].append(one)
            assert one.returncode == (-signal.SIGKILL if code is None else code), fault
            if fault == "bug":
                assert "of two lines" in (tmp_path / fault / "1").read_text()
            assert re.search("host|process 1|stop was asked|process 0", (tmp_path / fault / "2").read_text())
    finally:
        for each in (each for started in running.values() for each in started):
            each.kill()


def test_a_single_process_is_not_watched(capfd):
    assert watch._watch is None
    watch.done(1)
    watch.fails(ValueError("x"), unexpected=True)
    watch.leave(1, "text")
    assert capfd.readouterr() == ("", "")
    assert json.loads(json.dumps(watch.dataclasses.asdict(watch._note)))["run"] == watch._note.run
