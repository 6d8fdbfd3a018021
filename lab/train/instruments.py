"""What run.log.instruments measures of a training step: by a program of its own, from the weights and the batch that
the step begins with, so that the step's own program stays what it is.

Letters as in lab.model.transformer.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lab.coordinates import Coordinates
from lab.data import Batch
from lab.kernels import reference, rules
from lab.model import mesh, parameter
from lab.model.attending import View
from lab.model.attention import Softmax
from lab.model.streams.stream import Stream
from lab.model.transformer import Block, Transformer, unstack
from lab.options import Option
from lab.train import partition, step
from lab.train.optimizer import Numbers
from lab.train.step import Program, State

OF_ROWS = ("activations", "logits", "log_z")  # of the first row of a batch, or of one for each device along rows
OF_UPDATE = ("gradients", "updates")
OF_WEIGHTS = ("weights",)
ON_HOST = ("spikes",)  # counted where a run is logged: see lab.study.judge.spikes
INSTRUMENTS = (*OF_ROWS, *OF_UPDATE, *OF_WEIGHTS, *ON_HOST)
OPTION = Option((), "what is measured beside the loss, of the first step and every log.every-th",
                kind=tuple[str, ...], choices=INSTRUMENTS)  # fmt: skip

Measured = dict[str, jax.Array]  # float32: [L], nan where a layer has no such number, or a scalar


def due(at: int, every: int) -> bool:
    """Whether a step is measured: it depends on nothing but the step, so that a resumed run measures the same ones."""
    return at == 0 or (at + 1) % every == 0


def programmed(names: Sequence[str]) -> tuple[str, ...]:
    """Those that need a program, in one order, so that it is compiled once."""
    return tuple(name for name in (*OF_ROWS, *OF_UPDATE, *OF_WEIGHTS) if name in names)


def measure(state: State, numbers: Numbers, batch: Batch, program: Program, names: tuple[str, ...]) -> Measured:
    """Of the step that `lab.train.step.train_step` makes of the same arguments; what is measured of rows, with nothing
    dropped.

    activations: activation, the root mean square of the stream after each layer.
    logits: attention_max, the largest score that a query gives to a key that it sees, scaled and capped; and
    attention_entropy, in nats, the mean over queries and heads. Both nan where a mixer is no softmax over its own keys,
    where something is added to scores, and under streams other than the plain one.
    log_z: log_z_mean and log_z_max, of the head's log normaliser.
    gradients: gradient, the norm over the parameters of each layer, before clipping.
    updates: update, the norm of each layer's update divided by that of its weights.
    weights: weight, that norm, before the step.
    """
    found = {}
    weights, shape = parameter.split(state.model)[1], (state.model.layers, len(state.model.blocks))
    if {*names} & {*OF_ROWS}:
        found |= _of_rows(partition.whole(state.model), _first_rows(batch), names)
    if {*names} & {*OF_UPDATE}:
        _, grads, updates, _ = step.update(state, numbers, batch, program)
        if "gradients" in names:
            found["gradient"] = norms(grads, *shape)
        if "updates" in names:
            found["update"] = norms(updates, *shape) / norms(weights, *shape)
    if "weights" in names:
        found["weight"] = norms(weights, *shape)
    return found


def measure_members(
    states: State, numbers: Numbers, batches: Batch, program: Program, names: tuple[str, ...]
) -> Measured:
    """The same of each member of a stack."""
    return jax.vmap(lambda *member: measure(*member, program, names))(states, numbers, batches)


def told(measured: Measured, member: int, stacked: bool) -> dict[str, float | list[float | None] | None]:
    """As a line of metrics.jsonl has it, of one run or of a member of a stack; None for what is not finite.

    Waits for it."""
    own = {name: np.asarray(x[member] if stacked else x) for name, x in jax.device_get(measured).items()}
    return {name: np.where(np.isfinite(x), x.astype(object), None).tolist() for name, x in own.items()}


def norms(tree, layers: int, entries: int | None = None) -> jax.Array:
    """The norm of each layer's share of a tree like the trainable part of a model, float32 [L]; 0 where it has none.

    Layers are stacked: layer m is place m // P of entry m % P of the pattern, of P = `entries` (None: as many as the
    tree has).
    """
    blocks, squares_L = tree.get("blocks", {}), jnp.zeros(layers)
    entries = len(blocks) if entries is None else entries
    for p in range(entries):
        leaves = jax.tree.leaves(blocks[p]) if p in blocks else []
        of_entry = [jnp.sum(jnp.square(w.astype(jnp.float32)), axis=range(1, w.ndim)) for w in leaves]
        squares_L = squares_L.at[p::entries].set(sum(of_entry))
    return jnp.sqrt(squares_L)


def _first_rows(batch: Batch) -> Batch:
    """As few rows as lie over the mesh: dense scores of all of them would not fit."""
    sizes = mesh.current()
    rows = sizes.get("data", 1) * sizes.get("fsdp", 1)
    return jax.tree.map(lambda x: x[:rows], batch)


def _of_rows(model: Transformer, batch: Batch, names: tuple[str, ...]) -> Measured:
    real_BT, rms, scores = batch.coordinates.segment >= 0, [], []
    for block, view, before, state in each_layer(model, batch.tokens, batch.coordinates):
        if "logits" in names:
            scores.append(_attention(block, before, view) if readable(model, block, view) else (jnp.nan,) * 2)
        x_BTD = model.stream.finish(state)[0]
        rms.append(_rms(x_BTD, real_BT) if isinstance(x_BTD, jax.Array) else jnp.nan)
    found = {}
    if "activations" in names:
        found["activation"] = jnp.stack(rms)
    if "logits" in names:
        found["attention_max"], found["attention_entropy"] = (jnp.stack(each) for each in zip(*scores, strict=True))
    if "log_z" in names:
        log_z_BT = jax.nn.logsumexp(model.logits(x_BTD), axis=-1)
        found["log_z_mean"] = jnp.mean(log_z_BT, where=real_BT)
        found["log_z_max"] = jnp.max(log_z_BT, where=real_BT, initial=-jnp.inf)
    return found


def each_layer(model: Transformer, tokens_BT, at: Coordinates) -> Iterator[tuple[Block, View, object, object]]:
    """(block, its view, the state of the stream before it, that after it), one layer after another, as `run_layers` has
    them where nothing is scanned."""
    views = model.views(at, at)
    P, blocks = len(views), [unstack(block, model.repeats(p)) for p, block in enumerate(model.blocks)]
    state = model.stream.start(model.embed(tokens_BT, at), None)
    for m in range(model.layers):
        block, view, before = blocks[m % P][m // P], views[m % P], state
        state, _ = model.stream.layer(state, block, view, None, m=m)
        yield block, view, before, state


def _rms(x_BTD: jax.Array, real_BT: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x_BTD.astype(jnp.float32)), where=real_BT[..., None]))


def readable(model: Transformer, block: Block, view: View) -> bool:
    """Whether `attention` can read a layer: one map of positions, and scores of its own queries and keys alone."""
    return view.bands is None and view.growth is None and _readable(model.stream, block.mixer)


def _readable(stream: Stream, mixer) -> bool:
    """Whether a layer's scores are those of its own queries and keys alone, read from the stream as it is."""
    own = isinstance(mixer, Softmax) and type(mixer).remember is Softmax.remember
    return own and type(stream).layer is Stream.layer and not mixer.biased  # by a position


def attention(block: Block, x_BTD: jax.Array, view: View) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(s_BGRTS, p_BGRTS, seen_B11TS) of a layer that is `readable`: scores, scaled and capped, and probabilities in
    float32, those of what is not seen 0; and who sees whom. The whole matrix."""
    mixer = block.mixer
    q_BTHK, kept, _ = mixer.project(block.mixer_placement.before(x_BTD), view, None)
    k_BSGK = mixer.read(kept)[0]
    s_BGRTS = reference.scores(mixer.turned("q", q_BTHK, view.rotation), k_BSGK, mixer.scale)
    if mixer.softcap:
        s_BGRTS = mixer.softcap * jnp.tanh(s_BGRTS / mixer.softcap)
    seen_B11TS = rules.visible(mixer.rule, view.queries, view.keys)[:, None, None]
    p_BGRTS = jax.nn.softmax(s_BGRTS, axis=-1, where=seen_B11TS)
    return s_BGRTS, jnp.where(seen_B11TS, p_BGRTS, 0), seen_B11TS


def _attention(block: Block, x_BTD: jax.Array, view: View) -> tuple[jax.Array, jax.Array]:
    """The largest score that is seen, and the mean entropy (nats) of queries that see a key."""
    s_BGRTS, p_BGRTS, seen_B11TS = attention(block, x_BTD, view)
    entropy_BGRT = jax.scipy.special.entr(p_BGRTS).sum(-1)
    sees_BGRT = jnp.broadcast_to(seen_B11TS.any(-1), entropy_BGRT.shape)
    largest = jnp.max(s_BGRTS, where=seen_B11TS, initial=-jnp.inf)
    return largest, jnp.mean(entropy_BGRT, where=sees_BGRT)
