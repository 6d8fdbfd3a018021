"""Loss spikes, against planted ones and the definition in plain Python."""

import statistics

import numpy as np
import pytest

from lab.study.judge import spikes


def training(seed: int, steps: int = 400) -> np.ndarray:
    """A loss that falls, with normal noise on it, fast at first."""
    generator = np.random.default_rng(seed)
    return 2.0 + 4.0 * np.exp(-np.arange(steps) / 30) + 0.05 * generator.normal(size=steps)


@pytest.mark.parametrize("seed", range(3))
def test_planted_spikes_are_found_and_nothing_else(seed):
    losses, generator = training(seed), np.random.default_rng(seed + 10)
    assert spikes.spikes(losses.tolist()) == []
    planted = sorted(generator.choice(np.arange(150, 400), 5, replace=False).tolist())
    losses[planted] += generator.uniform(0.8, 5.0, 5)
    assert spikes.spikes(losses.tolist()) == planted
    assert spikes.spikes((7 + 3 * losses).tolist()) == planted  # neither the unit nor the level of a loss counts


def test_a_spike_is_what_the_definition_says():
    """Around the threshold, where a window or a factor that was another would tell."""
    before = training(5, 200)[100:].tolist()
    recent = before[-spikes.WINDOW :]
    median = statistics.median(recent)
    threshold = median + 6 * 1.4826 * statistics.median(abs(loss - median) for loss in recent)
    assert not spikes.is_spike(threshold - 1e-9, before) and spikes.is_spike(threshold + 1e-9, before)


def test_the_first_steps_are_none_however_high():
    losses = [1.0] * spikes.LEAST
    losses[spikes.LEAST - 1] = 1e9
    assert spikes.spikes(losses) == [] and spikes.spikes([*losses[:-1], 1.0, 1e9]) == [spikes.LEAST]
