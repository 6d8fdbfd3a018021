"""What attention made and its backward pass needs: rematerialised layers keep it, since it is small (a number for each
of a token's channels, and one for each head) and making it again costs a whole forward pass of attention.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lab.errors import UserError

NAME = "attention"
OF_LIBRARIES = ("dot_product_attention_fwd_wrapper",)  # primitives that make it without our name: cuDNN

_named = jax.checkpoint_policies.save_only_these_names(NAME)


def kept(outputs):
    """(output, log normaliser) under a name that `policy` knows. To be called in the forward pass of a custom_vjp,
    before they are its residuals."""
    return jax.tree.map(lambda x: checkpoint_name(x, NAME), outputs)


def policy(primitive, *inputs, **parameters):
    """For jax.checkpoint: keeps what attention made."""
    return primitive.name in OF_LIBRARIES or _named(primitive, *inputs, **parameters)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def without_gradient(x, implementation: str):
    """A log normaliser of a library that drops its gradient; who asks for it is told, by UserError."""
    return x


def _primal(x, implementation):
    return x.value, None


def _refuse(implementation, _, cotangent):
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return (jnp.zeros(cotangent.shape, cotangent.dtype),)
    raise UserError(
        f"attention implementation {implementation!r} has no gradient of the log normaliser, which sinks and bands "
        "need; choose auto or tiled"
    )


without_gradient.defvjp(_primal, _refuse, symbolic_zeros=True)
