"""The command line: overrides keep their types, and a mistake is one line, code 2, with nothing written or lost."""

import json
import math
import re
import sys

import commands
import jax
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lab.config
from lab import cluster, command, convert, main, plan, report, runtime
from lab.errors import UserError
from lab.options import leaves
from lab.study import open as opening

DOUBLED = (
    "--config.data.rows=8",
    "--config.evaluate.loss.rows=8",
    "--config.evaluate.loss.texts=32",
)  # for the eight devices here


def overridden(name, text):
    config = lab.config.base()
    command.override(config, name, text)
    return leaves(config)[name]


@given(st.integers(-(10**9), 10**9))
def test_an_integer_stays_one(value):
    assert overridden("train.steps", str(value)) == value


@given(st.floats(allow_nan=False))
def test_a_float_keeps_every_bit(value):
    found = overridden("train.learning_rate", repr(value))
    assert isinstance(found, float) and found == value


@given(st.lists(st.integers(1, 64), min_size=1, max_size=5))
def test_tuples_are_written_with_and_without_brackets(values):
    listed = ",".join(map(str, values))
    for text in (listed, f"{listed},", f"({listed},)", f"[{listed}]"):
        assert overridden("evaluate.loss.branches", text) == tuple(values)


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("True", True), ("1", True), ("false", False), ("0", False)]
)
def test_truth(text, value):
    assert overridden("data.stagger", text) is value


def test_an_integer_where_a_float_stands_becomes_one():
    found = overridden("train.learning_rate", "1")
    assert isinstance(found, float) and found == 1


def test_text_is_taken_as_it_is():
    assert overridden("data.path", "a,b c=1") == "a,b c=1"


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("train.steps", "many", r"--config\.train\.steps='many' is no int; the default is 250"),
        ("train.steps", "1.5", r"is no int"),
        ("train.clip", "big", r"is no float; the default is 1\.0"),
        ("data.stagger", "yes", r"is no bool"),
        ("evaluate.loss.branches", "(1,", r"is no tuple"),
        ("evaluate.loss.branches", "1,x", r"is no tuple"),
        ("evaluate.loss.branches", "'a','b'", r"is no tuple; the default is \(1,\)"),
        ("train.stepz", "1", r"'train\.stepz' is unknown \(did you mean 'train\.steps'\?\)"),
        ("train", "1", r"'train' is unknown"),
    ],
)
def test_overrides_that_mean_nothing(name, text, told):
    with pytest.raises(UserError, match=told):
        overridden(name, text)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("config.model.dimm = 1", r"line 4: AttributeError: Key \"dimm\" does not exist.*Did you mean \"dim\""),
        ("config.model.update(dimm=1)", r"line 4: KeyError: Key \"dimm\" does not exist.*Did you mean \"dim\""),
        ("config.model.dim = 'wide'", r"line 4: TypeError: .*'dim'.*wide is of original type"),
        ("config.train.steps = stepz", r"line 4: NameError: name 'stepz' is not defined"),
        ("config.train.steps = 1 +", r"line 4: SyntaxError: invalid syntax"),
    ],
)
def test_a_broken_config_is_one_line_that_says_where(tmp_path, line, told):
    path = tmp_path / "broken.py"
    path.write_text(
        f"from lab.config import base\ndef get_config():\n    config = base()\n    {line}\n    return config\n"
    )
    with pytest.raises(UserError, match=told) as error:
        command.load_config(str(path))
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize(("line", "told"), [
    ("config = None", "get_config returns None, which is no ConfigDict"),
    ("config = dict(model=1)", "get_config returns {'model': 1}, which is no ConfigDict"),
])  # fmt: skip
def test_a_config_that_is_none_is_refused(tmp_path, line, told):
    path = tmp_path / "none.py"
    path.write_text(f"def get_config():\n    {line}\n    return config\n")
    with pytest.raises(UserError, match=told):
        command.load_config(str(path))


@pytest.mark.parametrize(("change", "told"), [
    (lambda config: config.model.update(foo=1), "a field of config.model = 'foo' is unknown"),
    (lambda config: config.train.__delitem__("warmup"), "config.train.warmup is missing"),
])  # fmt: skip
def test_fields_of_a_config_that_was_unlocked_are_those_that_are_declared(change, told):
    config = lab.config.base()
    config.study.name = "tiny"
    with config.unlocked(), config.model.unlocked(), config.train.unlocked():
        change(config)
    with pytest.raises(UserError, match=re.escape(told)):
        opening.open(config)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return commands.write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture
def study(tmp_path, corpus):
    return commands.write_study(tmp_path / "tiny.py", corpus)


@pytest.fixture
def told(monkeypatch, capsys):
    """told(module, *arguments): (exit code, stdout, stderr) of a command run in this process, on its eight devices."""
    monkeypatch.setattr(runtime, "start", lambda config: cluster.Cluster())

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", ["lab", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            command.run(module.main)
        return ended.value.code, *capsys.readouterr()

    return run


def lines(path, *rows):
    path.write_text("".join(f"{row}\n" for row in rows))
    return path


def refused(told, workdir, *arguments):
    """The one line that `lab.main` ends with, having written nothing."""
    code, out, err = told(main, *arguments, f"--workdir={workdir}")
    assert (code, out) == (2, "") and not workdir.exists()
    assert err.startswith("lab: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stepz=1", "did you mean 'train.steps'?"),
        ("train.steps=many", "--config.train.steps='many' is no int; the default is 40"),
        ("train.steps", "--config.train.steps needs a value"),
        ("data.draw=1-2", "--config.data.draw: the study 'tiny' varies it"),
        (
            "model.mixer.kv_heads=3",
            "is not divisible by model.mixer.kv_heads = 3; choose model.mixer.kv_heads among: 1, 2",
        ),
        ("model.rule=causall", "did you mean 'causal'?"),
        ("model.position.theta=0", "model.position.theta = 0.0 must be above 0: base of the rotary frequencies"),
        ("data.long_texts=refuse", "over data.text_length = 16; raise it, or set data.long_texts"),
        ("data.path=nowhere/*.txt", "data.path = 'nowhere/*.txt' matches no file"),
        ("data.field=body", "line 1: no field 'body' (data.field); it has: text"),
        ("data.text_length=1", "data.text_length = 1 must be at least 2: tokens of a text at most"),
        ("data.rows=12", "data.rows / run.microbatches = 12 does not divide over run.mesh data x fsdp = 8"),
        ("run.microbatches=3", "run.microbatches = 3 does not divide data.rows = 8; choose a divisor"),
        ("run.microbatches=2", "data.rows / run.microbatches = 4 does not divide over run.mesh data x fsdp = 8"),
        ("evaluate.loss.texts_per_row=2", "choose a multiple of 4"),
        (
            "evaluate.loss.texts=33",
            "evaluate.loss.texts = 33 is not a multiple of texts_per_row x rows = 4 x 8; the next is 64",
        ),
        ("evaluate.loss.branches=()", "evaluate.loss.branches is empty"),
        ("run.mesh.data=3", "does not cover 8 devices; their product must be 8"),
        ("run.mesh.tensor=0", "does not cover 8 devices"),
        ("run.mesh.fsdp=-1", "one may be -1"),
        ("run.mesh.tensor=4", "run.mesh.tensor = 4 does not divide 2 query heads over 1 key heads; choose a divisor"),
        ("run.device_memory=3", "run.device_memory = 3.0 means nothing beside run.auto_mesh = False; choose 0, or"),
        ("study.seeds=0", "study.seeds = 0 must be at least 1"),
        (
            "study.vmap=seedz",
            "study.vmap = 'seedz' is unknown (did you mean 'seeds'?); choose one of: none, seeds, numbers",
        ),
        ("study.sections='curve',", "study.sections = 'curve' is unknown (did you mean 'curves'?)"),
        ("study.published=none.csv", "study.published = 'none.csv': there is no such file"),
        ("run.checkpoint.every=0", "run.checkpoint.every = 0 must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(told, tmp_path, study, override, expected):
    assert expected in refused(told, tmp_path / "work", f"--config={study}", *DOUBLED, f"--config.{override}")


@pytest.mark.parametrize(("ratio", "bound"), [(1.5, "at most 1"), (-0.1, "at least 0"), (math.nan, "a finite number")])
def test_a_ratio_outside_its_range(told, tmp_path, corpus, ratio, bound):
    cells = f'product(vary("model.position.ratio", (1.0, float("{ratio}"))), vary("data.draw", ("1-3",)))'
    study = commands.write_study(tmp_path / "tiny.py", corpus, cells)
    assert f"model.position.ratio = {ratio} must be {bound}: share of" in refused(
        told, tmp_path / "work", f"--config={study}", *DOUBLED
    )


@pytest.mark.parametrize(
    ("kind", "rows", "expected"),
    [
        ("jsonl", ['{"text": "a line of text"}', '{"text": '], "broken.txt, line 2: not JSON"),
        ("jsonl", ['{"text": "a line of text"}', '["text"]'], "broken.txt, line 2: list, not a JSON object"),
        ("jsonl", ['{"text": 1}'], "line 1: field 'text' (data.field) is int, not a string"),
        ("jsonl", [], "is empty: no text of at least 2 tokens"),
        ("files", [], "is empty: no text of at least 2 tokens"),
        ("jsonl", ['{"text": "short"}'] * 9, "fewer than one step of data.rows x texts_per_row = 8 x 4"),
        ("files", ["too few of these words"] * 150, "validation texts, fewer than evaluate.loss.texts = 32"),
    ],
)
def test_a_corpus_that_cannot_be_used(told, tmp_path, study, kind, rows, expected):
    path = lines(tmp_path / "broken.txt", *rows)
    data = (f"--config.data.corpus={kind}", f"--config.data.path={path}")
    assert expected in refused(told, tmp_path / "work", f"--config={study}", *DOUBLED, *data)


def test_no_config_no_scale(told, tmp_path):
    code, _, err = told(main, f"--config={tmp_path / 'none.py'}")
    assert code == 2 and err.count("\n") == 1 and "configs/rope_ablation.py" in err
    code, _, err = told(main, "--config=configs/rope_ablation.py:large")
    assert code == 2 and err.count("\n") == 1 and "'large' is unknown; choose one of: cpu, gpu, paper" in err


@pytest.mark.parametrize(
    ("module", "arguments", "expected"),
    [
        (main, (), "required: --config; usage: python -m lab.main [-h] --config FILE[:SCALE] [--workdir"),
        (main, ("--config=a.py", "--stpes=3"), "unrecognized arguments: --stpes=3; usage: python -m lab.main"),
        (main, ("--config=a.py", "--config.train.steps", "5"), "a value: --config.train.steps=VALUE"),
        (plan, ("--config=a.py", "--jsonl"), "unrecognized arguments: --jsonl; usage: python -m lab.plan"),
        (report, (), "directories; usage: python -m lab.report [-h] [--output OUTPUT] directories"),
        (convert, ("to-hff", "a", "b"), "invalid choice: 'to-hff' (choose from"),
        (convert, ("to-hf", "a"), "OUT; usage: python -m lab.convert to-hf [-h] CKPT OUT"),
    ],
)
def test_a_flag_that_is_not_there_is_one_line(told, module, arguments, expected):
    code, out, err = told(module, *arguments)
    assert (code, out) == (2, "") and err.startswith("lab: ") and err.count("\n") == 1 and expected in err


def test_a_directory_of_other_things_is_left_alone(told, tmp_path, study):
    work = tmp_path / "work"
    work.mkdir()
    (work / "thesis.tex").write_text("precious")
    code, out, err = told(main, f"--config={study}", *DOUBLED, f"--workdir={work}")
    assert (code, out) == (2, "") and "holds other files and no study" in err and err.count("\n") == 1
    assert [path.name for path in work.iterdir()] == ["thesis.tex"]


def test_a_directory_of_another_study_is_left_alone(told, tmp_path, study):
    work = tmp_path / "work"
    work.mkdir()
    (work / "plan.json").write_text(json.dumps({"study": "another"}))
    code, out, err = told(main, f"--config={study}", *DOUBLED, f"--workdir={work}")
    assert (code, out) == (2, "") and "holds the study 'another', not 'tiny'" in err and err.count("\n") == 1
    assert json.loads((work / "plan.json").read_text()) == {"study": "another"}


def test_what_a_kill_left_of_a_plan_does_not_bar_the_directory(told, tmp_path, study, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    (work / ".plan.json.123").write_text('{"study": "ti')
    monkeypatch.setattr("lab.study.run.study.run_study", lambda runs, **settings: exec("raise KeyboardInterrupt"))
    code, _, err = told(main, f"--config={study}", *DOUBLED, f"--workdir={work}")
    assert code == 130 and "interrupted; run the same command again" in err
    assert json.loads((work / "plan.json").read_text())["study"] == "tiny"


def test_a_report_of_no_study_is_refused(told, tmp_path):
    code, _, err = told(report, tmp_path)
    assert code == 2 and "has no plan.json" in err and err.count("\n") == 1


def test_the_plan_as_json(told, study):
    code, out, err = told(plan, f"--config={study}", "--json", "--config.train.steps=7")
    assert (code, err) == (None, "")
    table = json.loads(out)
    assert table["study"] == "tiny" and table["question"] == "Does it run?" and len(table["cells"]) == 4
    promised = (
        "name parameters parameters_non_embedding train_flops_per_token attention_work cache_per_token_per_layer "
        "cache_per_device cache_copies state_per_layer tokens executable "
        "cache_bytes_per_token intensity_training intensity_decoding"
    )
    for row in table["cells"]:
        assert {*promised.split(), "head_dim", "pairs_branch", "pairs_time", "pairs_index"} <= row.keys()
        assert row["tokens"] == 7 * 4 * 4 * 16
    assert len({row["executable"] for row in table["cells"]}) == 1


def test_the_plan_as_a_table_shows_every_cell(told, study):
    code, out, err = told(plan, f"--config={study}")
    assert (code, err) == (None, "")
    for ratio in ("0.0", "1.0"):
        for draw in ("fixed1", "1-3"):
            assert f"rope_ratio={ratio},train_branch={draw}" in out
    assert "1 training program to compile" in out


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_exit_code_1(told, tmp_path, study, monkeypatch):
    """Injected where Orbax would raise it; the slow tests fill a real disk."""

    def full(self, step, *arguments, **options):
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write 182 bytes: No space left on device [os_error_code='28']")

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    monkeypatch.setattr(runtime, "stop_requests", lambda: lambda step: False)
    code, _, err = told(main, f"--config={study}", *DOUBLED, f"--workdir={tmp_path / 'work'}")
    assert code == 1 and err.count("\n") == 1, err
    assert "the disk is full" in err and "run the same command again" in err and "finished cells are kept" in err


@pytest.mark.parametrize(
    ("mesh", "rows", "processes", "expected"),
    [
        (dict(data=-1), 4, 1, 4),
        (dict(data=-1), 4, 2, 2),
        (dict(data=-1), 6, 1, 6),
        (dict(data=-1), 7, 1, 7),
        (dict(data=-1), 9, 1, 3),
        (dict(data=-1, tensor=2), 4, 1, 8),
        (dict(data=-1, fsdp=2), 4, 1, 4),
        (dict(data=2, fsdp=2), 4, 1, 4),
        (dict(data=2, fsdp=2), 4, 2, 2),
        (dict(data=2, fsdp=-1), 4, 1, 4),
    ],
)
def test_one_cpu_device_for_each_core_as_far_as_rows_divide(monkeypatch, mesh, rows, processes, expected):
    monkeypatch.setattr(runtime, "cores", lambda: 8)
    config = lab.config.base()
    config.run.mesh.update(mesh)
    assert runtime.cpu_devices(rows, config.run.mesh, processes) == expected


@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor", "context"])
@pytest.mark.parametrize("size", [0, -2])
def test_a_mesh_without_devices_is_left_to_the_checks(axis, size):
    config = lab.config.base()
    config.run.mesh[axis] = size
    assert runtime.cpu_devices(4, config.run.mesh) >= 1


@pytest.mark.parametrize("text", ["{[]: 1}", "(" * 5000, "1 +", "x", "[", "3 ** 3"])
def test_text_that_is_no_tuple_is_refused_in_one_line(text):
    with pytest.raises(
        UserError, match=r"--config\.evaluate\.loss\.branches=.* is no tuple; the default is \(1,\)"
    ) as told:
        overridden("evaluate.loss.branches", text)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("error", "told"), [
    (RuntimeError("Unable to initialize backend 'tqu'\nmore"), r"\(Unable to initialize backend 'tqu'\)"),
    (AssertionError(), r"\(its plugin is not installed\)"),
])  # fmt: skip
def test_devices_that_do_not_open_are_one_line(monkeypatch, error, told):
    def fail():
        raise error

    monkeypatch.setenv("JAX_PLATFORMS", "tqu")
    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(
        UserError, match=rf"^JAX opens no device of JAX_PLATFORMS = tqu {told}; choose cpu, cuda or tpu"
    ):
        runtime.open_devices()
