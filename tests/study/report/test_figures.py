"""What figures draw: names at the ends of lines stay within their panels."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lab.study.report import figures

NAMES = st.lists(st.text("abcdef 12", min_size=1, max_size=24), min_size=1, max_size=4, unique=True)
COUNTS = st.lists(st.sampled_from([1, 2, 4, 8, 64]), min_size=1, max_size=4, unique=True)
DRAWN = {
    "by_condition": lambda curves: figures.by_condition([{"title": curves}], {}, "branches", {}),
    "by_label": lambda curves: figures.by_label([{"title": curves}], "ratio"),
    "learning_curves": lambda curves: figures.learning_curves([{"title": {n: [c] for n, c in curves.items()}}]),
}


@pytest.mark.parametrize("kind", DRAWN)
@given(NAMES, COUNTS)
@settings(max_examples=4)
def test_names_of_lines_stay_in_their_panel(kind, names, counts):
    figure = DRAWN[kind]({name: {x: 2 + 0.1 * i + 0.01 * x for x in counts} for i, name in enumerate(names)})
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for axes in figure.axes:
        for text in axes.texts:
            assert text.get_window_extent(canvas.get_renderer()).x1 <= axes.get_window_extent().x1 + 2, text.get_text()


@pytest.mark.parametrize(
    ("counts", "told"), [((4, 2**20), ["4", "1048576"]), ((0.001, 0.032), ["0.001", "0.032"]), ((0.0, 1.0), ["0", "1"])]
)
def test_ticks_are_the_values_of_a_label(counts, told):
    figure = figures.by_label([{"title": {"name": dict.fromkeys(counts, 2.0)}}], "ratio")
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == told
    assert axes.get_xscale() == ("log" if counts[0] else "linear")
