"""Faults of sampling, the engine, and what serves it."""

ROWS = {
    "decode/sampling.py": [
        ("a branch draws like another", "for number in (request, branch, step):", "for number in (request, step):"),
        ("a filter for rows that ask for none", "jnp.where(asked_B[:, None, None], change(z_BNC), z_BNC)",
         "change(z_BNC)"),
        ("nucleus without the token that fills it", "(before_BNC < top_p_B11)", "(before_BNC + p_BNC < top_p_B11)"),
        ("negative logits divided", "z_BNC * penalty_B11)", "z_BNC / penalty_B11)"),
    ],
    "decode/attention.py": [
        ("a kernel that repeats what is wrong", "if not error <= found", "if not found['same'] and not error <= found"),
    ],
    "decode/engine.py": [
        ("a GPU decodes with what waits for the host", "attention.settled(model.apart(), (branches, self.width), "
         "self.length)", "model.apart()"),
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
        ("the space of a first word lost", "self.tokens = prompt(tokenizer)", "self.tokens = []"),
        ("letters behind broken bytes lost", "if now.startswith(decoded(end)))", "if end == len(self.tokens))"),
    ],
    "serve/worker.py": [
        ("who leaves goes on", "                    self.engine.cancel(number)\n", "                    pass\n"),
        ("places of ended requests kept", "            going.left -= bool(passage.ended)\n", ""),
        ("one request more than may wait", "+ len(answer.asks) > self.room:", "+ len(answer.asks) > self.room + 1:"),
        ("half of what is refused begins", "            self.abandon(answer)\n        else:", "        else:"),
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
}  # fmt: skip
