"""Does the best learning rate of a narrow model stay the best of a wide one?

    python -m lab.main --config=configs/width_transfer.py         # :cpu, 6 cells: 36 trials and 12 runs
    python -m lab.main --config=configs/width_transfer.py:gpu     # 256 to 1024 wide

Three widths, each under the standard parametrization and under maximal update with the narrowest as its base, so that
these two are the same there. Every cell is tried at every rate of one grid: the report's part on tuning has the best
rate of each width, and the curves from which it is read. A rate transfers if the best of all widths is the same.

Published: under the standard parametrization the best rate of Adam falls with the width, under maximal update it stays
(arXiv 2203.03466, figure 1). What a few steps change inside a model: `python benchmarks/coordinate_check.py`.
"""

from lab.config import base
from lab.errors import choose
from lab.study.define.cells import chain, product, vary, zipped

RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)


def get_config(scale: str = "cpu"):
    config = base()
    study = config.study
    study.name = "width_transfer"
    study.question = "Does the best learning rate of a narrow model stay the best of a wide one?"
    study.labels = (("model.parametrization.name", "parametrization"), ("model.dim", "width"))
    study.sections = ("curves",)
    study.seeds = 2
    study.baseline = (("parametrization", "standard"),)
    study.tune = (("train.learning_rate", RATES),)
    config.train.final_learning_rate = 0.0  # from wherever it is tuned to
    SCALES[choose("the scale of configs/width_transfer.py", scale, SCALES)](config)
    return config


def cells(widths: tuple[int, ...], head_dim: int):
    """Heads of one width, more of them as the model is wider; so is the feed-forward."""
    heads = tuple(width // head_dim for width in widths)
    shapes = zipped(
        vary("model.dim", widths),
        vary("model.mixer.heads", heads),
        vary("model.mixer.kv_heads", heads),
        vary("model.feedforward.width", tuple(8 * width // 3 // 16 * 16 for width in widths)),
    )
    mup = (("model.parametrization.name", "mup"), ("model.parametrization.base_dim", widths[0]))
    return product(chain(vary("model.parametrization.name", ("standard",)), (mup,)), shapes)


def cpu(config) -> None:
    """2 layers on bytes of Python's own sources, 300 steps of 8 rows of 128 bytes."""
    config.model.update(dict(layers=2))
    config.model.mixer.head_dim = 16
    config.study.cells = cells((48, 96, 192), 16)
    config.run.implementation = "reference"  # rows this short gain nothing from tiles
    config.evaluate.loss.rows = 64
    config.train.steps = config.run.checkpoint.every = 300


def gpu(config) -> None:
    """8 layers on Python's own sources: 1,000 steps of 16k tokens, about five epochs."""
    config.model.update(dict(layers=8, vocabulary=6400, compute="bfloat16"))
    config.model.mixer.head_dim = 64
    config.study.cells = cells((256, 512, 1024), 64)
    config.run.update(dict(scan=True, remat="dots"))
    config.data.update(dict(tokenizer="bpe:6400", text_length=512, rows=32))
    config.train.update(dict(steps=1000, warmup=50))
    config.evaluate.loss.update(dict(texts=0, rows=32))
    config.run.checkpoint.every = 500


SCALES = {"cpu": cpu, "gpu": gpu}
