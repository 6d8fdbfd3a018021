"""The directory of a study: what bars it, one config at a time, and reports that cannot be made while runs go on."""

import errno
import json
import pathlib
from types import SimpleNamespace

import filelock
import pytest
import tiny
from studies import write, write_study

from lab import main, report
from lab.errors import UserError
from lab.study.define.cell import Cell
from lab.study.run import hosts, make, places, runs
from lab.study.run import study as run_study


def config(**overrides):
    made = tiny.config(**overrides)
    made.study.name = "tiny"
    return made


PLANS = {
    "empty": ("", "is damaged"),
    "zeros": ("\0" * 50, "is damaged"),
    "a list": ("[]", "is damaged"),
    "a number": ("12", "is damaged"),
    "foreign": ('{"version": 1, "steps": []}', "is no plan of a study"),
    "a study of a number": ('{"study": 3}', "is no plan of a study"),
    "another": ('{"study": "another"}', "holds the study 'another', not 'tiny'"),
}


@pytest.mark.parametrize("kind", PLANS)
def test_a_directory_of_another_plan_is_left_alone(tmp_path, kind):
    text, told = PLANS[kind]
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UserError, match=told) as error:
        places.check(tmp_path, config())
    assert "\n" not in str(error.value) and ("--workdir" in str(error.value))
    assert (tmp_path / "plan.json").read_text() == text


def test_a_directory_that_is_a_file_or_below_one_is_one_line(tmp_path):
    (tmp_path / "file").write_text("precious")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        assert places.check(workdir, config()) == {}
        with pytest.raises(UserError, match="choose a directory that can be written") as error:
            runs.write_plan(workdir, config(), [], [], [], "command")
        assert f"--workdir={workdir} cannot be used (" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENAMETOOLONG])
def test_a_directory_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, number):
    def refuse(self, *arguments, **options):
        raise OSError(number, "is not allowed", str(self))

    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    for use in (lambda: runs.write_plan(tmp_path / "a", config(), [], [], [], ""), lambda: held(tmp_path / "a")):
        with pytest.raises(UserError, match=r"cannot be used \(is not allowed\)"):
            use()


def held(workdir, **overrides):
    with places.held(workdir, config(**overrides)):
        return [path.name for path in workdir.glob(".runs.*")]


def test_one_config_at_a_time_uses_a_directory(tmp_path):
    with places.held(tmp_path, config()):
        assert len(held(tmp_path)) == 2, "job arrays share it"
        assert len(held(tmp_path, run__microbatches=2, run__remat="full")) == 2, "however it runs"
        for overrides in (dict(train__steps=7), dict(evaluate__loss__texts=32)):
            with pytest.raises(UserError, match="another config of the study 'tiny' is running there; give this one a"):
                held(tmp_path, **overrides)
    assert not list(tmp_path.glob(".runs.*"))
    assert len(held(tmp_path, train__steps=7)) == 1


def test_a_lock_that_others_cannot_see_is_none(tmp_path, monkeypatch):
    """A command of the same config ends between the opening of its file and the lock on it."""
    acquire, ended = filelock.FileLock.acquire, []

    def late(lock, *arguments, **options):
        taken = acquire(lock, *arguments, **options)
        if not ended:
            ended.append(pathlib.Path(lock.lock_file).unlink())
        return taken

    monkeypatch.setattr(filelock.FileLock, "acquire", late)
    assert len(held(tmp_path)) == 1


def test_what_a_killed_command_leaves_bars_nobody(tmp_path):
    (tmp_path / ".runs.0123456789ab.0").write_text("")
    (tmp_path / ".plan.json.12").write_text("{")
    assert places.check(tmp_path, config()) == {}
    assert len(held(tmp_path)) == 2


def test_a_report_of_another_config_is_said_to_be_replaced(tmp_path):
    def there(**overrides):
        return {"config": json.loads(config(**overrides).to_json_best_effort()), "command": "lab --config=a.py"}

    assert places.replaced({}, config()) == ""
    assert places.replaced(there(run__remat="full"), config()) == ""
    told = places.replaced(there(train__steps=7), config())
    assert "was of lab --config=a.py" in told and "--workdir=DIR keeps" in told and "\n" not in told


def test_a_mistake_that_one_process_finds_ends_all(monkeypatch):
    def mistake():
        raise UserError("the mistake")

    with pytest.raises(UserError, match="the mistake"):
        hosts.first(mistake)
    monkeypatch.setattr(hosts.jax, "process_index", lambda: 1)
    monkeypatch.setattr(hosts, "agreed", lambda values: [1])
    with pytest.raises(UserError, match="process 0"):
        hosts.first(mistake)


@pytest.mark.parametrize("name", [
    "x" * 400, "—" * 200, "a/b/../../c", "new\nline\tand\x00more\x1b[2J", "[bold]a|b<c>$d$", "..", "𝔘" * 80,
])  # fmt: skip
def test_any_name_of_a_cell_makes_a_directory(tmp_path, name):
    place = tmp_path / f"{runs._file_name(name)}-0123456789ab"
    place.mkdir()
    assert place.parent == tmp_path and place.name.isprintable() and len(place.name.encode()) <= 128
    assert [*tmp_path.glob("*-0123456789ab")] == [place]


def test_names_that_a_directory_can_carry_stay_as_they_are():
    for name in ("rope_ratio=0.5,train_branch=1-15", "GQA2-(192+64)-S2 Q&O LoRA", "größer"):
        assert runs._file_name(name) == name


def reporter(directory):
    told = []
    return main.Reporter(directory, writes=True, say=told.append), told


@pytest.mark.parametrize(
    "error", [UserError("a mistake"), ValueError("two\nlines"), OSError(errno.EIO, "Input/output error"), KeyError("x")]
)
def test_no_error_of_a_report_ends_a_study(tmp_path, monkeypatch, error):
    def fail(*arguments):
        raise error

    ours, told = reporter(tmp_path)
    monkeypatch.setattr(report, "rebuild", fail)
    ours.after_run()
    ours.rebuild()
    assert len(told) == 2 and all("no report could be made" in line and "\n" not in line for line in told)
    assert f"python -m lab.report {tmp_path}" in told[0] and type(error).__name__ in told[0]


def test_a_full_disk_ends_it(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report, "rebuild", full)
    with pytest.raises(OSError, match="No space left"):
        reporter(tmp_path)[0].rebuild()


def test_a_plan_that_is_gone_when_the_study_ends_is_said(tmp_path):
    ours, told = reporter(tmp_path)
    ours.note_look()
    assert len(told) == 1 and "no report could be made" in told[0]
    write_study(tmp_path, {"head": ["h8"]}, lambda labels, count: 2.0, (1,), study={"seeds": 1})
    ours.note_look(), ours.note_look()
    assert len(told) == 1 and json.loads((tmp_path / "plan.json").read_text())["looks"] == [{"seeds": 1}]


def test_a_look_at_a_study_with_a_failed_run_is_kept(tmp_path):
    """What is pending would still change it."""
    write_study(tmp_path, seeds=2, skip={("rope_ratio=0.0,train_branch=1-15", 1)})
    looks = lambda: json.loads((tmp_path / "plan.json").read_text())["looks"]  # noqa: E731
    plan = json.loads((tmp_path / "plan.json").read_text())
    plan["config"]["study"]["seeds"] = 2
    write(tmp_path / "plan.json", plan)
    runs.note_look(tmp_path)
    assert looks() == []
    (cell,) = (tmp_path / "cells").glob("rope_ratio=0.0,train_branch=1-15-*")
    write(cell / "seed-1" / "failure.json", {"reason": "loss is nan", "step": 7})
    for _ in range(2):
        runs.note_look(tmp_path)
        assert looks() == [{"seeds": 2}]


@pytest.mark.parametrize("saved", [True, False])
def test_a_stack_that_is_dropped_leaves_nothing_and_others_stay(tmp_path, saved):
    def unit(*seeds):
        return tuple(SimpleNamespace(directory=tmp_path / "cells/a-0/seed-0", place=0, seed=seed) for seed in seeds)

    first, other = unit(0, 1), unit(0, 1, 2)
    for stack in (first, other) if saved else ():
        make.checkpoint_directory(stack).mkdir(parents=True)
    make.drop_stack(first)
    assert make.checkpoint_directory(other).exists() == saved and not make.checkpoint_directory(first).parent.exists()
    make.drop_stack(other)
    assert not (tmp_path / "stacks").exists()


def test_evaluations_of_other_weights_never_stay(tmp_path, monkeypatch):
    """What cannot be removed stops the study: it would be taken for what the run is about to be asked."""

    def refuse(path, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    class Named:
        name, described, save, config = "one", (lambda self: {}), (lambda self, path: None), tiny.config()

    monkeypatch.setattr(run_study.shutil, "rmtree", refuse)
    data = type("Data", (), {"tokenizer": Named()})
    made = dict.fromkeys(run_study.identity.PARTS, "")
    run = runs.Run(Named(), 0, made, data, tmp_path / "cell" / "seed-0")
    with pytest.raises(PermissionError):
        run_study._make((run,), None, None)


@pytest.mark.parametrize("vmap", ["none", "seeds", "numbers"])
def test_all_cells_of_a_seed_come_before_the_next(vmap):
    """And each run once, in the order of the cells."""
    one = config()
    cells = [Cell(f"{name}", (("name", name),), one) for name in "abc"]
    made = [
        runs.Run(cell, seed, {}, None, pathlib.Path(cell.name) / str(seed), None) for cell in cells for seed in (4, 5)
    ]
    units = runs.units_of(made, vmap)
    names = [[(run.cell.name, run.seed) for run in unit] for unit in units]
    if vmap == "seeds":
        assert names == [[(name, 4), (name, 5)] for name in "abc"]
    else:
        flat = [run for unit in names for run in unit]
        assert flat == [(name, seed) for seed in (4, 5) for name in "abc"]
