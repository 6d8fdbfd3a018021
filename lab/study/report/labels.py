"""Names in a figure, beside lines and points, placed so that none covers another."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

SMALL = 8.5  # points


def name_lines(axes: Axes, ends: Mapping[object, tuple[float, float]], palette: Mapping) -> None:
    """Writes each line's name beside its right end, moved up or down where names would touch."""
    bottom, top = axes.get_ylim()
    gap = (top - bottom) * 0.06
    heights = spaced([y for _, y in ends.values()], gap, bottom + gap / 2, top)
    across = axes.transScale + axes.transLimits  # to shares of the panel
    for (name, (x, y)), height in zip(ends.items(), heights, strict=True):
        place = across.inverted().transform((across.transform((x, y))[0] + 0.055, 0))[0]
        text = f" {name:g}" if isinstance(name, float) else f" {name}"
        axes.plot([x, place], [y, height], color=palette[name], linewidth=0.6, alpha=0.6, clip_on=False)
        axes.text(place, height, text, va="center", fontsize=SMALL, color=palette[name])


def name_points(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Writes each point's name at the corner where it covers least of other names and of points."""
    axes.autoscale_view()
    centres = axes.transData.transform([*points.values()]) * 72 / axes.figure.dpi
    taken = [(centre - 3, centre + 3) for centre in centres]  # lower left and upper right, in points
    for name, centre in zip(points, centres, strict=True):
        size = SMALL * np.array([0.62 * len(str(name)), 0.8])
        corners = [np.array([right, up]) for up in (1, -1) for right in (1, -1)]
        boxes = [np.sort([centre + 4 * corner, centre + corner * (4 + size)], axis=0) for corner in corners]
        best = min(range(4), key=lambda i: sum(shared(boxes[i], box) for box in taken))
        taken.append(boxes[best])
        sides = {"ha": ("left", "right")[best % 2], "va": ("bottom", "top")[best // 2]}
        axes.annotate(name, points[name], 4 * corners[best], textcoords="offset points", fontsize=SMALL, **sides)


def shared(one, other) -> float:
    """The area that two boxes share, each (lower left, upper right)."""
    return float(np.prod(np.maximum(np.minimum(one[1], other[1]) - np.maximum(one[0], other[0]), 0)))


def spaced(heights: Sequence[float], gap: float, bottom: float, top: float) -> list[float]:
    """The heights with neighbours at least `gap` apart: groups of close ones spread around their mean, within the
    panel where they fit."""

    def lowest(group: Sequence[int]) -> float:
        centred = sum(heights[place] for place in group) / len(group) - gap * (len(group) - 1) / 2
        return max(min(centred, top - gap * (len(group) - 1)), bottom)

    groups: list[list[int]] = []
    for place in sorted(range(len(heights)), key=heights.__getitem__):
        groups.append([place])
        while len(groups) > 1 and lowest(groups[-1]) < lowest(groups[-2]) + gap * len(groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    ranks = {place: lowest(group) + gap * rank for group in groups for rank, place in enumerate(group)}
    return [ranks[place] for place in range(len(heights))]
