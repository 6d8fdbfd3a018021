"""Does Muon learn more than AdamW from the same tokens, and should each head be orthogonalised by itself?

    python -m lab.main --config=configs/muon_ablation.py         # :cpu, 6 cells, minutes on two cores
    python -m lab.main --config=configs/muon_ablation.py:gpu     # 25.8M parameters
    python -m lab.main --config=configs/muon_ablation.py:paper --config.data.path=texts.jsonl    # 931M parameters

Plain causal language models on whole rows. Every cell is tuned first: five learning rates on a seed of its own, then
five seeds at the best. Heads apart are compared under Moonlight's scaling, which gives the entries of an update the
same mean square however the heads are cut; the other two scale a head by the shape of the head.

Published: Muon reaches AdamW's loss with about 52% of its FLOPs (arXiv 2502.16982, scaled by 0.2 sqrt(max(d_in,
d_out)) so that AdamW's rate carries over); others who tune both find 1.1 times at 1B parameters (arXiv 2509.02046).
On heads apart the evidence is mixed: no gain, about 1% faster, or a help with MLA; of W_O no source says whether it is
one of the matrices that are split.
"""

from lab.config import base
from lab.errors import choose
from lab.study.define.cells import chain, named

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
ADAMW, WHOLE, HEADS, W_O = "AdamW", "Muon", "Muon, heads", "Muon, heads and W_O"
JORDAN, MUP = "Muon, keller-jordan", "Muon, mup"


def get_config(scale: str = "cpu"):
    config = base()
    study = config.study
    study.name = "muon_ablation"
    study.question = "Does Muon learn more than AdamW from the same tokens, and should each head be its own matrix?"
    study.labels = (("name", "optimizer"),)
    study.sections = ("curves",)
    study.seeds = 5
    study.baseline = (("optimizer", ADAMW),)
    study.contrasts = (
        contrast("heads - whole", HEADS, WHOLE),
        contrast("W_O too - heads", W_O, HEADS),
        contrast("keller-jordan - moonlight", JORDAN, WHOLE),
        contrast("mup - moonlight", MUP, WHOLE),
        contrast("Muon - AdamW", WHOLE, ADAMW),
    )
    study.hypotheses = (
        ("Muon learns more than AdamW from the same tokens", (("single", "Muon - AdamW", -1),)),
        (
            "Each head should be orthogonalised by itself",
            (("single", "heads - whole", -1), ("single", "W_O too - heads", -1)),
        ),
        (
            "The scaling of an update matters once the rate is tuned",
            (("single", "keller-jordan - moonlight", 1), ("single", "mup - moonlight", 1)),
        ),
    )
    config.train.final_learning_rate = 0.0  # from wherever it is tuned to
    SCALES[choose("the scale of configs/muon_ablation.py", scale, SCALES)](config)
    study.tune = (("train.learning_rate", RATES),)
    study.cells = cells(config.model.dim, config.train.weight_decay)
    return config


def contrast(name: str, plus: str, minus: str):
    return name, (("optimizer", plus),), (("optimizer", minus),)


def cells(dim: int, decay: float):
    """AdamW, Muon whole and with heads apart, and its two other scalings.

    Under these a square matrix moves as far as under Moonlight's at a rate `unit` times as large, so that decay and
    AdamW's rate, which are in units of it, are so many times smaller.
    """
    unit = 0.2 * dim**0.5
    alike = ("train.muon.adam_rate", 1 / unit), ("train.weight_decay", decay / unit)
    return chain(
        named(ADAMW),
        muon(WHOLE),
        muon(HEADS, ("train.muon.per_head", "qkv")),
        muon(W_O, ("train.muon.per_head", "all")),
        muon(JORDAN, ("train.muon.scaling", "keller-jordan"), *alike),
        muon(MUP, ("train.muon.scaling", "mup"), *alike),
    )


def muon(name: str, *pairs: tuple[str, object]):
    return named(name, ("train.optimizer", "muon"), *pairs)


def cpu(config) -> None:
    """2 layers of width 64 on bytes of Python's own sources, 300 steps of 8 rows of 128 bytes."""
    config.model.update(dict(dim=64, layers=2))
    config.model.mixer.update(dict(heads=4, kv_heads=2, head_dim=16))
    config.model.feedforward.width = 176
    config.run.implementation = "reference"  # rows this short gain nothing from tiles
    config.evaluate.loss.rows = 64
    config.train.steps = config.run.checkpoint.every = 300


def gpu(config) -> None:
    """512 wide, 8 layers, on Python's own sources: 1,000 steps of 16k tokens, about five epochs."""
    config.model.update(dict(dim=512, layers=8, vocabulary=6400, compute="bfloat16"))
    config.model.mixer.update(dict(heads=8, kv_heads=2, head_dim=64))
    config.model.feedforward.width = 1408
    config.run.update(dict(scan=True, remat="dots"))
    config.data.update(dict(tokenizer="bpe:6400", text_length=512, rows=32))
    config.train.update(dict(steps=1000, warmup=50))
    set_decay(config, 0.1)
    config.evaluate.loss.update(dict(texts=0, rows=32))
    config.run.checkpoint.every = 500


def paper(config) -> None:
    """2048 wide, 12 layers, 16 heads, rows of 4096, 16,000 steps of 1M tokens; bring 4,096,000 rows of text.

    The source states neither rate, decay nor data. Its embeddings hold 326.9M numbers: 159.6k tokens, if tied.
    """
    gpu(config)
    config.model.update(dict(dim=2048, layers=12, vocabulary=159_616))
    config.model.mixer.update(dict(heads=16, kv_heads=16, head_dim=128))
    config.model.feedforward.width = 5456
    config.data.update(dict(corpus="jsonl", tokenizer="bpe:159616", text_length=4096, rows=256, texts=4_096_000))
    config.train.update(dict(steps=16_000, warmup=1000))
    config.evaluate.loss.update(dict(texts=4096, rows=32))
    config.run.checkpoint.every = 1000


def set_decay(config, decay: float) -> None:
    """The same for every parameter that decays, whoever updates it."""
    config.train.weight_decay = config.train.muon.adam_decay = decay


SCALES = {"cpu": cpu, "gpu": gpu, "paper": paper}
