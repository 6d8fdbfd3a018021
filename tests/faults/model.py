"""Faults of the forward pass."""

ROWS = {
    "model/streams/v1.py": [
        ("v1m5 keeps the stream", "lambda s, a: s.A + a, lambda s, h, f: s.A + f)",
         "lambda s, a: s.A + a, lambda s, h, f: h + s.A + f)"),
        ("v1m4 divides by m + 1", "s.F / s.m + f", "s.F / (s.m + 1) + f"),
    ],
    "model/streams/v2.py": [("v2m2 divides by m + 2", "A_BTD / (m + 1)", "A_BTD / (m + 2)")],
    "model/streams/v3.py": [
        ("v3 replays on the later stream", "layer.block.feed(x_BTD + a)", "layer.block.feed(h_BTD + a)"),
        ("v3 replays layer 0", "mixer.output(*found, normed[i],", "mixer.output(*found, normed[0],"),
    ],
    "model/streams/v4.py": [
        ("v4 drops the attention", "ScoreState(h_BTD + block.feed(h_BTD)", "ScoreState(x_BTD + block.feed(h_BTD)"),
        ("v4m4 counts layers from 0", "self.d ** -self.a[m] * M **", "self.d ** -self.a[m] * max(m, 1) **"),
        ("v4 mixes up its layers", "zip(past, on_queries, strict=True)", "zip(past[::-1], on_queries, strict=True)"),
    ],
    "model/streams/v4_tokens.py": [
        ("v4m1A transposed", "jnp.exp(W[t_BT1, u_B1S])", "jnp.exp(W[u_B1S, t_BT1])"),
        ("v4m1E raw for normed", "self.infer[m](normed_BTD if self.normed else x_BTD)", "self.infer[m](x_BTD)"),
        ("v4m1C by keys", "self.w[m][:, view.queries.index]) *", "self.w[m][:, view.queries.time]) *"),
    ],
    "model/streams/hyper.py": [
        ("mHC from the right", "res_BTNN.swapaxes(-1, -2)  #", "res_BTNN  #"),
        ("Sinkhorn one step short", "steps: int = 20", "steps: int = 19"),
        ("mHC post below 1", "2 * jax.nn.sigmoid(a_post", "jax.nn.sigmoid(a_post"),
    ],
    "model/streams/attnres.py": [("AttnRes by another query", "@ self.w[s - 1]", "@ self.w[s - 2]")],
    "model/streams/unet.py": [("U-net not mirrored", "* skips[mirrored]", "* skips[-1]")],
    "model/streams/laurel.py": [
        ("LAuReL weighs x alone", "* (x_BTD + x_BTD @ A_DR @ B_RD)", "* x_BTD + x_BTD @ A_DR @ B_RD"),
    ],
    "model/streams/lime.py": [
        ("LIMe over groups", "self.router[m - 1][...], axis=-1)", "self.router[m - 1][...], axis=0)"),
    ],
    "model/streams/resformer.py": [
        ("ResFormer swaps weights", "from_first * first_BSGV + own * v_BSGV", "own * first_BSGV + from_first * v_BSGV"),
    ],
    "model/streams/muddformer.py": [("MUDD keys by queries", "mixer.keys(normed.key,", "mixer.keys(normed.query,")],
    "model/attention.py": [
        ("sink helps", "jax.nn.sigmoid(lse_BTH - self.sink[...])", "jax.nn.sigmoid(lse_BTH + self.sink[...])"),
        ("outputs turn on", "rotate(o_BTHV, (cos, -sin))", "rotate(o_BTHV, (cos, sin))"),
        ("output matrix drawn too wide", '"latent" if o_rank else "output", o,', '"latent", o,'),
        ("bias of the output with the others", 'among=("all",)', 'among=("qkv", "all")'),
    ],
    "model/differential.py": [("maps are added", "[..., 0, :] - share_BTH", "[..., 0, :] + share_BTH")],
    "model/forgetting.py": [("forgets the new", "parts(-total_BSH1[..., 0]", "parts(total_BSH1[..., 0]")],
    "model/delta.py": [
        ("states cross segments", "segment_BC == state.segment_B[:, None], ", "segment_BC > -2, "),
        ("padding decays the state", "(decay_BTH, beta_BTH))\n    inputs", "(decay_BTH, decay_BTH))\n    inputs"),
    ],
    "model/norm.py": [("eps outside of the root", "keepdims=True) + eps)", "keepdims=True)) + eps")],
    "model/position.py": [
        ("branch and time exchanged", "even = (pair - (F - n)) % 2 == 0", "even = (pair - (F - n)) % 2 == 1"),
        ("whole table for a part", "chosen.theta **= R / model.mixer.head_dim", "chosen.theta **= 1"),
        ("branches a step apart", '"branch": position.stride * inverse', '"branch": inverse'),
    ],
    "model/extrapolation.py": [
        ("mscale of all dimensions unread", " / mscale(s, scaling.mscale_all_dim)", ""),
        ("dynamic counts from the longest", "(s * longest / L - (s - 1))", "(s * longest / L)"),
    ],
    "model/position_maps.py": [
        ("chunks reach twice their size", "minimum(q.time % size + size, c)", "q.time % size + size"),
        ("groups begin at their own window", "q.time // G + (W - W // G)", "q.time // G + W"),
        ("times beyond float32", "if largest_time(position, times) <= EXACT:", "if True:"),
        ("groups reach a window more", "* position.map.group + W\n", "* position.map.group + 2 * W\n"),
        ("hybrid compresses what was trained", "minimum(time, L) * cf.numerator", "minimum(time, L) * cf.denominator"),
    ],
    "model/stretched.py": [
        ("a text one shorter", "tokens_B1 = 1 + jnp.max(", "tokens_B1 = jnp.max("),
        ("log n of the time", "return q.time + 1, 0.0", "return q.time, 0.0"),
    ],
    "model/codes.py": [
        ("code of the branch for the time", '    of = "time"', '    of = "branch"'),
        ("vectors of branches without the prompt's", "return position.branches + 1", "return position.branches"),
    ],
    "model/scores.py": [
        ("later keys take buckets", "maximum(q.time - k.time, 0), wide", "maximum(k.time - q.time, 0), wide"),
        ("slopes between taken twice", "(1, 2 * (heads - power), 2) / (2 *", "(2, 2 * (heads - power) + 1, 2) / (2 *"),
    ],
    "model/relative.py": [
        ("distances the other way", "distance_BTS, -clip, clip) + clip", "-distance_BTS, -clip, clip) + clip"),
        ("vectors beside the scale", "+ scale * looked_up_BGRTS", "+ looked_up_BGRTS"),
    ],
    "model/slots.py": [
        ("padding takes slots", "jnp.cumsum(real_BT, axis=1) - 1", "jnp.arange(real_BT.shape[1])"),
        ("a single token copies the cache", "if slots_BT.size == 1:", "if False:"),
        ("used counts last slots", "1 + slots_BT.max(", "slots_BT.max("),
    ],
    "model/parameter.py": [
        ("norms decay", 'axes=("channel",), inputs=0, decay=False', 'axes=("channel",), inputs=0, decay=True'),
        ("Muon splits the wrong heads", '"qkv": lambda of_input: not of_input', '"qkv": lambda of_input: of_input'),
        ("embedding by the vocabulary", "gain * shape[1] ** -0.5", "gain * shape[0] ** -0.5"),
    ],
    "model/lora.py": [
        ("adapters unscaled", "weight[...] + scale * product(a, b)", "weight[...] + product(a, b)"),
        ("rank for alpha", "jnp.float32(alpha / rank)", "jnp.float32(1.0)"),
    ],
    "model/dropout.py": [
        ("every step drops alike", "absorb(self.seed, self.step), token_BT", "absorb(self.seed, 0), token_BT"),
        ("layers drop alike", "state=absorb(self.state, m)", "state=absorb(self.state, 0)"),
        ("sites drop alike", "(_number(site), 0)", "(2, 0)"),
    ],
    "model/feedforward.py": [
        ("gate and up exchanged", "GATES[self.name](affine(x_BTD, self.gate, self.gate_bias))",
         "GATES[self.name](affine(x_BTD, self.up, self.gate_bias))"),
    ],
    "model/init.py": [
        ("output drawn too wide", '"output": chosen.output', '"output": chosen.value'),
        ("Xavier by the output", "2 * fan_in / (fan_in", "2 * fan_out / (fan_in"),
    ],
    "model/placement.py": [
        ("DeepNorm weighs the output", "self.alpha * x_BTD + y_BTD", "x_BTD + self.alpha * y_BTD"),
    ],
    "model/streams/parallel.py": [("parallel in series", "block.feed(normed_BTD)", "block.feed(x_BTD)")],
    "model/parametrization.py": [
        ("logits grow with the width", "_unless_one(1 / wider(model))", "_unless_one(wider(model))"),
        ("output projections as deep as they are", "made.layers = round(layers)", "made.layers = spec.layers"),
        ("rates of layers as at the base", "transformer.added), (1 / m, m), rate)", "transformer.added), (1 / m, m))"),
    ],
    "model/transformer.py": [
        ("scanned layers miscounted", "(P * jnp.arange(full), repeats)", "(jnp.arange(full), repeats)"),
        ("logits in bfloat16", "preferred_element_type=wide", "preferred_element_type=x_BTD.dtype"),
    ],
    "model/accounting.py": [
        ("backward as dear as forward", "return 3 * 2 * float(forward)", "return 2 * 2 * float(forward)"),
        ("cache of shared groups", "max(1, groups // devices)", "(groups / devices)"),
    ],
}  # fmt: skip
