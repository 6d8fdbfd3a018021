"""How far does a model reach beyond the length that it was trained to, by which method, and what do short texts pay?

    python -m lab.main --config=configs/length_extrapolation.py                            # :cpu, minutes on two cores
    python -m lab.main --config=configs/length_extrapolation.py:2048 --config.checkpoint=DIR    # of any, L = 2048
    python -m lab.main --config=configs/length_extrapolation.py:llama3 --config.checkpoint=DIR    # 8k to 48k tokens
    python -m lab.main --config=configs/length_extrapolation.py:qwen25 --config.checkpoint=DIR    # 4k to 48k
    python -m lab.main --config=configs/length_extrapolation.py:mistral --config.checkpoint=DIR   # v0.3, 16k to 64k
    python -m lab.main --config=configs/length_extrapolation.py:gemma2 --config.checkpoint=DIR    # its global layers

One model, asked by every method at every length; nothing is trained but, at :cpu without a checkpoint, a small model
on texts of L = 128 bytes, which is then stretched to 2 L, 4 L and 8 L. A checkpoint that was trained to another L is
asked by :L, such as :2048. DIR is the directory of a cell, or of a model that `python -m lab.convert from-hf` wrote.
Long texts are the validation texts of data.corpus, joined; --config.data.corpus=files --config.data.path='books/*.txt'
reads others. docs/long_contexts.md says how everything is measured; tasks of retrieval of a named model are messages
in the chat template, where one came with the tokenizer. A scale of a named model over N, such as :llama3/32, is its
rehearsal: every length, and L, is divided by N, and texts have no BOS; a model of L / N tokens is brought.

Published of hybrid positions (L + (p - L) / cf beyond L; configs/published/extrapolation_*.csv), hypotheses here: cf 2
is best, the best cf grows with the stretch, no harm within L, no overhead. The published table itself has cf 1.5 ahead
of cf 2 up to 4 L, behind the plain model at 2 L, and cf 2 behind the plain model up to 3.5 L; that of Qwen2.5 never
passed L, so that nothing acted. The future work that its source names is here: cf 1.8, hybrids of YaRN, NTK-aware and
dynamic frequencies, Mistral, Gemma, and Qwen at lengths that its tokens do pass.
"""

import functools
from typing import NamedTuple

from lab.config import add_ask, base, sized
from lab.errors import choose
from lab.model import presets

CFS = (1.25, 1.5, 1.8, 2.0, 2.5, 3.0, 4.0)
TASKS = ("passkey", "needle", "needle-keys", "needle-values", "tracking", "frequent")


def scaled(name: str):
    """A frequency map whose factor is the longest length over L."""
    return lambda L, longest: (("position.scaling.name", name), ("position.length", longest))


def mapped(name: str, **fields):
    """A position map; a field is a number, or a function of L to one."""

    def overrides(L: int, longest: int):
        values = {field: value(L) if callable(value) else value for field, value in fields.items()}
        return ("position.map.name", name), *((f"position.map.{field}", value) for field, value in values.items())

    return overrides


def log_n(L: int, longest: int):
    """Queries that grow with the logarithm of the time."""
    return (("position.log_n", True),)


def all_of(*parts):
    """First the frequency map, then the position map."""
    return lambda L, longest: tuple(pair for part in parts for pair in part(L, longest))


METHODS = {
    "linear": scaled("linear"),
    "ntk": scaled("ntk"),
    "dynamic": scaled("dynamic"),
    "ntk_by_parts": scaled("ntk-by-parts"),
    "yarn": scaled("yarn"),
    **{f"hybrid_cf{cf:g}".replace(".", "_"): mapped("hybrid", cf=cf) for cf in CFS},
    "rerope": mapped("rerope"),
    "leaky_rerope": mapped("leaky", window=lambda L: L // 2, leak=16.0),
    "self_extend": mapped("self-extend", window=lambda L: L // 4, group=16),
    "dca": mapped("dca"),
    "lm_infinite": mapped("lm-infinite"),
    "streaming": mapped("streaming", window=lambda L: L - 4),
    "log_n": log_n,
    # What the source of the hybrid names as future work.
    "hybrid_yarn": all_of(scaled("yarn"), mapped("hybrid", cf=2.0)),
    "hybrid_ntk": all_of(scaled("ntk"), mapped("hybrid", cf=2.0)),
    "hybrid_dynamic": all_of(scaled("dynamic"), mapped("hybrid", cf=2.0)),
    "hybrid_log_n": all_of(mapped("hybrid", cf=2.0), log_n),
}


def ask_all(config, L: int, lengths: tuple[int, ...], retrieval: dict, further=(), **fields) -> None:
    """Asks of the plain model and of every method, over lengths of text and of tasks of retrieval. further: what every
    method overrides, too."""
    add_ask(config, "plain", "length", lengths=lengths, trained=L, **fields)
    shared = dict(trained=L) | {field: fields[field] for field in ("rows", "chunk", "bos") if field in fields}
    add_ask(config, "plain_answers", "retrieval", **shared, **retrieval)
    for name, method in METHODS.items():
        overrides = ("position.trained", L), ("position.unselected", "time"), *method(L, max(lengths)), *further
        add_ask(config, name, "length", lengths=lengths, trained=L, model=overrides, **fields)
        add_ask(config, f"{name}_answers", "retrieval", model=overrides, **shared, **retrieval)


def get_config(scale: str = "cpu"):
    config = base()
    study = config.study
    study.name = "length_extrapolation"
    study.question = "How far does a model reach beyond the length that it was trained to, and what do short texts pay?"
    study.sections = ("lengths", "curves")
    study.published = "configs/published/extrapolation_llama3.csv"
    study.untrained = True  # of a checkpoint
    name, _, part = scale.partition("/")
    if scale.isdecimal():
        checkpoint(config, int(scale))
    elif name in LLMS and part.isdecimal():
        llm(config, name, int(part))
    else:
        told = "the scale of configs/length_extrapolation.py (or the L of a checkpoint, as 2048)"
        SCALES[choose(told, scale, SCALES)](config)
    return config


def cpu(config) -> None:
    """4 layers of width 64, 600 steps on texts of 128 bytes."""
    sized(config, "cpu")
    config.study.seeds = 1
    config.train.update(dict(steps=600, warmup=40))
    config.data.rows = 16
    config.run.checkpoint.every = 600
    config.run.scan = True
    retrieval = dict(lengths=(512, 1024), tasks=("passkey", "needle", "tracking"), texts=16)
    ask_all(config, 128, (128, 256, 512, 1024), retrieval, documents=16, texts=0, rows=16, chunk=128, stride=64)


def checkpoint(config, L: int) -> None:
    """Any model that was trained to L tokens: up to 8 L."""
    config.study.name = f"length_extrapolation_{L}"
    config.study.brings = f"a model that was trained to {L} tokens"
    config.data.update(dict(text_length=min(L, 2048), rows=1))
    config.evaluate.loss.update(dict(texts=16, rows=1))
    retrieval = dict(lengths=(4 * L, 8 * L), tasks=TASKS, texts=10)
    ask_all(
        config, L, (L, 2 * L, 4 * L, 8 * L), retrieval, documents=10, texts=0, rows=1, chunk=min(L, 512), stride=L // 2
    )


class Llm(NamedTuple):
    """A published model. told: what is to be brought. L: what it was trained to. sizes: dim, layers, width, heads,
    groups, width of a head, vocabulary, theta. bos: what it was fed before a text. preset: what else it is made of.
    windows: whether every second layer has one, and so keeps its positions: none of its distances is beyond L."""

    told: str
    L: int
    lengths: tuple[int, ...]
    retrieval: tuple[int, ...]
    sizes: tuple[int, int, int, int, int, int, int, float]
    bos: int = -1
    preset: str = "llama"
    published: str = "configs/published/extrapolation_llama3.csv"
    windows: bool = False


KEPT = (("position.map.name", "none"), ("position.scaling.name", "default"), ("position.log_n", False))
LLMS = {
    "llama3": Llm(
        "Llama 3 8B", 8192, (8192, 16384, 20480, 24576, 28672, 32768, 40960, 49152), (16384, 32768, 49152),
        (4096, 32, 14336, 32, 8, 128, 128_256, 5e5), bos=128_000,
    ),
    # The published lengths, in real tokens, and one more beyond L.
    "qwen25": Llm(
        "Qwen2.5 7B", 32768, (4096, 8192, 16384, 24576, 32768, 40960, 49152), (16384, 49152),
        (3584, 28, 18944, 28, 4, 128, 152_064, 1e6), preset="qwen2",
        published="configs/published/extrapolation_qwen25.csv",
    ),
    "mistral": Llm(
        "Mistral 7B v0.3, which has no window", 32768, (16384, 32768, 49152, 65536), (32768, 65536),
        (4096, 32, 14336, 32, 8, 128, 32_768, 1e6), bos=1,
    ),
    "gemma2": Llm(
        "Gemma 2 9B", 8192, (8192, 16384, 32768), (16384, 32768),
        (3584, 42, 14336, 16, 8, 256, 256_000, 1e4), bos=2, preset="gemma2", windows=True,
    ),
}  # fmt: skip


def llm(config, name: str, part: int = 1) -> None:
    """A named model, whose weights are to be brought by config.checkpoint; every length over `part`."""
    of = LLMS[name]
    L, lengths, answers = of.L // part, *(tuple(n // part for n in each) for each in (of.lengths, of.retrieval))
    config.study.name = f"length_extrapolation_{name}" + (f"_{part}" if part > 1 else "")
    config.study.brings = of.told if part == 1 else f"a model of the family of {of.told} that was trained to {L} tokens"
    config.study.published = of.published
    dim, layers, width, heads, groups, head_dim, vocabulary, theta = of.sizes
    config.model.update(dict(dim=dim, layers=layers, vocabulary=vocabulary, compute="bfloat16"))
    config.model.mixer.update(dict(heads=heads, kv_heads=groups, head_dim=head_dim))
    config.model.feedforward.width = width
    presets.apply(config.model, of.preset)
    config.model.position.theta = theta
    config.data.update(dict(text_length=min(2048, L), rows=1))
    config.evaluate.loss.update(dict(texts=16, rows=1))
    config.run.scan = True
    retrieval, bos = dict(lengths=answers, tasks=TASKS, texts=10, chat=True), of.bos if part == 1 else -1
    fields = dict(documents=10, texts=0, rows=1, chunk=min(512, L), stride=0, bos=bos)
    ask_all(config, L, lengths, retrieval, further=(("pattern", (KEPT, ())),) if of.windows else (), **fields)


SCALES = {"cpu": cpu} | {name: functools.partial(llm, name=name) for name in LLMS}
