"""What a result's identity is made of: every sentence that lab.study.define.identity and the README say of it."""

import json

import jax
import numpy as np
import pytest
import tiny

import lab.config
from lab.data import Data, packing
from lab.errors import UserError
from lab.model import feedforward, parameter, position
from lab.model.attention import Attention
from lab.model.norm import RMSNorm
from lab.model.streams import STREAMS
from lab.options import Option, leaves, set_field
from lab.study.define import identity
from lab.train import canonical, optimizer, step

CHOOSING = ("name", "corpus", "optimizer", "schedule")  # fields that name an entry
ELSEWHERE = {"jax": "0.0.1", "flax": "0.0.1", "optax": "0.0.1"}


def data(train="train", validation="validation"):
    return Data(tiny.texts(), None, None, train, validation)


@pytest.fixture
def made(monkeypatch, tmp_path):
    """The record of a tiny config, its programs traced anew: nothing is kept from one call to the next."""

    def record(of=None, **overrides):
        original = step.train_step
        with monkeypatch.context() as patch:
            patch.setattr(identity, "cache_directory", lambda: tmp_path / str(np.random.default_rng().random()))
            patch.setattr(canonical, "_digests", {})
            patch.setattr(identity, "_packed", {})
            patch.setattr(step, "train_step", lambda *arguments: original(*arguments))  # jax keeps what it has traced
            return identity.record(tiny.config(model__layers=1, **overrides), of or data())

    return record


def same(one, other):
    return identity.compare(one, other) == identity.SAME


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"7", b"\xff"])
def test_a_damaged_digest_of_programs_is_made_again(monkeypatch, tmp_path, content):
    monkeypatch.setattr(identity, "cache_directory", lambda: tmp_path)
    for name in ("train_step", "initial_state", "tables"):
        monkeypatch.setattr(canonical, name, lambda config: "digest")
    made = identity._traced(tiny.config())
    (path,) = (tmp_path / "programs").iterdir()
    path.write_bytes(content)
    assert identity._traced(tiny.config()) == made == identity.find_json(path)


def test_how_a_cell_runs_is_asked_and_lies_is_no_part_of_it(made):
    here = made()
    run = dict(
        run__scan=True, run__remat="full", run__implementation="tiled", run__microbatches=2, run__mesh__fsdp=2,
        run__workers=1, run__checkpoint__every=3, run__log__every=1,
    )  # fmt: skip
    asked = dict(evaluate__loss__texts=32, study__name="another", seed=3, model_seed=3)
    assert made(**run) == here
    assert made(data(validation="other"), **asked) == here
    assert made(data(train="other"))["data"] != here["data"]


def test_how_its_code_is_written_is_no_part_of_it(made, monkeypatch):
    """Other sources mean that programs are traced again, and no more."""
    here = made()
    monkeypatch.setattr(identity, "_sources", lambda: "a docstring, a comment, a new file")
    monkeypatch.setitem(STREAMS, "another", STREAMS["unet"])
    assert made() == here


def test_a_field_that_was_declared_later_has_its_default_in_old_records(made, monkeypatch):
    before = made()
    with monkeypatch.context() as patch:
        patch.setitem(Attention.options, "later", Option(0, "declared later"))
        identity._defaults.cache_clear()
        after = made()
        assert "model.mixer.later" in after["fields"] and "model.mixer.later" not in before["fields"]
        assert same(after, before) and same(before, after)
        assert identity.compare(made(model__mixer__later=1), before) is None
    identity._defaults.cache_clear()


def test_a_default_that_is_changed_later_changes_identity(made, monkeypatch):
    before = made()
    monkeypatch.setitem(RMSNorm.options, "eps", Option(1e-3, "another default", above=0))
    assert identity.compare(made(), before) is None


def test_every_field_that_is_read_is_in_it_and_no_other():
    config, read = tiny.config(), identity.fields(tiny.config())
    for name, value in leaves(config).items():
        changed = config.copy_and_resolve_references()
        if name in ("model.pattern", "seed", "model_seed") or name.split(".")[-1] in (
            "name",
            "corpus",
            "optimizer",
            "schedule",
        ):
            continue
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        set_field(changed, name, not value if isinstance(value, bool) else value + 1 if numeric else type(value)())
        assert (identity.fields(changed) != read) == (name in read and changed != config), name
    assert not {name for name in read if name.split(".")[0] not in ("model", "data", "train", "model_seed - seed")}
    assert {"model.rule", "data.draw", "train.adamw.b1", "train.cooldown"} & {*read} == {
        "model.rule", "data.draw", "train.adamw.b1"
    }  # fmt: skip


@pytest.mark.parametrize("overrides", [
    dict(model__feedforward__width=32),
    dict(model__position__ratio=0.25),
    dict(train__learning_rate=0.1),
    dict(data__draw="fixed2"),
    dict(model_seed=1),
], ids=str)  # fmt: skip
def test_a_field_that_is_read_changes_it(made, overrides):
    assert identity.compare(made(**overrides), made()) is None


def formula(patch):
    original = feedforward.Gated.__call__
    patch.setattr(feedforward.Gated, "__call__", lambda self, x: 1.5 * original(self, x))


def initialiser(patch):
    patch.setattr(parameter, "bias", lambda *a, **k: pytest.fail("not drawn"))
    original = parameter.matrix
    patch.setattr(parameter, "matrix", lambda *a, gain=1.0, **k: original(*a, gain=2 * gain, **k))


def packing_order(patch):
    patch.setattr(packing, "draw_groups", lambda n, low, high, rng: [1] * n)


def rotary_table(patch):
    original = position.rope2d_frequencies
    row = position.Encoding(
        lambda R, p, *mapped: {k: 2 * v for k, v in original(R, p, *mapped).items()},
        position.ROTARY | position.BRANCHED,
    )
    patch.setitem(position.POSITIONS, "rope2d", row)


def schedule(patch):
    original = optimizer.SCHEDULES["cosine"]
    patch.setitem(
        optimizer.SCHEDULES, "cosine", original._replace(make=lambda train, left: original.make(train, left + 1))
    )


@pytest.mark.parametrize(("change", "part"), [
    (formula, "program"), (initialiser, "initial"), (packing_order, "batches"), (rotary_table, "tables"),
    (schedule, "schedule"),
], ids=lambda x: x if isinstance(x, str) else x.__name__)  # fmt: skip
def test_what_is_computed_changes_it(made, monkeypatch, change, part):
    before = made()
    with monkeypatch.context() as patch:
        change(patch)
        after = made()
    assert [name for name in before if before[name] != after[name]] == [part]
    assert identity.compare(after, before) is None


def test_programs_compare_under_equal_versions_only(made):
    here = made()
    there = here | {"versions": ELSEWHERE, "program": "another text", "initial": "another text"}
    assert identity.compare(here, there) == identity.OTHER_VERSIONS
    assert identity.compare(here, there | {"versions": here["versions"]}) is None
    assert identity.compare(here, there | {"tables": "other"}) is None
    assert identity.find(here, {"cells/a": [there], "cells/b": [here]}) == ("cells/b", identity.SAME)
    assert identity.find(here, {"cells/a": [there]}) == ("cells/a", identity.OTHER_VERSIONS)
    assert identity.find(here, {"cells/a": [there]}, remake=True) is None
    assert identity.find(here, {"cells/a": [there, here]}, remake=True) == ("cells/a", identity.SAME)
    assert identity.find(here | {"program": "changed here since"}, {"cells/a": [there, here]}) is None


def test_directories_are_found_by_what_they_hold(made, tmp_path):
    here = made()
    directory = tmp_path / "cells" / f"an old name-{identity.name_of(here)}"
    directory.mkdir(parents=True)
    assert identity.records(tmp_path) == {}
    identity.keep(directory, here)
    identity.keep(directory, here | {"data": "is not written over"})
    there = identity.records(tmp_path)
    assert there == {f"cells/{directory.name}": [here]}
    identity.keep(directory, here | {"versions": ELSEWHERE})
    assert [one["versions"] for one in identity.read(directory)] == [here["versions"], ELSEWHERE]
    there = identity.records(tmp_path)
    assert identity.find(here, there) == (f"cells/{directory.name}", identity.SAME)


@pytest.mark.parametrize("text", ["{}", "[]x", "[{}]", "[1]", '{"records": [{}]}'])
def test_a_damaged_record_is_none_and_is_written_again(made, tmp_path, text):
    (tmp_path / identity.FILE).write_text(text)
    assert identity.read(tmp_path) == []
    identity.keep(tmp_path, made())
    assert identity.read(tmp_path) == [made()]


def test_a_record_is_the_same_in_every_process(made):
    here = made()
    assert json.loads(json.dumps(here)) == here
    assert jax.process_count() == 1 and len(identity.name_of(here)) == 12


def test_a_config_that_lacks_a_field_is_restored_with_its_default():
    config = tiny.config(model__pattern=((("rule", "causal"),), ()), model__mixer__softcap=2.0)
    stored = json.loads(config.to_json_best_effort())
    del stored["model"]["tied"], stored["train"]["muon"], stored["run"]
    found = lab.config.restored(stored)
    assert found.model.to_dict() == config.model.to_dict() and found.evaluate.to_dict() == config.evaluate.to_dict()
    assert found.train.muon.to_dict() == lab.config.base().train.muon.to_dict()
    stored["model"]["heads"] = 4
    with pytest.raises(UserError, match=r"a field of config.json = 'model.heads' is unknown"):
        lab.config.restored(stored)
