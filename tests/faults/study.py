"""Faults of cells, judgements, reports."""

ROWS = {
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
        ("other corpora are paired", "if unlike := _other_data(one, other):", "if unlike := '':"),
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
    "study/report/cell_page.py": [
        ("the command of the cell before", 'enumerate(study.plan["cells"], 1)', 'enumerate(study.plan["cells"], 0)'),
    ],
    "study/report/layout.py": [
        ("flags of the study's own share", 'given and "=" not in word', "False"),
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
}  # fmt: skip
