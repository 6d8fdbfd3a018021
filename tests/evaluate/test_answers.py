"""Answers in words: as SQuAD's own script is defined, and which of several is taken."""

import math

import pytest

from lab.evaluate.answers import exact, f1, likeliest, normalised, voted


@pytest.mark.parametrize(("text", "expected"), [
    ("The Cat", "cat"),
    ("a cat, an owl; THE end.", "cat owl end"),
    ("  two \t words\n", "two words"),
    ("U.S.A.", "usa"),  # punctuation goes before articles do
    ("an apple-a-day", "appleaday"),
    ("theatre anthem a1", "theatre anthem a1"),  # articles are whole words
    ("the the", ""),
    ("The", ""),
    ("", ""),
    ("1,000 (one thousand)", "1000 one thousand"),
    ("Beyoncé’s", "beyoncé’s"),  # of punctuation ASCII's alone
    ("12 13", "12 13"),
])  # fmt: skip
def test_what_does_not_count_is_taken_out(text, expected):
    assert normalised(text) == expected


@pytest.mark.parametrize(("answer", "accepted", "right", "fits"), [
    ("the Nile", ("Nile",), True, 1.0),
    ("Nile river", ("Nile", "the Amazon"), False, 2 / 3),  # precision 1/2, recall 1
    ("Amazon", ("Nile", "the Amazon"), True, 1.0),
    ("big big dog", ("big dog dog",), False, 2 / 3),  # a word counts as often as both have it
    ("big big dog", ("big big cat",), False, 2 / 3),
    ("cat", ("dog",), False, 0.0),
    ("", ("dog",), False, 0.0),
    ("", ("",), True, 1.0),  # a question without an answer
    ("dog", ("",), False, 0.0),
    ("the", ("",), True, 1.0),
    ("", ("the", "dog"), False, 0.0),  # what is nothing once it is normalised counts where there is nothing else
    ("a", ("the",), True, 1.0),
    ("one two three four", ("two four six",), False, 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)),
])  # fmt: skip
def test_scores_are_those_of_the_best_accepted_answer(answer, accepted, right, fits):
    assert exact(answer, accepted) is right
    assert f1(answer, accepted) == pytest.approx(fits)


@pytest.mark.parametrize(("answers", "place"), [
    (["a cat"], 0),
    (["dog", "cat", "The cat!"], 1),
    (["dog", "cat", "cat", "dog"], 0),  # a tie: what came first
    (["cat", "dog", "dog", "cow", "cow"], 1),
    (["", "cat", ""], 0),
    (["cat", "dog", "cow"], 0),
])  # fmt: skip
def test_a_vote_takes_the_first_of_the_most_common(answers, place):
    assert voted(answers) == place


def test_best_is_the_first_of_the_likeliest():
    assert likeliest([-3.0, -1.0, -2.0]) == 1
    assert likeliest([-1.0, -0.5, -0.5]) == 1
    assert likeliest([-math.inf, -7.0]) == 1
    assert likeliest([-math.inf, -math.inf]) == 0
