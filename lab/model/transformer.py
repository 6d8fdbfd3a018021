"""The forward pass.

B batch, T new tokens, S cached tokens, D model width, H query heads, G key-value heads, K head width, L layers,
C vocabulary.

Layers are stored stacked: one Block per entry of the layer pattern, with a leading axis over its repeats. Scanned and
unrolled execution read the same parameters. How the outputs of a layer enter the next is the stream's to say.
"""

import dataclasses
import functools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lab import kernels
from lab.coordinates import Coordinates
from lab.errors import UserError
from lab.model import mesh, norm, parameter, parametrization, position, slots, stretched
from lab.model.attending import View, plan_tiles_over_mesh
from lab.model.dropout import Dropout, Masks
from lab.model.execution import Execution, rematerialised
from lab.model.feedforward import FEEDFORWARDS
from lab.model.mixers import MIXERS
from lab.model.placement import PLACEMENTS
from lab.model.position import Turning
from lab.model.spec import layer_specs, maps
from lab.model.streams import STREAMS


class Cache(NamedTuple):
    """Keys and values of every layer, beside the coordinates of the slots; an empty slot has segment -1."""

    layers: tuple  # for each entry of the pattern, stacked where layers are scanned, else a tuple over its repeats
    stream: tuple  # what the stream keeps of tokens beside that
    coordinates: Coordinates
    used: jax.Array  # int32 [B]: each row's next free slot, one past the last that was given to a token


class Block(nnx.Module):
    """A layer: two sublayers, each in its placement of norms, and what the stream gives every layer alike."""

    masks: ClassVar[Masks | None] = None  # of dropout in this layer; of a copy that is trained (`dropping`) alone

    def __init__(self, spec, key: jax.Array, m: jax.Array):
        mixer, feedforward = jax.random.split(key)
        drawn, self.branch = parametrization.as_drawn(spec), parametrization.branch(spec)
        stream, placement = STREAMS[spec.stream.name], PLACEMENTS[spec.placement.name]
        self.mixer_placement = placement(spec)
        self.mixer = MIXERS[spec.mixer.name](drawn, stretched.rule(spec), mixer)
        self.feedforward_placement = placement(spec, reads_normed=stream.shares_norm)
        self.feedforward = FEEDFORWARDS[spec.feedforward.name](drawn, feedforward)
        self.stream = stream.of_layer(spec, jax.random.fold_in(key, 2), m)

    def __call__(self, x_BTD, view: View, cache=None):
        """The plain residual layer, and the new cache. Other streams combine `mix` and `feed` otherwise."""
        mixed_BTD, cache = self.mix(x_BTD, view, cache)
        h_BTD = self.mixer_placement.add(x_BTD, mixed_BTD)
        return self.feedforward_placement.add(h_BTD, self.feed(h_BTD)), cache

    def mix(self, x_BTD, view: View, cache=None):
        """mixer(norm(x)), with norms where the placement has them, and the new cache."""
        mixed_BTD, cache = self.mixer(self.mixer_placement.before(x_BTD), view, cache)
        return mesh.constrain(self.mixed(mixed_BTD)), cache

    def mixed(self, y_BTD):
        """What the mixer put out, with norms where the placement has them, and some of it dropped."""
        return self.dropped("mixer", self.scaled(self.mixer_placement.after(y_BTD)))

    def feed(self, x_BTD):
        """feedforward(norm(x)), likewise."""
        fed_BTD = self.feedforward(self.feedforward_placement.before(x_BTD))
        return mesh.constrain(self.dropped("feedforward", self.scaled(self.feedforward_placement.after(fed_BTD))))

    def dropped(self, site: str, y_BTD):
        return y_BTD if self.masks is None else self.masks.drop(site, y_BTD)

    def dropping(self, masks: Masks) -> "Block":
        """A copy that drops numbers of what its sublayers put out."""
        block = jax.tree.map(lambda w: w, self)
        block.masks = nnx.data(masks)
        return block

    def scaled(self, y_BTD):
        """What the stream is given, times what the parametrization multiplies it by."""
        return y_BTD if self.branch is None else self.branch * y_BTD


class Transformer(nnx.Module):
    """tokens [B, T] -> logits [B, T, C]. Made by `lab.model.build`.

    There is a norm before the head unless the last layer's placement norms the stream itself (post, deepnorm), as in
    arXiv 1706.03762. model.embedding_scale, rounded to the type of activations as in Gemma, multiplies the embeddings
    of tokens, before a position code is added; model.logit_softcap c makes logits z c tanh(z / c).
    """

    def __init__(self, model, key: jax.Array, execution: Execution):
        embedding, head, *layers = jax.random.split(key, 2 + model.layers)
        specs = layer_specs(model)
        shape, gain = (model.vocabulary, model.dim), parametrization.wider(model) ** 0.5
        self.embedding = parameter.embedding(embedding, shape, gain)
        self.code = position.code(specs, key)
        self.rotary = nnx.List([stretched.rotary(spec) for spec in specs])
        self.added = position.added_to_all(specs, [maps(spec) for spec in specs], key)
        self.blocks = nnx.List(
            [
                jax.vmap(functools.partial(Block, spec))(
                    jnp.stack(layers[p :: len(specs)]), jnp.arange(p, model.layers, len(specs))
                )
                for p, spec in enumerate(specs)
            ]
        )
        self.stream = STREAMS[model.stream.name](model, jax.random.fold_in(key, 2 + model.layers))
        last = PLACEMENTS[specs[(model.layers - 1) % len(specs)].placement.name]
        self.norm = None if last.norms_sum else norm.make(model, model.dim)
        self.head = None if model.tied else parameter.embedding(head, shape, gain)
        self.readout = parametrization.readout(model)
        self.compute = jnp.dtype(model.compute)
        exact = self.compute == jnp.float32
        self.embedding_scale = model.embedding_scale if exact else float(self.compute.type(model.embedding_scale))
        self.logit_softcap = model.logit_softcap
        self.layers, self.execution = model.layers, execution
        parametrization.declare(self, model)

    def __call__(
        self, tokens_BT: jax.Array, coordinates: Coordinates | None = None, dropout: Dropout | None = None
    ) -> jax.Array:
        """Logits [B, T, C], float32. coordinates None: one causal segment per row. dropout: in training alone."""
        if coordinates is None:
            coordinates = Coordinates.single(*tokens_BT.shape)
        masks = None if dropout is None else dropout.masks(coordinates)
        x_BTD, views = self.embed(tokens_BT, coordinates), self.views(coordinates, coordinates, masks=masks)
        if masks is not None:
            x_BTD = mesh.constrain(masks.of_layer(0).drop("embedding", x_BTD))
        return self.logits(self.run_layers(x_BTD, views)[0])

    def init_cache(self, batch: int, length: int, branches: int = 1) -> Cache:
        """An empty cache of `length` slots a row: best a multiple of 512, as kernels pad others each time.

        branches: the highest number of a branch, which mixers with a state for each have a place for. Such a state goes
        on as long as tokens of its segment and branch come, so a new text in a row takes a new segment number.
        """
        layers = tuple(block.mixer.init_cache(batch, length, self.compute, branches) for block in self.blocks)
        if not self.scanned:
            layers = tuple(tuple(unstack(kept, self.repeats(p))) for p, kept in enumerate(layers))
        stream = self.stream.init_cache(batch, length, self.compute)
        return Cache(layers, stream, Coordinates.padding(batch, length).map(jnp.asarray), jnp.zeros(batch, jnp.int32))

    def extend(
        self, tokens_BT: jax.Array, coordinates: Coordinates, cache: Cache, *, slots_BT=None, wanted=None, limits=None
    ) -> tuple[jax.Array, Cache]:
        """Logits of the new tokens, which see each other and the cache, and the cache that holds them too.

        slots_BT, int32 [B, T]: the slot of each token in its row; None: each row's next free ones, in order. A token
        of segment -1 takes no slot, whatever it is given. What lay in a slot that is given again is gone; a slot is
        freed by setting its segment in `cache.coordinates` to -1, and given again by slots_BT alone.
        wanted, int32 [B, W]: the places 0..T-1 in its row of the tokens whose logits are made, [B, W, C], in that
        order, a place more than once if asked; None: those of every token, [B, T, C].
        limits, int32 [B, M, M]: how far nodes of texts that fork and join see each other (`rules.forked`); coordinates,
        those of the cache too, have nodes then. None: a branch sees what the rule says. With `wanted` beside them the
        tokens are taken as those of one time of many branches, which changes how fast this is, and rounding.

        Raises UserError for a row with more tokens than free slots, for slots and places that are outside or given
        twice, and for positions that the stream has no weight for, where these are known; and for frequencies that
        depend on the length of the whole text, which is unknown (position.length = 0). Where they are traced, a
        token without a slot is not kept and sees the rest of the cache alone, `used` is above the length then, and
        logits of a place outside, and of a row with a position that has no weight, are nan.
        """
        length = cache.coordinates.shape[1]
        stretched.check_cached(self.rotary)
        slots.check(coordinates, cache.used, length, slots_BT)
        slots_BT, used_B = slots.choose(coordinates, cache.used, length, slots_BT)
        keys = jax.tree.map(lambda old, new: slots.put(old, new, slots_BT), cache.coordinates, coordinates)
        views = self.views(coordinates, keys, slots_BT, limits=limits, lanes=limits is not None and wanted is not None)
        x_BTD, kept = self.run_layers(self.embed(tokens_BT, coordinates), views, (cache.layers, cache.stream))
        x_BWD = x_BTD if wanted is None else picked(x_BTD, wanted)
        return self.logits(x_BWD), Cache(*kept, keys, used_B)

    def fork(self, cache: Cache, source, target) -> Cache:
        """The cache in which branch `target` goes on from where branch `source` is: numbers, or int [B] with -1 for no
        fork. Attention has no state: its rule says what the new branch sees. Raises UserError for branches without a
        place, where they are known."""
        return cache._replace(layers=self.each_layer(lambda mixer, kept: mixer.fork(kept, source, target), cache))

    def join(self, cache: Cache, sources, target) -> Cache:
        """The cache in which branch `target` goes on from what all of `sources` are, at their largest time plus one.

        Raises UserError where a mixer has a state for each branch.
        """
        return cache._replace(layers=self.each_layer(lambda mixer, kept: mixer.join(kept, sources, target), cache))

    def each_layer(self, function, cache: Cache) -> tuple:
        """`function` of the mixer and of what it keeps, for each layer."""
        entries = [(block.mixer, kept) for block, kept in zip(self.blocks, cache.layers, strict=True)]
        if self.scanned:
            return tuple(function(mixer, kept) for mixer, kept in entries)
        return tuple(tuple(function(mixer, one) for one in kept) for mixer, kept in entries)

    @property
    def scanned(self) -> bool:
        """Whether layers are run in a loop: their caches are stacked then, as their weights are, else apart."""
        return self.execution.scan and self.layers // len(self.blocks) > 1

    def apart(self) -> "Transformer":
        """The same model with the weights of each layer in arrays of their own, as of a pattern without repeats: out of
        stacked ones each call copies them, which is what a step of few tokens costs. Itself where layers are scanned.
        """
        if self.scanned:
            return self
        model, P = jax.tree.map(lambda w: w, self), len(self.blocks)
        of = lambda m: jax.tree.map(lambda w: w[m // P : m // P + 1], self.blocks[m % P])  # noqa: E731
        model.blocks = nnx.List([of(m) for m in range(self.layers)])
        model.rotary = nnx.List([self.rotary[m % P] for m in range(self.layers)])
        return model

    def repeats(self, p: int) -> int:
        """How many layers are entry p of the pattern."""
        return len(range(p, self.layers, len(self.blocks)))

    def embed(self, tokens_BT, coordinates: Coordinates):
        x_BTD = self.embedding[...][tokens_BT]
        if self.embedding_scale != 1:
            x_BTD = self.embedding_scale * x_BTD
        if self.code is not None:
            x_BTD = x_BTD + self.code(coordinates)
        x_BTD = self.stream.place(x_BTD, coordinates)
        return mesh.constrain(x_BTD.astype(self.compute))

    def views(
        self,
        queries: Coordinates,
        keys: Coordinates,
        slots_BT=None,
        masks: Masks | None = None,
        limits=None,
        lanes: bool = False,
    ) -> list[View]:
        """What each entry of the layer pattern sees; tile lists are made once per distinct rule."""
        mixers, implementation = [block.mixer for block in self.blocks], self.execution.implementation
        if masks is not None and "attention" in masks.rates:  # of all calls, since they share tile lists
            implementation = kernels.resolve(implementation, keys.shape[1], dropping=True)
        if limits is not None:
            implementation = kernels.resolve(implementation, keys.shape[1], forking=True)
        turnings = [
            Turning() if rotary is None else rotary.turning(queries, mixer.rule)
            for rotary, mixer in zip(self.rotary, mixers, strict=True)
        ]
        needed = dict.fromkeys(
            (rule, mixer.biased)
            for turning, mixer in zip(turnings, mixers, strict=True)
            for rule in turning.rules(mixer.rule)
            if mixer.attends
        )
        planned = functools.partial(plan_tiles_over_mesh, queries, keys)
        tiles = {which: planned(*which, implementation, limits, lanes) for which in needed}
        views = []
        for turning, mixer in zip(turnings, mixers, strict=True):
            of_rules = [tiles.get((rule, mixer.biased)) for rule in turning.rules(mixer.rule)]
            views.append(
                View(
                    turning.rotation,
                    turning.frequencies,
                    queries,
                    keys,
                    of_rules[0] if turning.bands is None else of_rules,
                    slots_BT,
                    implementation,
                    masks,
                    added=self.added() if mixer.biased and mixer.added is None else None,
                    growth=turning.growth,
                    bands=turning.bands,
                    limits=limits,
                    plain=turning.plain,
                )
            )
        return views

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
                block, view = dropping(block, view, first + p)
                layer = rematerialised(functools.partial(type(self.stream).layer, m=first + p), self.execution.remat)
                state, cache = layer(self.stream, state, block, view, cache)
                new.append(cache)
            return state, tuple(new)

        full, left = divmod(self.layers, P)
        if self.scanned:
            entries = tuple(zip(self.blocks, of_layers, strict=True))
            repeats = jax.tree.map(lambda w: w[:full], entries)
            state, new = jax.lax.scan(run_period, state, (P * jnp.arange(full), repeats))
            periods = [(full * P, jax.tree.map(lambda w: w[full], entries[:left]))] if left else []
        else:
            new = None
            blocks = [unstack(block, self.repeats(p)) for p, block in enumerate(self.blocks)]
            unstacked = [
                list(zip(b, kept or (None,) * len(b), strict=True)) for b, kept in zip(blocks, of_layers, strict=True)
            ]
            periods = [(r * P, tuple(e[r] for e in unstacked if r < len(e))) for r in range(full + bool(left))]
        rows = []
        for period in periods:
            state, row = run_period(state, period)
            rows.append(row)
        x_BTD, of_stream = self.stream.finish(state)
        if new is None:  # copied into one array, caches would be read and written as a whole for each token
            return x_BTD, (tuple(tuple(row[p] for row in rows if p < len(row)) for p in range(P)), of_stream)
        return x_BTD, (restack(new, rows, P), of_stream)

    def logits(self, x_BTD):
        weight_CD = self.embedding if self.head is None else self.head
        x_BTD = x_BTD if self.norm is None else self.norm(x_BTD)
        x_BTD = x_BTD if self.readout is None else self.readout * x_BTD
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        z_BTC = jnp.einsum("btd,cd->btc", x_BTD, weight_CD[...].astype(x_BTD.dtype), preferred_element_type=wide)
        return self.logit_softcap * jnp.tanh(z_BTC / self.logit_softcap) if self.logit_softcap else z_BTC


def dropping(block: Block, view: View, m) -> tuple[Block, View]:
    """A block and its view as they are in layer m, where numbers are dropped; else themselves."""
    if view.masks is None:
        return block, view
    masks = view.masks.of_layer(m)
    return block.dropping(masks), dataclasses.replace(view, masks=masks)


def picked(x_BTD, wanted_BW):
    """x [B, W, D] at these places of each row, nan outside; raises UserError for those that are known to be outside."""
    B, T, _ = x_BTD.shape
    if np.ndim(wanted_BW) != 2 or len(wanted_BW) != B:
        raise UserError(f"wanted is {np.shape(wanted_BW)} for {B} rows; choose places [B, W]")
    if (places := slots.known(wanted_BW)) is not None and (outside := places[(places < 0) | (places >= T)]).size:
        raise UserError(f"wanted has {outside.flat[0]}, which is no place among {T} tokens; choose 0 to {T - 1}")
    inside_BW = jnp.where(jnp.asarray(wanted_BW) < 0, T, wanted_BW)  # a negative one would count from the end
    return jnp.take_along_axis(x_BTD, inside_BW[..., None], axis=1, mode="fill")


def unstack(tree, n: int) -> list:
    """The n slices of a stacked pytree. lax.split, because its gradient is one concatenation."""
    parts = jax.tree.map(lambda w: [part[0] for part in jax.lax.split(w, (1,) * n)], tree)
    is_parts = lambda x: isinstance(x, list)  # noqa: E731
    return [jax.tree.map(lambda part, i=i: part[i], parts, is_leaf=is_parts) for i in range(n)]


def restack(scanned, rows: list, entries: int) -> tuple:
    """Caches stacked per pattern entry again: those that a scan gave, then those of the layers after it."""
    stacked = []
    for p in range(entries):
        parts = [scanned[p]]
        parts += [jax.tree.map(lambda x: x[None], row[p]) for row in rows if p < len(row)]
        stacked.append(jax.tree.map(lambda *x: jnp.concatenate(x), *parts))
    return tuple(stacked)
