"""Every config at every scale plans: sizes, cells, programs and rotary pairs, against closed formulas."""

import csv
import functools
import importlib.util
import math

import closed_forms
import commands
import pytest

from lab import data as lab_data
from lab.command import load_config
from lab.errors import UserError
from lab.model.streams import STREAMS
from lab.study.define import plan
from lab.study.define.resolve import resolve

CONFIGS = sorted((commands.REPOSITORY / "configs").glob("*.py"))
RATIOS = {0.0, 0.25, 0.5, 0.75, 1.0}


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


SCALES = [(path, scale) for path in CONFIGS for scale in module(path).SCALES]


# Many parts of one study: those of one scale run always, those of another among the slow tests.
LARGER = [pytest.param("gpu", marks=pytest.mark.whole), pytest.param("paper", marks=pytest.mark.slow)]


@functools.cache
def planned(name: str, scale: str):
    """(config, cells, rows of the plan)"""
    config = load_config(f"{commands.REPOSITORY / 'configs' / name}.py:{scale}")
    cells = resolve(config)
    return config, cells, plan.table(config, cells)


@pytest.mark.matrix("path")
@pytest.mark.parametrize(
    ("path", "scale"),
    [pytest.param(*x, marks=[] if x[1] == "cpu" and "hyper" not in x[0].stem else pytest.mark.slow) for x in SCALES],
    ids=lambda value: getattr(value, "stem", value),
)
def test_every_scale_plans(path, scale):
    config, cells, rows = planned(path.stem, scale)
    assert config.study.name.startswith(path.stem)
    assert [row["name"] for row in rows] == [cell.name for cell in cells]
    for cell, row in zip(cells, rows, strict=True):
        model, data, train = cell.config.model, cell.config.data, cell.config.train
        if "rope_ratio" in dict(config.study.labels).values():
            assert (
                model.mixer.heads * model.mixer.head_dim == model.dim and model.mixer.heads == 4 * model.mixer.kv_heads
            )
        matrices, vectors = closed_forms.parameters(model)
        assert row["parameters"] == matrices + vectors
        assert row["parameters_non_embedding"] == matrices + vectors - closed_forms.embeddings(model)
        assert row["tokens"] == train.steps * data.rows * data.texts_per_row * data.text_length
        cached = [closed_forms.cache(layer) for layer in closed_forms.layers(model)]
        cached.append(closed_forms.stream_cache(model))
        assert row["cache_per_token_per_layer"] == pytest.approx(sum(cached) / model.layers)
        # 6 for each weight that multiplies, one embedding among them, and attention on top of it.
        multiplying = matrices - closed_forms.embeddings(model) + model.vocabulary * model.dim
        whole = row["parameters_trained"] == row["parameters"]
        assert (6 if whole else 4) * multiplying < row["train_flops_per_token"]
        if row["state_per_layer"] == 0:
            visible = data.texts_per_row * data.text_length
            attended = model.layers * row["attention_work"] * visible + closed_forms.stream_work(model, visible)
            attended += closed_forms.distance_work(model)
            assert row["train_flops_per_token"] <= 6 * (multiplying + attended)
        check_rotary_pairs(cell, row)


def check_rotary_pairs(cell, row):
    """n = round(F ratio) selected pairs, the even ones for the branch, the odd ones for the time; others for the index,
    or in one cell for the time."""
    rotary = cell.config.model.position
    pairs = (rotary.dim or cell.config.model.mixer.head_dim) // 2
    selected = round(pairs * rotary.ratio)
    others = min(pairs - selected, math.floor(pairs * rotary.share))
    assert rotary.unselected == "index" or cell.labels == {"model": "own branch, by time"}
    assert row["head_dim"] == cell.config.model.mixer.head_dim
    still = not any(spec.position.name in closed_forms.ROTATING for spec in closed_forms.layers(cell.config.model))
    if still or cell.config.model.mixer.rotate in ("none", "v", "o", "vo") or cell.config.model.mixer.name == "delta":
        assert row["pairs_branch"] == row["pairs_time"] == row["pairs_index"] == 0
        return
    assert row["pairs_branch"] == math.ceil(selected / 2)
    assert row["pairs_time"] == selected // 2 + others * (rotary.unselected == "time")
    assert row["pairs_index"] == others * (rotary.unselected == "index")


def test_rope_ablation_is_ten_cells_of_one_program():
    config, cells, rows = planned("rope_ablation", "cpu")
    assert len(cells) == 10 and config.study.seeds == 3
    assert {(c.config.model.position.ratio, c.config.data.draw) for c in cells} == {
        (ratio, draw) for ratio in RATIOS for draw in ("fixed1", "1-15")
    }
    assert tuple(config.evaluate.loss.branches) == (1, 2, 4, 8, 16, 32, 64)
    assert len({row["executable"] for row in rows}) == 1


def test_rope_ablation_on_a_gpu_gives_the_published_rows():
    config, cells, rows = planned("rope_ablation", "gpu")
    published = (commands.REPOSITORY / config.study.published).read_text().splitlines()[1:]
    ours = {
        (c.config.model.position.ratio, c.config.data.draw, n) for c in cells for n in config.evaluate.loss.branches
    }
    theirs = {tuple(line.split(",")[:3]) for line in published}
    assert len(ours) == len(theirs) == 140
    assert ours == {(float(ratio), draw, int(count)) for ratio, draw, count in theirs}
    assert {round(row["parameters"] / 1e6, 1) for row in rows} == {25.8}
    assert len({row["executable"] for row in rows}) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "millions"), [("gpu", 25.8), ("paper", 272.4)])
def test_head_dim_cells_have_the_published_size_whatever_their_heads(scale, millions):
    _, cells, rows = planned("head_dim_ablation", scale)
    assert {cell.config.model.mixer.heads for cell in cells} == {8, 16, 32}
    assert len({row["parameters"] for row in rows}) == 1
    assert round(rows[0]["parameters"] / 1e6, 1) == millions


@pytest.mark.slow
def test_a_billion_parameters_with_heads_of_128():
    rows = planned("head_dim_ablation", "1b")[2]
    assert {row["head_dim"] for row in rows} == {128, 64, 32}
    assert all(0.95e9 < row["parameters"] < 1.15e9 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["cpu", *LARGER, "1b"])
def test_head_dim_ablation_is_thirty_cells_and_one_program_for_each_head_shape(scale):
    _, cells, rows = planned("head_dim_ablation", scale)
    assert len(cells) == 30
    programs = {}
    for cell, row in zip(cells, rows, strict=True):
        programs.setdefault(row["head_dim"], set()).add(row["executable"])
        assert cell.labels["head"] == f"h{cell.config.model.mixer.heads}"
    assert len(programs) == 3 and all(len(names) == 1 for names in programs.values())
    assert len(set.union(*programs.values())) == 3


@pytest.mark.parametrize(("scale", "millions"), [("gpu", 25.8), ("paper", 931)])
def test_muon_ablation_compares_optimizers_of_one_model(scale, millions):
    config, cells, rows = planned("muon_ablation", scale)
    assert {round(row["parameters"] / 1e6, 1 if millions < 100 else 0) for row in rows} == {millions}
    assert [cell.config.train.optimizer for cell in cells] == ["adamw"] + ["muon"] * 5
    assert len({row["executable"] for row in rows}) == 6
    assert {cell.config.train.muon.adam_decay for cell in cells[1:]} == {cells[0].config.train.weight_decay}
    # At the rate at which a square matrix moves as under Moonlight's scaling, decay and AdamW's rate are the same too.
    plain, *_, jordan, mup = (cell.config for cell in cells)
    for other in (jordan, mup):
        times = 0.2 * other.model.dim**0.5
        assert other.train.muon.adam_rate * times == pytest.approx(1)
        assert other.train.weight_decay * times == pytest.approx(plain.train.weight_decay)
    assert config.study.tune_seed not in range(config.seed, config.seed + config.study.seeds)


def published_series() -> list[dict]:
    return list(
        csv.DictReader((commands.REPOSITORY / "configs/published/attention_series.csv").read_text().splitlines())
    )


@pytest.mark.parametrize("theirs", published_series(), ids=lambda row: row["variant"])
def test_the_attention_series_has_the_published_sizes_and_caches(theirs):
    """Totals to the million that was published; embeddings of 326.9M, as fitted."""
    rows = {row["labels"]["variant"]: row for row in planned("attention_ablation", "paper")[2]}
    ours = rows[theirs["variant"]]
    assert round(ours["parameters"] / 1e6) == int(theirs["parameters_millions"])
    assert ours["cache_per_token_per_layer"] == int(theirs["cache_per_token_per_layer"])
    assert round((ours["parameters"] - ours["parameters_non_embedding"]) / 1e6, 1) == 326.9


def test_attention_work_and_the_cache_over_devices_of_the_series():
    rows = {row["labels"]["variant"]: row for row in planned("attention_ablation", "paper")[2]}
    assert len(rows) == len(published_series()) == 18
    work = {"MHA": 4096, "GQA2-128": 4096, "GQA4-(64+64)-S2": 4096, "MLA": 5120, "GQA2-192": 6144,
            "GQA4-(128+64)-S2": 6144, "GQA1-256": 8192, "MLA-256": 8192, "GQA1-(512+64)-S3": 17408}  # fmt: skip
    assert {name: rows[name]["attention_work"] for name in work} == work
    held = {name: tuple(rows[name]["cache_per_device"].values()) for name in rows}
    assert held["MHA"] == (4096, 2048, 1024, 512)
    assert held["GQA2-(192+64)-S2"] == held["GQA2-128"] == (512, 256, 256, 256)
    assert held["MLA"] == held["GQA1-(512+64)-S3"] == (576,) * 4
    assert held["GQA4-(64+64)-S2"] == (512, 256, 128, 128)
    assert rows["MLA"]["cache_copies"]["8"] == 8 and rows["GQA2-128"]["cache_copies"] == {
        "1": 1,
        "2": 1,
        "4": 2,
        "8": 4,
    }


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["cpu", *(pytest.param(each, marks=pytest.mark.whole) for each in ("gpu", "paper"))])
def test_parts_of_the_attention_study_are_matched_as_they_say(scale):
    rows = planned("attention_ablation", f"{scale}-flops")[2]
    assert all(abs(match["residual"]) < 1e-3 for row in rows for match in row["match"]) and len(rows) == 15
    rows = planned("attention_ablation", f"{scale}-beyond-flops")[2]
    assert all(abs(match["residual"]) < 2e-3 for row in rows for match in row["match"]) and len(rows) == 12
    rows = planned("attention_ablation", f"{scale}-factorial")[2]
    assert len({(row["cache_per_token_per_layer"], row["parameters"]) for row in rows}) == 1 < len(rows) == 4
    assert len({row["labels"]["variant"] for row in planned("attention_ablation", f"{scale}-rotate")[2]}) == 16


RESIDUAL = "residual_ablation"
PARTS = ("v1", "v2", "v3", "v4", "sanity", "beyond", "confirm")


def published_losses() -> dict[str, float]:
    text = (commands.REPOSITORY / "configs/published/residual_series.csv").read_text()
    return {row["method"]: float(row["loss"]) for row in csv.DictReader(text.splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["cpu", *LARGER])
def test_parts_of_the_residual_study_are_every_stream_and_match_on_steps_and_batch(scale):
    found = set()
    for part in PARTS:
        config, cells, rows = planned(RESIDUAL, f"{scale}-{part}")
        found |= {cell.config.model.stream.name for cell in cells}
        assert len({row["tokens"] for row in rows}) == 1
        assert len({(cell.config.train.steps, cell.config.data.rows) for cell in cells}) == 1
        version = {name for name in STREAMS if name.startswith(part)}
        assert version <= {cell.config.model.stream.name for cell in cells}
        drawn = {name for _, names in config.study.groups for name in names}
        assert not drawn or drawn == {cell.labels["method"] for cell in cells}
    assert found == {*STREAMS} - {"parallel", "parallel-two"}  # where sublayers read, not what streams combine


@pytest.mark.parametrize("scale", LARGER)
def test_the_residual_study_has_the_published_size(scale):
    rows = {row["labels"]["method"]: row for row in planned(RESIDUAL, f"{scale}-v4")[2]}
    assert round(rows["baseline"]["parameters"] / 1e6, 2) == 51.65
    assert rows["v4m1D"]["parameters"] - rows["baseline"]["parameters"] == 22_768


@pytest.mark.slow
def test_the_published_part_of_the_residual_study_is_what_the_source_ran_and_the_corrected_cells():
    for part in ("v1", "v2", "v3", "v4", "confirm"):
        _, cells, rows = planned(RESIDUAL, f"paper-{part}")
        assert {round(row["tokens"] / 1e6) for row in rows} == {696}
        methods = {cell.labels["method"] for cell in cells}
        assert {(m, d) for m in methods for d in ("all", "declared")} == {tuple(c.labels.values()) for c in cells}
        for cell in cells:
            source, stream = cell.config.train.decay == "all", cell.config.model.stream
            post = source and stream.name in ("v1m1", "v1m2", "v1m4", "v1m5", "v1m6", "v1m7")
            assert stream.accumulate == ("post" if post else "raw")
            assert stream.input == ("normed" if source and stream.name in ("v4m1D", "v4m1E", "v4mD") else "raw")


@pytest.mark.slow
def test_the_residual_study_confirms_the_six_best_of_the_published_losses():
    losses = published_losses()
    better = sorted((name for name in losses if losses[name] < losses["baseline"]), key=losses.get)
    config, cells, _ = planned(RESIDUAL, "cpu-confirm")
    assert [cell.labels["method"] for cell in cells] == ["baseline", *better[:6]] and config.study.seeds >= 8
    parts = {cell.labels["method"] for part in PARTS for cell in planned(RESIDUAL, f"cpu-{part}")[1]}
    assert {*losses} <= parts and len(losses) == 22
    halved = next(c for c in planned(RESIDUAL, "cpu-v4")[1] if c.labels["method"] == "temperature 2").config.model
    assert halved.mixer.softmax_scale == 0.5 * halved.mixer.head_dim**-0.5


def test_groups_of_curves_that_name_nothing_are_refused():
    config = load_config(str(commands.REPOSITORY / "configs" / "rope_ablation.py"))
    config.study.groups = (("some", (0.5, 0.6)),)
    with pytest.raises(UserError, match=r"study\.groups 'some' = 0\.6 is unknown .*choose one of: 0\.0, .*0\.5"):
        plan.table(config, resolve(config))


def test_the_control_is_one_override_away():
    config = load_config(str(commands.REPOSITORY / "configs" / "rope_ablation.py"))
    config.model.position.unselected = "time"
    for row in plan.table(config, resolve(config, ("model.position.unselected",))):
        assert row["pairs_index"] == 0 and row["pairs_branch"] + row["pairs_time"] == row["head_dim"] // 2


def test_muon_is_refused_for_a_parameter_without_a_matrix():
    config = load_config(str(commands.REPOSITORY / "configs" / "muon_ablation.py"))
    config.train.muon.on = ("q", "embedding")
    with pytest.raises(UserError, match=r"train\.muon\.on = 'embedding' has no matrix; choose one of: down, gate"):
        plan.table(config, resolve(config, ("train.muon.on",)))


@pytest.mark.parametrize("path", [path for path, scale in SCALES if scale == "paper"], ids=lambda path: path.stem)
def test_the_published_setting_is_refused_without_its_data(path):
    config = load_config(f"{path}:paper")
    epochs = {"residual_ablation": 5}.get(path.stem, 1)
    assert epochs * config.data.texts == config.train.steps * config.data.rows * config.data.texts_per_row
    if "rope_ratio" in dict(config.study.labels).values():
        assert config.data.texts == 1_024_000 and 190_000 < config.evaluate.loss.texts <= 200_000
    with pytest.raises(
        UserError, match=f"{config.data.texts} training and {config.evaluate.loss.texts} validation texts"
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
        assert all(part in text for part in [f":{scale.split('-')[0]}", *scale.split("-")[1:]])
    assert load_config(str(path)).study.question.endswith("?")
