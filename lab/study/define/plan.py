"""What a study would cost, cell by cell, before anything is trained."""

import hashlib
import unicodedata
from collections.abc import Iterator

import jax

from lab import config as lab_config
from lab import data as lab_data
from lab.coordinates import Coordinates
from lab.data import packing
from lab.data.corpora import CORPORA
from lab.errors import UserError, choose
from lab.evaluate import asks
from lab.kernels import rules
from lab.model import abstract, accounting, intensity, position, streams
from lab.model import mesh as lab_mesh
from lab.model import spec as lab_spec
from lab.model.mixers import MIXERS
from lab.options import leaves
from lab.study.define import contrasts, identity, start
from lab.study.define.cell import Cell
from lab.study.define.cell import labels as cell_labels
from lab.study.results import COLUMNS, published
from lab.train import dropout, optimizer, partition, step
from lab.train.workload import Record

DEVICES = (1, 2, 4, 8)  # over which tensor parallelism would lay a cache
DECODED = (1, 64)  # rows that are decoded at once
LONGEST_NAME = 100  # bytes: a file name has at most 255, and names are parts of it
TOKENS_COUNTED = 32_768  # of training rows over which visible keys are averaged
ROWS_LOOKED_AT, TOKENS_LOOKED_AT = 2, 1024  # of those in which every pair is looked at, to see what a rule shows


def check(cell: Cell) -> None:
    """Refuses a cell that cannot run, naming the field: everything that shows before the data is read."""
    config = cell.config
    if unprintable(cell.name):
        raise UserError(f"the cell {cell.name!r} has a control character in its name; choose another label or value")
    lab_config.check_seeds(config)
    lab_spec.check(config.model)
    optimizer.check(config.train, begun=bool(config.checkpoint))
    optimizer.check_parameters(config.train, config.model)
    lab_data.check(config)
    asks.check(config)
    check_rules(config)
    check_run(config)
    dropout.check(config)
    start.check(config, cell.name)
    tokens = config.data.texts_per_row * config.data.text_length
    streams.check_rows(config.model, "data.texts_per_row x data.text_length", tokens)
    data = config.data
    made = f"data.text_length = {data.text_length}, prompt = {data.prompt!r}, stagger = {data.stagger}"
    specs = lab_spec.layer_specs(config.model)
    position.check_times(specs, made, packing.most_times(data))
    position.check_branches(specs, f"data.draw = {data.draw!r}, slots = {data.slots}", packing.highest_branch(data))


def check_texts(cells: list[Cell]) -> None:
    """Refuses cells of different tokenizers unless all read the same texts, which tokens would cut otherwise."""
    found = [cell.config.data for cell in cells if cell.config.data.corpus in CORPORA]
    tokenizers, sizes = ([*dict.fromkeys(data[name] for data in found)] for name in ("tokenizer", "text_bytes"))
    if len(tokenizers) > 1 and (0 in sizes or len(sizes) > 1):
        raise UserError(
            f"the study varies data.tokenizer ({', '.join(tokenizers)}) with data.text_bytes = "
            f"{', '.join(map(str, sizes))}: its cells would read different texts; set one number of bytes for "
            "all of them, such as 128"
        )


def check_rules(config) -> None:
    """Refuses a rule of any layer, trained or asked, under which a token sees what it is to predict."""
    at = _first_tokens(config)
    asked = {f"evaluate.{name}.model: ": asks.remodelled(config, ask).model for name, ask in config.evaluate.items()}
    for where, model in {"": config.model, **asked}.items():
        for text in dict.fromkeys(spec.rule for spec in lab_spec.layer_specs(model)):
            if not rules.shows_later(rules.parse(text), at):
                continue
            inner = f"({text})" if "|" in text else text
            joined = [f"{name} & {inner}" for name in rules.RULES]
            hiding = [one for one in joined if not rules.shows_later(rules.parse(one), at)]
            raise UserError(
                f"{where}model.rule = {text!r} shows a token later ones of its own branch, which it is to predict; "
                f"choose {' | '.join(map(repr, hiding))}"
            )


_looked_at: dict[tuple, Coordinates] = {}  # packing a long row takes a while, and cells share it


def _first_tokens(config) -> Coordinates:
    """Coordinates of the beginnings of the first training rows: a rule speaks of neighbours as of tokens far apart."""
    key = config.data.to_json_best_effort(), config.seed
    if key not in _looked_at:
        _looked_at[key] = lab_data.nominal_coordinates(config, ROWS_LOOKED_AT).map(lambda x: x[:, :TOKENS_LOOKED_AT])
    return _looked_at[key]


def check_run(config) -> None:
    """Refuses a way to run that the model or the batch cannot be run in."""
    run = config.run
    lab_config.RUN.check(leaves(run), "run.")
    lab_mesh.check_choice(run)
    streams.check_scan(config.model, run)
    if config.data.rows % run.microbatches:
        raise UserError(
            f"run.microbatches = {run.microbatches} does not divide data.rows = {config.data.rows}; choose a divisor"
        )
    names = [spec.mixer.name for spec in lab_spec.layer_specs(config.model)]
    in_order = [name for name in names if MIXERS[name].in_order]
    if in_order and run.mesh.context != 1:
        raise UserError(
            f"run.mesh.context = {run.mesh.context} would cut the rows that model.mixer.name = {in_order[0]!r} runs "
            "along; choose 1"
        )


def check_study(study) -> None:
    """Refuses what would show only once cells are run, or in the report."""
    lab_config.ROOMS["study"].check(leaves(study), "study.")
    check_names(study)
    if study.published:
        published(study.published)


def reserved() -> set[str]:
    """What stands in tables of runs besides the labels."""
    return {*COLUMNS, *Record._fields, *(kind.column for kind in asks.ASKS.values())}


def check_names(study) -> None:
    """Refuses names that a directory, a column or a terminal cannot carry."""
    if not study.name:
        raise UserError("study.name is empty; choose a word for it")
    if "/" in study.name or study.name.startswith(".") or len(study.name.encode(errors="replace")) > LONGEST_NAME:
        raise UserError(
            f"study.name = {study.name!r} names a directory; choose one of at most {LONGEST_NAME} bytes, without a / "
            "and without a . in front"
        )
    for field, value in leaves(study).items():
        for text in _texts(value):
            if unprintable(text, allowed="\n\t" if field == "question" else ""):
                raise UserError(f"study.{field}: {text!r} has a control character; leave it out")
    labels = [label for _, label in cell_labels(study)]
    for label in labels:
        if label in reserved() or not label.strip():
            raise UserError(
                f"study.labels: {label!r} is empty, or a column of every study; choose another word than "
                f"{', '.join(sorted(reserved()))}"
            )
        if labels.count(label) > 1:
            raise UserError(f"study.labels has {label!r} twice: one column would write over the other; rename one")


def unprintable(text: str, allowed: str = "") -> bool:
    """Whether a terminal would obey some of it, or a file cannot hold it: control characters, lone surrogates."""
    return any(unicodedata.category(letter) in ("Cc", "Cs") and letter not in allowed for letter in text)


def _texts(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _texts(item)


def check_groups(study, cells: list[Cell]) -> None:
    """Refuses groups of learning curves that name nothing."""
    known = list(dict.fromkeys(value for cell in cells for value in cell.labels.values()))
    for title, names in study.groups:
        for name in names:
            choose(f"study.groups {title!r}", name, known)


def describe(cell: Cell) -> dict:
    """A row of the plan."""
    config = cell.config
    model = abstract(config.model, config.run)
    visible = [visible_keys(block.mixer.rule, config) for block in model.blocks]
    trained, without_gradient = start.trained(config, model)
    rotary = {f"pairs_{name}": count for name, count in rotary_pairs(config.model).items()}
    return {
        "name": cell.name,
        "labels": cell.labels,
        **accounting.parameters(model),
        "parameters_trained": trained,
        "train_flops_per_token": accounting.train_flops_per_token(model, visible, without_gradient),
        "attention_work": accounting.attention_work(model),
        "cache_per_token_per_layer": accounting.cache_per_token_per_layer(model),
        **over_devices(model),
        "state_per_layer": accounting.state_per_layer(model),
        **moved(config, model),
        "tokens": nominal_tokens(config),
        "executable": program(config) if partition.Partition.of(config).partial else executable(config, model),
        "head_dim": config.model.mixer.head_dim,
        **rotary,
        "fields": fields(config),
        "match": list(cell.matches),
        "length": cell.length,
    }


def fields(config) -> dict:
    """What a cell reads, by its names; model.mixer.rotate says which projections do where a mixer means its own."""
    found, mixer = identity.fields(config), MIXERS[config.model.mixer.name]
    return found | ({"model.mixer.rotate": mixer.rotated(config.model) or "none"} if hasattr(mixer, "rotated") else {})


def rotary_pairs(model) -> dict[str, int]:
    """How many rotary pairs of a head carry the branch, the time and the index: the most of any layer."""
    counted = [position.pair_counts(spec) for spec in lab_spec.layer_specs(model) if rotates(spec)]
    return {name: max((pairs[name] for pairs in counted), default=0) for name in ("branch", "time", "index")}


def rotates(spec) -> bool:
    """Whether queries or keys of a layer rotate."""
    mixer = MIXERS[spec.mixer.name]
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


def moved(config, model) -> dict:
    """{"cache_bytes_per_token" of all layers, "intensity_training" of the study's batch, "intensity_decoding" by the
    number of rows that are decoded at once, to the length of a training row} (lab.model.intensity).

    Groups are those of width dim / heads that would cache as many numbers, so that every mixer has some. None where
    a layer keeps a state instead, which the formulas know nothing of.
    """
    specs, d = lab_spec.layer_specs(config.model), config.model.dim
    heads = sum(specs[layer % len(specs)].mixer.heads for layer in range(config.model.layers)) / config.model.layers
    n = config.data.texts_per_row * config.data.text_length
    groups = accounting.cache_per_token_per_layer(model) / 2 / (d / heads)
    stateful = accounting.state_per_layer(model) > 0
    decoding = {str(b): None if stateful else intensity.decoding(b, n, d, heads, groups) for b in DECODED}
    return {
        "cache_bytes_per_token": accounting.cache_bytes_per_token(model),
        "intensity_training": intensity.training(config.data.rows, n, d, heads),
        "intensity_decoding": decoding,
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
    return executable(config, partition.abstract(config))


def executable(config, model) -> str:
    """Names the training program: cells of one name share one compilation. What `lab.train.compiled` shares by."""
    program = step.Program.of(config)
    leaves, structure = jax.tree.flatten(model)
    shape = config.data.rows, config.data.texts_per_row * config.data.text_length
    text = repr((str(structure), [(x.shape, str(x.dtype)) for x in leaves], program, shape, dict(config.run.mesh)))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def table(config, cells: list[Cell]) -> list[dict]:
    """The plan of a study, everything checked."""
    check_study(config.study)
    check_groups(config.study, cells)
    check_texts(cells)
    for cell in cells:
        check(cell)
    contrasts.check(config.study, {cell.name: cell.labels for cell in cells}, asks.conditions(config.evaluate.loss))
    return [describe(cell) for cell in cells]
