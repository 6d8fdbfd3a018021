"""The figures of a report: matplotlib's object interface, so no display, backend or global state is involved."""

import io
import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullLocator

from lab.study.judge.evidence import UNKNOWN, Comparison
from lab.study.judge.trends import Trend
from lab.study.measure import NATS, Measure
from lab.study.numbers import short
from lab.study.report.labels import SMALL, name_lines, name_points
from lab.study.report.layout import panel_rows

MARKERS = "osD^vPX*<>"
PANEL = (4.6, 3.5)  # inches
BAND = dict(alpha=0.2, linewidth=0)
EFFECT = {"better": "#1b6ca8", "worse": "#c0532b", UNKNOWN: "0.45"}

Curves = Mapping[object, Mapping[float, float]]  # {name of a line: {x: y}}


def png(figure: Figure) -> bytes:
    """The same figure gives the same bytes."""
    content = io.BytesIO()
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a $ that a user writes is one
    figure.savefig(content, format="png", dpi=150, metadata={"Software": None})
    return content.getvalue()


def by_condition(
    rows: Sequence[Mapping[str, Curves]],
    errors: Mapping[str, Curves],
    axis: str,
    trained: Mapping,
    measure: Measure = NATS,
):
    """Loss against a count on a log2 axis: one line for each name, one panel for each title, one row of panels for
    each of `rows`. `errors` gives half the length of error bars; `trained` the (low, high) range to shade."""

    def draw(axes: Axes, title: str, curves: Curves) -> None:
        if title in trained:
            low, high = trained[title]
            axes.axvspan(low / 1.03, high * 1.03, color="0.93", linewidth=0, zorder=0)
        drawn = _lines(axes, curves, errors.get(title, {}))
        _log2(axes, sorted({x for curve in curves.values() for x in curve}), axis, curves)
        name_lines(axes, *drawn)

    return _panels(rows, draw, measure.title)


def by_label(rows: Sequence[Mapping[str, Curves]], axis: str, vertical: str = NATS.title) -> Figure:
    """Loss, or something else, against the values of a label, numbers or names: one line for each name. Numbers of more
    than three octaves have a log2 axis."""

    def draw(axes: Axes, title: str, curves: Curves) -> None:
        ticks = list(dict.fromkeys(x for curve in curves.values() for x in curve))
        numeric = all(isinstance(x, (int, float)) for x in ticks)
        places = {x: x if numeric else place for place, x in enumerate(ticks)}
        drawn = _lines(axes, {name: {places[x]: y for x, y in curve.items()} for name, curve in curves.items()}, {})
        low, high = min(places.values()), max(places.values())
        if numeric and 8 * low <= high and low > 0:
            _log2(axes, sorted(ticks), axis, curves)
        else:
            axes.set_xticks(list(places.values()), [f"{x:g}" if numeric else str(x) for x in ticks])
            axes.set_xlim(low - 0.05 * (high - low or 1), high + _room(curves) * (high - low or 1))
            axes.set_xlabel(axis)
        name_lines(axes, *drawn)

    return _panels(rows, draw, vertical)


def heat_maps(rows: Sequence[Mapping[str, Curves]], vertical: str, horizontal: str, written: str = ".2f") -> Figure:
    """Loss at every (name, x) as a number on its colour, darker is better; one colour scale for all panels. written:
    the format of the numbers."""
    every = [y for row in rows for curves in row.values() for curve in curves.values() for y in curve.values()]
    low, high = min(every), max(every)

    def draw(axes: Axes, title: str, curves: Curves) -> None:
        xs = sorted({x for curve in curves.values() for x in curve})
        table = np.array([[curve.get(x, math.nan) for x in xs] for curve in curves.values()])
        axes.imshow(table, cmap="viridis", vmin=low, vmax=max(high, low + 1e-6), aspect="auto")
        for (y, x), loss in np.ndenumerate(table):
            colour = "white" if loss < (low + high) / 2 else "black"
            if not math.isnan(loss):
                axes.text(x, y, f"{loss:{written}}", ha="center", va="center", fontsize=7.5, color=colour)
        axes.set_facecolor("0.93")  # what is missing
        axes.set_xticks(range(len(xs)), [str(x) for x in xs])
        axes.set_yticks(range(len(curves)), [str(name) for name in curves])
        axes.set_xlabel(horizontal)

    return _panels(rows, draw, vertical, share=False)


def weight_maps(rows: Sequence[Mapping[str, np.ndarray]]) -> Figure:
    """Weights of earlier layers (columns; the embedding first where there is one more) in layers (rows), each as a
    number on its colour: blue is positive, red negative. nan: there is no such weight."""

    def draw(axes: Axes, title: str, weights: np.ndarray) -> None:
        layers, columns = weights.shape
        reach = np.nanmax(np.abs(weights)) or 1.0
        axes.imshow(weights, cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto")
        for (layer, source), weight in np.ndenumerate(weights):
            if not math.isnan(weight):
                colour = "white" if abs(weight) > 0.6 * reach else "black"
                size = min(7.5, 62 / columns)
                axes.text(source, layer, f"{weight:.2f}", ha="center", va="center", fontsize=size, color=colour)
        axes.set_facecolor("0.93")  # what has no weight
        axes.set_xticks(range(columns), [*["emb."] * (columns - layers), *map(str, range(layers))])
        axes.set_yticks(range(layers))
        axes.set_xlabel("of layer")

    return _panels(rows, draw, "in layer", share=False)


def learning_curves(
    rows: Sequence[Mapping[str, Mapping[object, Sequence[Mapping[float, float]]]]], measure: Measure = NATS
) -> Figure:
    """Training loss against step: the centred moving mean, and around it the values themselves or,
    where a name has several seeds, the range of their centred means; on the right, its perplexity. Points that are
    not finite are left out; the first tenth of the steps may rise above the panel, which else would show little but
    their fall."""

    def draw(axes: Axes, title: str, curves: Mapping) -> None:
        palette, ends, tops = colours(curves), {}, []
        for name, seeds in curves.items():
            finite, steps, smooth = smoothed(seeds)
            if not steps:
                continue
            middle = np.nanmean(smooth, axis=0)
            if len(finite) == 1:
                axes.plot(steps, [finite[0][step] for step in steps], color=palette[name], linewidth=0.7, alpha=0.3)
            axes.fill_between(steps, np.nanmin(smooth, axis=0), np.nanmax(smooth, axis=0), color=palette[name], **BAND)
            axes.plot(steps, middle, color=palette[name], linewidth=1.6)
            ends[name] = (steps[-1], float(middle[-1]))
            tops += [loss for points in finite for step, loss in points.items() if 10 * step >= steps[-1]]
        axes.set_xlim(0, max((step for step, _ in ends.values()), default=1) * (1 + _room(ends)))
        if tops:
            axes.set_ylim(top=max(tops))
        _style(axes)
        name_lines(axes, ends, palette)
        axes.set_xlabel("optimizer step")
        if measure is NATS:
            _perplexity(axes)

    return _panels(rows, draw, f"training {measure.title}", share=False, right=0.55)


def trends(rows: Sequence[Mapping[str, Trend]]) -> Figure:
    """Paired differences against tokens seen, one panel for each title: the mean and its pointwise 95% interval."""

    def draw(axes: Axes, title: str, trend: Trend) -> None:
        axes.axhline(0, color="0.4", linewidth=0.8)
        mean, half = 1000 * trend.mean, 0 if trend.half is None else 1000 * trend.half
        axes.plot(trend.tokens, mean, color=EFFECT["better"], linewidth=1.6)
        axes.fill_between(trend.tokens, mean - half, mean + half, color=EFFECT["better"], **BAND)
        late = (np.abs(mean) + half)[len(mean) // 10 :]  # the start is noise: it may leave the panel
        reach = max(np.max(late), 1e-3)
        axes.set_ylim(-1.1 * reach, 1.1 * reach)
        axes.set_xlim(0, trend.tokens[-1] or 1)
        axes.xaxis.set_major_formatter(lambda tokens, _: short(tokens))
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel("tokens seen")
        _style(axes)

    unit = next(iter(rows[0].values())).measure.unit
    return _panels(rows, draw, f"difference (0.001 {unit})", share=False)


def effects(comparisons: Sequence[tuple[str, Comparison]]) -> Figure:
    """A forest plot of (name, comparison): mean difference with its Student-t interval, coloured by verdict."""
    figure = Figure(figsize=(8.6, 0.9 + 0.27 * len(comparisons)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="0.4", linewidth=0.8)
    for place, (_, comparison) in enumerate(comparisons):
        known, colour = comparison.estimate, EFFECT.get(comparison.verdict, EFFECT[UNKNOWN])
        if known.t_interval:
            axes.plot(known.t_interval, [place, place], color=colour, linewidth=2.2, alpha=0.65, solid_capstyle="butt")
        if known.mean is not None:
            axes.plot(known.mean, place, "o" if known.t_interval else "x", color=colour, markersize=5)
    axes.set_yticks(range(len(comparisons)), [name for name, _ in comparisons], fontsize=SMALL)
    axes.set_ylim(len(comparisons) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=SMALL)
    title = comparisons[0][1].differences.measure.title
    axes.set_xlabel(f"difference of {title}; left of 0 is better", fontsize=SMALL + 0.5)
    axes.grid(axis="x", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def pareto(panels: Mapping[str, Mapping[str, tuple[float, float]]], measure: Measure = NATS) -> Figure:
    """Loss against a cost, {title of a panel: {name of a point: (cost, loss)}}, names being short; the points that no
    other beats in both are joined."""

    def draw(axes: Axes, title: str, points: Mapping[str, tuple[float, float]]) -> None:
        front = [name for name, (x, y) in points.items() if not beaten(x, y, points.values())]
        front.sort(key=points.get)
        axes.plot(*zip(*(points[name] for name in front), strict=True), color="0.75", linewidth=1.2, zorder=1)
        for name, (x, y) in points.items():
            axes.plot(x, y, "o", color=EFFECT["better"] if name in front else EFFECT[UNKNOWN], markersize=5)
        axes.margins(0.15)
        name_points(axes, points)
        axes.xaxis.set_major_formatter(lambda cost, _: short(cost))
        axes.locator_params(axis="x", nbins=5)
        _style(axes)

    return _panels(panel_rows(panels), draw, measure.title, share=False)


def ladder(panels: Mapping[str, tuple[Curves, Curves]], vertical: str = NATS.title) -> Figure:
    """Loss against what the title of a panel says, on a log axis: {title: (losses, laws)}, both by name. Losses
    are points, laws lines of the same colour."""

    def draw(axes: Axes, title: str, both: tuple[Curves, Curves]) -> None:
        points, laws = both
        palette, ends = colours(points), {}
        for place, (name, curve) in enumerate(points.items()):
            line = laws.get(name, {})
            axes.plot(*zip(*sorted(line.items()), strict=True), color=palette[name], linewidth=1.3) if line else None
            style = {"marker": MARKERS[place % len(MARKERS)], "markersize": 4, "linestyle": ""}
            axes.plot(list(curve), list(curve.values()), color=palette[name], **style)
            ends[name] = max(line.items() or curve.items())
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 30 else (1,)))
        axes.xaxis.set_major_formatter(lambda x, _: short(x))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(low, high * (high / low) ** 0.25)  # room for the names
        _style(axes)
        name_lines(axes, ends, palette)

    return _panels(panel_rows(panels), draw, vertical, share=False)


def beaten(x: float, y: float, points: Iterable[tuple[float, float]]) -> bool:
    """Whether another point is no worse in either and better in one."""
    return any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)


def smoothed(seeds: Sequence[Mapping[float, float]]) -> tuple[list[dict], list[float], np.ndarray]:
    """Of the logged losses of each seed: those that are finite; every step that has one; the centred means
    [seeds, steps]."""
    finite = [{step: loss for step, loss in points.items() if math.isfinite(loss)} for points in seeds]
    steps = sorted({step for points in finite for step in points})
    return finite, steps, np.array([_at(points, steps) for points in finite])


def _at(points: Mapping[float, float], steps: Sequence[float]) -> list[float]:
    """The centred means of one seed at `steps`; nan where it has logged nothing, as one that still runs."""
    known = dict(zip(points, _smooth(list(points.values())), strict=True))
    return [known.get(step, math.nan) for step in steps]


def _panels(rows: Sequence[Mapping], draw, vertical: str, share: bool = True, right: float = 0.15) -> Figure:
    """Panels of a row share their vertical axis where they also share what they compare (several rows).

    right: inches that a panel needs on its right.
    """
    width = max(len(row) for row in rows)
    height = len(rows)
    figure = Figure(figsize=(PANEL[0] * width + 0.2, PANEL[1] * height))
    # Fixed margins: fitting them to the text takes as long as all the drawing.
    figure.subplots_adjust(
        left=0.65 / figure.get_figwidth(),
        right=1 - right / figure.get_figwidth(),
        bottom=0.55 / figure.get_figheight(),
        top=1 - 0.35 / figure.get_figheight(),
        wspace=0.06 + right / 1.5,
        hspace=0.36,
    )
    grid = figure.subplots(height, width, squeeze=False, sharey="row" if share and height > 1 else False)
    for line, row in zip(grid, rows, strict=True):
        for axes in line[len(row) :]:
            axes.remove()
        for place, (axes, (title, curves)) in enumerate(zip(line, row.items(), strict=False)):
            draw(axes, title, curves)
            axes.set_title(title, fontsize=10, loc="left")
            axes.tick_params(labelsize=SMALL)
            if place == 0:
                axes.set_ylabel(vertical)
    return figure


def _lines(axes: Axes, curves: Curves, errors: Curves) -> tuple[dict, dict]:
    """Draws the lines; returns where they end and their colours, by name."""
    palette, ends = colours(curves), {}
    for place, (name, curve) in enumerate(curves.items()):
        xs = sorted(curve)
        if not xs:
            continue
        bars = [errors.get(name, {}).get(x, math.nan) for x in xs]
        axes.errorbar(
            xs,
            [curve[x] for x in xs],
            yerr=None if all(math.isnan(bar) for bar in bars) else bars,
            color=palette[name],
            marker=MARKERS[place % len(MARKERS)],
            markersize=4,
            linewidth=1.6,
            capsize=2,
        )
        ends[name] = (xs[-1], curve[xs[-1]])
    _style(axes)
    return ends, palette


def _style(axes: Axes) -> None:
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _perplexity(axes: Axes) -> None:
    """A second scale for loss, on the right."""
    exp, log = (lambda y: np.exp(np.minimum(y, 100))), (lambda y: np.log(np.maximum(y, 1e-30)))
    right = axes.secondary_yaxis("right", functions=(exp, log))
    right.set_ylabel("perplexity", fontsize=SMALL)
    right.tick_params(labelsize=SMALL)
    right.spines["right"].set_visible(False)


def _room(names: Collection) -> float:
    """What the longest name needs on the right of lines, as a share of their width; no more than twice it."""
    needed = 0.08 + 0.022 * max((len(str(name)) for name in names), default=0)  # of the panel
    return min(max(0.24, needed / max(1 - needed, 0.1)), 2)


def _log2(axes: Axes, ticks: Sequence[float], label: str, names: Collection) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" if isinstance(tick, float) else str(tick) for tick in ticks])
    axes.set_xlim(ticks[0] / 1.15, ticks[-1] * (ticks[-1] / ticks[0] if len(ticks) > 1 else 2) ** _room(names))
    axes.tick_params(axis="x", which="minor", bottom=False)
    axes.set_xlabel(label)


def colours(names: Sequence) -> dict:
    """Ordered from dark to light and told apart by the colour-blind; the palest end is unreadable on white."""
    places = np.linspace(0.0, 0.82, max(len(names), 2))
    return {name: colormaps["plasma"](place) for name, place in zip(names, places, strict=False)}


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred means of 1/25 of the values, five at least; at both ends, the straight line that fits as many best."""
    width = min(2 * max(2, len(values) // 50) + 1, len(values) - (len(values) % 2 == 0))
    if width < 3:
        return list(values)
    places, half = np.arange(width), width // 2
    first, last = (np.polyval(np.polyfit(places, part, 1), places) for part in (values[:width], values[-width:]))
    means = np.convolve(values, np.full(width, 1 / width), "valid")
    return np.concatenate([first[:half], means, last[half + 1 :]]).tolist()
