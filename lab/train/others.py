"""Optimizers beside AdamW and Muon: all of optax's parts, with decay where declarations have it.

Sophia (arXiv 2305.14342) is not among them: its Hessian is estimated by a second pass through the model (a product with
a random vector, or a gradient under sampled labels), and a step here has one gradient.
"""

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from lab.options import Option


def lion(numbers, static, decay_mask) -> optax.GradientTransformation:
    """Lion (arXiv 2302.06675, algorithm 2)."""
    b1, b2 = numbers["lion.b1"], numbers["lion.b2"]
    return optax.lion(numbers["learning_rate"], b1, b2, weight_decay=numbers["weight_decay"], mask=decay_mask)


LION = {
    "b1": Option(0.9, "weight of the mean of gradients in the sign that is taken", least=0, below=1),
    "b2": Option(0.99, "decay of that mean", least=0, below=1),
}


def adafactor(numbers, static, decay_mask) -> optax.GradientTransformation:
    """Adafactor without momentum (arXiv 1804.04235, algorithm 4).

    The layers of one pattern entry lie stacked and are one block to it: their updates are clipped, and scaled by the
    size of the weights, together. What optax decays by is not in units of the rate, so that it is given both.
    """
    factored, scaled = static["adafactor.factored_from"], static["adafactor.scaled"]
    return of_leaves(
        optax.adafactor(
            numbers["learning_rate"],
            min_dim_size_to_factor=factored,
            decay_rate=numbers["adafactor.decay_rate"],
            multiply_by_parameter_scale=scaled,
            clipping_threshold=numbers["adafactor.clipping"],
            weight_decay_rate=numbers["learning_rate"] * numbers["weight_decay"],
            eps=numbers["adafactor.eps"],
            weight_decay_mask=jax.tree.leaves(decay_mask),
        )
    )


ADAFACTOR = {
    "decay_rate": Option(0.8, "c of 1 - t^-c, the decay of mean squares at step t", above=0),
    "clipping": Option(1.0, "of the root mean square of an update", above=0),
    "eps": Option(1e-30, "added to squares of gradients", above=0),
    "scaled": Option(True, "updates are in units of the root mean square of their weights"),
    "factored_from": Option(128, "the least second-largest side of a weight whose squares are kept by row and column",
                            least=1),
}  # fmt: skip


def of_leaves(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same over plain arrays: what it keeps of a parameter by row or column must not be laid over the mesh as the
    axes of the parameter say, so it is whole on every device."""

    def update(updates, state, params):
        leaves, structure = jax.tree.flatten(updates)
        leaves, state = inner.update(leaves, state, jax.tree.leaves(params))
        return structure.unflatten(leaves), state

    return optax.GradientTransformation(lambda params: inner.init(jax.tree.leaves(params)), update)


def ademamix(numbers, static, decay_mask) -> optax.GradientTransformation:
    """AdEMAMix (arXiv 2409.03137, algorithm 1): AdamW with a second, slow mean of gradients."""
    b1, b2, b3, alpha, eps = (numbers[f"ademamix.{name}"] for name in ("b1", "b2", "b3", "alpha", "eps"))
    if rising := static["ademamix.rising"]:
        b3, alpha = slow_decay(b1, b3, rising), optax.linear_schedule(0.0, alpha, rising)
    decay = numbers["weight_decay"]
    return contrib.ademamix(numbers["learning_rate"], b1, b2, b3, alpha, eps, weight_decay=decay, mask=decay_mask)


def slow_decay(first, last, steps: int) -> optax.Schedule:
    """From `first` to `last` so that the half-life of the mean grows by as much each step (its scheduler)."""

    def decay(step):
        share, log_first, log_last = jnp.minimum(step / steps, 1.0), jnp.log(first), jnp.log(last)
        return jnp.exp(log_first * log_last / ((1 - share) * log_last + share * log_first))

    return decay


ADEMAMIX = {
    "b1": Option(0.9, "decay of the fast mean of gradients", above=0, below=1),
    "b2": Option(0.95, "decay of the mean of their squares", least=0, below=1),
    "b3": Option(0.9999, "decay of the slow mean of gradients", above=0, below=1),
    "alpha": Option(5.0, "weight of the slow mean", least=0),
    "eps": Option(1e-8, "added to the root of the mean square", above=0),
    "rising": Option(0, "steps over which alpha rises from 0, and b3 from b1; 0: none", least=0),
}


def adopt(numbers, static, decay_mask) -> optax.GradientTransformation:
    """ADOPT (arXiv 2411.02853), its updates clipped at the fourth root of the number of steps before.

    The first step changes nothing but the mean square. optax's own chain has no decay.
    """
    return optax.chain(
        contrib.scale_by_adopt(*(numbers[f"adopt.{name}"] for name in ADOPT)),
        optax.add_decayed_weights(numbers["weight_decay"], decay_mask),
        optax.scale_by_learning_rate(numbers["learning_rate"]),
    )


ADOPT = {
    "b1": Option(0.9, "decay of the mean of updates", least=0, below=1),
    "b2": Option(0.9999, "decay of the mean of squared gradients", least=0, below=1),
    "eps": Option(1e-6, "the least root of that", above=0),
}


def schedule_free_adamw(numbers, static, decay_mask) -> optax.GradientTransformation:
    """Schedule-free AdamW (arXiv 2405.15682, algorithm 1): gradients are taken between the weights that move and their
    mean, and the mean is evaluated.

    Made for train.schedule = "constant" after a warm-up. optax's own chain decays norms.
    """
    base = optax.chain(
        optax.scale_by_rms(
            numbers["schedule_free_adamw.b2"],
            numbers["schedule_free_adamw.eps"],
            eps_in_sqrt=False,
            bias_correction=True,
        ),
        optax.add_decayed_weights(numbers["weight_decay"], decay_mask),
        optax.scale_by_learning_rate(numbers["learning_rate"]),
    )
    return contrib.schedule_free(base, numbers["learning_rate"], numbers["schedule_free_adamw.b1"])


def schedule_free_evaluated(numbers, state: contrib.ScheduleFreeState, trainable):
    """The mean of weights, at which a schedule-free model is evaluated; `trainable` is where its gradients are taken.

    The state has b1 as it was when the state was made: not a number of the call.
    """
    return contrib.schedule_free_eval_params(state._replace(b1=numbers["schedule_free_adamw.b1"]), trainable)


SCHEDULE_FREE = {
    "b1": Option(0.9, "share of the mean of weights in the place where a gradient is taken", above=0, below=1),
    "b2": Option(0.95, "decay of the mean of squared gradients", least=0, below=1),
    "eps": Option(1e-8, "added to the root of that", above=0),
}
