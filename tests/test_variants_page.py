"""docs/variants.md: each of its diffs applies to the code as it is, touches few files, and trains."""

import os
import re
import shutil
import subprocess
import sys

import commands
import pytest

PAGE = commands.REPOSITORY / "docs" / "variants.md"
DIFFS = re.findall(r"## (.+?)\n.*?```diff\n(.*?)```", PAGE.read_text(), re.DOTALL)
MOST = 2  # files of lab/ that a variant touches
BUILT = """
import jax, numpy as np
from lab import model
from lab.config import base

for field, value in (
    ("norm", "tanh"), ("mixer", "tempered"), ("rule", "causal & (window(8) | sinks(4))"), ("scaling", "resonance")
):
    config = base()
    config.model.layers = 1
    if field == "rule":
        config.model.rule = value
    elif field == "scaling":
        config.model.position.scaling.name = value
    else:
        config.model[field].name = value
    made = model.build(config.model, jax.random.key(0))
    gradient = jax.grad(lambda made: made(np.arange(24)[None]).std(), allow_int=True)(made)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient) if x.dtype != jax.dtypes.float0), field
    print(field, "built")
"""


def touched(diff: str) -> list[str]:
    return re.findall(r"^\+\+\+ b/(.+)$", diff, re.MULTILINE)


def test_the_page_has_one_of_each():
    assert [title for title, _ in DIFFS] == ["A norm", "A mixer", "A rule", "A length method", "A study"]


@pytest.mark.parametrize(("title", "diff"), DIFFS, ids=[title for title, _ in DIFFS])
def test_a_variant_touches_few_files(title, diff):
    of_lab = [name for name in touched(diff) if not name.startswith("configs/")]
    assert len(of_lab) <= MOST and all(name.startswith("lab/") for name in of_lab)
    row = re.search(rf"^\| {title.lower()} \| (\d) ", PAGE.read_text(), re.MULTILINE)
    assert int(row[1]) == len(of_lab)


@pytest.mark.parametrize("diff", [diff for _, diff in DIFFS], ids=[title for title, _ in DIFFS])
def test_a_diff_applies(diff):
    run = subprocess.run(
        ["git", "apply", "--check", "-"], cwd=commands.REPOSITORY, input=diff, capture_output=True, text=True
    )
    assert not run.returncode, run.stderr


@pytest.mark.long
@pytest.mark.slow
def test_every_diff_applies_and_what_it_adds_trains(tmp_path):
    for folder in ("lab", "configs"):
        shutil.copytree(commands.REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    for _, diff in DIFFS:
        (tmp_path / "a.diff").write_text(diff)
        subprocess.run(["git", "apply", "a.diff"], cwd=tmp_path, check=True)
    (tmp_path / "built.py").write_text(BUILT)
    assert python(tmp_path, "built.py").count("built") == 4
    few = (
        f"--config.{field}" for field in ("train.steps=2", "train.warmup=1", "study.seeds=1", "evaluate.loss.texts=16")
    )
    told = python(tmp_path, "-m", "lab.main", "--config=configs/norm_ablation.py", "--cells=1/6", *few)
    assert "1 of 1 runs done, 0 failed" in told


def python(directory, *arguments) -> str:
    """What a program prints that runs in a directory."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    run = subprocess.run([sys.executable, *arguments], cwd=directory, env=environment, capture_output=True, text=True)
    assert not run.returncode, run.stdout + run.stderr
    return run.stdout
