"""A run that goes on over other devices, or in other microbatches, reads the same batches and learns the same."""

import shutil

import jax
import numpy as np
import pytest
import tiny
from test_loop import Watched, run, run_until

from lab.train import loop
from lab.train.workload import Record

STEPS, STOPPED = 50, 10
CLOSE, DRIFTED = 1e-6, 1e-3  # relative, of losses: so many steps after the stop, and at the end
NEAR = 20
EIGHT = dict(data=2, fsdp=2, tensor=2)
SHAPES = {
    "four devices, microbatches": (dict(data=2, fsdp=2), 2),
    "eight devices, microbatches": (EIGHT, 2),
    "tensor and context": (dict(tensor=2, context=2), 4),
}
FAST = ("four devices, microbatches",)


def config(**overrides):
    """As by default AdamW is, which makes much of rounding; what is dropped depends on model_seed and step."""
    drops = dict(train__dropout__residual=0.1, train__dropout__attention=0.1)
    sizes = dict(train__steps=STEPS, data__rows=8, train__adamw__eps=1e-8, run__checkpoint__every=STEPS)
    return tiny.config(**sizes, **drops, **overrides)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Of eight devices."""
    return run(tmp_path_factory.mktemp("undisturbed"), config(), mesh=tiny.mesh(**EIGHT))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, undisturbed):
    """The checkpoints of one that was stopped."""
    directory = tmp_path_factory.mktemp("stopped") / "checkpoints"
    run_until(directory, STOPPED, config=config(), mesh=tiny.mesh(**EIGHT))
    return directory


def check_goes_on(got: list[Record], undisturbed: list[Record]) -> None:
    """The same batches under the same rates; losses that rounding alone moves."""
    for field in ("step", "text_hash", "tokens", "fill", "learning_rate"):
        assert [getattr(one, field) for one in got] == [getattr(one, field) for one in undisturbed], field
    losses, expected = (np.array([one.loss for one in records]) for records in (got, undisturbed))
    np.testing.assert_allclose(losses[:NEAR], expected[:NEAR], rtol=CLOSE)
    np.testing.assert_allclose(losses, expected, rtol=DRIFTED)


@pytest.mark.parametrize(
    "shape", [pytest.param(s, marks=[] if s in FAST else [pytest.mark.slow, pytest.mark.long]) for s in SHAPES]
)
def test_a_run_goes_on_over_other_devices(tmp_path, stopped, undisturbed, shape):
    sizes, microbatches = SHAPES[shape]
    shutil.copytree(stopped, tmp_path / "run")
    resumed = run(tmp_path / "run", config(run__microbatches=microbatches), mesh=tiny.mesh(**sizes))
    assert resumed.start == STOPPED and resumed.trained.steps == STEPS - STOPPED
    check_goes_on(resumed.records, undisturbed.records[STOPPED:])


def test_fresh_weights_are_gone_before_those_of_a_checkpoint_are_read(tmp_path, stopped, monkeypatch):
    """A device that trains has no room for two states."""
    shutil.copytree(stopped, tmp_path / "run")
    made, held = Watched.restore, []

    def weights() -> int:
        """Bytes of arrays on devices that are shaped as the feed-forward's weights and moments."""
        return sum(x.nbytes for x in jax.live_arrays() if x.shape in {(2, 16, 24), (2, 24, 16)})

    def restore(self, like):
        held.append(weights())
        return made(self, like)

    monkeypatch.setattr(Watched, "restore", restore)
    before = weights()
    with pytest.raises(loop.Stopped):
        run(tmp_path / "run", config(), mesh=tiny.mesh(**EIGHT), stop=lambda step: True)
    assert held == [before]
