"""Hyper-connections: several copies of the stream, which sublayers read, write and mix by learned weights.

N copies. Each sublayer reads one vector pre H, adds post_n y to copy n of what res makes of H.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lab.model import norm, parameter
from lab.model.streams.stream import Stream
from lab.options import Option


class Hyper(nnx.Module):
    """Of one sublayer, number s: (pre, post, res) for each token (arXiv 2409.19606, equations 10 to 13).

    [pre, res] = A + s_a tanh(n(H) W_a), post = b + s_b tanh(n(H) W_b). At the start copy s % N is read, the output
    goes to every copy, copies keep to themselves, and no token changes that.
    """

    def __init__(self, model, s: jax.Array, key: jax.Array):
        N = model.stream.copies
        self.norm = norm.make(model, model.dim)
        self.A = parameter.mixing_start(jnp.concatenate([jax.nn.one_hot(s % N, N)[:, None], jnp.eye(N)], axis=1))
        self.b = parameter.mixing((N,), 1.0)
        self.w_a, self.w_b = parameter.mixing((model.dim, N + 1)), parameter.mixing((model.dim, 1))
        self.s_a, self.s_b = (parameter.mixing((1,), 0.01) for _ in range(2))

    def __call__(self, H_BTND):
        normed = self.norm(H_BTND)
        A_BTNX = self.A[...] + self.s_a[...] * jnp.tanh(normed @ self.w_a[...])
        post_BTN = self.b[...] + self.s_b[...] * jnp.tanh(normed @ self.w_b[...])[..., 0]
        return A_BTNX[..., 0], post_BTN, A_BTNX[..., 1:]


class Constrained(nnx.Module):
    """mHC (arXiv 2512.24880, equations 7 to 9): pre in 0..1, post in 0..2, res doubly stochastic.

    With x the copies of a token as one vector, RMS-normed: pre = sigmoid(a x W + b), post = 2 sigmoid(..), and
    res = Sinkhorn(exp(..)), 20 steps. Biases start near where hyper-connections do, W is from N(0, 0.02^2).
    """

    def __init__(self, model, s: jax.Array, key: jax.Array):
        N = model.stream.copies
        self.norm = norm.make(model, N * model.dim)
        self.w = parameter.mixing_matrix(key, (N * model.dim, N * (N + 2)))
        self.a = parameter.mixing((3,), 0.01)
        self.b_pre = parameter.mixing_start(8.0 * jax.nn.one_hot(s % N, N) - 4.0)
        self.b_post = parameter.mixing((N,))
        self.b_res = parameter.mixing_start(8.0 * jnp.eye(N) - 8.0)

    def __call__(self, H_BTND):
        *shape, N, _ = H_BTND.shape
        inferred = self.norm(H_BTND.reshape(*shape, -1)) @ self.w[...]
        pre, post, res = jnp.split(inferred, [N, 2 * N], axis=-1)
        a_pre, a_post, a_res = self.a[...]
        pre_BTN = jax.nn.sigmoid(a_pre * pre + self.b_pre[...])
        post_BTN = 2 * jax.nn.sigmoid(a_post * post + self.b_post[...])
        res_BTNN = sinkhorn(jnp.exp(a_res * res.reshape(*shape, N, N) + self.b_res[...]))
        return pre_BTN, post_BTN, res_BTNN.swapaxes(-1, -2)  # the paper's res multiplies the copies from the left


def sinkhorn(M, steps: int = 20):
    """A positive matrix with its columns and then its rows divided by their sums, again and again."""

    def step(_, M):
        M = M / M.sum(-2, keepdims=True)
        return M / M.sum(-1, keepdims=True)

    return jax.lax.fori_loop(0, steps, step, M)


class Connections(nnx.Module):
    """Those of a layer's two sublayers."""

    def __init__(self, connection: type, model, key: jax.Array, m: jax.Array):
        mixer, feedforward = jax.random.split(key)
        self.mixer = connection(model, 2 * m, mixer)
        self.feedforward = connection(model, 2 * m + 1, feedforward)


class HyperConnections(Stream):
    """The dynamic form. The state is [B, T, N, D], its copies alike at the start and summed at the end."""

    options = {"copies": Option(0, "of the stream, such as 4", least=1)}
    connection = Hyper

    def __init__(self, model, key: jax.Array):
        super().__init__(model, key)
        self.copies = model.stream.copies

    @classmethod
    def of_layer(cls, model, key, m):
        return Connections(cls.connection, model, key, m)

    def start(self, x_BTD, cache):
        return jnp.repeat(x_BTD[:, :, None], self.copies, axis=2)

    def layer(self, H_BTND, block, view, cache, *, m):
        wide = jnp.promote_types(H_BTND.dtype, jnp.float32)
        pre_BTN, post_BTN, res_BTNM = block.stream.mixer(H_BTND.astype(wide))
        y_BTD, cache = block.mix(read(pre_BTN, H_BTND), view, cache)
        H_BTND = written(post_BTN, y_BTD, res_BTNM, H_BTND)
        pre_BTN, post_BTN, res_BTNM = block.stream.feedforward(H_BTND.astype(wide))
        y_BTD = block.feed(read(pre_BTN, H_BTND))
        return written(post_BTN, y_BTD, res_BTNM, H_BTND), cache

    def finish(self, H_BTND):
        return H_BTND.sum(2), ()

    def work_per_token(self, blocks: list, visible: list[float]) -> float:
        """Each copy is multiplied with the weights that blocks count once."""
        sites = [site for b in blocks for site in (b.stream.mixer, b.stream.feedforward)]
        return sum((self.copies - 1) * (site.w_a.size + site.w_b.size) - site.A.size for site in sites)


class ConstrainedHyperConnections(HyperConnections):
    """mHC."""

    connection = Constrained

    def work_per_token(self, blocks: list, visible: list[float]) -> float:
        return -sum(b.stream.mixer.b_res.size + b.stream.feedforward.b_res.size for b in blocks)


def read(pre_BTN, H_BTND):
    """sum_n pre_n H_n."""
    return jnp.einsum("btn,btnd->btd", pre_BTN, H_BTND).astype(H_BTND.dtype)


def written(post_BTN, y_BTD, res_BTNM, H_BTND):
    """H'_m = post_m y + sum_n res_nm H_n."""
    mixed = jnp.einsum("btnm,btnd->btmd", res_BTNM, H_BTND)
    return (mixed + post_BTN[..., None] * y_BTD[:, :, None]).astype(H_BTND.dtype)
