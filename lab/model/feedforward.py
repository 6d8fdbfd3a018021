"""The feed-forward sublayer."""

import jax
from flax import nnx

from lab.model import parameter
from lab.options import Option


class SwiGLU(nnx.Module):
    """(swish(x W_gate) * x W_up) W_down, without biases (arXiv 2002.05202, equation 6)."""

    options = {"width": Option(256, "of the inner layer", least=1)}

    def __init__(self, model, key: jax.Array):
        D, F = model.dim, model.feedforward.width
        gate, up, down = jax.random.split(key, 3)
        self.gate = parameter.matrix(gate, (D, F), ("embed", "ffn"))
        self.up = parameter.matrix(up, (D, F), ("embed", "ffn"))
        self.down = parameter.matrix(down, (F, D), ("ffn", "embed"), gain=(2 * model.layers) ** -0.5)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_DF, up_DF, down_FD = (w[...].astype(x_BTD.dtype) for w in (self.gate, self.up, self.down))
        return (jax.nn.silu(x_BTD @ gate_DF) * (x_BTD @ up_DF)) @ down_FD


FEEDFORWARDS = {"swiglu": SwiGLU}
