"""Faults of attention: rules, tiles, kernels."""

ROWS = {
    "kernels/rules.py": [
        ("causal hides the token itself", "causal = k.index <= q.index", "causal = k.index < q.index"),
        ("all branches see their own time", "all_branches = (k.time < q.time)", "all_branches = (k.time <= q.time)"),
        ("own branch without its prompt", "((k.branch == 0) | (k.branch == q.branch))", "(k.branch == q.branch)"),
        ("window one longer", "return q.time - k.time < n", "return q.time - k.time <= n"),
        ("strided is a window", "return window(n) | every(n)", "return window(n)"),
        ("one summary less", "return k.time % n >= n - c", "return k.time % n > n - c"),
        ("padding sees padding", "(q.segment == k.segment) & (q.segment >= 0)", "(q.segment == k.segment)"),
        ("& taken for |", "text, levels - 1) & _rule(", "text, levels - 1) | _rule("),
        ("padding counts as a query", "tokens += int(np.sum(queries.segment >= 0))", "tokens += queries.segment.size"),
    ],
    "kernels/expressions.py": [
        ("range of a difference", "Range(a.low - b.high, a.high - b.low)", "Range(a.low - b.low, a.high - b.high)"),
        ("certain when possible", 'Range(a.high < b.low, a.low < b.high)', 'Range(a.low < b.high, a.low < b.high)'),
        ("differences begin at a multiple", "Range(period, period)).low == 0", "Range(period, period)).high == 0"),
        ("any limit shows all", "jnp.where(shown, -1, HIDDEN)", "jnp.where(shown, ENDLESS, HIDDEN)"),
        ("all of some nodes is all", "_any(limits < ENDLESS, q.node, k.node)", "~own"),
        ("the last node of a range is none of it", "(node_M <= jnp.clip(high, 0, M - 1))",
         "(node_M < jnp.clip(high, 0, M - 1))"),
        ("q.x > k.x read as <", 'return term(other)._rule("<", self)', 'return self._rule("<", other)'),
    ],
    "kernels/tiles.py": [
        ("a stem read alone until it is shared", "(seen_BTm.sum(1) == 1) & (of_tile.node.low < T)",
         "seen_BTm.sum(1) == 1"),
        ("capped scores of full tiles have no mask", "tiles._replace(full=jnp.zeros_like(tiles.full))", "tiles"),
        ("parts that no list is dealt to", "of_tile.branch.low) % parts", "of_tile.branch.low) % (parts + 1)"),
        ("padded keys in full tiles", "(k_any & ~k_padded)[:, None, :]", "k_any[:, None, :]"),
        ("full tiles of two segments", "        & (columns.segment.low == columns.segment.high)\n", ""),
        ("transposed lists unsorted", "jnp.take_along_axis(kind, jnp.argsort(tiles.keys, axis=-1), axis=-1)", "kind"),
    ],
    "kernels/tiled_loops.py": [
        ("running sum grows", "shrink_GR = jnp.exp(max_GR - new_GR)", "shrink_GR = jnp.exp(new_GR - max_GR)"),
        ("gradient of the cap", "1 - jnp.square(s_GRk / static.softcap)", "1 - s_GRk / static.softcap"),
        ("a list goes on behind its end", "(x < own.total)[:, None]", "(x < len(q_coordinates.segment))[:, None]"),
        ("rows share limits", "q_coordinates.node + M * row_N1", "q_coordinates.node + 0 * row_N1"),
        ("the last lists are left out", "lax.fori_loop(0, -(-N // at_once)", "lax.fori_loop(0, N // at_once"),
    ],
    "kernels/tiled.py": [
        ("gradient of the log sum", "- jnp.where(saw_NGR, dlse_NGR, 0)", "+ jnp.where(saw_NGR, dlse_NGR, 0)"),
        ("rows share tile lists", "[:, None, None] * m", "[:, None, None] * 0"),
        ("queries scaled back once", "(dq_NGRK * static.scale)", "dq_NGRK"),
    ],
    "kernels/folding.py": [
        ("heads and tokens swapped", ".transpose(0, 1, 3, 4, 2, 5)", ".transpose(0, 1, 3, 2, 4, 5)"),
        ("a query meets keys of all groups", "jnp.eye(G, dtype=", "jnp.ones((G, G), dtype="),
        ("values of the first group", "o[:, :, g, :, g]", "o[:, :, g, :, 0]"),
    ],
    "kernels/split.py": [
        ("parts weigh alike", "/ total_BTH[..., None]", "/ len(weights)"),
        ("log sum without its top", "jnp.where(saw_BTH, top_BTH + jnp.log(", "jnp.where(saw_BTH, jnp.log("),
    ],
    "kernels/pallas_triton.py": [
        ("Triton: hidden keys are seen", "jnp.where(seen_Rk, s_Rk, MASKED)", "jnp.where(seen_Rk, s_Rk, s_Rk)"),
        ("Triton: limits of keys for queries", "jnp.broadcast_arrays(q_node, k_node)",
         "jnp.broadcast_arrays(k_node, q_node)"),
    ],
    "kernels/bias.py": [
        ("bias of negative indices", "(index >= 0) & (index < N)", "(index < N)"),
        ("gradient of slopes", "slope_H=(d_H * index.astype(d_H.dtype)).sum(pairs)", "slope_H=d_H.sum(pairs)"),
    ],
    "kernels/dropout.py": [
        ("as many are kept as should be dropped", "jnp.where(bits >= (rate", "jnp.where(bits < (rate"),
        ("heads drop alike", "absorb(self.head_H, self.query", "absorb(self.head_H * 0, self.query"),
    ],
    "kernels/rotary.py": [("a shear for a rotation", "b * cos + a * sin", "b * cos - a * sin")],
    "kernels/bands.py": [
        ("keys turn by the time of queries", "k_coordinates, band.k_time)", "k_coordinates, band.q_time)"),
    ],
}  # fmt: skip
