import jax
import numpy as np
import packs
import pytest
from drawn_rules import drawn_rules
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import kernels
from lab.coordinates import Coordinates
from lab.kernels import rules, tiled, tiles

seeds = st.integers(0, 2**32 - 1)
Q_TILE, K_TILE = 4, 3
NAMED = [*rules.RULES.values(), rules.own_branch & rules.window(5), rules.causal | (rules.k.branch == 0)]
NAMED += [rules.own_branch & (rules.strided(4) | rules.summary(5, 2))]


def lists(rule, q: Coordinates, k: Coordinates, q_tile: int = Q_TILE, k_tile: int = K_TILE):
    """(query coordinates, key coordinates, tiles), all numpy, padded to whole tiles."""
    q, k = tiles.pad_to_tiles(q, q_tile), tiles.pad_to_tiles(k, k_tile)
    return jax.device_get((q, k, tiles.make_tiles(rule, q, k, q_tile, k_tile)))


def check_lists(rule, q: Coordinates, k: Coordinates) -> None:
    q, k, made = lists(rule, q, k)
    seen = rules.visible(rule, q, k)
    B, n, m = made.keys.shape
    blocks = seen.reshape(B, n, Q_TILE, m, K_TILE).swapaxes(2, 3)  # [B, n, m, Q_TILE, K_TILE]
    q_real, k_real = (q.segment >= 0).reshape(B, n, Q_TILE), (k.segment >= 0).reshape(B, m, K_TILE)
    assert made.keys.dtype == made.full.dtype == made.total.dtype == np.int32
    for b in range(B):
        for i in range(n):
            full, total = made.full[b, i], made.total[b, i]
            assert 0 <= full <= total <= m
            listed = made.keys[b, i, :total].tolist()
            assert len(set(listed)) == total and set(listed) <= set(range(m))
            assert {j for j in range(m) if blocks[b, i, j].any()} <= set(listed)
            assert q_real[b, i].any() or total == 0
            assert all(k_real[b, j].any() for j in listed)
            for j in listed[:full]:  # what needs no mask: only padded queries may see less
                assert blocks[b, i, j][q_real[b, i]].all()


@pytest.mark.parametrize("rule", NAMED, ids=range(len(NAMED)))
@pytest.mark.parametrize("pack", packs.PACKS)
@settings(max_examples=6)
@given(seed=seeds)
def test_lists_of_named_rules(rule, pack, seed):
    rng = np.random.default_rng(seed)
    check_lists(rule, packs.PACKS[pack](rng, 2, 22), packs.PACKS[pack](rng, 2, 17))


@pytest.mark.parametrize("pack", packs.PACKS)
@settings(max_examples=6)
@given(rule=drawn_rules, seed=seeds)
def test_lists_of_any_rule(rule, pack, seed):
    at = packs.PACKS[pack](np.random.default_rng(seed), 2, 24)
    check_lists(rule.made, at, at)


@pytest.mark.parametrize("pack", packs.PACKS)
@settings(max_examples=10)
@given(rule=drawn_rules, seed=seeds)
def test_key_tiles_list_the_query_tiles_that_list_them(pack, rule, seed):
    rng = np.random.default_rng(seed)
    *_, made = lists(rule.made, packs.PACKS[pack](rng, 2, 22), packs.PACKS[pack](rng, 2, 17))
    by_query, by_key = jax.device_get(tiles.both_ways(made))
    B, n, m = by_query.keys.shape
    assert by_key.keys.shape == (B, m, n)

    def listed(lists, b, i):
        order, full, total = lists.keys[b, i].tolist(), lists.full[b, i], lists.total[b, i]
        return {j: place < full for place, j in enumerate(order[:total])}

    for b in range(B):
        pairs = {(i, j): full for i in range(n) for j, full in listed(by_query, b, i).items()}
        assert pairs == {(i, j): full for j in range(m) for i, full in listed(by_key, b, j).items()}


@pytest.mark.parametrize("pack", packs.PACKS)
@settings(max_examples=10)
@given(rule=drawn_rules, seed=seeds)
def test_steps_in_line_are_the_lists_end_to_end(pack, rule, seed):
    rng = np.random.default_rng(seed)
    *_, made = lists(rule.made, packs.PACKS[pack](rng, 2, 22), packs.PACKS[pack](rng, 2, 17))
    steps = jax.device_get(tiles.in_line(made))
    B, n, m = made.keys.shape
    expected = []
    for b, i in np.ndindex(B, n):
        kinds = [tiles.ADD_FULL] * made.full[b, i] + [tiles.ADD_PARTIAL] * (made.total[b, i] - made.full[b, i])
        for place, kind in enumerate(kinds or [0]):
            ends = (place == 0) * tiles.FIRST + (place == max(len(kinds), 1) - 1) * tiles.LAST
            expected.append((b * n + i, b * m + made.keys[b, i, place], kind + ends))
    found = list(zip(*(x[: steps.count].tolist() for x in steps[:3]), strict=True))
    assert found == expected


@settings(max_examples=10)
@given(rule=drawn_rules, seed=seeds, own=st.integers(1, 3), listed=st.integers(1, 3))
def test_cut_lists_name_the_pieces_of_the_tiles_in_their_order(rule, seed, own, listed):
    rng = np.random.default_rng(seed)
    *_, made = lists(rule.made, packs.scattered(rng, 2, 22), packs.interleaved(rng, 2, 17))
    pieces = jax.device_get(tiles.cut(made, own, listed))
    B, n, m = made.keys.shape
    assert pieces.keys.shape == (B, n * own, m * listed)
    for b, i in np.ndindex(B, n * own):
        full, total = made.full[b, i // own], made.total[b, i // own]
        expected = [j * listed + piece for j in made.keys[b, i // own, :total] for piece in range(listed)]
        assert pieces.keys[b, i, : pieces.total[b, i]].tolist() == expected
        assert pieces.full[b, i] == full * listed


def test_one_causal_text_needs_the_lower_triangle():
    at = Coordinates.single(1, 24)
    _, _, made = lists(rules.causal, at, at, 4, 4)
    assert made.total[0].tolist() == [1, 2, 3, 4, 5, 6]
    assert made.full[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert [made.keys[0, i, i] for i in range(6)] == list(range(6))  # the diagonal is what needs a mask


def test_a_window_needs_a_band():
    at = Coordinates.single(1, 24)
    _, _, made = lists(rules.causal & rules.window(5), at, at, 4, 4)
    assert made.total[0].tolist() == [1, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("part", [rules.every(8), rules.summary(8, 2)], ids=("every", "summary"))
def test_remainders_are_ranged_over_the_tokens_of_a_tile(part):
    """Tiles of one remainder each, whose times span the row: those that meet are those that see each other."""
    order = np.argsort(np.arange(64) % 8, kind="stable")
    at = Coordinates.single(1, 64).map(lambda x: x[:, order])
    _, _, made = lists(part, at, at, 8, 4)
    seen = rules.visible(part, at, at).reshape(8, 8, 16, 4)
    assert (made.total[0] == seen.any((1, 3)).sum(1)).all() and (made.full[0] == made.total[0]).all()
    assert made.total.sum() < 8 * 16 / 3


def test_segments_need_only_their_own_tiles():
    segment = np.repeat([0, 1, -1], 8)[None].astype(np.int32)
    index = np.tile(np.arange(8, dtype=np.int32), 3)[None]
    at = Coordinates(segment, np.ones_like(segment), index, index)
    _, _, made = lists(rules.own_branch, at, at, 4, 4)
    assert [set(made.keys[0, i, : made.total[0, i]].tolist()) for i in range(6)] == [
        {0}, {0, 1}, {2}, {2, 3}, set(), set(),
    ]  # fmt: skip


def test_padding_only_gives_empty_lists():
    _, _, made = lists(rules.causal, Coordinates.padding(2, 9), Coordinates.padding(2, 9))
    assert not made.total.any() and not made.full.any()


def test_plan_is_what_the_tiled_implementation_makes_for_itself():
    at = packs.interleaved(np.random.default_rng(0), 2, 130)
    jax.tree.map(
        np.testing.assert_array_equal,
        kernels.plan_tiles(at, at, rules.own_branch),
        tiled.plan(rules.own_branch, at, at),
    )
    assert kernels.plan_tiles(at, at, rules.own_branch, "reference") is None
