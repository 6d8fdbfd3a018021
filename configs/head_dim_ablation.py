"""Does the best share of rotary pairs for the branch move with the width of a head?

    python -m lab.main --config=configs/head_dim_ablation.py         # :cpu, 30 cells
    python -m lab.main --config=configs/head_dim_ablation.py:gpu     # 25.8M parameters
    python -m lab.main --config=configs/head_dim_ablation.py:paper --config.data.path=texts.jsonl    # 272.4M
    python -m lab.plan --config=configs/head_dim_ablation.py:1b      # the open question: 1B parameters

The width of the model is fixed and cut into 8, 16 or 32 heads (:1b 16, 32 or 64) that share groups 4 to 1, so every
cell has the same number of parameters and 4 times fewer rotary pairs at one end than at the other.

Published (configs/published/head_dim_1024.csv: 1024 wide, 272M, 16,000 steps, one seed): at 64 branches ratio 1.0 is
best for all three, and 16 heads of 64 are best among them (2.82, against 2.96 and 2.99); at one branch, 32 heads of 32
(2.67).
"""

from lab.config import base, branches
from lab.errors import choose
from lab.study.define.cells import chain, named, product, vary

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
DRAWS = ("fixed1", "1-15")


def get_config(scale: str = "cpu"):
    config = branches(base())
    study = config.study
    study.name = "head_dim_ablation"
    study.question = "Does the best share of rotary pairs for the branch move with the width of a head?"
    study.labels = (("name", "head"), ("model.position.ratio", "rope_ratio"), ("data.draw", "train_branch"))
    study.sections = (("branches", "rope_ratio", "train_branch", "head"), "curves")
    study.published = "configs/published/head_dim_1024.csv"
    SCALES[choose("the scale of configs/head_dim_ablation.py", scale, SCALES)](config)
    return config


def cells(dim: int, heads: tuple[int, ...]):
    """Every head shape at every ratio and draw."""
    shapes = (
        (("model.mixer.heads", h), ("model.mixer.kv_heads", h // 4), ("model.mixer.head_dim", dim // h)) for h in heads
    )
    shapes = chain(*(named(f"h{h}", *shape) for h, shape in zip(heads, shapes, strict=True)))
    return product(shapes, vary("model.position.ratio", RATIOS), vary("data.draw", DRAWS))


def cpu(config) -> None:
    """2 layers of width 256 on bytes of Python's own sources: 16, 8 or 4 rotary pairs a head."""
    config.model.update(dict(dim=256, layers=2))
    config.model.feedforward.width = 512
    config.study.cells = cells(256, (8, 16, 32))
    config.train.steps = 200


def gpu(config) -> None:
    """512 wide, 8 layers, on Python's own sources."""
    config.model.update(dict(dim=512, layers=8, vocabulary=6400, compute="bfloat16"))
    config.model.feedforward.width = 1408
    config.run.update(dict(scan=True, remat="dots"))
    config.study.cells = cells(512, (8, 16, 32))
    config.data.update(dict(tokenizer="bpe:6400", text_length=256, texts_per_row=16, rows=4))
    config.train.update(dict(steps=1000, learning_rate=1e-3, final_learning_rate=1e-4, warmup=50))
    config.evaluate.loss.update(dict(texts=0, texts_per_row=192, rows=1))
    config.run.checkpoint.every = 500


def paper(config) -> None:
    """The published setting; bring its data: 1,024,000 training and 200,000 validation texts."""
    gpu(config)
    config.model.update(dict(dim=1024, layers=24))
    config.model.feedforward.width = 2752
    config.study.cells = cells(1024, (8, 16, 32))
    config.data.update(dict(corpus="jsonl", long_texts="truncate", texts=1_024_000))
    config.train.update(dict(steps=16_000, learning_rate=5.5e-4, final_learning_rate=5e-5, warmup=0))
    config.train.decay = "all"
    config.train.adamw.b2 = 0.999
    config.evaluate.loss.update(dict(texts=192 * 1040, rows=4))
    config.run.checkpoint.every = 1000


def billion(config) -> None:
    """1B parameters: heads of 128, 64 or 32; a batch of 16k tokens wants 8 devices, or microbatches."""
    paper(config)
    config.model.update(dict(dim=2048, layers=22))
    config.model.feedforward.width = 5504
    config.study.cells = cells(2048, (16, 32, 64))


SCALES = {"cpu": cpu, "gpu": gpu, "paper": paper, "1b": billion}
