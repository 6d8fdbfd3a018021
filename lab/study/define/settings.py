"""What config.study may say."""

from lab.options import Option, Room

Expected = tuple[tuple[str, str, int], ...]  # (layer, name of a contrast, its sign)
Pairs = tuple[tuple[str, object], ...]  # (label, value or values): selects the cells that have them all; or fields

STUDY = Room({
    "name": Option("", "a word for the study"),
    "question": Option("", "what it asks"),
    "cells": Option((), "made by lab.study.define.cells: product, chain, zipped, named",
                    kind=tuple[tuple[tuple[str, object], ...], ...]),
    "rungs": Option((), "(name, ((field, value), ...)), ...: sizes at which every cell is made, the smallest first",
                    kind=tuple[tuple[str, Pairs], ...]),
    "labels": Option((), "(field, short label), ...: columns and axes, in the order tables use",
                     kind=tuple[tuple[str, str], ...]),
    "groups": Option((), "(title, values of a label), ...: panels of the learning curves, by what they show",
                     kind=tuple[tuple[str, tuple[object, ...]], ...]),
    "sections": Option(("curves",), "parts of the report: a name, or (name, label, ...)",
                       kind=tuple[str | tuple[str, ...], ...]),
    "published": Option("", "a csv of published numbers, relative to the repository"),
    "seeds": Option(1, "of every cell", least=1),
    "length": Option("steps", "what cells train alike, by train.steps of each", choices=("steps", "tokens", "flops")),
    "judged": Option((), "conditions of the ask named loss whose mean judges a cell; empty: all",
                     kind=tuple[object, ...]),
    "baseline": Option((), "(label, value), ...: cells are compared with the one that has these instead of theirs",
                       kind=Pairs),
    "contrasts": Option((), "(name, plus, minus) or (name, a, b, c, d), each side (label, value or values), ...",
                        kind=tuple[tuple[str, Pairs, Pairs] | tuple[str, Pairs, Pairs, Pairs, Pairs], ...]),
    "hypotheses": Option((), "(claim, ((single | crossed | aligned, name of a contrast, -1 | 1), ...)), ..., and last "
                         "what was published of it and where, if it was",
                         kind=tuple[tuple[str, Expected] | tuple[str, Expected, str], ...], least=-1, most=1),
    "tune": Option((), "(field, values), ...: each cell is tuned on this grid first",
                   kind=tuple[tuple[str, tuple[object, ...]], ...]),
    "tune_seed": Option(1000, "of the trials; cells are judged on seed, seed + 1, ...", least=0),
    "calibrate": Option(0, "times that one cell is run again at every seed, from other initial values: what the "
                        "verdicts make of runs between which nothing differs", least=0, most=100),
    "calibrate_cell": Option("", "the name of that cell; empty: the first that is a baseline, else the first"),
    "untrained": Option(False, "a checkpoint is asked as it is: none is trained unless the command sets train.steps"),
    "brings": Option("", "the model that a checkpoint is to be of; without one the study is planned, and not run"),
    "vmap": Option("none", "runs of one program that are trained as one vmapped program",
                   choices=("none", "seeds", "numbers")),
})  # fmt: skip
