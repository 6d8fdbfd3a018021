"""A directory in an object store, worked on in copies: what is carried over, in which order, and who holds what."""

import contextlib
import itertools
import os
import random
import shutil
import signal
import sys
import threading
import time

import fsspec
import pytest

import lab
from lab import storage
from lab.errors import UserError
from lab.remote import mirror as mirrors
from lab.remote import store as stores
from lab.remote.mirror import SEAL, Mirror
from lab.remote.store import Lease

RUN = "cells/x y=[1]-abc/seed-0"
_numbers = itertools.count()


class Files:
    """The file system of a store in memory. break_next: raises where a write, once `after` of them are done, is not
    carried out (lost=False), or is, and its answer is lost. ahead: what its clock shows more."""

    def __init__(self):
        self._files, self.written = fsspec.filesystem("memory"), []
        self._after, self._lost, self.ahead = None, False, 0.0

    def __getattr__(self, name):
        return getattr(self._files, name)

    def break_next(self, after: int, lost: bool = False) -> None:
        self._after, self._lost = after, lost

    def _write(self, write, path: str) -> None:
        fails, self._after = self._after == 0, None if self._after is None else self._after - 1
        if not fails or self._lost:
            write()
            self.written.append(path)
        if fails:
            raise OSError("the answer is lost" if self._lost else "refused")

    def put_file(self, local, path):
        self._write(lambda: self._files.put_file(local, path), path)

    def pipe_file(self, path, content, mode="overwrite"):
        self._write(lambda: self._files.pipe_file(path, content, mode=mode), path)

    def modified(self, path):
        class At:
            timestamp = lambda _: self._files.modified(path).timestamp() + self.ahead  # noqa: E731

        return At()


@pytest.fixture
def files():
    return Files()


@pytest.fixture
def opened(tmp_path, files, monkeypatch):
    """A function that opens a further copy of one directory."""
    monkeypatch.setattr(mirrors, "AT_ONCE", 1)
    url, made = f"memory://bucket-{next(_numbers)}-{os.getpid()}/study", []

    def open(files=files) -> Mirror:
        made.append(Mirror(url, tmp_path / f"copy-{len(made)}", files).open())
        return made[-1]

    yield open
    for one in made:
        one._closed.set()


def tree(mirror: Mirror) -> dict[str, bytes]:
    found = (path for path in mirror.local.rglob("*") if path.is_file())
    return {path.relative_to(mirror.local).as_posix(): path.read_bytes() for path in found}


def write(mirror: Mirror, name: str, content: bytes = b"") -> None:
    path = mirror.local / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_run(mirror: Mirror, steps=(10, 20), result: bool = True) -> None:
    write(mirror, f"{RUN}/metrics.jsonl", b"lines")
    for step in steps:
        for name in (SEAL, "state/d/1", "state/manifest", "position/metadata"):
            write(mirror, f"{RUN}/checkpoints/{step}/{name}", f"{step} {name}".encode())
    if result:
        write(mirror, f"{RUN}/result.json", b"{}")


def test_two_copies_come_to_hold_the_same(opened):
    """Random files are written, changed and taken away in two copies by turns."""
    drawn, (one, other) = random.Random(0), (opened(), opened())
    names = ["plan.json", "report.md", *(f"cells/c-{i}/seed-{k}/metrics.jsonl" for i in range(3) for k in range(2))]
    expected = {}
    for turn in range(30):
        mirror = drawn.choice((one, other))
        mirror.pull()
        for name in drawn.sample(names, 3):
            if name in expected and drawn.random() < 0.3:
                (mirror.local / name).unlink()
                del expected[name]
            else:
                expected[name] = drawn.randbytes(drawn.randint(0, 9))
                write(mirror, name, expected[name])
        write(mirror, f".draft-{turn}", b"half")
        mirror.push()
        for each in (one, other):
            each.pull()
            assert {name: content for name, content in tree(each).items() if not name.startswith(".")} == expected
    assert not any(".draft" in name for name in one.store.list())


def test_what_is_written_here_is_not_overwritten(opened):
    one, other = opened(), opened()
    for name in ("changed", "deleted", "gone there"):
        write(one, f"cells/{name}", b"first")
    one.flush(), other.pull()
    for name in ("changed", "deleted", "made"):
        write(one, f"cells/{name}", b"one")
    (one.local / "cells/gone there").unlink()
    one.flush()
    for name in ("changed", "made", "gone there"):
        write(other, f"cells/{name}", b"another")
    (other.local / "cells/deleted").unlink()
    for _ in range(2):
        other.pull()
        assert tree(other) == {f"cells/{name}": b"another" for name in ("changed", "made", "gone there")}
        other.push()
    one.pull()
    assert tree(one) == tree(other)


def test_checkpoints_are_fetched_by_who_claims_the_run(opened):
    one = opened()
    write_run(one)
    write(one, f"{RUN}/checkpoints/30.orbax-checkpoint-tmp/state/d/1", b"half")
    write(one, f"{RUN}/set_aside/10-1/state", b"damaged")
    one.flush()
    one.store.write(f"{RUN}/checkpoints/40/state/d/1", b"no seal yet")
    other = opened()
    assert {*tree(other)} == {f"{RUN}/metrics.jsonl", f"{RUN}/result.json"}
    with other.claim([other.local / RUN]) as held:
        assert held
        there = [path.relative_to(other.local / RUN).as_posix() for path in other.local.rglob(f"checkpoints/*/{SEAL}")]
        assert sorted(there) == [f"checkpoints/10/{SEAL}", f"checkpoints/20/{SEAL}"]
        assert not (other.local / RUN / "checkpoints/40").exists()
        assert (other.local / RUN / "set_aside/10-1").is_dir()  # so that its name is not given again
        write(other, f"{RUN}/checkpoints/40/{SEAL}", b"40")
        (other.local / RUN / f"checkpoints/10/{SEAL}").unlink()
    assert not (other.local / RUN / "checkpoints").exists()  # the store has it
    assert f"{RUN}/checkpoints/40/{SEAL}" in other.store.list()
    assert f"{RUN}/checkpoints/10/{SEAL}" not in other.store.list()
    assert f"{RUN}/checkpoints/20/{SEAL}" in other.store.list()


@pytest.mark.parametrize("lost", [False, True])
def test_who_is_cut_off_leaves_nothing_that_says_too_much(opened, files, lost):
    for after in range(12):
        one = opened()
        one._closed.set()  # nothing goes up but here
        with one.claim([one.local / RUN]) as held:
            assert held
            for name in [name for name in one.store.list() if "/.lease." not in name]:
                one.store.delete(name)
            one._known.clear()
            write_run(one)
            files.break_next(after, lost)
            with contextlib.suppress(OSError):
                one.push()
            files.break_next(-1)
            there = one.store.list()
            for step in (10, 20):
                whole = {f"{RUN}/checkpoints/{step}/{name}" for name in ("state/d/1", "state/manifest")}
                if f"{RUN}/checkpoints/{step}/{SEAL}" in there:
                    assert whole <= {*there} and f"{RUN}/metrics.jsonl" in there
            if f"{RUN}/result.json" in there:
                assert {f"{RUN}/checkpoints/{step}/{SEAL}" for step in (10, 20)} <= {*there}
            one.push()
            assert {name for name in one.store.list() if "/.lease." not in name} == {*tree(one)}


def test_one_of_many_holds_a_run(opened):
    copies, holders, most = [opened() for _ in range(5)], [], []
    begin = threading.Barrier(len(copies))

    def take(copy: Mirror) -> None:
        begin.wait()
        for _ in range(6):
            with copy.claim([copy.local / RUN]) as held:
                if held:
                    holders.append(copy)
                    most.append(len(holders))
                    time.sleep(0.002)
                    holders.remove(copy)

    threads = [threading.Thread(target=take, args=(copy,)) for copy in copies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most and max(most) == 1
    assert not any("/.lease." in name for name in copies[0].store.list())


def test_a_whole_checkpoint_is_there_while_newer_ones_go_up(opened, files):
    """Though all that the store has went here meanwhile, as when an upload takes longer than the steps between two."""
    one = opened()
    one._closed.set()  # nothing goes up but here
    write_run(one, steps=(10, 20), result=False)
    one.push()
    shutil.rmtree(one.local / RUN / "checkpoints")
    # Enough of them, though one more file may go up beside each that is refused.
    write_run(one, steps=(30, 40, 50, 60), result=False)
    for after in range(4):
        files.break_next(after)
        with pytest.raises(OSError, match="refused"):
            one.push()
        there = one.store.list()
        whole = {name.split("/")[-2] for name in there if name.endswith(f"/{SEAL}")}
        assert whole, after
        for step in whole:
            assert sum(f"/checkpoints/{step}/" in name for name in there) == 4, (after, step)
    one.push()
    assert {name.split("/")[-2] for name in one.store.list() if name.endswith(f"/{SEAL}")} == {"30", "40", "50", "60"}


def test_the_end_of_a_run_waits_for_the_store(opened, files, monkeypatch, caplog):
    monkeypatch.setattr(stores, "PAUSE", 0.01)
    one = opened()
    write_run(one)
    files.break_next(3)
    one.flush()
    assert {*one.store.list()} == {*tree(one)} and caplog.text.count("it is tried again") == 1
    monkeypatch.setattr(stores, "PATIENCE", 0.0)
    write(one, "plan.json", b"{}")
    files.break_next(0)
    with pytest.raises(UserError, match=r"cannot be reached \(OSError: refused\)"):
        one.flush()


def test_a_lease_whose_answer_is_lost_is_held(opened, files):
    one, other = opened(), opened()
    files.break_next(0, lost=True)
    with one.claim([one.local / RUN]) as held, other.claim([other.local / RUN]) as there:
        assert (held, there) == (True, False)
        assert not other.store.create(f"{RUN}/.lease.1", Lease(f"{RUN}/.lease.1", RUN))  # both found it free


def test_a_lease_that_is_let_go_meanwhile_is_not_outdone(opened, monkeypatch):
    """Between the list of leases and the look at the newest its holder lets go, and a third takes the first anew."""
    one, other, third = (opened() for _ in range(3))
    released, modified = other.claim([other.local / RUN]), one.store.modified
    assert released.__enter__()
    taken = contextlib.ExitStack()

    def late(name):
        monkeypatch.setattr(one.store, "modified", modified)
        released.__exit__(None, None, None)
        found = modified(name)
        assert taken.enter_context(third.claim([third.local / RUN]))
        return found

    monkeypatch.setattr(one.store, "modified", late)
    with taken, one.claim([one.local / RUN]) as held:
        assert not held
        third._renew()
        assert third._leases  # it holds the run still


@pytest.mark.parametrize("ahead", [0.0, -1e6, 1e6])
def test_an_expired_lease_is_taken_over_and_the_one_before_stops(opened, files, monkeypatch, ahead):
    """ahead: the clock of the store shows something else than that of this machine."""
    files.ahead = ahead
    monkeypatch.setattr(mirrors, "EXPIRES", 0.5)
    one, other = opened(), opened()
    one._closed.set(), other._closed.set()  # nothing is renewed: it stands still
    signals = []
    monkeypatch.setattr(os, "kill", lambda pid, number: signals.append((pid, number)))
    with one.claim([one.local / RUN]) as held:
        assert held
        write(one, f"{RUN}/metrics.jsonl", b"one")
        one.flush()
        with other.claim([other.local / RUN]) as there:
            assert not there
        time.sleep(0.6)
        with other.claim([other.local / RUN]) as there:
            assert there and tree(other)[f"{RUN}/metrics.jsonl"] == b"one"
            write(other, f"{RUN}/metrics.jsonl", b"other")
            other.flush()
            write(one, f"{RUN}/metrics.jsonl", b"one again")  # it goes on, and knows nothing yet
            one.push()
            assert one.store.read(f"{RUN}/metrics.jsonl") == b"other"
            assert signals == [(os.getpid(), signal.SIGTERM)]
        assert not any("/.lease." in name for name in one.store.list())
    assert one.store.read(f"{RUN}/metrics.jsonl") == b"other"


def test_a_renewed_lease_is_not_taken_over(opened, monkeypatch):
    monkeypatch.setattr(mirrors, "EXPIRES", 1.0)
    one, other = opened(), opened()
    with one.claim([one.local / RUN]) as held:
        assert held
        until = time.monotonic() + 2.5
        while time.monotonic() < until:
            with other.claim([other.local / RUN]) as there:
                assert not there
            time.sleep(0.1)


def test_configs_of_one_study_see_each_other(opened, monkeypatch):
    one, other = opened(), opened()
    with one.announced("a") as there:
        assert there == set()
        with other.announced("b") as there:
            assert there == {"a"}
    with other.announced("b") as there:
        assert there == set()
        monkeypatch.setattr(mirrors, "EXPIRES", -1.0)  # who announced it was killed
        with one.announced("a") as there:
            assert there == set()


def test_other_files_are_left_alone(opened):
    opened().store.write("model.bin", b"")
    with pytest.raises(UserError, match="holds other files and no study"):
        opened()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("az://bucket/x", "az://bucket/x is of no known store; choose s3://BUCKET/DIR, gs://BUCKET/DIR, or"),
        ("s3://", "s3:// names no bucket; choose s3://BUCKET/DIR"),
        ("s3://bucket/x", "s3://bucket/x needs s3fs: pip install -r requirements-storage.txt"),
        ("gs://bucket/x", "gs://bucket/x needs gcsfs: pip install -r requirements-storage.txt"),
    ],
)
@pytest.mark.parametrize("use", [storage.opened, storage.local, lab.load])
def test_a_store_that_cannot_be_used_is_told(url, told, use, tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path))
    for name in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError) as found:
        use(url)
    assert str(found.value).startswith(told)


def test_copies_of_killed_programs_go(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path))
    left = tmp_path / "mirrors" / "killed"
    left.mkdir(parents=True)
    left.with_suffix(".lock").touch()
    storage._room.cache_clear()
    room = storage._room("ours", True)
    assert not left.exists() and room.with_suffix(".lock").exists()
    storage._room.cache_clear()
    storage._room("another", True)
    assert room.with_suffix(".lock").exists()  # of a program that runs


def test_a_local_study_loads_nothing_of_a_store():
    import subprocess

    code = "import sys, lab.main, lab.storage, lab.report; lab.storage.told('x'); print([*sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"lab.remote", "s3fs", "fsspec", "etils"} & {*eval(told.stdout)}
