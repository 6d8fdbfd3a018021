"""Faults of what is asked of a model."""

ROWS = {
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
}  # fmt: skip
