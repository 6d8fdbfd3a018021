"""The runs of a calibration: the same texts, other weights, a place of their own, and nothing moved by them."""

import commands
import pytest

import lab.config
from lab import plan as command
from lab.errors import UserError
from lab.study.define import calibration, cells, resolve
from lab.study.run import repeats, runs

BASELINE = (("rope_ratio", 1.0),)


def config(**study):
    made = lab.config.base()
    made.study.update(name="again", seeds=3, calibrate=2, labels=(("model.position.ratio", "rope_ratio"),))
    made.study.cells = cells.vary("model.position.ratio", (0.0, 1.0))
    made.study.update(study)
    return made


def planned(made, workdir):
    every = runs.runs_of(resolve.resolve(made), range(made.seed, made.seed + made.study.seeds), workdir)
    return every, repeats.repeats(made, every, workdir)


def test_repeats_read_the_same_texts_from_other_initial_values(tmp_path):
    every, again = planned(config(baseline=BASELINE), tmp_path)
    assert [run.seed for run in again] == [0, 1, 2] * 2
    own = [run for run in every if run.cell.name == "rope_ratio=1.0"]
    model_seeds = [run.cell.seeded(run.seed).model_seed for run in [*own, *again]]
    assert len({*model_seeds}) == 9
    for run in again:
        assert run.cell.name == run.baseline.name == "rope_ratio=1.0" and run.cell.seeded(run.seed).seed == run.seed
        parts = {name for name, part in run.identity.items() if part != own[0].identity[name]}
        fields, others = (run.identity["fields"], own[0].identity["fields"])
        assert parts == {"fields"}
        assert {name for name in fields if fields[name] != others[name]} == {"model_seed - seed"}


def test_repeats_lie_in_a_place_of_their_own_and_move_nothing(tmp_path):
    every, again = planned(config(), tmp_path)
    alone, none = planned(config(calibrate=0), tmp_path)
    places = [run.directory for run in again]
    assert len({*places}) == 6 and {path.relative_to(tmp_path).parts[0] for path in places} == {"calibration"}
    assert none == [] and [run.directory for run in alone] == [run.directory for run in every]
    _, further = planned(config(seeds=5, calibrate=3), tmp_path)
    assert {*places} < {run.directory for run in further} and len(further) == 15


def test_a_repeat_is_told_from_the_run_it_repeats(tmp_path):
    _, again = planned(config(), tmp_path)
    assert again[3].name == "rope_ratio=0.0 seed 0 (calibration 2)"
    first, second = repeats.describe(again)
    assert (second["name"], second["cell"]) == ("rope_ratio=0.0 (calibration 2)", "rope_ratio=0.0")
    assert second["seeds"] == [0, 1, 2] and second["directory"] == again[3].place != first["directory"]


@pytest.mark.parametrize(("study", "name"), [
    ({}, "rope_ratio=0.0"),
    (dict(baseline=BASELINE), "rope_ratio=1.0"),
    (dict(calibrate_cell="rope_ratio=1.0"), "rope_ratio=1.0"),
    (dict(baseline=BASELINE, calibrate_cell="rope_ratio=0.0"), "rope_ratio=0.0"),
], ids=["the first", "the baseline", "the named", "the named before the baseline"])  # fmt: skip
def test_the_cell_that_is_calibrated(study, name):
    made = config(**study)
    assert calibration.calibrated(made.study, resolve.resolve(made)).name == name


@pytest.mark.parametrize(("study", "model_seed", "told"), [
    (dict(seeds=1), 0, r"study\.calibrate = 2 beside study\.seeds = 1: one seed has no verdict"),
    (dict(vmap="numbers"), 0, r"study\.calibrate = 2 beside study\.vmap = 'numbers': .* choose study\.vmap = 'none'"),
    (dict(calibrate_cell="rope_ratio=1"), 0, r"study\.calibrate_cell = 'rope_ratio=1' is unknown \(did you mean"),
    ({}, 2**31 - 1, r"model_seed = 2149483647 must be within 2147483647"),
], ids=["one seed", "stacks of cells", "no such cell", "seeds beyond int32"])  # fmt: skip
def test_a_calibration_that_could_tell_nothing_is_refused(study, model_seed, told):
    made = config(**study)
    made.model_seed = model_seed
    with pytest.raises(UserError, match=told) as error:
        calibration.check(made, resolve.resolve(made))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("calibrate", [-1, 101])
def test_a_number_of_repeats_that_makes_no_sense_is_refused(calibrate):
    with pytest.raises(UserError, match=rf"study\.calibrate = {calibrate} must be at (least 0|most 100)"):
        lab.config.ROOMS["study"].check(lab.config.leaves(config(calibrate=calibrate).study), "study.")


def test_the_plan_shows_what_a_calibration_adds():
    made = config()
    rows = [
        {"name": "rope_ratio=0.0", "tokens": 1000, "train_flops_per_token": 2.0},
        {"name": "rope_ratio=1.0", "tokens": 1000, "train_flops_per_token": 6.0},
    ]
    found = calibration.cost(made, resolve.resolve(made), rows)
    assert found == {"cell": "rope_ratio=0.0", "runs": 6, "tokens": 6000, "train_flops": 12000.0, "share": 0.5}
    assert calibration.cost(config(calibrate=0), [], rows) is None


@pytest.mark.long
@pytest.mark.slow
def test_a_finished_study_is_calibrated_and_goes_on(tmp_path, capsys):
    """Through the commands: what is done is kept, only the repeats are made, and the tables stay as they are."""
    corpus = commands.write_corpus(tmp_path / "corpus.jsonl")
    flags = [f"--config={commands.write_study(tmp_path / 'tiny.py', corpus, commands.ONE_CELL, steps=10)}"]
    flags += ["--config.study.seeds=2"]
    work, asked = tmp_path / "work", "--config.study.calibrate=2"
    commands.finished("main", *flags, f"--workdir={work}", log=tmp_path / "first")
    before = {name: (work / name).read_bytes() for name in ("results.csv", "timings.csv")}
    done = commands.finished("main", *flags, asked, f"--workdir={work}", log=tmp_path / "second")
    assert "6 of 6 runs done" in done.out and "for 4 new runs" in done.out
    assert before == {name: (work / name).read_bytes() for name in before}
    assert len([*work.glob("calibration/*/seed-*/result.json")]) == 4 and len(commands.runs(work)) == 2
    assert "pseudo-studies have a false verdict" in (work / "report.md").read_text()
    again = commands.finished("main", *flags, asked, f"--workdir={work}", log=tmp_path / "third")
    assert "for 0 new runs" in again.out
    command.main([*flags, asked])
    assert "2 more times at every seed, 4 runs of " in " ".join(capsys.readouterr().out.split())
