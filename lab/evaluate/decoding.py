"""What branches that are decoded in parallel are worth to the model itself, and how much of them leaks into each other.

Groups of n branches go on from beginnings of validation texts, drawn by the engine (lab.decode). Then is found:
- the loss of what they generated, as it was drawn (in parallel), and read alone: each branch behind its beginning, as
  an ordinary text. Drawn at temperature 1, the loss alone less that in parallel is in the mean the Kullback-Leibler
  divergence, per token, of how the model goes on in parallel from how it goes on alone.
- the share of attention that a generated token gives to tokens of other branches, a mean over layers and heads.
- how far the next-token distribution of a generated token moves when the text of one other branch is swapped for one of
  another group: KL(before || after), in nats, a mean over tokens and over the branches that stay.

What is generated depends on (seed, text, branch, step) alone. B rows, T tokens of a row, C vocabulary, G groups of
n branches, N tokens that a branch generates, P tokens of a beginning.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lab.coordinates import Coordinates
from lab.data import Batch, checks
from lab.data.packing import LONGEST_ROW, interleave
from lab.decode.engine import Engine
from lab.decode.forest import PAGE, needed_for
from lab.decode.sampling import Sampling
from lab.decode.sampling import check as check_sampling
from lab.errors import UserError
from lab.model import mesh as lab_mesh
from lab.model import position, spec
from lab.options import Option
from lab.train import compiled, instruments

CHUNK = PAGE  # tokens of a prompt that an engine reads at once
SEED = 0  # not config.seed: every cell goes on from the same texts, with the same random numbers
PROMPTS = ("shared", "own")
OPTIONS = {
    "prompt": Option("shared", "a group goes on from one text, its branch 0; own: each branch begins with a text of "
                     "its own, as in training without a prompt", choices=PROMPTS),
    "prompt_tokens": Option(8, "of such a text, from its start", least=1, most=LONGEST_ROW),
    "new_tokens": Option(24, "that each branch generates", least=1, most=LONGEST_ROW),
    "temperature": Option(1.0, "that sampled tokens are drawn at; 1: from the model's own distribution", least=0),
}  # fmt: skip


class Decoded(NamedTuple):
    """What an ask that decodes has found under one condition.

    loss in nats per token, of `tokens` that were drawn; accuracy. ids: these tokens, where their text is judged.
    generated: how many there were in all. seconds: of decoding, without compiling. executable: what read the rows.
    further: columns of the row beside these. documents: what is kept of each, as JSON does.
    """

    value: int | str
    loss: float
    accuracy: float
    tokens: int
    generated: int
    seconds: float
    further: dict
    ids: np.ndarray | None = None
    executable: object = None
    documents: dict | None = None


class Drawn(NamedTuple):
    """Of G groups: their branches' beginnings int32 [G, n, P], and what they go on with [G, n, N]: ids; log p of each
    in nats, float64; whether it is the likeliest. seconds: that it took."""

    begun_GnP: np.ndarray
    ids_GnN: np.ndarray
    log_p_GnN: np.ndarray
    likeliest_GnN: np.ndarray
    seconds: float

    @property
    def texts_GnX(self) -> np.ndarray:
        """Of every branch, beginning and all."""
        return np.concatenate([self.begun_GnP, self.ids_GnN], axis=-1)


def check(config: ConfigDict, ask: ConfigDict, field: str) -> None:
    """Raises UserError for what cannot be asked."""
    if not ask.branches:
        raise UserError(f"{field}.branches is empty; choose at least one number of branches, such as (1, 2, 4)")
    checks.at_most_once(f"{field}.branches", ask.branches)
    checks.at_least(f"{field}.texts", ask.texts, 2)  # a branch is swapped for that of another text
    if ask.prompt_tokens > config.data.text_length:
        raise UserError(
            f"{field}.prompt_tokens = {ask.prompt_tokens} is more than a text has; choose at most "
            f"data.text_length = {config.data.text_length}"
        )
    if row_length(ask) > LONGEST_ROW:
        raise UserError(
            f"{field}: {max(ask.branches)} branches of {ask.new_tokens} tokens make rows of {row_length(ask)} tokens; "
            f"choose fewer, for at most {LONGEST_ROW}"
        )
    try:
        check_sampling(sampling(ask))
    except UserError as error:
        raise UserError(f"{field}: {error}") from None
    times = ask.prompt_tokens + ask.new_tokens
    position.check_times(spec.layer_specs(config.model), f"{field}.prompt_tokens + new_tokens: {times}", times)


def check_texts(ask: ConfigDict, field: str, texts: Sequence[np.ndarray], tokenizer=None) -> None:
    """Raises UserError for too few texts of ask.prompt_tokens. tokenizer: not read."""
    wanted, found = _needed(ask), len(_long_enough(ask, texts))
    if found < wanted:
        raise UserError(
            f"{field}: {wanted} texts of at least {ask.prompt_tokens} tokens are asked for, and the validation texts "
            f"have {found}; choose fewer texts or branches, or shorter beginnings"
        )


def sampling(ask: ConfigDict) -> Sampling:
    return Sampling(temperature=ask.temperature, seed=SEED)


def row_length(ask: ConfigDict) -> int:
    """T: tokens of the largest group, to which all rows that are read have room."""
    return _group_length(ask, max(ask.branches))


def _group_length(ask: ConfigDict, n: int) -> int:
    """Tokens of a group of n branches."""
    shared = ask.prompt == "shared"
    return ask.prompt_tokens * (1 if shared else n) + n * ask.new_tokens


def _needed(ask: ConfigDict) -> int:
    """Texts to begin with. Of branches that each have their own, the r-th of group i has text i + r at every n."""
    return ask.texts if ask.prompt == "shared" else ask.texts + max(ask.branches) - 1


def _long_enough(ask: ConfigDict, texts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The first texts, in an order that only their number decides, that have ask.prompt_tokens."""
    found, order = [], np.random.default_rng(SEED).permutation(len(texts))
    for i in order:
        if len(text := texts[i]) >= ask.prompt_tokens:
            found.append(np.asarray(text[: ask.prompt_tokens], np.int32))
        if len(found) == _needed(ask):
            break
    return found


def begun(ask: ConfigDict, texts: Sequence[np.ndarray], n: int) -> np.ndarray:
    """What each branch begins with, int32 [G, n, P]."""
    found = np.stack(_long_enough(ask, texts))
    places_Gn = np.arange(ask.texts)[:, None] + (0 if ask.prompt == "shared" else 1) * np.arange(n)
    return found[places_Gn]


def decode(
    config: ConfigDict, ask: ConfigDict, model, texts, tokenizer, mesh, values: Sequence[int], stop: Callable[[], None]
) -> Iterator[Decoded]:
    """What is found at each number of branches, one after another. stop(): raises where the work is to end. config,
    tokenizer: not read."""
    engine = None
    for n in values:
        engine = engine or _engine(ask, model, begun(ask, texts, 1), stop)
        drawn = draw(ask, engine, begun(ask, texts, n), stop)
        alone, attended, moved, executable = np.zeros(2), np.zeros(2), 0.0, None
        for batch in _alone(ask, drawn):
            placed = lab_mesh.place(batch, mesh)
            executable = compiled.evaluation_step(model, placed, mesh)
            nats, _, tokens = jax.device_get(executable(model, placed))
            alone += nats, tokens
            stop()
        for parallel in _parallel(ask, drawn) if n > 1 else ():
            placed = lab_mesh.place(parallel, mesh)
            executable = compiled.executable(_leak, mesh, model, placed)
            share, kl = jax.device_get(executable(model, placed))
            attended += share, parallel.asking.sum()
            moved += float(kl)
            stop()
        swapped = ask.texts * (n - 1) * ask.new_tokens
        further = {
            "loss_alone": float(alone[0] / alone[1]),
            "attention_on_others": _finite(attended[0] / attended[1]) if n > 1 else None,  # at 1 there are none
            "swap_kl": moved / swapped if n > 1 else None,
            "groups": ask.texts,
        }
        loss, accuracy, ids = -float(drawn.log_p_GnN.mean()), float(drawn.likeliest_GnN.mean()), drawn.ids_GnN.ravel()
        yield Decoded(n, loss, accuracy, len(ids), len(ids), drawn.seconds, further, ids, executable)


def _finite(x: float) -> float | None:
    """None where no layer's attention can be read."""
    return float(x) if np.isfinite(x) else None


def _engine(ask: ConfigDict, model, begun_G1P: np.ndarray, stop) -> Engine:
    """One for all numbers of branches, whose programs are compiled."""
    n, P, N = max(ask.branches), ask.prompt_tokens, ask.new_tokens
    length = needed_for(P, [0] * n, N) if ask.prompt == "shared" else needed_for(0, [P] * n, N)
    model = jax.tree.map(lambda w: w, model)
    model.execution = model.execution._replace(implementation="auto")  # what a study takes need not know of limits
    engine = Engine(model, rows=ask.rows, length=length, branches=n, alternatives=1)
    draw(ask, engine, begun_G1P[:1], stop)
    return engine


def draw(ask: ConfigDict, engine: Engine, begun_GnP: np.ndarray, stop: Callable[[], None]) -> Drawn:
    """What branches go on with: random numbers are those of the group's number, of the branch and of the step."""
    (G, n, _), N, start = begun_GnP.shape, ask.new_tokens, time.perf_counter()
    options, group = dict(sampling=sampling(ask), most_tokens=N, alternatives=1), {}
    for i, begun_nP in enumerate(begun_GnP):
        if ask.prompt == "shared":
            group[engine.submit(begun_nP[0], branches=n, stream=i, **options)] = i
        else:
            group[engine.submit([], branches=n, texts=begun_nP, stream=i, **options)] = i
    found = [[[] for _ in range(n)] for _ in range(G)]
    while engine.busy:
        for event in engine.step():
            likeliest = event.token == event.likeliest[0][0]
            found[group[event.request]][event.branch - 1].append((event.token, event.log_p, likeliest))
        stop()
    ids_GnN, log_p_GnN, likeliest_GnN = np.moveaxis(np.array(found, np.float64), -1, 0)
    return Drawn(begun_GnP, ids_GnN.astype(np.int32), log_p_GnN, likeliest_GnN, time.perf_counter() - start)


def _alone(ask: ConfigDict, drawn: Drawn) -> Iterator[Batch]:
    """Every branch as an ordinary text, as many in a row as fit; labels are what was generated."""
    texts = drawn.texts_GnX.reshape(-1, drawn.texts_GnX.shape[-1])
    T, in_row = row_length(ask), row_length(ask) // texts.shape[1]
    for first in range(0, len(texts), in_row * ask.rows):
        rows = [texts[at : at + in_row] for at in range(first, min(first + in_row * ask.rows, len(texts)), in_row)]
        packed = [
            interleave(row, [1] * len(row), T, np.zeros(len(row), int), np.ones(len(row), int), align="left",
                       prompt="none") for row in rows
        ]  # fmt: skip
        at = _stacked(ask, [row.coordinates for row in packed])
        tokens, labels = (_filled(ask, [getattr(row, name) for row in packed]) for name in ("tokens", "labels"))
        generated = (at.segment >= 0) & (at.time >= ask.prompt_tokens - 1)
        yield Batch(tokens, np.where(generated, labels, -1), at)


class Swap(NamedTuple):
    """Groups as they were decoded, int32 [B, T]: tokens; the same with one branch of each group swapped; coordinates.
    asking: generated tokens; staying: those of branches that are not swapped."""

    tokens: jax.Array | np.ndarray
    swapped: jax.Array | np.ndarray
    coordinates: Coordinates
    asking: jax.Array | np.ndarray
    staying: jax.Array | np.ndarray


def _parallel(ask: ConfigDict, drawn: Drawn) -> Iterator[Swap]:
    """All groups, as many in a row as fit. Of group i, branch 1 + i % n is swapped for that of the next group."""
    (G, n, _), T = drawn.texts_GnX.shape, row_length(ask)
    shared, in_row = ask.prompt == "shared", row_length(ask) // _group_length(ask, n)
    other_G = np.arange(G) % n
    texts_GnX, changed_GnX = drawn.texts_GnX, drawn.texts_GnX.copy()
    changed_GnX[np.arange(G), other_G] = np.roll(texts_GnX, -1, axis=0)[np.arange(G), other_G]

    def laid(texts_GnX, groups: range):
        own = ask.prompt_tokens if shared else 0
        texts = [text for i in groups for text in [*drawn.begun_GnP[i, :1]] * shared + [*texts_GnX[i, :, own:]]]
        slots = np.tile(np.arange(1 - shared, n + 1), len(groups))
        sizes, offsets = [n + shared] * len(groups), np.zeros(len(texts), int)
        return interleave(texts, sizes, T, offsets, slots, align="left", prompt="first" if shared else "none")

    for first in range(0, G, in_row * ask.rows):
        rows = [range(at, min(at + in_row, G)) for at in range(first, min(first + in_row * ask.rows, G), in_row)]
        packed, swapped = ([laid(texts, groups) for groups in rows] for texts in (texts_GnX, changed_GnX))
        at = _stacked(ask, [row.coordinates for row in packed])
        number_B = _filled(ask, [np.full(T, groups.start) for groups in rows])  # of a row's first group
        asking = (at.segment >= 0) & (at.branch >= 1) & (at.time >= ask.prompt_tokens)
        staying = asking & (at.branch != 1 + other_G[np.minimum(number_B + at.segment, G - 1)])
        tokens = (_filled(ask, [row.tokens for row in of]) for of in (packed, swapped))
        yield Swap(*tokens, at, asking, staying)


def _stacked(ask: ConfigDict, rows: Sequence[Coordinates]) -> Coordinates:
    """[B, T], with rows of padding behind them."""
    missing = Coordinates.padding(1, row_length(ask)).map(lambda x: x[0])
    return jax.tree.map(lambda *x: np.stack(x), *rows, *[missing] * (ask.rows - len(rows)))


def _filled(ask: ConfigDict, rows: Sequence[np.ndarray]) -> np.ndarray:
    """int32 [B, T], 0 in rows behind them."""
    return np.stack([*rows, *[np.zeros(row_length(ask), np.int32)] * (ask.rows - len(rows))]).astype(np.int32)


def leak(model, of: Swap) -> tuple[jax.Array, jax.Array]:
    """(the attention on tokens of other branches, summed over `asking` tokens, a mean over heads and the layers that
    can be read, nan if none; KL(before || after the swap), summed over `staying` tokens)."""
    at, masses = of.coordinates, []
    others_BTS = (at.branch[:, :, None] != at.branch[:, None, :]) & (at.branch[:, None, :] > 0)
    for block, view, before, _ in instruments.each_layer(model, of.tokens, at):
        if instruments.readable(model, block, view):
            p_BGRTS = instruments.attention(block, before, view)[1]
            masses.append((p_BGRTS * others_BTS[:, None, None]).sum(-1).mean((1, 2)))
    attended_BT = sum(masses) / len(masses) if masses else jnp.full(of.tokens.shape, jnp.nan)
    # One body for both, so that logits that nothing has changed are the same to the bit.
    z_2BTC = jax.lax.map(lambda tokens: model(tokens, at), jnp.stack([of.tokens, of.swapped]))
    before_BTC, after_BTC = jax.nn.log_softmax(z_2BTC)
    kl_BT = (jnp.exp(before_BTC) * (before_BTC - after_BTC)).sum(-1)
    return jnp.sum(attended_BT, where=of.asking), jnp.sum(kl_BT, where=of.staying)


_leak = jax.jit(leak)
