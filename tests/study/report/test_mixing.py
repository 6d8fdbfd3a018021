"""Learned weights of layers: as a run leaves them, over the seeds of a study, and drawn."""

import io

import commands
import jax
import numpy as np
import pandas as pd
import pytest
import tiny
from studies import write_study
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

from lab import report
from lab.study import results
from lab.study.report import figures, mixing
from lab.study.report.layout import grouped
from lab.study.run import weights
from lab.study.run.events import Writer

METHODS = {"variant": ["baseline", "v2m3", "dense"]}


def square(seed: int, layers: int = 3) -> np.ndarray:
    """Random weights of layers 0..m in layer m."""
    values = np.random.default_rng(seed).normal(size=(layers, layers))
    return np.where(np.tri(layers, dtype=bool), values, np.nan)


def with_embedding(seed: int) -> np.ndarray:
    return np.concatenate([np.random.default_rng(seed).normal(size=(3, 1)), square(seed)], axis=1)


def learned(name: str, seed: int) -> dict:
    return {
        "v2m3": {"softmax(w)": square(seed)},
        "dense": {"alpha": with_embedding(seed), "a, <b>": square(seed + 9)},
    }.get(name, {})


@pytest.fixture
def study(tmp_path):
    """Three cells of two seeds, of which one has no weights and one has not finished its second seed."""
    options = dict(counts=(1,), seeds=2, sections=("mixing", "curves"), skip={("variant=dense", 1)})
    write_study(tmp_path, METHODS, lambda labels, count: 2.0, **options)
    for cell in results.collect(tmp_path).plan["cells"]:
        for seed in cell["seeds"]:
            found = learned(cell["labels"]["variant"], seed)
            if found:
                place = tmp_path / cell["directory"] / f"seed-{seed}"
                place.mkdir(parents=True, exist_ok=True)
                (place / "mixing.csv").write_bytes(weights.table(found))
    return tmp_path


@pytest.mark.parametrize("make", [square, with_embedding])
def test_a_runs_file_holds_every_weight_exactly(make):
    array = make(0)
    frame = pd.read_csv(io.BytesIO(weights.table({"w": array})))
    assert list(frame) == ["name", "layer", "of_layer", "weight"] and set(frame["name"]) == {"w"}
    assert len(frame) == np.isfinite(array).sum()
    for row in frame.to_dict("records"):
        first = array.shape[1] - 3
        column = 0 if row["of_layer"] == "embedding" else first + int(row["of_layer"])
        assert row["weight"] == array[row["layer"], column]


def test_the_study_gathers_the_weights_of_every_finished_seed(study):
    report.rebuild(study)
    content = (study / "mixing.csv").read_bytes()
    frame = pd.read_csv(io.BytesIO(content))
    assert list(frame) == ["cell", "variant", "seed", "name", "layer", "of_layer", "weight"]
    assert set(zip(frame["variant"], frame["seed"], strict=True)) == {("v2m3", 0), ("v2m3", 1), ("dense", 0)}
    row = frame.query("variant == 'v2m3' and seed == 1 and layer == 2 and of_layer == '1'")
    assert row["weight"].item() == square(1)[2, 1]
    report.rebuild(study)
    assert (study / "mixing.csv").read_bytes() == content


def test_the_report_draws_means_over_seeds(study, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "weight_maps", lambda rows: drawn.append(rows) or figures.Figure())
    report.rebuild(study)
    panels = {title: array for row in drawn[0] for title, array in row.items()}
    assert [*panels] == ["variant v2m3: softmax(w)", "variant dense: alpha", "variant dense: a, <b>"]
    np.testing.assert_allclose(panels["variant v2m3: softmax(w)"], (square(0) + square(1)) / 2)
    np.testing.assert_allclose(panels["variant dense: alpha"], with_embedding(0))
    text = (study / "report.md").read_text()
    assert "## Mixing weights" in text and "means over seeds (1 to 2)" in text and "(figures/mixing.png)" in text


def test_twelve_layers_keep_their_order():
    rows = pd.read_csv(io.BytesIO(weights.table({"w": square(3, layers=12)})), dtype=str).astype({"weight": float})
    np.testing.assert_allclose(mixing.mean(rows), square(3, layers=12))


def test_a_study_without_weights_says_so_and_has_no_file(tmp_path):
    write_study(tmp_path, {"variant": ["baseline"]}, lambda labels, count: 2.0, (1,), sections=("mixing",))
    report.rebuild(tmp_path)
    assert "No finished run has learned weights of layers." in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "mixing.csv").exists()


def test_a_heat_map_writes_every_weight_and_names_the_embedding():
    figure = figures.weight_maps([{"alpha": with_embedding(1)}])
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == [f"{w:.2f}" for w in with_embedding(1).flat if np.isfinite(w)]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["emb.", "0", "1", "2"]
    low, high = axes.images[0].get_clim()
    assert -low == high == np.nanmax(np.abs(with_embedding(1)))


def test_tensorboard_shows_the_maps(tmp_path):
    image = figures.png(figures.weight_maps([{"softmax(w)": square(0)}]))
    writer = Writer(tmp_path / "run")
    writer.scalars(199, {"train/loss_nats": 2.0})
    writer.image("mixing", image, "weights")
    writer.close()
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    (event,) = multiplexer.Tensors("run", "mixing")
    assert event.step == 199 and event.tensor_proto.string_val[2] == image


@pytest.mark.parametrize("name", ["v2m3", "v4m6"])
def test_members_of_a_stack_have_weights_of_their_own(name):
    made = tiny.config(model__stream__name=name, model__layers=3)
    models = [tiny.model(made, seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *models)
    together = weights.of_members(stacked.stream, 2)
    for model, found in zip(models, together, strict=True):
        (alone,) = weights.of_members(model.stream, 1)
        assert [*alone] == [*found] == [*model.stream.mixing()]
        for key, array in found.items():
            np.testing.assert_array_equal(array, alone[key])
            np.testing.assert_allclose(array, model.stream.mixing()[key], rtol=1e-6)
    assert any(not np.array_equal(*pair, equal_nan=True) for pair in zip(*(t.values() for t in together), strict=True))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("vmap", ["none", pytest.param("seeds", marks=pytest.mark.whole)])
def test_runs_leave_the_weights_that_they_end_with(tmp_path, vmap):
    """TensorBoard has the map, and the study every seed."""
    corpus = commands.write_corpus(tmp_path / "words.jsonl", texts=400)
    cells = 'chain(named("plain"), named("v2m3", ("model.layers", 2), ("model.stream.name", "v2m3")))'
    options = dict(labels=(("name", "variant"),), sections=("mixing", "curves"), steps=10)
    made = commands.write_study(tmp_path / "made.py", corpus, cells, **options)
    flags = (f"--config={made}", "--config.study.seeds=2", f"--config.study.vmap={vmap}")
    work = tmp_path / "work"
    commands.finished("main", *flags, f"--workdir={work}", log=tmp_path / "log")
    frame = pd.read_csv(work / "mixing.csv")
    assert set(zip(frame["variant"], frame["seed"], strict=True)) == {("v2m3", 0), ("v2m3", 1)}
    moved = frame.query("layer == 1")
    np.testing.assert_allclose(moved.groupby("seed")["weight"].sum(), 1, rtol=1e-6)
    assert len(moved) == 4 and moved["weight"].nunique() == 4 and (abs(moved["weight"] - 0.5) > 1e-5).all()
    for run in commands.runs(work).values():
        multiplexer = EventMultiplexer().AddRunsFromDirectory(str(run))
        multiplexer.Reload()
        tags = [tag for tag in multiplexer.Runs()["tensorboard"]["tensors"] if tag.startswith("mixing")]
        if "v2m3" not in str(run):
            assert not tags
            continue
        curves = [f"mixing softmax(w)/layer {layer} of {of}" for layer, of in ((0, 0), (1, 0), (1, 1))]
        assert sorted(tags) == sorted(["mixing", *curves])
        for tag in curves[1:]:
            start, *_, end = multiplexer.Tensors("tensorboard", tag)
            assert (start.step, end.step) == (0, 10)
            assert start.tensor_proto.float_val[0] == 0.5 != end.tensor_proto.float_val[0]
    assert (work / "figures" / "mixing.png").exists() and "## Mixing weights" in (work / "report.md").read_text()


def test_groups_cut_panels():
    curves = {name: [name] for name in ("baseline", "a", "b")}
    rows = grouped([{"decay 0": curves, "decay 1": curves}], [["first", ["baseline", "a"]], ["second", ["b", "gone"]]])
    panels = {title: [*panel] for row in rows for title, panel in row.items()}
    assert panels == {
        "decay 0, first": ["baseline", "a"], "decay 0, second": ["b"],
        "decay 1, first": ["baseline", "a"], "decay 1, second": ["b"],
    }  # fmt: skip
    assert grouped([{"": curves}], ()) == [{"": curves}]
    assert [*grouped([{"": curves}], [["first", ["a"]]])[0]] == ["first"]


def test_learning_curves_have_perplexity_on_the_right():
    figure = figures.learning_curves([{"": {"a": [{step: 3.0 - 0.01 * step for step in range(100)}]}}])
    figures.png(figure)  # which lays the scales out
    (loss,) = figure.axes
    (right,) = loss.child_axes
    assert right.get_ylabel() == "perplexity"
    np.testing.assert_allclose(right.get_ylim(), np.exp(loss.get_ylim()))
