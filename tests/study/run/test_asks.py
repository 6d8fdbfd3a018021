"""A run is trained once and asked whatever is missing: later, again, under overrides, and where it was killed."""

import json

import jax
import numpy as np
import pytest
import tiny

from lab import kernels, storage
from lab.config import add_ask
from lab.data import Data, tokenizers
from lab.errors import UserError
from lab.evaluate import asks, conditions
from lab.model import mesh as lab_mesh
from lab.study import evaluations, results
from lab.study.define import asked, cell, identity
from lab.study.run import ask as run_ask
from lab.study.run import study as run_study
from lab.study.run.progress import Display
from lab.study.run.runs import Run
from lab.train import compiled, loop
from lab.train.step import Program

SIZES = dict(texts=32, texts_per_row=4, rows=8)
TEXTS = tiny.texts(64), tiny.texts(32, seed=5)


def config(**further) -> tiny.ConfigDict:
    """`further`: {name of an ask: its fields}."""
    made = tiny.config(model__layers=1, data__rows=8, train__steps=2)
    made.evaluate.loss.update(branches=(1, 2, 4), **SIZES)
    for name, fields in further.items():
        add_ask(made, name, **SIZES | dict(branches=(1, 2)) | fields)
    return made


class Counted:
    """An executable that counts how often it is called."""

    def __init__(self, executable, calls: list):
        self._executable, self._calls = executable, calls

    def __call__(self, *inputs):
        self._calls.append(inputs[1:])
        return self._executable(*inputs)

    def memory_analysis(self):
        return self._executable.memory_analysis()


class Study:
    """One run, made as the command makes it; trained, asked: the calls of the two programs so far."""

    def __init__(self, directory, monkeypatch):
        self.directory, self.trained, self.asked = directory / "cells" / "base" / "seed-0", [], []
        self.validation, self.stop = "validation", lambda step: False
        for name, calls in (("train_step", self.trained), ("evaluation_step", self.asked)):
            make = getattr(compiled, name)
            monkeypatch.setattr(compiled, name, lambda *of, make=make, calls=calls: Counted(make(*of), calls))

    def run(self, made) -> Run:
        data = Data(*TEXTS, tokenizers.Bytes(), "training", self.validation)
        return Run(cell.make(made.study, (), made), 0, dict.fromkeys(identity.PARTS, ""), data, self.directory)

    def make(self, made, **settings) -> tuple[run_study.Summary, int, int]:
        """(how it ended, training steps taken, evaluation calls made)"""
        before = len(self.trained), len(self.asked)
        options = dict(display=Display(1, quiet=True), stop=lambda step: self.stop(step), after_run=lambda: None)
        summary = run_study.run_study([(self.run(made),)], **options, **dict(retry_failed=False) | settings)
        return summary, len(self.trained) - before[0], len(self.asked) - before[1]

    def found(self, made, name=asks.LOSS) -> dict:
        run = self.run(made)
        return evaluations.find(self.directory, name, asked.wanted(made, run.data)[name])

    def losses(self, made, name=asks.LOSS) -> list[float]:
        return [row["loss"] for row in evaluations.rows(self.found(made, name))]


@pytest.fixture
def study(tmp_path, monkeypatch):
    return Study(tmp_path, monkeypatch)


def evaluation_programs() -> int:
    return sum(key[0] is compiled._evaluate for key in compiled._executables)


def forgotten(monkeypatch, digest):
    """As another process finds it, whose evaluation program has that digest."""
    monkeypatch.setattr(asked, "_programs", {})
    monkeypatch.setattr(asked.canonical, "evaluation_step", lambda *shape: digest)


DONE = run_study.Summary(done=1, new=1, failed=0)
NOTHING = run_study.Summary(done=1, new=0, failed=0), 0, 0


@pytest.mark.slow
def test_what_is_asked_later_trains_nothing_and_repeats_nothing(study):
    first = config()
    assert study.make(first) == (DONE, 2, 3)
    assert study.make(first) == NOTHING
    programs = evaluation_programs()
    result, before = (study.directory / "result.json").read_bytes(), study.found(first)
    more = config(
        same=dict(model=(("position.theta", first.model.position.theta),), branches=(1, 2, 4)),
        theta=dict(model=(("position.theta", 2.0),)),
        own=dict(model=(("rule", "own_branch"),)),
    )
    assert study.make(more) == (DONE, 0, 3 + 2 + 2)
    assert study.make(more) == NOTHING
    assert evaluation_programs() == programs + 1  # of the other rule; weights lie alike, trained or read back
    assert (study.directory / "result.json").read_bytes() == result and study.found(more) == before

    losses = study.losses(more)
    assert study.losses(more, "same") == losses  # of restored weights, those that were in memory before
    theta, own = study.losses(more, "theta"), study.losses(more, "own")
    assert all(abs(ours - theirs) > 1e-5 for ours, theirs in zip(theta, losses, strict=False))
    assert own[0] == pytest.approx(losses[0], rel=1e-5) and abs(own[1] - losses[1]) > 1e-5
    assert "conditions" not in json.loads(result) and len(list(study.directory.glob("evaluations/*"))) == 4


@pytest.mark.slow
def test_whatever_a_row_depends_on_asks_anew(study, monkeypatch):
    study.make(config())
    fewer = config()
    fewer.evaluate.loss.branches = (1, 2)
    assert study.make(fewer) == (DONE, 0, 2)
    study.validation = "other texts"
    assert study.make(fewer) == (DONE, 0, 2)
    kind = asks.ASKS["branches"]
    monkeypatch.setitem(asks.ASKS, "branches", kind._replace(version=kind.version + 1))
    assert study.make(fewer) == (DONE, 0, 2)
    forgotten(monkeypatch, "another program")
    assert study.make(fewer) == (DONE, 0, 2)
    assert study.make(fewer) == NOTHING


@pytest.mark.slow
def test_other_versions_take_a_complete_answer_whatever_its_program(study, monkeypatch):
    first = config()
    study.make(first)
    monkeypatch.setattr(asked, "versions", lambda: dict(jax="later"))
    forgotten(monkeypatch, "as a later jax writes it")
    assert study.make(first) == NOTHING
    path = next(study.directory.glob("evaluations/loss-*.json"))
    storage.write_json(path, storage.read_json(path) | {"complete": False})
    assert study.make(first) == (DONE, 0, 3)


@pytest.mark.slow
def test_a_kill_loses_the_condition_at_hand_alone(study):
    undisturbed, first = study.directory, config()
    study.make(first)
    whole = study.found(first)
    study.directory = undisturbed.with_name("seed-1")
    study.stop = lambda step: step == 2 and len(study.asked) == 3 + 2  # in the second condition
    with pytest.raises(loop.Stopped, match="the ask loss, eval_branch 2"):
        study.make(first)
    partial = study.found(first)
    assert not partial["complete"] and partial["conditions"] == whole["conditions"][:1]
    assert run_study._status(study.run(first)) == run_study.WAITING
    study.stop = lambda step: False
    assert study.make(first) == (DONE, 0, 2)
    assert study.found(first)["conditions"] == whole["conditions"]
    assert [timing["eval_branch"] for timing in study.found(first)["timings"]] == [1, 2, 4]


def test_a_loss_that_is_no_number_fails_the_run_and_is_not_kept(study, monkeypatch):
    made, evaluate = config(far=dict(model=(("position.theta", 2.0),))), conditions.evaluate

    def broken(config, name, *arguments, **settings):
        for one in evaluate(config, name, *arguments, **settings):
            yield one._replace(loss=np.nan) if (name, one.value) == ("far", 2) else one

    with monkeypatch.context() as patch:
        patch.setattr(conditions, "evaluate", broken)
        summary, _, _ = study.make(made)
    assert summary == run_study.Summary(done=0, new=1, failed=1)
    reason = json.loads((study.directory / "failure.json").read_text())["reason"]
    assert reason == "ask far, eval_branch 2: loss nan"
    assert len(study.found(made, "far")["conditions"]) == 1 and len(study.losses(made)) == 3
    assert study.make(made) == (run_study.Summary(done=0, new=0, failed=1), 0, 0)
    assert study.make(made, retry_failed=True) == (DONE, 0, 1)
    assert not (study.directory / "failure.json").exists()


def test_results_hold_the_ask_named_loss_and_further_asks_have_a_file_each(study, tmp_path):
    made = config(far=dict(model=(("position.theta", 2.0),)))
    study.make(made)
    run = study.run(made)
    described = {
        "name": "base",
        "labels": {},
        "seeds": [0],
        "directory": "cells/base",
        "asks": asked.wanted(made, run.data),
        **dict(tokens=1, parameters=1, executable="1a2b3c"),
    }
    plan = {"labels": [], "condition": "eval_branch", "cells": [described], "published": "", "study": "asked"}
    plan |= dict(question="", sections=[], command="", config={})
    plan["asks"] = {name: asks.column(made, name) for name in made.evaluate}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    found = results.collect(tmp_path)
    results.write_csv(found)
    assert [run.status for run in found.runs] == ["done"]
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines[0] == "seed,eval_branch,loss,ppl,accuracy,tokens,parameters"
    assert [float(line.split(",")[2]) for line in lines[1:]] == study.losses(made)
    lines = (tmp_path / "results" / "far.csv").read_text().splitlines()
    assert lines[0] == "seed,eval_branch,loss,accuracy,tokens"
    assert [float(line.split(",")[2]) for line in lines[1:]] == study.losses(made, "far")
    assert found.timings["phase"].tolist() == ["train", "eval", "eval", "eval", "far", "far"]


def test_weights_of_a_checkpoint_lie_as_those_of_training_do():
    made = config()
    mesh = lab_mesh.make(made.run.mesh)
    trained = compiled.initial_state(made, Program.of(made), mesh).model
    described = compiled.described(made, mesh)
    assert jax.tree.structure(described) == jax.tree.structure(trained)
    for ours, theirs in zip(jax.tree.leaves(described), jax.tree.leaves(trained), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.sharding.is_equivalent_to(theirs.sharding, theirs.ndim)


@pytest.mark.parametrize(("fields", "told"), [
    (dict(model=(("layers", 2),)), "evaluate.far.model sets layers = 2: its weights would be others"),
    (dict(model=(("position.thetta", 2.0),)), "a field of evaluate.far.model = 'position.thetta' is unknown"),
    (dict(model=(("position.theta", "far"),)), "evaluate.far.model sets position.theta = 'far', which is no float"),
    (dict(model=(("rule", "causall"),)), "evaluate.far.model: .*'causall' is unknown"),
    (dict(difficulties=(3,)), "evaluate.far.difficulties = .3,. means nothing beside evaluate.far.kind = 'branches'"),
])  # fmt: skip
def test_asks_that_cannot_be_are_refused_in_one_line(fields, told):
    with pytest.raises(UserError, match=told) as error:
        asks.check(config(far=fields))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a b", "a-b", "eval"])
def test_the_name_of_an_ask_is_one_word(name):
    with pytest.raises(UserError, match="choose one word"):
        asks.check(config(**{name: {}}))


def test_what_is_found_says_which_implementation_a_bias_leaves(monkeypatch, tmp_path):
    monkeypatch.setitem(kernels.AUTO, "cpu", ("pallas_triton", 2**20))
    monkeypatch.setattr(run_ask.memory, "peak", lambda executable: 0)
    one = conditions.Condition(1, 2.0, 0.5, tokens=10, bytes=0, seconds=1.0, executable=None)
    for name, taken in (("rope2d", "pallas_triton"), ("alibi", "tiled")):
        made = tiny.config(model__position__name=name)
        found = evaluations.begun("loss", "eval_branch", {"parts": {}, "versions": {}})
        run_ask._keep(Run(None, 0, {}, None, tmp_path), made, found, one, tiny.mesh())
        assert found["environment"]["implementation"] == taken
