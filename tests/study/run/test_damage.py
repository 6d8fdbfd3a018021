"""What a run finds damaged when it goes on: nothing is lost that is whole, nothing is counted that is not."""

import json
import math
import pathlib
import shutil

import pytest
import tiny
from studies import write_study
from test_asks import DONE, SIZES, Study

import lab
from lab import report, storage
from lab.errors import UserError
from lab.study import evaluations, results
from lab.study.define.cell import Cell
from lab.study.run import segments, trials
from lab.study.run import study as run_study
from lab.study.run.log import Log
from lab.study.run.runs import Run
from lab.train import checkpoint
from lab.train.checkpoint import Unreadable


def config():
    made = tiny.config(model__layers=1, data__rows=8)  # six steps, a checkpoint every two, the newest three kept
    made.evaluate.loss.update(branches=(1, 2), **SIZES)
    return made


def lines(run: pathlib.Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines(keepends=True)


def write_lines(run: pathlib.Path, kept: list[str]) -> None:
    (run / "metrics.jsonl").write_text("".join(kept))


LINE = '{"step": %d, "loss": 2.5, "tokens": 8, "text_hash": "ab"}\n'
WHOLE = [LINE % step for step in range(6)]
LOGS = {  # what a file holds: (steps that are read, how many of them count from the first on)
    "whole": (WHOLE, range(6), 6),
    "torn": ([*WHOLE[:4], WHOLE[4][:20]], range(4), 4),
    "torn, and gone on": ([*WHOLE[:4], WHOLE[4][:20] + "\n", WHOLE[5]], [0, 1, 2, 3, 5], 4),
    "twice": ([*WHOLE[:5], *WHOLE[3:]], range(6), 6),
    "short": (WHOLE[:3], range(3), 3),
    "empty": ([], [], 0),
    "zeros": ([*WHOLE[:2], "\0" * 200 + "\n", *WHOLE[3:]], [0, 1, 3, 4, 5], 2),
    "no objects": (
        [*WHOLE[:2], "1\n", "null\n", "[2]\n", '{"step": "2", "loss": 1.0}\n', "[" * 99999 + "\n"],
        [0, 1],
        2,
    ),
    "no tokens": ([WHOLE[0], '{"step": 1, "loss": 2.0}\n', *WHOLE[2:]], range(6), 1),
    "without a start": (WHOLE[2:], range(2, 6), 0),
}


@pytest.mark.parametrize("kind", LOGS)
def test_a_log_is_read_by_step(tmp_path, kind):
    held, steps, counted = LOGS[kind]
    write_lines(tmp_path, held)
    assert [line["step"] for line in results.metrics(tmp_path)] == [*steps]
    assert results.steps_logged(tmp_path) == counted
    log = Log(Run(Cell("one", {}, tiny.config()), 0, {}, None, tmp_path), writes=True)
    log._begin(4)
    assert [json.loads(line)["step"] for line in lines(tmp_path)] == [step for step in steps if step < 4]
    log._file.close()


def test_a_log_of_other_bytes_or_none_has_no_steps(tmp_path):
    assert results.steps_logged(tmp_path) == 0 and results.metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\x80{\n" + WHOLE[0].encode())
    assert results.steps_logged(tmp_path) == 1


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that was made in one go: its files, by their names."""
    with pytest.MonkeyPatch.context() as patch:
        study = Study(tmp_path_factory.mktemp("undisturbed"), patch)
        assert study.make(config())[:2] == (DONE, 6)
    return study.directory


def told(directory: pathlib.Path) -> tuple:
    """What a result says of the texts, and the log."""
    result = json.loads((directory / "result.json").read_text())
    return result["tokens"], result["text_hash"], lines(directory)


@pytest.mark.parametrize(
    ("damage", "trained"),
    [
        (lambda kept: [*kept[:5], kept[5][:30]], 2),  # from the checkpoint of step 4
        (lambda kept: kept[:3], 4),
        (lambda kept: kept[:1] + kept[2:], 6),  # no checkpoint is old enough: from 0
        (lambda kept: [], 6),
        (lambda kept: [*kept, *kept[2:]], 0),
    ],
    ids=["torn", "short", "a hole", "gone", "twice"],
)
def test_a_damaged_log_beside_good_checkpoints_is_made_again(
    undisturbed, tmp_path, monkeypatch, caplog, damage, trained
):
    """Killed before its result, with what the log lost."""
    study = Study(tmp_path, monkeypatch)
    shutil.copytree(undisturbed.parents[1], study.directory.parents[1])
    (study.directory / "result.json").unlink()
    write_lines(study.directory, damage(lines(study.directory)))
    assert study.make(config())[:2] == (DONE, trained)
    assert told(study.directory) == told(undisturbed)
    said = [record for record in caplog.records if "set aside: metrics.jsonl has no line of" in record.getMessage()]
    assert len(said) == len(list((study.directory / checkpoint.SET_ASIDE).glob("*"))) == trained / 2


@pytest.mark.slow
def test_a_log_that_is_lost_while_it_trains_is_one_line(tmp_path, monkeypatch):
    study = Study(tmp_path, monkeypatch)

    def stop(step):
        if step == 5:
            (study.directory / "metrics.jsonl").unlink()
        return False

    study.stop = stop
    with pytest.raises(
        UserError, match=r"metrics\.jsonl has lost the line of step 0.*run the same command again"
    ) as lost:
        study.make(config())
    assert lost.value.exit_code == 1 and not (study.directory / "result.json").exists()
    study.stop = lambda step: False
    assert study.make(config())[:2] == (DONE, 6)


GARBAGE = {
    "empty": b"",
    "zeros": bytes(64),
    "torn": b'{"tokens": 12, ',
    "a list": b"[1]",
    "bytes": b"\xff\xfe",
    "deep": b"[" * 99999,
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_a_damaged_result_is_a_run_that_is_not_finished(undisturbed, tmp_path, monkeypatch, kind):
    study = Study(tmp_path, monkeypatch)
    shutil.copytree(undisturbed.parents[1], study.directory.parents[1])
    (study.directory / "result.json").write_bytes(GARBAGE[kind])
    run = study.run(config())
    assert not run_study._trained(run) and run_study._status(run) == run_study.WAITING
    if kind == "empty":
        assert study.make(config())[:2] == (DONE, 0)
        assert told(study.directory) == told(undisturbed)


@pytest.mark.parametrize("name", ["result.json", "failure.json", "segments.json", "metrics.jsonl", "evaluations"])
@pytest.mark.parametrize("kind", GARBAGE)
def test_whatever_of_a_run_is_damaged_counts_as_missing(tmp_path, caplog, kind, name):
    write_study(tmp_path, {"head": ["h8"]}, lambda labels, count: 2.0, (1, 2), sections=["curves"])
    (run,) = tmp_path.glob("cells/*/seed-0")
    path = next(run.glob("evaluations/*.json")) if name == "evaluations" else run / name
    path.write_bytes(GARBAGE[kind])
    (outcome,) = results.collect(tmp_path).runs
    status = "pending" if name in ("result.json", "evaluations") else "done"
    assert outcome.status == status
    assert segments.read(run) == [] and (name != "metrics.jsonl" or outcome.metrics == [])
    if name in ("result.json", "failure.json"):
        assert [f"{path} is damaged" in record.getMessage() for record in caplog.records] == [True]


def test_a_study_of_damaged_runs_has_a_report(tmp_path):
    write_study(tmp_path, counts=(1, 2), seeds=2)
    files = "result.json", "failure.json", "metrics.jsonl", "segments.json", "mixing.csv"
    for run, garbage in zip(sorted(tmp_path.glob("cells/*/seed-*")), GARBAGE.values(), strict=False):
        for name in files:
            (run / name).write_bytes(garbage)
    report.main([str(tmp_path)])


@pytest.mark.parametrize("row", [
    *({"eval_branch": 1, "loss": loss} for loss in (math.nan, math.inf, None, "2.0")), {"loss": 2.0}, [2.0], 2.0
])  # fmt: skip
def test_an_evaluation_without_a_number_is_none(tmp_path, row):
    """As earlier versions kept them: it is asked again."""
    about = {"parts": {"ask": 1}, "versions": {}}
    found = evaluations.begun("loss", "eval_branch", about)
    evaluations.save(tmp_path, found | {"complete": True, "conditions": [{"eval_branch": 1, "loss": 2.0}]})
    assert evaluations.find(tmp_path, "loss", about)
    evaluations.save(tmp_path, found | {"complete": True, "conditions": [row]})
    assert evaluations.find(tmp_path, "loss", about) is None


def test_a_failure_of_any_kind_is_one(tmp_path):
    (tmp_path / "failure.json").write_text("{}")
    assert results.failed(tmp_path) == {}
    assert trials.score(Run(None, 0, {}, None, tmp_path)) == math.inf


def test_a_checkpoint_that_cannot_be_read_for_now_fails_no_run(undisturbed, tmp_path, monkeypatch):
    """Asked anew, where its weights cannot be looked at: the advice to delete the run would be wrong."""
    study = Study(tmp_path, monkeypatch)
    shutil.copytree(undisturbed.parents[1], study.directory.parents[1])
    shutil.rmtree(study.directory / "evaluations")

    def refuse(*arguments):
        raise Unreadable(study.directory, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("lab.study.run.ask.read_model", refuse)
        with pytest.raises(Unreadable):
            study.make(config())
    assert not (study.directory / "failure.json").exists()
    assert study.make(config())[:2] == (DONE, 0)


@pytest.mark.parametrize("kind", GARBAGE)
def test_a_damaged_file_is_said_once(tmp_path, caplog, kind):
    path = tmp_path / "a.json"
    assert storage.find_json(path) is None and not caplog.records
    path.write_bytes(GARBAGE[kind])
    for _ in range(3):
        assert storage.find_json(path) is None
    assert len(caplog.records) == 1 and "is damaged" in caplog.records[0].getMessage()
    with pytest.raises(UserError, match=r"a\.json is damaged"):
        storage.read_json(path)


@pytest.mark.parametrize("kind", [*GARBAGE, "asks"])
def test_a_damaged_config_of_a_cell_is_one_line_where_it_is_loaded(tmp_path, kind):
    (tmp_path / "config.json").write_bytes(GARBAGE.get(kind, b'{"evaluate": [1]}'))
    (tmp_path / "seed-0" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"config\.json") as error:
        lab.load(tmp_path)
    assert "\n" not in str(error.value)


def test_the_first_seed_of_a_cell_is_the_lowest(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name in ("seed-10", "seed-2", "seed-2 copy"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"/seed-2/checkpoints does not exist"):
        lab.load(tmp_path)
