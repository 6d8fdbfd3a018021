"""Checks of config.data and config.evaluate that need no corpus, so that plan can make them before anything runs."""

import math
from collections.abc import Sequence

from ml_collections import ConfigDict

from lab.data import corpora, tokenizers
from lab.data.packing import ALIGNMENTS, PROMPTS, parse_draw, prompts_of_group
from lab.data.texts import LONG_TEXTS
from lab.errors import UserError, choose


def check(config: ConfigDict) -> None:
    """Raises UserError for the first field that cannot work."""
    check_training(config)
    check_evaluation(config, config.evaluate.branches)


def check_training(config: ConfigDict) -> None:
    """The fields of config.data, and the seed."""
    data = config.data
    choose("data.corpus", data.corpus, corpora.CORPORA)
    choose("data.long_texts", data.long_texts, LONG_TEXTS)
    choose("data.align", data.align, ALIGNMENTS)
    choose("data.prompt", data.prompt, PROMPTS)
    tokenizers.check(data.tokenizer)
    at_least("seed", config.seed, 0)
    for field, least in dict(text_length=2, texts=0, texts_per_row=1, rows=1, slots=0, workers=0).items():
        at_least(f"data.{field}", data[field], least)
    _check_draw(data)


def check_evaluation(config: ConfigDict, branch_counts: Sequence[int]) -> None:
    """The sizes of config.evaluate: every branch count fills its groups, and the texts fill every call."""
    evaluate = config.evaluate
    if not branch_counts:
        raise UserError("evaluate.branches is empty; choose at least one number of branches, such as (1, 2, 4)")
    for field in ("texts", "texts_per_row", "rows"):
        at_least(f"evaluate.{field}", evaluate[field], 1)
    for branches in branch_counts:
        at_least("evaluate.branches", branches, 1)
    sizes = [branches + prompts_of_group(config.data.prompt) for branches in branch_counts]
    if any(evaluate.texts_per_row % size for size in sizes):
        raise UserError(
            f"evaluate.texts_per_row = {evaluate.texts_per_row} does not hold whole groups of every one of "
            f"the branch counts {tuple(branch_counts)}; choose a multiple of {math.lcm(*sizes)}"
        )
    call = evaluate.texts_per_row * evaluate.rows
    if evaluate.texts % call:
        raise UserError(
            f"evaluate.texts = {evaluate.texts} is not a multiple of texts_per_row x rows = "
            f"{evaluate.texts_per_row} x {evaluate.rows}; the next is {-(-evaluate.texts // call) * call}"
        )


def rows_of_process(field: str, rows: int, process_index: int, process_count: int) -> range:
    """The rows that one of the hosts packs, contiguous. Raises UserError if they cannot be shared equally."""
    if rows % process_count:
        raise UserError(f"{field} = {rows} cannot be shared by {process_count} processes; choose a multiple of it")
    share = rows // process_count
    return range(process_index * share, (process_index + 1) * share)


def _check_draw(data: ConfigDict) -> None:
    _, high = parse_draw(data.draw)
    texts = high + prompts_of_group(data.prompt)
    if texts > data.texts_per_row:
        raise UserError(
            f"data.draw = {data.draw!r} with data.prompt = {data.prompt!r} asks for groups of up to {texts} texts, "
            f"over data.texts_per_row = {data.texts_per_row}; lower the draw or raise texts_per_row"
        )
    if data.slots and data.slots < high:
        raise UserError(
            f"data.slots = {data.slots} is fewer than the {high} branches of data.draw = {data.draw!r}; "
            f"choose 0 (slots 1, 2, ...) or at least {high}"
        )


def at_least(field: str, value: int, least: int) -> None:
    """Raises UserError for a number below `least`."""
    if value < least:
        raise UserError(f"{field} = {value} is too small; choose at least {least}")
