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


def test_seeds_are_those_of_the_config():
    assert one(seed=3).seeded(5).seed == 5
