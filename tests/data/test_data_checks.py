"""Every field of config.data and config.evaluate that cannot work is refused by name."""

import pytest

import lab.config
from lab import data
from lab.errors import UserError
from lab.evaluate import asks
from lab.options import leaves, set_field


def check(config):
    """Of the seeds, the data, how it is read, and what is asked about it."""
    lab.config.check_seeds(config)
    lab.config.RUN.check(leaves(config.run), "run.")
    data.check(config)
    asks.check(config)


def test_the_base_config_passes():
    check(lab.config.base())


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("data.corpus", "stdlibs", "data.corpus = 'stdlibs' is unknown .*'stdlib'.*huggingface"),
        ("data.long_texts", "cut", "data.long_texts = 'cut' is unknown.*split, truncate, refuse"),
        ("data.align", "centre", "data.align = 'centre' is unknown.*left, right"),
        ("data.prompt", "last", "data.prompt = 'last' is unknown.*none, first"),
        ("data.tokenizer", "byte", "data.tokenizer = 'byte' is neither bytes, bpe:<size>, nor"),
        ("data.tokenizer", "", "data.tokenizer = '' is neither"),
        ("data.tokenizer", "bpe:256", "'bpe:256' is too small; choose at least bpe:257"),
        ("data.draw", "many", "data.draw = 'many'"),
        ("data.draw", "1-7", "data.texts_per_row = 6 .* pairs .* '1-7' .* choose a multiple of 8; the next is 8"),
        ("data.draw", "1-3", "data.texts_per_row = 6 .* pairs .* '1-3' .* choose a multiple of 4; the next is 8"),
        ("data.draw", "fixed4", "data.texts_per_row = 6 .* whole groups .* 'fixed4' .* a multiple of 4; the next is 8"),
        ("data.draw", "4-4", "data.texts_per_row = 6 .* whole groups .* '4-4' .* a multiple of 4; the next is 8"),
        ("data.draw", f"1-{10**30}", "data.texts_per_row = 6 does not hold pairs"),
        ("data.slots", 2, "data.slots = 2 is fewer than the 5 branches .*at least 5"),
        ("data.slots", -1, "data.slots = -1 must be at least 0"),
        ("data.slots", 100_000, "data.slots = 100000 must be at most 65536"),
        ("data.text_length", 1, "data.text_length = 1 must be at least 2"),
        ("data.text_length", 10**8, "data.text_length = 100000000 must be at most 1048576"),
        ("data.text_length", 2**18, "data.texts_per_row x data.text_length = 6 x 262144 .* choose at most 1048576"),
        ("data.texts_per_row", 0, "data.texts_per_row = 0 must be at least 1"),
        ("data.texts_per_row", 6_000_000, "data.texts_per_row = 6000000 must be at most 1048576"),
        ("data.texts_per_row", 2**19, "data.texts_per_row x data.text_length = 524288 x 4 .* choose at most 1048576"),
        ("data.rows", 0, "data.rows = 0 must be at least 1"),
        ("data.rows", 10**9, "data.rows = 1000000000 of 24 tokens .* choose at most 11184810 rows"),
        ("data.texts", -1, "data.texts = -1 must be at least 0"),
        ("run.workers", -1, "run.workers = -1 must be at least 0"),
        ("seed", -1, "seed = -1 must be at least 0"),
        ("evaluate.loss.branches", (1, 0), r"evaluate.loss.branches = \(1, 0\): 0 must be at least 1"),
        (
            "evaluate.loss.branches",
            (1, 2, 1),
            "evaluate.loss.branches = \\(1, 2, 1\\) has a value twice; choose each once",
        ),
        ("evaluate.loss.branches", (), "evaluate.loss.branches is empty"),
        (
            "evaluate.loss.branches",
            (2, 4, 5),
            "evaluate.loss.texts_per_row = 6 .*\\(2, 4, 5\\); choose a multiple of 20",
        ),
        ("evaluate.loss.texts", 30, "evaluate.loss.texts = 30 is not a multiple .* 6 x 4; the next is 48"),
        ("evaluate.loss.rows", 0, "evaluate.loss.rows = 0 must be at least 1"),
        ("evaluate.loss.rows", 10**9, "evaluate.loss.rows = 1000000000 of 24 tokens .* choose at most 11184810 rows"),
        (
            "evaluate.loss.texts_per_row",
            2**19,
            "evaluate.loss.texts_per_row x data.text_length = 524288 x 4 makes rows",
        ),
    ],
)
def test_bad_fields_are_refused_by_name(config, field, value, message):
    set_field(config, field, value)
    with pytest.raises(UserError, match=message) as refusal:
        check(config)
    assert "\n" not in str(refusal.value)


def test_a_prompt_counts_among_the_texts_of_a_group(config):
    config.data.prompt = "first"
    with pytest.raises(UserError, match="prompt = 'first'; choose a multiple of 8; the next is 8"):
        check(config)
    config.data.draw = "1-3"
    with pytest.raises(UserError, match="choose a multiple of 12"):
        check(config)
    config.evaluate.loss.branches = (1, 2, 5)
    check(config)
