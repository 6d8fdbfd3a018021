"""Which rotary frequencies should carry the branch, when texts are decoded in parallel in one sequence?

    python -m lab.main --config=configs/rope_ablation.py         # :cpu, 10 cells of three seeds, minutes on two cores
    python -m lab.main --config=configs/rope_ablation.py:gpu     # 25.8M parameters, the 140 published rows
    python -m lab.main --config=configs/rope_ablation.py:paper --config.data.path=texts.jsonl

Interleaved 2D RoPE gives a share of each head's rotary pairs (the ratio) to the branch and to the time; the others see
the flat index. The control is one override away: --config.model.position.unselected=time.

Published (configs/published/branches_512.csv: 512 wide, 32,000 steps, one seed): trained on 1-15 branches at ratio 1.0
the loss is flat from 1 to 16 branches (2.60 to 2.59), at ratio 0 it climbs by 2.1 nats; trained on one branch, every
ratio fails at any other count.
"""

from lab.config import base, branches
from lab.errors import choose
from lab.study.define.cells import product, vary

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
DRAWS = ("fixed1", "1-15")


def get_config(scale: str = "cpu"):
    config = branches(base())
    study = config.study
    study.name = "rope_ablation"
    study.question = "Which share of the rotary pairs should tell parallel branches apart?"
    study.cells = product(vary("model.position.ratio", RATIOS), vary("data.draw", DRAWS))
    study.labels = (("model.position.ratio", "rope_ratio"), ("data.draw", "train_branch"))
    study.sections = (("branches", "rope_ratio", "train_branch"), "curves")
    study.contrasts = tuple(against_none(ratio) for ratio in RATIOS[1:])
    study.judged = (16,)
    study.published = "configs/published/branches_512.csv"
    SCALES[choose("the scale of configs/rope_ablation.py", scale, SCALES)](config)
    return config


def against_none(ratio: float) -> tuple:
    """Of models that were trained on many branches; those of one branch show what training on many is for."""
    sides = ((("rope_ratio", each), ("train_branch", DRAWS[1])) for each in (ratio, 0.0))
    return (f"ratio {ratio:g} - ratio 0", *sides)


def cpu(config) -> None:
    """The base model: 3 layers of width 96 on bytes of Python's own sources, 160 steps of 64 texts of 32 bytes."""
    config.study.seeds = 3
    config.train.steps = 160
    config.evaluate.loss.update(dict(branches=(1, 2, 4, 8, 16, 32, 64), texts=384))


def gpu(config) -> None:
    """The published model and draws on Python's own sources: 1,000 steps of 16k tokens, about five epochs."""
    published_model(config)
    draws = (*DRAWS[:1], "1-3", "1-7", *DRAWS[1:])
    config.study.cells = product(vary("model.position.ratio", RATIOS), vary("data.draw", draws))
    config.data.update(dict(tokenizer="bpe:6400", text_length=256, texts_per_row=16, rows=4))
    config.train.update(dict(steps=1000, learning_rate=1e-3, final_learning_rate=1e-4, warmup=50))
    config.evaluate.loss.update(dict(branches=(1, 2, 4, 8, 16, 24, 32), texts=0, texts_per_row=96, rows=1))
    config.run.checkpoint.every = 500


def paper(config) -> None:
    """The published setting; bring its data: 1,024,000 training and 200,000 validation texts."""
    gpu(config)
    published_training(config)
    config.data.rows = 2  # 32 texts a step: one epoch is 32,000 steps
    config.train.steps = 32_000


def published_model(config) -> None:
    config.model.update(dict(dim=512, layers=8, vocabulary=6400, compute="bfloat16"))
    config.model.mixer.update(dict(heads=8, kv_heads=2, head_dim=64))
    config.model.feedforward.width = 1408
    config.run.update(dict(scan=True, remat="dots"))


def published_training(config) -> None:
    """AdamW with decay on everything, cosine from 5.5e-4 to 5e-5 without warm-up, one epoch of the published data."""
    config.data.update(dict(corpus="jsonl", long_texts="truncate", texts=1_024_000))
    config.train.update(dict(learning_rate=5.5e-4, final_learning_rate=5e-5, warmup=0, decay="all"))
    config.train.adamw.b2 = 0.999
    counts = (1, 2, 4, 8, 16, 24, 32, 48, 64)
    config.evaluate.loss.update(dict(texts=192 * 1040, texts_per_row=192, rows=4, branches=counts))
    config.run.checkpoint.every = 1000


SCALES = {"cpu": cpu, "gpu": gpu, "paper": paper}
