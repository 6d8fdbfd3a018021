"""What keeps training stable at a learning rate that is too high: norms, warm-up, z-loss, QK-norm, biases?

    python -m lab.main --config=configs/stability_ablation.py         # :cpu, 13 cells of 5 seeds, minutes
    python -m lab.main --config=configs/stability_ablation.py:gpu     # 25.8M parameters

Every cell but one trains at a rate that is deliberately too high. None clips gradients, two warm up, and each changes
one or two things of pre-norm. The section `stability` of the report says which failed and when, the largest attention
score and log Z, the entropy of attention, the size of updates, loss spikes, and the gradient of each layer; the table
of cells has tokens per second, which is what a remedy costs.

Published: in post-norm models the gradient at the start grows with the layer, in pre-norm ones it does not, and
post-norm without warm-up is the worst (arXiv 2002.04745); QK-norm trains at higher rates (arXiv 2302.05442), 10.84
perplexity against 11.19 (arXiv 2410.16682); a z-loss of 1e-4 keeps log Z near 0 (PaLM, arXiv 2204.02311). On biases
sources contradict each other: that they steady training, and that leaving them out does. Here output projections start
(2 layers)^-1/2 times as large, which flattens that gradient: it falls with the layer before norms, and is level behind
them.
"""

from lab.config import base
from lab.errors import choose
from lab.study.define.cells import chain, named
from lab.train.instruments import INSTRUMENTS

PRE = "pre"
Z_LOSS, QK_NORM = ("train.z_loss", 1e-4), ("model.mixer.qk_norm", True)
POST, LAYER_NORM = ("model.placement.name", "post"), ("model.norm.name", "layer")
BIASES = ("model.mixer.bias", "all"), ("model.feedforward.bias", True)
CLAIMS = (  # better, worse, what was published of it and where
    ("Post-norm needs a warm-up", "post, warm-up", "post", "without one it does not train (arXiv 2002.04745)"),
    ("Pre-norm needs no warm-up, post-norm does", PRE, "post", "arXiv 2002.04745"),
    ("QK-norm trains at higher rates", "pre, QK-norm", PRE, "arXiv 2302.05442; 10.84 against 11.19 (arXiv 2410.16682)"),
    ("A z-loss steadies training", "pre, z-loss", PRE, "arXiv 2204.02311"),
)


def get_config(scale: str = "cpu"):
    config = base()
    study = config.study
    study.name = "stability_ablation"
    study.question = "What keeps training stable at a learning rate that is too high?"
    study.labels = (("name", "variant"),)
    study.sections = ("stability", "curves")
    study.baseline = (("variant", PRE),)
    pairs = {f"{better} - {worse}": (better, worse) for _, better, worse, _ in CLAIMS}
    study.contrasts = tuple((name, *((("variant", side),) for side in sides)) for name, sides in pairs.items())
    study.hypotheses = tuple(
        (claim, (("single", f"{better} - {worse}", -1),), where) for claim, better, worse, where in CLAIMS
    )
    config.run.log.instruments = INSTRUMENTS
    config.train.update(dict(warmup=0, clip=float("inf"), final_learning_rate=0.0))
    SCALES[choose("the scale of configs/stability_ablation.py", scale, SCALES)](config)
    return config


def cells(low: float, warmup: int):
    """Pre-norm at the high rate, and what changes one or two things of it; `low`: the rate that is not too high."""
    warm = ("train.warmup", warmup)
    return chain(
        named(PRE),
        named("pre, low rate", ("train.learning_rate", low)),
        named("pre, warm-up", warm),
        named("pre, z-loss", Z_LOSS),
        named("pre, QK-norm", QK_NORM),
        named("pre, z-loss and QK-norm", Z_LOSS, QK_NORM),
        named("pre, LayerNorm", LAYER_NORM),
        named("pre, biases", *BIASES),
        named("post", POST),
        named("post, warm-up", POST, warm),
        named("post, QK-norm", POST, QK_NORM),
        named("post, LayerNorm", POST, LAYER_NORM),
        named("post, biases", POST, *BIASES),
    )


def cpu(config) -> None:
    """6 layers of width 48 on bytes of Python's own sources, 120 steps of 8 rows of 128 bytes.

    The rate: of 0.01, 0.02, 0.04 and 0.1 the least at which post-norm without a warm-up fails, on one seed."""
    config.model.update(dict(dim=48, layers=6))
    config.model.mixer.update(dict(heads=3, kv_heads=3, head_dim=16))
    config.model.feedforward.width = 128
    config.run.implementation = "reference"  # rows this short gain nothing from tiles
    config.run.scan = True  # eight programs, for few steps each
    config.study.cells = cells(low=3e-3, warmup=30)
    config.evaluate.loss.rows = 64
    config.train.update(dict(learning_rate=2e-2, steps=120))
    config.run.checkpoint.every = 120
    config.study.seeds = 5


def gpu(config) -> None:
    """512 wide, 8 layers, on Python's own sources: 1,000 steps of 16k tokens."""
    config.model.update(dict(dim=512, layers=8, vocabulary=6400, compute="bfloat16"))
    config.model.mixer.update(dict(heads=8, kv_heads=2, head_dim=64))
    config.model.feedforward.width = 1408
    config.run.update(dict(scan=True, remat="dots"))
    config.data.update(dict(tokenizer="bpe:6400", text_length=512, rows=32))
    config.study.cells = cells(low=1e-3, warmup=100)
    config.study.seeds = 3
    config.train.update(dict(learning_rate=3e-2, steps=1000))
    config.evaluate.loss.update(dict(texts=0, rows=32))
    config.run.checkpoint.every = 500


SCALES = {"cpu": cpu, "gpu": gpu}
