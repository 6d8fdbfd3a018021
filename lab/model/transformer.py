"""The forward pass.

B batch, T new tokens, S cached tokens, D model width, H query heads, G key-value heads, K head width, L layers,
C vocabulary.

Layers are stored stacked: one Block per entry of the layer pattern, with a leading axis over its repeats. Scanned and
unrolled execution read the same parameters. How the outputs of a layer enter the next is the stream's to say.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lab.coordinates import Coordinates
from lab.kernels import rules
from lab.model import mesh, norm, parameter, position
from lab.model.attention import View, plan_tiles_over_mesh
from lab.model.execution import Execution, rematerialised
from lab.model.feedforward import FEEDFORWARDS
from lab.model.mixers import MIXERS
from lab.model.placement import PLACEMENTS
from lab.model.position import POSITIONS
from lab.model.spec import layer_specs
from lab.model.streams import STREAMS


class Cache(NamedTuple):
    """Keys and values of every layer, beside the coordinates of the slots; an empty slot has segment -1."""

    layers: tuple
    stream: tuple  # what the stream keeps of tokens beside that
    coordinates: Coordinates
    used: jax.Array  # int32: slots filled so far, the same in every row


class Block(nnx.Module):
    """A layer: two sublayers, each in its placement of norms, and what the stream gives every layer alike."""

    def __init__(self, spec, key: jax.Array, m: jax.Array):
        mixer, feedforward = jax.random.split(key)
        self.mixer_placement = PLACEMENTS[spec.placement.name](spec)
        self.mixer = MIXERS[spec.mixer.name](spec, rules.parse(spec.rule), mixer)
        self.feedforward_placement = PLACEMENTS[spec.placement.name](spec)
        self.feedforward = FEEDFORWARDS[spec.feedforward.name](spec, feedforward)
        self.stream = STREAMS[spec.stream.name].of_layer(spec, jax.random.fold_in(key, 2), m)

    def __call__(self, x_BTD, view: View, cache=None):
        """The plain residual layer, and the new cache. Other streams combine `mix` and `feed` otherwise."""
        mixed_BTD, cache = self.mix(x_BTD, view, cache)
        h_BTD = x_BTD + mixed_BTD
        return h_BTD + self.feed(h_BTD), cache

    def mix(self, x_BTD, view: View, cache=None):
        """mixer(norm(x)), with norms where the placement has them, and the new cache."""
        mixed_BTD, cache = self.mixer(self.mixer_placement.before(x_BTD), view, cache)
        return mesh.constrain(self.mixer_placement.after(mixed_BTD)), cache

    def feed(self, x_BTD):
        """feedforward(norm(x)), likewise."""
        fed_BTD = self.feedforward(self.feedforward_placement.before(x_BTD))
        return mesh.constrain(self.feedforward_placement.after(fed_BTD))


class Transformer(nnx.Module):
    """tokens [B, T] -> logits [B, T, C]. Made by `lab.model.build`."""

    def __init__(self, model, key: jax.Array, execution: Execution):
        embedding, head, *layers = jax.random.split(key, 2 + model.layers)
        specs = layer_specs(model)
        shape = model.vocabulary, model.dim
        self.embedding = parameter.embedding(embedding, shape)
        codes = [POSITIONS[spec.position.name].code for spec in specs]
        self.code = next((code(model) for code in codes if code), None)
        self.rotary = nnx.List([position.Rotary(spec) for spec in specs])
        self.blocks = nnx.List(
            [
                jax.vmap(functools.partial(Block, spec))(
                    jnp.stack(layers[p :: len(specs)]), jnp.arange(p, model.layers, len(specs))
                )
                for p, spec in enumerate(specs)
            ]
        )
        self.stream = STREAMS[model.stream.name](model, jax.random.fold_in(key, 2 + model.layers))
        self.norm = norm.make(model, model.dim)
        self.head = None if model.tied else parameter.embedding(head, shape)
        self.compute = jnp.dtype(model.compute)
        self.layers, self.execution = model.layers, execution

    def __call__(self, tokens_BT: jax.Array, coordinates: Coordinates | None = None) -> jax.Array:
        """Logits [B, T, C], float32. coordinates None: one causal segment per row."""
        if coordinates is None:
            coordinates = Coordinates.single(*tokens_BT.shape)
        x_BTD, _ = self.run_layers(self.embed(tokens_BT, coordinates), self.views(coordinates, coordinates))
        return self.logits(x_BTD)

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache of `length` slots a row: best a multiple of 512, as kernels pad others each time."""
        layers = tuple(block.mixer.init_cache(batch, length, self.compute) for block in self.blocks)
        stream = self.stream.init_cache(batch, length, self.compute)
        return Cache(layers, stream, Coordinates.padding(batch, length).map(jnp.asarray), jnp.int32(0))

    def extend(self, tokens_BT: jax.Array, coordinates: Coordinates, cache: Cache) -> tuple[jax.Array, Cache]:
        """Logits [B, T, C] of the new tokens, which see each other and the cache, and the cache that holds them too.

        Every row takes T slots; a token of segment -1 takes one that nobody sees. T more slots must be free.
        """
        append = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, jnp.asarray(new), cache.used, 1)  # noqa: E731
        keys = jax.tree.map(append, cache.coordinates, coordinates)
        views = self.views(coordinates, keys, start=cache.used)
        x_BTD, kept = self.run_layers(self.embed(tokens_BT, coordinates), views, (cache.layers, cache.stream))
        return self.logits(x_BTD), Cache(*kept, keys, cache.used + tokens_BT.shape[1])

    def embed(self, tokens_BT, coordinates: Coordinates):
        x_BTD = self.embedding[...][tokens_BT]
        if self.code is not None:
            x_BTD = x_BTD + self.code(coordinates)
        return mesh.constrain(x_BTD.astype(self.compute))

    def views(self, queries: Coordinates, keys: Coordinates, start=None) -> list[View]:
        """What each entry of the layer pattern sees; tile lists are made once per distinct rule."""
        mixers, implementation = [block.mixer for block in self.blocks], self.execution.implementation
        needed = dict.fromkeys(mixer.rule for mixer in mixers if mixer.attends)
        tiles = {rule: plan_tiles_over_mesh(queries, keys, rule, implementation) for rule in needed}
        return [
            View(rotary(queries), rotary.frequencies[...], queries, keys, tiles.get(mixer.rule), start, implementation)
            for rotary, mixer in zip(self.rotary, mixers, strict=True)
        ]

    def run_layers(self, x_BTD, views: list[View], caches: tuple | None = None):
        """Layer m is repeat m // P of pattern entry m % P. Returns what the head reads, and the new caches.

        caches: (those of the layers, that of the stream).
        """
        P = len(views)
        of_layers, of_stream = caches or ((None,) * P, None)
        state = self.stream.start(x_BTD, of_stream)

        def run_period(state, inputs):
            """One pass over (some of) the entries of the pattern, from layer `first` on."""
            new, (first, entries) = [], inputs
            for p, (view, (block, cache)) in enumerate(zip(views, entries, strict=False)):
                layer = rematerialised(functools.partial(type(self.stream).layer, m=first + p), self.execution.remat)
                state, cache = layer(self.stream, state, block, view, cache)
                new.append(cache)
            return state, tuple(new)

        entries = tuple(zip(self.blocks, of_layers, strict=True))
        full, left = divmod(self.layers, P)
        if self.execution.scan and full > 1:
            repeats = jax.tree.map(lambda w: w[:full], entries)
            state, new = jax.lax.scan(run_period, state, (P * jnp.arange(full), repeats))
            periods = [(full * P, jax.tree.map(lambda w: w[full], entries[:left]))] if left else []
        else:
            new = None
            unstacked = [unstack(entry, full + (p < left)) for p, entry in enumerate(entries)]
            periods = [(r * P, tuple(e[r] for e in unstacked if r < len(e))) for r in range(full + bool(left))]
        rows = []
        for period in periods:
            state, row = run_period(state, period)
            rows.append(row)
        x_BTD, of_stream = self.stream.finish(state)
        return x_BTD, (restack(new, rows, P), of_stream)

    def logits(self, x_BTD):
        weight_CD = self.embedding if self.head is None else self.head
        x_BTD = self.norm(x_BTD)
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        return jnp.einsum("btd,cd->btc", x_BTD, weight_CD[...].astype(x_BTD.dtype), preferred_element_type=wide)


def unstack(tree, n: int) -> list:
    """The n slices of a stacked pytree. lax.split, because its gradient is one concatenation."""
    parts = jax.tree.map(lambda w: [part[0] for part in jax.lax.split(w, (1,) * n)], tree)
    is_parts = lambda x: isinstance(x, list)  # noqa: E731
    return [jax.tree.map(lambda part, i=i: part[i], parts, is_leaf=is_parts) for i in range(n)]


def restack(scanned, rows: list, entries: int) -> tuple:
    """Caches stacked per pattern entry again: those that a scan gave, then those of the unrolled layers."""
    stacked = []
    for p in range(entries):
        parts = [] if scanned is None else [scanned[p]]
        parts += [jax.tree.map(lambda x: x[None], row[p]) for row in rows if p < len(row)]
        stacked.append(jax.tree.map(lambda *x: jnp.concatenate(x), *parts))
    return tuple(stacked)
