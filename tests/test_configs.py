"""Every config at every scale plans: sizes, cells, programs and rotary pairs, against closed formulas."""

import functools
import importlib.util
import math

import commands
import pytest

from lab import data as lab_data
from lab.command import load_config
from lab.errors import UserError
from lab.study import plan
from lab.study.cells import resolve

CONFIGS = sorted((commands.REPOSITORY / "configs").glob("*.py"))
RATIOS = {0.0, 0.25, 0.5, 0.75, 1.0}


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


SCALES = [(path, scale) for path in CONFIGS for scale in module(path).SCALES]


@functools.cache
def planned(name: str, scale: str):
    """(config, cells, rows of the plan)"""
    config = load_config(f"{commands.REPOSITORY / 'configs' / name}.py:{scale}")
    cells = resolve(config)
    return config, cells, plan.table(config, cells)


def parameters(model) -> int:
    """Embeddings (tied), final norm, and for each layer q, k, v, o, three matrices of SwiGLU and two norms."""
    attention = model.dim * model.head_dim * 2 * (model.heads + model.kv_heads)
    return (
        model.vocabulary * model.dim
        + model.dim
        + model.layers * (attention + 3 * model.dim * model.ffn + 2 * model.dim)
    )


@pytest.mark.parametrize(("path", "scale"), SCALES, ids=lambda value: getattr(value, "stem", value))
def test_every_scale_plans(path, scale):
    config, cells, rows = planned(path.stem, scale)
    assert config.study.name == path.stem
    assert [row["name"] for row in rows] == [cell.name for cell in cells]
    for cell, row in zip(cells, rows, strict=True):
        model, data, train = cell.config.model, cell.config.data, cell.config.train
        assert model.heads * model.head_dim == model.dim
        assert model.heads == 4 * model.kv_heads or "branches" not in config.study.sections
        assert row["parameters"] == parameters(model)
        assert row["parameters_non_embedding"] == parameters(model) - model.vocabulary * model.dim
        assert row["tokens"] == train.steps * data.rows * data.texts_per_row * data.text_length
        assert row["cache_per_token_per_layer"] == 2 * model.kv_heads * model.head_dim
        # 6 for each weight that multiplies, the tied embedding among them, and attention on top of it.
        matrices = row["parameters"] - model.dim * (1 + 2 * model.layers)
        assert 6 * matrices < row["train_flops_per_token"]
        visible = data.texts_per_row * data.text_length
        assert row["train_flops_per_token"] <= 6 * matrices + 12 * model.layers * model.dim * visible


@pytest.mark.parametrize(("path", "scale"), SCALES, ids=lambda value: getattr(value, "stem", value))
def test_rotary_pairs_follow_the_ratio(path, scale):
    """n = round(F ratio) selected pairs, the even ones for the branch, the odd ones for the time."""
    for cell, row in zip(*planned(path.stem, scale)[1:], strict=True):
        pairs, rotary = cell.config.model.head_dim // 2, cell.config.model.rotary
        selected = round(pairs * rotary.ratio)
        assert rotary.unselected == "index"
        assert row["head_dim"] == 2 * pairs
        assert row["pairs_branch"] == math.ceil(selected / 2)
        assert row["pairs_time"] == selected // 2
        assert row["pairs_index"] == pairs - selected


def test_rope_ablation_is_ten_cells_of_one_program():
    config, cells, rows = planned("rope_ablation", "cpu")
    assert len(cells) == 10 and config.study.seeds == 1
    assert {(c.config.model.rotary.ratio, c.config.data.draw) for c in cells} == {
        (ratio, draw) for ratio in RATIOS for draw in ("fixed1", "1-15")
    }
    assert tuple(config.evaluate.branches) == (1, 2, 4, 8, 16, 24, 32, 48, 64)
    assert len({row["executable"] for row in rows}) == 1


def test_rope_ablation_on_a_gpu_gives_the_published_rows():
    config, cells, rows = planned("rope_ablation", "gpu")
    published = (commands.REPOSITORY / config.study.published).read_text().splitlines()[1:]
    ours = {(c.config.model.rotary.ratio, c.config.data.draw, n) for c in cells for n in config.evaluate.branches}
    theirs = {tuple(line.split(",")[:3]) for line in published}
    assert len(ours) == len(theirs) == 140
    assert ours == {(float(ratio), draw, int(count)) for ratio, draw, count in theirs}
    assert {round(row["parameters"] / 1e6, 1) for row in rows} == {25.8}
    assert len({row["executable"] for row in rows}) == 1


@pytest.mark.parametrize(("scale", "millions"), [("gpu", 25.8), ("paper", 272.4)])
def test_head_dim_cells_have_the_published_size_whatever_their_heads(scale, millions):
    _, cells, rows = planned("head_dim_ablation", scale)
    assert {cell.config.model.heads for cell in cells} == {8, 16, 32}
    assert len({row["parameters"] for row in rows}) == 1
    assert round(rows[0]["parameters"] / 1e6, 1) == millions


def test_a_billion_parameters_with_heads_of_128():
    rows = planned("head_dim_ablation", "1b")[2]
    assert {row["head_dim"] for row in rows} == {128, 64, 32}
    assert all(0.95e9 < row["parameters"] < 1.15e9 for row in rows)


@pytest.mark.parametrize("scale", ["cpu", "gpu", "paper", "1b"])
def test_head_dim_ablation_is_thirty_cells_and_one_program_for_each_head_shape(scale):
    _, cells, rows = planned("head_dim_ablation", scale)
    assert len(cells) == 30
    programs = {}
    for cell, row in zip(cells, rows, strict=True):
        programs.setdefault(row["head_dim"], set()).add(row["executable"])
        assert cell.labels["head"] == f"h{cell.config.model.heads}"
    assert len(programs) == 3 and all(len(names) == 1 for names in programs.values())
    assert len(set.union(*programs.values())) == 3


@pytest.mark.parametrize(("scale", "millions"), [("gpu", 25.8), ("paper", 931)])
def test_muon_ablation_compares_optimizers_of_one_model(scale, millions):
    config, cells, rows = planned("muon_ablation", scale)
    assert {round(row["parameters"] / 1e6, 1 if millions < 100 else 0) for row in rows} == {millions}
    assert [cell.config.train.optimizer for cell in cells] == ["adamw"] + ["muon"] * 5
    assert len({row["executable"] for row in rows}) == 6
    assert {cell.config.train.muon.adam_decay for cell in cells} == {cells[0].config.train.weight_decay}
    # At the rate at which a square matrix moves as under Moonlight's scaling, decay and AdamW's rate are the same too.
    plain, *_, jordan, mup = (cell.config for cell in cells)
    for other in (jordan, mup):
        times = 0.2 * other.model.dim**0.5
        assert other.train.muon.adam_rate * times == pytest.approx(1)
        assert other.train.weight_decay * times == pytest.approx(plain.train.weight_decay)
    assert config.study.tune_seed not in range(config.seed, config.seed + config.study.seeds)


def test_the_control_is_one_override_away():
    config = load_config(str(commands.REPOSITORY / "configs" / "rope_ablation.py"))
    config.model.rotary.unselected = "time"
    for row in plan.table(config, resolve(config, ("model.rotary.unselected",))):
        assert row["pairs_index"] == 0 and row["pairs_branch"] + row["pairs_time"] == row["head_dim"] // 2


def test_muon_is_refused_for_a_parameter_without_a_matrix():
    config = load_config(str(commands.REPOSITORY / "configs" / "muon_ablation.py"))
    config.train.muon.on = ("q", "embedding")
    with pytest.raises(UserError, match=r"train\.muon\.on = 'embedding' has no matrix; choose one of: down, gate"):
        plan.table(config, resolve(config, ("train.muon.on",)))


@pytest.mark.parametrize("path", [path for path, scale in SCALES if scale == "paper"], ids=lambda path: path.stem)
def test_the_published_setting_is_refused_without_its_data(path):
    config = load_config(f"{path}:paper")
    assert config.data.texts == config.train.steps * config.data.rows * config.data.texts_per_row  # one epoch
    if config.study.published:
        assert config.data.texts == 1_024_000 and 190_000 < config.evaluate.texts <= 200_000
    with pytest.raises(
        UserError, match=f"{config.data.texts} training and {config.evaluate.texts} validation texts"
    ) as told:
        lab_data.open(config)
    assert "--config.data.path" in str(told.value)


def test_the_published_setting_is_refused_with_too_little_data(tmp_path):
    config = load_config(f"{commands.REPOSITORY / 'configs' / 'rope_ablation.py'}:paper")
    config.data.path = str(commands.write_corpus(tmp_path / "few.jsonl"))
    config.data.tokenizer, config.model.vocabulary = "bytes", 258
    with pytest.raises(UserError, match=r"gives 1\d\d\d training texts, fewer than data\.texts = 1024000"):
        lab_data.open(config)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_opens_with_its_question_and_names_its_command(path):
    text = module(path).__doc__
    question = text.splitlines()[0]
    assert question.endswith("?") and len(question) > 20
    assert f"python -m lab.main --config=configs/{path.name}" in text
    for scale in module(path).SCALES:
        assert f":{scale}" in text
    assert load_config(str(path)).study.question.endswith("?")
