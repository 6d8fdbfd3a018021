"""How often the intervals of a fitted scaling law hold the constants by which losses were made up.

    python tests/scaling_coverage.py [simulations]

Prints for each constant the share of simulations whose 95% interval holds it, with the exact binomial interval of that
share: 200 simulations of RESAMPLES resamples, minutes. Losses are of the published law, on a grid of sizes and of
tokens for each parameter, with noise of every run.
"""

import sys
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lab.study.judge import scaling

TRUE = scaling.PUBLISHED["Hoffmann et al. 2022"]
SIZES, RATIOS = np.geomspace(1e6, 1e9, 6), np.geomspace(5, 80, 4)
RESAMPLES = 100  # half as many as a report draws
NOISE = 0.002  # standard deviation of log L: 0.005 nats at 2.5


def simulated(seed: int, noise: float = NOISE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parameters, tokens and losses [runs]."""
    n, d = SIZES.repeat(len(RATIOS)), np.outer(SIZES, RATIOS).ravel()
    floor, big_a, a, big_b, b = TRUE
    losses = floor + big_a / n**a + big_b / d**b
    return n, d, losses * np.exp(noise * np.random.default_rng(seed).normal(size=len(n)))


def held(seed: int) -> list[bool]:
    """Of each constant, whether its interval holds it."""
    fit = scaling.of_parameters_and_tokens(*map(tuple, simulated(seed)))
    bounds = (fit.intervals[name] for name in scaling.NAMES[2])
    return [low <= true <= high for (low, high), true in zip(bounds, TRUE, strict=True)]


def main(simulations: int) -> None:
    scaling.RESAMPLES = RESAMPLES
    found = np.array([held(seed) for seed in range(simulations)])
    for name, hits in zip(scaling.NAMES[2], found.sum(axis=0), strict=True):
        low, high = stats.binomtest(int(hits), simulations).proportion_ci(0.95, method="exact")
        print(f"{name}: {hits / simulations:.1%} of {simulations} [{low:.1%}, {high:.1%}]")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
