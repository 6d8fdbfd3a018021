"""What cells cost by their plan, beside their losses; and by how much the sides of a comparison differ in it."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from lab.study.define.contrasts import SIGNS
from lab.study.numbers import short, whole
from lab.study.results import Results

Residuals = dict[str, float]  # {cost: relative difference between the sides}


@dataclasses.dataclass(frozen=True)
class Cost:
    """`of` a cell of the plan, nan of what an older plan does not say; `column`: the residual's in comparisons.csv."""

    column: str
    of: Callable[[Mapping], float]
    show: Callable[[float], str]
    meaning: str


def _said(name: str) -> Callable[[Mapping], float]:
    return lambda cell: cell.get(name, math.nan)


def _train_flops(cell: Mapping) -> float:
    return cell.get("train_flops_per_token", math.nan) * cell.get("tokens", math.nan)


COSTS = {
    "parameters": Cost("residual_parameters", _said("parameters"), short, "numbers of the model"),
    "training FLOPs": Cost("residual_flops", _train_flops, short, "per token x tokens"),
    "cache": Cost("residual_cache", _said("cache_per_token_per_layer"), whole, "numbers per token and layer"),
    "attention work": Cost(
        "residual_attention_work", _said("attention_work"), whole, "numbers multiplied per query-key pair and layer"
    ),
}
MEANINGS = f"Costs: {', '.join(f'{name} ({cost.meaning})' for name, cost in COSTS.items())}."
AGAINST = "In brackets, how much more (+) or less (-) this is than the baseline's."
BETWEEN = (
    "The residuals of parameters, FLOPs, cache and attention work say how much more (+) or less (-) the first side "
    "costs than the second, each side being the mean over its cells; of (a - b) - (c - d), they are this difference of "
    "the costs over the mean of the four sides."
)


def residuals(sides: Sequence[Sequence[Mapping]]) -> Residuals:
    """Of 2 or 4 sides, each the cells of the plan on it: (a - b) / b, and ((a - b) - (c - d)) / mean(a, b, c, d).

    0 where nothing differs, infinite where the reference costs nothing; nan of what a plan does not say.
    """
    return {name: _residual([statistics.fmean(map(cost.of, side)) for side in sides]) for name, cost in COSTS.items()}


def throughput(study: Results) -> dict[str, float]:
    """{cell: tokens per second of training, the median of its runs}; nan of a cell that none has timed."""
    frame = study.timings[study.timings["phase"] == "train"]
    medians = frame["tokens_per_second"].astype(float).groupby(frame["cell"]).median()
    return {cell["name"]: float(medians.get(cell["name"], math.nan)) for cell in study.plan["cells"]}


def faster(sides: Sequence[Sequence[float]]) -> float:
    """By how much the first of 2 or 4 sides has the higher throughput, as `residuals` takes it; nan if unknown."""
    return _residual([statistics.fmean(side) for side in sides])


def shown(cell: Mapping) -> dict[str, str]:
    """A cell's costs as text; a recurrent state is added to the cache."""
    texts = {name: cost.show(cost.of(cell)) for name, cost in COSTS.items()}
    if state := cell.get("state_per_layer"):
        texts["cache"] += f" + {whole(state)} a row"
    return texts


def relative(values: Residuals) -> list[str]:
    """Residuals as per cents, in the order of COSTS; dashes where there are none."""
    return [percent(values.get(name, math.nan)) for name in COSTS]


def percent(value: float) -> str:
    """+12.3%; what rounds to nothing has a plus."""
    return "—" if math.isnan(value) else f"{round(100 * value, 1) + 0.0:+.1f}%"


@dataclasses.dataclass(frozen=True)
class Beside:
    """Columns for a table of losses, and a line about the costs that all of its cells share ("" if none)."""

    columns: list[str]
    cells: dict[tuple, list[str]]  # by the values of a cell's labels
    common: str


def beside(study: Results) -> Beside:
    """What the cells of a study cost, for a table of their losses: columns where they differ, one line where not."""
    cells = study.plan["cells"]
    texts = {study.key(cell): shown(cell) for cell in cells}
    differing = [name for name in COSTS if any(_unlike(name, cells[0], cell) for cell in cells)]
    alike = [f"{name} {text}" for name, text in shown(cells[0]).items() if name not in differing and text != "—"]
    every = f"{'Every cell' if len(cells) > 1 else 'The cell'}: {', '.join(alike)}." if alike else ""
    return Beside(differing, {key: [text[name] for name in differing] for key, text in texts.items()}, every)


def _unlike(name: str, cell: Mapping, other: Mapping) -> bool:
    """Whether two cells differ in a cost, if only in digits that are not shown."""
    return shown(cell)[name] != shown(other)[name] or abs(COSTS[name].of(cell) - COSTS[name].of(other)) > 0


def _residual(means: Sequence[float]) -> float:
    difference = sum(sign * mean for sign, mean in zip(SIGNS[len(means)], means, strict=True))
    reference = means[1] if len(means) == 2 else statistics.fmean(means)
    if math.isclose(difference, 0.0, abs_tol=1e-12 * max(map(abs, means))):
        return 0.0
    return difference / reference if reference else math.copysign(math.inf, difference)
