"""What are branches worth that a model decodes in parallel, and how much of each leaks into the others?

    python -m lab.main --config=configs/rope_ablation.py         # trains the cells; in runs/rope_ablation
    python -m lab.main --config=configs/branch_decoding.py       # :cpu, asks them more; minutes on two cores
    python -m lab.main --config=configs/branch_decoding.py:gpu   # the same of configs/rope_ablation.py:gpu, and :paper

These are the cells of configs/rope_ablation.py, in the directory of that study (or the one of its --workdir): finished
ones are found and asked, what is missing is trained. The report there is then of this config, which asks all that the
other does; the other's command brings back its own.

Two asks decode 1 to 64 branches by the engine, from beginnings of validation texts, and read what was generated:
`decoding`, where each branch begins with a text of its own, as these models were trained, and `prompted`, where all go
on from one shared prompt, branch 0, which none of them has seen in training. Each is drawn as maps of ratio x number of
branches: the loss of generated tokens beside the others and alone, the share of attention that goes to other branches,
and the KL divergence of next tokens when the text of another branch is swapped (lab/evaluate/decoding.py). Under
--config.model.rule=own_branch the last two are exactly zero.

Published: nothing; attention maps and leakage are future work of the study that configs/rope_ablation.py rebuilds.
"""

from configs import rope_ablation
from lab.config import add_ask
from lab.errors import choose


def get_config(scale: str = "cpu"):
    choose("the scale of configs/branch_decoding.py", scale, SCALES)
    config = rope_ablation.get_config(scale)
    config.study.question = "What are branches worth that are decoded in parallel, and what leaks between them?"
    config.study.sections = (("decoding", "rope_ratio", "train_branch"), *config.study.sections)
    SCALES[scale](config)
    return config


def asked(config, **sizes) -> None:
    add_ask(config, "decoding", "decoding", prompt="own", **sizes)
    add_ask(config, "prompted", "decoding", prompt="shared", **sizes)


def cpu(config) -> None:
    """4 groups of branches that begin with 8 bytes and generate 24: the 32 of a text."""
    asked(config, branches=(1, 2, 4, 8, 16, 32, 64), texts=4, rows=2, prompt_tokens=8, new_tokens=24)


def gpu(config) -> None:
    """16 groups of branches that begin with 32 tokens and generate 96, to the counts that were published."""
    asked(config, branches=(1, 2, 4, 8, 16, 24, 32), texts=16, rows=1, prompt_tokens=32, new_tokens=96)


def paper(config) -> None:
    """The same to 64 branches."""
    asked(config, branches=(1, 2, 4, 8, 16, 24, 32, 48, 64), texts=16, rows=1, prompt_tokens=32, new_tokens=96)


SCALES = {"cpu": cpu, "gpu": gpu, "paper": paper}
