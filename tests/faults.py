"""Faults that the tests must notice, for tests/mutate.py: each is a wrong line that a careful hand could write.

A row is (name, file below lab/, text that occurs there exactly once, what stands in its place).
"""

from typing import NamedTuple


class Fault(NamedTuple):
    name: str
    file: str
    old: str
    new: str


ROWS = {
    "remote/store.py": [
        ("a lost answer is a refusal", "return lease.is_of(content)", "return False"),
        ("any lease is ours", '["token"] == self.token', '["token"] is not None'),
    ],
    "remote/mirror.py": [
        ("a checkpoint's seal before its numbers", 'return 2 if name.endswith(f"/{SEAL}") else 1', "return 1"),
        ("a result before its checkpoint", 'return 3 if name.rpartition("/")[2] in LAST else 0', "return 0"),
        ("checkpoints that are not whole are fetched", '+ "/" in steps', '+ "/" is not None'),
        ("what is written here is overwritten", "mark) and not self._changed(name)", "mark)"),
        ("no checkpoint while newer ones go up", "self._forget(early)", "self._forget(seals)"),
        ("leases never expire", "self._clock - modified > EXPIRES", "self._clock - modified > 2**60"),
        ("leases by this machine's clock", "time.monotonic() + self._clock - modified", "time.time() - modified"),
        ("a run that was taken over is uploaded", "not _hidden(name) and not self._is_lost(name)", "not _hidden(name)"),
        ("who stood still does not look", "lease.renewed > EXPIRES / 2 for", "lease.renewed > 2**60 for"),
        ("leases are not renewed", '("renew", EXPIRES / 4)', '("renew", 2**30)'),
        ("the store keeps what went here", "self._forget(name for name in gone if not name.endswith(SEAL))", "pass"),
    ],
    "remote/fetching.py": [
        ("what is damaged in the cache is used", "path.stat().st_size == one.size and self._digest(path) == one.digest",
         "path.stat().st_size > 0"),
        ("all processes fetch", "with filelock.FileLock(one.path.with_name(f\".{one.path.name}.lock\")):", "if True:"),
    ],
    "data/outgoing.py": [
        ("kept in a store without a look", "return shards.kept(here, number)", "return told"),
        ("what is of others is deleted", " and _OURS.fullmatch(name)", ""),
        ("what is ahead stays in a store", "_all(store.delete, [name", "_all(str, [name"),
    ],
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
        ("nodes beside a range count", "1 + jnp.clip(x.high, 0, M - 1)", "jnp.clip(x.high, 0, M - 1)"),
        ("q.x > k.x read as <", 'return term(other)._rule("<", self)', 'return self._rule("<", other)'),
    ],
    "kernels/tiles.py": [
        ("padded keys in full tiles", "(k_any & ~k_padded)[:, None, :]", "k_any[:, None, :]"),
        ("full tiles of two segments", "        & (columns.segment.low == columns.segment.high)\n", ""),
        ("transposed lists unsorted", "jnp.take_along_axis(kind, jnp.argsort(tiles.keys, axis=-1), axis=-1)", "kind"),
    ],
    "kernels/tiled.py": [
        ("running sum grows", "shrink_GR = jnp.exp(max_GR - new_GR)", "shrink_GR = jnp.exp(new_GR - max_GR)"),
        ("gradient of the cap", "1 - jnp.square(s_GRk / static.softcap)", "1 - s_GRk / static.softcap"),
        ("gradient of the log sum", "- jnp.where(saw_NGR, dlse_NGR, 0)", "+ jnp.where(saw_NGR, dlse_NGR, 0)"),
        ("rows share tile lists", "[:, None, None] * m", "[:, None, None] * 0"),
        ("queries scaled back once", "(dq_NGRK * static.scale)", "dq_NGRK"),
    ],
    "kernels/folding.py": [
        ("heads and tokens swapped", ".transpose(0, 1, 3, 4, 2, 5)", ".transpose(0, 1, 3, 2, 4, 5)"),
    ],
    "kernels/split.py": [
        ("parts weigh alike", "/ total_BTH[..., None]", "/ weight_BPTH.shape[1]"),
        ("log sum without its top", "jnp.where(saw_BTH, top_B1TH[:, 0] + jnp.log(", "jnp.where(saw_BTH, jnp.log("),
    ],
    "kernels/pallas_triton.py": [
        ("Triton: hidden keys are seen", "_coordinates(k_at, j).map(_row)), s_Rk, MASKED)",
         "_coordinates(k_at, j).map(_row)), s_Rk, s_Rk)"),
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
    "data/skipping.py": [
        ("a skip beyond the range", "rng.integers(0, within - n + 1)", "rng.integers(0, within + 1)"),
    ],
    "data/packing.py": [
        ("labels cross texts", "labels[ends - 1] = -1", "labels[ends[-1] - 1] = -1"),
        ("prompts count in alignment", "branches[first] = 0", "branches[first] = lengths[first]"),
        ("slots unsorted", "sorted(1 + rng.permutation(slots)[:count])", "list(1 + rng.permutation(slots)[:count])"),
        ("stagger one short", "rng.integers(0, lengths + 1) if stagger", "rng.integers(0, lengths) if stagger"),
        ("index through the row", "(np.cumsum(group_lengths) - group_lengths)[segment]", "0 * segment"),
    ],
    "data/pipeline.py": [
        ("every step packed alike", "default_rng((seed, step, row))", "default_rng((seed, row))"),
        ("epochs in one order", ".shuffle(mixed).repeat()", ".repeat().seed(mixed)"),
        ("evaluation repeats its texts", "range((first + row) * n, (first + row + 1) * n)",
         "range(row * n, (row + 1) * n)"),
        ("seeds share epochs", ".shuffle(mixed)", ".shuffle(seed)"),
        ("hosts read all rows", "return known(ids) if known else np", "return np"),
    ],
    "data/shards.py": [
        ("texts of the shard before", "bisect.bisect_right(self._ends, i)", "bisect.bisect_left(self._ends, i)"),
        ("records of any length", "if len(record) != int(self._lengths[i])", "if 0 * int(self._lengths[i])"),
        ("kept without a look", " and reading.digest(file) == shard[part]", ""),
        ("sizes not compared", "if there != size else", "if False else"),
        ("shards by their names alone", "_cached(shard[\"digest\"]) if url", "_cached(shard[\"file\"]) if url"),
        ("shards after those of the rows", "self._bring({*places.tolist()})", "self._bring({*(places + 1).tolist()})"),
        ("large ids cut", '"<u2" if tokenizer.size <= 2**16 else "<i4"', '"<u2"'),
    ],
    "data/preparation.py": [
        ("drafts stay", "if path.name != _LOCK:", "if False:"),
        ("gone on with another", "if before.get(field) != about[field]]", "if False]"),
        ("what is ahead stays", ">= count:", "> count + 99:"),
        ("an endless stream", "found[s] >= most for s", "found[s] > 9 * most for s"),
    ],
    "data/probes.py": [
        ("induction asks itself", "symbols[asked + 1]", "symbols[asked]"),
        ("products reversed", "lambda p, q: p[q]", "lambda p, q: q[p]"),
        ("a passage is what is asked of it", "told(found, settings.length - ", "told(asked, settings.length - "),
        ("passages are labels too", "branch == 0, np.int32(-1)", "branch < 0, np.int32(-1)"),
    ],
    "data/generated.py": [
        ("one difficulty too few", "self._low, self._high + 1))", "self._low, max(self._high, self._low + 1)))"),
        ("train on what is asked", "(_TRAINING, self._seed, step, row)", "(_EVALUATION, 0, self._low, row)"),
        ("hashes of before change", "for number in self._settings if number]", "for number in self._settings]"),
    ],
    "data/questions.py": [
        ("an answer is another fact's", "told[i][1:-1]", "told[i - 1][1:-1]"),
        ("no answer passes", "    if not answers:\n", "    if False:\n"),
        ("what cannot be answered is", 'return Question(text, ("",))', "pass"),
    ],
    "data/dataset.py": [("fingerprint without the cap", '["digest"], len(kept), conf', '["digest"], conf')],
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
    "train/canonical.py": [("microbatches are another program", ", microbatches=1)", ")")],
    "evaluate/conditions.py": [
        ("conditions asked again", "asks.conditions(asked)[done:]", "asks.conditions(asked)"),
        ("the last batch alone", "sums += jax", "sums = jax"),
    ],
    "evaluate/asks.py": [("other weights pass", "if _weights(changed) != _weights(config)", "if False")],
    "evaluate/decoding.py": [
        ("a prompt is another branch", " & (at.branch[:, None, :] > 0)", ""),
        ("what is swapped is compared", "staying = asking & (", "staying = asking | ("),
        ("a beginning counts as generated", "at.time >= ask.prompt_tokens - 1)", "at.time >= 0)"),
        ("after against before", "(before_BTC - after_BTC)", "(after_BTC - before_BTC)"),
        ("swapped for itself", "np.roll(texts_GnX, -1, axis=0)", "np.roll(texts_GnX, 0, axis=0)"),
    ],
    "evaluate/answers.py": [
        ("articles go first", "text.lower().translate(_NO_PUNCTUATION)).split()",
         "text.lower()).translate(_NO_PUNCTUATION).split()"),
        ("a tie goes to the last", "counts[texts[place]], -place", "counts[texts[place]], place"),
        ("words count once", "Counter(words) & Counter(other)", "Counter({*words}) & Counter({*other})"),
    ],
    "evaluate/questions.py": [
        ("best by the sum", "float(np.mean(self.log_p)) if", "float(np.sum(self.log_p)) if"),
        ("every question draws alike", "sampling, number + i) for", "sampling, number) for"),
        ("the end is an answer's", 'passage.ended != "stop"', "passage.event.log_p is not None"),
        ("compiling is counted", "decoder.steps = decoder.generated = decoder.engine.read = 0", "pass"),
    ],
    "evaluate/long.py": [
        ("buckets one token late", "nats_nN[:, low:high].sum(1) for", "nats_nN[:, low + 1 : high + 1].sum(1) for"),
        ("windows count old tokens", "np.where(at < before, -1, following)", "following"),
        ("the last window left out", ", D - W})", "} or {0})"),
        ("a document is enough text", "needed = ask.documents * (longest - first)", "needed = longest - first"),
    ],
    "evaluate/ready.py": [("nothing is looked at", "ready := asks.ASKS[asked.kind].ready", "not asked")],
    "evaluate/keys.py": [("keys a byte late", "marked[1 + texts", "marked[texts")],
    "evaluate/passes.py": [("every chunk at time 0", "np.int32(start)", "np.int32(0)")],
    "evaluate/reached.py": [
        ("a method that does nothing", "if not beyond > tolerance:", "if False:"),
        ("a broken promise", "if inside > tolerance:", "if False:"),
    ],
    "evaluate/retrieval.py": [
        ("answers a token late", "len(before) - 1 : len(whole) - 1]", "len(before) : len(whole)]"),
        ("half an answer is right", "right_RN, True).all(1)", "right_RN, False).any(1)"),
    ],
    "study/judge/documents.py": [
        ("other documents are paired", " and ours[0] == theirs[0]", ""),
        ("seeds are documents", "np.mean(found, axis=0)", "np.concatenate(found)"),
        ("a test counts wherever it stands", "if one is other or _same_test(one, other)", "if one is other"),
        ("three documents are judged", "LEAST = 10", "LEAST = 1"),
    ],
    "study/define/cells.py": [
        ("first group fastest", "itertools.product(*groups))", "itertools.product(*groups[::-1]))"),
        ("rungs of one name", "or names.count(name) > 1", ""),
    ],
    "study/define/contrasts.py": [("a baseline of itself", " and there[0] != name", "")],
    "study/define/identity.py": [
        ("other versions are the same", "return SAME if alike else OTHER_VERSIONS", "return SAME"),
        ("seeds of the model forgotten", "config.model_seed - config.seed}", "0}"),
        ("weights of a checkpoint forgotten", "parts = {*asked, WEIGHTS}", "parts = {*asked} - {WEIGHTS}"),
    ],
    "study/judge/statistics.py": [
        ("Bonferroni for Holm", "(len(known) - rank) * p", "len(known) * p"),
        ("adjusted p may fall", "largest = max(largest, min(1.0,", "largest = max(0.0, min(1.0,"),
        ("one-sided interval", "stats.t.ppf(1 - LEVEL / 2, n - 1) * values", "stats.t.ppf(1 - LEVEL, n - 1) * values"),
        ("power of a known spread", "critical * spreads - shift) +", "critical - shift) +"),
    ],
    "study/judge/pairing.py": [
        ("kernels may differ", '"devices", "implementation", ', '"devices", '),
        ("losses of all conditions", "if not judged or condition in judged", "if True"),
        ("unequal texts are paired", " and hashes[0][:shared] == hashes[1][:shared]", ""),
    ],
    "study/judge/residuals.py": [
        ("relative to the first side", "reference = means[1] if", "reference = means[0] if"),
    ],
    "study/judge/evidence.py": [
        ("a higher loss is better", '"better" if self.estimate.mean < 0', '"better" if self.estimate.mean > 0'),
        ("one test is counted twice", "corrected(found, [_pair(pair) for *_, pair in sides])", "corrected(found)"),
        ("uncorrected verdicts", "if self.adjusted >= LEVEL", "if self.estimate.p >= LEVEL"),
        ("any support is enough", 'if outcomes == {"supported"}', 'if "supported" in outcomes'),
    ],
    "study/judge/calibration.py": [
        ("a run against itself", "generator.integers(1, len(runs), comparisons)",
         "generator.integers(0, len(runs), comparisons)"),
        ("noise of one run", "math.sqrt(2 * variance)", "math.sqrt(variance)"),
    ],
    "study/judge/scaling.py": [
        ("Huber losses without a tail", "pull = np.clip(off, -1.0, 1.0)", "pull = off"),
        ("one ratio of tokens tells both exponents", "np.abs(log_d - line(log_n)).max() < APART", "False"),
        ("an inverse without the floor", "np.asarray(losses, float) - self.floor", "np.asarray(losses, float)"),
    ],
    "study/judge/gains.py": [
        ("what a variant spends is no matter", "law.compute(y_0) - (x - x_0)", "law.compute(y_0)"),
        ("shrinking is growing", "first * bound for bound in self.slope_interval) < 0",
         "-first * bound for bound in self.slope_interval) < 0"),
    ],
    "study/judge/trends.py": [
        ("lower for higher", 'side = "lower" if ends.mean() < 0', 'side = "lower" if ends.mean() > 0'),
        ("tokens of each step", "np.cumsum([line.get(", "np.array([line.get("),
    ],
    "study/report/verdicts.py": [
        ("expected sign turned", '"below 0" if one.sign < 0', '"below 0" if one.sign > 0'),
        ("interval of the bootstrap", "signed(known.mean), interval(known.t_interval), *floor",
         "signed(known.mean), interval(known.bootstrap_interval), *floor"),
    ],
    "study/report/headline.py": [
        ("the least of what is better", 'one = found["better"][0]', 'one = found["better"][-1]'),
        ("apart within the interval", "half is not None and mean - half > 0", "half is not None and mean + half > 0"),
        ("failed runs pass in silence", 'run.status == "failed" and not run.rows()', 'run.status == "lost"'),
    ],
    "decode/sampling.py": [
        ("a branch draws like another", "for number in (request, branch, step):", "for number in (request, step):"),
        ("a filter for rows that ask for none", "jnp.where(asked_B[:, None, None], change(z_BNC), z_BNC)",
         "change(z_BNC)"),
        ("nucleus without the token that fills it", "(before_BNC < top_p_B11)", "(before_BNC + p_BNC < top_p_B11)"),
        ("negative logits divided", "z_BNC * penalty_B11)", "z_BNC / penalty_B11)"),
    ],
    "decode/engine.py": [
        ("a row that keeps its slots", "programs.released(cache.coordinates.segment, freed_BP)",
         "cache.coordinates.segment"),
        ("every step draws alike", "step=len(b.text) - b.given,", "step=0,"),
        ("a fork draws from the logits of the prompt", "b.tip.rank if b.tip else 0", "0 if b.tip is not b else b.rank"),
        ("a state is not forked", "if b.sources and b.begin == made.time", "if b.sources and b.begin == made.time + 1"),
    ],
    "decode/forest.py": [
        ("a fork sees what its source writes later", "np.minimum(np.max(past, axis=0), b.begin - 1)",
         "np.max(past, axis=0)"),
        ("a join sees one of what it joins", "np.max(past, axis=0)", "past[0]"),
        ("requests of a row see each other", "self.limits[made.lanes] = HIDDEN", "self.limits[made.lanes] = -1"),
        ("a prompt stored again", "stem := self.stems.get((before, int(made.alone), tokens))",
         "stem := self.stems.get((before, 2, tokens))"),
        ("slots are freed while others read them", "if not stem.users:", "if stem.users >= 0:"),
    ],
    "decode/programs.py": [
        ("a cache elsewhere than the weights", "return jax.device_put(empty(model, rows, length, branches), place)",
         "return empty(model, rows, length, branches)"),
        ("every branch seen by a penalty", "rules.visible(OWN, lanes, cache.coordinates, limits_BMM)",
         "rules.visible(rules.limit >= -1, lanes, cache.coordinates, limits_BMM)"),
    ],
    "decode/request.py": [
        ("an ended branch leaves out its last token", "if self.time < b.end:", "if self.time < b.end and not b.ended:"),
        ("a join begins with the first that ended", "b.begin = max(source.end", "b.begin = min(source.end"),
    ],
    "decode/scoring.py": [
        ("a context scored, too", "labels_BT[row, len(context) - 1 : read] = continuation",
         "labels_BT[row, :read] = text[1:]"),
    ],
    "decode/text.py": [
        ("half a stop string shown", "return self.show(len(self.text) - self.waiting)",
         "return self.show(len(self.text))"),
    ],
    "serve/worker.py": [
        ("who leaves goes on", "                    self.engine.cancel(number)\n", "                    pass\n"),
        ("places of ended requests kept", "            going.left -= bool(passage.ended)\n", ""),
        ("one request more than may wait", "+ len(answer.asks) > self.room:", "+ len(answer.asks) > self.room + 1:"),
        ("half of what is refused begins", "others go on\n            self.abandon(answer)\n", "others go on\n"),
        ("an answer loses what comes before its error", "if not told and self.error:", "if self.error:"),
    ],
    "serve/protocol.py": [
        ("tokens of a stop string told", "if whole or held[1] < len(self.text)]", "if whole or held]"),
        ("all prompts draw alike", "stream=i, **wanted", "stream=0, **wanted"),
        ("filters refused where nothing is drawn", "return made if made.temperature else", "return made if True else"),
    ],
    "serve/chat.py": [
        ("an answer of one token less", "bisect.bisect_right(", "bisect.bisect_left("),
        ("what the model says ends like a text", "tokenizer.ends)", "(tokenizer.eos,))"),
    ],
    "serve/app.py": [
        ("a stream begins after its first tokens", "passages = await news(answer)  # it",
         "passages = (await news(answer))[:0]  # it"),
        ("nobody hears who leaves", "asyncio.ensure_future(receive())", "asyncio.ensure_future(asyncio.sleep(99))"),
    ],
    "study/report/cell_page.py": [
        ("the command of the cell before", 'enumerate(study.plan["cells"], 1)', 'enumerate(study.plan["cells"], 0)'),
        ("flags of the study's own share", 'own and "=" not in word', "False"),
    ],
    "study/report/decoding.py": [
        ("a cost turned", 'frame["loss_alone"] - frame["loss"]', 'frame["loss"] - frame["loss_alone"]'),
    ],
    "study/report/live.py": [
        ("interval turned", '"array": _numbers(high - mean for mean', '"array": _numbers(mean - high for mean'),
        ("a gap as a zero", "if math.isfinite(value) else None", "if math.isfinite(value) else 0.0"),
    ],
    "study/report/series.py": [
        ("replicates the other sign", "found == np.sign(difference)", "found != np.sign(difference)"),
    ],
    "study/report/tables.py": [
        ("the worst recommended", "ranked = sorted(scores, key=scores.get)",
         "ranked = sorted(scores, key=scores.get, reverse=True)"),
        ("population deviations", "statistics.stdev(values)", "statistics.pstdev(values)"),
    ],
    "study/report/compare.py": [
        ("first less later", "[scores[first][cell]]], (1, -1))", "[scores[first][cell]]], (-1, 1))"),
    ],
    "study/report/costs.py": [
        ("cost of a seed summed", '["cell", "seed"])["seconds"].sum()', '["cell", "seed"])["seconds"].mean()'),
    ],
    "cluster.py": [
        ("a node's only task takes one GPU", "if tasks < 2 or", "if tasks < 1 or"),
        ("a slice begins where the first does", "number * len(hosts) + worker", "worker"),
        ("loopback across hosts", "(found.hosts or 1) > 1 and loopback", "False and loopback"),
        ("JAX chooses the GPUs", 'cluster_detection_method="deactivate"', "cluster_detection_method=None"),
    ],
}  # fmt: skip
FAULTS = [Fault(name, file, old, new) for file, rows in ROWS.items() for name, old, new in rows]
