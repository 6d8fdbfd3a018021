"""What can be asked of a model, by kind: conditions along an axis, and batches of rows for each of them."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from lab.data import Batch, checks, generated, pipeline
from lab.data.corpora import CORPORA
from lab.data.packing import LONGEST_ROW
from lab.data.probes import PROBES
from lab.errors import UserError, choose
from lab.evaluate import decoding, long, questions, retrieval
from lab.evaluate.passes import Pass
from lab.model import abstract, lora, parameter, position, spec, streams
from lab.options import Option, Part, Room, leaves, nested, set_field, without


class AskKind(NamedTuple):
    """A row of the table.

    column: what results call its axis. corpora: the data that it asks about. conditions: the field with the values of
    the axis. check(config, ask, its field); batches(config, ask, texts, condition, process_index=, process_count=).
    version: of what is done with the outputs on the host; a change asks anew. Long documents have no batches but
    rows(config, ask, texts, tokenizer, condition), lab.evaluate.long.LongRows that are scored in chunks, a
    summary(config, ask, condition, rows, nats, right) of what was found. What decodes has neither, but decode(config,
    ask, model, texts, tokenizer, mesh, conditions, stop), which yields lab.evaluate.decoding.Decoded, and row_length(
    ask), the tokens of the rows that it reads beside; None: it reads none. ready(ask, its field, texts, tokenizer)
    raises UserError where there is too little to read.
    """

    column: str
    corpora: tuple[str, ...]
    conditions: str
    options: Mapping[str, Option]
    check: Callable[[ConfigDict, ConfigDict, str], None]
    batches: Callable[..., Iterator[Batch]] | None
    version: int = 1
    rows: Callable[..., long.LongRows] | None = None
    summary: Callable[..., long.LongSummary] | None = None
    decode: Callable[..., Iterator[decoding.Decoded]] | None = None
    row_length: Callable[[ConfigDict], int] | None = None
    ready: Callable[..., None] | None = None


SIZES = {
    "texts": Option(512, "rows of a probe, or validation texts; 0: all there are, as far as they fill calls", least=0),
    "rows": Option(16, "of one call, over all devices and hosts", least=1),
}
COUNTS = {"branches": Option((1,), "numbers of branches", kind=tuple[int, ...], least=1)}
BRANCHES = (
    SIZES
    | COUNTS
    | {
        "texts_per_row": Option(
            1, "a multiple of every number of branches, so that it fills its groups", least=1, most=LONGEST_ROW
        ),
    }
)
DIFFICULTIES = SIZES | {
    "difficulties": Option((2, 4, 8), "of the rows of a probe", kind=tuple[int, ...], least=1),
}
ASKS = {
    "branches": AskKind(
        "eval_branch",
        tuple(CORPORA),
        "branches",
        BRANCHES,
        lambda config, ask, field: checks.check_branches(config, ask, field, ask.branches),
        pipeline.evaluation_batches,
    ),
    "difficulty": AskKind(
        "difficulty",
        tuple(PROBES),
        "difficulties",
        DIFFICULTIES,
        generated.check_difficulties,
        generated.evaluation_batches,
    ),
    "length": AskKind(
        "length",
        tuple(CORPORA),
        "lengths",
        SIZES | long.OF_TEXT,
        long.check,
        batches=None,
        rows=long.rows,
        summary=long.summary,
        ready=long.check_texts,
    ),
    "retrieval": AskKind(
        "length",
        tuple(CORPORA),
        "lengths",
        SIZES | retrieval.OPTIONS,
        retrieval.check,
        batches=None,
        rows=retrieval.rows,
        summary=retrieval.summary,
        ready=retrieval.check_documents,
    ),
    "decoding": AskKind(
        "eval_branch",
        tuple(CORPORA),
        "branches",
        SIZES | COUNTS | decoding.OPTIONS,
        decoding.check,
        batches=None,
        decode=decoding.decode,
        row_length=decoding.row_length,
        ready=decoding.check_texts,
    ),
    "facts": AskKind(
        "decoding",
        ("passage",),
        "methods",
        questions.OF_FACTS,
        questions.check_facts,
        batches=None,
        decode=questions.decode_facts,
        ready=questions.ready,
    ),
    "squad": AskKind(
        "decoding",
        tuple(CORPORA),
        "methods",
        questions.OF_FILE,
        questions.check_file,
        batches=None,
        decode=questions.decode_file,
        ready=questions.ready,
    ),
}
ASK = Room(
    {"model": Option((), "(field of the model, value), ...: laid over the model", kind=tuple[tuple[str, object], ...])},
    (Part("kind", ASKS, "branches", "what is asked", at=""),),
)
LOSS = "loss"  # the ask that every study has: its axis is that of results.csv, and judges cells
PHASES = ("train", "eval")  # of timings.csv, where the other asks stand by their names
TAKEN = (*PHASES, "bits_per_byte")  # the last: a file beside those of the asks


def ask(kind: str = "branches", **fields) -> ConfigDict:
    """An ask for config.evaluate, the rest of its fields at their defaults."""
    made = nested({name: option.default for name, option in ASK.declared().items()})
    made.kind = choose("the kind of an ask", kind, ASKS)
    for name, value in fields.items():
        choose("a field of an ask", name, ASK.declared())
        made[name] = value
    return made


def check(config: ConfigDict) -> None:
    """Raises UserError for the first field of config.evaluate that cannot work."""
    if LOSS not in config.evaluate:
        raise UserError(f"config.evaluate has no ask named {LOSS!r}; it has: {', '.join(config.evaluate) or 'none'}")
    for name, asked in config.evaluate.items():
        field = f"evaluate.{name}"
        if not re.fullmatch(r"\w{1,50}", name) or name in TAKEN:
            raise UserError(
                f"{field}: {name!r} names files and columns; choose one word of at most 50 letters, none of "
                f"{', '.join(TAKEN)}"
            )
        ASK.check(leaves(asked), f"{field}.")
        kind = ASKS[asked.kind]
        if config.data.corpus not in kind.corpora:
            fitting = [other for other in ASKS if config.data.corpus in ASKS[other].corpora]
            raise UserError(
                f"{field}.kind = {asked.kind!r} asks nothing of data.corpus = {config.data.corpus!r}; choose "
                f"{' | '.join(map(repr, fitting))}"
            )
        checks.check_size(field, asked, config.data.text_length)
        kind.check(config, asked, field)
        model = remodelled(config, asked, field).model
        if kind.rows:
            long.check_reach(model, asked, field)
            streams.check_rows(model, f"{field}.lengths: the longest,", max(asked.lengths))
            continue
        position.check_branches(spec.layer_specs(model), f"{field}.branches", max(asked.branches))
        made = f"{field}.branches: the most" if kind.row_length else f"{field}.texts_per_row x data.text_length"
        streams.check_rows(model, made, tokens_at_once(config, asked))


def tokens_at_once(config: ConfigDict, asked: ConfigDict) -> int:
    """Of a row: those that one call of an ask reads."""
    kind = ASKS[asked.kind]
    if kind.row_length:
        return kind.row_length(asked)
    return Pass.of(asked).chunk if kind.rows else asked.texts_per_row * config.data.text_length


def adds_to_scores(config: ConfigDict) -> bool:
    """Whether a position adds to the scores of attention, in training or under the overrides of an ask."""
    asked = (remodelled(config, one) for one in config.evaluate.values())
    return any(spec.biased(each.model) for each in (config, *asked))


def remodelled(config: ConfigDict, asked: ConfigDict, field: str = "an ask") -> ConfigDict:
    """The config with an ask's overrides laid over its model, for the same weights. A pattern of as many entries as
    the model's is laid over it entry by entry: what an entry does not name it keeps, such as a checkpoint's window.

    Raises UserError, calling the ask `field`, for an unknown field, a value that it cannot have, and overrides under
    which the weights are others.
    """
    if not asked.model:
        return config
    changed = config.copy_and_resolve_references()
    known = without(leaves(config.model), *lora.OPTIONS)  # what is asked is a whole model, whatever was trained of it
    for name, value in asked.model:
        choose(f"a field of {field}.model", name, known)
        try:
            set_field(changed.model, name, _laid_over(config.model.pattern, value) if name == "pattern" else value)
        except (TypeError, ValueError):
            kind = type(known[name]).__name__
            raise UserError(f"{field}.model sets {name} = {value!r}, which is no {kind}") from None
    try:
        spec.check(changed.model)
        streams.check_scan(changed.model, config.run)
    except UserError as error:
        raise UserError(f"{field}.model: {error}") from None
    if _weights(changed) != _weights(config):
        overrides = ", ".join(f"{name} = {value!r}" for name, value in asked.model)
        raise UserError(
            f"{field}.model sets {overrides}: its weights would be others than those that were trained; override "
            "fields that leave the shapes of weights as they are, or train a cell"
        )
    return changed


def _laid_over(pattern: tuple, entries: tuple) -> tuple:
    """A pattern of as many entries over another, entry by entry; else itself."""
    if len(entries) != len(pattern):
        return entries
    return tuple(tuple((dict(old) | dict(new)).items()) for old, new in zip(pattern, entries, strict=True))


_shapes: dict[tuple, object] = {}  # a study lays many overrides over one model, and again wherever it is asked


def _weights(config: ConfigDict):
    """What a checkpoint holds of a model: shapes by name."""
    key = config.model.to_json_best_effort(), config.run.to_json_best_effort()
    if key not in _shapes:
        _shapes[key] = parameter.shapes(parameter.split(abstract(config.model, config.run))[1])
    return _shapes[key]


def filled(config: ConfigDict, texts: Sequence | None) -> ConfigDict:
    """The config in which asks of all validation texts (texts = 0) name how many of these they read: as many as fill
    whole calls, and so every condition; all, where texts are joined."""
    every = [name for name, asked in config.evaluate.items() if not asked.texts]
    if not every:
        return config
    changed = config.copy_and_resolve_references()
    for name in every:
        asked = config.evaluate[name]
        call = 1 if ASKS[asked.kind].rows else asked.texts_per_row * asked.rows  # long documents join all texts
        changed.evaluate[name].texts = len(texts) // call * call
    return changed


def resolved(asked: ConfigDict) -> dict:
    """What is asked, as JSON keeps it: the kind, the options that it reads, and the overrides."""
    values = leaves(asked)
    return json.loads(json.dumps({name: values[name] for name in sorted(ASK.read(values))}))


def column(config: ConfigDict, name: str = LOSS) -> str:
    """What results call the axis of an ask."""
    return ASKS[config.evaluate[name].kind].column


def conditions(asked: ConfigDict) -> tuple:
    """The values of its axis."""
    return asked[ASKS[asked.kind].conditions]
