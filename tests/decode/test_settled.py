"""Which attention an engine takes on a GPU: the kernel, interpreted here, if it passes its trial."""

import re

import decoding
import jax
import pytest

from lab import kernels
from lab.decode import attention
from lab.kernels import pallas_triton, rules, tiles


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(attention, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention, "_faults", {})
    monkeypatch.setattr("lab.kernels.trial._programs", {})
    with kernels.interpreted():
        yield


def taken(variant: str = "default") -> str:
    """By an engine of such a model."""
    engine = decoding.engine(decoding.built(variant))
    return engine.model.execution.implementation


def test_where_there_is_no_gpu_it_stays_open():
    assert taken() == "auto"


def test_on_a_gpu_it_is_the_kernel_that_reads_limits(on_a_gpu, caplog):
    assert kernels.IMPLEMENTATIONS[attention.KERNEL].forks
    assert taken() == attention.KERNEL and not caplog.records


def test_what_is_tried_are_the_calls_of_an_engine_in_every_way_that_layers_make_them(on_a_gpu, monkeypatch):
    tried = []
    monkeypatch.setattr(attention, "fault", tried.append)
    assert taken("local : global") == attention.KERNEL
    shape = decoding.SHAPE
    widths = shape["branches"], max(shape["chunk"], 2 * tiles.FEW)
    of_layers = rules.parse("own_branch & window(3)"), rules.all_branches
    expected = [(T, shape["length"], rule) for T in widths for rule in of_layers]
    assert [(problem.q[1], problem.k[1], problem.rule) for problem in tried] == expected
    assert all(problem.forked for problem in tried)


def raising(*_, **__):
    raise RuntimeError("no such instruction\nand more")


def unlimited(rule, q, k, limits):
    return rules.pairs_visible(rule, q, k, limits and (lambda q, k: 0 * (q + k) + rules.ENDLESS))


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (dict(_forward=raising), r"does not run here \(RuntimeError: no such instruction\)"),
        (dict(pairs_visible=unlimited), r"is wrong here, by .* of (o|lse) \(1 x 10, "),
        (dict(OBSTACLE="needs what this jax no longer has"), "needs what this jax no longer has"),
    ],
    ids=["fails", "wrong", "gone"],
)
def test_a_kernel_that_fails_its_trial_is_not_taken(on_a_gpu, monkeypatch, caplog, broken, says):
    for name, value in broken.items():
        monkeypatch.setattr(pallas_triton, name, value)
    assert taken() == "auto"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert re.fullmatch(
        f"attention: pallas_triton {says}.*; decoding with tiled, which is slow on a GPU", record.message
    )


def test_a_kernel_that_gives_other_bits_the_next_time_is_not_taken(on_a_gpu, monkeypatch, caplog):
    numbers = attention.trial.numbers
    monkeypatch.setattr(attention.trial, "numbers", lambda *given: numbers(*given) | {"same": False})
    assert taken() == "auto" and "does not repeat itself to the bit" in caplog.text


def test_what_a_model_names_is_taken(on_a_gpu):
    model = jax.tree.map(lambda w: w, decoding.built("default"))
    model.execution = model.execution._replace(implementation="reference")
    assert attention.settled(model, (1,), 64) is model


@pytest.mark.parametrize("variant", ["t5 : learned", "shaw : t5"])
def test_biases_are_left_to_what_adds_them(on_a_gpu, variant):
    assert taken(variant) == "auto"


def test_weights_on_several_devices_are_left_to_what_was_tried_there(on_a_gpu):
    over = jax.sharding.NamedSharding(jax.make_mesh((2,), ("data",)), jax.sharding.PartitionSpec())
    model = jax.device_put(decoding.built("default"), over)
    assert attention.settled(model, (1,), 64) is model
