"""States of branches: each branch alone, forks, and what is refused."""

import functools

import jax
import numpy as np
import pytest
import tiny
import variants

from lab.coordinates import Coordinates
from lab.errors import UserError

VARIANT, TOLERANCE = "delta on own_branch", 3e-4


@functools.cache
def programs():
    """(the model, its full pass, extend, fork)"""
    model = tiny.model(variants.config(VARIANT))
    return model, *(jax.jit(f) for f in (type(model).__call__, type(model).extend, type(model).fork))


def text(rng, *branches: int) -> tuple[np.ndarray, Coordinates]:
    """One row of random tokens of these branches, in this order."""
    tokens = rng.integers(0, tiny.VOCABULARY, (1, len(branches))).astype(np.int32)
    return tokens, at(*branches)


def at(*branches: int) -> Coordinates:
    single = Coordinates.single(1, len(branches))
    return Coordinates(single.segment, np.asarray([branches], np.int32), single.time, single.index)


def test_a_branch_in_a_pack_is_the_branch_alone():
    model, full, *_ = programs()
    batch = tiny.batch(7, rows=2, length=24)
    logits, fields = np.asarray(full(model, batch.tokens, batch.coordinates)), batch.coordinates
    checked = 0
    for row in range(2):
        for segment, branch in {*zip(fields.segment[row].tolist(), fields.branch[row].tolist(), strict=True)}:
            mine = (fields.segment[row] == segment) & np.isin(fields.branch[row], (0, branch)) & (segment >= 0)
            if not mine.any():
                continue
            tokens = np.zeros((2, 24), np.int32)
            tokens[0, : mine.sum()] = batch.tokens[row][mine]
            where = padded(fields.map(lambda x, row=row, mine=mine: np.stack([x[row][mine]] * 2)), 24)
            got = np.asarray(full(model, tokens, where))[0, : mine.sum()]
            np.testing.assert_allclose(got, logits[row][mine], atol=TOLERANCE)
            checked += branch > 0
    assert checked > 3


def test_a_fork_goes_on_from_where_its_source_is():
    """Branch 3 from the middle of branch 1, row 0 alone; then number 1 again, from the prompt."""
    (model, full, extend, fork), rng = programs(), np.random.default_rng(0)
    prompt, one, more, three, again = (rng.integers(0, tiny.VOCABULARY, (2, 4)).astype(np.int32) for _ in range(5))
    begin = lambda branch: Coordinates(*(np.repeat(x, 2, 0) for x in jax.tree.leaves(at(*[branch] * 4))))  # noqa: E731
    cache = model.init_cache(2, 32, branches=3)
    for tokens, branch in ((prompt, 0), (one, 1)):
        _, cache = extend(model, tokens, begin(branch), cache)
    cache = fork(model, cache, np.asarray([1, 1]), np.asarray([3, -1]))
    _, cache = extend(model, more, begin(1), cache)  # its source goes on
    forked, cache = extend(model, three, begin(3), cache)
    cache = fork(model, cache, 0, 1)
    begun, cache = extend(model, again, begin(1), cache)

    def chain(*parts):
        tokens = np.concatenate(parts, axis=1)
        length = tokens.shape[1]
        here = padded(Coordinates.single(2, length), 16)
        return np.asarray(full(model, np.pad(tokens, ((0, 0), (0, 16 - length))), here))[:, length - 4 : length]

    np.testing.assert_allclose(forked[0], chain(prompt, one, three)[0], atol=TOLERANCE)
    np.testing.assert_allclose(forked[1], chain(prompt, three)[1], atol=TOLERANCE)  # not forked: from the prompt
    np.testing.assert_allclose(begun, chain(prompt, again), atol=TOLERANCE)
    assert np.abs(forked[0] - chain(prompt, three)[0]).max() > 100 * TOLERANCE


def padded(of: Coordinates, length: int) -> Coordinates:
    fill = lambda x, value: np.pad(x, ((0, 0), (0, length - x.shape[1])), constant_values=value)  # noqa: E731
    return Coordinates(fill(of.segment, -1), fill(of.branch, 0), fill(of.time, 0), fill(of.index, 0))


def test_branches_without_a_place_are_refused():
    model = programs()[0]
    cache = model.init_cache(1, 8, branches=2)
    with pytest.raises(UserError, match=r"branch 3 has no place in a cache of branches 0 to 2; choose .*branches=3"):
        model.extend(*text(np.random.default_rng(0), 0, 3), cache)
    for source, target in ((3, 1), (1, 3), (1, -2)):
        with pytest.raises(UserError, match="has no place in a cache of branches 0 to 2"):
            model.fork(cache, source, target)


@pytest.mark.parametrize("variant", ["delta on own_branch", "delta : attention"])
def test_a_join_is_refused_where_there_is_a_state(variant):
    model = tiny.model(variants.config(variant))
    with pytest.raises(UserError, match=r"model\.mixer\.name = 'delta' cannot join branches"):
        model.join(model.init_cache(1, 8), (1, 2), 3)


def test_attention_keeps_its_tokens_where_branches_fork_and_join():
    model = tiny.model(variants.config("default"))
    cache = model.init_cache(1, 8)
    for after in (model.fork(cache, 1, 2), model.join(cache, (1, 2), 3)):
        assert all(a is b for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(cache), strict=True))
