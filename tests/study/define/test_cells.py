"""Cells: what combinators make, what they resolve to, and what names their directories."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lab.config
from lab.errors import UserError
from lab.options import leaves, set_field
from lab.study.define import cell as definition
from lab.study.define.cells import chain, named, product, vary, zipped
from lab.study.define.resolve import resolve

values = st.lists(st.integers(), min_size=1, max_size=4, unique=True)


def study(made=(), labels=(), **settings):
    config = lab.config.base()
    config.study.update(name="made", cells=tuple(made), labels=tuple(labels), **settings)
    return config


@given(a=values, b=values, c=values)
def test_product_is_every_combination_the_last_fastest(a, b, c):
    made = product(vary("a", a), vary("b", b), vary("c", c))
    assert made == tuple((("a", x), ("b", y), ("c", z)) for x, y, z in itertools.product(a, b, c))
    assert len(made) == math.prod(map(len, (a, b, c)))


@given(a=values, b=values)
def test_chain_is_one_after_another(a, b):
    assert chain(vary("a", a), vary("b", b)) == tuple((("a", x),) for x in a) + tuple((("b", y),) for y in b)


@given(pairs=st.lists(st.tuples(st.integers(), st.text()), min_size=1, max_size=5))
def test_zipped_pairs_them_up(pairs):
    first, second = zip(*pairs, strict=True)
    assert zipped(vary("a", first), vary("b", second)) == tuple((("a", x), ("b", y)) for x, y in pairs)


def test_zipped_refuses_groups_of_other_lengths():
    with pytest.raises(ValueError):
        zipped(vary("a", (1, 2)), vary("b", (1,)))


def test_names_of_named_overrides_are_joined_and_come_first():
    made = product(vary("seed", (1,)), named("deep", ("model.layers", 6)), named("wide", ("model.dim", 128)))
    assert made == ((("name", "deep,wide"), ("seed", 1), ("model.layers", 6), ("model.dim", 128)),)


def test_setting_a_field_twice_is_refused():
    with pytest.raises(UserError, match=r"model\.dim twice.*64.*128"):
        product(vary("model.dim", (64,)), vary("model.dim", (128,)))


def test_cells_carry_their_overrides_and_nothing_else():
    made = product(vary("model.position.ratio", (0.0, 1.0)), vary("data.draw", ("fixed1", "1-3")))
    config = study(made, (("model.position.ratio", "rope_ratio"), ("data.draw", "train_branch")))
    found = resolve(config)
    assert [cell.name for cell in found] == [
        "rope_ratio=0.0,train_branch=fixed1",
        "rope_ratio=0.0,train_branch=1-3",
        "rope_ratio=1.0,train_branch=fixed1",
        "rope_ratio=1.0,train_branch=1-3",
    ]
    assert found[1].labels == {"rope_ratio": 0.0, "train_branch": "1-3"}
    before = leaves(config)
    for cell, override in zip(found, made, strict=True):
        assert leaves(cell.config) == before | dict(override)
    assert leaves(config) == before


def test_a_study_without_cells_is_one_cell():
    assert [cell.name for cell in resolve(study())] == ["base"]


def test_a_name_can_be_a_label():
    made = chain(named("a", ("model.dim", 32)), named("b", ("model.dim", 64)))
    assert [cell.labels for cell in resolve(study(made, (("name", "shape"),)))] == [{"shape": "a"}, {"shape": "b"}]


@pytest.mark.parametrize(
    ("made", "labels", "told"),
    [
        (vary("model.dimm", (1,)), (), r"'model\.dimm' is unknown \(did you mean 'model\.dim'\?\)"),
        (vary("model.dim", ("wide",)), (), r"model\.dim = 'wide', which is no int"),
        (vary("model.dim", (32, 64)), (), r"two cells .* 'base'"),
        (vary("model.dim", (32,)), (("model.dimm", "d"),), r"study\.labels = 'model\.dimm' is unknown"),
    ],
)
def test_what_means_nothing_is_refused(made, labels, told):
    with pytest.raises(UserError, match=told):
        resolve(study(made, labels))


def test_an_override_of_what_the_study_varies_is_refused_by_name():
    config = study(vary("data.draw", ("fixed1", "1-3")), (("data.draw", "train_branch"),))
    resolve(config, ("train.steps",))
    with pytest.raises(UserError, match=r"--config\.data\.draw: the study 'made' varies it"):
        resolve(config, ("train.steps", "data.draw"))


def one(**settings):
    config = study()
    for name, value in settings.items():
        set_field(config, name.replace("__", "."), value)
    return definition.make(config.study, (), config)


def test_a_fingerprint_is_of_config_data_and_sources(monkeypatch):
    fingerprint = one().fingerprint("data")
    assert one().fingerprint("data") == fingerprint
    assert one().fingerprint("other data") != fingerprint
    monkeypatch.setattr(definition, "source_fingerprint", lambda: "edited")
    assert one().fingerprint("data") != fingerprint


@pytest.mark.parametrize("room", ["model", "data", "train", "evaluate"])
def test_every_field_that_a_result_depends_on_is_in_the_fingerprint(room):
    prints = {one().fingerprint("data")}
    fields = {name: value for name, value in leaves(lab.config.base()).items() if name.startswith(f"{room}.")}
    for name in definition.ELSEWHERE:
        fields.pop(f"data.{name}", None)
    for name, value in fields.items():
        other = (
            not value
            if isinstance(value, bool)
            else (*value, 3)
            if isinstance(value, tuple)
            else value + type(value)(1)
        )
        prints.add(one(**{name.replace(".", "__"): other}).fingerprint("data"))
    assert len(prints) == len(fields) + 1


def test_what_changes_no_number_leaves_the_fingerprint():
    changed = one(
        run__checkpoint__every=7, run__checkpoint__keep=5, run__log__every=3, study__seeds=4, study__question="?",
        data__path="moved", run__workers=2, run__mesh__fsdp=2, run__scan=True, run__implementation="reference",
    )  # fmt: skip
    assert changed.fingerprint("data") == one().fingerprint("data")


def test_sources_that_make_numbers_are_fingerprinted(monkeypatch, tmp_path):
    """Of a copy of the sources: an edit of any room that makes numbers changes it, an edit of the report does not."""
    rooms = ("data", "model", "kernels", "train", "evaluate", "study")
    for room in rooms:
        (tmp_path / room).mkdir()
        (tmp_path / room / "code.py").write_text("x = 1")
    (tmp_path / "coordinates.py").write_text("x = 1")
    monkeypatch.setattr(definition, "__file__", str(tmp_path / "study" / "define" / "cell.py"))
    fingerprint = definition.source_fingerprint.__wrapped__
    before = fingerprint()
    (tmp_path / "study" / "code.py").write_text("x = 2")
    assert fingerprint() == before
    for edited in [*(tmp_path / room / "code.py" for room in rooms[:-1]), tmp_path / "coordinates.py"]:
        edited.write_text("x = 2")
        assert fingerprint() != before, edited
        edited.write_text("x = 1")


def test_seeds_are_those_of_the_config():
    assert one(seed=3).seeded(5).seed == 5
