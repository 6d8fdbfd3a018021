"""What a study would cost, cell by cell, before anything is trained."""

import hashlib

import jax

from lab import data as lab_data
from lab.errors import UserError, choose
from lab.kernels import rules
from lab.model import abstract, accounting, position, streams, transformer
from lab.study.define import contrasts
from lab.study.define.cell import Cell
from lab.study.results import REPOSITORY
from lab.train import optimizer, step

VMAP = ("none", "seeds", "numbers")  # what is trained as one vmapped program
DEVICES = (1, 2, 4, 8)  # over which tensor parallelism would lay a cache
TOKENS_COUNTED = 32_768  # of training rows over which visible keys are averaged


def check(cell: Cell) -> None:
    """Refuses a cell that cannot run, naming the field: everything that shows before the data is read."""
    config = cell.config
    transformer.check(config.model)
    _check_mesh(config)
    optimizer.check(config.train)
    optimizer.check_parameters(config.train, config.model)
    lab_data.check(config)
    for room in ("data", "evaluate"):
        tokens = config[room].texts_per_row * config.data.text_length
        streams.check_rows(config.model, f"{room}.texts_per_row x data.text_length", tokens)
    if config.data.rows % config.train.microbatches:
        raise UserError(
            f"train.microbatches = {config.train.microbatches} does not divide data.rows = {config.data.rows}; "
            "choose a divisor"
        )
    for field in ("checkpoint.every", "checkpoint.keep", "log.every"):
        room, name = field.split(".")
        if config[room][name] < 1:
            raise UserError(f"{field} = {config[room][name]} must be at least 1")


def _check_mesh(config) -> None:
    in_order = [s.mixer for s in transformer.layer_specs(config.model) if transformer.MIXERS[s.mixer].in_order]
    if in_order and config.mesh.context != 1:
        raise UserError(
            f"mesh.context = {config.mesh.context} would cut the rows that model.mixer = {in_order[0]!r} runs along; "
            "choose 1"
        )


def check_study(study) -> None:
    """Refuses what would show only once cells are run, or in the report."""
    for field in ("name", "condition"):
        if not study[field]:
            raise UserError(f"study.{field} is empty; choose a word for it")
    if study.seeds < 1:
        raise UserError(f"study.seeds = {study.seeds} must be at least 1")
    choose("study.vmap", study.vmap, VMAP)
    if study.published and not (REPOSITORY / study.published).is_file():
        raise UserError(f"study.published = {study.published!r}: there is no such file in the repository")


def check_groups(study, cells: list[Cell]) -> None:
    """Refuses groups of learning curves that name nothing."""
    known = list(dict.fromkeys(value for cell in cells for value in cell.labels.values()))
    for title, names in study.groups:
        for name in names:
            choose(f"study.groups {title!r}", name, known)


def describe(cell: Cell) -> dict:
    """A row of the plan."""
    config = cell.config
    model = abstract(config.model)
    visible = [visible_keys(block.mixer.rule, config) for block in model.blocks]
    rotary = {f"pairs_{name}": count for name, count in rotary_pairs(config.model).items()}
    return {
        "name": cell.name,
        "labels": cell.labels,
        **accounting.parameters(model),
        "train_flops_per_token": accounting.train_flops_per_token(model, visible),
        "attention_work": accounting.attention_work(model),
        "cache_per_token_per_layer": accounting.cache_per_token_per_layer(model),
        **over_devices(model),
        "state_per_layer": accounting.state_per_layer(model),
        "tokens": nominal_tokens(config),
        "executable": executable(config, model),
        "head_dim": config.model.head_dim,
        **rotary,
        "match": list(cell.matches),
        "length": cell.length,
    }


def rotary_pairs(model) -> dict[str, int]:
    """How many rotary pairs of a head carry the branch, the time and the index: the most of any layer."""
    counted = [position.pair_counts(spec) for spec in transformer.layer_specs(model) if rotates(spec)]
    return {name: max((pairs[name] for pairs in counted), default=0) for name in ("branch", "time", "index")}


def rotates(spec) -> bool:
    """Whether queries or keys of a layer rotate."""
    mixer = transformer.MIXERS[spec.mixer]
    return hasattr(mixer, "rotated") and bool({*"qk"} & {*mixer.rotated(spec)})


def over_devices(model) -> dict:
    """{"cache_per_device", "cache_copies"}, each by the number of devices: numbers per token and layer, and how often
    all devices together hold each of them. None where the groups do not divide; no copies of an empty cache."""
    whole = accounting.cache_per_token_per_layer(model)
    held = {count: accounting.cache_per_device(model, count) for count in DEVICES}
    copies = {count: count * part / whole if part is not None and whole else None for count, part in held.items()}
    return {
        "cache_per_device": {str(count): part for count, part in held.items()},
        "cache_copies": {str(count): factor for count, factor in copies.items()},
    }


def nominal_tokens(config) -> int:
    """Tokens that a cell trains on, were every text text_length long."""
    return config.train.steps * config.data.rows * config.data.texts_per_row * config.data.text_length


_counted: dict[tuple, float] = {}  # counting a long row takes seconds, and cells share it


def visible_keys(rule: rules.Rule, config) -> float:
    """Mean number of keys that a token of the first training rows sees, were every text text_length long."""
    key = rule, config.data.to_json_best_effort(), config.seed
    if key not in _counted:
        rows = max(1, TOKENS_COUNTED // (config.data.texts_per_row * config.data.text_length))
        _counted[key] = rules.mean_visible_keys(rule, lab_data.nominal_coordinates(config, rows))
    return _counted[key]


def program(config) -> str:
    """`executable` of a config."""
    return executable(config, abstract(config.model))


def executable(config, model) -> str:
    """Names the training program: cells of one name share one compilation. What `lab.train.compiled` shares by."""
    program = step.Program.of(config.train)
    leaves, structure = jax.tree.flatten(model)
    shape = config.data.rows, config.data.texts_per_row * config.data.text_length
    text = repr((str(structure), [(x.shape, str(x.dtype)) for x in leaves], program, shape, dict(config.mesh)))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def table(config, cells: list[Cell]) -> list[dict]:
    """The plan of a study, everything checked."""
    check_study(config.study)
    check_groups(config.study, cells)
    for cell in cells:
        check(cell)
    contrasts.check(config.study, {cell.name: cell.labels for cell in cells}, lab_data.conditions(config))
    return [describe(cell) for cell in cells]
