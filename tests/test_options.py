"""Options are declared once: their defaults pass, and what is set wrongly is refused in one line with what is valid."""

import math
import types
import typing

import pytest
import tiny
import variants
from hypothesis import given
from hypothesis import strategies as st

import lab.config
from lab import model as lab_model
from lab.errors import UserError
from lab.evaluate import asks
from lab.model import spec
from lab.options import Option, Part, Room, fits, leaves, numbers_in, set_field, spelled
from lab.study.define import plan, resolve
from lab.study.define.cells import chain, named, vary

ROOMS = lab.config.ROOMS | {"evaluate.loss": asks.ASK}
DECLARED = [(room, name) for room in ROOMS for name in ROOMS[room].declared()]


def refused(action) -> str:
    """The one line that a user is told."""
    with pytest.raises(UserError) as raised:
        action()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def readers(room: Room, name: str) -> list[dict]:
    """{field of a part: entry} of every choice under which an option is read."""
    if name in room.own:
        return [{}]
    chosen = [{part.field: entry} for part in room.parts for entry in part.table if name in part.options(entry)]
    return chosen or [{part.field: part.default} for part in room.parts if part.field == name]


# The options that have no default that works: where they are read, they must be chosen.
TO_CHOOSE = {"mixer.latent", "stream.length", "stream.copies", "stream.rank", "stream.blocks"}


@pytest.mark.parametrize(("room", "name"), DECLARED)
def test_every_option_has_a_meaning_and_a_default_that_passes_where_it_is_read(room, name):
    option = ROOMS[room].declared()[name]
    assert option.meaning and "\n" not in option.meaning
    found = readers(ROOMS[room], name)
    assert found
    if room == "model" and name in TO_CHOOSE:
        assert f"{name} = {option.default!r} must be at least 1" in refused(lambda: option.check(name, option.default))
    else:
        option.check(name, option.default)
    for chosen in found:
        values = {other: one.default for other, one in ROOMS[room].declared().items()} | chosen
        assert name in ROOMS[room].read(values)


def test_the_base_config_and_that_of_branches_pass_every_check():
    for made in (lab.config.base(), lab.config.branches(lab.config.base())):
        (cell,) = resolve.resolve(made)
        plan.check(cell)
    for name, room in lab.config.ROOMS.items():
        assert leaves(lab.config.base()[name]) == {field: one.default for field, one in room.declared().items()}


# Every way in which a value may be outside its declaration, whatever the option.


@given(st.integers(-5, 5), st.integers(-5, 5))
def test_bounds_hold_where_they_say(bound, value):
    for kind, words, inside in (
        ("least", "at least", value >= bound), ("most", "at most", value <= bound),
        ("above", "above", value > bound), ("below", "below", value < bound),
    ):  # fmt: skip
        option = Option(bound, "a number", **{kind: bound})
        if inside:
            option.check("x", value)
        else:
            assert refused(lambda o=option: o.check("x", value)) == f"x = {value} must be {words} {bound}: a number"


def test_nan_is_never_a_number_and_inf_only_where_it_is_said():
    for value in (math.nan, math.inf, -math.inf):
        assert f"x = {value} must be a finite number: a number" == refused(
            lambda v=value: Option(1.0, "a number").check("x", v)
        )
    endless = Option(1.0, "a number", above=0, infinite=True)
    endless.check("x", math.inf)
    assert "must be above 0" in refused(lambda: endless.check("x", -math.inf))
    assert "must be a finite number" in refused(lambda: endless.check("x", math.nan))


def holding(kind, number):
    """A value of a type as typing spells it, with this number wherever it has one."""
    if kind in (int, float):
        return number
    if isinstance(kind, types.UnionType):  # spellings of one value: the last, if tests draw nothing else, is enough
        return holding(typing.get_args(kind)[-1], number)
    return (
        tuple(holding(one, number) for one in typing.get_args(kind) if one is not Ellipsis) if kind is not str else ""
    )


NUMBERS = [(room, name) for room, name in DECLARED if {int, float} & {*numbers_in(ROOMS[room].declared()[name])}]


@pytest.mark.parametrize(("room", "name"), NUMBERS)
def test_every_number_has_a_bound_is_finite_and_stays_what_it_is_as_it_is_computed_with(room, name):
    """A number that is declared without a range fails here; so does one that float32 or int32 would make another."""
    option = ROOMS[room].declared()[name]
    low = option.above if option.least is None else option.least
    assert low is not None, f"{name} has no range: give it least or above"
    whole = int in numbers_in(option)
    option.check(name, holding(option.kind or type(option.default), max(1 if whole else 0.5, option.least or 0)))
    for value in [2**31, 10**400, 10**5000, low - 1] if whole else [math.nan, math.inf, -math.inf, 1e39, low - 1]:
        if not (option.infinite and value > 1e38):
            made = holding(option.kind or type(option.default), value)
            assert refused(lambda v=made: option.check(name, v)).startswith(f"{name} = ")
    for bound, towards in ((option.above, math.inf), (option.below, -math.inf)):
        if bound is not None:  # so near to it that float32 has no number between
            near = holding(option.kind or type(option.default), math.nextafter(bound, towards))
            assert "in float32" in refused(lambda n=near: option.check(name, n))


TREES = tuple[tuple[str, tuple[int, ...]], ...]


@pytest.mark.parametrize(("kind", "good", "bad"), [
    (int, [0, -3], [True, 1.0, "1", None, (1,)]),
    (float, [0.5, 2], [True, "1", None]),
    (bool, [True], [1, 0.0, "yes"]),
    (str, [""], [1, ("a",)]),
    (tuple[int, ...], [(), (1, 2)], [1, [1], (1, "a"), (1, True), ((1,),)]),
    (tuple[str, int], [("a", 1)], [("a",), ("a", 1, 2), (1, "a")]),
    (TREES, [(), (("a", (1,)), ("b", ()))], [("a", (1,)), (("a", 1),), (("a", (1,), 2),)]),
    (str | tuple[str, ...], ["a", ("a", "b")], [1, (1,)]),
], ids=str)  # fmt: skip
def test_values_have_the_shape_that_is_declared(kind, good, bad):
    for value in good:
        assert fits(value, kind)
        Option(good[0], "a thing", kind=kind).check("x", value)
    for value in bad:
        said = refused(lambda v=value: Option(good[0], "a thing", kind=kind).check("x", v))
        assert said == f"x = {value!r} is no {spelled(kind)}: a thing; the default is {good[0]!r}"


def test_shapes_are_spelled_as_they_are_written():
    assert [spelled(kind) for kind in (int, TREES, str | tuple[str, ...], tuple[object, ...])] == [
        "int", "tuple ((str, (int, ...)), ...)", "str or (str, ...)", "tuple (object, ...)",
    ]  # fmt: skip


# What is declared together must agree.


class One:
    options = {"size": Option(1, "of one", least=1)}


class Same(One):
    pass


class Other:
    options = {"size": Option(1, "of one", least=0)}


def test_two_entries_that_declare_an_option_differently_are_a_fault():
    part = lambda table, at: Part("kind", table, "one", "which", at)  # noqa: E731
    alike = Room({}, (part({"one": One, "same": Same}, ""),))
    assert alike.declared()["size"] == One.options["size"]
    with pytest.raises(TypeError, match="size is declared twice, and not alike"):
        Room({}, (part({"one": One, "other": Other}, ""),)).declared()
    with pytest.raises(TypeError, match="size is declared twice, and not alike"):
        Room({"size": Option(2, "of the room")}, (part({"one": One}, ""),)).declared()
    apart = Room({}, (part({"one": One, "other": Other}, "{}."),))
    assert {"one.size", "other.size"} <= {*apart.declared()}


# Bad inputs of the rooms themselves: at the level of the model, in an entry of the pattern, in a cell of a study.


MODEL_LEVEL = [
    (dict(model__mixer__latent=8), "model.mixer.latent = 8 means nothing beside model.mixer.name = 'attention'; "
     "choose 0, or one of: model.mixer.name = 'mla'"),
    (dict(model__stream__copies=4), "model.stream.copies = 4 means nothing beside model.stream.name = 'plain'; "
     "choose 0, or one of: model.stream.name = 'hyper', model.stream.name = 'mhc'"),
    (dict(model__position__name="fourier", model__position__stride=2), "model.position.stride = 2 means nothing beside "
     "model.position.name = 'fourier'; choose 128, or one of: model.position.name = 'rope2d'"),
    (variants.stream("v4m4", model__mixer__softmax_scale=0.5),
     "model.mixer.softmax_scale = 0.5 means nothing beside model.stream.name = 'v4m4'; choose 0.0"),
    (dict(model__dim=0), "model.dim = 0 must be at least 1: width of the residual stream"),
    (dict(model__norm__eps=0.0), "model.norm.eps = 0.0 must be above 0: added to the mean square before its root"),
    (dict(model__norm__eps=math.nan), "model.norm.eps = nan must be a finite number"),
    (dict(model__mixer__softcap=math.inf), "model.mixer.softcap = inf must be a finite number"),
    (dict(model__placement__name="past"), "model.placement.name = 'past' is unknown (did you mean 'post'?); "),
    (dict(model__pattern=("rule", "causal")), "model.pattern = ('rule', 'causal') is no tuple (((str, object), ...), "),
    (dict(model__pattern=(("rule", "causal"),)), "model.pattern = (('rule', 'causal'),) is no tuple"),
    (dict(model__rule="causal & windo(3)"), "model.rule = 'windo(3)' is unknown"),
    (dict(model__rule=""), "model.rule = '' names no rule; join causal, all_branches, own_branch, window(n), strided"),
    (dict(model__rule="window(0)"), "window(0) sees nothing; choose a length of at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "says"), MODEL_LEVEL, ids=str)
def test_a_model_that_means_nothing_is_refused(overrides, says):
    assert says in refused(lambda: lab_model.abstract(tiny.config(**overrides).model))


IN_A_PATTERN = [
    (("mixer.latent", 8), "model.mixer.latent = 8 means nothing beside model.mixer.name = 'attention'; choose 0"),
    (("position.ratio", 1.5), "model.position.ratio = 1.5 must be at most 1"),
    (("norm.eps", math.nan), "model.norm.eps = nan must be a finite number"),
    (("norm.eps", "small"), "model.pattern sets norm.eps = 'small', which is of another type"),
    (("rule", "own"), "model.rule = 'own' is unknown"),
    (("mixer.name", "attentoin"), "model.mixer.name = 'attentoin' is unknown (did you mean 'attention'?)"),
    (("dim", 8), "a field of model.pattern = 'dim' is unknown"),
    (("stream.name", "plain"), "a field of model.pattern = 'stream.name' is unknown"),
    (("mixer", "mla"), "a field of model.pattern = 'mixer' is unknown"),
    (("run.scan", True), "a field of model.pattern = 'run.scan' is unknown"),
]  # fmt: skip


@pytest.mark.parametrize(("pair", "says"), IN_A_PATTERN, ids=str)
def test_an_entry_of_the_pattern_that_means_nothing_is_refused(pair, says):
    model = tiny.config().model
    model.pattern = ((), (pair,))
    assert says in refused(lambda: lab_model.abstract(model))


def test_what_only_other_layers_read_is_refused_in_an_entry_and_not_in_the_model():
    delta = (("mixer.name", "delta"), ("rule", "causal"))
    made = tiny.config(model__mixer__softcap=2.0, model__pattern=(delta, ()))
    spec.check(made.model)  # the second entry reads it
    made.model.pattern = ((*delta, ("mixer.softcap", 2.0)), ())
    assert "model.mixer.softcap = 2.0 means nothing beside model.mixer.name = 'delta'" in refused(
        lambda: spec.check(made.model)
    )


ELSEWHERE = [
    ("train.muon.momentum", 0.5, "train.muon.momentum = 0.5 means nothing beside train.optimizer = 'adamw'; choose "
     "0.95, or one of: train.optimizer = 'muon'"),
    ("train.cooldown", 0.5, "train.cooldown = 0.5 means nothing beside train.schedule = 'cosine'; choose 0.2"),
    ("train.adamw.b1", 1.0, "train.adamw.b1 = 1.0 must be below 1"),
    ("train.clip", math.nan, "train.clip = nan must be a finite number"),
    ("train.learning_rate", math.inf, "train.learning_rate = inf must be a finite number"),
    ("train.muon.on", ("q", 3), "train.muon.on = ('q', 3) is no tuple (str, ...)"),
    ("data.probe.symbols", 3, "data.probe.symbols = 3 means nothing beside data.corpus = 'stdlib'; choose 32"),
    ("data.path", "x", "data.path = 'x' means nothing beside data.corpus = 'stdlib'; choose ''"),
    ("data.align", "middle", "data.align = 'middle' is unknown; choose one of: left, right"),
    ("data.rows", 0, "data.rows = 0 must be at least 1"),
    ("evaluate.loss.difficulties", (3,), "evaluate.loss.difficulties = (3,) means nothing beside evaluate.loss.kind = "
     "'branches'; choose (2, 4, 8), or one of: evaluate.loss.kind = 'difficulty'"),
    ("evaluate.loss.branches", (1, 2.5), "evaluate.loss.branches = (1, 2.5) is no tuple (int, ...)"),
    ("run.remat", "some", "run.remat = 'some' is unknown; choose one of: none, dots, full"),
    ("run.mesh.tensor", -2, "run.mesh.tensor = -2 must be at least -1"),
    ("run.log.every", 0, "run.log.every = 0 must be at least 1: steps"),
    ("run.log.instruments", ("spikes", "heads"), "run.log.instruments = 'heads' is unknown; choose one of: "
     "activations, logits, log_z, gradients, updates, weights, spikes"),
    ("run.log.instruments", ("spikes", 3), "run.log.instruments = ('spikes', 3) is no tuple (str, ...)"),
    ("seed", -1, "seed = -1 must be at least 0"),
    ("model_seed", -1, "model_seed = -1 must be at least 0"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "says"), ELSEWHERE, ids=str)
def test_a_cell_that_means_nothing_is_refused(field, value, says):
    made = tiny.config()
    if field == "train.muon.on":
        made.train.optimizer = "muon"
    set_field(made, field, value)
    (cell,) = resolve.resolve(made)
    assert says in refused(lambda: plan.check(cell))


def test_the_last_seed_of_a_study_is_a_seed():
    made = tiny.config()
    made.study.seeds, made.model_seed = 3, 2**31 - 3
    plan.check(*resolve.resolve(made))
    made.model_seed += 1
    said = refused(lambda: plan.check(*resolve.resolve(made)))
    assert (
        said == "model_seed = 2147483646 with study.seeds = 3 passes 2147483647, as int32 is; choose at most 2147483645"
    )


IN_A_STUDY = [
    (vary("model.heads", (2,)), "field of study.cells = 'model.heads' is unknown (did you mean 'model.mixer.heads'?)"),
    (vary("run.scan", (False, True)), "run.scan: how a cell runs and what it is asked are no part of what it is"),
    (vary("model.mixer.heads", ("two",)), "a cell of the study sets model.mixer.heads = 'two', which is no int"),
    (vary("model.mixer.latent", (0, 8)), "model.mixer.latent = 8 means nothing beside model.mixer.name = 'attention'"),
    (chain(named("a", ("train.optimizer", "muon")), named("b", ("train.muon.momentum", 0.5))),
     "train.muon.momentum = 0.5 means nothing beside train.optimizer = 'adamw'"),
    (vary("model.mixer.name", ("attention", "mal")), "model.mixer.name = 'mal' is unknown"),
    (named("a", ("model.pattern", ((("dim", 3),),))), "a field of model.pattern = 'dim' is unknown"),
]  # fmt: skip


@pytest.mark.parametrize(("cells", "says"), IN_A_STUDY, ids=str)
def test_a_study_that_means_nothing_is_refused(cells, says):
    made = tiny.config()
    made.study.update(cells=cells, labels=(("name", "name"),))
    assert says in refused(lambda: resolve.resolve(made))


def test_a_field_that_only_some_cells_read_is_set_for_all_and_forgotten_by_the_others():
    made = tiny.config(train__muon__momentum=0.5)
    made.study.update(cells=vary("train.optimizer", ("adamw", "muon")), labels=(("train.optimizer", "optimizer"),))
    plain, muon = resolve.resolve(made)
    assert (plain.config.train.muon.momentum, muon.config.train.muon.momentum) == (0.95, 0.5)
    for cell in (plain, muon):
        plan.check(cell)


def test_an_override_that_no_cell_reads_is_refused():
    made = tiny.config(train__muon__momentum=0.5)
    (cell,) = resolve.resolve(made, ("train.muon.momentum",))
    assert "train.muon.momentum = 0.5 means nothing beside train.optimizer = 'adamw'" in refused(
        lambda: plan.check(cell)
    )
    made = tiny.config()
    made.study.update(cells=vary("train.clip", (1.0, 2.0)), labels=(("train.clip", "clip"),))
    said = refused(lambda: resolve.resolve(made, ("train.clip",)))
    assert said.startswith("--config.train.clip: the study '' varies it; leave it out")


@pytest.mark.parametrize(("fields", "says"), [
    (dict(seeds=0), "study.seeds = 0 must be at least 1: of every cell"),
    (dict(length="epochs"), "study.length = 'epochs' is unknown; choose one of: steps, tokens, flops"),
    (dict(labels=(("model.dim",),)), "study.labels = (('model.dim',),) is no tuple ((str, str), ...)"),
    (dict(sections=("a", ("bars", 3))), "study.sections = ('a', ('bars', 3)) is no tuple (str or (str, ...), ...)"),
    (dict(vmap="all"), "study.vmap = 'all' is unknown; choose one of: none, seeds, numbers"),
], ids=str)  # fmt: skip
def test_settings_of_a_study_that_mean_nothing_are_refused(fields, says):
    made = tiny.config()
    made.study.update(name="tiny", **fields)
    assert says in refused(lambda: plan.check_study(made.study))
