"""Do questions over one passage lose anything when they are answered side by side, as branches, and what is saved?

    python -m lab.main --config=configs/branch_tasks.py         # :cpu, 9 runs, 6 to 9 minutes on two cores
    python -m lab.main --config=configs/branch_tasks.py:gpu     # 8 layers of width 512, 64 facts, 32 questions
    python -m lab.main --config=configs/branch_tasks.py --config.evaluate.answers.facts=2    # of easier passages

Rows are the probe `passage` (lab/data/probes.py): facts, and questions on them as branches. Every trained model
is then asked, by the engine, for the answers to further passages (the ask `answers`, lab/evaluate/questions.py):
greedy, one question after the other and all of a passage at once; and sampled, one answer or several of each, of which
the one is taken that most agree with, or that is likeliest. The report sets accuracy beside tokens, steps and time.

Under own_branch with rotary pairs of time alone an answer cannot depend on how it is asked: those two must agree to the
token. Where pairs carry the branch, a question by itself is branch 1; where branches see each other, eight samples of
one question are not independent, as a vote supposes.

Published: a vote over samples is right more often than one greedy answer, where a question takes several steps of
reasoning (arXiv 2203.11171); these take one look, so that it can hardly be better than greedy. A shared passage is read
once for all of its questions: up to 32 times the throughput (arXiv 2402.05099).
"""

from lab.config import add_ask, base
from lab.errors import choose
from lab.evaluate.asks import ask
from lab.study.define.cells import chain, named

RULE, RATIO, UNSELECTED = "model.rule", "model.position.ratio", "model.position.unselected"
OWN_TIME, OWN, ALL = "own branch, by time", "own branch", "all branches"


def get_config(scale: str = "cpu"):
    config = base()
    study = config.study
    study.name = "branch_tasks"
    study.question = "Do questions over one passage lose anything when they are answered as branches of it?"
    study.labels = (("name", "model"),)
    study.cells = chain(
        named(OWN_TIME, (RULE, "own_branch"), (RATIO, 0.0), (UNSELECTED, "time")),
        named(OWN, (RULE, "own_branch"), (RATIO, 1.0)),
        named(ALL, (RULE, "all_branches"), (RATIO, 1.0)),
    )
    study.sections = ("questions", "accuracy", "curves")
    study.seeds = 3
    study.baseline = (("model", OWN),)
    study.contrasts = (("all - own", (("model", ALL),), (("model", OWN),)),)
    study.hypotheses = (("Questions of one passage disturb each other", (("single", "all - own", 1),)),)
    config.data.corpus = "passage"
    SCALES[choose("the scale of configs/branch_tasks.py", scale, SCALES)](config)
    return config


def cpu(config) -> None:
    """2 layers of width 64; passages of 1 to 4 facts in 40 tokens.

    After as many steps of AdamW, at the better of two rates, one answer in six is exact.
    """
    config.model.update(dict(dim=64, layers=2, vocabulary=18))
    config.model.mixer.update(dict(heads=2, kv_heads=2, head_dim=32))
    config.model.feedforward.width = 128
    config.run.implementation = "reference"  # rows this short gain nothing from tiles
    config.data.update(dict(text_length=40, rows=32))
    config.data.probe.update(dict(difficulty="1-4", symbols=16, questions=4))
    config.train.update(dict(optimizer="muon", steps=1000, learning_rate=1e-2, final_learning_rate=1e-3, warmup=50))
    config.evaluate.loss = ask("difficulty", difficulties=(1, 2, 4), texts=256, rows=64)
    add_ask(config, "answers", "facts", facts=4, passages=64, questions=4, most_tokens=5)
    config.run.checkpoint.every = 500


def gpu(config) -> None:
    """8 layers of width 512; passages of 8 to 64 facts in 480 tokens."""
    config.model.update(dict(dim=512, layers=8, vocabulary=258, compute="bfloat16"))
    config.model.mixer.update(dict(heads=8, kv_heads=8, head_dim=64))
    config.model.feedforward.width = 1368
    config.run.workers = 4
    config.data.update(dict(text_length=480, rows=64))
    config.data.probe.update(dict(difficulty="8-64", symbols=256, questions=32))
    config.train.update(dict(steps=5000, learning_rate=1e-3, final_learning_rate=1e-4, warmup=500))
    config.evaluate.loss = ask("difficulty", difficulties=(8, 16, 32, 64), texts=1024, rows=64)
    methods = ("one_by_one", "branches", "vote-1", "vote-16", "best-of-16")
    add_ask(config, "answers", "facts", facts=64, passages=128, questions=32, most_tokens=5, methods=methods)
    config.run.checkpoint.every = 1000


SCALES = {"cpu": cpu, "gpu": gpu}
