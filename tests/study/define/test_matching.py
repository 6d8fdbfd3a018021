"""Matched cells come as near to their target as the field allows, and contradictions are refused by name."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lab.config
from lab import command, plan
from lab.errors import UserError
from lab.options import leaves
from lab.study.define import identity, matching
from lab.study.define import plan as study_plan
from lab.study.define.cells import chain, matched, named, product, vary
from lab.study.define.resolve import resolve

FIELDS = {  # of model, by the names of the counts here
    "heads": "mixer.heads",
    "kv_heads": "mixer.kv_heads",
    "head_dim": "mixer.head_dim",
    "ffn": "feedforward.width",
}


def spelled(shape):
    return {FIELDS.get(name, name): value for name, value in shape.items()}


def counted(dim, layers, heads, kv_heads, head_dim, ffn, vocabulary, tied):
    """Parameters of the base transformer, from its shapes: attention, SwiGLU, two norms a layer, one at the end."""
    attention = dim * head_dim * (2 * heads + 2 * kv_heads)
    layer = attention + 3 * dim * ffn + 2 * dim
    return layers * layer + dim + vocabulary * dim * (1 if tied else 2)


@st.composite
def models(draw):
    kv_heads = draw(st.integers(1, 4))
    return dict(
        dim=8 * draw(st.integers(1, 64)),
        layers=draw(st.integers(1, 8)),
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 32)),
        ffn=8 * draw(st.integers(1, 200)),
        vocabulary=draw(st.integers(258, 2000)),
        tied=draw(st.booleans()),
    )


def study(cells, **fields):
    config = lab.config.base()
    config.study.name = "matching"
    config.study.labels = (("name", "variant"),)
    config.study.cells = cells
    config.update_from_flattened_dict(fields)
    return config


def resolved(cells, **fields):
    return resolve(study(cells, **fields))


def variant(changes, **match):
    return matched(named("variant", *((f"model.{name}", value) for name, value in changes.items())), **match)


@pytest.mark.slow
@settings(max_examples=8)
@given(base=models(), other=models(), by=st.sampled_from(["ffn", "head_dim"]), multiple=st.sampled_from([2, 8]))
def test_no_other_multiple_is_nearer_in_parameters(base, other, by, multiple):
    changes = {name: value for name, value in other.items() if name != by}
    match = dict(to="base", on="parameters", by=f"model.{FIELDS[by]}", multiple=multiple)
    fields = {f"model.{name}": value for name, value in spelled(base).items()}
    _, cell = resolved(chain(named("base"), variant(spelled(changes), **match)), **fields)
    (found,) = cell.matches
    target = counted(**base)

    def residual(value):
        return counted(**(other | {by: value})) / target - 1

    value = found["value"]
    assert value == leaves(cell.config.model)[FIELDS[by]] and value % multiple == 0 and value > 0
    assert found["residual"] == pytest.approx(residual(value), abs=1e-12)
    for neighbour in (value - multiple, value + multiple):
        assert neighbour <= 0 or abs(residual(neighbour)) >= abs(residual(value))
    if residual(multiple) <= 0:  # the target is within reach: what is left is at most half of one multiple
        assert abs(residual(value)) <= 0.5001 * (residual(value + multiple) - residual(value))
    assert matching.missed(found) == (abs(residual(value)) > 1e-3)


@given(
    slope=st.integers(1, 50), start=st.integers(0, 10**4), target=st.integers(1, 10**6), multiple=st.integers(1, 300)
)
def test_the_nearest_against_trying_everything(slope, start, target, multiple):
    def quantity(value):
        return start + slope * value * value

    found = matching.nearest_multiple(quantity, target, multiple)
    tried = min(range(multiple, 1000 + 2 * multiple, multiple), key=lambda value: abs(quantity(value) - target))
    assert found == tried


@given(
    st.sets(st.integers(1, 60), max_size=12),
    st.integers(1, 30),
    st.integers(1, 10**4),
    st.sampled_from(["these", "multiples", "divisors", "above"]),
)
def test_values_that_cannot_be_are_passed_over(some, size, target, kind):
    """Against trying everything, where few values are valid, or regular ones, or those from one on."""
    valid = {
        "these": lambda n: n in some,
        "multiples": lambda n: n % size == 0,
        "divisors": lambda n: size % n == 0,
        "above": lambda n: n >= size,
    }[kind]
    there = [n for n in range(1, 2000) if valid(n)]
    quantity = lambda n: n * n if valid(n) else None  # noqa: E731
    if not there:
        with pytest.raises(LookupError):
            matching.nearest_multiple(quantity, target, 1)
        return
    found = matching.nearest_multiple(quantity, target, 1)
    assert found == min(there, key=lambda n: abs(n * n - target))


VALID = [  # (fields of the base, of the matched cell, on, by, multiple, the answer)
    (dict(), dict(mixer__name="s2", mixer__kv_heads=2, position__dim=8), "cache", "mixer.head_dim", 2, 24),
    (dict(layers=6), dict(pattern=((), (("mixer.sink", True),))), "cache", "layers", 1, 6),
    (dict(mixer__kv_heads=2), dict(mixer__kv_heads=2, mixer__qk_norm=True), "parameters", "mixer.heads", 1, 4),
    (dict(mixer__kv_heads=4), dict(tied=True), "cache", "mixer.kv_heads", 1, 4),
    (dict(), dict(mixer__name="mla", mixer__latent=16, position__dim=8), "parameters", "mixer.head_dim", 2, 24),
]


@pytest.mark.parametrize(("base", "other", "on", "by", "multiple", "answer"), VALID, ids=lambda x: str(x))
def test_values_that_a_field_refuses_are_none_of_a_match(base, other, on, by, multiple, answer):
    named_fields = lambda fields: [(f"model.{name.replace('__', '.')}", value) for name, value in fields.items()]  # noqa: E731
    cells = chain(
        named("base", *named_fields(base)),
        matched(named("other", *named_fields(other)), to="base", on=on, by=f"model.{by}", multiple=multiple),
    )
    cell = resolved(cells)[1]
    assert cell.matches[0]["by"] == f"model.{by}" and cell.matches[0]["value"] == leaves(cell.config.model)[by]
    assert cell.matches[0]["value"] == answer


def test_a_match_that_no_value_can_make_is_named():
    cells = chain(named("base"), matched(named("odd", ("model.mixer.kv_heads", 3), ("model.mixer.heads", 4)), **GOOD))
    with pytest.raises(UserError) as told:
        resolved(cells)
    assert str(told.value).startswith(
        "variant=odd is matched on parameters to variant=base by model.feedforward.width, and no multiple of 1 up to "
        "256 is one that it can have: model.mixer.heads = 4 is not divisible by model.mixer.kv_heads = 3"
    )


@pytest.mark.parametrize("target", [1, 500_000, 10**9])
def test_what_grows_straight_is_found_in_a_few_values(target):
    """Each is a model to build; halving would ask for twenty and more."""
    asked = []
    found = matching.nearest_multiple(lambda value: asked.append(value) or 3000 + 7 * value, target, 1)
    assert found == max(1, round((target - 3000) / 7)) and len(asked) <= 12


def test_a_field_that_stops_growing_ends_the_search():
    assert matching.nearest_multiple(lambda value: min(value, 10), 100, 1) >= 10
    assert matching.nearest_multiple(lambda value: 5, 100, 1) is None
    assert matching.nearest_multiple(lambda value: -value, 100, 1) is None


@pytest.mark.slow
def test_parameters_are_hit_within_a_thousandth():
    """At the size of the published models, where one unit of the feed-forward width is 0.05% of the parameters."""
    fields = {
        "model.dim": 512,
        "model.layers": 8,
        "model.feedforward.width": 1408,
        "model.vocabulary": 6400,
        "model.mixer.head_dim": 64,
    }
    cells = chain(
        named("base"),
        *(
            matched(
                named(f"kv{groups}", ("model.mixer.kv_heads", groups)),
                to="base",
                on="parameters",
                by="model.feedforward.width",
            )
            for groups in (2, 4)
        ),
    )
    for cell in resolved(cells, **fields)[1:]:
        assert abs(cell.matches[0]["residual"]) < 1e-3 and not matching.missed(cell.matches[0])


@pytest.mark.slow
def test_flops_and_cache_are_those_of_the_plan():
    cells = chain(
        named("base"),
        matched(named("untied", ("model.tied", False)), to="base", on="train_flops", by="model.feedforward.width"),
        matched(
            named("mha", ("model.mixer.kv_heads", 4)), to="base", on="cache", by="model.mixer.head_dim", multiple=2
        ),
        matched(named("deep", ("model.layers", 6)), to="base", on="cache", by="model.mixer.head_dim", multiple=2),
    )
    found = resolved(cells)
    rows = {row["name"]: row for row in study_plan.table(found[0].config, found)}
    base = rows["variant=base"]
    assert base["match"] == [] and base["length"] is None
    for name, on, quantity in (
        ("untied", "train_flops", lambda row: row["train_flops_per_token"]),
        ("mha", "cache", lambda row: row["cache_per_token_per_layer"]),
    ):
        (match,) = rows[f"variant={name}"]["match"]
        assert match["residual"] == pytest.approx(quantity(rows[f"variant={name}"]) / quantity(base) - 1)
        assert (match["to"], match["on"]) == ("variant=base", on)
    assert rows["variant=mha"]["match"][0] | {"residual": 0.0} == rows["variant=mha"]["match"][0]
    assert rows["variant=deep"]["match"][0]["value"] == 12  # over all layers: twice the layers, half the width


def test_what_cannot_be_reached_keeps_the_best_and_is_flagged(tmp_path, capsys):
    config = tmp_path / "study.py"
    config.write_text(
        "from lab.config import base\n"
        "from lab.study.define.cells import chain, matched, named\n"
        "def get_config():\n"
        "    config = base()\n"
        "    config.study.name = 'matching'\n"
        "    config.study.labels = (('name', 'variant'),)\n"
        "    wide = named('wide', ('model.dim', 768))\n"
        "    config.study.cells = chain(\n"
        "        named('base'), matched(wide, to='base', on='parameters', by='model.feedforward.width', multiple=8))\n"
        "    return config\n"
    )
    plan.main([f"--config={config}"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "matches" in line]
    assert line.startswith("variant=wide: model.feedforward.width = 8 matches parameters of variant=base but for +")
    assert "not within 0.1%" in line


def test_a_match_changes_the_identity_and_the_labels():
    cells = chain(named("base"), variant(dict(tied=False), to="base", on="parameters", by="model.feedforward.width"))
    config = study(cells)
    config.study.labels = (("name", "variant"), ("model.feedforward.width", "ffn"))
    base, cell = resolve(config)
    assert cell.labels["ffn"] == cell.config.model.feedforward.width != base.config.model.feedforward.width
    assert cell.name == f"variant=variant,ffn={cell.config.model.feedforward.width}"
    config.study.cells = chain(named("base"), named("variant", ("model.tied", False)))
    unmatched = [identity.fields(one.config) for one in resolve(config)]
    assert unmatched[0] == identity.fields(base.config) and unmatched[1] != identity.fields(cell.config)


def test_pairs_find_the_cell_that_is_the_same_otherwise():
    variants = chain(
        named("base"),
        matched(
            named("mha", ("model.mixer.kv_heads", 4)),
            to=(("variant", "base"),),
            on="parameters",
            by="model.feedforward.width",
        ),
    )
    config = study(product(vary("model.layers", (2, 6)), variants))
    config.study.labels = (("model.layers", "layers"), ("name", "variant"))
    cells = resolve(config)
    assert [cell.matches[0]["to"] for cell in cells if cell.matches] == [
        "layers=2,variant=base",
        "layers=6,variant=base",
    ]


TWO_GROUPS = named("both", ("model.mixer.kv_heads", 2))


@pytest.mark.slow
def test_targets_are_solved_first_and_matches_in_the_order_written():
    both = matched(
        matched(TWO_GROUPS, to="base", on="cache", by="model.mixer.head_dim", multiple=2),
        to="untied", on="parameters", by="model.feedforward.width",
    )  # fmt: skip
    untied = matched(named("untied", ("model.tied", False)), to="base", on="parameters", by="model.feedforward.width")
    _, cell, other = resolved(chain(named("base"), both, untied))
    assert [match["on"] for match in cell.matches] == ["cache", "parameters"]
    assert other.matches[0]["residual"] < 0.01
    assert all(abs(match["residual"]) < 0.01 for match in cell.matches)
    assert cell.config.model.mixer.head_dim == 12


BASE = named("base")
MHA = named("mha", ("model.mixer.kv_heads", 4))
GOOD = dict(to="base", on="parameters", by="model.feedforward.width")


@pytest.mark.parametrize(
    "cells, message",
    [
        (matched(MHA, **GOOD | dict(to="bas")), r"to \(a cell\) = 'bas' is unknown \(did you mean 'base'\?\)"),
        (matched(MHA, **GOOD | dict(to=(("variants", "base"),))), r"to \(a label\) = 'variants'.*'variant'"),
        (matched(MHA, **GOOD | dict(to=(("variant", "bas"),))), r"to \(a cell\) = 'variant=bas'.*'variant=base'"),
        (matched(MHA, **GOOD | dict(on="params")), r"on \(of a match\) = 'params'.*parameters, train_flops, cache"),
        (matched(MHA, **GOOD | dict(by="model.layerz")), r"by .* = 'model.layerz' is unknown .*'model.layers'"),
        (matched(MHA, **GOOD | dict(by="model.mixer.softcap")), r"an integer field\) = 'model.mixer.softcap'"),
        (matched(MHA, **GOOD | dict(by="model.tied")), r"an integer field\) = 'model.tied'"),
        (matched(MHA, **GOOD | dict(multiple=0)), r"multiple \(of a match\) = 0 must be at least 1"),
        (matched(MHA, **GOOD | dict(by="train.steps")), "on parameters by train.steps, which does not raise it"),
        (matched(MHA, **GOOD | dict(on="cache")), "on cache by model.feedforward.width, which does not raise it"),
        (
            matched(named("wide", ("model.feedforward.width", 300)), **GOOD),
            "a match is by model.feedforward.width, which the same cell sets to 300",
        ),
        (matched(matched(MHA, **GOOD), **GOOD | dict(on="train_flops")), "two matches of one cell are by model.feedf"),
        (matched(MHA, **GOOD | dict(to="mha")), "matches run in a circle: variant=mha -> variant=mha"),
        (
            chain(matched(MHA, **GOOD | dict(to="b")), matched(named("b"), **GOOD | dict(to="mha"))),
            "in a circle: variant=mha -> variant=b -> variant=mha",
        ),
        (named("mha", ("match", (("to", "base"), ("on", "parameters")))), "a match has no 'by'"),
        (named("mha", ("match", (("too", "base"),))), "a key of a match = 'too' is unknown .*'to'"),
    ],
)  # fmt: skip
def test_what_cannot_be_matched_is_refused_by_name(cells, message):
    with pytest.raises(UserError, match=message) as refusal:
        resolved(chain(BASE, cells))
    assert "\n" not in str(refusal.value)


def test_a_name_of_several_cells_is_refused():
    config = study(product(vary("model.layers", (2, 6)), chain(BASE, matched(MHA, **GOOD))))
    config.study.labels = (("model.layers", "layers"), ("name", "variant"))
    with pytest.raises(UserError, match="to = 'base' names 2 cells: layers=2,variant=base, layers=6,variant=base"):
        resolve(config)


def test_the_field_of_a_match_may_be_overridden_in_the_base():
    cells = chain(BASE, matched(MHA, **GOOD))
    config = study(cells)
    command.override(config, "model.feedforward.width", "512")
    base, cell = resolve(config, ("model.feedforward.width",))
    assert base.config.model.feedforward.width == 512 and 400 < cell.config.model.feedforward.width < 512


LAYERS = chain(named("base"), named("deep", ("model.layers", 6)), named("long", ("data.text_length", 256)))


@pytest.mark.parametrize("length, steps", [("steps", (100, 100, 100)), ("tokens", (100, 100, 50))])
def test_cells_train_alike_in_steps_or_tokens(length, steps):
    cells = resolved(LAYERS, **{"study.length": length, "train.steps": 100})
    assert tuple(cell.config.train.steps for cell in cells) == steps
    assert [cell.length and cell.length["residual"] for cell in cells] == [None if length == "steps" else 0.0] * 3


def test_cells_train_alike_in_flops():
    cells = resolved(LAYERS, **{"study.length": "flops", "train.steps": 1000})
    rows = study_plan.table(cells[0].config, cells)
    spent = [row["train_flops_per_token"] * row["tokens"] for row in rows]
    for row, flops in zip(rows, spent, strict=True):
        assert row["length"]["residual"] == pytest.approx(flops / spent[0] - 1)
        assert abs(row["length"]["residual"]) <= 0.501 / row["length"]["value"]  # half a step
    assert rows[0]["tokens"] > 1.3 * rows[1]["tokens"]


def test_the_length_follows_the_matched_model():
    cells = chain(
        named("base"),
        matched(named("deep", ("model.layers", 6)), to="base", on="train_flops", by="model.feedforward.width"),
    )
    _, cell = resolved(cells, **{"study.length": "flops", "train.steps": 1000})
    assert abs(cell.config.train.steps - 1000) <= 1000 * abs(cell.matches[0]["residual"]) + 1


def test_the_length_is_that_of_the_baseline_where_there_is_one():
    config = study(LAYERS)
    config.study.length, config.study.baseline = "tokens", (("variant", "long"),)
    assert [cell.config.train.steps for cell in resolve(config)] == [500, 500, 250]


@pytest.mark.parametrize(
    "cells, length, message",
    [
        (LAYERS, "epochs", "study.length = 'epochs' is unknown.*steps, tokens, flops"),
        (vary("train.steps", (50, 100)), "tokens", "study.length = 'tokens' decides .*, and a cell sets train.steps"),
    ],
)
def test_bad_lengths_are_refused(cells, length, message):
    config = study(cells)
    config.study.labels = (("name", "variant"), ("train.steps", "steps"))
    config.study.length = length
    with pytest.raises(UserError, match=message):
        resolve(config)
