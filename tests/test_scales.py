"""Every shipped scale starts: its corpus opens, it plans, and what it compiles lowers for CUDA."""

import commands
import jax
import pytest
from test_configs import CONFIGS, module

from lab import data as lab_data
from lab.command import load_config
from lab.data import corpora
from lab.errors import UserError
from lab.evaluate import asks
from lab.model import mesh as lab_mesh
from lab.study.open import open
from lab.train import canonical, compiled, optimizer, step
from lab.train.step import Program

# What distributions of Python leave out, or later versions have no more: the least that a supported one has.
LEFT_OUT = {"distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "tkinter", "turtledemo"}
SCALES = [(path, scale) for path in CONFIGS for scale in module(path).SCALES if not scale.startswith("cpu")]


@pytest.fixture
def smallest_library(monkeypatch):
    whole = corpora._stdlib_names
    kept = lambda root: (name for name in whole(root) if name.split("/")[0] not in LEFT_OUT)  # noqa: E731
    monkeypatch.setattr(corpora, "_stdlib_names", kept)


def test_the_library_of_these_tests_is_no_larger_than_any(smallest_library):
    data = load_config(f"{CONFIGS[0]}:cpu").data
    data.corpus = "stdlib"
    assert 250_000 < sum(len(d.text) for d in corpora.open(data).read() if d.validation) < 345_000


def lowered(config) -> str:
    """The programs for CUDA of training and of every ask, on one device."""
    program = Program.of(config)
    numbers = optimizer.numbers_by_step(config.train)(0)
    mesh = jax.make_mesh((1,) * 4, lab_mesh.AXES, (jax.sharding.AxisType.Auto,) * 4, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = jax.eval_shape(lambda: canonical._initial_state(config, jax.random.key(0)))
        traced = [compiled._train.trace(state, numbers, canonical.abstract_batch(config), program=program)]
        for asked in config.evaluate.values():
            batch = canonical.batch_of(asked.rows, asked.texts_per_row * config.data.text_length)
            traced.append(jax.jit(step.evaluation_step).trace(state.model, batch))
        return "".join(each.lower(lowering_platforms=("cuda",)).as_text() for each in traced)


@pytest.mark.slow
@pytest.mark.matrix("path")
@pytest.mark.parametrize(("path", "scale"), SCALES, ids=lambda value: getattr(value, "stem", value))
def test_every_scale_starts(path, scale, smallest_library, tmp_path):
    config = load_config(f"{path}:{scale}")
    brought = config.data.texts > 0
    if brought:  # some of them
        with pytest.raises(UserError, match=f"data.path is empty: this config reads {config.data.texts} training and"):
            lab_data.open(config)
        config.data.path = str(commands.write_corpus(tmp_path / "texts.jsonl", texts=20_000))
        config.data.texts = 2 * config.data.rows * config.data.texts_per_row
        config.evaluate.loss.texts = 0
    study = open(config)
    for cell in {study.cells[0], study.cells[-1]}:
        if brought:  # cells that vary their texts want more than there are here
            cell.config.data.texts = config.data.texts
        data = lab_data.open(cell.config)
        filled = asks.filled(cell.config, data.validation)
        assert data.validation is None or 0 < filled.evaluate.loss.texts <= len(data.validation)
        assert "func.func" in lowered(filled)
