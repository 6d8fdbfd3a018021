"""Figures to look into: valid for plotly, with the numbers of the study, and none that a browser cannot draw."""

import json
import math

import numpy as np
import plotly.graph_objects
import pytest
from hypothesis import given
from hypothesis import strategies as st
from studies import write_study
from test_verdicts import STUDY, VALUES, loss, noise

from lab.study import results
from lab.study.judge import evidence
from lab.study.judge.trends import Trend
from lab.study.report import figures, live, page, sections

CURVES = st.dictionaries(
    st.text("ab<&$%{}", min_size=1, max_size=4),
    st.dictionaries(st.sampled_from([1, 2, 4, 16]), st.floats(0.1, 20), min_size=1),
    min_size=1,
    max_size=4,
)


def checked(drawn):
    """Its panels, after plotly has looked at every property and JSON at every number."""
    for panel in drawn["panels"]:
        plotly.graph_objects.Figure(panel)
    return json.loads(json.dumps(drawn, allow_nan=False))["panels"]


@given(CURVES)
def test_lines_hold_the_numbers_that_they_are_made_of(curves):
    (panel,) = checked(live.by_condition([{"t": curves}], {"t": {}}, "count", {"t": (1, 4)}))
    assert len(panel["data"]) == len(curves)
    for trace, (name, curve) in zip(panel["data"], curves.items(), strict=True):
        assert dict(zip(trace["x"], trace["y"], strict=True)) == pytest.approx(curve, rel=1e-5)
        assert "<" not in trace["name"] and trace["name"].replace("&lt;", "<").replace("&amp;", "&") == name


def test_deviations_are_error_bars():
    curves, errors = {"a": {1: 2.0, 2: 3.0}, "b": {1: 1.0}}, {"t": {"a": {2: 0.5}}}
    (panel,) = checked(live.by_condition([{"t": curves}], errors, "count", {}))
    assert panel["data"][0]["error_y"]["array"] == [None, 0.5] and "error_y" not in panel["data"][1]


@pytest.mark.parametrize("xs", [(0.0, 0.5, 1.0), ("all", "none", "v")])
def test_lines_over_a_label_keep_its_order(xs):
    curve = dict(zip(xs, (3.0, 1.0, 2.0), strict=True))
    (panel,) = checked(live.by_label([{"": {16: curve}}], "label"))
    assert panel["data"][0]["x"] == list(xs) and panel["data"][0]["y"] == [3.0, 1.0, 2.0]


def test_learning_curves_are_the_means_of_the_picture():
    generator = np.random.default_rng(0)
    seeds = [{step: float(x) for step, x in enumerate(3 + generator.normal(size=900))} for _ in range(3)]
    seeds[1][5] = math.nan
    (panel,) = checked(live.learning_curves([{"": {"a": seeds, "b": seeds[:1]}}]))
    band, line, faint, _ = panel["data"]
    _, steps, smooth = figures.smoothed(seeds)
    means = dict(zip(steps, np.nanmean(smooth, axis=0), strict=True))
    assert len(line["x"]) == live.POINTS and (line["x"][0], line["x"][-1]) == (0, 899)
    assert line["y"] == pytest.approx([means[step] for step in line["x"]], rel=1e-5)
    assert len(band["x"]) == 2 * live.POINTS and band["legendgroup"] == line["legendgroup"] == "a"
    assert faint["y"] == pytest.approx([seeds[0][step] for step in faint["x"]], rel=1e-5)


def test_maps_keep_what_is_missing_missing():
    weights = np.array([[0.5, np.nan], [0.25, -0.75]])
    (panel,) = checked(live.weight_maps([{"w": weights}]))
    assert panel["data"][0]["z"] == [[0.5, None], [0.25, -0.75]] and panel["data"][0]["zmin"] == -0.75
    (panel,) = checked(live.heat_maps([{"": {0.5: {1: 2.0}, 1.0: {1: 3.0, 2: 1.0}}}], "ratio", "count"))
    assert panel["data"][0]["z"] == [[2.0, None], [3.0, 1.0]]


def test_trends_and_costs():
    trend = Trend(np.array([10.0, 20.0]), np.array([[0.1, -0.2], [0.3, -0.4]]))
    (panel,) = checked(live.trends([{"a": trend}]))
    assert panel["data"][1]["y"] == pytest.approx([200.0, -300.0])
    (panel,) = checked(live.pareto({"cache": {"a": (1.0, 2.0), "b": (2.0, 3.0)}}, {"a": "1", "b": "2"}))
    assert panel["data"][0]["x"] == [1.0] and panel["data"][1]["customdata"] == ["a", "b"]


def test_effects_have_the_intervals_of_the_comparisons(tmp_path):
    write_study(tmp_path, VALUES, loss, (1, 16), 4, study=STUDY, noise=noise)
    comparisons = evidence.find(results.collect(tmp_path)).comparisons
    (panel,) = checked(live.effects([(one.name, one) for one in comparisons]))
    found = {}
    for trace in panel["data"]:
        bars = trace["error_x"]
        for y, x, low, high in zip(trace["y"], trace["x"], bars["arrayminus"], bars["array"], strict=True):
            found[y] = trace["name"], x, x - low, x + high
    for place, one in enumerate(comparisons):
        verdict, *bounds = found[place]
        assert verdict == one.verdict
        assert bounds == pytest.approx([one.estimate.mean, *one.estimate.t_interval], abs=1e-5)


def test_what_a_browser_cannot_draw_stays_a_picture():
    many = [{f"panel {number}": {"a": {1: 1.0}} for number in range(live.MOST_PANELS + 1)}]
    assert live.by_condition(many, {}, "x", {}) is None
    long = {name: [dict.fromkeys(range(400), 1.0)] for name in range(110)}
    assert live.learning_curves([{"": long}]) is None


def test_every_figure_of_a_report_can_be_looked_into(tmp_path):
    write_study(tmp_path, VALUES, loss, (1, 16), 2, study=STUDY, noise=noise)
    study = results.collect(tmp_path)
    for findings in (None, evidence.find(study)):
        blocks = [block for part in sections.make(study, findings) for block in part.blocks]
        charts = [block for block in blocks if isinstance(block, page.Chart)]
        assert len(charts) >= 4 and all(checked(chart.live) for chart in charts)


def test_the_script_is_in_a_page_once_and_only_with_a_figure():
    chart = page.Chart("a", b"png", "c", {"panels": [], "logarithmic": False})
    with_figures = page.html("t", [page.Section("s", [chart, chart])])
    assert with_figures.count(page.plotly()) == 1
    for sections_ in ([], [page.Section("s", [page.Chart("a", b"png", "c"), page.Text("x")])]):
        assert "<script" not in page.html("t", sections_)
    shared = page.html("t", [page.Section("s", [chart])], script="../plotly.min.js")
    assert len(shared) < 20_000 and '<script id="plotly" src="../plotly.min.js">' in shared


def test_data_of_a_figure_cannot_leave_its_script():
    chart = page.Chart("a", b"png", "c", {"panels": ["</script><b>"], "logarithmic": False})
    assert "</script><b>" not in page.html("t", [page.Section("s", [chart])], script="x")


def test_a_log_scale_is_offered_of_losses_alone():
    rows = [{"": {"one": {0: -1.0, 1: -2.0}}}]
    assert live.by_label(rows, "rate")["logarithmic"]
    assert not live.by_label(rows, "layer", "log10 of the norm of its gradient")["logarithmic"]
