"""The study that teaches a checkpoint branches: what its cells vary, one run of it on a tiny Qwen, and mistakes."""

import json
import sys

import commands
import decoding
import numpy as np
import pytest
import rehearsed
import tiny

import lab
from lab import command, generate, runtime
from lab.command import load_config
from lab.decode.generate import generate as tokens_of
from lab.errors import UserError
from lab.exchange import importing
from lab.model import lora, parameter
from lab.options import set_field
from lab.storage import read_json
from lab.study.define import start
from lab.study.define.contrasts import select
from lab.study.define.resolve import resolve
from lab.study.open import open

CONFIG = commands.REPOSITORY / "configs" / "branch_finetune.py"
RANK, THETA, STRIDES = 2, 1e6, {2: 128, 6: 1024}  # of the Qwen checkpoint; of the cells that are run
_SHORTER = """\
\"\"\"Do some cells of the study run?\"\"\"

from lab.command import load_config


def get_config():
    config = load_config({config!r} + ":gpu")
    short = lambda cell: tuple((field, 8 if field == "data.text_length" else value) for field, value in cell)
    config.study.cells = tuple(short(config.study.cells[place]) for place in {places})
    config.study.update(seeds=1, judged=(), contrasts=(), hypotheses=())
    config.data.update(corpus="jsonl", path={corpus!r})
    config.model.compute = "float32"
    config.model.lora.rank = {rank}
    config.train.update(steps=4, warmup=1, learning_rate=0.03, final_learning_rate=0.003)
    config.evaluate.loss.update(branches=(1, 4), texts=32, texts_per_row=8, rows=2)
    config.evaluate.plain.update(lengths=(32,), documents=4, rows=2, chunk=16)
    config.run.checkpoint.every = 4
    return config
"""


@pytest.mark.parametrize(("scale", "length", "most"), [("cpu", 32, 64), ("gpu", 256, 32)])
def test_cells_vary_one_thing_at_a_time_and_contrasts_too(scale, length, most):
    config = load_config(f"{CONFIG}:{scale}")
    cells = {cell.name: cell.labels for cell in resolve(config)}
    usual = dict(ratio=0.5, train_branch="1-15", stride=128, unselected="index", slots=0, branch_length=length)
    changed = [{name for name, value in usual.items() if labels[name] != value} for labels in cells.values()]
    together = [{"ratio", "branch_length"}, {"ratio", "train_branch"}]
    assert all(len(names) <= 1 or names in together for names in changed) and set() in changed
    seen = {name: {labels[name] for labels in cells.values()} for name in usual}
    assert seen["ratio"] == {0.0, 0.25, 0.5, 1.0} and seen["stride"] == {64, 128, 256, 1024}
    assert seen["unselected"] == {"index", "time"}
    assert seen["slots"] == {0, most} and max(config.evaluate.loss.branches) == most
    assert seen["branch_length"] == {length // 2, length, 2 * length} and seen["train_branch"] == {"1-15", "fixed1"}
    assert config.model.lora.rank == 8
    for _, plus, minus in config.study.contrasts:
        (one,), (other,) = (select(cells, side) for side in (plus, minus))
        assert sum(cells[one][name] != cells[other][name] for name in usual) == 1
        assert cells[one]["branch_length"] == cells[other]["branch_length"], "the same texts"
    untuned = load_config(f"{CONFIG}:{scale}-untuned")
    assert {cell.name for cell in resolve(untuned)} == {*cells} & {cell.name for cell in resolve(untuned)}
    assert untuned.study.untrained and untuned.model.lora.rank == 0


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A tiny model of the family of :gpu."""
    place = tmp_path_factory.mktemp("qwen")
    source = rehearsed.checkpoint("qwen2.5", place / "theirs", 64)
    importing.from_hf(source, place / "ours", lambda count: None, lambda count: None)
    return place / "ours"


@pytest.fixture(scope="module")
def tuned(imported, tmp_path_factory):
    """{stride: the directory of a cell} of a short run upon it."""
    place = tmp_path_factory.mktemp("tuned")
    texts, study = rehearsed.corpus(place / "texts.jsonl", letters=60_000), place / "shorter.py"
    study.write_text(_SHORTER.format(config=str(CONFIG), places=(*STRIDES,), corpus=str(texts), rank=RANK))
    flags = f"--config={study}", f"--config.checkpoint={imported}", f"--workdir={place / 'run'}"
    commands.finished("main", *flags, log=place / "log", JAX_NUM_CPU_DEVICES="1")
    report = (place / "run" / "report.md").read_text()
    assert "## plain" in report and "## Loss by condition" in report
    cells = read_json(place / "run" / "plan.json")["cells"]
    return {cell["labels"]["stride"]: place / "run" / cell["directory"] for cell in cells}


def values(model) -> dict:
    return {path: np.asarray(v.get_raw_value()) for path, v in parameter.by_parts(model).items()}


@pytest.mark.slow
def test_what_is_no_matrix_keeps_its_bits_and_matrices_move_by_their_rank(tuned, imported):
    begun, base = lab.load(imported)[0], values(lab.load(imported)[0])
    for cell in tuned.values():
        found, moved = values(lab.load(cell)[0]), 0
        for path, variable in parameter.by_parts(begun).items():
            if not lora.is_matrix(variable):
                same = np.array_equal(found[path], base[path])
                assert same or path[-1] == "frequencies", path
                continue
            declared, shape = variable.get_metadata(), base[path].shape
            behind = len(shape) - len(declared["axes"]) + declared["inputs"]  # layers are stacked before the inputs
            change = found[path].astype(float) - base[path]
            flat = change.reshape(*shape[: behind - declared["inputs"]], -1, int(np.prod(shape[behind:])))
            sizes = np.atleast_2d(np.linalg.svd(flat, compute_uv=False))
            assert (sizes[:, RANK - 1] > 1e-4).all() and (sizes[:, RANK:] < 1e-6).all(), path
            moved += 1
        assert moved >= 7


@pytest.mark.slow
def test_a_cell_turns_by_its_stride_over_the_frequencies_of_its_checkpoint(tuned):
    """One pair of two is selected at ratio 0.5, the slower, and turns by the branch."""
    for stride, cell in tuned.items():
        (table,) = (v for path, v in values(lab.load(cell)[0]).items() if path[-1] == "frequencies")
        inverse = THETA ** (-2 * np.arange(2, dtype=np.float64) / 4)
        expected = [[inverse[0], 0], [0, stride * inverse[1]], [0, 0]]
        np.testing.assert_allclose(table.reshape(3, 2), expected, rtol=1e-6)


@pytest.mark.slow
def test_a_tuned_cell_decodes_branches(tuned, monkeypatch, capsys):
    cell = tuned[1024]
    monkeypatch.setattr(runtime, "start_alone", lambda: None)
    flags = ["--prompt", "ab cd", "--branches", "4", "--max-tokens", "6", "--json"]
    monkeypatch.setattr(sys, "argv", ["generate", str(cell), *flags])
    with pytest.raises(SystemExit) as ended:
        command.run(generate.main)
    assert not ended.value.code
    assert [branch["branch"] for branch in json.loads(capsys.readouterr().out)["branches"]] == [1, 2, 3, 4]

    model, tokenizer = lab.load(cell)
    prompt = tokenizer.encode("ab cd").tolist()
    (texts,) = tokens_of(model, [prompt], most_tokens=6, branches=4)
    row, at = decoding.row(prompt, dict(enumerate(texts, 1)), decoding.LENGTH)
    logits = np.asarray(decoding.full_pass()(model, row, at))[0]
    for branch, text in enumerate(texts, 1):
        (places,) = np.nonzero((at.branch[0] == branch) & (at.segment[0] >= 0))
        for place, token in zip(places[:-1], text[1:], strict=True):
            assert logits[place, token] > logits[place].max() - 1e-4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """{position: the directory of a cell} of models of texts of 128 bytes, whose weights were never trained."""
    place, made = tmp_path_factory.mktemp("base"), {}
    for name in ("rope2d", "alibi"):
        config = tiny.config(model__layers=1, model__rule="causal", model__position__name=name)
        config.data.update(text_length=128, texts_per_row=1, draw="fixed1", stagger=False)
        made[name] = tiny.saved(place / name, tiny.model(config), config)
    return made


MISTAKES = {
    "rank": (dict(model__lora__rank=-1), r"model\.lora\.rank = -1 "),
    "alpha": (dict(model__lora__alpha=0.0), r"model\.lora\.alpha = 0\.0 "),
    "ratio": (dict(cell={"model.position.ratio": 1.5}), r"model\.position\.ratio = 1\.5 .*1"),
    "stride": (dict(cell={"model.position.stride": 0}), r"model\.position\.stride = 0 .*at least 1"),
    "slots": (dict(cell={"data.slots": 8}), r"data\.slots = 8 is fewer than the 15 branches of .*at least 15"),
    "row": (dict(cell={"data.draw": "1-31"}), r"data\.texts_per_row = 16 .*'1-31'.*choose a multiple of 32"),
    "no rope": (dict(base="alibi"), r"model\.position\.(ratio|stride) = .* means nothing beside .*'alibi'"),
    "nothing trained": (dict(train__steps=0), r"model\.lora\.rank = 8 means nothing beside train\.steps = 0"),
    "nowhere": (dict(base="nowhere"), r"config\.checkpoint = '.*nowhere'.*bring a plain causal model of texts of 128"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_line(kind, base):
    given, told = MISTAKES[kind]
    config, given = load_config(str(CONFIG)), dict(given)
    config.checkpoint = str(base.get(place := given.pop("base", "rope2d"), base["rope2d"].parent / place))
    own = given.pop("cell", {})
    config.study.cells = tuple(tuple((dict(cell) | own).items()) for cell in config.study.cells[2:3])
    config.study.update(contrasts=(), hypotheses=())
    for name, value in given.items():
        set_field(config, name.replace("__", "."), value)
    with pytest.raises(UserError, match=told) as refused:
        open(config, tuple(name.replace("__", ".") for name in given))
    assert "\n" not in str(refused.value)


def test_without_a_checkpoint_it_is_planned_and_not_run():
    for scale, brings in (("cpu", "configs/branch_finetune.py:cpu-base"), ("gpu", "Qwen2.5 1.5B")):
        config = load_config(f"{CONFIG}:{scale}")
        with pytest.raises(UserError, match=f"config.checkpoint is empty: this study is of .*{brings}") as refused:
            start.check_brought(config)
        assert "\n" not in str(refused.value)
