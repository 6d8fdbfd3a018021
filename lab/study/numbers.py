"""How reports write numbers."""

import math


def number(value: float | None, digits: int) -> str:
    """With thousands separators; a dash for what was not measured."""
    return "—" if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def short(value: float) -> str:
    """Three significant digits and a decimal prefix: 1.93 M; a dash for nan."""
    if math.isnan(value):
        return "—"
    rounded = float(f"{value:.3g}")
    for power, prefix in zip(range(21, 0, -3), "ZEPTGMk", strict=True):
        if abs(rounded) >= 10**power:
            return f"{rounded / 10**power:.3g} {prefix}"
    return f"{rounded:.3g}"


def whole(value: float) -> str:
    """Every digit, and one more where a mean has a fraction; a dash for nan."""
    return number(value, 0 if math.isnan(value) or float(value).is_integer() else 1)
