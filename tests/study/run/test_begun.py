"""A study on a checkpoint: whose model and weights it is, what it is known by, and that it goes on like any other."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from test_asks import DONE, NOTHING, TEXTS, Study, config

import lab
from lab import data as lab_data
from lab.data import Data, tokenizers
from lab.errors import UserError
from lab.exchange import companions
from lab.study.define import cell, identity, plan, resolve, start
from lab.study.run import runs
from lab.train import loop, origin, step

LORA = dict(rank=2, targets=("mixer",))


def on(checkpoint, steps=2, lora=None, **model):
    """The config of a study on a checkpoint, as it is once it is opened."""
    made = config()
    made.checkpoint, made.train.steps = str(checkpoint), steps
    made.model.lora.update(lora or {})
    made = start.laid(made)
    made.model.update(model)
    return made


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The directory of a cell whose weights were never trained."""
    made = config()
    made.model.position.theta = 50.0
    return tiny.saved(tmp_path_factory.mktemp("base") / "cell", tiny.model(made), made)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """That of one of two steps, which was asked."""
    with pytest.MonkeyPatch.context() as patch:
        study = Study(tmp_path_factory.mktemp("trained"), patch)
        assert study.make(config()) == (DONE, 2, 3)
    return study.directory.parent


def asked(directory) -> list[dict]:
    """The rows of the ask named loss of a run."""
    (path,) = directory.glob("evaluations/loss-*.json")
    return json.loads(path.read_text())["conditions"]


def lines(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_without_a_step_a_run_is_asked_with_the_weights_of_its_checkpoint(trained, tmp_path, monkeypatch):
    study = Study(tmp_path, monkeypatch)
    made = on(trained, steps=0)
    for name in (companions.TEMPLATE, companions.ORIGIN):
        (trained / name).write_text("{}")
    assert study.make(made) == (DONE, 0, 3)
    kept = companions.TEMPLATE, companions.ORIGIN, origin.BASE
    assert all((study.directory.parent / name).is_file() for name in kept)
    assert asked(study.directory) == asked(trained / "seed-0")
    assert study.make(made) == NOTHING
    result = json.loads((study.directory / "result.json").read_text())
    there = json.loads((trained / "seed-0" / "result.json").read_text())
    assert (result["tokens"], result["parameters"]) == (0, there["parameters"])
    assert [segment["first_step"] for segment in result["segments"]] == [0]
    assert not [*(study.directory / "checkpoints").iterdir()]
    loaded, theirs = lab.load(study.directory.parent)[0], lab.load(trained)[0]
    jax.tree.map(np.testing.assert_array_equal, loaded, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "adapters"])
def test_training_goes_on_from_the_checkpoint_and_is_resumed_to_the_bit(trained, tmp_path, monkeypatch, lora):
    """The first loss is that of the checkpoint's weights; a stop after a step loses nothing; what is asked in memory is
    what is asked of the files."""
    study = Study(tmp_path, monkeypatch)
    made = on(trained, lora=lora)
    assert study.make(made) == (DONE, 2, 3)
    batch, _ = next(lab_data.train_batches(made, TEXTS[0]))
    nats, _, tokens = jax.jit(step.summed_losses)(lab.load(trained)[0], batch)
    assert lines(study.directory)[0]["loss"] == pytest.approx(float(nats / tokens), rel=1e-6)

    undisturbed = study.directory
    study.directory = tmp_path / "stopped" / "cells" / "base" / "seed-0"
    study.stop = lambda step: step == 0
    with pytest.raises(loop.Stopped):
        study.make(made)
    study.stop = lambda step: False
    assert study.make(made) == (DONE, 1, 3)
    keep = ("step", "loss", "grad_norm", "text_hash")
    assert [[line[name] for name in keep] for line in lines(study.directory)] == [
        [line[name] for name in keep] for line in lines(undisturbed)
    ]
    assert asked(study.directory) == asked(undisturbed)
    shutil.rmtree(study.directory / "evaluations")
    assert study.make(made) == (DONE, 0, 3)
    assert asked(study.directory) == asked(undisturbed)
    found, begun = (jax.tree.leaves(lab.load(path)[0]) for path in (undisturbed.parent, trained))
    moved = [bool(np.any(ours != theirs)) for ours, theirs in zip(found, begun, strict=True)]
    assert sum(moved) == (4 if lora else len(moved) - 1)  # the other is the rotary table


def test_the_model_is_the_checkpoint_s_but_for_what_the_command_and_the_cells_set(base):
    made = tiny.config(model__layers=3, model__dim=32, checkpoint=str(base), model__mixer__softcap=9.0)
    laid = start.laid(made, ("model.mixer.softcap",))
    assert (laid.model.layers, laid.model.dim, laid.model.position.theta) == (1, 16, 50.0)
    assert laid.model.mixer.softcap == 9.0 and made.model.layers == 3
    assert laid.checkpoint == str(base / "seed-0" / "checkpoints" / "2")  # another may be saved beside it
    assert laid.data.tokenizer == "bytes" and start.laid(tiny.config()) == tiny.config()
    made.study.cells = ((("model.position.theta", 7.0),), (("model.position.theta", 9.0),))
    made.study.labels = (("model.position.theta", "theta"),)
    cells = resolve.resolve(start.laid(made, ("model.mixer.softcap",)))
    assert [one.config.model.position.theta for one in cells] == [7.0, 9.0]
    for one in cells:
        start.check(one.config, one.name)


def test_a_cell_of_other_weights_is_refused_and_so_is_a_part_upon_nothing(base):
    made = on(base, dim=24)
    with pytest.raises(UserError, match=r"the cell 'base' would have other weights than config.checkpoint = .*: "
                                        r"blocks.0.feedforward.down is "
                                        r"\(1, 24, 16\) there and \(1, 24, 24\) here") as error:  # fmt: skip
        start.check(made, "base")
    assert "\n" not in str(error.value)
    alone = tiny.config(model__lora__rank=2)
    plan.check(cell.make(alone.study, (), alone))  # what it costs can be asked
    with pytest.raises(UserError, match=r"the rest comes from a checkpoint: give .*--config.checkpoint="):
        runs.runs_of([cell.make(alone.study, (), alone)], [0], base)
    none = tiny.config(train__steps=0, train__warmup=0)
    with pytest.raises(UserError, match=r"train\.steps = 0 must be at least 1"):
        plan.check(cell.make(none.study, (), none))


@pytest.mark.parametrize("kind", ["nowhere", "no tokenizer", "a probe's", "damaged"])
def test_a_checkpoint_that_is_none_is_one_line(base, tmp_path, kind):
    place = shutil.copytree(base, tmp_path / "copied")
    made = config()
    made.checkpoint = str(place)
    if kind == "nowhere":
        made.checkpoint = str(tmp_path / "nowhere")
    elif kind == "no tokenizer":
        (place / "tokenizer.json").unlink()
    elif kind == "a probe's":
        tokenizers.Symbols(29).save(place)
    else:
        (place / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.checkpoint = '.*': ") as error:
        start.laid(made)
    assert "\n" not in str(error.value)


def test_damaged_weights_are_one_line(base, tmp_path, monkeypatch):
    place = shutil.copytree(base, tmp_path / "copied")
    for path in [path for path in place.rglob("checkpoints/2/state/**/*") if path.is_file()]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for steps in (0, 2):
        study = Study(tmp_path / f"study {steps}", monkeypatch)
        with pytest.raises(UserError, match=r"checkpoint .*copied.* cannot be read") as error:
            study.make(on(place, steps=steps))
        assert "\n" not in str(error.value)


def record(made):
    return identity.record(made, Data(*TEXTS, tokenizers.Bytes(), "training", "validation"))


def test_identity_is_that_of_the_weights_and_not_of_their_place(base, tmp_path, monkeypatch):
    for name in ("train_step", "initial_state", "tables"):
        monkeypatch.setattr(identity.canonical, name, lambda made: "digest")
    monkeypatch.setattr(identity, "cache_directory", lambda: tmp_path / "cache")
    here, drawn = record(on(base)), record(config())
    assert "weights" not in drawn and "weights" in here
    shutil.copytree(base, tmp_path / "moved")
    moved = record(on(tmp_path / "moved"))
    assert moved == here and identity.name_of(moved) == identity.name_of(here)
    assert str(tmp_path) not in json.dumps(moved)
    other = here | {"weights": "others"}
    same_model = config()
    same_model.model.position.theta = 50.0
    for one, another in ((here, other), (here, record(same_model)), (here, record(on(base, lora=LORA)))):
        assert identity.compare(one, another) is None and identity.compare(another, one) is None
    assert identity.compare(here, moved) == identity.SAME
