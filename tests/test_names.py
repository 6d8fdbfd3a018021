"""Names that a user chooses and a file, a column or a markup must carry; texts that pass a terminal."""

import io
import json
import sys

import commands
import pytest
import tiny
from studies import without_plotly, write, write_study
from test_command import overridden

from lab import command, report, runtime
from lab import plan as plan_command
from lab.errors import UserError
from lab.study import results
from lab.study.define import plan
from lab.study.report import figures, layout, page
from lab.study.run import events
from lab.study.run.progress import Display

HOSTILE = "[bold]a[/x] :bug: — … {7} <b>c</b> a|b \\| $\\frac{$ `code`"


@pytest.fixture
def ascii_terminal(monkeypatch):
    """Puts it in the place of stdout; returns its letters."""

    def make():
        content = type("Kept", (io.BytesIO,), {"close": lambda self: None})()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding="ascii", write_through=True))
        return content

    return make


def ended(main, *arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lab", *arguments])
    with pytest.raises(SystemExit) as code:
        command.run(main)
    return code.value.code


def test_a_terminal_without_unicode_shows_what_it_can(ascii_terminal, monkeypatch):
    def main(argv):
        print("before — after …")
        with Display(2) as display:
            display.say("— said")
            display.start_run("größer", 0, 3)
            display.finish_run("größer", "█")
        return 0

    shown = ascii_terminal()
    assert ended(main, monkeypatch=monkeypatch) == 0
    assert shown.getvalue().decode("ascii").splitlines()[:2] == ["before ? after ?", "? said"]


def test_the_plan_of_a_hostile_question_is_printed(tmp_path, monkeypatch, capsys):
    path = tmp_path / "hostile.py"
    path.write_text(f'''
from lab.config import base
from lab.study.define.cells import chain, named

def get_config():
    config = base()
    config.study.update(name="[red]", question={HOSTILE!r}, labels=(("name", "[green]"),))
    config.study.cells = chain(named({HOSTILE!r}), named("[/]", ("train.steps", 70)))
    config.model.update(dim=16, layers=1)
    config.data.update(text_length=16, rows=2)
    return config
''')  # fmt: skip
    code = ended(plan_command.main, f"--config={path}", monkeypatch=monkeypatch)
    told, err = capsys.readouterr()
    assert (code, err) == (None, "")
    joined = " ".join(told.replace("│", " ").split())
    assert f"[green]={HOSTILE}" in told and "[green]=[/]" in told and "[red]: [bold]a[/x] :bug:" in joined


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (PermissionError(13, "Permission denied", "a/plan.json"), 1, "Permission denied: 'a/plan.json'; mend that and"),
        (OSError(5, "Input/output error"), 1, "Input/output error; mend that and run the same command again"),
        (OSError(28, "No space left on device"), 1, "the disk is full"),
        (OSError(122, "Disk quota exceeded"), 1, "the disk is full"),
        (UserError("a mistake"), 2, "lab: a mistake"),
    ],
)
def test_an_error_of_files_is_one_line(monkeypatch, capsys, error, code, told):
    def main(argv):
        raise error

    assert ended(main, monkeypatch=monkeypatch) == code
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


@pytest.mark.parametrize("text", ["(5)", "(1)+2", "[" * 5000, "{1: 2}", "1,2)", "None"])
def test_text_that_is_no_tuple_is_refused(text):
    with pytest.raises(UserError, match="is no tuple"):
        overridden("evaluate.loss.branches", text)


def test_an_empty_cache_directory_is_none_given(monkeypatch):
    monkeypatch.setenv("LAB_CACHE", "")
    assert runtime.cache_directory().name == "lab"


def named(*labels, **study):
    made = tiny.config()
    made.study.update({"name": "tiny", "labels": tuple(("train.steps", label) for label in labels)} | study)
    return made.study


@pytest.mark.parametrize("label", [
    "loss", "seed", "cell", "tokens", "ppl", "accuracy", "parameters", "phase", "seconds", "step", "learning_rate",
    "eval_branch", "difficulty", "layer", "name", "", " ",
])  # fmt: skip
def test_labels_that_columns_are_called_are_refused(label):
    with pytest.raises(UserError, match=r"study\.labels: .* is empty, or a column of every study") as told:
        plan.check_study(named(label))
    assert repr(label) in str(told.value)


def test_every_column_that_is_written_is_reserved(tmp_path):
    """The other way round: from tables of a study that has all of them."""
    write_study(tmp_path, {"head": ["h8"]}, lambda labels, count: 2.0, (1, 2))
    study = results.collect(tmp_path)
    frames = study.results, study.timings, study.curves, study.mixing
    assert {*(name for frame in frames for name in frame.columns)} - {"head"} <= plan.reserved()
    assert len({*plan.reserved()}) > 20


@pytest.mark.parametrize(
    ("study", "told"),
    [
        (dict(labels=(("train.steps", "a"), ("model.dim", "a"))), "study.labels has 'a' twice"),
        (dict(name="a/b"), "study.name = 'a/b' names a directory"),
        (dict(name=".."), "names a directory"),
        (dict(name="x" * 101), "at most 100 bytes"),
        (dict(name="é" * 51), "at most 100 bytes"),
        (dict(name="a\nb"), r"study\.name: 'a\\nb' has a control character"),
        (dict(question="a\x1b[2Jb"), r"study\.question: .* has a control character"),
        (dict(labels=(("train.steps", "a\tb"),)), r"study\.labels: .* has a control character"),
        (dict(cells=((("name", "a\x00b"),),)), r"study\.cells: .* has a control character"),
        (dict(contrasts=(("a\x07", (), ()),)), r"study\.contrasts: .* has a control character"),
        (dict(question="\ud800"), "has a control character"),
        (dict(published="none.csv"), "there is no such file"),
        (dict(published="configs"), "there is no such file"),
        (dict(published="docs/attention.png"), "is no csv"),
        (dict(published="README.md"), "is no csv"),
    ],
)
def test_names_that_nothing_can_carry_are_refused(study, told):
    with pytest.raises(UserError, match=told) as error:
        plan.check_study(named(**study))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("study", [dict(question="two\nlines — …"), dict(name="größer [x] <y>"), dict(labels=())])
def test_names_that_can_be_carried_are_taken(study):
    plan.check_study(named(**study))


PUBLISHED = {
    "empty": (b"", "is no csv"),
    "binary": (b"\xff\xfe\x00,\x81\n\x80", "is no csv"),
    "torn": (b"head,loss\n1,2\n1,2,3,4\n", "is no csv"),
    "quoted": (b'head,loss\n"1,2\n', "is no csv"),
    "without loss": (b"head,perplexity\nh8,2\n", "no csv with a column loss; its first line is 'head, perplexity'"),
    "words": (b"head,loss\nh8,low\n", "column loss that is no number"),
    "costs in words": (b"head,loss,parameters_millions\nh8,1.0,many\n", "column parameters_millions that is no"),
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_numbers_that_are_none_are_one_line(tmp_path, capsys, kind):
    """Before a study begins, and in its report."""
    content, told = PUBLISHED[kind]
    (tmp_path / "published.csv").write_bytes(content)
    with pytest.raises(UserError, match=told):
        plan.check_study(named(published=str(tmp_path / "published.csv")))
    write_study(
        tmp_path, {"head": ["h8"]}, lambda labels, count: 2.0, (1,),
        sections=["series"], published=str(tmp_path / "published.csv"),
    )  # fmt: skip
    assert commands.ended(report.main, tmp_path) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


def test_a_plan_of_any_other_shape_is_one_line(tmp_path, capsys):
    """Every field that it, a cell and a trial have: gone, or of another kind."""
    write_study(tmp_path, {"head": ["h8"]}, lambda labels, count: 2.0, (1,))
    whole = json.loads((tmp_path / "plan.json").read_text())
    plans = [
        [],
        3,
        None,
        {},
        {"study": "x"},
        whole | {"cells": [3]},
        whole | {"cells": "none"},
        whole | {"tuning": [{}]},
    ]
    for field in results.PLAN:
        plans += [{name: value for name, value in whole.items() if name != field}, whole | {field: None}]
    for field in results.CELL:
        plans += [whole | {"cells": [whole["cells"][0] | {field: None}]}]
    for number, text in enumerate(["", "{", "\0\0", "[" * 99999, *map(json.dumps, plans)]):
        (tmp_path / "plan.json").write_text(text)
        assert commands.ended(report.main, tmp_path) == 2, (number, text[:80])
        err = capsys.readouterr().err
        assert "plan.json" in err and err.count("\n") == 1, err


def test_a_report_that_cannot_be_written_or_read_is_one_line(tmp_path, capsys):
    write_study(tmp_path / "a", {"head": ["h8"]}, lambda labels, count: 2.0, (1,), sections=["curves"])
    (tmp_path / "file").write_text("")
    (tmp_path / "b" / "plan.json").mkdir(parents=True)
    (tmp_path / "a" / "report.md").mkdir()
    for arguments in (["a"], ["b"], ["file"], ["file/c"]):
        assert commands.ended(report.main, *(tmp_path / argument for argument in arguments)) in (1, 2)
        assert capsys.readouterr().err.count("\n") == 1, arguments


def test_a_report_of_hostile_names_is_whole(tmp_path):
    """A label with a tuple for its value, and names that four markups would read."""
    write_study(tmp_path, {"head": ["h8", "h16"]}, lambda labels, count: 2.0, (1, 2), sections=["curves"], seeds=2)
    content = json.loads((tmp_path / "plan.json").read_text())
    content |= {"labels": [["name", "a|b"]], "question": HOSTILE, "command": "'```\n<i>'"}
    for number, cell in enumerate(content["cells"]):
        cell["labels"] = {"a|b": [[HOSTILE, number]]}
    study = {"baseline": [["a|b", [[HOSTILE, 0]]]], "groups": []}
    write(tmp_path / "plan.json", content | {"config": content["config"] | {"study": study}})
    report.main([str(tmp_path)])
    text, whole = (tmp_path / "report.md").read_text(), without_plotly((tmp_path / "report.html").read_text())
    assert "<b>" not in text and "````\n'```\n<i>'\n" in text
    assert "<b>" not in whole and "<i>" not in whole and "&lt;b&gt;c&lt;/b&gt;" in whole


@pytest.mark.parametrize("text", ["a|b", "a\\|b", "a\\\\|b", "|", "\\", "a\nb", "<b>", "||"])
def test_a_cell_of_a_table_stays_one(text):
    """As GitHub reads rows: a backslash escapes what follows it, a pipe that is not escaped ends a column."""
    shown, columns, escaped = page.cell(text), 1, False
    for letter in shown:
        columns += letter == "|" and not escaped
        escaped = letter == "\\" and not escaped
    assert columns == 1 and "\n" not in shown and "<" not in shown


def test_a_dollar_is_one_in_figures():
    curves = {"$\\frac{$": {1: 2.0, 2: 3.0}, "$b$": {1: 2.5}}
    assert figures.png(figures.by_condition([{"$\\bad{$": curves}], {}, "$x", {}))


def test_how_cells_run_and_are_asked_is_no_difference():
    ours, theirs = (tiny.config(**over).to_dict() for over in (
        dict(train__steps=7, run__microbatches=2, run__checkpoint__every=9, evaluate__loss__texts=64), {}
    ))  # fmt: skip
    assert layout.differences(ours, theirs) == {"train.steps": (7, 6)}


def test_configs_in_tensorboard_keep_their_columns():
    ours = {"model": {"rule": "causal | (window(3) & x)"}, "run": {"remat": "full"}}
    table = events.describe(ours, {"model": {"rule": "causal"}, "run": {"remat": "none"}}).split("\n\n")[0]
    assert table.splitlines()[2:] == ["| model.rule | causal \\| (window(3) & x) | causal |"]


def test_labels_of_any_kind_are_hyperparameters(tmp_path):
    writer = events.Writer(tmp_path)
    writer.hparams({"pattern": (("rule", "causal"), 3), "none": None, "seed": 1}, {"eval/loss": 2.0}, 3)
    writer.close()
