"""What the cells of a study are judged in: loss or, where their tokenizers differ, bits per byte of text.

A token of a larger vocabulary is more text and harder to predict, so that losses per token are of different things.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Measure(NamedTuple):
    """column: of a condition's row; heading: of a column of a table; unit: behind a number."""

    column: str
    heading: str
    unit: str

    @property
    def title(self) -> str:
        """Of an axis."""
        return f"loss ({self.unit})"


NATS = Measure("loss", "loss", "nats per token")
BITS = Measure("bits_per_byte", "bits per byte", "bits per byte")
MEASURES = {measure.column: measure for measure in (NATS, BITS)}
FIELD = "measure"  # of a plan, where it is not loss


def of_plan(plan: Mapping) -> Measure:
    """What plan.json says that its cells are judged in."""
    return MEASURES.get(plan.get(FIELD), NATS)


def of_cells(rows: Sequence[Mapping]) -> Measure:
    """BITS of cells, as rows of a plan, that have several tokenizers."""
    names = {row.get("fields", {}).get("data.tokenizer") for row in rows}
    return BITS if len(names - {None}) > 1 else NATS


def bits_per_byte(nats: float, size: int | float) -> float:
    """Of a text of `size` bytes that cost so many nats in all."""
    return nats / (math.log(2) * size)


def with_bits(lines: Sequence[dict], texts: int, size: float) -> list[dict]:
    """Logged steps with their bits_per_byte, every step being of `texts` texts, and of `size` bytes as their mean is.

    The first token of a text, its end-of-text, is no label. Cells read the same texts at a step, so that the mean in
    the place of the step's own bytes is the same for all of them.
    """
    told = [line for line in lines if "tokens" in line]
    return [line | {BITS.column: bits_per_byte(line[NATS.column] * (line["tokens"] - texts), size)} for line in told]
