"""Whether the processes of one program go on: each tells how far it is, all look, and who stands still is named.

JAX's runtime ends a program whose process is dead, and waits forever for one that lives and does nothing. So the main
thread of each process notes where it is (`begin`, `phase`, `tell`); a thread of its own tells the others through the
runtime's key-value store, and reads what they tell. Ages are measured by the clock of who reads: clocks may differ.
Of a single process nothing of this runs, and notes are all that is made.
"""

import atexit
import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from lab.errors import UserError

LOST = 69  # EX_UNAVAILABLE: code of a process that ends because of another one
STOPPED = 75  # EX_TEMPFAIL: schedulers requeue it
LONGER = 10  # times run.stuck_timeout: what compiling, saving and the like may take
GONE = 3  # beats that a process misses that has ended without a word
BEATS = 20  # in run.stuck_timeout
TOLD, SAID = "lab/told/", "lab/said/"  # keys: how far processes are; the last words of those that ended
BEGINS, TRAINS = "begins", "trains"
NOTICE = "RECEIVED_PREEMPTION_NOTICE"  # the runtime's own key: some process got SIGTERM


@dataclasses.dataclass(frozen=True)
class Note:
    """Where a main thread is. step: the last that it began, from 1 on; 0: none. count: of its calls of `tell`, which
    all processes make equally often. change: counts notes. expected: seconds of the slowest step so far; None: no two
    steps were made since `begin`. long: at work that may take LONGER; None: as long as it likes."""

    run: str = ""
    phase: str = "starts"
    step: int = 0
    count: int = 0
    change: int = 0
    expected: float | None = None
    long: bool | None = None

    def place(self) -> str:
        step = f"at step {self.step}" if self.step else "before its first step"
        return f"{step}{f' of {self.run}' if self.run else ''} ({self.phase})"


_note = Note()
_moved = _since = time.monotonic()  # when that was noted, and when the last step was, but for phases within it
_watch: "Watch | None" = None


def _set(**changed) -> None:
    global _note, _moved
    _note, _moved = dataclasses.replace(_note, change=_note.change + 1, **changed), time.monotonic()


def begin(run: str, phase: str, long: bool | None = True) -> None:
    """The main thread is at what may take long, until it tells a step."""
    _set(run=run, phase=phase, expected=None, long=long, step=0 if run != _note.run else _note.step)


def tell(step: int) -> None:
    """The main thread has begun a training step, counted from 0, or a piece of an ask behind so many. All processes
    call it equally often."""
    global _since
    now, expected = time.monotonic(), _note.expected
    if not _note.long:
        expected = max(now - _since, expected or 0)
    _since = now
    phase = TRAINS if _note.phase == BEGINS else _note.phase
    step += phase == TRAINS
    _set(phase=phase, step=step, count=_note.count + 1, expected=expected, long=False)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """The main thread does within a step what may take long."""
    global _since
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, begun = _note, time.monotonic()
    _set(phase=name, long=before.long if before.long is None else True)
    try:
        yield
    finally:
        _since += time.monotonic() - begun
        _set(phase=before.phase, long=before.long)


class Heard(NamedTuple):
    """What is known here of a process. still, silent: seconds since its notes changed, and since it told anything.
    at: where in the code its main thread is; waits: that is within JAX. said: its last words; None: it runs."""

    host: str
    note: Note
    still: float
    silent: float
    at: str = ""
    waits: bool = False
    said: dict | None = None


def allowed(note: Note, timeout: float) -> float:
    """Seconds that a process may stand still."""
    if note.long is None:
        return float("inf")
    return timeout * LONGER if note.long or note.expected is None else timeout + note.expected


def verdict(views: Mapping[int, Heard], timeout: float, heartbeat: float) -> str:
    """Which process keeps the others from going on, where, and why; "" while all may go on."""
    of = f" of {len(views)}"
    ended = {process: view for process, view in views.items() if view.said and view.said["code"] not in (0, STOPPED)}
    for process, view in sorted(ended.items(), key=lambda one: one[1].said["code"] == LOST):
        if view.said["code"] == LOST:  # it names another
            return view.said["text"]
        return f"process {process}{of} on {view.host} ended {view.said['place']}: {view.said['text']}"
    running = {process: view for process, view in views.items() if not view.said}
    least = min((view.note.count for view in running.values()), default=0)
    behind = {process: view for process, view in running.items() if view.note.count == least}
    over = {process: view for process, view in behind.items() if view.still > allowed(view.note, timeout)}
    # Who waits within JAX may wait for one who does not, in a long phase, too: a save begins with a wait for all.
    blamed = {process: view for process, view in over.items() if not view.waits}
    blamed = blamed or (over if len(over) == len(behind) else {})
    silent = {process: view for process, view in running.items() if view.silent > heartbeat}
    if blamed and not silent:
        silent = {process: view for process, view in running.items() if view.silent > timeout / 2}
        if len(silent) < len(views) - 1:
            silent = {process: view for process, view in silent.items() if process in blamed}
    if silent:
        # Where all others are silent, the coordinator is: they tell through it, and what they told is old.
        process = min(silent) if len(silent) == len(views) - 1 else max(silent, key=lambda one: silent[one].silent)
        view = silent[process]
        return (
            f"process {process}{of} on {view.host} does not answer, last {view.note.place()}: no word for "
            f"{view.silent:.0f} s; it was stopped or killed, or cannot be reached"
        )
    if not blamed:
        return ""
    told = [
        f"process {process}{of} on {view.host} stands still {view.note.place()}: {view.still:.0f} s in {view.at}, "
        + ("where it waits for the others" if view.waits else "and the others wait for it")
        for process, view in blamed.items()
    ]
    rest = [f"process {one} is {view.note.place()}" for one, view in running.items() if one not in blamed]
    most = max(allowed(view.note, timeout) for view in blamed.values())
    why = f"{most:.0f} s are allowed, by run.stuck_timeout = {timeout:g} beyond the slowest step"
    return f"{'; '.join([*told, *rest][:8])} ({why})"


def _place() -> tuple[str, bool]:
    """Where the main thread is: the innermost line of the lab and what it called; whether that is within JAX."""
    inner = frame = sys._current_frames().get(threading.main_thread().ident)
    root, waits = str(pathlib.Path(__file__).parent), False
    while frame is not None and not (where := frame.f_code.co_filename).startswith(root):
        waits, frame = waits or any(f"/{name}/" in where for name in ("jax", "jaxlib", "orbax")), frame.f_back
    if inner is None:
        return "no code", False
    called = f"{inner.f_code.co_name} of {'/'.join(pathlib.Path(inner.f_code.co_filename).parts[-2:])}"
    if frame is None:
        return called, waits
    line = f"lab/{pathlib.Path(frame.f_code.co_filename).relative_to(root)} line {frame.f_lineno}"
    return line if frame is inner else f"{line}, {called}", waits


class Watch:
    """Tells the others of this process, and ends it where one of them keeps all from going on."""

    def __init__(self, client, process: int, processes: int, timeout: float, heartbeat: float, grace: float):
        self._client, self.process, self.processes = client, process, processes
        self._timeout, self._heartbeat, self._grace = timeout, heartbeat, grace
        self.beat = min(max(timeout / BEATS, 0.1), 5.0)
        self._told = {one: dict(host="?", note=Note(), at="", waits=False) for one in range(processes)}
        self._awake = time.monotonic()
        self._changed, self._heard = (dict.fromkeys(self._told, self._awake) for _ in range(2))
        self._said: dict[int, dict] = {}
        self._asked, self.failed, self.over, self._ends = None, None, threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._exchange, self._judge)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()
        atexit.register(self.end)

    def end(self) -> None:
        """Ends the threads: one that Python's own end meets within the runtime's C++ aborts the process. One that waits
        for a coordinator which is gone is left."""
        self.over.set()
        self._ends.set()
        for thread in self._threads:
            thread.join(max(2 * self.beat, 2))

    def views(self) -> dict[int, Heard]:
        now = time.monotonic()
        found = {
            one: Heard(told["host"], told["note"], now - max(self._changed[one], self._awake),
                      now - max(self._heard[one], self._awake), told["at"], told["waits"], self._said.get(one))
            for one, told in self._told.items()
        }  # fmt: skip
        ours = found[self.process]  # as it is, whether the coordinator answers or not
        found[self.process] = ours._replace(note=_note, still=now - max(_moved, self._awake), silent=0.0)
        return found

    def say(self, code: int, text: str) -> None:
        """Last words: the first are kept. A coordinator that does not answer is not waited for."""
        words = json.dumps(dict(code=code, text=text, place=_note.place()))

        def send() -> None:
            with contextlib.suppress(Exception):
                self._client.key_value_set(f"{SAID}{self.process}", words)

        sending = threading.Thread(target=send, daemon=True)
        sending.start()
        sending.join(max(2 * self.beat, 2))

    def _exchange(self) -> None:
        host, beat = socket.gethostname(), 0
        while not self._ends.is_set():
            at, waits = _place()
            told = dict(host=host, beat=beat, at=at, waits=waits, note=dataclasses.asdict(_note))
            _keep(self.process, f"host {host}, {_note.place()}", self.over)
            with contextlib.suppress(Exception):  # a coordinator that is gone: the thread that judges sees it
                self._client.key_value_set(f"{TOLD}{self.process}", json.dumps(told), allow_overwrite=True)
                self._read(self._client.key_value_dir_get(TOLD))
                self._hear()
            if self._asked is None:
                with contextlib.suppress(Exception):  # there is none
                    self._client.key_value_try_get(NOTICE)
                    self._asked = time.monotonic()
            beat += 1
            self._ends.wait(self.beat)

    def _read(self, found: list[tuple[str, str]]) -> None:
        now = time.monotonic()
        for key, text in found:
            one, told = int(key.rsplit("/")[-1]), json.loads(text)
            told["note"] = Note(**told["note"])
            before, self._told[one] = self._told[one], told
            if before["note"] != told["note"]:
                self._changed[one] = now
            if before.get("beat") != told["beat"]:
                self._heard[one] = now

    def _hear(self) -> None:
        for key, text in self._client.key_value_dir_get(SAID):
            self._said[int(key.rsplit("/")[-1])] = json.loads(text)

    def _judge(self) -> None:
        last = time.monotonic()
        while not self.over.wait(self.beat):
            now = time.monotonic()
            if now - last > GONE * self.beat + 1:  # this process was stopped itself: nobody was heard meanwhile
                self._awake = now
            last = now
            if self.failed and not self.over.wait(2 * GONE * self.beat):  # its main thread waits for the others
                self.leave(1, self.failed)
            told = verdict(self.views(), self._timeout, self._heartbeat)
            if self._asked is not None and now - self._asked > self._grace and not told:
                self.leave(
                    STOPPED,
                    f"a stop was asked for {now - self._asked:.0f} s ago (run.grace), {_note.place()}: the newest "
                    "checkpoint stands; run the same command again to go on",
                )
            # Its main thread may have met the same, and says so itself.
            if told and not self.over.wait(2 * self.beat) and not self.failed:
                self.leave(LOST, told)

    def leave(self, code: int, text: str, prefix: str = "lab: ") -> None:
        """Says a last line, and ends the process at once; the coordinator when the others have."""
        with self._lock:  # held to the end: one thread speaks
            self.over.set()
            print(f"{prefix}{text}", file=sys.stderr, flush=True)
            _keep(self.process, text)
            self.say(code, text)
            until = time.monotonic() + 2 * GONE * self.beat
            while self.process == 0 and time.monotonic() < until and not all(
                one in self._said or view.silent > GONE * self.beat for one, view in self.views().items() if one
            ):  # fmt: skip
                time.sleep(min(self.beat, 0.2))
                with contextlib.suppress(Exception):
                    self._hear()
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(code)

    def culprit(self) -> str:
        """Whose end an error of the runtime here is about, once that shows; "" if it is about none's."""
        until = time.monotonic() + max(GONE * self.beat, 3) + 2 * self.beat
        while time.monotonic() < until:
            if told := verdict(self.views(), float("inf"), max(GONE * self.beat, 3)):
                return told
            time.sleep(self.beat / 4)
        return ""


def _keep(process: int, text: str, over: threading.Event | None = None) -> None:
    """Writes a line into the directory of a launcher that asks for it, for what it says if this process ends."""
    place = os.environ.get("LAB_PROGRESS")
    if place and not (over and over.is_set()):
        with contextlib.suppress(OSError):
            draft = pathlib.Path(place, f".{process}")
            draft.write_text(f"{text}\n")
            draft.replace(pathlib.Path(place, str(process)))


def start(process: int, processes: int, run) -> None:
    """Watches from now on. run: config.run."""
    global _watch
    from jax._src import distributed

    timeouts = run.stuck_timeout, run.heartbeat_timeout, run.grace
    _watch = Watch(distributed.global_state.client, process, processes, *timeouts)
    _watch.start()


def done(code: int) -> None:
    """The program ends as it should, and so will the others."""
    if _watch:
        _watch.over.set()
        _watch.say(code, "")


def fails(error: Exception, unexpected: bool) -> None:
    """An error goes up, and what it passes may wait for the others: they are told at once, and the wait has an end."""
    if _watch and not _watch.failed:
        if told := _watch.culprit() if unexpected else "":
            _watch.leave(LOST, f"{told}; here: {line(error)}")
        if unexpected:
            traceback.print_exc()
        _watch.failed = line(error)
        _watch.say(1, _watch.failed)


def line(error: Exception) -> str:
    """An error on one line."""
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())}"[:600]


def leave(code: int, text: str, unexpected: bool = False) -> None:
    """Ends one of several processes with its last words: the others would be awaited for minutes. Returns for a single
    one. unexpected: of an error that the end of another process may be the cause of."""
    if _watch:
        told = _watch.culprit() if unexpected else ""
        if unexpected and not told:
            traceback.print_exc()
        _watch.leave(LOST if told else code, f"{told}; here: {text}" if told else text)
