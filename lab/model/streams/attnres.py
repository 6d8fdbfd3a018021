"""AttnRes (arXiv 2603.15031): every sublayer reads a softmax over what came before, with a learned query.

y_0 is the embedding, y_1, y_2, ... what sublayers gave: attention and feed-forward of layer 0, of layer 1, ...
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lab.errors import UserError
from lab.model import parameter
from lab.model.norm import rms_normed
from lab.model.streams.stream import Stream
from lab.options import Option


class BlockSums(NamedTuple):
    """Sums over the blocks so far, the embedding first, and that of the block at work; None where it has begun none."""

    blocks: tuple[jax.Array, ...]
    partial: jax.Array | None


class AttnRes(Stream):
    """h_l = sum_i softmax_i(w_l . n(y_i)) y_i, before sublayer l = 0..2L-1 and before the head; w = 0 at the start.

    n has no scale of its own: w would absorb it. Sublayer 0 has the embedding alone and needs no query.
    """

    grows = True
    reads = ("norm.eps",)

    def __init__(self, model, key: jax.Array):
        super().__init__(model, key)
        self.size = self.sublayers_of_block(model)
        self.w, self.eps = parameter.mixing((2 * model.layers, model.dim)), model.norm.eps

    @staticmethod
    def sublayers_of_block(model) -> int:
        return 1

    def start(self, x_BTD, cache):
        return BlockSums((x_BTD,), None)

    def layer(self, state: BlockSums, block, view, cache, *, m):
        y_BTD, cache = block.mix(self.read(state, 2 * m), view, cache)
        state = self.write(state, y_BTD, 2 * m)
        y_BTD = block.feed(self.read(state, 2 * m + 1))
        return self.write(state, y_BTD, 2 * m + 1), cache

    def finish(self, state: BlockSums):
        return self.read(state, len(self.w)), ()

    def read(self, state: BlockSums, s: int):
        """What sublayer s reads."""
        sources = [y for y in (*state.blocks, state.partial) if y is not None]
        if s == 0:
            return sources[0]
        scores = [rms_normed(y, self.eps) @ self.w[s - 1] for y in sources]
        weights = jax.nn.softmax(jnp.stack(scores), axis=0)
        return sum(w[..., None] * y for w, y in zip(weights, sources, strict=True)).astype(sources[0].dtype)

    def write(self, state: BlockSums, y_BTD, s: int) -> BlockSums:
        """The state after sublayer s: its block has grown, and may be whole."""
        partial = y_BTD if state.partial is None else state.partial + y_BTD
        return (
            BlockSums((*state.blocks, partial), None) if (s + 1) % self.size == 0 else BlockSums(state.blocks, partial)
        )

    def work_per_token(self, blocks: list, visible: list[float]) -> float:
        """A product of w with every source."""
        inner = range(1, 2 * len(blocks) + 1)
        return sum((1 + -(-s // self.size)) * self.w.shape[1] for s in inner)


class BlockAttnRes(AttnRes):
    """y_i are sums over blocks of layers, the last that of the block at work (section 3.2)."""

    options = {"blocks": Option(0, "sums that layers are cut into: a divisor of model.layers", least=1)}

    @staticmethod
    def sublayers_of_block(model) -> int:
        return 2 * model.layers // model.stream.blocks

    @classmethod
    def check(cls, model) -> None:
        if model.layers % model.stream.blocks:
            valid = [n for n in range(1, model.layers + 1) if model.layers % n == 0]
            raise UserError(
                f"model.stream.blocks = {model.stream.blocks} does not divide model.layers = {model.layers}; choose "
                f"one of: {', '.join(map(str, valid))}"
            )
