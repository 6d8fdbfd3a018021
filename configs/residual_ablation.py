"""Which way of combining layers beats the plain residual stream, and what in it brings the gain?

    python -m lab.main --config=configs/residual_ablation.py               # :cpu, which is :cpu-confirm
    python -m lab.main --config=configs/residual_ablation.py:cpu-v1        # sums of outputs in place of the residual
    python -m lab.main --config=configs/residual_ablation.py:cpu-v2        # means of outputs beside the residual
    python -m lab.main --config=configs/residual_ablation.py:cpu-v3        # earlier layers replayed on the new input
    python -m lab.main --config=configs/residual_ablation.py:cpu-v4        # scores summed over layers, tokens weighed
    python -m lab.main --config=configs/residual_ablation.py:cpu-sanity    # one layer against all: is it the layers?
    python -m lab.main --config=configs/residual_ablation.py:cpu-beyond    # DenseFormer, MUDDFormer, AttnRes, ...
    python -m lab.main --config=configs/residual_ablation.py:cpu-confirm   # the six best published, with more seeds
    python -m lab.plan --config=configs/residual_ablation.py:paper-v4      # :gpu and :paper have the same parts

Methods have the names of the study that they come from, v1m1 to v4mD; all cells of a part have the same steps and
batch. Beside V4: "temperature", one learned number for each layer, for methods 4 to 7; "temperature 2", scores halved,
for C. Methods that combine layers refuse a single one, so "sanity" has those that do not: C, D and the temperature.
V4-5 and V4-7 are one method when nothing decays: log a starts elsewhere and its gradients are the same.

:gpu and :paper have the published model of 51.65M parameters: 8 layers of 512, feed-forward 1024, 8 heads over 4
groups, and an untied vocabulary of 32,000. :paper has the published data (wikitext-103, blocks of 2048, 696M tokens,
batch 2; bring the texts) and, but in sanity and beyond, every method twice: as the source ran it (decay "all":
everything decays, V1 sums what comes after the residual, D and E read the normed input) and corrected (decay
"declared"). :cpu has 4 layers of 64.

Published (configs/published/residual_series.csv: one seed, repeats differ by about 0.002): baseline 2.5297, V4-1D
2.5155, V4-1E 2.5189, V2-3 2.5199, V4-1B 2.5220, V3-1 2.5253, V3-3.1 2.5259; V4-4 to V4-7 2.542 to 2.547. Seconds of an
evaluation: baseline 3.9, V3 6.3, V4-1 5.9, 1A to 1E 8.5 to 9.2, C 4.7, D 4.4.
"""

from typing import NamedTuple

from lab.config import base
from lab.errors import choose
from lab.study.define.cells import chain, named, product, vary

BASELINE, HALVED = "baseline", "temperature 2"
POST = ("v1m1", "v1m2", "v1m4", "v1m5", "v1m6", "v1m7")  # summed the stream after the residual in the source
INFERRED = ("v4m1D", "v4m1E", "v4mD")
POSITIONAL = ("v4m1A", "v4m1B", "v4m1C", "v4mC")
DEFAULT = "confirm"


class Part(NamedTuple):
    """Methods against the baseline. Contrasts: (name, sides), a side being a method or several."""

    question: str
    methods: tuple[str, ...]
    seeds: int  # at :cpu
    contrasts: tuple = ()
    hypotheses: tuple = ()
    groups: tuple = ()  # of learning curves: (title, methods), each beside the baseline
    published: bool = True


def less(plus: str, minus: str = BASELINE):
    return f"{plus} - {minus}", plus, minus


def numbered(version: str, numbers: str) -> tuple[str, ...]:
    return tuple(f"{version}m{number}" for number in numbers.split())


def expect(claim: str, *names: str, layer: str = "single"):
    """A claim that lowers the loss in each of the contrasts."""
    return claim, tuple((layer, name, -1) for name in names)


V1 = Part(
    "Can sums of earlier outputs take the place of the residual?",
    numbered("v1", "1 2 3 4 5 6 7"),
    seeds=4,
    contrasts=(less("v1m2", "v1m1"), less("v1m4", "v1m3"), less("v1m6", "v1m3")),
    hypotheses=(expect("A mean is better than a sum", "v1m2 - v1m1", "v1m4 - v1m3"),),
    groups=(
        ("after attention", numbered("v1", "1 2")),
        ("after the feed-forward", numbered("v1", "3 4")),
        ("after both", numbered("v1", "5 6 7")),
    ),
)
V2 = Part(
    "Does a mean of all outputs so far help beside the residual?",
    numbered("v2", "1 2 3"),
    seeds=4,
    contrasts=(less("v2m3"), less("v2m3", "v2m1")),
    hypotheses=(
        expect("A learned mean helps", "v2m3 - baseline"),
        expect("Learned weights are better than equal ones", "v2m3 - v2m1"),
    ),
)
V3 = Part(
    "Does it help to replay earlier layers on the current input?",
    numbered("v3", "1 2 3.1 3.2 4.1 4.2"),
    seeds=3,
    contrasts=(less("v3m1"), less("v3m3.1", "v3m1"), less("v3m3.2", "v3m3.1"), less("v3m4.2", "v3m4.1")),
    hypotheses=(
        expect("V3-1 helps", "v3m1 - baseline"),
        expect("Learned weights are better than equal ones", "v3m3.2 - v3m3.1", "v3m4.2 - v3m4.1"),
    ),
    groups=(
        ("after the feed-forward", numbered("v3", "1 3.1 3.2")),
        ("after attention", numbered("v3", "2 4.1 4.2")),
    ),
)
V4 = Part(
    "Which of token weights and scores summed over layers brings the gain, and which costs the time?",
    (*numbered("v4", "1 2 3 4 5 6 7 1A 1B 1C 1D 1E C D"), "temperature", HALVED),
    seeds=3,
    contrasts=(
        ("position weights", ("v4mC", "v4m1C"), (BASELINE, "v4m1")),
        ("inferred weights", ("v4mD", "v4m1D"), (BASELINE, "v4m1")),
        ("summed scores, with position weights or none", ("v4m1", "v4m1C"), (BASELINE, "v4mC")),
        ("summed scores, with inferred weights or none", ("v4m1", "v4m1D"), (BASELINE, "v4mD")),
        ("position weights x summed scores", "v4m1C", "v4mC", "v4m1", BASELINE),
        ("inferred weights x summed scores", "v4m1D", "v4mD", "v4m1", BASELINE),
        less("v4mD", "v4mC"),
        less("v4m1D", "v4m1C"),
        less("v4m1E", "v4m1B"),
        *(less(method, "temperature") for method in numbered("v4", "4 5 6 7")),
        less("v4mC", HALVED),
    ),
    hypotheses=(
        expect("Token weights bring the gain", "position weights", "inferred weights"),
        expect(
            "Summed scores bring the gain",
            "summed scores, with position weights or none",
            "summed scores, with inferred weights or none",
        ),
        expect(
            "Token weights and summed scores help each other",
            "position weights x summed scores",
            "inferred weights x summed scores",
            layer="crossed",
        ),
        expect("Inferred weights beat positional ones", "v4mD - v4mC", "v4m1D - v4m1C", "v4m1E - v4m1B"),
        expect(
            "V4-4 to V4-7 learn more than a temperature",
            *(f"{method} - temperature" for method in numbered("v4", "4 5 6 7")),
        ),
    ),
    groups=(
        ("fixed scales", numbered("v4", "1 2 3")),
        ("learned scales", (*numbered("v4", "4 5 6 7"), "temperature")),
        ("weights of positions", (*numbered("v4", "1A 1B 1C C"), HALVED)),
        ("inferred weights", numbered("v4", "1D 1E D")),
    ),
)
BEYOND = Part(
    "Which of the connections across layers that others propose helps, at the same steps and batch?",
    ("denseformer", "muddformer", "attnres", "attnres-block", "lime", "unet", "hyper", "mhc", "laurel", "resformer"),
    seeds=3,
    groups=(
        ("earlier outputs, weighed", ("denseformer", "muddformer", "attnres", "attnres-block", "lime", "unet")),
        ("other residuals", ("hyper", "mhc", "laurel", "resformer")),
    ),
    published=False,
)
SIX = ("v4m1D", "v4m1E", "v2m3", "v4m1B", "v3m1", "v3m3.1")
CONFIRM = Part(
    "Do the six best of the published methods beat the baseline, beyond the noise of seeds?",
    SIX,
    seeds=8,
    contrasts=tuple(less(method) for method in SIX),
    hypotheses=tuple(expect(f"{method} is better than the baseline", f"{method} - baseline") for method in SIX),
)
SANITY = Part(
    "Do weights of tokens help in a single layer as they do in all?",
    ("v4mC", "v4mD", "temperature"),
    seeds=4,
    published=False,
)
PARTS = {"v1": V1, "v2": V2, "v3": V3, "v4": V4, "sanity": SANITY, "beyond": BEYOND, "confirm": CONFIRM}


def cell(config, method: str, source: bool = False):
    """One method as `named` gives it; source: as its authors ran it."""
    model, fields = config.model, {}
    if method in POSITIONAL:
        fields["length"] = config.data.text_length
    if method in ("hyper", "mhc"):
        fields["copies"] = 4
    if method == "laurel":
        fields["rank"] = model.dim // 16
    if method == "attnres-block":
        fields["blocks"] = model.layers // 2
    if source and method in POST:
        fields["accumulate"] = "post"
    if source and method in INFERRED:
        fields["input"] = "normed"
    pairs = [(f"model.stream.{field}", value) for field, value in fields.items()]
    if method == HALVED:
        pairs.append(("model.mixer.softmax_scale", 0.5 * model.mixer.head_dim**-0.5))
    name = "plain" if method in (BASELINE, HALVED) else method
    return named(method, ("model.stream.name", name), *pairs)


def side(methods: str | tuple[str, ...], *others):
    return ("method", methods), *others


def compare(study, part: Part, *others, suffix: str = "") -> None:
    """Adds the contrasts of a part, and what is expected of them, among the cells that also have other labels."""
    told = lambda text: text + suffix  # noqa: E731
    for name, *sides in part.contrasts:
        study.contrasts += ((told(name), *(side(methods, *others) for methods in sides)),)
    for claim, expected in part.hypotheses:
        study.hypotheses += ((told(claim), tuple((layer, told(name), sign) for layer, name, sign in expected)),)


def set_part(config, part: Part) -> None:
    """The baseline and the methods of a part, and what they are compared in."""
    study, methods = config.study, (BASELINE, *part.methods)
    study.question = part.question
    study.baseline = (("method", BASELINE),)
    study.cells = chain(*(cell(config, method) for method in methods))
    study.groups = tuple((title, (BASELINE, *names)) for title, names in part.groups)
    study.sections = (*["series"] * part.published, "mixing", "curves")
    study.published = "configs/published/residual_series.csv" if part.published else ""
    if part is SANITY:
        add_layers(config)
    else:
        compare(study, part)


def add_layers(config) -> None:
    """Every cell with a single layer too; do the weights help more where there are others?"""
    study, all_ = config.study, config.model.layers
    study.cells = product(vary("model.layers", (1, all_)), study.cells)
    study.labels += (("model.layers", "layers"),)
    some = lambda method, layers: side(method, ("layers", layers))  # noqa: E731
    for method in SANITY.methods:
        for layers in (1, all_):
            study.contrasts += ((f"{method}, layers {layers}", some(method, layers), some(BASELINE, layers)),)
        study.contrasts += ((
            f"{method} x layers",
            some(method, all_), some(BASELINE, all_), some(method, 1), some(BASELINE, 1),
        ),)  # fmt: skip


def add_source(config, part: Part) -> None:
    """Every method also as its source ran it, and the contrasts among those."""
    study = config.study
    as_run = chain(*(cell(config, method, source=True) for method in (BASELINE, *part.methods)))
    study.cells = chain(
        product(as_run, vary("train.decay", ("all",))), product(study.cells, vary("train.decay", ("declared",)))
    )
    study.labels += (("train.decay", "decay"),)
    study.contrasts = study.hypotheses = ()
    compare(study, part, ("decay", "all"), suffix=", as the source ran it")
    compare(study, part, ("decay", "declared"), suffix=", corrected")


def cpu(config, part: Part) -> None:
    """4 layers of 64 on bytes of Python's own sources."""
    config.model.update(dict(dim=64, layers=4))
    config.model.mixer.update(dict(heads=4, kv_heads=2, head_dim=16))
    config.model.feedforward.width = 128
    config.train.update(dict(steps=200, learning_rate=5e-3, final_learning_rate=5e-4, warmup=20))
    config.run.checkpoint.every = 50  # TensorBoard has a point of each mixing weight at every checkpoint
    config.study.seeds = part.seeds
    set_part(config, part)


def published_model(config) -> None:
    config.model.update(dict(dim=512, layers=8, vocabulary=32_000, tied=False, compute="bfloat16"))
    config.model.mixer.update(dict(heads=8, kv_heads=4, head_dim=64))
    config.model.feedforward.width = 1024
    config.run.remat = "dots"
    config.data.tokenizer = "bpe:32000"


def gpu(config, part: Part) -> None:
    """The published model on Python's own sources, in blocks of 1024."""
    published_model(config)
    config.data.update(dict(text_length=1024, rows=8))
    config.train.update(dict(steps=2000, learning_rate=1e-3, final_learning_rate=1e-4, warmup=100))
    config.evaluate.loss.update(dict(texts=0, rows=8))
    config.run.checkpoint.every = 500
    config.study.seeds = 5 if part is CONFIRM else 3
    set_part(config, part)


def paper(config, part: Part) -> None:
    """696M tokens are 170,000 steps: five passes over the 68,000 blocks of wikitext-103, about as many as it has."""
    published_model(config)
    config.data.update(dict(corpus="jsonl", text_length=2048, rows=2, texts=68_000))
    config.train.update(dict(steps=170_000, learning_rate=3e-4, final_learning_rate=0.0, warmup=1000))
    config.evaluate.loss.update(dict(texts=96, rows=2))
    config.run.checkpoint.every = 5000
    config.study.seeds = 3 if part is CONFIRM else 1
    set_part(config, part)
    if part.published:
        add_source(config, part)


SCALES = {
    "-".join(filter(None, (scale.__name__, name))): (scale, name or DEFAULT)
    for scale in (cpu, gpu, paper)
    for name in ("", *PARTS)
}


def get_config(scale: str = "cpu"):
    config = base()
    config.study.labels = (("name", "method"),)
    config.train.weight_decay = 0.1
    set_up, part = SCALES[choose("the scale of configs/residual_ablation.py", scale, SCALES)]
    set_up(config, PARTS[part])
    config.study.name = f"residual_ablation_{part}"
    return config
