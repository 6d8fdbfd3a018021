"""What attention made and its backward pass needs: rematerialised layers keep it, since it is small (a number for each
of a token's channels, and one for each head) and making it again costs a whole forward pass of attention.
"""

import jax
from jax.ad_checkpoint import checkpoint_name

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
