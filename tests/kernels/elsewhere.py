"""Environments of their own, for compilers of machines that are not here: where libtpu or a CUDA plugin is, JAX looks
for the machine."""

import pathlib
import subprocess
import venv

import filelock
import jax

ROOT = pathlib.Path(__file__).resolve().parents[2]


def python(name: str, *packages: str) -> pathlib.Path:
    """The Python of an environment that has this version of jax and the packages; it is made where it is missing."""
    place = ROOT / f".venv-{name}-{jax.__version__}"
    found, done = place / "bin" / "python", place / ".ready"
    with filelock.FileLock(f"{place}.lock"):
        if not done.exists():
            venv.create(place, with_pip=True, clear=True)
            install = ["-m", "pip", "install", "--quiet", *packages]
            subprocess.run([found, *install], check=True, capture_output=True, text=True)
            done.touch()
    return found
