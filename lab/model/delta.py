"""A linear-time mixer: the gated delta net (arXiv 2412.06464), in chunks of a row."""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lab.errors import UserError
from lab.kernels import rules
from lab.kernels.rules import Rule
from lab.model import chains, init, mesh, norm, parameter, position
from lab.model.attending import View
from lab.model.attention import Softmax, check_rule, further_keys, heads
from lab.model.chains import Chains, faded

CHUNK = 64  # tokens that one step of the scan over a row takes


class DeltaState(NamedTuple):
    """What a row has become: s [B, H, K, V] in float32 or wider, and the segment [B] that it is of."""

    s_BHKV: jax.Array
    segment_B: jax.Array


class GatedDelta(nnx.Module):
    """S_t = alpha_t (I - beta_t k_t k_t^T) S_(t-1) + beta_t k_t v_t^T, o_t = S_t^T q_t (equation 10), for each head.

    alpha = exp(-exp(a) softplus(x w_a + b_a)), beta = sigmoid(x w_beta), q and k silu-activated and of unit length; the
    output is RMS-normed for each head and gated by silu(x W_g). Without the paper's short convolutions. A row holds its
    segments one after another, each in the order of its index; the state starts anew with each. Under the rule "causal"
    a segment is one chain of tokens; under "own_branch" its prompt is, and each branch goes on from there (chains.py).
    """

    options: ClassVar[dict] = {name: Softmax.options[name] for name in ("heads", "head_dim", "v_head_dim")}
    rules: ClassVar[tuple[str, ...]] = ("causal", "own_branch")
    in_order: ClassVar[bool] = True  # a token needs the one before it: a row cannot be cut over mesh.context
    attends: ClassVar[bool] = False
    adds: ClassVar[tuple] = ()
    stretches: ClassVar[bool] = False
    biased: ClassVar[bool] = False

    def __init__(self, model, rule: Rule, key: jax.Array):
        q, k, v, o = jax.random.split(key, 4)
        gate, alpha, beta = further_keys(key, 3)
        D, H, K = model.dim, model.mixer.heads, model.mixer.head_dim
        V = model.mixer.v_head_dim or K
        axes = ("embed", "heads", "head_dim")
        self.q, self.k = (init.matrix(model, "key", x, (D, H, K), axes) for x in (q, k))
        self.v = init.matrix(model, "value", v, (D, H, V), axes)
        self.output_gate = parameter.matrix(gate, (D, H, V), axes)
        self.alpha, self.beta = (parameter.matrix(x, (D, H), ("embed", "heads")) for x in (alpha, beta))
        self.alpha_log = parameter.bias(H, "heads")
        self.alpha_bias = parameter.bias(H, "heads", value=-4.0)  # alpha = 0.98: forgetting is learned
        self.norm = norm.make(model, V)
        self.o = init.matrix(model, "output", o, (H, V, D), ("heads", "head_dim", "embed"), inputs=2)
        self.heads, self.head_dim, self.v_head_dim = H, K, V
        self.rule = rule

    @classmethod
    def check(cls, model) -> None:
        check_rule(cls, model)
        position.check_mixer(model, cls.adds)

    cached: ClassVar[tuple] = ()
    work_per_key: ClassVar[int] = 0

    @property
    def state_numbers(self) -> int:
        """Numbers kept for a row however long it is; for each of its branches where they are chains of their own."""
        return self.heads * self.head_dim * self.v_head_dim

    @property
    def work_per_token(self) -> int:
        """Multiplications for a token beside those with weights: with the state, and with the tokens of its chunk."""
        K, V, states = self.head_dim, self.v_head_dim, 2 if self.branches_apart else 1
        return self.heads * (3 * K * V * states + CHUNK * (4 * K + 3 * V) // 2)

    @property
    def branches_apart(self) -> bool:
        """Whether each branch is a chain of its own."""
        return self.rule == rules.own_branch

    def init_cache(self, batch: int, length: int, dtype, branches: int = 1) -> DeltaState | Chains:
        """An empty state; a stacked mixer gives a stacked one. branches: the highest number that one may have."""
        stack, wide = self.q.shape[:-3], jnp.promote_types(dtype, jnp.float32)
        if self.branches_apart:
            return Chains.empty(1 + branches, batch, self.heads, self.head_dim, self.v_head_dim, wide, stack)
        s = jnp.zeros((*stack, batch, self.heads, self.head_dim, self.v_head_dim), wide)
        return DeltaState(s, jnp.full((*stack, batch), -1, jnp.int32))

    def fork(self, cache: DeltaState | Chains, source, target) -> DeltaState | Chains:
        """The cache in which branch `target` goes on from the state of branch `source` (chains.fork)."""
        return chains.fork(cache, source, target) if self.branches_apart else cache  # a segment is one chain there

    def join(self, cache: DeltaState | Chains, sources, target):
        """Refused: no state holds what two chains wrote."""
        raise UserError(
            "model.mixer.name = 'delta' cannot join branches: the state of a branch is no set of tokens; choose a "
            "mixer of softmax attention for every layer"
        )

    def __call__(
        self, x_BTD: jax.Array, view: View, cache: DeltaState | Chains | None = None
    ) -> tuple[jax.Array, DeltaState | Chains | None]:
        if mesh.current().get("context", 1) > 1:
            raise UserError(
                "run.mesh.context must be 1 where a layer runs along the row, as model.mixer.name = 'delta' does"
            )
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        start = self.init_cache(x_BTD.shape[0], 0, x_BTD.dtype) if cache is None else cache
        q_BTHK, k_BTHK = (unit(jax.nn.silu(heads(x_BTD, w).astype(wide))) for w in (self.q, self.k))
        v_BTHV = jax.nn.silu(heads(x_BTD, self.v).astype(wide))
        gate_BTH, beta_BTH = (jnp.einsum("btd,dh->bth", x_BTD.astype(wide), w[...]) for w in (self.alpha, self.beta))
        decay_BTH = -jnp.exp(self.alpha_log[...]) * jax.nn.softplus(gate_BTH + self.alpha_bias[...])
        inputs = q_BTHK * self.head_dim**-0.5, k_BTHK, v_BTHV, decay_BTH, jax.nn.sigmoid(beta_BTH)
        if self.branches_apart:
            o_BTHV, state = chains.delta_rule(*inputs, view.queries, start, CHUNK, whole=cache is None)
        else:
            o_BTHV, state = delta_rule(*inputs, view.queries.segment, start)
        o_BTHV = self.norm(o_BTHV.astype(x_BTD.dtype)) * jax.nn.silu(heads(x_BTD, self.output_gate))
        y_BTD = jnp.einsum("bthv,hvd->btd", o_BTHV, self.o[...].astype(o_BTHV.dtype))
        return y_BTD, None if cache is None else state


def delta_rule(q_BTHK, k_BTHK, v_BTHV, decay_BTH, beta_BTH, segment_BT, state: DeltaState):
    """The recurrence over whole rows, `decay` being log alpha: (o [B, T, H, V], the state after the last token).

    Padding (segment -1) changes no state and reads none.
    """
    B, T, H, _ = q_BTHK.shape
    size = min(CHUNK, T)
    real_BT = segment_BT >= 0
    q_BTHK = jnp.where(real_BT[..., None, None], q_BTHK, 0)
    decay_BTH, beta_BTH = (jnp.where(real_BT[..., None], x, 0) for x in (decay_BTH, beta_BTH))
    inputs = q_BTHK, k_BTHK, v_BTHV, decay_BTH, beta_BTH, carried_segment(segment_BT, state.segment_B)
    short = -T % size
    # What fills the last chunk is like padding at the end of the last segment.
    padded = (
        *(jnp.pad(x, ((0, 0), (0, short)) + ((0, 0),) * (x.ndim - 2)) for x in inputs[:-1]),
        jnp.pad(inputs[-1], ((0, 0), (0, short)), "edge"),
    )
    chunks = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 1, 0), padded)
    state, o_NBCHV = jax.lax.scan(lambda state, chunk: one_chunk(*chunk, state), state, chunks)
    return jnp.moveaxis(o_NBCHV, 0, 1).reshape(B, -1, H, v_BTHV.shape[-1])[:, :T], state


def one_chunk(q_BCHK, k_BCHK, v_BCHV, decay_BCH, beta_BCH, segment_BC, state: DeltaState):
    """(the state after a chunk of tokens c, its outputs [B, C, H, V]): equations 8 and 9 of the paper.

    What the tokens of the chunk write, given what those before them wrote, solves a triangular system.
    """
    q_BHCK, k_BHCK, v_BHCV = (x.swapaxes(1, 2) for x in (q_BCHK, k_BCHK, v_BCHV))
    beta_BHC1 = beta_BCH.swapaxes(1, 2)[..., None]
    goes_on_BC, to_end_BC = segment_BC == state.segment_B[:, None], segment_BC == segment_BC[:, -1:]
    earlier_BCc = jnp.tril(segment_BC[:, :, None] == segment_BC[:, None, :])
    # Log decay since the chunk or the segment began. As a product, no gradient of another segment rounds to a little.
    fall_BHC = jnp.einsum("bts,bsh->bht", earlier_BCc.astype(decay_BCH.dtype), decay_BCH, precision="highest")
    between_BHCc = faded(fall_BHC[..., :, None] - fall_BHC[..., None, :], earlier_BCc[:, None])
    since_BHC1 = faded(fall_BHC, goes_on_BC[:, None])[..., None]
    until_BHC1 = faded(fall_BHC[..., -1:] - fall_BHC, to_end_BC[:, None])[..., None]

    lower_BHCc = jnp.tril(beta_BHC1 * (k_BHCK @ k_BHCK.swapaxes(-1, -2)) * between_BHCc, -1)
    wanted_BHCV = beta_BHC1 * (v_BHCV - (since_BHC1 * k_BHCK) @ state.s_BHKV)
    written_BHCV = jax.lax.linalg.triangular_solve(
        lower_BHCc + jnp.eye(lower_BHCc.shape[-1], dtype=lower_BHCc.dtype),
        wanted_BHCV,
        left_side=True,
        lower=True,
        unit_diagonal=True,
    )
    o_BHCV = (since_BHC1 * q_BHCK) @ state.s_BHKV
    o_BHCV += (q_BHCK @ k_BHCK.swapaxes(-1, -2) * between_BHCc) @ written_BHCV
    s_BHKV = since_BHC1[..., -1:, :] * state.s_BHKV + (until_BHC1 * k_BHCK).swapaxes(-1, -2) @ written_BHCV
    return DeltaState(s_BHKV, segment_BC[:, -1]), o_BHCV.swapaxes(1, 2)


def carried_segment(segment_BT, before_B):
    """The segment of each token; of padding, that of the token before it."""
    place_BT = jax.lax.cummax(jnp.where(segment_BT >= 0, jnp.arange(segment_BT.shape[1]), -1), axis=1)
    found_BT = jnp.take_along_axis(segment_BT, jnp.maximum(place_BT, 0), axis=1)
    return jnp.where(place_BT >= 0, found_BT, before_B[:, None])


def unit(x):
    """Vectors of length one."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
