"""The kernels for TPUs in the interpreter of jax that simulates their memories, copies and semaphores: what is read
before it is written is nan there, what lies outside an array is an error, and races of two cores are found."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from test_attend import Case, check_close, compiled, draw

from lab.kernels import pallas_tpu, rules
from lab.kernels.rotary import rotate, rotation

CASES = {
    "groups": (Case(T=40, S=40, rule=rules.own_branch, H=4, G=2), 0),
    "capped, rotated": (Case(T=40, S=40, rule=rules.causal & rules.window(9), softcap=1.5, H=2, G=2, K=8), 3),
    "step": (Case(T=4, S=64, rule=rules.all_branches, H=4, G=2, K=8, V=8), 0),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "tile_sizes", lambda T, S: (32, 16))


@functools.cache
def simulated(case: Case, turned: bool, backward: bool):
    scale = case.K**-0.5 if case.scale is None else case.scale
    machine = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)

    def run(arrays, coordinates, cotangents, frequencies):
        def attend(*arrays):
            options = {"frequencies_3F": frequencies} if turned else {}
            return pallas_tpu.attend(
                *arrays, *coordinates, case.rule, scale, case.softcap, **options, interpret=machine
            )

        if not backward:
            return attend(*arrays)
        outputs, pull = jax.vjp(attend, *arrays)
        return outputs, pull(cotangents)

    return jax.jit(run)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*[*CASES][1:], pytest.param("groups", marks=pytest.mark.whole)])
def test_nothing_races_and_numbers_are_those_of_the_reference(name):
    case, pairs = CASES[name]
    arrays, coordinates, cotangents = draw(case, len(name))
    frequencies = jnp.linspace(0.1, 0.9, 3 * pairs).reshape(3, pairs) if pairs else None
    turned = (rotate(arrays[0], rotation(coordinates[0], frequencies)), *arrays[1:]) if pairs else arrays
    backward = case.T == case.S
    found = simulated(case, bool(pairs), backward)(arrays, coordinates, cotangents, frequencies)
    assert not simulator.races.races_found
    outputs, gradients = compiled(case, "reference")(turned, coordinates, cotangents)
    if not backward:
        check_close(found, outputs)
        return
    if pairs:  # the gradient of queries as they were
        _, back = jax.vjp(lambda q: rotate(q, rotation(coordinates[0], frequencies)), arrays[0])
        gradients = (*back(gradients[0]), *gradients[1:])
    check_close(found, (outputs, gradients))


@pytest.mark.slow
def test_two_cores_that_write_to_one_place_race(monkeypatch):
    def crossed(*arguments, outputs, whole=pallas_tpu.call, **options):
        first = lambda index: lambda core, *place: index(0 * core, *place)  # noqa: E731
        moved = [(like, pl.BlockSpec(spec.block_shape, first(spec.index_map))) for like, spec in outputs]
        return whole(*arguments, outputs=moved, **options)

    monkeypatch.setattr(pallas_tpu, "call", crossed)
    case = CASES["groups"][0]
    jax.block_until_ready(simulated.__wrapped__(case, False, False)(*draw(case, 0), None))
    assert simulator.races.races_found
    simulator.races.races_found = False
