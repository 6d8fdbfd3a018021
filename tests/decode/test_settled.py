"""Which attention an engine takes on a GPU: the kernel, interpreted here, if it passes its trial."""

import re

import pytest
import tiny
import variants

from lab import kernels
from lab.decode import attention
from lab.kernels import pallas_triton, rules


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(attention, "default_backend", lambda: "gpu")
    with kernels.interpreted():
        yield


def taken(variant: str = "default", **overrides) -> str:
    return attention.settled(tiny.model(variants.config(variant, **overrides)).apart()).execution.implementation


def test_where_there_is_no_gpu_it_stays_open():
    assert taken() == "auto"


def test_on_a_gpu_it_is_the_kernel_that_reads_limits(on_a_gpu, caplog):
    assert kernels.IMPLEMENTATIONS[attention.KERNEL].forks
    assert taken() == attention.KERNEL and not caplog.records


def test_what_is_tried_are_steps_of_every_way_in_which_layers_call_it():
    model = tiny.model(variants.config("local : global")).apart()
    found = [(problem.q[1], problem.rule) for problem in attention.problems(model)]
    of_layers = rules.parse("own_branch & window(3)"), rules.all_branches
    expected = [(T, rule) for T in attention.TOKENS for rule in of_layers]
    assert sorted(found, key=str) == sorted(expected, key=str)
    assert all(problem.forked and problem.k[1] == attention.SLOTS for problem in attention.problems(model))


def raising(*_, **__):
    raise RuntimeError("no such instruction\nand more")


def unlimited(rule, q, k, limits):
    return rules.pairs_visible(rule, q, k, limits and (lambda q, k: 0 * (q + k) + rules.ENDLESS))


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (dict(_forward=raising), r"does not run here \(RuntimeError: no such instruction\)"),
        (dict(pairs_visible=unlimited), r"is wrong here, by .* of (o|lse) \(1 x 1, "),
        (dict(OBSTACLE="needs what this jax no longer has"), "needs what this jax no longer has"),
    ],
    ids=["fails", "wrong", "gone"],
)
def test_a_kernel_that_fails_its_trial_is_not_taken(on_a_gpu, monkeypatch, caplog, broken, says):
    monkeypatch.setattr("lab.kernels.trial._programs", {})
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


def test_what_a_model_names_is_taken_and_biases_are_left_to_what_adds_them(on_a_gpu):
    model = tiny.model(variants.config("default"))
    model.execution = model.execution._replace(implementation="reference")
    assert attention.settled(model) is model
    assert taken("t5 : learned") == "auto"
