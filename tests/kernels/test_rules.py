import operator

import numpy as np
import packs
import pytest
from drawn_rules import drawn_rules, terms
from hypothesis import given
from hypothesis import strategies as st

from lab.coordinates import Coordinates
from lab.errors import UserError
from lab.kernels import rules
from lab.kernels.rules import Range

seeds = st.integers(0, 2**32 - 1)

# What the specification says of one query and one key of a segment, in plain words.
DEFINITIONS = {
    "causal": lambda q, k: k.index <= q.index,
    "all_branches": lambda q, k: k.time < q.time or k.index == q.index,
    "own_branch": lambda q, k: k.branch in (0, q.branch) and not k.time > q.time,
}


def sees(name: str, q: Coordinates, k: Coordinates) -> bool:
    """Of two tokens with plain ints: may q look at k?"""
    return q.segment != -1 and q.segment == k.segment and bool(DEFINITIONS[name](q, k))


def tile(rng: np.random.Generator, tokens: int, width: int) -> Coordinates:
    """Coordinates [tokens] whose fields each spread over at most `width` values."""
    fields = (rng.integers(0, 30) + rng.integers(0, width, tokens) for _ in packs.FIELDS)
    return Coordinates(*fields)


def ranges(coordinates: Coordinates) -> Coordinates:
    return Coordinates(*(Range(f.min(), f.max()) for f in (getattr(coordinates, name) for name in packs.FIELDS)))


def pairs(q: Coordinates, k: Coordinates) -> tuple[Coordinates, Coordinates]:
    return q.map(lambda x: x[:, None]), k.map(lambda x: x[None, :])


@given(drawn_rules, seeds, st.sampled_from([1, 2, 6, 40]), st.sampled_from([1, 3, 12]))
def test_ranges_never_say_a_wrong_always_or_never(rule, seed, width, tokens):
    rng = np.random.default_rng(seed)
    q, k = tile(rng, tokens, width), tile(rng, tokens, width)
    dense = rule.plain(*pairs(q, k))
    certainly, possibly = rule.made.visible_range(ranges(q), ranges(k))
    assert not certainly or dense.all()
    assert possibly or not dense.any()


@pytest.mark.parametrize("operation", [operator.add, operator.sub, operator.floordiv, operator.mod])
@given(seed=seeds, width=st.sampled_from([1, 4, 20]), by=st.integers(1, 30))
def test_the_range_of_each_operation(operation, seed, width, by):
    """Compared with every constant near it; all but remainders exactly."""
    rng = np.random.default_rng(seed)
    q, k = tile(rng, 8, width), tile(rng, 8, width)
    right = k.branch if operation in (operator.add, operator.sub) else by
    values = operation(q.time[:, None], right)
    made = operation(rules.q.time, rules.k.branch if right is k.branch else by)
    for constant in range(values.min() - 2, values.max() + 3):
        for compare in (operator.le, operator.lt, operator.ge, operator.gt):
            dense = compare(values, constant)
            certainly, possibly = compare(made, constant).visible_range(ranges(q), ranges(k))
            if operation is operator.mod:
                assert certainly <= dense.all() and possibly >= dense.any()
            else:
                assert (certainly, possibly) == (dense.all(), dense.any())


@given(terms, seeds, st.sampled_from([1, 2, 6, 40]))
def test_no_value_of_a_term_lies_outside_its_range(drawn, seed, width):
    rng = np.random.default_rng(seed)
    q, k = tile(rng, 8, width), tile(rng, 8, width)
    values = drawn.plain(*pairs(q, k))
    np.testing.assert_array_equal(drawn.made.values(*pairs(q, k)), values)
    low, high = drawn.made.value_range(ranges(q), ranges(k))
    assert low <= values.min() and values.max() <= high


@given(seeds, st.sampled_from([1, 4, 20]), st.integers(-9, 9))
def test_the_ranges_of_products_bounds_and_buckets_are_exact(seed, width, number):
    rng = np.random.default_rng(seed)
    q, k = tile(rng, 8, width), tile(rng, 8, width)
    by_hand = {
        "*": (rules.q.time * number, q.time * number),
        "minimum": (rules.minimum(rules.q.time, rules.k.branch), np.minimum.outer(q.time, k.branch)),
        "maximum": (rules.maximum(rules.q.time, 20 + number), np.maximum(q.time, 20 + number)),
        "reached": (
            rules.k.time.reached((5, 20 + number, 50)),
            np.sum([k.time >= t for t in (5, 20 + number, 50)], 0),
        ),
    }
    for made, values in by_hand.values():
        assert made.value_range(ranges(q), ranges(k)) == (values.min(), values.max())


@given(drawn_rules, seeds)
def test_ranges_of_single_tokens_are_exact(rule, seed):
    rng = np.random.default_rng(seed)
    q, k = tile(rng, 1, 30), tile(rng, 1, 30)
    expected = bool(np.all(rule.plain(q, k)))
    assert [bool(x) for x in rule.made.visible_range(ranges(q), ranges(k))] == [expected, expected]


@given(drawn_rules, seeds)
def test_the_dense_form_says_what_its_operators_say(rule, seed):
    rng = np.random.default_rng(seed)
    q, k = pairs(tile(rng, 7, 9), tile(rng, 5, 9))
    np.testing.assert_array_equal(rule.made.visible(q, k), rule.plain(q, k))


@given(drawn_rules, drawn_rules)
def test_rules_compare_and_hash_by_value(one, other):
    again = rules.Rule(one.made.tree)
    assert again == one.made and hash(again) == hash(one.made) and len({again, one.made}) == 1
    assert (one.made == other.made) == (one.made.tree == other.made.tree)
    assert one.made & other.made == again & other.made
    assert one.made & other.made != one.made | other.made


def test_rules_written_twice_are_equal():
    assert rules.window(3) == rules.window(3) != rules.window(4)
    assert (rules.k.index <= rules.q.index) == rules.causal
    assert (rules.k.time + 1 <= rules.q.time) != (rules.k.time + 2 <= rules.q.time)


@pytest.mark.parametrize("written", [
    lambda q, k: (k.time < q.time) and (k.index == q.index),
    lambda q, k: not k.time < q.time,
    lambda q, k: k.branch != q.branch,
    lambda q, k: 0 < k.time < q.time,
])  # fmt: skip
def test_what_python_would_read_as_half_a_rule_is_refused(written):
    with pytest.raises(TypeError, match="&"):
        written(rules.q, rules.k)


@pytest.mark.parametrize("divide", [operator.floordiv, operator.mod])
@pytest.mark.parametrize("by", [0, -3, 1.5, rules.k.time])
def test_division_takes_a_positive_constant(divide, by):
    with pytest.raises(ValueError, match="at least 1"):
        divide(rules.q.time, by)


@pytest.mark.parametrize("name", rules.RULES)
@given(seed=seeds, pack=st.sampled_from(sorted(packs.PACKS)))
def test_named_rules_against_their_definitions(name, seed, pack):
    rng = np.random.default_rng(seed)
    q, k = (packs.PACKS[pack](rng, 2, length) for length in (9, 12))
    seen = rules.visible(rules.RULES[name], q, k)
    expected = [
        [[sees(name, packs.token(q, b, t), packs.token(k, b, s)) for s in range(12)] for t in range(9)]
        for b in range(2)
    ]
    np.testing.assert_array_equal(seen, expected)


@given(seeds, st.integers(1, 15))
def test_window_against_its_definition(seed, n):
    at = packs.scattered(np.random.default_rng(seed), 1, 15)
    expected = np.zeros((15, 15), bool)
    for t in range(15):
        for s in range(15):
            q, k = packs.token(at, 0, t), packs.token(at, 0, s)
            expected[t, s] = q.segment >= 0 and q.segment == k.segment and q.time - n < k.time
    np.testing.assert_array_equal(rules.visible(rules.window(n), at, at)[0], expected)


SPARSE = {  # of the times of a query and a key, in words of arXiv 1904.10509, section 4.2
    "every": lambda i, j, n, c: abs(i - j) in range(0, 40, n),
    "block": lambda i, j, n, c: any(i in steps and j in steps for steps in (range(b, b + n) for b in range(0, 40, n))),
    "summary": lambda i, j, n, c: j in [b + n - kept for b in range(0, 40, n) for kept in range(1, c + 1)],
    "strided": lambda i, j, n, c: i - j < n or SPARSE["every"](i, j, n, c),
    "fixed": lambda i, j, n, c: SPARSE["block"](i, j, n, c) or SPARSE["summary"](i, j, n, c),
}


@pytest.mark.parametrize("name", SPARSE)
@given(seed=seeds, n=st.integers(1, 9), c=st.integers(1, 9))
def test_sparse_rules_against_their_definitions(name, seed, n, c):
    c, at = min(n, c), packs.scattered(np.random.default_rng(seed), 1, 15)
    q, k = pairs(at.map(lambda x: x[0]), at.map(lambda x: x[0]))
    expected = np.vectorize(lambda i, j: SPARSE[name](i, j, n, c))(q.time, k.time)
    expected &= (q.segment == k.segment) & (q.segment >= 0)
    numbers = f"{n}, {c}" if name in ("summary", "fixed") else n
    np.testing.assert_array_equal(rules.visible(rules.parse(f"{name}({numbers})"), at, at)[0], expected)


def test_parts_of_sparse_rules_join_to_them():
    """So that alternate layers may have one part each."""
    assert rules.parse("window(8) | every(8)") == rules.strided(8)
    assert rules.parse("block(8) | summary(8, 3)") == rules.fixed(8, 3)


@given(seeds, st.integers(1, 12), st.integers(1, 60), st.integers(1, 60))
def test_equal_remainders_are_looked_for_among_the_differences(seed, n, width, tokens):
    """Of times without a gap the ranges say exactly which tiles hold a pair, wherever the tiles begin."""
    begins = np.random.default_rng(seed).integers(0, 90, 2)
    q, k = (
        Coordinates(*[np.arange(begin, begin + size)] * 4) for begin, size in zip(begins, (width, tokens), strict=True)
    )
    possibly = rules.every(n).visible_range(ranges(q), ranges(k)).high
    assert possibly == (np.subtract.outer(q.time, k.time) % n == 0).any()


@given(drawn_rules, seeds, st.sampled_from([1, 6, 40]))
def test_ranges_with_known_remainders_never_say_a_wrong_always_or_never(rule, seed, width):
    rng = np.random.default_rng(seed)
    q, k = tile(rng, 6, width), tile(rng, 4, width)
    known = {}
    for term in rule.made.remainders():
        values = np.asarray(term.values(q, q) if term.sides() == {"q"} else term.values(k, k))
        known[term.tree] = Range(values.min(), values.max())
    dense, (certainly, possibly) = rule.plain(*pairs(q, k)), rule.made.visible_range(ranges(q), ranges(k), known)
    loose = rule.made.visible_range(ranges(q), ranges(k))
    assert loose.low <= certainly <= dense.all() and loose.high >= possibly >= dense.any()


def test_a_rule_says_its_remainders_and_periods():
    q, k = rules.q, rules.k
    rule = rules.own_branch & (rules.fixed(12, 2) | rules.every(5)) & ((q.time - k.time) % 7 < 3) & (k.index % 2 == 0)
    assert {term.tree for term in rule.remainders()} == {
        (k.time % 12).tree, (q.time % 5).tree, (k.time % 5).tree, (k.index % 2).tree,
    }  # fmt: skip
    assert rule.periods() == [5, 7, 12]
    plain = *rules.RULES.values(), rules.window(3), rules.block(4)
    assert not any(rule.periods() + rule.remainders() for rule in plain)


@pytest.mark.parametrize("name", rules.RULES)
@given(seed=seeds, pairs=st.integers(1, 700))
def test_mean_visible_keys_against_a_loop(name, seed, pairs):
    at = packs.interleaved(np.random.default_rng(seed), 2, 24)
    seen = tokens = 0
    for b in range(2):
        row = [packs.token(at, b, t) for t in range(24)]
        tokens += sum(q.segment >= 0 for q in row)
        seen += sum(sees(name, q, k) for q in row for k in row)
    assert rules.mean_visible_keys(rules.RULES[name], at, pairs) == pytest.approx(seen / tokens, rel=1e-12)


def test_mean_visible_keys_of_one_causal_text():
    assert rules.mean_visible_keys(rules.causal, Coordinates.single(3, 9)) == 5.0
    assert rules.mean_visible_keys(rules.causal, Coordinates.padding(1, 4)) == 0.0


@pytest.mark.parametrize("by", [0.5, rules.k.time, True])
def test_a_product_takes_a_whole_constant(by):
    with pytest.raises(ValueError, match="constant, a whole number"):
        rules.q.time * by


@pytest.mark.parametrize("thresholds", [(), (3, 3), (5, 2)])
def test_thresholds_rise(thresholds):
    with pytest.raises(ValueError, match="do not rise"):
        rules.q.time.reached(thresholds)


def test_a_term_knows_whose_coordinates_it_reads():
    q, k = rules.q, rules.k
    assert (q.time * 2 + q.index // 3).sides() == {"q"} and k.time.reached((1,)).sides() == {"k"}
    assert rules.minimum(q.time, k.time).sides() == {"q", "k"} and (rules.maximum(4, 5)).sides() == set()


@given(st.lists(st.sampled_from(sorted(rules.RULES)) | st.integers(1, 999), min_size=1, max_size=4))
def test_parse_reads_what_a_config_spells(parts):
    made = [rules.window(part) if isinstance(part, int) else rules.RULES[part] for part in parts]
    expected = made[0]
    for rule in made[1:]:
        expected = expected & rule
    spelled = [f"window({part})" if isinstance(part, int) else part for part in parts]
    assert rules.parse("&".join(spelled)) == rules.parse("  &  ".join(spelled)) == expected


_ATOMS = {**rules.RULES, "window(7)": rules.window(7), "window( 300 )": rules.window(300)}
_written = st.recursive(
    st.sampled_from(sorted(_ATOMS)),
    lambda inner: st.builds("({} {} {})".format, inner, st.sampled_from("&|"), inner),
    max_leaves=6,
)


@given(_written)
def test_parse_reads_joined_rules_as_python_would(text):
    names = {name: rule for name, rule in _ATOMS.items() if name.isidentifier()}
    assert rules.parse(text) == rules.parse(f"\n {text} ") == eval(text, {"window": rules.window, **names})


def test_and_binds_tighter_than_or():
    a, b, c = rules.causal, rules.own_branch, rules.window(3)
    assert rules.parse("causal | own_branch & window(3)") == a | (b & c) != (a | b) & c
    assert rules.parse("(causal | own_branch) & window(3)") == (a | b) & c


def test_a_sized_rule_to_come_is_a_row(monkeypatch):
    monkeypatch.setitem(rules.SIZED, "dilated", lambda length, kept: rules.window(length) & rules.window(kept))
    assert rules.parse("dilated(4, 2) & causal") == rules.window(4) & rules.window(2) & rules.causal
    with pytest.raises(UserError, match=r"'dilated' takes 2 whole numbers.*window\(n\), .*dilated\(length, kept\)"):
        rules.parse("dilated(4)")


@pytest.mark.parametrize(("text", "names"), [
    ("own_branches", ["own_branches", "own_branch", "causal", "window(n)"]),
    ("causal | windo(3)", ["'windo(3)' is unknown", "did you mean 'window(n)'"]),
    ("", ["''", "names no rule"]),
    ("causal &", ["'causal &' does not parse"]),
    ("(causal", ["'(causal' does not parse"]),
    ("causal\0", ["does not parse"]),
    ("causal # & own_branch", ["has a comment"]),
    ("window", ["'window' without its number"]),
    *((f"window({inner})", [f"'window({inner})'", "takes one whole number", "window(128)"])
      for inner in ("n", "-1", "", "3, 4", "n=3", "*n", "True", "1.5", "1 + 2")),
    ("causal & window(0)", ["causal & window(0)", "window(0)", "at least 1"]),
    ("window(99999999999)", ["a number above 536870912"]),
    *((f"causal & {name}(0{more})", [f"{name} has n = 0 time steps", "at least 1"])
      for name, more in (("strided", ""), ("every", ""), ("block", ""), ("fixed", ", 1"), ("summary", ", 1"))),
    *((f"causal & {name}(4, {c})", [f"{name} keeps c = {c} of n = 4 time steps", "choose 1 to 4"])
      for name in ("fixed", "summary") for c in (0, 5)),
    ("fixed(8)", ["'fixed(8)'", "takes 2 whole numbers"]),
    (f"window({'9' * 5000})", ["does not parse"]),
    ("causal(3)", ["calls 'causal', which takes no numbers"]),
    *((text, [f"has {text!r}, which is no rule"]) for text in (
        "causal and own_branch", "causal or own_branch", "not causal", "~causal", "q.time < 3", "rules.causal", "3",
        "causal ^ own_branch", "window(3)(4)", "[causal]", "lambda: causal")),
    ("(" * 300 + "causal" + ")" * 300, ["does not parse"]),
    (" & ".join(["causal"] * 100), ["nested too deep"]),
    (" & ".join(["causal"] * 100_000), ["nested too deep"]),
    ("a" + ".b" * 5000, ["nested too deep"]),
])  # fmt: skip
def test_parse_refuses_by_name(text, names):
    with pytest.raises(UserError) as refused:
        rules.parse(text)
    told = str(refused.value)
    assert told.startswith("model.rule = ") and "\n" not in told and len(told) < 400
    assert all(name in told for name in names) and ("choose" in told or "join causal, all_branches" in told)


@pytest.mark.parametrize("others", [True, False])
def test_which_rules_show_branches_each_other(others):
    """Compared with every pair of small coordinates of two branches, neither of them the prompt."""
    shown = ["all_branches", "causal", "window(3)", "own_branch | window(3)", "all_branches & every(4)"]
    hidden = ["own_branch", "own_branch & window(3)", "all_branches & own_branch", "own_branch & every(4)"]
    time = np.arange(8)
    q, k = (Coordinates(0 * time, 0 * time + branch, time, 2 * time + branch) for branch in (1, 2))
    for rule in map(rules.parse, shown if others else hidden):
        assert rules.shows_others(rule) == bool(rules.visible(rule, q, k).any()) == others
