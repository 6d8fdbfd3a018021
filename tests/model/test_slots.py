"""Tokens in whatever slots of a cache, rows of different fill, and logits for some: always those of the full pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import variants
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import model as lab_model
from lab.coordinates import Coordinates
from lab.errors import UserError
from lab.model import slots

TOLERANCE = 3e-4
KEEPERS = [
    ("default", False),
    ("default", True),
    *(pytest.param(name, True, marks=pytest.mark.slow) for name in ("mixer forgetting", "delta : attention")),
    *(pytest.param(name, True, marks=pytest.mark.slow) for name in ("delta on own_branch", "stream v4m1E")),
    pytest.param("stream v3m3.2, local : global", True, marks=pytest.mark.slow),
]  # (variant, whether its tokens are scattered)
ROWS, LENGTH, SIZE, CHUNK = 3, 24, 31, 6


@functools.cache
def built(variant: str):
    return tiny.model(variants.config(variant))


@functools.cache
def extend():
    return jax.jit(
        lambda model, tokens, at, cache, slots_BT, wanted: model.extend(
            tokens, at, cache, slots_BT=slots_BT, wanted=wanted
        )
    )


@functools.cache
def full(variant: str, seed: int = 0):
    """(batch, its logits without a cache)"""
    model, batch = built(variant), tiny.batch(seed, rows=ROWS, length=LENGTH)
    return batch, np.asarray(jax.jit(type(model).__call__)(model, batch.tokens, batch.coordinates))


def ragged(rng, rows: int, length: int) -> list[np.ndarray]:
    """Chunks [B, CHUNK] of places in a row, each row's in order but as many as it likes, -1 where it gives nothing."""
    done, chunks = np.zeros(rows, int), []
    while (done < length).any():
        chunk = np.full((rows, CHUNK), -1)
        for row in range(rows):
            take = min(rng.integers(0, CHUNK + 1), length - done[row])
            lies = np.sort(rng.choice(CHUNK, take, replace=False))
            chunk[row, lies] = done[row] + np.arange(take)
            done[row] += take
        chunks.append(chunk)
    return chunks


def at_places(x: np.ndarray, places: np.ndarray, fill: int):
    return np.where(places < 0, fill, np.take_along_axis(x, np.maximum(places, 0), axis=1))


def part_of(batch, places: np.ndarray):
    """Tokens and coordinates at these places; padding where there are none."""
    at = batch.coordinates
    fields = (at_places(x, places, fill) for x, fill in ((at.segment, -1), (at.branch, 7), (at.time, 7), (at.index, 7)))
    return at_places(batch.tokens, places, 3), Coordinates(*fields)


@pytest.mark.matrix("variant")
@pytest.mark.parametrize(("variant", "scattered"), KEEPERS)
def test_rows_of_different_fill_decode_as_the_full_pass(variant, scattered):
    """In each row's next free slots, or in slots drawn at random; padding names slots that hold tokens."""
    rng = np.random.default_rng(5)
    batch, expected = full(variant)
    model = built(variant)
    cache = model.init_cache(ROWS, SIZE, branches=int(batch.coordinates.branch.max()))
    slot_of = np.stack([rng.permutation(SIZE)[:LENGTH] for _ in range(ROWS)])
    seen = np.zeros((ROWS, LENGTH), bool)
    fills = []
    for places in ragged(rng, ROWS, LENGTH):
        tokens, at = part_of(batch, places)
        given = at_places(slot_of, places, slot_of[0, 0]).astype(np.int32) if scattered else None
        logits, cache = extend()(model, tokens, at, cache, given, None)
        for row, t in zip(*np.nonzero(at.segment >= 0), strict=True):
            np.testing.assert_allclose(logits[row, t], expected[row, places[row, t]], atol=TOLERANCE)
            seen[row, places[row, t]] = True
        fills.append(np.asarray(cache.used))
    real = batch.coordinates.segment >= 0
    np.testing.assert_array_equal(seen, real)
    assert any(len({*fill}) > 1 for fill in fills)
    if scattered:
        np.testing.assert_array_equal(cache.used, [1 + slot_of[b][real[b]].max() for b in range(ROWS)])
        held = np.take_along_axis(np.asarray(cache.coordinates.index), slot_of, axis=1)
        np.testing.assert_array_equal(held[real], batch.coordinates.index[real])
    else:
        np.testing.assert_array_equal(cache.used, real.sum(1))


@pytest.mark.parametrize("variant", ["default", pytest.param("mixer forgetting", marks=pytest.mark.slow)])
def test_a_freed_slot_holds_what_is_written_next(variant):
    """Two texts one after the other in the same few slots, the second beside a third that stays."""
    model, (batch, expected) = built(variant), full(variant)
    real = batch.coordinates.segment >= 0
    row = int(np.argmax(real.sum(1)))
    one = jax.tree.map(lambda x: x[row : row + 1][:, real[row]], batch)
    first, second = (one.coordinates.segment[0] == s for s in np.unique(one.coordinates.segment[0])[:2])
    size = max(first.sum(), second.sum())
    cache = model.init_cache(1, size)
    for text in (first, second):
        part = jax.tree.map(lambda x, text=text: x[:, text], one)
        lies = np.random.default_rng(1).permutation(size)[: text.sum()][None].astype(np.int32)
        logits, cache = extend()(model, part.tokens, part.coordinates, cache, lies, None)
        np.testing.assert_allclose(logits[0], expected[row][real[row]][text], atol=TOLERANCE)
        freed = jnp.full_like(cache.coordinates.segment, -1)
        cache = cache._replace(coordinates=Coordinates(freed, *jax.tree.leaves(cache.coordinates)[1:]))


@pytest.mark.parametrize("seed", range(3))
def test_wanted_logits_are_those_of_all(seed):
    model, (batch, expected) = built("default"), full("default")
    wanted = np.random.default_rng(seed).integers(0, LENGTH, (ROWS, 4)).astype(np.int32)
    logits, _ = extend()(model, batch.tokens, batch.coordinates, model.init_cache(ROWS, SIZE), None, wanted)
    assert logits.shape == (ROWS, 4, tiny.VOCABULARY)
    real = np.take_along_axis(batch.coordinates.segment, wanted, axis=1) >= 0
    of_all = np.take_along_axis(expected, wanted[..., None], axis=1)
    np.testing.assert_allclose(logits[real], of_all[real], atol=TOLERANCE)


def test_the_head_is_computed_for_wanted_logits_alone():
    model, batch = built("default"), full("default")[0]
    wanted = np.zeros((ROWS, 1), np.int32)
    run = lambda model, cache: model.extend(batch.tokens, batch.coordinates, cache, wanted=wanted)  # noqa: E731
    program = str(jax.make_jaxpr(run)(model, model.init_cache(ROWS, SIZE)))
    assert f"{ROWS},1,{tiny.VOCABULARY}]" in program and f"{ROWS},{LENGTH},{tiny.VOCABULARY}]" not in program


@pytest.mark.parametrize("rows", [1, 4])
def test_a_step_copies_nothing_as_large_as_the_keys_of_a_layer(rows):
    """Given the cache to keep, a step writes new tokens into it, in whatever slots, and reads it where it lies."""
    model = lab_model.abstract(variants.config("default", model__layers=4).model)
    at = Coordinates(*[jax.ShapeDtypeStruct((rows, 1), np.int32)] * 4)
    cache = jax.eval_shape(lambda model: model.init_cache(rows, 2048), model)
    step = jax.jit(lambda model, at, cache, lies: model.extend(lies, at, cache, slots_BT=lies), donate_argnums=2)
    memory = step.lower(model, at, cache, at.index).compile().memory_analysis()
    numbers = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= numbers
    assert memory.temp_size_in_bytes < numbers / (2 * model.layers)


def test_a_place_outside_that_is_traced_gives_nan():
    model, batch = built("default"), full("default")[0]
    wanted = np.asarray([[0, -1, LENGTH]] * ROWS, np.int32)
    logits, _ = extend()(model, batch.tokens, batch.coordinates, model.init_cache(ROWS, SIZE), None, wanted)
    np.testing.assert_array_equal(np.isnan(logits).all(-1), [[False, True, True]] * ROWS)


def test_traced_tokens_without_a_slot_overwrite_nothing():
    """Beyond the end of the cache, before its start, and padding that names a slot in use."""
    model, at, none = built("default"), Coordinates.single(1, 4), Coordinates.padding(1, 4)
    tokens = np.zeros((1, 4), np.int32)
    _, before = extend()(model, tokens, at, model.init_cache(1, 4), None, None)
    cases = [
        (at, None, [8]),
        (at, np.asarray([[4, 9, -1, -4]], np.int32), [10]),
        (none, np.asarray([[0, 1, 2, 3]], np.int32), [4]),
    ]
    for coordinates, slots_BT, used in cases:
        _, after = extend()(model, tokens + 1, coordinates, before, slots_BT, None)
        jax.tree.map(np.testing.assert_array_equal, after._replace(used=0), before._replace(used=0))
        np.testing.assert_array_equal(after.used, used)


@functools.cache
def put_and_take():
    def run(segment_BT, used_B, named_BT, old_BS, new_BT):
        lies, used = slots.choose(Coordinates(*[segment_BT] * 4), used_B, old_BS.shape[1], named_BT)
        held = slots.put(old_BS, new_BT, lies)
        return lies, used, held, slots.take(held, lies)

    return jax.jit(run)


@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=50, deadline=None)
def test_put_and_take_against_a_loop(seed, names):
    rng, (B, T, S) = np.random.default_rng(seed), (2, 5, 6)
    segment, used = (rng.integers(*ends, shape).astype(np.int32) for *ends, shape in ((-1, 2, (B, T)), (0, S + 1, B)))
    named = np.stack([rng.permutation(S + 6)[:T] for _ in range(B)]).astype(np.int32) - 2 if names else None
    old, new = (rng.normal(size=(B, n, 3)).astype(np.float32) for n in (S, T))
    expected, read, count = old.copy(), np.zeros_like(new), used.copy()
    for b, t in zip(*np.nonzero(segment >= 0), strict=True):
        slot = named[b, t] if names else count[b]
        count[b] = max(count[b], slot + 1)
        if 0 <= slot < S:
            expected[b, slot] = read[b, t] = new[b, t]
    lies, now, held, taken = put_and_take()(segment, used, named, old, new)
    assert lies.dtype == now.dtype == jnp.int32 and all(len({*row}) == T for row in lies.tolist())
    for got, wanted in ((now, count), (held, expected), (taken, read)):
        np.testing.assert_array_equal(got, wanted)


def tokens_and(length: int, rows: int = 1):
    return np.zeros((rows, length), np.int32), Coordinates.single(rows, length)


def test_full_caches_are_refused_where_their_count_is_known():
    model = built("default")
    cache = model.init_cache(2, 16)
    with pytest.raises(
        UserError, match=r"24 tokens do not fit into row 0 of a cache of 16 slots a row, 0 of them used"
    ):
        model.extend(*tokens_and(24, rows=2), cache)
    with pytest.raises(UserError, match="24 tokens do not fit"):  # more than there can be, though `used` is traced
        jax.eval_shape(lambda cache, batch: model.extend(*batch, cache), cache, tokens_and(24, rows=2))
    filled = cache._replace(used=np.asarray([3, 11], np.int32))
    with pytest.raises(
        UserError, match=r"6 tokens do not fit into row 1 of a cache of 16 slots a row, 11 of them used"
    ):
        model.extend(*tokens_and(6, rows=2), filled)
    tokens, at = tokens_and(6, rows=2)
    at.segment[1, 5] = -1  # padding needs none
    jax.eval_shape(lambda: model.extend(tokens, at, filled))
    jax.eval_shape(lambda cache: model.extend(*tokens_and(6, rows=2), cache), filled)  # traced: nobody knows


@pytest.mark.parametrize(("given", "says"), [
    ([[0, 1, 16]], "slots_BT has 16 in row 0: a row of the cache has slots 0 to 15"),
    ([[0, -1, 2]], "slots_BT has -1 in row 0"),
    ([[5, 2, 5]], "slots_BT has 5 twice in row 0; choose another slot for each token"),
    ([[5, 2]], "slots_BT is (1, 2) for tokens (1, 3); choose a slot for each token"),
])  # fmt: skip
def test_slots_that_mean_nothing_are_refused(given, says):
    model = built("default")
    with pytest.raises(UserError) as refused:
        model.extend(*tokens_and(3), model.init_cache(1, 16), slots_BT=np.asarray(given, np.int32))
    assert says in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("place", [-1, 3])
def test_places_that_are_none_are_refused(place):
    model, wanted = built("default"), np.asarray([[0, place]])
    with pytest.raises(UserError, match=f"wanted has {place}, which is no place among 3 tokens; choose 0 to 2"):
        jax.eval_shape(lambda: model.extend(*tokens_and(3), model.init_cache(1, 16), wanted=wanted))
