"""The figures of the page as plotly draws them: values under the pointer, lines switched off in the legend.

Each function takes what its namesake in `figures` takes, and gives the panels of one figure as plain data
(https://plotly.com/javascript/reference): the page places as many beside each other as fit, and plotly's Python package
is read for its script alone. None of a figure with more panels or points than a browser draws while one waits: its
picture has to do.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from matplotlib.colors import to_hex

from lab.study.judge.evidence import UNKNOWN, Comparison
from lab.study.judge.trends import Trend
from lab.study.measure import MEASURES, NATS, Measure
from lab.study.report.figures import EFFECT, Curves, beaten, colours, smoothed

MOST_PANELS, MOST_POINTS = 36, 60_000  # of a figure
POINTS = 300  # of a learning curve
SYMBOLS = ("circle", "square", "diamond", "triangle-down", "triangle-up", "cross", "x", "star")
GREY = "#737373"
EFFECTS = EFFECT | {UNKNOWN: GREY}
SHADE = "rgba(27, 108, 168, 0.2)"  # of an interval
SIGNED = [[0, "#b2182b"], [0.5, "#f7f7f7"], [1, "#2166ac"]]  # red is negative
NAMED = 42  # letters of a comparison beside its row

LOSSES = {measure.title for measure in MEASURES.values()}  # of axes that may be drawn on a log scale
Live = dict  # {"panels": [{"data": [...], "layout": {...}}, ...], "logarithmic": whether a log scale of y is offered}


def by_condition(
    rows: Sequence[Mapping[str, Curves]],
    errors: Mapping[str, Curves],
    axis: str,
    trained: Mapping,
    measure: Measure = NATS,
):
    """See figures.by_condition."""

    def panel(title: str, curves: Curves) -> dict:
        ticks = sorted({x for curve in curves.values() for x in curve})
        across = _titled(axis) | {"type": "log", "tickvals": ticks, "ticktext": list(map(str, ticks))}
        layout = {}
        if title in trained:
            low, high = trained[title]
            shade = dict(type="rect", yref="paper", y0=0, y1=1, fillcolor="#ededed", line={"width": 0}, layer="below")
            layout["shapes"] = [shade | {"x0": low / 1.03, "x1": high * 1.03}]
        return _panel(title, _lines(curves, errors.get(title, {}), axis), across, _titled(measure.title), **layout)

    return _figure(rows, panel)


def by_label(rows: Sequence[Mapping[str, Curves]], axis: str, vertical: str = NATS.title) -> Live | None:
    """See figures.by_label."""

    def panel(title: str, curves: Curves) -> dict:
        ticks = list(dict.fromkeys(x for curve in curves.values() for x in curve))
        numeric = all(isinstance(x, (int, float)) for x in ticks)
        kind = {"tickvals": ticks} if numeric else {"type": "category", "categoryarray": list(map(_text, ticks))}
        return _panel(title, _lines(curves, {}, axis), _titled(axis) | kind, _titled(vertical))

    return _figure(rows, panel, logarithmic=vertical in LOSSES)


def heat_maps(
    rows: Sequence[Mapping[str, Curves]], vertical: str, horizontal: str, written: str = ".2f"
) -> Live | None:
    """See figures.heat_maps."""
    every = [y for row in rows for curves in row.values() for curve in curves.values() for y in curve.values()]

    def panel(title: str, curves: Curves) -> dict:
        xs = sorted({x for curve in curves.values() for x in curve})
        table = [[_number(curve.get(x, math.nan)) for x in xs] for curve in curves.values()]
        told = f"{_text(vertical)} %{{y}}, {_text(horizontal)} %{{x}}: %{{z:.4{written[-1]}}}<extra></extra>"
        scale = {"colorscale": "Viridis", "zmin": min(every), "zmax": max(every), "texttemplate": f"%{{z:{written}}}"}
        return _map(title, table, xs, list(curves), told, horizontal, vertical, **scale)

    return _figure(rows, panel, logarithmic=False)


def weight_maps(rows: Sequence[Mapping[str, np.ndarray]]) -> Live | None:
    """See figures.weight_maps."""

    def panel(title: str, weights: np.ndarray) -> dict:
        layers, columns = weights.shape
        reach = float(np.nanmax(np.abs(weights))) or 1.0
        table = [[_number(weight) for weight in row] for row in weights.tolist()]
        of = [*["emb."] * (columns - layers), *range(layers)]
        told = "in layer %{y}, of layer %{x}: %{z:.3f}<extra></extra>"
        scale = {"colorscale": SIGNED, "zmin": -reach, "zmax": reach}
        return _map(title, table, of, list(range(layers)), told, "of layer", "in layer", **scale)

    return _figure(rows, panel, logarithmic=False)


def learning_curves(
    rows: Sequence[Mapping[str, Mapping[object, Sequence[Mapping[float, float]]]]], measure: Measure = NATS
) -> Live | None:
    """See figures.learning_curves; of a long one every n-th point."""

    def panel(title: str, curves: Mapping) -> dict:
        data, shown = [], []
        for name, colour in colours(curves).items():
            finite, steps, smooth = smoothed(curves[name])
            if steps:
                data += _learning_curve(_text(name), to_hex(colour), finite, steps, smooth)
                shown += [value for value in smooth[:, len(steps) // 10 :].flat if math.isfinite(value)]
        low, high = (min(shown), max(shown)) if shown else (0.0, 1.0)
        pad = 0.05 * (high - low) or 0.1
        down = _titled(f"training {measure.title}") | {"range": [_number(low - pad), _number(high + pad)]}
        return _panel(title, data, _titled("optimizer step"), down)

    return _figure(rows, panel)


def trends(rows: Sequence[Mapping[str, Trend]]) -> Live | None:
    """See figures.trends."""

    def panel(title: str, trend: Trend) -> dict:
        tokens, mean = trend.tokens.tolist(), 1000 * trend.mean
        half = np.zeros_like(mean) if trend.half is None else 1000 * trend.half
        told = "%{x:.3s} tokens: %{y:+.2f}<extra></extra>"
        line = {"x": tokens, "y": _numbers(mean), "line": {"color": EFFECT["better"]}, "hovertemplate": told}
        late = (np.abs(mean) + half)[len(mean) // 10 :]
        reach = 1.1 * max(float(np.max(late)), 1e-3)
        down = _titled(f"difference (0.001 {trend.measure.unit})") | {"range": [-reach, reach], "zeroline": True}
        return _panel(title, [_band(tokens, mean - half, mean + half, SHADE), line], _titled("tokens seen"), down)

    return _figure(rows, panel, logarithmic=False)


def effects(comparisons: Sequence[tuple[str, Comparison]]) -> Live | None:
    """See figures.effects."""
    data = []
    for verdict, colour in EFFECTS.items():
        chosen = [
            (place, name, one.estimate)
            for place, (name, one) in enumerate(comparisons)
            if (one.verdict if one.verdict in EFFECT else UNKNOWN) == verdict and one.estimate.mean is not None
        ]
        bounds = [known.t_interval or (known.mean, known.mean) for _, _, known in chosen]
        means = [known.mean for _, _, known in chosen]
        data += [{
            "name": verdict,
            "x": _numbers(means),
            "y": [place for place, _, _ in chosen],
            "text": [_text(name) for _, name, _ in chosen],
            "customdata": [f"[{low:+.4f}, {high:+.4f}]" if low < high else "no interval" for low, high in bounds],
            "error_x": {
                "array": _numbers(high - mean for mean, (_, high) in zip(means, bounds, strict=True)),
                "arrayminus": _numbers(mean - low for mean, (low, _) in zip(means, bounds, strict=True)),
                "symmetric": False,
            },
            "mode": "markers",
            "marker": {"color": colour},
            "hovertemplate": "%{text}: %{x:+.4f}<br>%{customdata}<extra></extra>",
        }] if chosen else []  # fmt: skip
    names = [_text(name if len(name) <= NAMED else name[: NAMED - 1] + "…") for name, _ in comparisons]
    down = {"tickvals": list(range(len(names))), "ticktext": names, "tickfont": {"size": 10}}
    down["range"] = [len(names) - 0.4, -0.6]
    title = comparisons[0][1].differences.measure.title
    across = _titled(f"difference of {title}; left of 0 is better") | {"zeroline": True}
    height = 120 + 18 * len(names)
    return _figure([{"": data}], lambda title, data: _panel(title, data, across, down, height=height), False)


def pareto(
    panels: Mapping[str, Mapping[str, tuple[float, float]]], numbers: Mapping[str, str], measure: Measure = NATS
) -> Live | None:
    """See figures.pareto; under the names that the pointer shows, with their `numbers` in the figure."""

    def panel(title: str, points: Mapping[str, tuple[float, float]]) -> dict:
        front = {name for name, point in points.items() if not beaten(*point, points.values())}
        best = sorted(points[name] for name in front)
        joined = {"x": [x for x, _ in best], "y": [y for _, y in best], "hoverinfo": "skip"}
        joined |= {"mode": "lines", "line": {"color": "#bfbfbf"}}
        every = {
            "x": [x for x, _ in points.values()],
            "y": _numbers(y for _, y in points.values()),
            "text": [numbers[name] for name in points],
            "customdata": list(map(_text, points)),
            "mode": "markers+text",
            "textposition": "top right",
            "marker": {"color": [EFFECT["better"] if name in front else GREY for name in points]},
            "hovertemplate": "%{customdata}: %{y:.4f} at %{x:.4s}<extra></extra>",
        }
        return _panel("", [joined, every], _titled(title), _titled(measure.title), legend=False)

    return _figure([panels], panel)


def ladder(panels: Mapping[str, tuple[Curves, Curves]], vertical: str = NATS.title) -> Live | None:
    """See figures.ladder."""

    def panel(title: str, both: tuple[Curves, Curves]) -> dict:
        points, laws = both
        data = _lines(points, {}, title)
        for trace, name in zip(data, (name for name in points if points[name]), strict=True):
            trace |= {"mode": "markers", "marker": trace["marker"] | trace["line"], "legendgroup": _text(name)}
            if line := sorted(laws.get(name, {}).items()):
                law = {"x": [x for x, _ in line], "y": _numbers(y for _, y in line), "line": trace["line"]}
                data = [*data, law | {"mode": "lines", "hoverinfo": "skip", "showlegend": False, "name": _text(name)}]
                data[-1]["legendgroup"] = _text(name)
        return _panel("", data, _titled(title) | {"type": "log"}, _titled(vertical))

    return _figure([panels], panel)


def _figure(rows: Iterable[Mapping], panel: Callable[[str, object], dict], logarithmic: bool = True) -> Live | None:
    panels = [panel(title, content) for row in rows for title, content in row.items()]
    points = sum(len(trace.get("y", ())) for one in panels for trace in one["data"])
    fits = len(panels) <= MOST_PANELS and points <= MOST_POINTS
    return {"panels": panels, "logarithmic": logarithmic} if fits else None


def _panel(
    title: str, data: list[dict], across: dict, down: dict, legend: bool = True, height: int = 340, **more
) -> dict:
    """One plotly figure; its legend lies under it, in as many rows as its names need on a narrow screen."""
    names = [trace["name"] for trace in data if "name" in trace and trace.get("showlegend", True)]
    shown = legend and len(names) > 1
    in_a_row = max(1, 310 // (45 + 7 * max(map(len, names), default=0)))
    under = 19 * math.ceil(len(names) / in_a_row) if shown else 0
    axis = {"automargin": True, "zeroline": False, "gridcolor": "#e6e6e6", "zerolinecolor": "#666666"}
    layout = {
        "title": {"text": _text(title), "font": {"size": 13}, "x": 0.01, "xanchor": "left"},
        "xaxis": axis | across,
        "yaxis": axis | down,
        "height": height + under,
        "margin": {"l": 60, "r": 15, "t": 36, "b": 50 + under},
        "showlegend": shown,
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "font": {"size": 11}},
        "hovermode": "closest",
        "font": {"size": 12, "color": "#1d2430"},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
    }
    return {"data": data, "layout": layout | more}


def _lines(curves: Curves, errors: Curves, axis: str) -> list[dict]:
    """A line with markers for each name that has a value, in the colours of the picture."""
    found = []
    for (name, colour), symbol in zip(colours(curves).items(), itertools.cycle(SYMBOLS), strict=False):
        curve, bars = curves[name], errors.get(name, {})
        xs = list(curve) if any(isinstance(x, str) for x in curve) else sorted(curve)
        line = {
            "name": _text(name),
            "x": [x if isinstance(x, int | float) else _text(x) for x in xs],
            "y": _numbers(curve[x] for x in xs),
            "mode": "lines+markers",
            "line": {"color": to_hex(colour)},
            "marker": {"symbol": symbol},
            "hovertemplate": f"{_text(name)}, {_text(axis)} %{{x}}: %{{y:.4f}}<extra></extra>",
        }
        if any(x in bars for x in xs):
            line["error_y"] = {"array": [_number(bars.get(x, math.nan)) for x in xs], "thickness": 1, "width": 3}
        found += [line] if xs else []
    return found


def _learning_curve(name: str, colour: str, finite: list[dict], steps: list, smooth: np.ndarray) -> list[dict]:
    """The mean, and behind it the logged values of one seed or the range over seeds."""
    places = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), POINTS)).round().astype(int))
    kept, means = [steps[place] for place in places], smooth[:, places]
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    behind = _band(kept, np.nanmin(means, axis=0), np.nanmax(means, axis=0), f"rgba({red}, {green}, {blue}, 0.2)")
    if len(finite) == 1:
        behind = {"x": kept, "y": _numbers(finite[0][step] for step in kept), "mode": "lines", "opacity": 0.3}
        behind |= {"line": {"color": colour, "width": 1}, "hoverinfo": "skip"}
    line = {"x": kept, "y": _numbers(np.nanmean(means, axis=0)), "mode": "lines", "line": {"color": colour}}
    line |= {"name": name, "hovertemplate": f"{name}, step %{{x}}: %{{y:.4f}}<extra></extra>"}
    return [behind | {"legendgroup": name, "showlegend": False}, line | {"legendgroup": name}]


def _band(xs: Sequence[float], low: Iterable[float], high: Iterable[float], colour: str) -> dict:
    around = {"x": [*xs, *xs[::-1]], "y": _numbers([*high, *[*low][::-1]]), "mode": "lines", "line": {"width": 0}}
    return around | {"fill": "toself", "fillcolor": colour, "hoverinfo": "skip", "showlegend": False}


def _map(title: str, table: list[list], xs: list, ys: list, told: str, across: str, down: str, **scale) -> dict:
    """A heat map whose first row is on top."""
    drawn = {"type": "heatmap", "z": table, "x": list(map(_text, xs)), "y": list(map(_text, ys)), "showscale": False}
    drawn |= {"texttemplate": "%{z:.2f}", "hovertemplate": told, "xgap": 1, "ygap": 1} | scale
    names = {"type": "category"}
    return _panel(title, [drawn], _titled(across) | names, _titled(down) | names | {"autorange": "reversed"})


def _titled(text: str) -> dict:
    return {"title": {"text": _text(text)}}


def _text(value: object) -> str:
    """A name in which plotly finds no tag; numbers as the pictures write them."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _numbers(values: Iterable[float]) -> list:
    return [_number(value) for value in values]


def _number(value: float) -> float | None:
    """Six digits; None, which leaves a gap, of what is no number."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
