"""What changes the digests of a config's programs, and what does not. Programs are traced only."""

import functools
import os
import subprocess
import sys

import jax
import pytest
import tiny

from lab.model import attention, feedforward, norm, parameter, slots
from lab.train import canonical, optimizer, step


def small(**overrides):
    return tiny.config(**dict(model__layers=1) | overrides)


@functools.cache
def digests(**overrides) -> tuple[str, str, str]:
    config = small(**overrides)
    return canonical.train_step(config), canonical.initial_state(config), canonical.tables(config)


@pytest.fixture
def traced(monkeypatch):
    """The digest of the training step, traced anew: what is patched in a test is not what was traced before it."""
    real = step.train_step

    def digest() -> str:
        monkeypatch.setattr(step, "train_step", lambda *inputs: real(*inputs))
        monkeypatch.setattr(canonical, "_digests", {})
        return canonical.train_step(small())

    return digest


@pytest.mark.parametrize("run", [
    dict(run__scan=True, run__remat="full", run__implementation="tiled", run__microbatches=2),
    dict(run__mesh__data=2, run__mesh__fsdp=2, run__mesh__tensor=2, run__workers=1, study__name="another"),
    dict(seed=5, model_seed=7, train__steps=40, train__schedule="wsd", data__draw="fixed2"),
    dict(train__learning_rate=0.1, train__weight_decay=0.3, train__adamw__b2=0.5, train__z_loss=0.1, train__clip=3.0),
])  # fmt: skip
def test_how_and_with_what_numbers_it_runs_changes_nothing(run):
    run = dict(model__layers=2) | run  # one could not be scanned
    assert digests(**run) == digests(model__layers=2)


def test_cells_that_differ_in_tables_share_their_programs():
    one, other = digests(), digests(model__position__ratio=1.0)
    assert one[:2] == other[:2] and one[2] != other[2]


def test_every_option_that_is_compiled_in_changes_the_training_step():
    different = [
        dict(model__rule="own_branch"),
        dict(model__mixer__softcap=1.0),
        dict(model__compute="bfloat16"),
        dict(model__layers=2),
        dict(data__rows=3),
        dict(train__decay="all"),
        dict(train__optimizer="muon"),
    ]
    assert len({digests(**fields)[0] for fields in [{}, *different]}) == 1 + len(different)


def halved(function):
    return lambda *arguments: jax.tree.map(lambda x: 0.5 * x, function(*arguments))


def test_a_changed_formula_changes_the_training_step(traced, monkeypatch):
    seen = {traced()}
    for module, name, changed in [
        (step, "_summed", lambda logits, labels, real=step._summed: (*real(logits, labels)[:2], 0.21)),
        (step, "_summed", lambda logits, labels, real=step._summed: real(1.5 * logits, labels)),
        (norm, "rms_normed", lambda x, eps, real=norm.rms_normed: real(x, 2 * eps)),
        (attention, "heads", halved(attention.heads)),
        (feedforward.Gated, "__call__", halved(feedforward.Gated.__call__)),
        (optimizer, "adamw", lambda n, *rest, real=optimizer.adamw: real(n | {"adamw.b1": n["adamw.b2"]}, *rest)),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, changed)
            row = optimizer.OPTIMIZERS["adamw"]._replace(make=optimizer.adamw)
            patch.setitem(optimizer.OPTIMIZERS, "adamw", row)
            seen.add(traced())
    assert len(seen) == 6  # the first returns what nobody reads


def test_a_function_that_is_jitted_wrapped_or_copied_changes_nothing(traced, monkeypatch):
    before = traced()
    monkeypatch.setattr(step, "_summed", jax.jit(step._summed))
    monkeypatch.setattr(norm, "rms_normed", lambda values, constant, real=norm.rms_normed: real(values, constant))
    real = feedforward.Gated.__call__
    monkeypatch.setattr(feedforward.Gated, "__call__", lambda self, x: jax.jit(real)(self, x))
    assert traced() == before


def test_another_number_that_no_program_reads_changes_nothing(traced, monkeypatch):
    before = traced()
    numbers = optimizer.ones("adamw")
    monkeypatch.setattr(optimizer, "ones", lambda name: {"another": 1.0} | numbers)
    assert traced() == before


def test_how_weights_are_drawn_is_in_the_initial_state(monkeypatch):
    before = digests()
    real = parameter.matrix
    for changed in (
        lambda *a, gain=1.0, **k: real(*a, gain=1.01 * gain, **k),
        lambda key, *a, **k: real(jax.random.fold_in(key, 1), *a, **k),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(parameter, "matrix", changed)
            config = small()
            after = canonical.initial_state(config), canonical.tables(config)
        assert after[0] != before[1] and after[1] == before[2]
    assert digests(train__optimizer="muon")[1] != before[1]  # it keeps another state


@pytest.mark.slow
def test_another_process_gives_the_same():
    code = "import test_canonical; print(*test_canonical.digests())"
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert tuple(told.stdout.split()) == digests()


def test_scoring_behind_a_cache_is_a_program_of_its_own(monkeypatch):
    of = lambda **overrides: canonical.score_chunk(small(**overrides), 2, 4, 8)  # noqa: E731
    assert of() == of(run__implementation="tiled", model__position__ratio=1.0)
    assert of() != of(model__mixer__softcap=1.0) and of() != canonical.score_chunk(small(), 2, 4, 12)
    before, put, real = of(), slots.put, step.score_chunk
    monkeypatch.setattr(canonical, "_digests", {})
    monkeypatch.setattr(step, "score_chunk", lambda *inputs: real(*inputs))  # traced anew
    assert of() == before
    monkeypatch.setattr(canonical, "_digests", {})
    monkeypatch.setattr(step, "score_chunk", lambda *inputs: real(*inputs))
    monkeypatch.setattr(slots, "put", lambda old, new, at: put(old, new, at[:, ::-1]))
    assert of() != before
