"""Which part of MLA makes it good: its wide heads, keys and values that share numbers, or partial RoPE?

    python -m lab.main --config=configs/attention_ablation.py                # :cpu, parts I to VI, 15 to 25 minutes
    python -m lab.main --config=configs/attention_ablation.py:cpu-flops      # most of these at equal training FLOPs
    python -m lab.main --config=configs/attention_ablation.py:cpu-factorial  # K, V shared or not x full, partial RoPE
    python -m lab.main --config=configs/attention_ablation.py:cpu-rotate     # which of q, k, v, o rotate: 16 subsets
    python -m lab.main --config=configs/attention_ablation.py:cpu-beyond     # gates, sinks, GTA, GLA, a delta net, ...
    python -m lab.main --config=configs/attention_ablation.py:cpu-beyond-flops    # these at equal training FLOPs
    python -m lab.plan --config=configs/attention_ablation.py:paper          # :gpu and :paper have the same parts

A cell's name is that of the published variant. :paper has its sizes (2048 wide, 12 layers, 16 heads); :gpu halves all
widths but keeps the heads; :cpu divides the widths of heads by 8 and the model's by 16, and has 8 heads and 2 layers.
S1: keys and values share what does not rotate; S2: they are the same vector, and the output rotates back; S3: MLA as it
decodes, without low ranks; PR: the last quarter of a head rotates.

Published (configs/published/attention_series.csv: 16B tokens, one seed): at equal cache GQA1-256 2.720 against
GQA2-128 2.750; PR 2.711; S2 2.708; MLA 2.721, MLA-256 2.705; S3 2.677 at 3.4 times the attention work. Which of q, k,
v, o rotate (configs/published/vo_rope.csv): QK 2.712, QKVO 2.719, K 2.769, VO 2.770, none 2.795.
"""

from lab.config import base
from lab.errors import choose
from lab.study.define.cells import chain, matched, named

BASELINE = "MLA"
SUBSETS = ("none", "Q", "K", "V", "O", "QK", "QV", "QO", "KV", "KO", "VO", "QKV", "QKO", "QVO", "KVO", "QKVO")


class Sizes:
    """The published widths, divided for smaller scales."""

    def __init__(self, dim: int, heads: int, divide: int):
        self.dim, self.heads, self.divide = dim, heads, divide
        self.lora = dim // 3  # brings a 256-wide Q and O to the parameters of 128-wide ones
        self.narrow = 2 * dim  # "MLP 4096": the same, by the feed-forward

    def gqa(self, groups: int, width: int, rope: int = 0, heads: int = 1):
        """An attention shape: groups, K, rotated dims (0: all), and how many times the heads."""
        return (
            ("model.mixer.heads", heads * self.heads),
            ("model.mixer.kv_heads", groups),
            ("model.mixer.head_dim", width // self.divide),
            ("model.position.dim", rope // self.divide),
        )

    def shared(self, mixer: str, groups: int, width: int, heads: int = 1):
        return ("model.mixer.name", mixer), *self.gqa(groups, width, 64, heads)

    def mla(self, width: int, values: int, latents: int = 1):
        """MLA of K = width with 64 rotated dims; several latents make it GLA, at the same cache."""
        latent = (
            ("model.mixer.latent", 512 // latents // self.divide),
            ("model.mixer.v_head_dim", values // self.divide),
        )
        return ("model.mixer.name", "mla"), *self.gqa(latents, width, 64), *latent

    def low_rank(self):
        return ("model.mixer.q_rank", self.lora), ("model.mixer.o_rank", self.lora)


def series(s: Sizes) -> dict:
    """Parts I to V: the variants."""
    return {
        "MLA": s.mla(192, 128),
        "GQA2-128": s.gqa(2, 128),
        "GQA1-256": s.gqa(1, 256),
        "GQA1-256-PR": s.gqa(1, 256, 64),
        "MHA": s.gqa(s.heads, 128),
        "GQA2-192": s.gqa(2, 192),
        "MLA-256": s.mla(256, 256),
        "GQA2-(192+64)-S1": s.shared("s1", 2, 256),
        "GQA2-(192+64)-S2": s.shared("s2", 2, 256),
        "GQA4-(64+64)-S2": s.shared("s2", 4, 128),
        "GQA4-(128+64)-S2": s.shared("s2", 4, 192),
        "GQA1-(512+64)-S3": s.shared("s3", 1, 576),
    }


def doubled(s: Sizes) -> dict:
    """Of part VI: more heads or narrower projections, for equal parameters."""
    return {
        "GQA2-128 32 heads": s.gqa(2, 128, heads=2),
        "GQA1-256 Q&O LoRA": (*s.gqa(1, 256), *s.low_rank()),
        "GQA4-(64+64)-S2 32 heads": s.shared("s2", 4, 128, heads=2),
        "GQA2-(192+64)-S2 Q&O LoRA": (*s.shared("s2", 2, 256), *s.low_rank()),
    }


def narrowed(s: Sizes) -> dict:
    """Of part VI: a narrower feed-forward, for equal parameters."""
    return {
        "GQA1-256 MLP 4096": (*s.gqa(1, 256), ("model.feedforward.width", s.narrow)),
        "GQA2-(192+64)-S2 MLP 4096": (*s.shared("s2", 2, 256), ("model.feedforward.width", s.narrow)),
    }


def beyond(s: Sizes) -> dict:
    """What the series leaves out; each changes one thing of GQA2-128, or takes its place."""
    gqa = s.gqa(2, 128)
    return {
        "GQA2-128": gqa,
        "output gate": (*gqa, ("model.mixer.output_gate", True)),
        "sink": (*gqa, ("model.mixer.sink", True)),
        "QK-norm": (*gqa, ("model.mixer.qk_norm", True)),
        "soft-cap 30": (*gqa, ("model.mixer.softcap", 30.0)),
        "MLA": s.mla(192, 128),
        "GLA2": s.mla(192, 128, latents=2),
        "GTA4": s.shared("gta", 4, 128),
        "DIFF V2": (("model.mixer.name", "differential"), *gqa),
        "forgetting": (("model.mixer.name", "forgetting"), *gqa),
        "delta 1 : GQA 1": (*gqa, ("model.pattern", ((("mixer.name", "delta"),), ()))),
        "delta": (("model.mixer.name", "delta"), *(pair for pair in gqa if pair[0] != "model.mixer.kv_heads")),
    }


def factorial(s: Sizes) -> dict:
    """All four cache 512 numbers and have equal parameters. What is shared has twice the groups for that, and rotates
    its values and output too, as S2 does."""
    full = ("model.position.dim", 0)
    return {
        "separate, full": s.gqa(1, 256),
        "separate, partial": s.gqa(1, 256, 64),
        "shared, full": tuple(full if pair[0] == full[0] else pair for pair in s.shared("s2", 2, 256)),
        "shared, partial": s.shared("s2", 2, 256),
    }


def cells(variants: dict):
    return chain(*(named(name, *pairs) for name, pairs in variants.items()))


def less(plus: str, minus: str):
    """The contrast of two variants."""
    return f"{plus} - {minus}", (("variant", plus),), (("variant", minus),)


GUESSES = {  # claim: ((layer, variant, other), ...): the variant is expected to have the lower loss
    "Wider heads are better": (
        ("crossed", "GQA1-256", "GQA2-128"),  # half the groups: at equal cache
        ("single", "GQA2-192", "GQA2-128"),
        ("crossed", "MLA-256", "MLA"),
        ("crossed", "GQA4-(128+64)-S2", "GQA4-(64+64)-S2"),
        ("aligned", "GQA1-256", "GQA2-128 32 heads"),
        ("aligned", "GQA1-256 MLP 4096", "GQA2-128"),
        ("aligned", "GQA1-256 Q&O LoRA", "GQA2-128"),
    ),
    "Sharing keys and values is better": (
        ("crossed", "GQA2-(192+64)-S2", "GQA1-256-PR"),  # also twice the groups, and values and output rotate
        ("crossed", "GQA2-(192+64)-S2", "GQA2-(192+64)-S1"),
        ("crossed", "GQA4-(64+64)-S2", "GQA2-128"),
        ("aligned", "GQA4-(64+64)-S2 32 heads", "GQA2-128 32 heads"),
        ("aligned", "GQA2-(192+64)-S2 MLP 4096", "GQA1-256 MLP 4096"),
        ("aligned", "GQA2-(192+64)-S2 Q&O LoRA", "GQA1-256 Q&O LoRA"),
    ),
    "Partial RoPE is better": (
        ("single", "GQA1-256-PR", "GQA1-256"),
        ("crossed", "GQA2-(192+64)-S1", "GQA1-256"),
        ("crossed", "GQA2-(192+64)-S2", "GQA1-256"),
    ),
}


def guess(study, without: tuple[str, ...] = ()) -> None:
    """The three guesses as hypotheses, with the contrasts that `without` does not rule out."""
    found = {
        claim: [row for row in rows if row[1] not in without and row[2] not in without]
        for claim, rows in GUESSES.items()
    }
    pairs = dict.fromkeys((plus, minus) for rows in found.values() for _, plus, minus in rows)
    study.contrasts = tuple(less(*pair) for pair in pairs)
    study.hypotheses = tuple(
        (claim, tuple((layer, f"{plus} - {minus}", -1) for layer, plus, minus in rows)) for claim, rows in found.items()
    )


CURVES = {  # a panel for each part of the series
    "I": ("MLA", "GQA2-128", "GQA1-256", "GQA1-256-PR"),
    "II": ("MLA", "MHA", "GQA2-192", "MLA-256"),
    "III, IV": ("MLA", "GQA1-256-PR", "GQA2-(192+64)-S1", "GQA2-(192+64)-S2"),
    "V": ("MLA", "GQA4-(64+64)-S2", "GQA4-(128+64)-S2", "GQA1-(512+64)-S3"),
    "VI, GQA": ("GQA2-128", "GQA2-128 32 heads", "GQA1-256 MLP 4096", "GQA1-256 Q&O LoRA"),
    "VI, S2": (
        "GQA2-(192+64)-S2", "GQA4-(64+64)-S2 32 heads", "GQA2-(192+64)-S2 MLP 4096", "GQA2-(192+64)-S2 Q&O LoRA"
    ),
}  # fmt: skip


def part_series(config, s: Sizes) -> None:
    config.study.cells = cells(series(s) | doubled(s) | narrowed(s))
    config.study.baseline = (("variant", BASELINE),)
    config.study.published = "configs/published/attention_series.csv"
    config.study.sections = ("series", "curves")
    config.study.groups = tuple((f"part {part}", names) for part, names in CURVES.items())
    guess(config.study)


def part_flops(config, s: Sizes) -> None:
    """Every variant with the training FLOPs of MLA, by the width of its feed-forward.

    S3 is left out: even without a feed-forward it costs more.
    """
    without = BASELINE, "GQA1-(512+64)-S3"
    others = {name: pairs for name, pairs in (series(s) | doubled(s)).items() if name not in without}
    config.study.cells = chain(
        named(BASELINE, *series(s)[BASELINE]),
        matched(cells(others), to=BASELINE, on="train_flops", by="model.feedforward.width"),
    )
    config.study.baseline = (("variant", BASELINE),)
    guess(config.study, without=tuple(narrowed(s)))


def part_factorial(config, s: Sizes) -> None:
    study = config.study
    study.question = "Do shared keys and values and partial RoPE help each other, at equal cache and parameters?"
    study.cells = cells(factorial(s))
    study.baseline = (("variant", "separate, full"),)
    some = lambda *names: (("variant", names if names[1:] else names[0]),)  # noqa: E731
    both, partial, shared, neither = "shared, partial", "separate, partial", "shared, full", "separate, full"
    study.contrasts = (
        ("sharing", some(both, shared), some(partial, neither)),
        ("partial RoPE", some(both, partial), some(shared, neither)),
        ("sharing x partial RoPE", some(both), some(partial), some(shared), some(neither)),
    )
    study.hypotheses = (
        ("Sharing keys and values is better", (("aligned", "sharing", -1),)),
        ("Partial RoPE is better", (("aligned", "partial RoPE", -1),)),
        ("Sharing needs partial RoPE", (("aligned", "sharing x partial RoPE", -1),)),
    )


def part_rotate(config, s: Sizes) -> None:
    study = config.study
    study.question = "Which of queries, keys, values and output should rotate?"
    study.cells = cells({name: (*s.gqa(s.heads, 128), ("model.mixer.rotate", name.lower())) for name in SUBSETS})
    study.baseline = (("variant", "QK"),)
    study.published = "configs/published/vo_rope.csv"
    study.sections = ("series", "curves")
    study.contrasts = less("VO", "none"), less("QKVO", "VO"), less("K", "none"), less("Q", "none")


def part_beyond(config, s: Sizes) -> None:
    config.study.question = "What do gates, sinks, other latents, differences of maps and delta rules add to GQA?"
    config.study.cells = cells(beyond(s))
    config.study.baseline = (("variant", "GQA2-128"),)


def part_beyond_flops(config, s: Sizes) -> None:
    """The same, every variant with the training FLOPs of GQA2-128."""
    part_beyond(config, s)
    variants = beyond(s)
    first = named("GQA2-128", *variants.pop("GQA2-128"))
    config.study.cells = chain(
        first, matched(cells(variants), to="GQA2-128", on="train_flops", by="model.feedforward.width")
    )


PARTS = {
    "": part_series,
    "flops": part_flops,
    "factorial": part_factorial,
    "rotate": part_rotate,
    "beyond": part_beyond,
    "beyond-flops": part_beyond_flops,
}


def cpu(config) -> Sizes:
    """2 layers of width 128 on bytes of Python's own sources; heads of 16 for the published 128."""
    config.model.update(dict(dim=128, layers=2))
    config.model.feedforward.width = 341
    config.train.update(dict(steps=200, learning_rate=5e-3, final_learning_rate=5e-4, warmup=20))
    config.study.seeds = 4
    return Sizes(128, 8, 8)


def gpu(config) -> Sizes:
    """1024 wide, 12 layers, on Python's own sources."""
    config.model.update(dict(dim=1024, layers=12, vocabulary=6400, compute="bfloat16"))
    config.model.feedforward.width = 2728
    config.run.update(dict(scan=True, remat="dots"))
    config.data.update(dict(tokenizer="bpe:6400", text_length=1024, rows=16))
    config.evaluate.loss.texts = 0
    config.train.update(dict(steps=1000, learning_rate=2e-3, final_learning_rate=2e-4, warmup=100))
    config.run.checkpoint.every = 500
    config.study.seeds = 3
    return Sizes(1024, 16, 2)


def paper(config) -> Sizes:
    """The published sizes: 16,000 steps of 256 texts of 4096 tokens; bring the texts."""
    gpu(config)
    config.model.update(dict(dim=2048, vocabulary=159_619))
    config.model.feedforward.width = 5456
    config.data.update(dict(corpus="jsonl", tokenizer="bpe:159619", text_length=4096, rows=256, texts=4_096_000))
    config.train.update(dict(steps=16_000, warmup=1000))
    config.evaluate.loss.update(dict(texts=4096, rows=32))
    config.run.checkpoint.every = 1000
    config.study.seeds = 1
    return Sizes(2048, 16, 1)


def setting(scale, part):
    def set_up(config) -> None:
        part(config, scale(config))

    return set_up


SCALES = {
    "-".join(filter(None, (scale.__name__, part))): setting(scale, PARTS[part])
    for scale in (cpu, gpu, paper)
    for part in PARTS
}


def get_config(scale: str = "cpu"):
    config = base()
    study = config.study
    study.name = "attention_ablation"
    study.question = "Which part of MLA makes it good: wide heads, shared keys and values, or partial RoPE?"
    study.labels = (("name", "variant"),)
    config.train.optimizer = "muon"
    config.train.muon.per_head = "qkv"
    SCALES[choose("the scale of configs/attention_ablation.py", scale, SCALES)](config)
    if "-" in scale:
        study.name += "_" + "_".join(scale.split("-")[1:])
    return config
