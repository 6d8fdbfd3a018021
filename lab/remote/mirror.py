"""A directory in an object store, worked on in a copy on this machine.

A store can neither append nor rename, and every look at it is a request. Orbax saves to gs:// and to no s3://, and
TensorStore warns that its own writes there are not atomic. So all files are made and read in the copy, by the code of a
local directory, and a thread uploads what has changed, in an order in which whoever is cut off leaves nothing that
says more than what is there: a step's checkpoint after its lines of metrics.jsonl, its SEAL after its numbers, and a
result after its checkpoint. The store holds what the directory would. What a machine that dies loses is what came
after the last upload; it is made again from the last checkpoint there.

The only thing that is asked of a store beside reads and writes is to create an object if there is none.
"""

import concurrent.futures
import contextlib
import functools
import itertools
import logging
import os
import pathlib
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from lab.errors import UserError
from lab.remote.store import Lease, Store, patient, reached

EXPIRES = 60.0  # seconds without a renewal after which a lease is nobody's
EVERY = 15.0  # seconds between uploads
AT_ONCE = 8  # requests under way
TOLD = 64 * 2**20  # bytes from which on a transfer is told
HEAVY = ("checkpoints", "stacks", "set_aside")  # fetched where they are needed
SEAL = "_CHECKPOINT_METADATA"  # of Orbax, in the directory of each step: uploaded last
UNFINISHED = ".orbax-checkpoint-tmp"
LAST = ("result.json", "failure.json")


class Seen(NamedTuple):
    """A file as it was when the copy and the store agreed."""

    there: tuple
    here: tuple


class Mirror:
    """The copy of a directory in a store. Of several hosts, process 0 alone opens it; all see `local`."""

    def __init__(self, url: str, local: pathlib.Path, files=None):
        self.store, self.local = Store(url, files), local
        self._known: dict[str, Seen] = {}
        self._leases: list[Lease] = []
        self._lost: set[str] = set()  # directories that another program has taken over
        self._lock = threading.RLock()  # of what is known; held while files move, which may take long
        self._renewing = threading.RLock()  # of leases: taken after the other one, if both are
        self._closed, self._failing = threading.Event(), set()
        self._clock = 0.0  # what the store's clock shows more than this one

    def open(self) -> "Mirror":
        """Fetches all that is light. Raises UserError where there is no bucket, it is not ours, or it holds something
        else than a study."""
        with reached(self.store):
            top = {name for name in self.store.top() if not name.startswith(".")}
            if top and not top & {"plan.json", "cells"}:
                raise UserError(f"{self.store.url} holds other files and no study; choose an empty or new directory")
            self._read_clock()
            shutil.rmtree(self.local, ignore_errors=True)
            self.local.mkdir(parents=True)
            self.pull()
        for name, seconds in (("renew", EXPIRES / 4), ("upload", EVERY)):
            threading.Thread(target=self._keep_on, args=(name, seconds), daemon=True).start()
        return self

    def close(self) -> None:
        """Uploads what is left. The copy goes."""
        self._closed.set()
        try:
            self.flush()
        finally:
            shutil.rmtree(self.local, ignore_errors=True)

    def _read_clock(self) -> None:
        """Leases are judged by the store's clock: those of hosts differ. That it can be written shows here, too."""
        name = f".clock.{secrets.token_hex(8)}"
        self.store.write(name, b"")
        self._clock = (self.store.modified(name) or 0.0) - time.monotonic()
        self.store.delete(name)

    def _keep_on(self, name: str, seconds: float) -> None:
        took = 0.0
        while not self._closed.wait(max(seconds, took if name == "upload" else 0.0)):  # a file that grows goes up whole
            begun = time.monotonic()
            try:
                self._renew() if name == "renew" else self.push()
                self._failing.discard(name)
            except Exception as error:  # whatever a library raises: it is tried again, and flush() tells in the end
                self._say_once(name, error)
            took = time.monotonic() - begun

    def _say_once(self, name: str, error: Exception) -> None:
        if name not in self._failing:
            said = " ".join(str(error).split())[:200]
            logging.warning("%s is not reached (%s); it is tried again", self.store.url, said)
        self._failing.add(name)

    # The copy, as the store is.

    def refresh(self) -> None:
        """Fetches what is light and new. Raises UserError where the store does not answer."""
        with reached(self.store):
            self.pull()

    def pull(self, under: str = "", heavy: bool = False) -> None:
        """Fetches what has changed in the store below a directory, and takes away what went there; but what has changed
        here since the two agreed stays. heavy: checkpoints too, those that are whole."""
        with self._lock:
            there = self.store.list(under)
            steps = {name.removesuffix(SEAL) for name in there if name.endswith(f"/{SEAL}")}
            wanted = {}
            for name, mark in there.items():
                if "/set_aside/" in name and heavy:  # their names are taken
                    self._here(name).parent.mkdir(parents=True, exist_ok=True)
                if not self._fetched(name, heavy, steps):
                    continue
                seen = self._known.get(name)
                if (not seen or seen.there != mark) and not self._changed(name):
                    wanted[name] = mark
            _tell("fetching", wanted, self.store.url, (mark[0] for mark in wanted.values()))
            self._all(lambda name: self._get(name, wanted[name]), wanted)
            for name in [name for name in self._known if _below(name, under) and name not in there]:
                if not self._changed(name):
                    self._here(name).unlink()
                del self._known[name]

    def _fetched(self, name: str, heavy: bool, steps: set[str]) -> bool:
        if _hidden(name) or not _heavy(name):
            return not _hidden(name)
        parts = name.split("/")
        if not heavy or "set_aside" in parts:
            return False
        return "/".join(parts[: parts.index("checkpoints") + 2]) + "/" in steps

    def _get(self, name: str, mark: tuple) -> None:
        try:
            self.store.get(name, self._here(name))
            self._known[name] = Seen(mark, _state(self._here(name)))
        except FileNotFoundError:  # it has gone since it was listed
            pass

    # The store, as the copy is.

    def push(self) -> None:
        """Uploads what has changed here since the two agreed, and deletes there what went here."""
        with self._lock:
            if any(time.monotonic() - lease.renewed > EXPIRES / 2 for lease in self._leases):
                self._renew()  # a program that stood still may have lost what it held
            found = dict(self._walk())
            changed = [name for name in found if self._changed(name)]
            gone = [name for name in self._known if name not in found and not self._is_lost(name)]
            seals = [name for name in gone if name.endswith(SEAL)]
            # Before other numbers come to stand behind them; else once newer checkpoints are there.
            early = [seal for seal in seals if any(name.startswith(seal.removesuffix(SEAL)) for name in changed)]
            self._forget(early)
            _tell("uploading", changed, self.store.url, (found[name][1] for name in changed))
            for _, names in itertools.groupby(sorted(changed, key=_rank), key=_rank):
                self._all(lambda name: self._put(name, found[name]), list(names))
            self._forget(seal for seal in seals if seal not in early)
            self._forget(name for name in gone if not name.endswith(SEAL))

    def _put(self, name: str, state: tuple) -> None:
        try:
            self._known[name] = Seen(self.store.put(self._here(name), name), state)
        except FileNotFoundError:
            if self._here(name).exists():
                raise  # the bucket has gone

    def _forget(self, names: Iterable[str]) -> None:
        names = list(names)
        self._all(self.store.delete, names)
        for name in names:
            del self._known[name]

    def flush(self) -> None:
        """Uploads all that has changed. Raises UserError where the store does not take it, nor does in PATIENCE."""
        patient(self.store, self.push, functools.partial(self._say_once, "flush"))

    def _walk(self) -> Iterator[tuple[str, tuple]]:
        for directory, folders, files in os.walk(self.local):
            folders[:] = [name for name in folders if not name.startswith(".") and UNFINISHED not in name]
            for file in files:
                name = (pathlib.Path(directory) / file).relative_to(self.local).as_posix()
                if not _hidden(name) and not self._is_lost(name):
                    with contextlib.suppress(FileNotFoundError):
                        yield name, _state(self._here(name))

    # What one program at a time makes.

    @contextlib.contextmanager
    def claim(self, directories: Iterable[pathlib.Path], others: Iterable[pathlib.Path] = ()) -> Iterator[bool]:
        """Whether this program holds all of the directories until the block ends. If so, they are as in the store when
        it begins, checkpoints and other directories that go with them included, and the store is as they are when it
        ends. Raises UserError where the store does not answer."""
        names = [path.relative_to(self.local).as_posix() for path in directories]
        with_them = [path.relative_to(self.local).as_posix() for path in others]
        taken: list[Lease] = []
        try:
            with reached(self.store):
                held = all(self._take(name, taken) for name in names)
                for name in (*names, *with_them) if held else ():
                    self.pull(name, heavy=True)
            try:
                yield held
            finally:
                if held:
                    self.flush()
                    self._drop((*names, *with_them))
        finally:
            self._release(taken)

    def _take(self, name: str, taken: list[Lease]) -> bool:
        """Claims are numbered. One that is expired is outdone by the next number, which one program alone can create:
        nothing is deleted that another may hold."""
        there = [found for found in self.store.list(f"{name}/") if found.startswith(f"{name}/.lease.")]
        number = max((int(found.rpartition(".")[2]) for found in there), default=0)
        # One that was let go since the list is none that expired: whoever looks now takes number 1, and not the next.
        if number and ((age := self._age(f"{name}/.lease.{number}")) is None or age <= EXPIRES):
            return False
        lease = Lease(f"{name}/.lease.{number + 1}", name)
        if not self.store.create(lease.name, lease):
            return False
        self._lost.discard(name)
        taken.append(lease)
        self._leases.append(lease)
        return True

    def _age(self, name: str) -> float | None:
        """Seconds since a lease was renewed; None where it has gone."""
        modified = self.store.modified(name)
        return None if modified is None else time.monotonic() + self._clock - modified

    def _release(self, leases: list[Lease]) -> None:
        with self._renewing, contextlib.suppress(Exception):  # what is not deleted expires
            for lease in [lease for lease in leases if lease in self._leases]:
                self._leases.remove(lease)
                stem, _, number = lease.name.rpartition(".")
                older = range(1, int(number)) if lease.directory else ()
                for name in (*(f"{stem}.{n}" for n in older), lease.name):
                    self.store.delete(name)

    def _renew(self) -> None:
        with self._renewing:
            for lease in list(self._leases):
                if lease.is_of(self.store.read(lease.name)) and not self._outdone(lease):
                    self.store.write(lease.name, lease.content())
                    lease.renewed = time.monotonic()
                    continue
                self._leases.remove(lease)
                if lease.directory:
                    self._lost.add(lease.directory)
                    told = "%s/%s was taken over by another program, since it was not renewed for long: stopping"
                    logging.warning(told, self.store.url, lease.directory)
                    os.kill(os.getpid(), signal.SIGTERM)

    def _outdone(self, lease: Lease) -> bool:
        stem, _, number = lease.name.rpartition(".")
        return bool(lease.directory) and self.store.modified(f"{stem}.{int(number) + 1}") is not None

    @contextlib.contextmanager
    def announced(self, what: str) -> Iterator[set[str]]:
        """What others have announced here and not left, while the block runs and this program announces its own."""
        lease = Lease(f".runs.{what}.{secrets.token_hex(8)}")
        with reached(self.store):
            self.store.write(lease.name, lease.content())
            self._leases.append(lease)
            there = [name for name in self.store.top() if name.startswith(".runs.") and name != lease.name]
            left = [name for name in there if (age := self._age(name)) is None or age > EXPIRES]
            self._all(self.store.delete, left)
            others = {name.split(".")[2] for name in {*there} - {*left}}
        try:
            yield others
        finally:
            self._release([lease])

    def _drop(self, names: Iterable[str]) -> None:
        """Takes what is heavy out of the copy: the store has it."""
        with self._lock:
            for name in [one for one in self._known if _heavy(one) and any(_below(one, under) for under in names)]:
                self._here(name).unlink(missing_ok=True)
                del self._known[name]
            for under in names:
                for folder in HEAVY:
                    shutil.rmtree(self.local / under / folder, ignore_errors=True)

    def _changed(self, name: str) -> bool:
        """Whether a file was made, written or deleted here since the two agreed."""
        seen, path = self._known.get(name), self._here(name)
        return (_state(path) if path.exists() else None) != (seen.here if seen else None)

    def _is_lost(self, name: str) -> bool:
        return any(_below(name, directory) for directory in self._lost)

    def _here(self, name: str) -> pathlib.Path:
        return self.local / name

    def _all(self, action: Callable[[str], None], names: Iterable[str]) -> None:
        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(action, names))


def fetch(url: str, opened: Callable[[str], Mirror]) -> pathlib.Path:
    """The copy of what a URL names: a cell, one of its seeds, or one checkpoint; with the checkpoint that is meant, and
    no other. opened: makes the mirror of the cell. Raises UserError where there is none."""
    scheme, _, path = url.partition("://")
    parts = path.strip("/").split("/")
    for end in range(len(parts), 0, -1):
        store = Store(f"{scheme}://{'/'.join(parts[:end])}")
        with reached(store):
            if store.read("config.json") is not None:
                break
    else:
        raise UserError(f"{url} is in no cell of a bucket that is there: nothing above it has a config.json")
    mirror = opened(store.url)
    with reached(store):
        mirror.pull()
        place = parts[end:]
        if not place:
            seeds = [int(name[5:]) for name in store.top() if name[:5] == "seed-" and name[5:].isdecimal()]
            place = [f"seed-{min(seeds, default=0)}"]
        steps = "/".join(place[:-1] if place[-1].isdecimal() else [place[0], "checkpoints"])
        whole = [name.split("/")[-2] for name in store.list(steps) if name.endswith(f"/{SEAL}")]
        newest = max((step for step in whole if step.isdecimal()), key=int, default="")
        mirror.pull(f"{steps}/{place[-1] if place[-1].isdecimal() else newest}", heavy=True)
    return mirror.local.joinpath(*parts[end:])


def _tell(doing: str, names: Iterable[str], url: str, sizes: Iterable[int]) -> None:
    if (total := sum(sizes)) >= TOLD:
        logging.warning("%s %d files of %s, %.0f MiB", doing, len(list(names)), url, total / 2**20)


def _state(path: pathlib.Path) -> tuple:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


def _below(name: str, directory: str) -> bool:
    return not directory or name.startswith(f"{directory}/")


def _heavy(name: str) -> bool:
    return any(part in HEAVY for part in name.split("/")[:-1])


def _hidden(name: str) -> bool:
    """Locks, drafts and leases; nothing that a reader looks for is named so."""
    return any(part.startswith(".") for part in name.split("/"))


def _rank(name: str) -> int:
    if _heavy(name):
        return 2 if name.endswith(f"/{SEAL}") else 1
    return 3 if name.rpartition("/")[2] in LAST else 0
