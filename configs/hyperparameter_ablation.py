"""Which hyper-parameters of a Transformer matter at a fixed size: widths, depth, heads, regularisation, batch and rate?

    python -m lab.main --config=configs/hyperparameter_ablation.py               # :cpu, the part "ffn", 6 minutes
    python -m lab.main --config=configs/hyperparameter_ablation.py:cpu-heads     # and aspect, regularisation,
    python -m lab.main --config=configs/hyperparameter_ablation.py:cpu-batch     #     repeated, batch, recall
    python -m lab.plan --config=configs/hyperparameter_ablation.py:paper-aspect  # :gpu and :paper have the same parts

Sizes are matched on parameters, embeddings among them: the solver finds the width of the feed-forward.
configs/vocabulary_ablation.py has the vocabulary, since it is judged in bits per byte.

Published: losses hardly move for d_ff / d from 1 to 4, and rise by 1.8% at 8 and by 8% near 50; they hardly move for
models 50 to 300 times as wide as deep (arXiv 2001.08361, figure 5); models have d_ff = 4 d, 8/3 d where gated, H x
head_dim = d, and 100 to 200 of width for a layer; weight decay helps by way of the schedule and lowers the training
loss (arXiv 2310.04415); dropout is for data that is read more than once.
"""

from lab.config import SIZES, base, sized
from lab.errors import choose
from lab.evaluate.asks import ask
from lab.study.define.cells import chain, matched, named, product, vary, zipped

RATIOS = (1, 2, 8 / 3, 4, 8, 16, 32, 64)  # of a gated feed-forward to the model
HEADS = (0.5, 1, 2, 4, 8, 16)  # of all query heads to the model
DECAYS = (0.0, 0.01, 0.1, 0.3, 1.0)
KAPLAN = "(arXiv 2001.08361, figure 5)"
GATED = 8 / 3
BASELINE = "baseline"
ONCE = 3_840  # texts of 512 tokens that the smallest standard library has


def even(number: float) -> int:
    return 2 * max(1, round(number / 2))


def shape(config, *, ffn: float = GATED, heads: float = 1.0, layers: int | None = None) -> tuple:
    """Fields of a model with these ratios to its width, so wide that its layers have about the config's parameters.

    A layer of width d has (4 heads + 3 ffn) d^2 of them. All of a model's heads together are as wide as it is, and as
    many as the config's; where they are not, each is as wide as the config's.
    """
    model, mixer = config.model, config.model.mixer
    layers = layers or model.layers
    wanted = model.layers * (4 + 3 * GATED) * model.dim**2
    width = (wanted / (layers * (4 * heads + 3 * ffn))) ** 0.5
    if heads == 1:
        count, each = mixer.heads, even(width / mixer.heads)
        dim = count * each
    else:
        count, each, dim = max(1, round(heads * width / mixer.head_dim)), mixer.head_dim, even(width)
    return (
        ("model.dim", dim),
        ("model.layers", layers),
        ("model.mixer.heads", count),
        ("model.mixer.kv_heads", count),
        ("model.mixer.head_dim", each),
    )


def alike(group):
    """The overrides, each with the baseline's parameters, embeddings among them, by the width of its feed-forward."""
    return matched(group, to=BASELINE, on="parameters", by="model.feedforward.width")


def sweep(config, name: str, **values) -> tuple:
    """The baseline, and a matched cell for every other value of a ratio of `shape`."""
    ((ratio, numbers),) = values.items()
    others = (named(f"{name} {number:.3g}", *shape(config, **{ratio: number})) for number in numbers)
    return chain(named(BASELINE), alike(chain(*others)))


def expect(study, *claims: tuple[str, tuple, tuple, str]) -> None:
    """Hypotheses (claim, better, worse, what was published of it and where) of sides (label, value), ..."""
    study.contrasts = tuple((claim, better, worse) for claim, better, worse, _ in claims)
    study.hypotheses = tuple((claim, (("single", claim, -1),), published) for claim, *_, published in claims)


def part_ffn(config) -> None:
    study = config.study
    study.question = "How wide a feed-forward, at equal parameters?"
    study.cells = sweep(config, "d_ff / d", ffn=[r for r in RATIOS if r != GATED])
    best = (("variant", BASELINE),)
    expect(
        study,
        ("d_ff / d of 8 is too wide", best, (("variant", "d_ff / d 8"),), f"1.8% {KAPLAN}"),
        ("d_ff / d of 64 is too wide", best, (("variant", "d_ff / d 64"),), f"8% near 50 {KAPLAN}"),
    )


def part_heads(config) -> None:
    config.study.question = "How much of a model should its heads be, at equal parameters?"
    config.study.cells = sweep(config, "H hd / d", heads=[r for r in HEADS if r != 1])


def part_aspect(config) -> None:
    config.study.question = "Wide or deep, at equal parameters?"
    depth = config.model.layers
    layers = [n for n in (depth // 4, depth // 2, 2 * depth, 4 * depth) if n]
    config.study.cells = sweep(config, "layers", layers=layers)


def part_regularisation(config) -> None:
    """Weight decay under three schedules: they share one program. The section on stability has the weights' norms."""
    study = config.study
    study.question = "Does weight decay help by itself, or by way of the schedule?"
    study.labels = (("train.schedule", "schedule"), ("train.weight_decay", "decay"))
    study.seeds = min(study.seeds, 4)  # of fifteen cells
    config.train.final_learning_rate = config.train.learning_rate / 100
    study.cells = product(vary("train.schedule", ("constant", "cosine", FAST)), vary("train.weight_decay", DECAYS))
    study.baseline = (("decay", 0.0),)
    study.sections = ("stability", "curves")
    config.run.log.instruments = ("weights", "updates")
    cosine = lambda decay: (("schedule", "cosine"), ("decay", decay))  # noqa: E731
    expect(
        study,
        ("Some decay helps where the rate falls", cosine(0.1), cosine(0.0), "training loss too (arXiv 2310.04415)"),
    )


def part_repeated(config) -> None:
    """Texts that are read once, and a tenth of them read ten times; as long as the library has texts for."""
    study = config.study
    study.question = "Do dropout and decay help where texts are read more than once?"
    study.labels = (("data.texts", "texts"), ("name", "regularised"))
    if config.data.corpus == "stdlib":
        config.train.steps = min(config.train.steps, ONCE // config.data.rows)
    texts = config.train.steps * config.data.rows * config.data.texts_per_row
    study.cells = product(
        vary("data.texts", (texts, texts // 10)),
        chain(
            named("no"),
            named("dropout 0.1", ("train.dropout.residual", 0.1), ("train.dropout.embedding", 0.1)),
            named("decay 1", ("train.weight_decay", 1.0)),
        ),
    )
    study.baseline = (("regularised", "no"),)
    arm = lambda texts, name: (("texts", texts), ("regularised", name))  # noqa: E731
    once, often = ((arm(n, "dropout 0.1"), arm(n, "no")) for n in (texts, texts // 10))
    expect(
        study,
        ("Dropout helps where texts are read ten times", *often, "over several epochs (arXiv 2305.13230)"),
        ("Dropout hurts where they are read once", *once[::-1], "over one epoch (arXiv 2505.24788)"),
    )


def part_batch(config) -> None:
    """As many tokens for all; a learning rate for each size of a batch."""
    study, rows = config.study, config.data.rows
    study.question = "Which learning rate does a batch want?"
    study.seeds = min(study.seeds, 4)  # of twelve cells
    study.labels = (("data.rows", "rows"), ("train.learning_rate", "rate"))
    rate = config.train.learning_rate
    config.train.final_learning_rate = 0.0
    sizes = (rows // 2, rows, 2 * rows)
    steps = tuple(config.train.steps * rows // size for size in sizes)
    study.cells = product(
        zipped(vary("data.rows", sizes), vary("train.steps", steps)),
        vary("train.learning_rate", (rate / 4, rate / 2, rate, 2 * rate)),
    )
    study.baseline = (("rate", rate),)


def part_recall(config) -> None:
    """Pairs to recall, by the share of heads and by key heads; not matched: the smaller have fewer parameters."""
    study, mixer = config.study, config.model.mixer
    study.question = "Do more or fewer heads recall better?"
    heads = lambda count, groups: (("model.mixer.heads", count), ("model.mixer.kv_heads", groups))  # noqa: E731
    count = mixer.heads
    study.cells = chain(
        named(BASELINE),
        *(named(f"H hd / d {r:g}", *heads(int(r * count), int(r * count))) for r in (0.5, 2, 4)),
        *(named(f"{groups} key heads", *heads(count, groups)) for groups in (count // 2, 1)),
    )
    study.sections = ("accuracy", "curves")
    config.data.update(dict(corpus="mqar", tokenizer="bytes", texts=0))
    config.data.text_length = 64
    config.data.rows = 32
    config.data.probe.difficulty = "4-12"
    config.evaluate.loss = ask("difficulty", difficulties=(4, 8, 12), texts=256, rows=64)


FAST = "exponential"
PARTS = {
    "ffn": part_ffn, "heads": part_heads, "aspect": part_aspect, "regularisation": part_regularisation,
    "repeated": part_repeated, "batch": part_batch, "recall": part_recall,
}  # fmt: skip


SCALES = {f"{size}-{part}" if part != "ffn" else size: (size, part) for size in SIZES for part in PARTS}


def get_config(scale: str = "cpu"):
    size, part = SCALES[choose("the scale of configs/hyperparameter_ablation.py", scale, SCALES)]
    config = sized(base(), size)
    config.study.name = f"hyperparameter_ablation_{part}"
    config.study.labels = (("name", "variant"),)
    config.study.sections = ("curves",)
    if part in ("ffn", "heads", "aspect", "recall"):
        config.study.baseline = (("variant", BASELINE),)
    PARTS[part](config)
    return config
