"""Several runs in one program: each member learns what it would alone, and is told apart when it fails."""

import jax
import numpy as np
import pytest
import tiny

from lab import kernels, watch
from lab.data import train_batches
from lab.kernels import order, rules, tiled
from lab.train import compiled, loop, workload
from lab.train.checkpoint import Checkpoints
from lab.train.workload import Member, Workload

VARIED = [
    dict(seed=0, model__position__ratio=0.0),
    dict(seed=0, model__position__ratio=1.0, data__draw="fixed2", train__learning_rate=1e-2),
    dict(seed=7, model_seed=7, train__weight_decay=0.3),
]


def trained(directory, configs, stop=lambda step: False, mesh=None):
    """(what train gave, the records of each member)"""
    records = []
    checkpoints = Checkpoints(directory, keep=2)
    workload = Workload([Member(config, tiny.texts()) for config in configs])
    try:
        made = loop.train(
            workload,
            checkpoints,
            mesh or tiny.mesh(),
            on_start=lambda step: None,
            on_step=records.append,
            on_checkpoint=lambda step, state: None,
            stop=stop,
        )
    finally:
        checkpoints.close()
    return made, [list(member) for member in zip(*records, strict=True)]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("together"), [tiny.config(**o) for o in VARIED])


@pytest.mark.slow
@pytest.mark.parametrize("member", range(len(VARIED)))
def test_a_member_is_what_it_would_be_alone(tmp_path, together, member):
    alone, (records,) = trained(tmp_path, [tiny.config(**VARIED[member])])
    made, every = together
    assert [r.text_hash for r in every[member]] == [r.text_hash for r in records]
    np.testing.assert_allclose([r.loss for r in every[member]], [r.loss for r in records], rtol=1e-4)
    np.testing.assert_allclose([r.learning_rate for r in every[member]], [r.learning_rate for r in records])
    one = compiled.unstacked(made.state, member)
    assert jax.tree.structure(one) == jax.tree.structure(alone.state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), one.model, alone.state.model)


@pytest.mark.slow
def test_a_stack_goes_on_from_its_checkpoint(tmp_path, together):
    configs = [tiny.config(**o) for o in VARIED]
    with pytest.raises(loop.Stopped):
        trained(tmp_path, configs, stop=lambda step: step == 2)
    resumed, _ = trained(tmp_path, configs)
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (resumed.state.model, together[0].state.model)))


@pytest.mark.slow
def test_a_stack_lies_over_a_mesh(tmp_path, together):
    _, every = trained(tmp_path, [tiny.config(**o) for o in VARIED], mesh=tiny.mesh(data=2))
    for one, many in zip(together[1], every, strict=True):
        np.testing.assert_allclose([r.loss for r in many], [r.loss for r in one], rtol=1e-4)


@pytest.mark.slow
def test_the_member_that_fails_is_named(tmp_path):
    configs = [tiny.config(), tiny.config(train__learning_rate=1e38, train__warmup=0)]
    with pytest.raises(loop.NonFinite) as stopped:
        trained(tmp_path, configs)
    assert stopped.value.member == 1


def test_batches_are_laid_out_for_the_model_and_tell_their_share_of_tiles(monkeypatch):
    monkeypatch.setattr(tiled, "tile_sizes", lambda T, S: (4, 4))
    config = tiny.config(model__rule="own_branch", data__draw="fixed4")
    packed = [batch for batch, _ in train_batches(config, tiny.texts())]
    moved = 0
    for before, (after, (sent,)) in zip(packed, Workload([Member(config, tiny.texts())]).batches(0), strict=True):
        pairs = [
            sorted(zip(*(x.ravel().tolist() for x in jax.tree.leaves(batch)), strict=True)) for batch in (before, after)
        ]
        assert pairs[0] == pairs[1]
        moved += (before.coordinates.branch != after.coordinates.branch).any()
        still = order.arrange(before.coordinates, [rules.own_branch], (4, 4), free=False).share
        assert sent.tiles == order.arrange(after.coordinates, [rules.own_branch], (4, 4), free=False).share <= still
    assert moved


@pytest.mark.slow
def test_batches_are_arranged_where_they_are_made_by_processes_that_ask_jax_for_no_device(monkeypatch):
    configs = [tiny.config(model__rule="own_branch", data__draw="fixed4", run__workers=n) for n in (0, 2)]
    threads, processes = (Workload([Member(config, tiny.texts())]) for config in configs)
    monkeypatch.setattr(kernels, "resolve", None)  # asks which devices there are
    for (one, told), (other, also_told) in zip(threads.batches(0), processes.batches(0), strict=True):
        assert told == also_told
        jax.tree.map(np.testing.assert_array_equal, one, other)


class Fetched:
    """Texts that come from elsewhere, and note where the main thread is when they are asked for."""

    def __init__(self, fetches):
        self.fetches, self.seen, self._texts = fetches, [], tiny.texts()

    def __len__(self):
        return len(self._texts)

    def __getitem__(self, i):
        self.seen.append(watch._note.phase)
        return self._texts[i]

    def bring(self, ids):
        self.seen.append(watch._note.phase)


@pytest.mark.parametrize("fetches", [True, False])
def test_who_waits_for_texts_does_not_stand_still(fetches):
    config, texts = tiny.config(), Fetched(fetches)
    before = watch._note.phase
    steps = Workload([Member(config, texts)]).batches(0)
    next(steps)
    steps.close()
    assert (workload.FETCHES in texts.seen) == fetches and watch._note.phase == before
