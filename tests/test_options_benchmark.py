"""benchmarks/options.py measures every cell of the parts that it is made of, whole steps of them."""

import importlib.util
import sys
import types

import commands
import pytest

from lab import data as lab_data
from lab.command import load_config
from lab.model import abstract, accounting

FLAGS = types.SimpleNamespace(width=64, layers=2, length=32, rows=2, rounds=0)


@pytest.fixture(scope="module")
def options():
    folder = commands.REPOSITORY / "benchmarks"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(folder), *sys.path])  # its neighbours, and configs/
        spec = importlib.util.spec_from_file_location("options_benchmark", folder / "options.py")
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
        yield made


@pytest.mark.slow
def test_every_variant_of_the_study_is_measured_beside_the_baseline_of_its_part(options):
    for part in options.architecture_ablation.PARTS:
        found = options.cells(part, FLAGS)
        scale = "cpu" if part == "norm" else f"cpu-{part}"
        config = load_config(f"{commands.REPOSITORY}/configs/architecture_ablation.py:{scale}")
        names = [cell.labels["variant"] for cell in found]
        assert names[0] == dict(config.study.baseline)["variant"] and len({*names}) == len(names)
        assert len(names) == len(config.study.cells)
        (layers,) = {cell.config.model.layers for cell in found}
        assert all(layers % max(1, len(cell.config.model.pattern)) == 0 for cell in found) and layers >= FLAGS.layers
    assert len(options.cells("optimizer", FLAGS)) == len(options.optimizer_ablation.OPTIMIZERS)
    assert {"attention", "sublayers", "the embedding"} == {
        cell.labels["variant"].removeprefix("dropout of ") for cell in options.cells("further", FLAGS)[1:-1]
    }


@pytest.mark.slow
def test_what_is_counted_is_the_whole_step(options):
    """Of two layers and every pair of tokens: XLA counts one turn of a loop, so no loop may be left."""
    config = options.cells("block", FLAGS)[0].config
    one, run = options.program_of(config, lab_data.open(config).train)
    one()
    model = abstract(config.model, config.run)
    keys = [FLAGS.length]  # plain XLA computes hidden pairs too
    expected = FLAGS.rows * FLAGS.length * accounting.train_flops_per_token(model, keys)
    assert 0.9 < run.cost_analysis()["flops"] / expected < 1.6
