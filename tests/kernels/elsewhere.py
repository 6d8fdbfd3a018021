"""Compilers of machines that are not here: what they need beside this environment, in a directory of its own, since
JAX looks for a machine whose libraries it sees."""

import importlib.metadata
import os
import pathlib
import subprocess
import sys

import compiling
import filelock
import jax

ROOT = pathlib.Path(__file__).resolve().parents[2]
PTXAS = (
    f"jax-cuda13-plugin=={jax.__version__}",
    f"jax-cuda13-pjrt=={jax.__version__}",
    "nvidia-cuda-nvcc",
    "nvidia-nvvm",
)


def libtpu() -> str:
    """As this jax requires it."""
    (wanted,) = (one for one in importlib.metadata.requires("jax") if one.startswith("libtpu"))
    return wanted.partition(";")[0].strip()


def environment(name: str, *packages: str) -> dict[str, str]:
    """What a Python process needs to have the packages, too; they are installed where they are missing."""
    place = ROOT / f".venv-{name}-{jax.__version__}"
    with filelock.FileLock(f"{place}.lock"):
        if not (place / ".ready").exists():
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", place, *packages]
            subprocess.run(install, check=True, capture_output=True, text=True)
            (place / ".ready").touch()
    kept = {key: value for key, value in os.environ.items() if key not in {*compiling.FAST, "JAX_PLATFORMS"}}
    return kept | {"PYTHONPATH": str(place)}
