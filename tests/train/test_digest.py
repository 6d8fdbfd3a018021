"""The digest of a jaxpr: what must not change it, and what must. Programs are traced only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from lab.train.digest import digest

X, Y = (jax.ShapeDtypeStruct(shape, np.float32) for shape in ((3, 4), (3, 4)))


def of(function, *arguments) -> str:
    arguments = arguments or (X, Y)
    return digest(jax.make_jaxpr(lambda *given: function(*given))(*arguments))


def plain(x, y):
    a = jnp.sin(x) * 0.2
    b = jnp.cos(y - x)
    return jnp.sum(a / b, axis=0), jax.nn.silu(a)


def renamed_reordered_and_repeated(left, right):
    """Of another docstring, too."""
    unused = jnp.tanh(left)
    cosine = jnp.cos(right - left)
    sine = 0.2 * jnp.sin(left)
    again = jnp.sin(left) * 0.2
    del unused
    return jnp.sum(sine / cosine, axis=0), jax.nn.silu(again)


def with_jit(x, y):
    half = jax.jit(lambda x: jnp.sin(x) * 0.2)
    return jax.jit(lambda a, x, y: (jnp.sum(a / jnp.cos(y - x), axis=0), jax.jit(jax.nn.silu)(a)))(half(x), x, y)


def with_derivative_rules(x, y):
    ruled = jax.custom_vjp(plain)
    ruled.defvjp(lambda x, y: (plain(x, y), x), lambda x, ct: (x, x))
    return ruled(x, y)


def rematerialised_and_named(x, y):
    return jax.checkpoint(lambda x, y: plain(checkpoint_name(x, "x"), y))(x, y)


def constrained(x, y):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    return plain(jax.lax.with_sharding_constraint(x, sharding), y)


@pytest.mark.parametrize("same", [
    renamed_reordered_and_repeated, with_jit, jax.jit(plain), with_derivative_rules, rematerialised_and_named,
    constrained, lambda x, y: plain(jax.lax.optimization_barrier(x), y), lambda x, y: plain(x.astype(x.dtype), y),
])  # fmt: skip
def test_of_one_program_written_in_many_ways(same):
    assert of(same) == of(plain)


def variant(
    c=0.2, axis=0, difference=lambda x, y: y - x, activation=jax.nn.silu, sine=jnp.sin, out=lambda a, b: (a, b)
):
    def function(x, y):
        a = sine(x) * c
        return out(jnp.sum(a / jnp.cos(difference(x, y)), axis=axis), activation(a))

    return function


def test_a_changed_formula_changes_it():
    changed = [
        dict(c=0.21),
        dict(c=np.float32(0.2) * np.ones((3, 4), np.float32)),
        dict(axis=1),
        dict(difference=lambda x, y: x - y),
        dict(difference=lambda x, y: y + x),
        dict(difference=lambda x, y: y - x + 0.0),
        dict(activation=jax.nn.gelu),
        dict(sine=jnp.sinh),
        dict(sine=lambda x: jnp.sin(x.astype(jnp.bfloat16)).astype(jnp.float32)),
        dict(out=lambda a, b: (b, a)),
        dict(out=lambda a, b: a),
    ]
    assert of(variant()) == of(plain)
    assert len({of(variant(**fields)) for fields in [{}, *changed]}) == 1 + len(changed)


@pytest.mark.parametrize("other", [((3, 5), np.float32), ((4, 3), np.float32), ((3, 4), np.float16)])
def test_the_type_of_an_input_counts(other):
    assert of(jnp.sin, X) != of(jnp.sin, jax.ShapeDtypeStruct(*other))


def test_arrays_that_a_program_holds_count_by_value():
    values = [np.arange(5.0, dtype=np.float32), np.arange(5.0, dtype=np.float32)[::-1], np.arange(5, dtype=np.int32)]
    holding = lambda held: of(lambda x: x + jnp.asarray(held)[:4] + 0 * jnp.asarray(held)[0], X)  # noqa: E731
    assert len({*map(holding, values)}) == 3
    assert holding(values[0]) == holding(jnp.arange(5.0))
    two = lambda one, other: of(lambda x: (x + jnp.asarray(one), jnp.asarray(other))[0], X)  # noqa: E731
    row = np.arange(4.0, dtype=np.float32)
    assert two(row, row + 1) == two(row, row + 2) != two(row + 1, row)


def test_the_bodies_of_loops_and_branches_count():
    def loop(c, reverse=False, unroll=1, other=0.0, dead=False, name="body"):
        def body(carry, x):
            if dead:
                jnp.tanh(x)
            new = jax.lax.cond(x[0] > 0, lambda v: v * c, lambda v: v - other, carry)
            return new, carry + x

        body.__name__ = name
        return of(lambda x: jax.lax.scan(body, x[0], x, reverse=reverse, unroll=unroll), X)

    assert loop(2.0) == loop(2.0, unroll=3) == loop(2.0, dead=True) == loop(2.0, name="other")
    assert len({loop(2.0), loop(3.0), loop(2.0, other=1.0), loop(2.0, reverse=True)}) == 4


def test_what_nothing_reads_does_not_count_even_as_an_input():
    one = jax.make_jaxpr(lambda a, b, c: a - c)(X, X, X)
    other = jax.make_jaxpr(lambda a, c: a - c)(X, X)
    assert digest(one, ["a", "b", "c"]) == digest(other, ["a", "c"])
    assert digest(one) != digest(other)  # known by position: which one is read counts
    assert digest(other, ["a", "c"]) != digest(other, ["a", "b"])


def test_the_rule_of_a_derivative_is_in_a_differentiated_program():
    def ruled(slope):
        @jax.custom_vjp
        def function(x):
            return jnp.sin(x)

        function.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (slope * x * ct,))
        return lambda x: jnp.sum(function(x))

    def with_tangent(slope):
        function = jax.custom_jvp(jnp.sin)
        function.defjvp(lambda primals, tangents: (jnp.sin(*primals), slope * tangents[0]))
        return lambda x: jnp.sum(function(x))

    for made in (ruled, with_tangent):
        assert of(made(1.5), X) == of(made(2.5), X)
        assert of(jax.grad(made(1.5)), X) != of(jax.grad(made(2.5)), X)
        assert of(jax.grad(made(1.5)), X) == of(jax.grad(jax.jit(made(1.5))), X)


def test_effects_count_in_their_order():
    def told(*words):
        def function(x):
            for word in words:
                jax.debug.print(word)
            return x + 1

        return of(function, X)

    assert len({told(), told("a"), told("b"), told("a", "b"), told("b", "a")}) == 5

    def stored(early: bool):
        def function(x):
            place = jax.new_ref(x)
            before = place[...]
            place[...] = before * 2
            return before if early else place[...]

        return of(function, X)

    assert stored(early=True) != stored(early=False)


def test_a_param_without_a_description_that_lasts_is_refused():
    primitive = jax.extend.core.Primitive("odd")
    primitive.def_abstract_eval(lambda x, **_: x)
    of(functools.partial(primitive.bind, param=3), X)
    with pytest.raises(TypeError, match="'param' of 'odd'"):
        of(functools.partial(primitive.bind, param=object()), X)
