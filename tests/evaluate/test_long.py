"""Losses over lengths against their definitions in numpy, on the logits of one whole pass; chunks change nothing."""

import jax
import numpy as np
import pytest
import tiny

import lab.config
from lab.errors import UserError
from lab.evaluate import asks, conditions, long, passes
from lab.evaluate.passes import Pass
from lab.train import compiled

L, LONGEST, VOCABULARY = 6, 17, 23


def config_of(**fields):
    config = lab.config.base()
    config.model.update(dict(dim=16, layers=2, vocabulary=VOCABULARY))
    config.model.mixer.update(dict(heads=2, kv_heads=1, head_dim=8))
    config.model.feedforward.width = 16
    config.model.position.update(dict(theta=50.0, unselected="time"))
    config.run.implementation = "reference"
    config.data.text_length = L
    asked = dict(lengths=(5, 11, LONGEST), chunk=4, rows=3, documents=4, stride=3, texts=60) | fields
    lab.config.add_ask(config, "long", "length", **asked)
    return config


@pytest.fixture(scope="module")
def model():
    return tiny.model(config_of())


@pytest.fixture(scope="module")
def nats(model):
    """Of every label of a text [n]: -log p of the token at 1 .. n - 1 given all before, float64; and whether it is the
    likeliest. One pass, whole logits."""
    forward = jax.jit(lambda tokens: model(tokens)[0])

    def of(text):
        padded = np.zeros((1, LONGEST), np.int32)
        padded[0, : len(text)] = text
        z = np.asarray(forward(padded), np.float64)[: len(text) - 1]
        return np.log(np.exp(z).sum(-1)) - z[np.arange(len(z)), text[1:]], z.argmax(-1) == text[1:]

    return of


def texts(seed=0, count=60):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, rng.integers(2, L + 1)).astype(np.int32) for _ in range(count)]


def found_of(config, model, given):
    run = conditions.evaluate(config, "long", model, given, tiny.mesh(), stop=lambda: False)
    return {one.value: one for one in run}


def sliding_by_definition(nats, document, window, stride, bos):
    """Mean over the tokens of a document of the loss in the first window that has them with something before them."""
    starts = [s for s in range(0, len(document), stride) if s + window < len(document)] + [len(document) - window]
    losses = {}
    for start in starts:
        text = np.concatenate([bos, document[start : start + window]])
        own = nats(text)[0]
        for place in range(1, len(text)):
            losses.setdefault(start - len(bos) + place, own[place - 1])
    return np.mean(list(losses.values())), len(losses)


@pytest.mark.parametrize("bos", [-1, 7])
def test_losses_over_lengths_are_their_definitions(model, nats, bos):
    config, given = config_of(bos=bos), texts()
    first = np.full(int(bos >= 0), bos)
    longest = LONGEST - len(first)
    joined = np.concatenate(given)
    there = len(joined) // longest
    documents = [joined[i * longest : (i + 1) * longest] for i in (np.arange(4) * there // 4)]
    for length, one in found_of(config, model, given).items():
        whole = [np.concatenate([first, d[: length - len(first)]]) for d in documents]
        losses, right = (np.array(x) for x in zip(*map(nats, whole), strict=True))
        assert one.tokens == losses.size == 4 * (length - 1) and one.read >= 4 * length
        assert one.loss == pytest.approx(losses.mean(), rel=1e-5)
        assert one.accuracy == right.mean()
        assert one.further["ppl"] == pytest.approx(np.exp(losses.mean()), rel=1e-5)
        assert one.further["within"] == pytest.approx(losses[:, :L].mean(), rel=1e-5)
        assert (one.further["beyond"] is None) == (length <= L)
        if length > L:
            assert one.further["beyond"] == pytest.approx(losses[:, L:].mean(), rel=1e-5)
        np.testing.assert_allclose(np.array(one.documents["nats"]).sum(1), losses.sum(1), rtol=1e-5)
        slid = [sliding_by_definition(nats, d, length - len(first), 3, first) for d in documents]
        assert one.further["sliding"] == pytest.approx(np.mean([mean for mean, _ in slid]), rel=1e-5)
        assert {count for _, count in slid} == {one.documents["sliding_tokens"]} == {longest - (bos < 0)}


def test_buckets_of_positions_double_and_the_first_is_within_L(model, nats):
    assert long.edges(6, 5) == [0, 5] and long.edges(6, 6) == [0, 6]
    assert long.edges(6, 17) == [0, 6, 12, 17] and long.edges(8, 64) == [0, 8, 16, 32, 64]
    one = found_of(config_of(stride=0, documents=1), model, texts())[LONGEST]
    losses = nats(np.concatenate(texts())[:LONGEST])[0]
    for low, high in ((0, 6), (6, 12), (12, 17)):
        assert one.further[f"nats_{low}_{high}"] == pytest.approx(losses[low:high].mean(), rel=1e-5)
    assert "sliding" not in one.further and "sliding" not in one.documents


def test_what_is_one_test_has_the_same_numbers(model):
    """What the family of tests takes for one: within L at every longer length, all of a text of at most L tokens, and
    one window over the longest documents."""
    found = {n: one.documents for n, one in found_of(config_of(), model, texts()).items()}
    nats = {n: np.array(kept["nats"]) for n, kept in found.items()}
    np.testing.assert_allclose(nats[11][:, 0], nats[LONGEST][:, 0], rtol=1e-6)
    assert found[11]["tokens"][0] == found[LONGEST]["tokens"][0] == L and nats[5].shape[1] == 1
    np.testing.assert_allclose(found[LONGEST]["sliding"], nats[LONGEST].sum(1), rtol=1e-6)
    assert found[LONGEST]["sliding_tokens"] == sum(found[LONGEST]["tokens"])


def test_L_is_that_of_the_ask_else_of_the_model_else_of_the_texts():
    config = config_of()
    assert long.trained(config, config.evaluate.long) == L
    config.model.position.trained = 9
    assert long.trained(config, config.evaluate.long) == 9
    config.evaluate.long.trained = 4
    assert long.trained(config, config.evaluate.long) == 4


def test_chunks_and_the_company_of_longer_rows_change_nothing(model):
    """Rows of 17, 9 and 2 tokens, each alone in one chunk, and together in chunks of 4."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, VOCABULARY, (3, 20)).astype(np.int32)
    labels = rng.integers(0, VOCABULARY, (3, 20)).astype(np.int32)
    for row, length in enumerate((17, 9, 2)):
        tokens[row, length:] = labels[row, length:] = -1
    labels[0, 3] = -1
    mesh, go = tiny.mesh(), lambda: None
    together = passes.score(model, tokens, labels, Pass(3, 4, 20), mesh, go)
    for row in range(3):
        alone = passes.score(model, tokens[row : row + 1], labels[row : row + 1], Pass(1, 20, 20), mesh, go)
        known = tokens[row] >= 0
        np.testing.assert_allclose(together.nats[row], alone.nats[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(together.right[row], alone.right[0])
        np.testing.assert_allclose(together.top[row][known], alone.top[0][known], rtol=1e-4, atol=1e-5)
        assert (together.nats[row][labels[row] < 0] == 0).all() and not together.right[row][labels[row] < 0].any()


OVER_DEVICES = {
    "plain": {},
    "hybrid": {"position.map.name": "hybrid"},
    "rerope": {"position.map.name": "rerope", "position.map.window": 3},
    "yarn": {"position.scaling.name": "yarn", "position.scaling.factor": 3.0},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "axes"), [*((m, dict(data=2, fsdp=2, tensor=2)) for m in OVER_DEVICES), ("rerope", dict(context=2))]
)
def test_over_devices_every_row_is_that_of_one_device(method, axes):
    """Rows and heads are laid over eight, and the last call has rows of nothing; or the queries of a chunk over two."""
    changed = {"position.trained": L} | OVER_DEVICES[method] if OVER_DEVICES[method] else {}
    config = config_of(rows=4, documents=3, bos=7, model=tuple(changed.items()))
    config.model.mixer.kv_heads = 2
    model, given, mesh = tiny.model(config), texts(), tiny.mesh(**axes)
    alone = found_of(config, model, given)
    over = conditions.evaluate(config, "long", compiled.laid(model, mesh), given, mesh, stop=lambda: False)
    for one in over:
        other = alone[one.value]
        assert (one.tokens, one.further["texts"]) == (other.tokens, other.further["texts"])
        for name in ("nats", "sliding"):
            np.testing.assert_allclose(one.documents[name], other.documents[name], rtol=1e-5)
        numbers = {name: value for name, value in one.further.items() if isinstance(value, float)}
        assert numbers == pytest.approx({name: other.further[name] for name in numbers}, rel=1e-5)
        assert (one.loss, one.accuracy) == (pytest.approx(other.loss, rel=1e-5), other.accuracy)


def test_logits_are_never_those_of_a_whole_row():
    config = config_of()
    config.model.vocabulary = 20_000
    model = tiny.model(config)
    program = passes.executable(model, Pass(1, 8, 512), tiny.mesh())
    assert program.memory_analysis().temp_size_in_bytes < 512 * 20_000 * 4 / 8


def test_one_program_serves_every_length_and_window(model, monkeypatch):
    programs = set()
    compile_chunk = compiled.score_chunk

    def counted(*arguments):
        program = compile_chunk(*arguments)
        programs.add(id(program))
        return program

    monkeypatch.setattr(compiled, "score_chunk", counted)
    found_of(config_of(), model, texts())
    assert len(programs) == 1


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (dict(lengths=()), "evaluate.long.lengths is empty"),
        (dict(lengths=(5, 5)), "has a value twice"),
        (dict(stride=5), "evaluate.long.stride = 5 leaves tokens out between windows of 5; choose at most 4"),
        (dict(bos=VOCABULARY), f"evaluate.long.bos = {VOCABULARY} is no id of model.vocabulary"),
        (dict(lengths=(1, 5)), "must be at least 2"),
        (dict(trained=7), "evaluate.long.trained = 7 is not model.position.trained = 9"),
    ],
)
def test_what_cannot_be_asked_is_refused(fields, told):
    config = config_of(**fields)
    config.model.position.trained = 9 if "trained" in fields else 0
    with pytest.raises(UserError, match=told):
        asks.check(config)


def test_too_little_text_is_told(model):
    """By how much, and for what there is enough: of 60 tokens, three documents of 17, or four of 15."""
    config, given = config_of(), [np.arange(5, dtype=np.int32)] * 12
    told = "4 documents of 17 tokens take 68 of them, and the validation texts have 60; ask of "
    with pytest.raises(UserError, match=f"an ask: {told}.*bring more text, as with data.corpus = 'files'"):
        found_of(config, model, given)
    enough = "ask of evaluate.long.documents = 3, or of lengths up to 15, or bring more text"
    with pytest.raises(UserError, match=f"evaluate.long: .*have 60; {enough}"):
        long.check_texts(config.evaluate.long, "evaluate.long", given)
    for fields in (dict(documents=3), dict(lengths=(5, 15)), dict(lengths=(5, 16), bos=7)):
        long.check_texts(config_of(**fields).evaluate.long, "evaluate.long", given)
    config.evaluate.long.update(lengths=(5, 16))
    with pytest.raises(UserError, match="lengths up to 15"):
        long.check_texts(config.evaluate.long, "evaluate.long", given)


def test_a_learned_position_without_a_vector_is_refused():
    config = config_of()
    config.model.position.update(dict(name="learned", length=LONGEST - 1, theta=1e4, unselected="index"))
    with pytest.raises(UserError, match=r"position\.length"):
        asks.check(config)
