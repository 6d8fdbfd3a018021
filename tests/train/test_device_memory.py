"""What does not fit a device is refused before its first step, with what would."""

import re
import types

import jax
import pytest
import tiny

from lab.errors import UserError
from lab.train import memory

GIB = 2**30


def executable(kept: float, temporary: float):
    """That keeps and takes so many GiB."""
    sizes = types.SimpleNamespace(
        argument_size_in_bytes=int(kept * GIB), output_size_in_bytes=int(kept * GIB),
        alias_size_in_bytes=int(kept * GIB), temp_size_in_bytes=int(temporary * GIB),
    )  # fmt: skip
    return types.SimpleNamespace(memory_analysis=lambda: sizes)


@pytest.fixture
def device(monkeypatch):
    """Of 80 GiB."""
    stats = {"bytes_limit": 80 * GIB}
    one = types.SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [one])
    return stats


def config(rows: int = 12, **run):
    made = tiny.config(**{f"run__{name}": value for name, value in run.items()})
    made.data.rows = rows
    return made


@pytest.mark.parametrize(("kept", "temporary", "run", "ways"), [
    (20, 100, {}, "run.microbatches = 2 or run.remat = dots or more devices"),
    (20, 200, {}, "run.microbatches = 4 or run.remat = dots or more devices"),
    (20, 100, {"microbatches": 4, "remat": "dots"}, "run.microbatches = 12 or run.remat = full or more devices"),
    (20, 90, {"microbatches": 12, "remat": "full"}, "more devices"),  # a row at a time already
    (90, 1, {"remat": "full"}, "more devices"),  # the model alone does not fit
])  # fmt: skip
def test_what_does_not_fit_is_refused_with_what_would(device, kept, temporary, run, ways):
    says = f"needs {kept + temporary:.1f} GiB of a device, and it has 80.0; choose {ways}"
    with pytest.raises(UserError, match=re.escape(says)):
        memory.check(executable(kept, temporary), config(**run))


def test_what_fits_and_devices_that_do_not_say_pass(device):
    memory.check(executable(20, 60), config())
    device.clear()
    memory.check(executable(20, 600), config())


def test_the_peak_is_measured_where_the_device_tells(device):
    assert memory.peak(executable(20, 60)) == memory.needed(executable(20, 60)) == 80 * GIB
    device["peak_bytes_in_use"] = 7
    assert memory.peak(executable(20, 60)) == 7
