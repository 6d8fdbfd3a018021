"""Packing against a reference that places one token at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.data import packing
from lab.errors import UserError


def reference(texts, groups, length, offsets, slots, align, prompt):
    """(token, label, segment, branch, time, index) of each place of the row, straight from the definition."""
    row, first = [], 0
    for segment, size in enumerate(groups):
        members = list(range(first, first + size))
        first += size
        shared = members[:1] if prompt == "first" else []
        start = sum(len(texts[m]) for m in shared)
        longest = max((len(texts[m]) for m in members if m not in shared), default=0)
        entries = []
        for m in members:
            for i, token in enumerate(texts[m]):
                label = texts[m][i + 1] if i + 1 < len(texts[m]) else -1
                if m in shared:
                    entries.append((i, 0, token, label))
                else:
                    shift = longest - len(texts[m]) if align == "right" else 0
                    entries.append((start + offsets[m] + shift + i, slots[m], token, label))
        entries.sort(key=lambda entry: entry[:2])
        row += [(token, label, segment, b, t, i) for i, (t, b, token, label) in enumerate(entries)]
    return row + [(0, -1, -1, 0, 0, 0)] * (length - len(row))


def columns(row):
    c = row.coordinates
    return list(zip(row.tokens, row.labels, c.segment, c.branch, c.time, c.index, strict=True))


@st.composite
def rows(draw):
    texts = draw(st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=6), min_size=1, max_size=9))
    groups, left = [], len(texts)
    while left:
        groups.append(draw(st.integers(1, left)))
        left -= groups[-1]
    offsets = [draw(st.integers(0, len(text))) for text in texts]
    return texts, groups, offsets, sum(map(len, texts)) + draw(st.integers(0, 5))


@given(rows(), st.sampled_from(packing.ALIGNMENTS), st.sampled_from(packing.PROMPTS), st.randoms())
def test_interleaving_equals_the_reference(drawn, align, prompt, random):
    texts, groups, offsets, length = drawn
    numbers = np.array(random.sample(range(1, 20), len(texts)))  # in no order: branches sort by number, not by place
    if prompt == "first":
        numbers[np.cumsum(groups) - groups] = 0
    arrays = [np.array(text, np.int32) for text in texts]
    row = packing.interleave(arrays, groups, length, np.array(offsets), numbers, align=align, prompt=prompt)
    assert columns(row) == reference(texts, groups, length, offsets, numbers, align, prompt)
    assert {a.dtype for a in (row.tokens, row.labels, row.coordinates.time)} == {np.dtype(np.int32)}


OPTIONS = dict(stagger=True, align="left", slots=0, prompt="none")


def test_one_branch_at_a_time_keeps_texts_in_order():
    texts = [np.arange(10 * i, 10 * i + i % 3 + 2) for i in range(1, 8)]
    row = packing.pack_row(texts, [1] * 7, 40, np.random.default_rng(3), **OPTIONS)
    total = sum(map(len, texts))
    np.testing.assert_array_equal(row.tokens[:total], np.concatenate(texts))
    np.testing.assert_array_equal(row.coordinates.segment[:total], np.repeat(range(7), [len(t) for t in texts]))
    assert set(row.coordinates.branch[:total]) == {1}


@given(st.integers(0, 2**32), st.sampled_from(packing.ALIGNMENTS), st.sampled_from(packing.PROMPTS))
def test_labels_never_cross_branches(seed, align, prompt):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 8, size=12)
    # Text m holds 100 m, 100 m + 1, ...: the next token of the same text is one more.
    texts = [100 * m + np.arange(n) for m, n in enumerate(lengths)]
    options = OPTIONS | dict(align=align, prompt=prompt)
    row = packing.pack_row(texts, packing.draw_groups(12, 1, 5, rng), 90, rng, **options)
    labelled = row.labels >= 0
    np.testing.assert_array_equal(row.labels[labelled], row.tokens[labelled] + 1)
    assert labelled.sum() == (lengths - 1).sum()


def test_staggering_draws_every_offset_up_to_the_length_equally_often():
    texts = [np.arange(3), np.arange(5)]
    starts = {1: [], 2: []}
    for seed in range(2000):
        row = packing.pack_row(texts, [2], 8, np.random.default_rng(seed), **OPTIONS)
        for branch, seen in starts.items():
            seen.append(row.coordinates.time[row.coordinates.branch == branch].min())
    for branch, text in zip(starts, texts, strict=True):
        counts = np.bincount(starts[branch])
        assert len(counts) == len(text) + 1
        np.testing.assert_allclose(counts / 2000, 1 / len(counts), atol=0.04)
    assert abs(np.corrcoef(starts[1], starts[2])[0, 1]) < 0.1


def test_without_staggering_nothing_is_drawn_for_times():
    texts = [np.arange(3), np.arange(5)]
    row = packing.pack_row(texts, [2], 8, np.random.default_rng(0), **OPTIONS | dict(stagger=False))
    np.testing.assert_array_equal(row.coordinates.time, [0, 0, 1, 1, 2, 2, 3, 4])
    np.testing.assert_array_equal(row.coordinates.branch, [1, 2, 1, 2, 1, 2, 2, 2])


def test_random_slots_are_sorted_subsets_that_reach_every_slot():
    rng = np.random.default_rng(0)
    numbers = [packing.draw_slots([4, 2], 6, "none", rng) for _ in range(300)]
    for drawn in numbers:
        assert (np.diff(drawn[:4]) > 0).all() and drawn[4] < drawn[5]
        assert drawn.min() >= 1 and drawn.max() <= 6
    # Of 300 subsets of 4 of 6 slots, each slot is in two thirds.
    np.testing.assert_allclose(np.bincount(np.ravel([n[:4] for n in numbers]))[1:] / 300, 2 / 3, atol=0.1)


def test_slots_of_a_prompted_group():
    np.testing.assert_array_equal(
        packing.draw_slots([3, 1, 2], 0, "first", np.random.default_rng(0)), [0, 1, 2, 0, 0, 1]
    )


@given(st.integers(1, 20), st.integers(0, 20), st.integers(1, 4), st.integers(0, 2**32))
def test_groups_fill_the_row_with_sizes_of_the_draw(low, more, count, seed):
    high = low + more
    groups = packing.draw_groups(count * packing.texts_of_draw(low, high), low, high, np.random.default_rng(seed))
    assert sum(groups) == count * packing.texts_of_draw(low, high)
    assert len(groups) == (2 * count if more else count)
    assert all(low <= size <= high for size in groups)


@pytest.mark.parametrize("n, low, high", [(16, 1, 15), (16, 1, 7), (16, 1, 3), (36, 8, 10), (9, 1, 2)])
def test_sizes_are_uniform_over_all_groups_and_in_every_place_of_a_row(n, low, high):
    """Of 6,000 rows. Partners, whose sizes sum to low + high, stand anywhere: no two places are more often a pair."""
    rng, draws, values = np.random.default_rng(0), 6000, high - low + 1
    rows, five_deviations = [packing.draw_groups(n, low, high, rng) for _ in range(draws)], 5 / (values * draws) ** 0.5
    share = np.bincount(np.concatenate(rows), minlength=high + 1) / sum(map(len, rows))
    np.testing.assert_allclose(share, [0] * low + [1 / values] * values, atol=five_deviations)
    places = 2 * n // (low + high)
    sizes_RG = np.array(rows)
    assert sizes_RG.shape == (draws, places) and (sizes_RG.sum(1) == n).all()
    for size in range(low, high + 1):
        np.testing.assert_allclose((sizes_RG == size).mean(0), 1 / values, atol=five_deviations)
    partners = 1 / (places - 1)
    for place in range(1, places):
        pairs = (sizes_RG[:, 0] + sizes_RG[:, place] == low + high).mean()
        assert pairs == pytest.approx(partners + (1 - partners) / values, abs=0.03)


@pytest.mark.parametrize(
    "low, high, prompt, texts", [(1, 1, "none", 1), (3, 3, "first", 4), (1, 15, "none", 16), (1, 15, "first", 18)]
)
def test_texts_of_a_draw(low, high, prompt, texts):
    """One group where all have one size, else two whose sizes sum to low + high; a prompt is a text of its group."""
    assert packing.texts_of_draw(low, high, prompt) == texts


@pytest.mark.parametrize(
    "draw, expected", [("fixed1", (1, 1)), ("fixed16", (16, 16)), ("1-15", (1, 15)), ("4-4", (4, 4))]
)
def test_draws(draw, expected):
    assert packing.parse_draw(draw) == expected


@pytest.mark.parametrize(
    "draw", ["", "fixed", "fixed0", "0-3", "5-2", "1-", "-3", "1-3-5", "fixed1-3", "1 - 3", "x", "fixed" + 5000 * "9"]
)
def test_nonsense_draws_are_refused(draw):
    with pytest.raises(UserError, match=r"data\.draw = .*fixedN or LOW-HIGH"):
        packing.parse_draw(draw)


def test_texts_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="2 texts of 9 tokens do not fit a row of 8"):
        packing.pack_row([np.arange(4), np.arange(5)], [2], 8, np.random.default_rng(0), **OPTIONS)


def test_more_branches_than_slots_are_refused():
    with pytest.raises(UserError, match=r"data\.slots = 2 is fewer than the 3 branches"):
        packing.pack_row([np.arange(2)] * 3, [3], 8, np.random.default_rng(0), **OPTIONS | dict(slots=2))
