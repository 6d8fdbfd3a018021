"""Which abilities need a second layer, and which a view of the whole row?

    python -m lab.main --config=configs/probes.py         # :cpu, 9 cells, minutes on two cores
    python -m lab.main --config=configs/probes.py:gpu     # five probes, 4 layers of width 256

Rows are made on the fly from (seed, step, row); lab/data/probes.py says what each probe asks. Evaluated by difficulty:
pairs known (mqar), symbols copied (copy) or known (induction), moves made (state), tokens in between (needle).

Published: one layer of attention cannot form an induction head, two can (arXiv 2209.11895); attention recalls any
number of pairs, and what sees less than the whole row does not (arXiv 2312.04927); the composition of permutations
asks for depth that grows with the number of moves (arXiv 2404.08819).
"""

from lab.config import base
from lab.errors import choose
from lab.evaluate.asks import ask
from lab.study.define.cells import chain, named, product, vary


def get_config(scale: str = "cpu"):
    config = base()
    study = config.study
    study.name = "probes"
    study.question = "Which abilities need a second layer, and which a view of the whole row?"
    study.labels = (("data.corpus", "probe"), ("name", "model"))
    study.sections = ("accuracy", "curves")
    SCALES[choose("the scale of configs/probes.py", scale, SCALES)](config)
    return config


def cells(probes: tuple[str, ...], narrow: str):
    """Every probe with the whole model, with one layer of it, and with a window too narrow to reach back by layers."""
    models = chain(
        named("full"),
        named("1 layer", ("model.layers", 1)),
        named(f"causal & {narrow}", ("model.rule", f"causal & {narrow}")),
    )
    return product(vary("data.corpus", probes), models)


def cpu(config) -> None:
    """2 layers of width 64, rows of 48 tokens. Windows of 4 see 6 tokens back through two layers."""
    config.study.cells = cells(("induction", "mqar", "needle"), "window(4)")
    config.model.update(dict(dim=64, layers=2, vocabulary=34))
    config.model.mixer.update(dict(heads=2, kv_heads=2, head_dim=32))
    config.model.feedforward.width = 128
    config.run.implementation = "reference"  # rows this short gain nothing from tiles
    config.data.update(dict(text_length=48, rows=64))
    config.data.probe.difficulty = "4-12"
    config.train.update(dict(steps=400, learning_rate=3e-3, final_learning_rate=3e-4, warmup=50))
    config.evaluate.loss = ask("difficulty", difficulties=(4, 8, 12), texts=256, rows=64)
    config.run.checkpoint.every = 200


def gpu(config) -> None:
    """4 layers of width 256, rows of 512 tokens, difficulties up to 128. Windows of 16 see 60 tokens back."""
    config.study.cells = cells(("copy", "induction", "mqar", "needle", "state"), "window(16)")
    config.model.update(dict(dim=256, layers=4))
    config.model.mixer.update(dict(heads=4, kv_heads=4, head_dim=64))
    config.model.feedforward.width = 704
    config.data.update(dict(text_length=512, rows=64))
    config.run.workers = 4
    config.data.probe.update(dict(difficulty="4-128", symbols=256))
    config.train.update(dict(steps=10_000, learning_rate=1e-3, final_learning_rate=1e-4, warmup=500))
    config.evaluate.loss = ask("difficulty", difficulties=(4, 8, 16, 32, 64, 128), texts=1024, rows=64)
    config.run.checkpoint.every = 1000


SCALES = {"cpu": cpu, "gpu": gpu}
