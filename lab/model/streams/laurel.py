"""LAuReL (arXiv 2411.07501): a weighted residual that a low-rank map augments."""

import jax
from flax import nnx

from lab.model import parameter
from lab.model.streams.stream import Stream
from lab.options import Option


class Augmented(nnx.Module):
    """a f + b (x + x A B), A D x R from N(0, 1/D), B R x D and zero at the start (RW and LR, equations 2 and 3)."""

    def __init__(self, model, key: jax.Array):
        self.a, self.b = (parameter.mixing((1,), 1.0) for _ in range(2))
        self.A = parameter.mixing_matrix(key, (model.dim, model.stream.rank), spread=model.dim**-0.5)
        self.B = parameter.mixing((model.stream.rank, model.dim))

    def __call__(self, x_BTD, f_BTD):
        A_DR, B_RD = (w[...].astype(x_BTD.dtype) for w in (self.A, self.B))
        return (self.a[...] * f_BTD + self.b[...] * (x_BTD + x_BTD @ A_DR @ B_RD)).astype(x_BTD.dtype)


class AugmentedPair(nnx.Module):
    """Those of a layer's two sublayers."""

    def __init__(self, model, key: jax.Array):
        mixer, feedforward = jax.random.split(key)
        self.mixer, self.feedforward = Augmented(model, mixer), Augmented(model, feedforward)


class Laurel(Stream):
    """Both sublayers have an augmented residual of their own."""

    options = {"rank": Option(0, "of what is added to the residual, such as model.dim / 16", least=1)}

    @staticmethod
    def of_layer(model, key, m):
        return AugmentedPair(model, key)

    def layer(self, x_BTD, block, view, cache, *, m):
        a_BTD, cache = block.mix(x_BTD, view, cache)
        h_BTD = block.stream.mixer(x_BTD, a_BTD)
        return block.stream.feedforward(h_BTD, block.feed(h_BTD)), cache
