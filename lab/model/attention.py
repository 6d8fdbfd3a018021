"""Softmax attention over coordinates: project -> attend -> output.

A mixer says what a token keeps (its cache) and how keys and values are read from that; the rest is shared.
Letters as in lab.model.transformer, and V value head width, R rotated dims at the end of a head.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lab.errors import UserError, choose
from lab.kernels import Bias
from lab.kernels.rotary import rotate
from lab.kernels.rules import Rule
from lab.model import init, norm, parameter, position, relative, stretched
from lab.model.attending import View, attend_over_mesh
from lab.options import Option

Kept = tuple[jax.Array, ...]  # what a token keeps, arrays [B, S, groups, width]


class Softmax(nnx.Module):
    """What softmax mixers share. Queries and output may be of low rank (mixer.q_rank, mixer.o_rank). No biases, but for
    the subclass that has the option.

    Options: the output gate (arXiv 2505.06708, G1: elementwise, after attention), a learned sink in the softmax's
    denominator (gpt-oss, arXiv 2508.10925), RMSNorm of queries and keys before they rotate (arXiv 2302.05442).
    """

    options: ClassVar[dict[str, Option]] = {
        "heads": Option(4, "query heads", least=1),
        "kv_heads": Option(1, "groups of key and value heads", least=1),
        "head_dim": Option(24, "width of queries and keys", least=1),
        "v_head_dim": Option(0, "width of values; 0: head_dim", least=0),
        "q_rank": Option(0, "of a low-rank query projection; 0: full", least=0),
        "o_rank": Option(0, "of a low-rank output projection; 0: full", least=0),
        "rotate": Option("auto", "which of q, k, v, o rotate, as in qkvo; none; or auto: what the mixer means"),
        "softmax_scale": Option(0.0, "of the scores; 0: head_dim^-1/2", least=0),
        "softcap": Option(0.0, "scores s become c tanh(s / c); 0: none", least=0),
        "output_gate": Option(False, "gates the output, elementwise, after attention"),
        "sink": Option(False, "a learned score in the softmax's denominator, for each head"),
        "qk_norm": Option(False, "norms queries and keys before they rotate"),
        "qk_norm_over": Option("head", "what is normed at once; heads: all of a token's", choices=("head", "heads")),
    }
    rules: ClassVar[tuple[str, ...] | None] = None  # the mask rules that it supports; None: every one
    in_order: ClassVar[bool] = False  # whether tokens must come in the order of their row
    attends: ClassVar[bool] = True  # whether it has a use for tile lists, and probabilities to drop
    rotates: ClassVar[str] = "qkvo"  # the projections that may rotate
    rotates_unasked: ClassVar[str] = "qk"  # those that do where mixer.rotate is "auto"
    heads_each: ClassVar[int] = 1  # attention maps for each head of the output
    adds: ClassVar[tuple[type, ...]] = (Bias, relative.Tables)  # what a position may add to its scores
    stretches: ClassVar[bool] = False  # whether its queries may grow, and its pairs turn by several maps of time

    def __init__(self, model, rule: Rule, key: jax.Array):
        q, _, _, o = jax.random.split(key, 4)
        q_down, o_up, gate = further_keys(key, 3)
        options = model.mixer
        D, H = model.dim, options.heads
        K, V = self.widths(model)
        self.heads, self.kv_heads, self.head_dim, self.v_head_dim = self.heads_each * H, options.kv_heads, K, V
        self.rotary_dim = position.rotary_dim(model)
        self.rotate = "" if stretched.banded(model) else self.rotated(model)  # bands rotate themselves
        q_rank, o_rank = options.q_rank, options.o_rank
        self.q_down = init.matrix(model, "latent", q_down, (D, q_rank), ("embed", "rank")) if q_rank else None
        self.q_latent_norm = self.norm_of_query_latent(model) if q_rank else None
        q_axes = ("rank" if q_rank else "embed", "heads", "head_dim")
        self.q = init.matrix(model, "query", q, (q_rank or D, self.heads, K), q_axes)
        o_axes = ("heads", "head_dim", "rank" if o_rank else "embed")
        self.o = init.matrix(model, "latent" if o_rank else "output", o, (H, V, o_rank or D), o_axes, inputs=2)
        self.o_up = init.matrix(model, "output", o_up, (o_rank, D), ("rank", "embed")) if o_rank else None
        self.q_bias = self.bias_of(model, self.heads * K, "heads")
        self.o_bias = self.bias_of(model, D, "channel", among=("all",))
        self.output_gate = (
            parameter.matrix(gate, (D, H, V), ("embed", "heads", "head_dim")) if options.output_gate else None
        )
        self.sink = parameter.bias(self.heads, "heads") if options.sink else None
        of = lambda name: options[name] if name in self.options else None  # noqa: E731  other layers may read it
        self.norms_heads = of("qk_norm_over") == "heads"
        at_once = (self.heads, self.kv_heads) if self.norms_heads else (1, 1)
        self.q_norm, self.k_norm = (norm.make(model, n * K) if of("qk_norm") else None for n in at_once)
        self.biased, self.added = bool(position.of(model).added), position.added(model, self.heads, (K, V), key)
        self.rule = rule
        self.scale = options.softmax_scale or K**-0.5
        self.softcap = of("softcap") or 0.0

    @classmethod
    def bias_of(cls, model, size: int, axis: str, among: tuple[str, ...] = ("qkv", "all")) -> nnx.Param | None:
        """A bias where mixer.bias is among these, of a mixer that reads it."""
        return parameter.bias(size, axis) if "bias" in cls.options and model.mixer.bias in among else None

    @staticmethod
    def norm_of_query_latent(model) -> nnx.Module | None:
        """The norm of queries of low rank, where the mixer has one."""
        return None

    @staticmethod
    def widths(model) -> tuple[int, int]:
        """(K, V) of a head."""
        return model.mixer.head_dim, model.mixer.v_head_dim or model.mixer.head_dim

    @classmethod
    def rotated(cls, model) -> str:
        """The projections that rotate, some of the letters q, k, v, o; none under a position that rotates nothing."""
        if not position.of(model).frequencies:
            return ""
        asked = model.mixer.rotate
        return {"auto": cls.rotates_unasked, "none": ""}.get(asked, asked)

    @classmethod
    def check(cls, model) -> None:
        """Refuses what the mixer cannot be, naming the field and the valid choices."""
        heads, groups = model.mixer.heads, model.mixer.kv_heads
        if heads % groups:
            valid = [g for g in range(1, heads + 1) if heads % g == 0]
            raise UserError(
                f"model.mixer.heads = {heads} is not divisible by model.mixer.kv_heads = {groups}; "
                f"choose model.mixer.kv_heads among: {', '.join(map(str, valid))}"
            )
        check_rule(cls, model)
        position.check_mixer(model, cls.adds)
        check_rotated(cls, model)

    @property
    def cached(self) -> tuple[tuple[int, int], ...]:
        """(groups, width) of each array that a token keeps."""
        return (self.kv_heads, self.head_dim), (self.kv_heads, self.v_head_dim)

    @property
    def state_numbers(self) -> int:
        """Numbers kept for a row however long it is."""
        return 0

    @property
    def work_per_key(self) -> int:
        """Multiplications for one query and one key that it sees, of every head: its score, its part of the output."""
        return self.heads * (self.head_dim + self.v_head_dim)

    @property
    def work_per_token(self) -> int:
        """Multiplications for a token beside those with weights and with keys."""
        return 0 if self.added is None else self.heads * self.added.work_per_head

    def init_cache(self, batch: int, length: int, dtype, branches: int = 1) -> Kept:
        """Empty slots; a stacked mixer gives a stacked cache. Any slot holds any branch."""
        stack = self.q.shape[:-3]
        return tuple(jnp.zeros((*stack, batch, length, *shape), dtype) for shape in self.cached)

    def fork(self, cache: Kept, source, target) -> Kept:
        """The cache as it is: tokens stay where they lie, and the rule says which branch sees them."""
        return cache

    def join(self, cache: Kept, sources, target) -> Kept:
        """The same."""
        return cache

    def turned(self, name: str, x_BTHK, rotation):
        """Queries, keys or values, rotated if mixer.rotate has their letter."""
        return rotate(x_BTHK, rotation) if name in self.rotate else x_BTHK

    def queries(self, x_BTD):
        """Queries [B, T, H, K], not rotated yet."""
        if self.q_down is not None:
            x_BTD = x_BTD @ self.q_down[...].astype(x_BTD.dtype)
        if self.q_latent_norm is not None:
            x_BTD = self.q_latent_norm(x_BTD)
        q_BTHK = heads(x_BTD, self.q, self.q_bias)
        return self.normed(self.q_norm, q_BTHK)

    def normed(self, norm_of: nnx.Module | None, x_BTHK):
        """Queries or keys, each head or all of a token's at once; as they are without a norm."""
        if norm_of is None or not self.norms_heads:
            return x_BTHK if norm_of is None else norm_of(x_BTHK)
        return norm_of(x_BTHK.reshape(*x_BTHK.shape[:2], -1)).reshape(x_BTHK.shape)

    def keep(self, x_BTD, rotation) -> Kept:
        """What tokens keep of themselves."""
        raise NotImplementedError

    def read(self, kept: Kept):
        """Keys [B, S, G, K] and values [B, S, G, V] of what was kept."""
        return kept

    def remember(self, x_BTD, view: View, cache: Kept | None) -> tuple[Kept, Kept | None]:
        """What every token that may be seen has kept, and the new cache."""
        return self.store(self.keep(x_BTD, view.rotation), view, cache)

    def store(self, new: Kept, view: View, cache: Kept | None) -> tuple[Kept, Kept | None]:
        """The same, of what new tokens keep."""
        if cache is None:
            return new, None
        cache = tuple(view.put(old, x) for old, x in zip(cache, new, strict=True))
        return cache, cache

    def attend(self, q_BTHK, kept: Kept, view: View, decoding: bool):
        """What each query draws from what was kept [B, T, H, V], and its log normaliser [B, T, H]."""
        return attend_over_mesh(q_BTHK, *self.read(kept), view, self)

    def merge(self, o_BTHV, x_BTD):
        """The heads of the output from those that attended."""
        return o_BTHV

    def output(self, o_BTHV, lse_BTH, x_BTD, rotation):
        """The mixer's output [B, T, D], of what `attend` gave."""
        if self.sink is not None:  # exp(lse) / (exp(lse) + exp(sink)): as if a key of score `sink` held nothing
            o_BTHV = o_BTHV * jax.nn.sigmoid(lse_BTH - self.sink[...])[..., None].astype(o_BTHV.dtype)
        if "o" in self.rotate:
            cos, sin = rotation
            o_BTHV = rotate(o_BTHV, (cos, -sin))
        o_BTHV = self.merge(o_BTHV, x_BTD)
        if self.output_gate is not None:
            o_BTHV = o_BTHV * jax.nn.sigmoid(heads(x_BTD, self.output_gate))
        y_BTD = jnp.einsum("bthk,hkd->btd", o_BTHV, self.o[...].astype(o_BTHV.dtype))
        y_BTD = y_BTD if self.o_up is None else y_BTD @ self.o_up[...].astype(y_BTD.dtype)
        return y_BTD if self.o_bias is None else y_BTD + self.o_bias[...].astype(y_BTD.dtype)

    def project(self, x_BTD, view: View, cache: Kept | None) -> tuple[jax.Array, Kept, Kept | None]:
        """Queries, not rotated yet, what every token that may be seen has kept, and the new cache."""
        return self.queries(x_BTD), *self.remember(x_BTD, view, cache)

    def __call__(self, x_BTD: jax.Array, view: View, cache: Kept | None = None) -> tuple[jax.Array, Kept | None]:
        q_BTHK, kept, cache = self.project(x_BTD, view, cache)
        o_BTHV, lse_BTH = self.attend(q_BTHK, kept, view, decoding=cache is not None)
        return self.output(o_BTHV, lse_BTH, x_BTD, view.rotation), cache


class Attention(Softmax):
    """H query heads over G key-value heads: MHA at G = H, MQA at 1, GQA between (arXiv 2305.13245).

    position.dim < head_dim rotates only the end of each head (partial RoPE); mixer.rotate says which of q, k, v, o
    rotate, o by the inverse (VO-RoPE, kexue.fm/archives/10862). mixer.bias adds biases, zero at the start, to queries,
    keys and values before they are normed and rotate ("qkv"), and also to the output ("all").
    """

    options: ClassVar[dict[str, Option]] = Softmax.options | {
        "bias": Option("none", "of q, k and v, or of all four projections", choices=("none", "qkv", "all"))
    }
    stretches = True

    def __init__(self, model, rule: Rule, key: jax.Array):
        super().__init__(model, rule, key)
        _, k, v, _ = jax.random.split(key, 4)
        D, G, axes = model.dim, self.kv_heads, ("embed", "kv_heads", "head_dim")
        self.k = init.matrix(model, "key", k, (D, G, self.head_dim), axes)
        self.v = init.matrix(model, "value", v, (D, G, self.v_head_dim), axes)
        self.k_bias, self.v_bias = (
            self.bias_of(model, G * width, "kv_heads") for width in (self.head_dim, self.v_head_dim)
        )

    def keep(self, x_BTD, rotation) -> Kept:
        return self.keys(x_BTD, rotation), self.values(x_BTD, rotation)

    def keys(self, x_BTD, rotation):
        """Keys [B, T, G, K]. Here and for values x may be [B, T, G, D], an input for each group."""
        k_BTGK = heads(x_BTD, self.k, self.k_bias)
        return self.turned("k", self.normed(self.k_norm, k_BTGK), rotation)

    def values(self, x_BTD, rotation):
        """Values [B, T, G, V]."""
        return self.turned("v", heads(x_BTD, self.v, self.v_bias), rotation)


def further_keys(key: jax.Array, count: int, after: int = 0) -> list[jax.Array]:
    """Keys beside the four that every mixer splits: fold_in(key, i) is split(key, 4)[i], so these begin at 4."""
    return [jax.random.fold_in(key, 4 + after + i) for i in range(count)]


def check_rule(mixer, model) -> None:
    """Refuses the rules that a mixer does not support."""
    if mixer.rules:
        choose(f"model.rule of model.mixer.name = {model.mixer.name!r}", model.rule, mixer.rules)


def check_rotated(mixer: type[Softmax], model) -> None:
    """Refuses a mixer.rotate that is no subset of what the mixer can rotate, and rotations wider than the values."""
    letters = mixer.rotated(model)
    if not {*letters} <= {*mixer.rotates} or len({*letters}) < len(letters):
        raise UserError(
            f"model.mixer.rotate = {model.mixer.rotate!r}: model.mixer.name = {model.mixer.name!r} rotates auto, none, "
            f"or letters of {mixer.rotates!r}"
        )
    R, V = position.rotary_dim(model), mixer.widths(model)[1]
    if {*letters} & {*"vo"} and R > V:
        raise UserError(f"model.position.dim = {R} does not fit into values of width {V}; choose an even one up to {V}")


def heads(x_BTD, weight: nnx.Param | None, bias: nnx.Param | None = None):
    """x W + b for a weight [D, N, K] and a bias [N K], if there is one: N heads of K numbers for each token.

    x may be [B, T, N, D], one for each head. Without a weight one head of no width.
    """
    if weight is None:
        return jnp.zeros((*x_BTD.shape[:2], 1, 0), x_BTD.dtype)
    equation = "btd,dnk->btnk" if x_BTD.ndim == 3 else "btnd,dnk->btnk"
    y_BTNK = jnp.einsum(equation, x_BTD, weight[...].astype(x_BTD.dtype))
    return y_BTNK if bias is None else y_BTNK + bias[...].reshape(weight.shape[1:]).astype(y_BTNK.dtype)
