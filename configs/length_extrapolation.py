"""How far does a model reach beyond the length that it was trained to, by which method, and what do short texts pay?

    python -m lab.main --config=configs/length_extrapolation.py                            # :cpu, minutes on two cores
    python -m lab.main --config=configs/length_extrapolation.py:2048 --config.checkpoint=DIR    # of any, L = 2048
    python -m lab.main --config=configs/length_extrapolation.py:llama3 --config.checkpoint=DIR    # 16k to 48k tokens
    python -m lab.main --config=configs/length_extrapolation.py:qwen25 --config.checkpoint=DIR    # 4k to 40k

One model, asked by every method at every length; nothing is trained but, at :cpu without a checkpoint, a small model on
texts of L = 128 bytes, which is then stretched to 2 L, 4 L and 8 L. A checkpoint that was trained to another L is asked
by :L, such as :2048. DIR is the
directory of a cell, or of a model that `python -m lab.convert from-hf` wrote. Long texts are the validation texts of
data.corpus, joined; --config.data.corpus=files --config.data.path='books/*.txt' reads others. docs/long_contexts.md
says how everything is measured. At :llama3 and :qwen25, tasks of retrieval are messages in the chat template, where one
came with the tokenizer.

Published of hybrid positions (L + (p - L) / cf beyond L; configs/published/extrapolation_*.csv), hypotheses here: cf 2
is best, the best cf grows with the stretch, no harm within L, no overhead. The published table itself has cf 1.5 ahead
up to 4 L, and cf 2 behind the plain model up to 3.5 L; that of Qwen2.5 never passed L, so that nothing acted.
"""

from lab.config import add_ask, base, sized
from lab.errors import choose

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


def ask_all(config, L: int, lengths: tuple[int, ...], retrieval: dict, **fields) -> None:
    """Asks of the plain model and of every method, over lengths of text and of tasks of retrieval."""
    add_ask(config, "plain", "length", lengths=lengths, trained=L, **fields)
    shared = dict(trained=L) | {field: fields[field] for field in ("rows", "chunk", "bos") if field in fields}
    add_ask(config, "plain_answers", "retrieval", **shared, **retrieval)
    for name, method in METHODS.items():
        overrides = ("position.trained", L), ("position.unselected", "time"), *method(L, max(lengths))
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
    if scale.isdecimal():
        checkpoint(config, int(scale))
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
    config.data.update(dict(text_length=min(L, 2048), rows=1))
    config.evaluate.loss.update(dict(texts=16, rows=1))
    retrieval = dict(lengths=(4 * L, 8 * L), tasks=TASKS, texts=10)
    ask_all(
        config, L, (L, 2 * L, 4 * L, 8 * L), retrieval, documents=10, texts=0, rows=1, chunk=min(L, 512), stride=L // 2
    )


def llama3(config) -> None:
    """Llama 3 8B, L = 8192: the seven published lengths."""
    llm(config, dim=4096, layers=32, width=14336, heads=32, groups=8, vocabulary=128_256, theta=5e5)
    config.study.name = "length_extrapolation_llama3"
    lengths = (8192, 16384, 20480, 24576, 28672, 32768, 40960, 49152)
    retrieval = dict(lengths=(16384, 32768, 49152), tasks=TASKS, texts=10, chat=True)
    ask_all(config, 8192, lengths, retrieval, documents=10, texts=0, rows=1, chunk=512, stride=0, bos=128_000)


def qwen25(config) -> None:
    """Qwen2.5 7B, L = 32768: the published lengths, in real tokens, and one beyond L."""
    llm(config, dim=3584, layers=28, width=18944, heads=28, groups=4, vocabulary=152_064, theta=1e6)
    config.study.name = "length_extrapolation_qwen25"
    config.study.published = "configs/published/extrapolation_qwen25.csv"
    config.model.norm.eps = 1e-6
    config.model.mixer.bias = "qkv"
    lengths = (4096, 8192, 16384, 24576, 32768, 40960)
    retrieval = dict(lengths=(16384, 40960), tasks=TASKS, texts=10, chat=True)
    ask_all(config, 32768, lengths, retrieval, documents=10, texts=0, rows=1, chunk=512, stride=0)


def llm(config, dim: int, layers: int, width: int, heads: int, groups: int, vocabulary: int, theta: float):
    """A model of that shape; its weights are to be brought by config.checkpoint."""
    config.model.update(dict(dim=dim, layers=layers, vocabulary=vocabulary, compute="bfloat16", tied=False))
    config.model.mixer.update(dict(heads=heads, kv_heads=groups, head_dim=dim // heads))
    config.model.feedforward.width = width
    config.model.position.theta = theta
    config.data.update(dict(text_length=2048, rows=1))
    config.evaluate.loss.update(dict(texts=16, rows=1))
    config.run.scan = True


SCALES = {"cpu": cpu, "llama3": llama3, "qwen25": qwen25}
