"""Implementations are tried in processes of their own: what is wrong, crashes or hangs costs itself alone."""

import dataclasses
import pathlib
import pickle
import re
import sys
import time

import jax
import numpy as np
import packs
import planted
import pytest

from lab.kernels import choice, rules, trial
from lab.kernels.choice import Tried
from lab.kernels.trial import Problem

COMMAND = (sys.executable, planted.__file__)


def problem(training: bool = True, **changed) -> Problem:
    at = packs.interleaved(np.random.default_rng(0), 2, 256)
    fields = dict(
        q=(2, 256, 4, 8), k=(2, 256, 2, 8), v=(2, 256, 2, 8), dtype="float32", rule=rules.own_branch, scale=0.3,
        softcap=0.0, frequencies=0, training=training, of_lse=True, at=(at, at), calls=3,
    )  # fmt: skip
    return Problem(**fields | changed)


@pytest.fixture
def tried(tmp_path, monkeypatch):
    """A function of a planted implementation: what its trial found."""
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).resolve().parents[2]))
    path = tmp_path / "problems"
    problems = [problem(), problem(training=False)]
    path.write_bytes(pickle.dumps(problems))
    return lambda name, seconds=300.0: choice.tried(name, path, len(problems), time.monotonic() + seconds, COMMAND)


FAILING = {
    "wrong": r"wrong: o is off by 5\.0e-02 on problem 1",
    "wrong_backward": r"wrong: d\w is off by 1\.\de-01 on problem 1",
    "restless": "does not give the same bits twice",
    "crashing": "ended with code -11: .*about to crash",
    "out_of_memory": "JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory",
    "refusing": "'refusing' takes no heads of that width",
}


@pytest.mark.matrix("name")
@pytest.mark.slow
@pytest.mark.parametrize("name", FAILING)
def test_what_fails_is_refused_and_says_why(tried, name):
    found = tried(name)
    assert re.search(FAILING[name], found.refused), found.refused
    assert choice.best([found], [1, 1]).name == "tiled"


@pytest.mark.long
@pytest.mark.slow
def test_what_hangs_is_ended(tried, monkeypatch):
    monkeypatch.setattr(choice, "SILENCE", 30.0)
    begun = time.monotonic()
    assert tried("hanging").refused == "hangs: said nothing for 30 s"
    assert time.monotonic() - begun < 120
    assert tried("hanging", seconds=5.0).refused == "was not done in time"


@pytest.mark.slow
def test_the_fastest_that_is_right_is_taken(tried, monkeypatch):
    monkeypatch.setattr(choice, "TRUSTED", ("slow", "wrong", "right"))
    problems, said = [problem(), problem(training=False)], []
    chosen = choice.choose(problems, ["right", "wrong", "slow"], said.append, command=COMMAND)
    assert chosen.name == "right" and chosen.warning == ""
    assert [one.name for one in chosen.tried] == ["slow", "wrong", "right"]  # the most trusted first
    assert [bool(one.refused) for one in chosen.tried] == [False, True, False]
    assert all(seconds > 0.2 for seconds in chosen.tried[0].seconds.values())
    assert said == [f"attention: trying {name} ({i} of 3)" for i, name in enumerate(("slow", "wrong", "right"), 1)]


def one(name: str, seconds: float, sums=1.0, **changed) -> Tried:
    fields = dict(refused="", seconds={0: seconds}, errors={}, same=True, sums={0: {"o": [sums, sums]}})
    return Tried(name, **fields | changed)


def test_of_those_as_fast_the_most_trusted_is_taken(monkeypatch):
    assert choice.best([one("cudnn", 1.09), one("pallas_gpu", 1.0)], [5]).name == "cudnn"
    assert choice.best([one("cudnn", 1.11), one("pallas_gpu", 1.0)], [5]).name == "pallas_gpu"
    restless = choice.best([one("cudnn", 1.0, same=False), one("tiled", 9.0)], [5])
    assert restless.name == "cudnn" and "does not repeat itself to the last bit" in restless.warning


def test_time_is_that_of_all_calls():
    fast_forward, fast_training = one("cudnn", 0.0), one("pallas_gpu", 0.0)
    fast_forward, fast_training = (
        each._replace(seconds=seconds, sums={})
        for each, seconds in ((fast_forward, {0: 3.0, 1: 1.0}), (fast_training, {0: 1.0, 1: 9.0}))
    )
    assert choice.best([fast_forward, fast_training], [100, 1]).name == "pallas_gpu"
    assert choice.best([fast_forward, fast_training], [1, 100]).name == "cudnn"


def test_the_fastest_must_agree_with_another_on_large_shapes():
    odd = choice.best([one("cudnn", 1.0, sums=2.0), one("pallas_gpu", 5.0), one("tiled", 9.0)], [1])
    assert odd.name == "cudnn" and "differ on the study's own" in odd.warning
    odd = choice.best([one("cudnn", 5.0), one("pallas_gpu", 1.0, sums=1.05)], [1])
    assert odd.name == "cudnn" and "cudnn, the most trusted" in odd.warning
    assert choice.best([one("cudnn", 5.0), one("pallas_gpu", 1.0, sums=1.02)], [1]) == choice.Decision(
        "pallas_gpu", [one("cudnn", 5.0), one("pallas_gpu", 1.0, sums=1.02)]
    )


def test_where_none_is_right_tiled_is_taken_with_a_warning():
    chosen = choice.best([one("cudnn", 1.0, refused="wrong")], [1])
    assert chosen.name == "tiled" and "which is slow" in chosen.warning


def test_nothing_is_tried_once_the_time_is_over(monkeypatch):
    chosen = choice.choose([problem()], ["cudnn", "tiled"], budget=-1.0)
    assert chosen.name == "tiled" and {one.refused for one in chosen.tried} == {"was not tried: no time was left"}


def test_what_differs_in_batches_alone_is_compared_once(monkeypatch):
    compared = []
    monkeypatch.setattr(trial, "numbers", lambda one, name, rng: compared.append(one) or {"same": True})
    monkeypatch.setattr(trial, "timed", lambda one, name: {"seconds": 1.0})
    one, other = problem(), problem(training=False)
    lines = [*trial.tried([one, dataclasses.replace(one, calls=5), other], "tiled")]
    assert compared == [one, other]
    assert (
        [line["problem"] for line in lines if "same" in line]
        == [0, 1, 2]
        == [line["problem"] for line in lines if "seconds" in line]
    )


@pytest.mark.matrix("changed")
@pytest.mark.slow
@pytest.mark.parametrize("changed", [{}, {"training": False}, {"frequencies": 3}, {"of_lse": False}])
def test_tiled_passes_every_kind_of_problem(changed):
    lines = list(trial.tried([problem(**changed)], "tiled"))
    numbers, times = ({k: v for line in lines for k, v in line.items() if k in keys} for keys in (
        ("errors", "allowed", "same"), ("seconds", "sums")
    ))  # fmt: skip
    training = changed.get("training", True)
    of = {"o", "lse", *({"dq", "dk", "dv"} if training else ()), *(["df"] if changed.get("frequencies") else [])}
    assert {*numbers["errors"]} == of and numbers["same"] and times["seconds"] > 0
    assert all(error < 1e-5 for error in numbers["errors"].values())
    theirs = trial.timed(problem(**changed), "reference")["sums"]
    assert choice._agree(
        one("tiled", 1.0, sums=0)._replace(sums={0: times["sums"]}), one("x", 1.0)._replace(sums={0: theirs})
    )


def test_a_value_that_is_not_finite_is_an_error_without_bound():
    assert trial.errors({"o": np.array([1.0, np.nan])}, {"o": np.array([1.0, 2.0])}) == {"o": float("inf")}
    assert trial.errors({"o": np.array([1.0, -np.inf])}, {"o": np.array([1.0, -np.inf])}) == {"o": 0.0}


def test_equal_problems_have_one_key():
    assert problem().key() == problem(calls=9).key() != problem(softcap=2.0).key()
    jax.tree.map(np.testing.assert_array_equal, problem().at, problem().at)
