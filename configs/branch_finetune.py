"""Does a trained model learn to decode branches from low-rank adapters, and what does its plain text pay?

    python -m lab.main --config=configs/branch_finetune.py:cpu-base                   # trains a model to begin from
    python -m lab.main --config=configs/branch_finetune.py --config.checkpoint=DIR    # :cpu, 17 cells of six seeds
    python -m lab.main --config=configs/branch_finetune.py:cpu-untuned --config.checkpoint=DIR    # DIR as it is
    python -m lab.main --config=configs/branch_finetune.py:gpu --config.checkpoint=OUT    # Qwen2.5 1.5B, or its like
    python -m lab.main --config=configs/branch_finetune.py:gpu-untuned --config.checkpoint=OUT

DIR: the cell of :cpu-base, in runs/branch_finetune_base/cells, or another of texts of 128 bytes under RoPE. OUT: what
`python -m lab.convert from-hf DIRECTORY OUT` made of weights on this machine. Afterwards any cell decodes branches:
python -m lab.generate runs/branch_finetune/cells/NAME --begin "def " --begin "class "

Every cell goes on from the same weights, with adapters of rank 8 (LoRA) beside all matrices, on branched text under
interleaved 2D RoPE. One thing is varied at a time around a ratio of 0.5, a stride of 128, other pairs that turn by the
flat index, and branches that are numbered 1, 2, ...: the ratio, the stride, what the other pairs turn by, the numbers
(slots: a random subset of so many), and the length of a branch, at three ratios. Those that read one branch at a time
(fixed1) say what the same tuning does without branches. The ask `plain` is of longer unbranched text; the parts
`untuned` ask it, and branches, of the checkpoint as it is, at every ratio: python -m lab.report sets both side by side.
--config.model.lora.rank=0 trains all weights.

Published: of fine-tuning to branches nothing; it is named as future work, with rank 8 and ratio 0.5, strides of 128 to
1024, and the length of a branch against the best ratio. Of models that were trained on branches from the start, the
rows behind the hypotheses (configs/published/head_dim_1024.csv, heads of 128).
"""

from lab.config import add_ask, base, sized
from lab.errors import choose
from lab.model import presets

RATIOS, STRIDES, DRAWS = (0.0, 0.25, 0.5, 1.0), (64, 256, 1024), ("1-15", "fixed1")
FIELDS = dict(  # by label
    ratio="model.position.ratio",
    train_branch="data.draw",
    stride="model.position.stride",
    unselected="model.position.unselected",
    slots="data.slots",
    branch_length="data.text_length",
)
DEFAULT = dict(ratio=0.5, train_branch=DRAWS[0], stride=128, unselected="index", slots=0)
ADAPTERS = dict(steps=100, learning_rate=3e-3, final_learning_rate=3e-4, warmup=10)


def get_config(scale: str = "cpu"):
    config = base()
    config.study.name = "branch_finetune"
    config.study.question = "Does a trained model learn branches from adapters, and what does its plain text pay?"
    SCALES[choose("the scale of configs/branch_finetune.py", scale, SCALES)](config)
    return config


def branched(config, length: int, others: tuple[int, ...], slots: int) -> None:
    """Cells around branches of `length` tokens, and of `others` at three ratios; 64 of them a step, whatever they are.
    slots: as many numbers as branches are asked of."""

    def cell(**labels) -> tuple:
        values = DEFAULT | dict(branch_length=length) | labels
        # A checkpoint brings a rule and unselected pairs of its own (time, if it is imported): cells are laid over it.
        return *((FIELDS[label], value) for label, value in values.items()), ("model.rule", "all_branches")

    config.study.labels = tuple((field, label) for label, field in FIELDS.items())
    config.study.cells = (
        *(cell(ratio=ratio) for ratio in RATIOS),
        *(cell(stride=stride) for stride in STRIDES),
        cell(unselected="time"),
        cell(slots=slots),
        *(cell(ratio=ratio, branch_length=other) for other in others for ratio in (0.0, 0.5, 1.0)),
        *(cell(ratio=ratio, train_branch=DRAWS[1]) for ratio in (0.0, 0.5)),
    )
    config.study.judged = tuple(count for count in (16, 32, 64) if count <= slots)
    config.model.lora.rank = 8
    config.data.update(dict(texts_per_row=16, rows=4, stagger=True))
    config.train.update(ADAPTERS)
    expect(config.study, length, others, slots)


def expect(study, length: int, others: tuple[int, ...], slots: int) -> None:
    """Contrasts of cells that read the same texts, which differ in one thing, and claims about them."""

    def less(name: str, worse: dict, better: dict) -> tuple:
        sides = (tuple((DEFAULT | dict(branch_length=length) | labels).items()) for labels in (better, worse))
        return name, *sides

    half, scratch = dict(ratio=0.5), "trained on branches from the start (configs/published/head_dim_1024.csv, h8)"
    claims = [
        (
            "Half of the pairs are enough to learn branches", "ratio 0.5 - ratio 0", dict(ratio=0.0), half,
            f"3.18 against 4.93 at 16 branches, 4.32 against 5.76 at 64, {scratch}",
        ),
        (
            "All of the pairs are better still", "ratio 1 - ratio 0.5", half, dict(ratio=1.0),
            f"2.92 against 3.18 at 16 branches, 2.96 against 4.32 at 64, {scratch}",
        ),
        (
            "Plain text teaches no branches", "1-15 - fixed1", dict(train_branch="fixed1"), {},
            f"at ratio 1, 2.96 against 5.55 at 64 branches, {scratch}",
        ),
        ("A wide stride is better than a narrow one", "stride 1024 - stride 64", dict(stride=64), dict(stride=1024)),
        (
            "Pairs that turn by the time are better than by the flat index", "unselected time - index", {},
            dict(unselected="time"),
        ),
        ("All numbers should be trained", f"slots {slots} - slots 0", {}, dict(slots=slots)),
        *(
            (f"Half of the pairs are enough for branches of {n} tokens", f"ratio 0.5 - ratio 0, length {n}",
             dict(ratio=0.0, branch_length=n), dict(branch_length=n))
            for n in others
        ),
    ]  # fmt: skip
    study.contrasts = (
        *(less(name, worse, better) for _, name, worse, better, *_ in claims),
        *(
            less(f"ratio 1 - ratio 0.5, length {n}", dict(branch_length=n), dict(ratio=1.0, branch_length=n))
            for n in others
        ),
    )
    study.hypotheses = tuple((claim, (("single", name, -1),), *told) for claim, name, _, _, *told in claims)


def untuned(config) -> None:
    """The checkpoint as it is, under every ratio, on the texts of the cells that are tuned at the usual length."""
    study = config.study
    study.name, study.untrained = f"{study.name}_untuned", True
    study.question = (
        "What does a model know of branches before it is taught, and what does its plain text lose at once?"
    )
    study.cells = study.cells[: len(RATIOS)]
    study.contrasts, study.hypotheses, config.model.lora.rank = (), (), 0
    study.seeds = 1  # which draws nothing: the weights are there, and all are asked the same


def cpu(config) -> None:
    """Branches of 32 bytes, 100 steps of 64 of them; plain text of 128."""
    sized(config, "cpu")
    branched(config, 32, (16, 64), 64)
    config.study.brings = "a plain causal model of texts of 128 bytes, as configs/branch_finetune.py:cpu-base trains it"
    config.evaluate.loss.update(dict(branches=(1, 2, 4, 8, 16, 32, 64), texts=384, texts_per_row=64, rows=2))
    add_ask(
        config, "plain", "length", lengths=(128,), trained=128, texts=0, documents=128, rows=32, chunk=128, stride=0
    )
    config.run.checkpoint.every = 100


def cpu_base(config) -> None:
    """4 layers of width 64, 600 steps on texts of 128 bytes."""
    sized(config, "cpu")
    config.study.name, config.study.seeds = "branch_finetune_base", 1
    config.study.question = "What is the loss of the model that configs/branch_finetune.py begins from at :cpu?"
    config.data.rows = 16
    config.train.update(dict(steps=600, warmup=40))
    config.run.checkpoint.every = 600


def gpu(config) -> None:
    """Qwen2.5 1.5B, or another of its family, whose weights are to be brought: branches of 256 tokens, 300 steps of
    16k tokens; plain text of 2,048."""
    config.study.brings = "Qwen2.5 1.5B, or another model of its family"
    config.study.seeds = 3
    config.model.update(dict(dim=1536, layers=28, vocabulary=151_936, compute="bfloat16"))
    config.model.mixer.update(dict(heads=12, kv_heads=2, head_dim=128))
    config.model.feedforward.width = 8960
    presets.apply(config.model, "qwen2")
    config.model.position.theta = 1e6
    config.data.tokenizer = "bpe:6400"  # planned with; a checkpoint brings its own
    branched(config, 256, (128, 512), 32)
    config.train.update(dict(steps=300, learning_rate=2e-4, final_learning_rate=2e-5, warmup=20))
    config.evaluate.loss.update(dict(branches=(1, 2, 4, 8, 16, 32), texts=0, texts_per_row=32, rows=1))
    add_ask(config, "plain", "length", lengths=(2048,), texts=0, documents=64, rows=4, chunk=512, stride=0)
    config.run.update(dict(scan=True, remat="dots", microbatches=4))
    config.run.checkpoint.every = 100


def part_untuned(scale):
    def made(config) -> None:
        scale(config)
        untuned(config)

    return made


SCALES = {
    "cpu": cpu,
    "cpu-base": cpu_base,
    "cpu-untuned": part_untuned(cpu),
    "gpu": gpu,
    "gpu-untuned": part_untuned(gpu),
}
