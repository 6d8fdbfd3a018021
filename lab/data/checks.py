"""Checks of data and asks that need no corpus, so that plan can make them before anything runs."""

import math
from collections.abc import Sequence

from ml_collections import ConfigDict

from lab.data import bytewise, skipping, tokenizers
from lab.data.packing import LARGEST_BATCH, LONGEST_ROW, parse_draw, texts_of_draw, times_of_text
from lab.errors import UserError


def check_training(config: ConfigDict) -> None:
    """What the fields of config.data must have to do with each other."""
    tokenizers.check(config.data.tokenizer, config.data.eos)
    _check_text_bytes(config.data)
    _check_draw(config.data)
    skipping.check(config.data, times_of_text(config.data))


def check_branches(config: ConfigDict, ask: ConfigDict, field: str, branch_counts: Sequence[int]) -> None:
    """The sizes of an ask by branches, called `field`: every count fills its groups, and the texts fill every call."""
    if not branch_counts:
        raise UserError(f"{field}.branches is empty; choose at least one number of branches, such as (1, 2, 4)")
    at_most_once(f"{field}.branches", branch_counts)
    sizes = [texts_of_draw(branches, branches, config.data.prompt) for branches in branch_counts]
    if any(ask.texts_per_row % size for size in sizes):
        raise UserError(
            f"{field}.texts_per_row = {ask.texts_per_row} does not hold whole groups of every one of "
            f"the branch counts {tuple(branch_counts)}; choose a multiple of {math.lcm(*sizes)}"
        )
    call = ask.texts_per_row * ask.rows
    if ask.texts % call:
        raise UserError(
            f"{field}.texts = {ask.texts} is not a multiple of texts_per_row x rows = "
            f"{ask.texts_per_row} x {ask.rows}; the next is {-(-ask.texts // call) * call}"
        )


def check_size(room: str, batch: ConfigDict, text_length: int) -> None:
    """Refuses rows, and batches of them, that no host could hold; room: whose fields `batch` has, such as data."""
    row = batch.texts_per_row * text_length
    if row > LONGEST_ROW:
        raise UserError(
            f"{room}.texts_per_row x data.text_length = {batch.texts_per_row} x {text_length} makes rows of {row} "
            f"tokens; choose at most {LONGEST_ROW} tokens"
        )
    if batch.rows * row > LARGEST_BATCH:
        raise UserError(
            f"{room}.rows = {batch.rows} of {row} tokens make batches of {batch.rows * row} tokens; choose at most "
            f"{LARGEST_BATCH // row} rows"
        )


def rows_of_process(field: str, rows: int, process_index: int, process_count: int) -> range:
    """The rows that one of the hosts packs, contiguous. Raises UserError if they cannot be shared equally."""
    if rows % process_count:
        raise UserError(
            f"{field} = {rows} cannot be shared by {process_count} processes; choose a multiple of {process_count}"
        )
    share = rows // process_count
    return range(process_index * share, (process_index + 1) * share)


def _check_text_bytes(data: ConfigDict) -> None:
    if 0 < data.text_bytes < bytewise.LEAST:
        raise UserError(
            f"data.text_bytes = {data.text_bytes} holds not every character; choose 0 (tokens cut the documents) or at "
            f"least {bytewise.LEAST}"
        )
    if data.text_bytes and data.long_texts != "refuse":
        raise UserError(
            f"data.long_texts = {data.long_texts!r} would cut by tokens what data.text_bytes = {data.text_bytes} cuts "
            "by bytes, so that tokenizers had other texts; choose refuse"
        )


def _check_draw(data: ConfigDict) -> None:
    low, high = parse_draw(data.draw)
    texts = texts_of_draw(low, high, data.prompt)
    if data.texts_per_row % texts:
        groups = "whole groups" if low == high else f"pairs of groups, whose branches sum to {low + high},"
        raise UserError(
            f"data.texts_per_row = {data.texts_per_row} does not hold {groups} of data.draw = {data.draw!r} with "
            f"data.prompt = {data.prompt!r}; choose a multiple of {texts}; the next is "
            f"{-(-data.texts_per_row // texts) * texts}"
        )
    if data.slots and data.slots < high:
        raise UserError(
            f"data.slots = {data.slots} is fewer than the {high} branches of data.draw = {data.draw!r}; "
            f"choose 0 (slots 1, 2, ...) or at least {high}"
        )


def at_most_once(field: str, values: Sequence) -> None:
    """Raises UserError for a condition that is asked twice."""
    if len({*values}) < len(values):
        raise UserError(f"{field} = {tuple(values)} has a value twice; choose each once")


def at_least(field: str, value: int, least: int) -> None:
    """Raises UserError for a number below `least`."""
    if value < least:
        raise UserError(f"{field} = {value} is too small; choose at least {least}")
