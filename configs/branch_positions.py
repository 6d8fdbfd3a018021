"""How should branches be told apart, when texts are decoded in parallel in one sequence?

    python -m lab.main --config=configs/branch_positions.py           # :cpu, 8 cells, 4 seeds, minutes on two cores
    python -m lab.main --config=configs/branch_positions.py:cpu-drawn # branches have random numbers from 1 to 64
    python -m lab.main --config=configs/branch_positions.py:gpu       # 25.8M parameters, 14 cells, 3 seeds
    python -m lab.main --config=configs/branch_positions.py:paper --config.data.path=texts.jsonl

The schemes of the field, on the same texts. Every branch starts at the same time, and rotary pairs that do not carry
the branch turn by time. (In configs/rope_ablation.py they turn by the flat index, which also tells how many branches
there are.)

    same start          nothing but masks tells branches apart (Hydragen, arXiv 2402.05099; Multiverse, 2506.09991)
    2D RoPE 0.5, 1      a share of the pairs carries branch and time in turn
    one after another   pairs turn by stride * branch + time, as if branches lay behind each other, each in a stride
                        that no text outgrows (a layout of the cache in Hogwild! Inference, arXiv 2504.06261)
    learned             a vector for each branch, added to the embedding (nearly ParaThinker's, arXiv 2509.04475)
    Fourier             sines and cosines of the branch number, added to the embedding

Under all_branches a token sees the earlier ones of every branch, and the scheme is all that tells branches apart: here
schemes are compared. Under own_branch masks tell, and a scheme can only cost: 2D RoPE takes pairs from the time. The
others are not run there at :cpu. One after another is the same start, since a token sees no other branch and no prompt
is there; learned and Fourier add to a text what is constant in it.

Judged at 8 branches, the mean of what was trained; "Differences by condition" has 1 to 64. Numbers beyond 15 are not
trained: from 16 branches on, some learned vectors are as they were drawn. The parts -drawn give the branches of
training texts random numbers from 1 to 64, so that each is trained, and are judged at 64 branches.

Published: of shares of pairs, one seed each (configs/published/branches_512.csv, where the flat index turns the other
pairs). Of the other schemes there is no public comparison with intervals.
"""

from lab.config import base, branches
from lab.errors import choose
from lab.study.define.cells import chain, named, product, vary

SEEN, MASKED = "all_branches", "own_branch"
SAME, SEQUENTIAL, LEARNED, FOURIER = "same start", "one after another", "learned", "Fourier"
SHARES = "2.58 against {} at 8 branches (parallelmind, configs/published/branches_512.csv)"


def get_config(scale: str = "cpu"):
    size, drawn = SCALES[choose("the scale of configs/branch_positions.py", scale, SCALES)]
    config = branches(base())
    study = config.study
    study.name = "branch_positions_drawn" if drawn else "branch_positions"
    study.question = "How should branches be told apart?"
    config.data.slots = 64 if drawn else 0
    study.judged = (64,) if drawn else (8,)
    study.labels = (("name", "scheme"), ("model.rule", "rule"))
    study.sections = ("differences", "curves")
    size(config)
    return config


def rope2d(ratio: float) -> str:
    return f"2D RoPE {ratio:g}"


def schemes(config, ratios: tuple[float, ...]) -> dict:
    """{name: fields} of cells."""
    by_time = ("model.position.name", "rope2d"), ("model.position.unselected", "time")
    stride = max(config.model.position.stride, 2 * config.data.text_length)  # a staggered text reaches no further
    return {
        SAME: (*by_time, ("model.position.ratio", 0.0)),
        **{rope2d(ratio): (*by_time, ("model.position.ratio", ratio)) for ratio in ratios},
        SEQUENTIAL: (("model.position.name", "sequential"), ("model.position.stride", stride)),
        LEARNED: (("model.position.name", "learned-branch"),),
        FOURIER: (("model.position.name", "fourier"),),
    }


def compare(config, ratios: tuple[float, ...], masked: tuple[str, ...]) -> None:
    """Cells of every scheme where branches are seen and of some where they are masked, what is compared, and claims."""
    study, found = config.study, schemes(config, ratios)
    cells = {name: named(name, *fields) for name, fields in found.items()}
    study.cells = chain(
        product(chain(*cells.values()), vary("model.rule", (SEEN,))),
        product(chain(*(cells[name] for name in masked)), vary("model.rule", (MASKED,))),
    )
    told = {name: less(name, SAME, SEEN) for name in found if name != SAME}
    half, whole = rope2d(0.5), rope2d(1.0)
    shares, codes = less(whole, half, SEEN), less(whole, FOURIER, SEEN)
    starts, price = less(LEARNED, SEQUENTIAL, SEEN), less(SAME, whole, MASKED)
    masks = f"{whole}, {MASKED} - {SEEN}", side(whole, MASKED), side(whole, SEEN)
    study.contrasts = (*told.values(), shares, codes, starts, price, masks)
    study.hypotheses = (
        claim("2D RoPE tells branches apart", told[whole], SHARES.format("3.79 by the flat index")),
        claim("Half of the rotary pairs are too few", shares, SHARES.format(2.82)),
        claim("Positions one after another tell branches apart (no public comparison)", told[SEQUENTIAL]),
        claim("Learned vectors tell branches apart (no public comparison)", told[LEARNED]),
        claim("Fourier codes tell branches apart (no public comparison)", told[FOURIER]),
        claim("2D RoPE is better than Fourier codes (no public comparison)", codes),
        claim("Learned vectors are better than positions one after another (no public comparison)", starts),
        claim("Where masks tell, pairs for the branch are lost (no public comparison)", price),
        claim("Masks add to what 2D RoPE tells (no public comparison)", masks),
    )


def side(scheme: str, rule: str) -> tuple:
    return ("scheme", scheme), ("rule", rule)


def less(plus: str, minus: str, rule: str) -> tuple:
    """The contrast of two schemes under one rule."""
    return f"{plus} - {minus}, {rule}", side(plus, rule), side(minus, rule)


def claim(text: str, contrast: tuple, *published: str) -> tuple:
    """That the first side of a contrast has the lower loss; and what was published of it."""
    return text, (("single", contrast[0], -1),), *published


def cpu(config) -> None:
    """The model and texts of configs/rope_ablation.py:cpu: 3 layers of width 96 on bytes of Python's own sources."""
    config.study.seeds = 4
    config.train.steps = 160
    config.evaluate.loss.update(dict(branches=(1, 2, 4, 8, 16, 32, 64), texts=384))
    compare(config, (0.5, 1.0), masked=(SAME, rope2d(1.0)))


def gpu(config) -> None:
    """8 layers of width 512 on Python's own sources: 1,000 steps of 16k tokens, about five epochs."""
    config.study.seeds = 3
    config.model.update(dict(dim=512, layers=8, vocabulary=6400, compute="bfloat16"))
    config.model.mixer.update(dict(heads=8, kv_heads=2, head_dim=64))
    config.model.feedforward.width = 1408
    config.run.update(dict(scan=True, remat="dots"))
    config.data.update(dict(tokenizer="bpe:6400", text_length=256, texts_per_row=16, rows=4))
    config.train.update(dict(steps=1000, learning_rate=1e-3, final_learning_rate=1e-4, warmup=50))
    config.evaluate.loss.update(dict(branches=(1, 2, 4, 8, 16, 32, 64), texts=0, texts_per_row=64, rows=1))
    config.run.checkpoint.every = 500
    ratios = (0.25, 0.5, 0.75, 1.0)
    masked = (SAME, rope2d(0.5), rope2d(1.0), SEQUENTIAL, LEARNED, FOURIER)
    compare(config, ratios, masked)


def paper(config) -> None:
    """The same model for one epoch of texts that are to be brought: 1,024,000 to train and 200,000 to validate."""
    gpu(config)
    config.data.update(dict(corpus="jsonl", long_texts="truncate", texts=1_024_000, rows=2))
    config.train.update(dict(steps=32_000, learning_rate=5.5e-4, final_learning_rate=5e-5))
    config.evaluate.loss.update(dict(texts=64 * 3_100, rows=4))
    config.run.checkpoint.every = 1000


SIZES = {"cpu": cpu, "gpu": gpu, "paper": paper}
SCALES = {f"{name}{'-drawn' * drawn}": (size, drawn) for drawn in (False, True) for name, size in SIZES.items()}
