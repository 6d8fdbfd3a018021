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
        ("data.draw", "1-7", "data.draw = '1-7' .* groups of up to 7 texts, over data.texts_per_row = 6"),
        ("data.slots", 2, "data.slots = 2 is fewer than the 3 branches .*at least 3"),
        ("data.slots", -1, "data.slots = -1 must be at least 0"),
        ("data.text_length", 1, "data.text_length = 1 must be at least 2"),
        ("data.texts_per_row", 0, "data.texts_per_row = 0 must be at least 1"),
        ("data.rows", 0, "data.rows = 0 must be at least 1"),
        ("data.texts", -1, "data.texts = -1 must be at least 0"),
        ("run.workers", -1, "run.workers = -1 must be at least 0"),
        ("seed", -1, "seed = -1 must be at least 0"),
        ("evaluate.loss.branches", (1, 0), r"evaluate.loss.branches = \(1, 0\): 0 must be at least 1"),
        (
            "evaluate.loss.branches",
            (2, 4, 5),
            "evaluate.loss.texts_per_row = 6 .*\\(2, 4, 5\\); choose a multiple of 20",
        ),
        ("evaluate.loss.texts", 30, "evaluate.loss.texts = 30 is not a multiple .* 6 x 4; the next is 48"),
        ("evaluate.loss.rows", 0, "evaluate.loss.rows = 0 must be at least 1"),
    ],
)
def test_bad_fields_are_refused_by_name(config, field, value, message):
    set_field(config, field, value)
    with pytest.raises(UserError, match=message) as refusal:
        check(config)
    assert "\n" not in str(refusal.value)


def test_a_prompt_counts_among_the_texts_of_a_group(config):
    config.data.update(prompt="first", draw="1-6")
    with pytest.raises(UserError, match="prompt = 'first' asks for groups of up to 7 texts"):
        check(config)
    config.data.draw = "1-5"
    with pytest.raises(UserError, match="choose a multiple of 12"):
        check(config)
    config.evaluate.loss.branches = (1, 2, 5)
    check(config)
