"""The part of a report on learned weights of layers in layers."""

import numpy as np
import pandas as pd

from lab.study.report import figures, live
from lab.study.report.layout import describe, panel_rows
from lab.study.report.page import Chart, Piece, Text
from lab.study.results import EMBEDDING, Results


def section(study: Results) -> list[Piece]:
    """A heat map for each cell and name of weights: the mean over seeds."""
    frame = study.mixing
    if frame.empty:
        return [Text("No finished run has learned weights of layers.")]
    labels = {cell["name"]: describe(cell["labels"]) or cell["name"] for cell in study.plan["cells"]}
    panels = {
        f"{labels[cell]}: {name}": mean(rows) for (cell, name), rows in frame.groupby(["cell", "name"], sort=False)
    }
    seeds = frame.groupby("cell")["seed"].nunique()
    counted = f"{seeds.min()}" if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
    caption = (
        f"Learned weights at the end of training, means over seeds ({counted}): the weight of what layer i gave "
        "(column) in layer m (row). Blue is positive, red negative; each map has its own scale. Those of every seed "
        "are in mixing.csv."
    )
    rows = panel_rows(panels)
    return [Chart("mixing", figures.png(figures.weight_maps(rows)), caption, live.weight_maps(rows))]


def mean(rows: pd.DataFrame) -> np.ndarray:
    """One array of weights, averaged over runs, as the stream gives it."""
    layers, before = int(rows["layer"].astype(int).max()) + 1, int((rows["of_layer"] == EMBEDDING).any())
    array = np.full((layers, before + layers), np.nan)
    for (layer, source), weight in rows.groupby(["layer", "of_layer"])["weight"].mean().items():
        array[int(layer), 0 if source == EMBEDDING else before + int(source)] = weight
    return array
