"""Every test runs on eight simulated CPU devices, and shares one cache of compiled programs with all runs before it."""

import itertools
import os
import pathlib

import compiling

_CACHE = pathlib.Path(__file__).resolve().parents[1] / ".pytest_cache" / "lab"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ |= compiling.FAST  # of commands that tests start too
os.environ.setdefault("LAB_CACHE", str(_CACHE))

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from matrix import pytest_addoption, pytest_collection_modifyitems, pytest_sessionstart  # noqa: E402, F401

from lab import kernels  # noqa: E402
from lab.train import compiled  # noqa: E402

DEVICES = 8
MAPPINGS = 30_000
_tests = itertools.count()

jax.config.update("jax_num_cpu_devices", DEVICES)  # before the backend starts
jax.config.update("jax_compilation_cache_dir", str(_CACHE / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

# First calls compile and shared machines stall: time limits of single examples only make tests flaky.
hypothesis.settings.register_profile("lab", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("lab")


@pytest.fixture(scope="session", autouse=True)
def devices():
    """The simulated devices. Host device counts in XLA_FLAGS would silently be overruled; fewer would test nothing."""
    found = jax.devices()
    assert len(found) == DEVICES
    return found


@pytest.fixture(scope="session", autouse=True)
def every_kernel():
    """Kernels of machines that are not here are interpreted."""
    with kernels.interpreted():
        yield


@pytest.fixture(autouse=True)
def few_mappings():
    """Every compiled program maps memory, and the system lets a process map only so much: beyond that it is aborted."""
    yield
    if next(_tests) % 8 == 0 and len(pathlib.Path("/proc/self/maps").read_bytes().splitlines()) > MAPPINGS:
        compiled._executables.clear()
        jax.clear_caches()
