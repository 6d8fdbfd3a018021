"""Faults of corpora, packing, batches."""

ROWS = {
    "data/outgoing.py": [
        ("kept in a store without a look", "return shards.kept(here, number)", "return told"),
        ("what is of others is deleted", " and _OURS.fullmatch(name)", ""),
        ("what is ahead stays in a store", "_all(store.delete, [name", "_all(str, [name"),
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
    "data/tokenizers.py": [
        ("letters left out are covered by others", "= self._marking if doubtful",
         "= (self._tokenizer, self._unknown) if doubtful"),
    ],
    "data/dataset.py": [("fingerprint without the cap", '["digest"], len(kept), conf', '["digest"], conf')],
}  # fmt: skip
