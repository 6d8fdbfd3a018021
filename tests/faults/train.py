"""Faults of the step, optimizers, checkpoints."""

ROWS = {
    "train/step.py": [
        ("unlabelled tokens count", "jnp.sum(jnp.where(labelled, x, 0))", "jnp.sum(x)"),
        ("z-loss rewarded", "(ce + z_loss * z) / tokens", "(ce - z_loss * z) / tokens"),
        ("means of means", "ce / tokens\n\n    gradient",
         "ce / jnp.maximum(jnp.sum(part.labels >= 0), 1)\n\n    gradient"),
        ("norm of the clipped", "optax.tree.norm(grads)", "optax.tree.norm(updates)"),
    ],
    "train/optimizer.py": [
        ("first step stands still", "* (step + 1) / max(warmup, 1)", "* step / max(warmup, 1)"),
        ("cool-down never begins", "[max(left - cooling, 0)]", "[left]"),
        ("final rate of the cosine", "alpha=final / peak if peak else 0.0", "alpha=final"),
        ("AdamW's decay is Muon's", '"weight_decay": numbers["muon.adam_decay"]',
         '"weight_decay": numbers["weight_decay"]'),
        ("b1 and b2 exchanged", "b1, b2, eps = (numbers", "b2, b1, eps = (numbers"),
        ("cool-down by a linear share", "np.sqrt(np.clip(step / steps, 0, 1))", "np.clip(step / steps, 0, 1)"),
        ("factors exchanged", "_multiplied(numbers, *pair)", "_multiplied(numbers, *pair[::-1])"),
    ],
    "train/others.py": [
        ("Adafactor decays without the rate", 'numbers["learning_rate"] * numbers["weight_decay"]',
         'numbers["weight_decay"]'),
        ("evaluated by the b1 of its first state", 'state._replace(b1=numbers["schedule_free_adamw.b1"])', "state"),
    ],
    "train/dropout.py": [("rows of a host alone", "np.arange(first, first + len", "np.arange(0, len")],
    "train/muon.py": [
        ("moonlight by the short side", "0.2 * math.sqrt(max(d_in, d_out))", "0.2 * math.sqrt(min(d_in, d_out))"),
        ("mup the wrong way", '"mup": lambda d_in, d_out: math.sqrt(d_out / d_in)',
         '"mup": lambda d_in, d_out: math.sqrt(d_in / d_out)'),
    ],
    "train/workload.py": [
        ("resumed from the first text", "start=start, **hosts", "start=0, **hosts"),
        ("rate of the first member", "rate[i], of.fill", "rate[0], of.fill"),
    ],
    "train/loop.py": [
        ("gradient norms unchecked", " and math.isfinite(record.grad_norm)", ""),
        ("schedule-free ends where it trains", "            if last:\n", "            if stopping:\n"),
    ],
    "train/checkpoint.py": [
        ("Orbax asks whether to stop", "step: int) -> bool:\n        return False",
         "step: int) -> bool:\n        return super().reached_preemption(step)"),
        ("hosts look before it is moved", "        _any_host(False)  # all wait for it\n", ""),
        ("the next is moved while hosts look", "_any_host(False)  # and for those that still", "pass  #"),
    ],
    "train/canonical.py": [("microbatches are another program", ", microbatches=1)", ")")],
}  # fmt: skip
