"""What a forward pass drops in training: numbers of the embedding, of what sublayers put out, and of attention.

A number's hash (lab.kernels.dropout) is of the seed and six words: step, layer, site, head, token, and its channel or
the token of its key. A token's word is the hash of (step, row, segment, branch, time).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lab.coordinates import Coordinates
from lab.kernels.dropout import Dropped, absorb, dropped, hashed

SITES = {"embedding": "embedding", "attention": "attention", "mixer": "residual", "feedforward": "residual"}  # by rate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """seed, step: int32. rates: float32 by name (embedding, attention, residual); one that is left out drops nothing,
    and is not in the program. rows: int32 [B, T], the row of each token among those of the whole step."""

    seed: jax.Array
    step: jax.Array
    rates: dict[str, jax.Array]
    rows: jax.Array | None = None

    def masks(self, at: Coordinates) -> "Masks":
        """Those of tokens [B, T]."""
        token_BT = hashed(self.seed, self.step, self.rows, at.segment, at.branch, at.time)
        return Masks(absorb(self.seed, self.step), token_BT, self.rates)


class Masks(NamedTuple):
    """state: of the hash after the step, and after the layer once `of_layer` is asked. token_BT: words of tokens."""

    state: jax.Array
    token_BT: jax.Array
    rates: dict[str, jax.Array]

    def of_layer(self, m) -> "Masks":
        """Those of layer m, an int or traced."""
        return self._replace(state=absorb(self.state, m))

    def of_layers(self, others: list["Masks"]) -> "Masks":
        """Those of several layers, whose heads attend in one call, layer after layer."""
        return self._replace(state=jnp.stack([other.state for other in others]))

    def drop(self, site: str, x_BTD):
        """x, with some of its channels dropped; itself where its rate is left out."""
        if (rate := self.rates.get(SITES[site])) is None:
            return x_BTD
        state = functools.reduce(absorb, (_number(site), 0), self.state)
        return dropped(x_BTD, absorb(state, self.token_BT)[..., None], jnp.arange(x_BTD.shape[-1]), rate)

    def of_attention(self, H: int) -> Dropped | None:
        """What attention of H heads drops: those of each layer that these are of, in turn."""
        if (rate := self.rates.get("attention")) is None:
            return None
        layers_L1 = absorb(jnp.reshape(self.state, (-1, 1)), _number("attention"))
        head_H = absorb(layers_L1, jnp.arange(H // len(layers_L1))).reshape(H)
        return Dropped(rate, head_H, self.token_BT, self.token_BT)


def _number(site: str) -> int:
    return [*SITES].index(site)
