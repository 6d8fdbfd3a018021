import jax
import numpy as np
import packs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import kernels
from lab.coordinates import Coordinates
from lab.kernels import order, rules

seeds = st.integers(0, 2**32 - 1)
SIDES = st.sampled_from([(4, 4), (4, 3), (2, 6)])
NAMED = [rules.causal, rules.all_branches, rules.own_branch, rules.own_branch & rules.window(5)]
NAMED += [rules.own_branch & rules.strided(6), rules.all_branches & rules.fixed(5, 2)]


def branches(count: int, length: int, row: int) -> Coordinates:
    """One prompt of `length` tokens and so many branches of it, sorted by (time, branch), in a row of `row` tokens."""
    tokens = [(time, 0) for time in range(length)]
    tokens += [(length + time, branch) for branch in range(1, count + 1) for time in range(length)]
    time, branch = (np.array(x) for x in zip(*sorted(tokens), strict=True))
    full = lambda x, fill: np.append(x, np.full(row - len(tokens), fill))[None].astype(np.int32)  # noqa: E731
    return Coordinates(full(0 * time, -1), full(branch, 0), full(time, 0), full(np.arange(len(time)), 0))


def moved(coordinates: Coordinates, to: np.ndarray) -> Coordinates:
    return coordinates.map(lambda x: np.take_along_axis(x, to, axis=1))


def computed(rule, at: Coordinates, q_tile: int, k_tile: int) -> np.ndarray:
    """Share of the tiles of each row with a visible pair, counted on the dense mask: no more than are computed."""
    B, T = at.shape
    n, m = -(-T // q_tile), -(-T // k_tile)
    seen = np.zeros((B, n * q_tile, m * k_tile), bool)
    seen[:, :T, :T] = rules.visible(rule, at, at)
    return seen.reshape(B, n, q_tile, m, k_tile).any((2, 4)).mean((1, 2))


@settings(max_examples=60)
@given(seed=seeds, rule=st.sampled_from(NAMED), pack=st.sampled_from(sorted(packs.PACKS)), sides=SIDES)
def test_an_order_is_a_permutation_that_costs_no_more_than_what_was_given(seed, rule, pack, sides):
    at = packs.PACKS[pack](np.random.default_rng(seed), 3, 37)
    found = order.arrange(at, [rule], sides)
    assert (np.sort(found.order, axis=1) == np.arange(37)).all()
    given_share = order.arrange(at, [rule], sides, free=False).share
    assert computed(rule, moved(at, found.order), *sides).mean() <= found.share + 1e-9 <= given_share + 2e-9
    kept = order.arrange(moved(at, found.order), [rule], sides, free=False).share
    assert kept == pytest.approx(found.share)


def test_branches_lie_together_for_own_branch_and_apart_for_all_branches():
    at = branches(6, 16, row=112)
    own, every = (order.arrange(at, [rule], (8, 8)) for rule in (rules.own_branch, rules.all_branches))
    assert (np.diff(moved(at, own.order).branch[0]) >= 0).all()
    assert (every.order == np.arange(112)).all()
    # Prompt: 3 of 4 pairs of tiles; each branch: its 2 x 2 with 3, and the prompt's 2 x 2.
    assert own.share == pytest.approx((3 + 6 * (3 + 4)) / 14**2)
    assert own.share < 0.6 * order.arrange(at, [rules.own_branch], (8, 8), free=False).share


def test_branches_begin_on_tiles_where_the_row_has_the_room():
    tight, roomy = (order.arrange(branches(5, 13, row), [rules.own_branch], (8, 8)) for row in (78, 96))
    at = moved(branches(5, 13, 96), roomy.order)
    assert [int(np.flatnonzero(at.branch[0] == b)[0]) for b in range(1, 6)] == [16, 32, 48, 64, 80]
    assert (at.segment[0] == -1).sum() == 18
    # Of the same number of queries fewer pairs are computed: 12^2 tiles against 10^2.
    assert roomy.share * 144 < tight.share * 100


def test_rules_of_several_layers_are_weighed_together():
    at = branches(6, 16, row=112)
    mostly_all = order.arrange(at, [rules.all_branches] * 3 + [rules.own_branch], (8, 8))
    mostly_own = order.arrange(at, [rules.own_branch] * 3 + [rules.all_branches], (8, 8))
    assert (mostly_all.order == np.arange(112)).all() and (mostly_own.order != np.arange(112)).any()


def test_nothing_moves_where_it_may_not_or_need_not():
    at = branches(6, 16, row=112)
    assert (order.arrange(at, [rules.own_branch], (8, 8), free=False).order == np.arange(112)).all()
    still, share = kernels.arrange(at, [rules.own_branch], "reference")
    assert (still == np.arange(112)).all() and share == 1.0
    alone = Coordinates.single(1, 40)
    assert (order.arrange(alone, [rules.own_branch], (8, 8)).order == np.arange(40)).all()


@pytest.mark.parametrize(
    "part", [rules.strided(32), rules.fixed(32, 4), rules.every(32)], ids=("strided", "fixed", "every")
)
def test_what_comes_every_so_many_steps_lies_in_patches(part):
    """In the order of time a tile of 16 meets a key that it sees in half of the tiles; in patches, where it must."""
    at, rule = Coordinates.single(1, 1024), rules.own_branch & part
    found, kept = (order.arrange(at, [rule], (16, 16), free=free) for free in (True, False))
    assert (kept.order == np.arange(1024)).all() and (np.sort(found.order) == np.arange(1024)).all()
    assert found.share < 0.75 * kept.share
    assert computed(rule, moved(at, found.order), 16, 16).mean() <= found.share
    patch = moved(at, found.order).time[0, :16]
    assert {*(patch // 32)} == {0, 1} and len({*(patch % 32)}) == 8


def test_patches_are_weighed_against_what_other_layers_want():
    at, windows = Coordinates.single(1, 1024), [rules.causal & rules.window(8)] * 9
    assert (order.arrange(at, [rules.causal & rules.every(32), *windows], (16, 16)).order == np.arange(1024)).all()
    assert (order.arrange(at, [rules.causal & rules.every(32), *windows[:1]], (16, 16)).order != np.arange(1024)).any()


def test_rows_are_arranged_each_for_itself():
    one, two = branches(6, 16, row=112), branches(1, 56, row=112)
    both = jax.tree.map(lambda *pair: np.concatenate(pair), one, two)
    found = order.arrange(both, [rules.own_branch], (8, 8))
    alone = [order.arrange(at, [rules.own_branch], (8, 8)) for at in (one, two)]
    np.testing.assert_array_equal(found.order, np.concatenate([each.order for each in alone]))
    assert found.share == pytest.approx(np.mean([each.share for each in alone]))
