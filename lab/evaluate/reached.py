"""Whether a method that stretches a model reaches its attention: it changes logits beyond L, and none where it says so.

Asked before anything is scored: a patch that does nothing gives the numbers of the plain model under another name.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lab.errors import UserError
from lab.evaluate import long, passes
from lab.evaluate.long import LongRows
from lab.evaluate.passes import Pass
from lab.model import spec
from lab.model.position_maps import chunks_of, window_of
from lab.train.step import Scored

TOLERANCE = 1e-5  # of logits, in units of the largest; of narrower numbers, some of their steps
STEPS = 8
NEVER = 2**31 - 1

# The first so many tokens of a text whose logits a position map leaves as they are, of config.model.position.
EXACT: dict[str, Callable[[ConfigDict], int]] = {
    "none": lambda position: NEVER,
    "hybrid": lambda position: position.trained,
    "rerope": window_of,
    "leaky": window_of,
    "self-extend": window_of,
    "dca": lambda position: chunks_of(position)[1],
    "lm-infinite": lambda position: min(window_of(position), position.trained),
    "streaming": window_of,
}

# Fields of a position that leave logits near the start as they are; the index and the time of a single text are one.
LEFT = {"map", "log_n", "trained", "length", "unselected", "temperature", "temperature_step"}


def exact(changed: ConfigDict, plain: ConfigDict) -> int:
    """How many tokens from the start the method promises to leave as they are in the plain model; 0: none. A frequency
    map promises nothing. changed, plain: config.model with and without it."""
    both = [spec.layer_specs(model) for model in (changed, plain)]
    return min(_exact(*(specs[m % len(specs)] for specs in both)) for m in range(plain.layers))


def _exact(changed: ConfigDict, plain: ConfigDict) -> int:
    """The same of a layer."""
    differing = {name for name in plain.position if plain.position[name] != changed.position[name]}
    others = any(plain[name] != changed[name] for name in plain if name not in ("position", "pattern"))
    if others or differing - LEFT:
        return 0
    promised = EXACT[changed.position.map.name](changed.position) if "map" in differing else NEVER
    if "log_n" in differing:
        promised = min(promised, changed.position.trained)
    if differing & {"temperature", "temperature_step"}:
        promised = min(promised, changed.position.temperature_step - 1)
    return promised if plain.position.map.name == "none" else 0


def check(name: str, plain: ConfigDict, changed: ConfigDict, models, of: LongRows, how: Pass, mesh, stop) -> None:
    """Raises UserError, naming the ask, where the method of its overrides changes nothing beyond L, or something where
    it promises not to. plain, changed: configs; models: both models, in that order. of: rows of more than L tokens, the
    first call of which is read, to a chunk beyond L."""
    asked = plain.evaluate[name]
    L = long.trained(plain, asked)
    if (of.tokens >= 0).sum(1).max() <= L:
        return  # nothing that is read lies beyond L
    tokens, _ = next(passes.calls(of, how))
    end = min(-(-(L + 1) // how.chunk) + 1, tokens.shape[1] // how.chunk) * how.chunk
    tokens = tokens[:, :end]
    labels = np.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    without, with_it = (passes.score(model, tokens, labels, how, mesh, stop) for model in models)
    told = f"evaluate.{name}.model sets {', '.join(f'{field} = {value!r}' for field, value in asked.model)}"
    judge(told, without, with_it, tokens >= 0, exact(changed.model, plain.model), L, plain.model.compute)


def judge(told: str, without: Scored, with_it: Scored, real_BT, promised: int, L: int, compute: str) -> None:
    """The same of what both passes gave: of each token the largest logit, and the loss of its label."""
    step = float(jnp.finfo(jnp.dtype(compute)).eps)
    scale = max(1.0, float(np.abs(np.where(real_BT, without.top, 0)).max()))
    tolerance = scale * max(TOLERANCE, STEPS * step if step > 1e-6 else 0)
    moved_BT = np.maximum(np.abs(with_it.top - without.top), np.abs(with_it.nats - without.nats))
    moved_BT = np.where(real_BT, moved_BT, 0)
    inside, beyond = moved_BT[:, : min(promised, L)].max(initial=0), moved_BT[:, L:].max(initial=0)
    if inside > tolerance:
        raise UserError(
            f"{told}, which is to leave the first {min(promised, L)} tokens as they are, and moves their logits by "
            f"{inside:.2g}: it is not what it is called"
        )
    if not beyond > tolerance:
        raise UserError(
            f"{told}, and logits beyond position.trained = {L} move by {beyond:.2g} at most: the method never reached "
            "attention; see that it acts on the layers of this model, and that its factor is not 1"
        )
