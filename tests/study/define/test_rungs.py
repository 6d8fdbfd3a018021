"""Rungs: every cell at every size, by labels, baselines and matches of its own rung; studies without them as before."""

import pytest
from test_cells import study

from lab.errors import UserError
from lab.options import leaves
from lab.study.define import contrasts, identity, matching
from lab.study.define.cell import labels
from lab.study.define.cells import named, vary
from lab.study.define.resolve import resolve

RUNGS = (
    ("s", (("model.dim", 32), ("train.steps", 50))),
    ("m", (("model.dim", 64), ("train.steps", 100))),
    ("l", (("model.dim", 96),)),
)
DRAWS = vary("data.draw", ("fixed1", "1-3"))
LABELS = (("data.draw", "draw"),)


def test_every_cell_stands_on_every_rung():
    config = study(DRAWS, LABELS, rungs=RUNGS)
    before = leaves(config)
    cells = resolve(config)
    assert [cell.name for cell in cells] == [f"draw={d},rung={r}" for r in "sml" for d in ("fixed1", "1-3")]
    assert cells[3].labels == {"draw": "1-3", "rung": "m"}
    for cell in cells:
        rung = dict(RUNGS)[cell.labels["rung"]]
        assert leaves(cell.config) == before | dict(rung) | {"data.draw": cell.labels["draw"]}
    assert labels(config.study) == (*LABELS, ("rung", "rung"))


def test_without_rungs_cells_are_what_they_were():
    """And on a rung a cell is the one that sets the same fields itself."""
    plain = resolve(study(DRAWS, LABELS))
    assert [cell.name for cell in plain] == ["draw=fixed1", "draw=1-3"] and plain[0].labels == {"draw": "fixed1"}
    (on_rung,) = resolve(study(rungs=RUNGS[:1]))
    config = study()
    config.train.steps, config.model.dim = 50, 32
    (alone,) = resolve(config)
    assert on_rung.name == "rung=s" and identity.fields(on_rung.config) == identity.fields(alone.config)


def test_a_cell_is_compared_on_its_own_rung():
    cells = {cell.name: cell.labels for cell in resolve(study(DRAWS, LABELS, rungs=RUNGS))}
    found = contrasts.baselines(cells, (("draw", "fixed1"),))
    assert found == {f"draw=1-3,rung={rung}": f"draw=fixed1,rung={rung}" for rung in "sml"}


def test_a_match_by_name_is_to_the_cell_of_the_same_rung():
    group = (*named("base"), *named("few", ("model.mixer.kv_heads", 1)))
    cells = resolve(study(group, (("name", "variant"),), rungs=RUNGS))
    found = [cells[matching.find(cells, place, "to", "base")].name for place in range(1, 6, 2)]
    assert found == [f"variant=base,rung={rung}" for rung in "sml"]
    with pytest.raises(UserError, match="names 2 cells"):
        matching.find([*cells, cells[0]], 1, "to", "base")


def test_a_rung_may_say_how_long_its_baseline_trains():
    group = (*named("base"), *named("wide", ("model.feedforward.width", 512)))
    settings = dict(rungs=RUNGS, baseline=(("variant", "base"),), length="flops")
    cells = resolve(study(group, (("name", "variant"),), **settings))
    steps = [cell.config.train.steps for cell in cells]
    assert steps[0] == 50 and steps[2] == 100 and steps[1] < 50 and steps[3] < 100
    with pytest.raises(UserError, match=r"study\.length = 'flops' decides how long cells train"):
        resolve(study(group, (("name", "variant"),), **settings | {"baseline": ()}))


@pytest.mark.parametrize(
    ("rungs", "told"),
    [
        ((("s", (("model.dimm", 32),)),), r"field of the rung 's' of study.rungs = 'model.dimm' .* 'model\.dim'\?"),
        ((*RUNGS, RUNGS[0]), r"study\.rungs has 's' twice, or no name; names must differ: s, m, l, s"),
        ((("", ()),), r"study\.rungs has '' twice, or no name"),
        ((("s", (("data.draw", "1-15"),)),), r"a cell sets data\.draw twice: \['1-15', 'fixed1'\]"),
        ((("s", (("model.dim", "wide"),)),), r"sets model\.dim = 'wide', which is no int"),
        ((("s", (("run.scan", True),)),), r"the study varies run\.scan"),
    ],
    ids=str,
)
def test_rungs_that_mean_nothing_are_refused_in_one_line(rungs, told):
    with pytest.raises(UserError, match=told) as error:
        resolve(study(DRAWS, LABELS, rungs=rungs))
    assert "\n" not in str(error.value)


def test_what_a_rung_sets_is_not_set_by_the_command():
    with pytest.raises(UserError, match=r"--config\.train\.steps: the study 'made' varies it"):
        resolve(study(DRAWS, LABELS, rungs=RUNGS), ("train.steps",))
