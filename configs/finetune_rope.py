"""Does a trained model learn to read longer texts, at which base of its rotary frequencies, and are adapters enough?

    python -m lab.main --config=configs/architecture_ablation.py --cells=1/100        # trains a cell to begin from
    python -m lab.main --config=configs/finetune_rope.py --config.checkpoint=DIR      # :cpu, 6 cells, minutes

DIR: a trained cell of a study of plain language models under RoPE, such as the one in
runs/architecture_ablation_norm/cells, which knows texts of 128 bytes; or an imported model. The checkpoint's model
replaces the one of this file, which is planned where no checkpoint is given, and not run.

Every cell goes on from the same weights for 60 steps on texts of 512 bytes: with the base of RoPE's frequencies at 1e4
(the default), 4 and 16 times as large; all weights, or adapters of rank 8 (LoRA) beside all matrices.

Published: fine-tuning at a larger base carries LLaMA to contexts several times as long (Code Llama, arXiv 2308.12950,
section 2.4; NTK-aware scaling, without tuning); adapters of attention alone fall short of full fine-tuning at long
contexts (LongLoRA, arXiv 2309.12307, table 2).
"""

from lab.config import base, sized
from lab.errors import choose
from lab.study.define.cells import chain, named, product, vary

THETAS = (1e4, 4e4, 16e4)
PARTS = chain(
    named("all weights"),
    named("adapters", ("model.lora.rank", 8), ("train.learning_rate", 3e-3), ("train.final_learning_rate", 3e-4)),
)


def get_config(scale: str = "cpu"):
    config = base()
    study = config.study
    study.name = "finetune_rope"
    study.question = "At which base of its rotary frequencies does a trained model learn to read longer texts?"
    study.cells = product(vary("model.position.theta", THETAS), PARTS)
    study.labels = (("model.position.theta", "theta"), ("name", "trained"))
    study.baseline = (("theta", THETAS[0]),)
    study.sections = ("curves",)
    SCALES[choose("the scale of configs/finetune_rope.py", scale, SCALES)](config)
    return config


def cpu(config) -> None:
    """Texts four times as long as those of `sized`, 60 steps of 2 rows, at a fifth of its rate."""
    sized(config, "cpu")
    config.data.update(dict(text_length=512, rows=2))
    config.evaluate.loss.update(dict(texts=128, rows=16))
    config.train.update(dict(steps=60, learning_rate=1e-3, final_learning_rate=1e-4, warmup=6))
    config.run.checkpoint.every = 60


SCALES = {"cpu": cpu}
