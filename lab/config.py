"""The base configuration: every option that the lab declares, at its default. Studies edit it; see configs/.

Each option is declared where it is read, with its default and its meaning: see lab.options.
"""

from ml_collections import ConfigDict

from lab.data import DATA
from lab.errors import UserError, choose
from lab.evaluate.asks import LOSS, ask
from lab.model import execution, mesh
from lab.model.spec import MODEL
from lab.options import LARGEST, Option, Room, leaves, set_field, tuples
from lab.study.define.settings import STUDY
from lab.train import instruments
from lab.train.optimizer import TRAIN

SEEDS = {
    "seed": Option(0, "of the order and layout of texts: batches depend on it and the step alone", least=0),
    "model_seed": Option(0, "of the weights, and of what dropout drops", least=0),
}
CHECKPOINT = Option(
    "", "where weights come from: a cell, a seed or checkpoint of it, or an imported model; empty: they are drawn"
)
# How a study runs: nothing of what it computes but the rounding.
ROUNDING = (
    {f"mesh.{axis}": option for axis, option in mesh.OPTIONS.items()}
    | execution.OPTIONS
    | {"microbatches": Option(1, "that a step's rows are cut into", least=1)}
)
RUN = Room(
    ROUNDING
    | mesh.CHOSEN
    | {
        "workers": Option(0, "processes that pack batches; 0: threads do", least=0),
        "checkpoint.every": Option(100, "steps", least=1),
        "checkpoint.keep": Option(2, "the newest so many", least=1),
        "log.every": Option(10, "steps", least=1),
        "log.instruments": instruments.OPTION,
        "join_timeout": Option(1800, "seconds that a process waits for those of other hosts", least=1, most=10**6),
        # Of several processes (lab/watch.py):
        "stuck_timeout": Option(
            120, "seconds beyond the slowest step after which a process that stands still ends all", least=1, most=10**6
        ),
        "heartbeat_timeout": Option(
            100, "seconds without a word from a process after which the others end", least=1, most=10**6
        ),
        "grace": Option(90, "seconds from SIGTERM in which all end, saved or not", least=1, most=10**6),
    }
)
ROOMS = {"study": STUDY, "model": MODEL, "data": DATA, "train": TRAIN, "run": RUN}


def base() -> ConfigDict:
    """A plain causal language model on whole rows of text: a fresh, locked config, which refuses unknown fields."""
    config = ConfigDict({name: option.default for name, option in SEEDS.items()})
    config.checkpoint = CHECKPOINT.default
    for name, room in ROOMS.items():
        config[name] = room.defaults()
    config.evaluate = {LOSS: ask()}
    return config.lock()


def restored(stored: dict) -> ConfigDict:
    """The config that a config.json keeps: a field that it lacks was declared later, and has its default.

    Raises UserError for a field that is declared no more.
    """
    config, asks = base(), stored.get("evaluate", {})
    if not isinstance(asks, dict):
        raise UserError(f"config.json has evaluate = {asks!r}, which is of another type")
    with config.unlocked():
        for name, asked in asks.items():
            config.evaluate[name] = ask(asked.get("kind") if isinstance(asked, dict) else None)
    known = leaves(config)
    for name, value in leaves(stored).items():
        try:
            set_field(config, choose("a field of config.json", name, known), tuples(value))
        except TypeError:
            raise UserError(f"config.json has {name} = {value!r}, which is of another type") from None
    return config


def check_fields(config: ConfigDict) -> None:
    """Raises UserError for a field that is not declared, or is gone: a config that was unlocked takes any."""
    for name, room in ROOMS.items():
        there, declared = leaves(config[name]), room.declared()
        for field in there:
            choose(f"a field of config.{name}", field, declared)
        for field in declared:
            if field not in there:
                raise UserError(f"config.{name}.{field} is missing; begin with what base() of lab.config gives")


def check_seeds(config: ConfigDict) -> None:
    """Raises UserError for a seed that is none, and where the last of the study's would be."""
    for name, option in SEEDS.items():
        option.check(name, config[name])
        if config[name] + (count := config.study.seeds) - 1 > LARGEST:
            raise UserError(
                f"{name} = {config[name]} with study.seeds = {count} passes {LARGEST}, as int32 is; choose at most "
                f"{LARGEST - count + 1}"
            )


def branches(config: ConfigDict) -> ConfigDict:
    """The config, set to what the studies of parallel branches have alike: interleaved texts under 2D RoPE."""
    config.model.rule = "all_branches"
    config.model.position.update(dict(theta=1e6, ratio=1.0))
    config.data.update(dict(text_length=32, texts_per_row=16, rows=4, draw="1-15", stagger=True))
    counts = (1, 2, 4, 8, 16, 24, 32, 48, 64)
    config.evaluate.loss.update(dict(branches=counts, texts=768, texts_per_row=192, rows=2))  # their lcm fills groups
    return config


SIZES = ("cpu", "gpu", "paper")


def sized(config: ConfigDict, scale: str) -> ConfigDict:
    """The config at a size that studies of plain language models, of one text in a row, have alike. Three seeds; six at
    cpu, where a step is cheap and a difference is told by seeds rather than by steps.

    cpu: 4 layers of width 64 on bytes of Python's own sources, 100 steps of 8 rows of 128. gpu: 8 layers of width 512
    on the same in tokens, 1,000 steps of 16k tokens, about five epochs. paper: as T5-base's decoder, 12 layers of width
    768, and 16,000 steps of 128 texts of 1,024 tokens, which are to be brought. Raises UserError for another name.
    """
    choose("a size", scale, SIZES)
    config.study.seeds = 3
    if scale == "cpu":
        config.model.update(dict(dim=64, layers=4))
        config.model.mixer.update(dict(heads=4, kv_heads=4, head_dim=16))
        config.model.feedforward.width = 168
        config.data.update(dict(text_length=128, rows=8))
        config.evaluate.loss.rows = 64
        config.study.seeds = 6
        config.train.update(dict(steps=100, learning_rate=5e-3, final_learning_rate=5e-4, warmup=10))
        config.run.checkpoint.every = 100
        return config
    config.model.update(dict(dim=512, layers=8, vocabulary=6400, compute="bfloat16"))
    config.model.mixer.update(dict(heads=8, kv_heads=8, head_dim=64))
    config.model.feedforward.width = 1368
    config.run.update(dict(scan=True, remat="dots"))
    config.data.update(dict(tokenizer="bpe:6400", text_length=512, rows=32))
    config.train.update(dict(steps=1000, learning_rate=2e-3, final_learning_rate=2e-4, warmup=50))
    config.evaluate.loss.update(dict(texts=0, rows=32))
    config.run.checkpoint.every = 500
    if scale == "paper":
        config.model.update(dict(dim=768, layers=12, vocabulary=32_000))
        config.model.mixer.update(dict(heads=12, kv_heads=12))
        config.model.feedforward.width = 2048
        config.data.update(dict(corpus="jsonl", tokenizer="bpe:32000", text_length=1024, rows=128, texts=2_048_000))
        config.train.update(dict(steps=16_000, warmup=1000))
        config.evaluate.loss.texts = 4096
        config.run.checkpoint.every = 1000
    return config


def add_ask(config: ConfigDict, name: str, kind: str = "branches", **fields) -> None:
    """Asks one thing more of every cell: add_ask(config, "long", branches=(128,), texts_per_row=128, rows=1)."""
    with config.unlocked():
        config.evaluate[name] = ask(kind, **fields)
