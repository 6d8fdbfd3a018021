"""Instruments against float64 numpy, and that they leave the training which they look at as it is."""

import json
import types

import jax
import numpy as np
import pytest
import test_loop
import tiny
from numpy_layers import normed, weights
from numpy_network import Network

from lab import model as lab_model
from lab.model import mesh, parameter
from lab.study.judge import spikes
from lab.study.run import log
from lab.study.run.runs import Run
from lab.train import compiled, instruments, loop, optimizer, step
from lab.train.checkpoint import Checkpoints
from lab.train.instruments import INSTRUMENTS
from lab.train.workload import Member, Workload

SELDOM = dict(run__checkpoint__every=9)
EVERY = SELDOM | dict(run__log__instruments=INSTRUMENTS, run__log__every=2)
DUE = [0, 1, 3, 5]  # of six steps: the first, and every second


def one_device(made):
    """(state, numbers, batch, program), before the first step."""
    program, model = step.Program.of(made), tiny.model(made)
    return step.initial_state(model, program), optimizer.numbers_by_step(made.train)(2), tiny.batch(3), program


class Looked:
    """One look at one step of one model: what was measured, the gradient, and the network in numpy on the first row."""

    def __init__(self):
        self.made = tiny.config(model__layers=3, run__implementation="reference", train__clip=0.5)
        self.state, self.numbers, self.batch, program = one_device(self.made)

        def both(state, numbers, batch):
            names = instruments.programmed(INSTRUMENTS)
            gradient = step.accumulated_gradient(state.model, batch, numbers["z_loss"], 1)[1]
            return instruments.measure(state, numbers, batch, program, names), gradient

        measured, gradient = jax.jit(both)(self.state, self.numbers, self.batch)
        self.measured, self.gradient = instruments.told(measured, 0, False), jax.device_get(gradient)
        at = self.batch.coordinates.map(lambda x: x[0])
        self.net, self.real = Network(self.made.model, self.state.model, at), at.segment >= 0
        self.x_TD = [weights(self.state.model.embedding)[self.batch.tokens[0]]]  # before each layer, and after the last
        for layer in range(3):
            self.x_TD.append(self.net.layer(layer, self.x_TD[-1]))


@pytest.fixture(scope="module")
def looked():
    return Looked()


def check(got: list, expected: list) -> None:
    assert len(got) == len(expected)
    np.testing.assert_allclose(got, expected, rtol=2e-4)


@pytest.mark.slow
def test_activations_are_root_mean_squares_after_each_layer(looked):
    expected = [np.sqrt(np.mean(x_TD[looked.real] ** 2)) for x_TD in looked.x_TD[1:]]
    check(looked.measured["activation"], expected)
    assert len({*np.round(expected, 3)}) == 3 and not looked.real.all()


@pytest.mark.slow
def test_attention_scores_and_entropies(looked):
    net, seen_TS = looked.net, looked.net.seen_TS
    largest, entropies = [], []
    for layer, x_TD in enumerate(looked.x_TD[:-1]):
        largest.append((net.own_scores(layer, x_TD) / np.sqrt(net.d))[:, seen_TS].max())
        p_HTS = net.P(layer, x_TD)[:, seen_TS.any(-1)]
        entropies.append(np.mean(-np.sum(p_HTS * np.log(np.where(p_HTS > 0, p_HTS, 1)), -1)))
    check(looked.measured["attention_max"], largest)
    check(looked.measured["attention_entropy"], entropies)


def test_log_z_is_the_normaliser_of_the_head(looked):
    model = looked.state.model
    logits_TC = normed(looked.x_TD[-1], weights(model.norm.weight), looked.net.eps) @ weights(model.embedding).T
    log_z_T = np.log(np.exp(logits_TC).sum(-1))[looked.real]
    check([looked.measured["log_z_mean"], looked.measured["log_z_max"]], [log_z_T.mean(), log_z_T.max()])


def layers_of(tree) -> list[list[np.ndarray]]:
    """The arrays of each layer of a model of one kind of layer, float64."""
    stacked = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree["blocks"])]
    return [[x[layer] for x in stacked] for layer in range(len(stacked[0]))]


def norm(arrays: list[np.ndarray]) -> float:
    return np.sqrt(sum((x**2).sum() for x in arrays))


def test_gradients_are_norms_of_layers(looked):
    check(looked.measured["gradient"], [norm(layer) for layer in layers_of(looked.gradient)])


def test_updates_are_those_of_adamw_by_hand_beside_the_weights(looked):
    """The first step of AdamW: the means of gradients and squares are unbiased, so that they are those of one step."""
    trainable, train = parameter.split(looked.state.model)[1], looked.made.train
    decays = jax.tree.leaves(parameter.decay_mask(trainable)["blocks"])
    whole = norm([np.asarray(x, np.float64) for x in jax.tree.leaves(looked.gradient)])
    clipped, rate = min(1.0, train.clip / whole), float(looked.numbers["learning_rate"])
    expected = []
    for gradient, weight in zip(layers_of(looked.gradient), layers_of(trainable), strict=True):
        updates = [
            rate * (clipped * g / (abs(clipped * g) + train.adamw.eps) + train.weight_decay * w * decay)
            for g, w, decay in zip(gradient, weight, decays, strict=True)
        ]
        expected.append(norm(updates) / norm(weight))
    check(looked.measured["update"], expected)
    check(looked.measured["weight"], [norm(weight) for weight in layers_of(trainable)])
    assert clipped < 0.9 and rate > 0


def test_layers_of_a_pattern_are_counted_in_their_order():
    """Three layers of two kinds: 0 and 2 are stacked under the first, 1 lies under the second."""
    made = tiny.config(model__layers=3, model__pattern=((), (("mixer.head_dim", 4),)))
    trainable = tiny.drawn(parameter.split(lab_model.abstract(made.model, made.run))[1], seed=4)
    first, second = (jax.tree.leaves(trainable["blocks"][p]) for p in range(2))
    expected = [norm([x[0] for x in first]), norm([x[0] for x in second]), norm([x[1] for x in first])]
    check(instruments.norms(jax.tree.map(np.float32, trainable), 3).tolist(), expected)


def test_a_capped_score_is_measured_as_the_softmax_has_it(looked):
    model, cap = looked.state.model, 0.3
    block = jax.tree.map(lambda w: w[1], model.blocks[0])
    view = model.views(looked.batch.coordinates, looked.batch.coordinates)[0]
    block.mixer.softcap = cap
    row = jax.tree.map(lambda x: x[:1] if isinstance(x, jax.Array | np.ndarray) and x.ndim > 1 else x, view)
    largest, _ = instruments._attention(block, np.float32(looked.x_TD[1])[None], row)
    scores_HTS = looked.net.own_scores(1, looked.x_TD[1]) / np.sqrt(looked.net.d)
    check([float(largest)], [cap * np.tanh(scores_HTS / cap)[:, looked.net.seen_TS].max()])


@pytest.mark.parametrize("overrides", [
    dict(model__mixer__name="delta", model__rule="causal"),
    dict(model__mixer__name="forgetting", model__rule="causal"),
    dict(model__stream__name="hyper", model__stream__copies=2),
], ids=["delta", "forgetting", "hyper"])  # fmt: skip
def test_scores_that_are_not_a_layers_own_are_absent(overrides):
    model = lab_model.abstract(tiny.config(**overrides).model)
    assert not instruments._readable(model.stream, model.blocks[0].mixer)
    assert instruments.told({"a": np.float32([1.5, np.nan, np.inf])}, 0, False) == {"a": [1.5, None, None]}


def file_of(directory, made, *stops: int):
    """(records, state, executable, metrics.jsonl) of a run that is logged as the command does, and stopped so often."""
    run = Run(types.SimpleNamespace(config=made), 0, {}, None, directory)
    directory.mkdir(exist_ok=True)
    for last in (*stops, None):
        board, records, told = types.SimpleNamespace(scalars=lambda *_: None), [], log.Log(run, writes=True)
        told._board, checkpoints = board, Checkpoints(directory / "checkpoints", keep=9)
        try:
            trained = loop.train(
                Workload([Member(made, tiny.texts())]), checkpoints, tiny.mesh(), on_start=told._begin,
                on_step=lambda each: (records.append(*each), told.step(*each, None)),  # noqa: B023
                on_checkpoint=lambda *_: None, stop=lambda at: at + 1 == last,  # noqa: B023
            )  # fmt: skip
        except loop.Stopped:
            continue
        finally:
            checkpoints.close()
            told._file.close()
    return records, trained, (directory / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spikes, "LEAST", 1), patch.setattr(spikes, "TIMES", -1e9)  # every step but the first is one
        return file_of(tmp_path_factory.mktemp("run"), tiny.config(**EVERY))


@pytest.mark.slow
def test_losses_and_weights_are_the_same_to_the_bit_with_and_without(tmp_path, undisturbed):
    records, trained, file = undisturbed
    plain, without, lines = file_of(tmp_path, tiny.config(**SELDOM))
    assert without.executable is trained.executable  # the very program
    test_loop.check_equal(trained.state, without.state)
    assert [record._replace(instruments=None) for record in records] == plain
    assert [record.step for record in records if record.instruments is not None] == DUE
    assert "instruments" not in lines and [json.loads(line)["loss"] for line in file.splitlines()] == [
        record.loss for record in plain
    ]


@pytest.mark.slow
def test_a_resumed_run_leaves_the_file_of_an_undisturbed_one(tmp_path, undisturbed, monkeypatch):
    monkeypatch.setattr(spikes, "LEAST", 1), monkeypatch.setattr(spikes, "TIMES", -1e9)
    *_, file = file_of(tmp_path, tiny.config(**EVERY), 3)
    assert file == undisturbed[2]
    found = {line["step"]: line["instruments"] for line in map(json.loads, file.splitlines()) if "instruments" in line}
    assert [*found] == DUE and [of["spikes"] for of in found.values()] == DUE
    names = {"activation", "attention_max", "attention_entropy", "gradient", "update"}
    assert all(len(of[name]) == 2 and all(np.isfinite(of[name])) for of in found.values() for name in names)


def test_spikes_alone_need_no_program(monkeypatch):
    monkeypatch.setattr(compiled, "measure", None)
    made = tiny.config(run__log__instruments=("spikes",), run__log__every=2)
    measure = Workload([Member(made, tiny.texts())]).measuring(None, None, None, None)
    assert [measure(at) for at in range(6)] == [{}, {}, None, {}, None, {}]


def test_curves_have_a_name_for_each_layer_and_leave_out_what_is_absent():
    measured = {"activation": [1.0, None, 3.0], "log_z_max": 4.0, "log_z_mean": None, "spikes": 2}
    expected = {"activation/layer 0": 1.0, "activation/layer 2": 3.0, "instruments/log_z_max": 4.0}
    assert log._curves(measured) == expected | {"instruments/spikes": 2}


@pytest.mark.slow
def test_members_of_a_stack_and_rows_over_devices(looked):
    """Each member as alone; with two devices along rows, both rows are read."""
    names, members = instruments.programmed(INSTRUMENTS), 2
    stacked = [jax.tree.map(lambda x: np.stack([x] * members), x) for x in (looked.state, looked.numbers, looked.batch)]
    stacked[0].model.embedding[...] = stacked[0].model.embedding[...] * np.float32([[[1.0]], [[2.0]]])
    program, alone = step.Program.of(looked.made), tiny.mesh()
    found = compiled.measure(*stacked, program, names, alone, members)(*stacked)
    one, other = (instruments.told(found, member, True) for member in range(members))
    assert one["activation"][0] < other["activation"][0]
    for name, value in looked.measured.items():
        np.testing.assert_allclose(one[name], value, rtol=1e-4)

    over = tiny.mesh(data=2)
    model = jax.device_put(looked.state.model, parameter.shardings(looked.state.model, over))
    inputs = step.State(model, looked.state.optimizer), looked.numbers, mesh.place(looked.batch, over)
    two = instruments.told(compiled.measure(*inputs, program, names, over)(*inputs), 0, False)
    np.testing.assert_allclose(two["gradient"], looked.measured["gradient"], rtol=1e-3)
    assert two["log_z_max"] >= looked.measured["log_z_max"] and two["log_z_mean"] != looked.measured["log_z_mean"]
