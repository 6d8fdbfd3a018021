"""How does the loss of the baseline fall with parameters and tokens?

    python -m lab.main --config=configs/scaling_ladder.py         # :cpu, 4 sizes at 3 ratios; 18 minutes of a core
    python -m lab.main --config=configs/scaling_ladder.py:gpu --config.data.path=texts.jsonl      # 0.8M to 25M, hours
    python -m lab.main --config=configs/scaling_ladder.py:paper --config.data.path=texts.jsonl    # 25M to 1.2B
    python -m lab.plan --config=configs/scaling_ladder.py:pod --topology=v6e:16x16    # 7B and 70B: docs/scale.md

A ladder of sizes, each at several ratios of training tokens to parameters (embeddings not counted), every cell with a
cosine of its own length: what the fit L = E + A / N^a + B / D^b needs, in the section Scaling. All sizes have the same
learning rate; `study.tune` would tune each. :gpu and :paper read no text twice, and :cpu hardly: bring as many as
`data.texts` says. A ladder for variants is `study.rungs` of their own study.

Published: E 1.69, A 406.4, B 410.7, a 0.34, b 0.28 (Hoffmann et al. 2022, arXiv 2203.15556), of which a refit makes
1.8172, 482.01, 2085.43, 0.3478, 0.3658 (Besiroglu et al. 2024, arXiv 2404.10102): 70M to 16B parameters, embeddings
counted, on other texts. So compare the exponents. A model of bytes has another E.
"""

from typing import NamedTuple

from lab.config import base
from lab.errors import choose
from lab.model import presets
from lab.study.define.cells import chain, named


class Size(NamedTuple):
    dim: int
    layers: int
    heads: int
    kv_heads: int
    inner: int = 0

    @property
    def width(self) -> int:
        """Of the feed-forward: 8/3 of the model's, in eights, if none is given."""
        return self.inner or 8 * round(self.dim / 3)

    @property
    def parameters(self) -> int:
        """Those of the matrices of its layers."""
        attention = 2 * self.dim * self.dim * (self.heads + self.kv_heads) // self.heads
        return self.layers * (attention + 3 * self.dim * self.width)


def get_config(scale: str = "cpu"):
    config = base()
    study = config.study
    study.name = "scaling_ladder"
    study.question = "How does the loss of the baseline fall with parameters and tokens?"
    study.labels = (("name", "model"),)
    study.sections = ("scaling", "curves")
    SCALES[choose("the scale of configs/scaling_ladder.py", scale, SCALES)](config)
    return config


def set_cells(config, sizes: tuple[Size, ...], ratios: tuple[int, ...]) -> None:
    """Every size at every ratio of tokens to parameters, in steps of the config's batch; texts for the longest."""
    batch = config.data.rows * config.data.text_length
    steps = {(size, ratio): round(ratio * size.parameters / batch) for size in sizes for ratio in ratios}
    config.study.cells = chain(*(cell(*of, count) for of, count in steps.items()))
    if config.data.corpus == "jsonl":
        config.train.steps = max(steps.values())
        config.data.texts = config.train.steps * config.data.rows


def cell(size: Size, ratio: int, steps: int):
    return named(
        f"{size.dim} x {size.layers}, ratio {ratio}",
        ("model.dim", size.dim),
        ("model.layers", size.layers),
        ("model.mixer.heads", size.heads),
        ("model.mixer.kv_heads", size.kv_heads),
        ("model.mixer.head_dim", size.dim // size.heads),
        ("model.feedforward.width", size.width),
        ("train.steps", steps),
    )


def cpu(config) -> None:
    """2 layers on bytes of Python's own sources, 8 rows of 128 bytes: 0.02M to 0.14M parameters, 0.2M to 5.7M bytes."""
    config.run.implementation = "reference"  # rows this short gain nothing from tiles
    config.run.checkpoint.every = 1000
    config.run.log.every = 50
    config.evaluate.loss.rows = 64
    config.train.update(dict(learning_rate=3e-3, final_learning_rate=3e-4, warmup=20))
    set_cells(config, tuple(Size(dim, 2, 4, 2) for dim in (32, 48, 64, 80)), (10, 20, 40))


def gpu(config) -> None:
    """Steps of 16k tokens, 1G tokens at most."""
    config.model.update(dict(vocabulary=6400, compute="bfloat16"))
    config.run.update(dict(scan=True, remat="dots"))
    config.data.update(dict(corpus="jsonl", tokenizer="bpe:6400", text_length=512, rows=32))
    config.train.update(dict(learning_rate=1e-3, final_learning_rate=1e-4, warmup=50))
    config.evaluate.loss.update(dict(texts=2048, rows=32))
    config.run.checkpoint.every = 2000
    sizes = Size(128, 4, 2, 2), Size(192, 4, 3, 3), Size(256, 6, 4, 4), Size(384, 6, 6, 6), Size(512, 8, 8, 8)
    set_cells(config, sizes, (10, 20, 40))


def paper(config) -> None:
    """Steps of 0.5M tokens, 48G tokens at most."""
    gpu(config)
    config.model.vocabulary = 32_000
    config.data.update(dict(tokenizer="bpe:32000", text_length=2048, rows=256))
    config.train.update(dict(learning_rate=4e-4, final_learning_rate=4e-5, warmup=100))
    config.evaluate.loss.update(dict(texts=4096, rows=32))
    sizes = (Size(dim, layers, dim // 64, dim // 64) for dim, layers in (
        (512, 8), (768, 12), (1024, 16), (1536, 20), (2048, 24)
    ))  # fmt: skip
    set_cells(config, tuple(sizes), (5, 10, 20, 40))


def pod(config) -> None:
    """Llama 2 of 7B and 70B (arXiv 2307.09288) in its steps of 4M tokens, for slices of TPUs."""
    paper(config)
    presets.apply(config.model, "llama")
    config.run.remat = "full"
    config.data.update(dict(text_length=4096, rows=1024))
    config.train.update(dict(learning_rate=3e-4, final_learning_rate=3e-5, warmup=2000))
    set_cells(config, (Size(4096, 32, 32, 32, 11_008), Size(8192, 80, 64, 8, 28_672)), (20,))


SCALES = {"cpu": cpu, "gpu": gpu, "paper": paper, "pod": pod}
