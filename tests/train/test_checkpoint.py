import builtins
import errno
import gc
import logging
import pathlib
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from jax.experimental import multihost_utils

from lab.errors import UserError
from lab.model import parameter
from lab.train import checkpoint, step
from lab.train.checkpoint import Checkpoints, DiskFull, Position, Unreadable
from lab.train.step import Program, State

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

BIG, HALF, ONE = dict(data=2, fsdp=2, tensor=2), dict(fsdp=2, tensor=2), {}


@pytest.fixture(autouse=True)
def unfinished_reads():
    """What Orbax leaves running when a read fails is collected here, where its complaints are ignored."""
    yield
    gc.collect()


def state_of(seed: int, mesh: dict = ONE, **overrides) -> State:
    """Generic weights and moments, laid over a mesh."""
    state = step.initial_state(tiny.model(tiny.config(**overrides), seed), Program("adamw", "declared", 1))
    rng = np.random.default_rng(seed)
    moments = jax.tree.map(lambda x: jnp.asarray(rng.integers(1, 99, x.shape), x.dtype), state.optimizer)
    state = State(state.model, moments)
    return jax.device_put(state, parameter.shardings(state, tiny.mesh(**mesh)))


def check_equal(got: State, expected: State) -> None:
    """To the bit."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(expected))


def save(directory: pathlib.Path, *states: State, keep: int = 5) -> None:
    """One checkpoint after another, at steps 1, 2, ..."""
    checkpoints = Checkpoints(directory, keep)
    for number, state in enumerate(states, 1):
        checkpoints.save(Position(number, 10 * number), state)
        checkpoints.wait()
    checkpoints.close()


def restore(directory: pathlib.Path, like: State):
    checkpoints = Checkpoints(directory, keep=5)
    try:
        return checkpoints.restore(like)
    finally:
        checkpoints.close()


@pytest.mark.parametrize(
    "onto",
    [*(pytest.param(one, marks=pytest.mark.slow) for one in (BIG, HALF)), ONE],
    ids=["8 devices", "4 devices", "1 device"],
)
def test_round_trip_to_the_bit_onto_another_mesh(tmp_path, onto):
    saved, like = state_of(1, BIG), state_of(2, onto)
    save(tmp_path, saved)
    position, found = restore(tmp_path, like)
    assert position == Position(step=1, texts=10)
    check_equal(found, saved)
    for got, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(like), strict=True):
        assert got.sharding == wanted.sharding


def test_tables_are_those_of_the_config_not_of_the_checkpoint(tmp_path):
    saved, like = state_of(1, model__position__ratio=0.0), state_of(1, model__position__ratio=1.0)
    save(tmp_path, saved)
    _, found = restore(tmp_path, like)
    check_equal(found, like)


def test_a_checkpoint_of_another_model_is_one_line_and_stays(tmp_path):
    save(tmp_path, state_of(1), state_of(2))
    for other in (dict(model__layers=3), dict(model__feedforward__width=16)):
        with pytest.raises(
            UserError, match=rf"checkpoint {tmp_path}/2 is of another model: .*move {tmp_path} away"
        ) as told:
            restore(tmp_path, state_of(1, **other))
        assert "\n" not in str(told.value)
    check_equal(restore(tmp_path, state_of(3))[1], state_of(2))


def test_nothing_saved_gives_nothing(tmp_path):
    assert restore(tmp_path, state_of(0)) is None


def test_the_last_ones_are_kept_and_one_that_stands_is_not_written_again(tmp_path):
    save(tmp_path, *(state_of(seed) for seed in range(4)), keep=2)
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [3, 4]
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(Position(4, 99), state_of(9))
    checkpoints.wait()
    position, found = checkpoints.restore(state_of(8))
    assert position == Position(4, 40)
    check_equal(found, state_of(3))


def test_a_save_does_not_ask_whether_to_stop(tmp_path, monkeypatch):
    """Hosts agree on a number of calls: only the loop may make them."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: bool(asked.append(step)))
    save(tmp_path, state_of(1))
    assert (tmp_path / "1").is_dir() and not asked


def test_arrays_may_be_donated_while_they_are_saved(tmp_path):
    state = state_of(1)
    expected, checkpoints = jax.device_get(state), Checkpoints(tmp_path, keep=1)
    checkpoints.save(Position(1, 10), state)
    jax.block_until_ready(jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state))
    checkpoints.wait()
    check_equal(checkpoints.restore(state_of(2))[1], expected)


def truncated(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: pathlib.Path) -> None:
    path.write_bytes(b"")


def overwritten(path: pathlib.Path) -> None:
    """As a crash leaves blocks that were allocated and never written."""
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES = {"truncated": truncated, "emptied": emptied, "overwritten": overwritten, "deleted": pathlib.Path.unlink}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two") / "run" / "checkpoints"
    save(directory, state_of(1), state_of(2))
    return directory


def damaged(two_checkpoints, directory: pathlib.Path) -> pathlib.Path:
    """A copy, in a run of its own, whose newest checkpoint is to be damaged."""
    shutil.copytree(two_checkpoints, directory)
    return directory / "2"


def check_falls_back(directory: pathlib.Path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        position, found = restore(directory, state_of(3))
    assert position == Position(1, 10)
    check_equal(found, state_of(1))
    said = [record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()]
    assert len(said) == 1 and str(directory / "2") in said[0] and "the one before" in said[0] and "\n" not in said[0]
    assert not (directory / "2").exists()  # else the run would not save it again
    assert (directory.parent / checkpoint.SET_ASIDE / "2-1").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("part", ["state", "position", "state/d", "state/ocdbt.process_0"])
def test_a_checkpoint_without_a_part_falls_back_and_says_so(two_checkpoints, tmp_path, caplog, part):
    newest = damaged(two_checkpoints, tmp_path / "run")
    shutil.rmtree(newest / part)
    check_falls_back(tmp_path / "run", caplog)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_with_all_files_damaged_falls_back_and_says_so(two_checkpoints, tmp_path, caplog, damage):
    newest = damaged(two_checkpoints, tmp_path / "run")
    for path in [path for path in newest.rglob("*") if path.is_file()]:
        DAMAGES[damage](path)
    check_falls_back(tmp_path / "run", caplog)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_any_one_bit_and_any_exchange_change_the_checksum(dtype):
    rng = np.random.default_rng(0)
    tree = [jnp.asarray(rng.normal(size=shape) * 9, dtype) for shape in [(), (3,), (4, 5), (2, 3, 4)]]
    stood, bits = int(checkpoint._checksum(tree)), 8 * tree[0].dtype.itemsize
    for number, x in enumerate(tree):
        words = np.asarray(jax.lax.bitcast_convert_type(x, f"uint{bits}"))
        for place in range(x.size):
            for bit in range(bits):
                flipped = words.copy()
                flipped.flat[place] ^= words.dtype.type(1 << bit)
                changed = jax.lax.bitcast_convert_type(jnp.asarray(flipped), dtype)
                assert int(checkpoint._checksum([*tree[:number], changed, *tree[number + 1 :]])) != stood
    exchanged = tree[2].at[0, 0].set(tree[2][1, 2]).at[1, 2].set(tree[2][0, 0])
    assert int(checkpoint._checksum([*tree[:2], exchanged, tree[3]])) != stood


@pytest.mark.slow
def test_a_flipped_bit_is_harmless_or_noticed(two_checkpoints, tmp_path, caplog):
    """In the files that hold the arrays, which are not checked by those who read them."""
    chance, fallen = np.random.default_rng(0), 0
    for number in range(12):
        newest = damaged(two_checkpoints, tmp_path / str(number))
        file = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        content = bytearray(file.read_bytes())
        content[chance.integers(len(content))] ^= 1 << int(chance.integers(8))
        file.write_bytes(content)
        position, found = restore(newest.parent, state_of(3))
        check_equal(found, state_of(position.step))
        fallen += position.step == 1
    assert fallen > 6


@pytest.mark.slow
@pytest.mark.parametrize("damage", [pytest.param(d, marks=[pytest.mark.slow] * (d != "truncated")) for d in DAMAGES])
def test_any_damaged_file_is_harmless_or_noticed(two_checkpoints, tmp_path, caplog, damage):
    files = sorted(p.relative_to(two_checkpoints / "2") for p in (two_checkpoints / "2").rglob("*") if p.is_file())
    assert len(files) > 10
    fallen = 0
    for number, file in enumerate(files):
        newest = damaged(two_checkpoints, tmp_path / str(number))
        DAMAGES[damage](newest / file)
        caplog.clear()
        position, found = restore(newest.parent, state_of(3))
        check_equal(found, state_of(position.step))
        noticed = any("cannot be read" in record.getMessage() for record in caplog.records)
        assert noticed == (position.step == 1), file
        fallen += noticed
    assert fallen >= 3


def test_nothing_readable_gives_nothing_and_says_so_of_each(two_checkpoints, tmp_path, caplog):
    damaged(two_checkpoints, tmp_path / "run")
    for newest in ("1", "2"):
        shutil.rmtree(tmp_path / "run" / newest / "state")
    assert restore(tmp_path / "run", state_of(3)) is None
    assert sum("cannot be read" in record.getMessage() for record in caplog.records) == 2


def test_a_checkpoint_that_was_being_written_is_passed_over(two_checkpoints, tmp_path):
    damaged(two_checkpoints, tmp_path / "run").rename(tmp_path / "run" / "2.orbax-checkpoint-tmp")
    position, found = restore(tmp_path / "run", state_of(3))
    assert position.step == 1
    check_equal(found, state_of(1))


PASSING = {
    "rights": PermissionError(errno.EACCES, "Permission denied", "state/_METADATA"),
    "disk": OSError(errno.EIO, "Input/output error", "position/metadata"),
    "handle": OSError(errno.ESTALE, "Stale file handle", "state/d"),
    "tensorstore": ValueError('PERMISSION_DENIED: Error opening "zarr" driver: Permission denied'),
    "memory": MemoryError(),
    "device": RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes"),
}


@pytest.mark.matrix("kind")
@pytest.mark.slow
@pytest.mark.parametrize("kind", PASSING)
@pytest.mark.parametrize("read", ["restore", "read_model"])
def test_what_may_pass_stops_and_loses_nothing(two_checkpoints, tmp_path, monkeypatch, kind, read):
    """Raised by a thread of Orbax, as it wraps what its threads raise."""
    directory = damaged(two_checkpoints, tmp_path / "run").parent
    before = {path.relative_to(directory) for path in directory.rglob("*")}

    def fail(*args, **kwargs):
        raise ValueError("a thread failed") from PASSING[kind]

    monkeypatch.setattr(ocp.CheckpointManager, "restore", fail)
    expected = ValueError if kind in ("memory", "device") else Unreadable
    with pytest.raises(expected) as stopped:
        restore(directory, state_of(3)) if read == "restore" else checkpoint.read_model(directory, state_of(3).model)
    if expected is Unreadable:
        assert isinstance(stopped.value, UserError) and stopped.value.exit_code == 1 and "\n" not in str(stopped.value)
        assert str(directory / "2") in str(stopped.value) and "run the same command again" in str(stopped.value)
    assert {path.relative_to(directory) for path in directory.rglob("*")} == before
    assert not (tmp_path / checkpoint.SET_ASIDE).exists()


def test_what_orbax_takes_for_missing_is_looked_at(two_checkpoints, tmp_path, monkeypatch):
    """A directory without rights is FileNotFoundError to Orbax."""
    newest, whole = damaged(two_checkpoints, tmp_path / "run"), builtins.open

    def missing(*args, **kwargs):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "position/metadata")

    def refusing(path, *args, **kwargs):
        if str(path).startswith(str(newest)):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return whole(path, *args, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "restore", missing)
    monkeypatch.setattr(checkpoint, "open", refusing, raising=False)
    with pytest.raises(Unreadable, match="Input/output error"):
        restore(tmp_path / "run", state_of(3))
    assert newest.is_dir()


def test_damaged_weights_are_named_where_a_model_is_loaded(two_checkpoints, tmp_path):
    newest = damaged(two_checkpoints, tmp_path / "run")
    for path in [path for path in newest.rglob("*") if path.is_file()]:
        truncated(path)
    with pytest.raises(UserError, match="run/2 cannot be read") as error:
        checkpoint.read_model(tmp_path / "run", state_of(3).model)
    assert not isinstance(error.value, Unreadable) and "\n" not in str(error.value) and newest.is_dir()


def test_later_checkpoints_are_set_aside_and_said(two_checkpoints, tmp_path, caplog):
    """Twice: what was set aside before stays."""
    directory = tmp_path / "run" / "checkpoints"
    damaged(two_checkpoints, directory)
    for _ in range(2):
        checkpoints = Checkpoints(directory, keep=5)
        checkpoints.take_back(1, "a reason")
        assert checkpoints.restore(state_of(3))[0] == Position(1, 10)
        checkpoints.save(Position(2, 20), state_of(2))
        checkpoints.wait()
        checkpoints.close()
    assert {path.name for path in (tmp_path / "run" / checkpoint.SET_ASIDE).iterdir()} == {"2-1", "2-2"}
    assert restore(directory, state_of(3))[0] == Position(2, 20)
    assert [record.getMessage() for record in caplog.records].count(
        f"checkpoint {directory / '2'} is set aside: a reason"
    ) == 2


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    ValueError("RESOURCE_EXHAUSTED: write failed [No space left on device]"),
])  # fmt: skip
@pytest.mark.parametrize("method", ["save", "wait_until_finished", "close"])
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, method, error):
    def fail(*args, **kwargs):
        raise RuntimeError("a thread failed") from error

    checkpoints = Checkpoints(tmp_path / "here", keep=1)
    monkeypatch.setattr(checkpoints._manager, method, fail)
    with pytest.raises(DiskFull) as full:
        checkpoints.save(Position(1, 10), state_of(1))
        checkpoints.wait()
        checkpoints.close()
    assert isinstance(full.value, UserError) and full.value.exit_code == 1
    assert str(tmp_path / "here") in str(full.value) and "\n" not in str(full.value)


def test_other_errors_are_not_called_a_full_disk(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)

    def fail(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoints._manager, "save", fail)
    with pytest.raises(PermissionError):
        checkpoints.save(Position(1, 10), state_of(1))
    assert not checkpoint.is_disk_full(None)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own of 2 MiB."""
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path], capture_output=True)
    if mount.returncode:
        pytest.skip("a file system cannot be mounted here")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_a_disk_that_is_really_full_loses_nothing(small_disk):
    directory, ballast = small_disk / "checkpoints", small_disk / "ballast"
    save(directory, state_of(1))
    free = shutil.disk_usage(small_disk).free
    ballast.write_bytes(bytes(free - 20_000))
    with pytest.raises(DiskFull):
        save(directory, state_of(1), state_of(2))
    ballast.unlink()
    position, found = restore(directory, state_of(3))
    assert position == Position(1, 10)
    check_equal(found, state_of(1))
    save(directory, state_of(1), state_of(2))
    assert restore(directory, state_of(3))[0] == Position(2, 20)
