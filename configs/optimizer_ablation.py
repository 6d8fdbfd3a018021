"""Which optimizer learns most from the same tokens, and does that depend on how the rate falls?

    python -m lab.main --config=configs/optimizer_ablation.py         # :cpu, 28 cells: 168 trials and 84 runs
    python -m lab.main --config=configs/optimizer_ablation.py:gpu     # 25.8M parameters

Plain causal language models on whole rows: seven optimizers under four schedules. Every cell is tuned first, on one
grid of learning rates and a seed of its own, then judged on three seeds at the best; the report names best rates on the
edge of the grid. Losses are those at the end, when the rate has fallen as far as the schedule takes it. Schedule-free
AdamW is made for the constant one, and is evaluated at the mean of its weights.

Published: with every optimizer tuned, those that beat AdamW do so by at most 1.4 times at 0.1B parameters and 1.1 times
at 1.2B (arXiv 2509.02046); AdEMAMix needs about half of AdamW's tokens (arXiv 2409.03137). A 1 - sqrt cool-down matches
cosine (arXiv 2405.18392).
"""

from lab.config import base
from lab.errors import choose
from lab.study.define.cells import chain, named, product, vary

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
OPTIMIZERS = ("adamw", "muon", "lion", "adafactor", "ademamix", "adopt", "schedule_free_adamw")
PUBLISHED = {  # of those that were found better than AdamW: by how much, and where
    "muon": "1.4 times fewer steps at 0.1B, 1.1 times at 1.2B, at most (arXiv 2509.02046)",
    "ademamix": "about half of the tokens (arXiv 2409.03137)",
}
SCHEDULES = ("constant", "cosine", "linear", "wsd, 1 - sqrt")


def get_config(scale: str = "cpu"):
    config = base()
    study = config.study
    study.name = "optimizer_ablation"
    study.question = "Which optimizer learns most from the same tokens, and does that depend on how the rate falls?"
    study.labels = (("train.optimizer", "optimizer"), ("name", "schedule"))
    study.sections = ("curves",)
    study.seeds = 3
    study.baseline = (("optimizer", "adamw"),)
    study.contrasts = tuple(
        (f"{name} - adamw", (("optimizer", name),), (("optimizer", "adamw"),)) for name in OPTIMIZERS[1:]
    )
    study.hypotheses = tuple(
        (f"{name} beats adamw", (("single", f"{name} - adamw", -1),), where) for name, where in PUBLISHED.items()
    )
    config.train.final_learning_rate = 0.0  # from wherever it is tuned to
    study.tune = (("train.learning_rate", RATES),)
    SCALES[choose("the scale of configs/optimizer_ablation.py", scale, SCALES)](config)
    steps = config.train.steps
    rising = chain(*(override_of(name, steps) for name in OPTIMIZERS))
    study.cells = product(rising, chain(*(schedule(name) for name in SCHEDULES)))
    return config


def override_of(name: str, steps: int):
    """The optimizer; the slow mean of AdEMAMix rises over the whole run, as its authors have it."""
    (override,) = vary("train.optimizer", (name,))
    return ((*override, ("train.ademamix.rising", steps)),) if name == "ademamix" else (override,)


def schedule(name: str):
    kind, _, shape = name.partition(", ")
    return named(name, ("train.schedule", kind), *([("train.cooldown_shape", "sqrt")] if shape else []))


def cpu(config) -> None:
    """2 layers of width 64 on bytes of Python's own sources, 300 steps of 8 rows of 128 bytes."""
    config.model.update(dict(dim=64, layers=2))
    config.model.mixer.update(dict(heads=4, kv_heads=2, head_dim=16))
    config.model.feedforward.width = 176
    config.run.implementation = "reference"  # rows this short gain nothing from tiles
    config.evaluate.loss.rows = 64
    config.train.steps = config.run.checkpoint.every = 300


def gpu(config) -> None:
    """512 wide, 8 layers, on Python's own sources: 1,000 steps of 16k tokens, about five epochs."""
    config.model.update(dict(dim=512, layers=8, vocabulary=6400, compute="bfloat16"))
    config.model.mixer.update(dict(heads=8, kv_heads=2, head_dim=64))
    config.model.feedforward.width = 1408
    config.run.update(dict(scan=True, remat="dots"))
    config.data.update(dict(tokenizer="bpe:6400", text_length=512, rows=32))
    config.train.update(dict(steps=1000, warmup=50, weight_decay=0.1))
    config.train.muon.adam_decay = 0.1
    config.evaluate.loss.update(dict(texts=0, rows=32))
    config.run.checkpoint.every = 500


SCALES = {"cpu": cpu, "gpu": gpu}
