"""Questions on passages, answered by the engine: one after the other, as branches of one prompt, or several times each.

What is found beside answers is what they cost in tokens and steps, the same on every machine; times stand in timings.
"""

import collections
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from lab.data import generated, probes
from lab.data import questions as data_questions
from lab.data.checks import at_most_once
from lab.data.packing import LONGEST_ROW
from lab.data.questions import Paragraph
from lab.decode import forest
from lab.decode.engine import Engine
from lab.decode.sampling import Sampling, check
from lab.decode.text import Transcripts
from lab.errors import UserError
from lab.evaluate import answers, decoding
from lab.evaluate.decoding import Decoded
from lab.options import Option

ONE_BY_ONE, BRANCHES, VOTE, BEST = "one_by_one", "branches", "vote", "best-of"
OPTIONS = {
    "methods": Option(
        (ONE_BY_ONE, BRANCHES, "vote-1", "vote-8", "best-of-8"),
        "one_by_one and branches: greedy, each question by itself, or those of a passage as branches of it; vote-N, "
        "best-of-N: N sampled branches of one question, of which most agree with one, or one is likeliest",
        kind=tuple[str, ...],
    ),
    "passages": Option(32, "that are asked", least=1, most=2**16),
    "questions": Option(8, "of a passage at most: the branches of one prompt", least=1, most=2**10),
    "most_tokens": Option(8, "of an answer at most", least=1, most=LONGEST_ROW),
    "temperature": decoding.OPTIONS["temperature"],
}
OF_FACTS = OPTIONS | {"facts": Option(8, "of a passage", least=1)}
OF_FILE = OPTIONS | {"squad": Option("", "a JSON file of passages and questions, in the format of SQuAD 1.1 or 2.0")}


class Decoding(NamedTuple):
    """times: samples of a question; 0: none, the answer is greedy."""

    kind: str
    times: int = 0


class Form(NamedTuple):
    """What is asked, and what ends an answer: tokens, and strings."""

    paragraphs: list[Paragraph]
    stop: frozenset[int]
    stops: tuple[str, ...] = ()


class Sample(NamedTuple):
    """A text, and the log probability in nats of each of its tokens, but of the one that ended it."""

    text: str
    log_p: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of an empty answer the least: nothing is known of it."""
        return float(np.mean(self.log_p)) if self.log_p else -np.inf


def parsed(name: str, field: str = "a method") -> Decoding:
    """Raises UserError for a name of none."""
    if name in (ONE_BY_ONE, BRANCHES):
        return Decoding(name)
    found = re.fullmatch(rf"({VOTE}|{BEST})-([1-9]\d{{0,2}})", name)
    if not found:
        raise UserError(
            f"{field} = {name!r} is unknown; choose {ONE_BY_ONE}, {BRANCHES}, {VOTE}-N or {BEST}-N, N < 1000"
        )
    return Decoding(found[1], int(found[2]))


def _check(ask: ConfigDict, field: str) -> None:
    if not ask.methods:
        raise UserError(f"{field}.methods is empty; choose at least one, such as {ONE_BY_ONE!r}")
    at_most_once(f"{field}.methods", ask.methods)
    for name in ask.methods:
        parsed(name, f"a method in {field}.methods")
    try:
        check(Sampling(temperature=ask.temperature))
    except UserError as error:
        raise UserError(f"{field}: {error}") from None


def check_facts(config: ConfigDict, ask: ConfigDict, field: str) -> None:
    """Raises UserError for facts and questions that a training row has no room for, or no symbols."""
    _check(ask, field)
    settings, probe = generated.settings_of(config.data), probes.PROBES["passage"]
    needed = probe.tokens(ask.facts, settings._replace(questions=ask.questions))
    if needed > settings.length:
        raise UserError(
            f"{field}: passages of facts = {ask.facts} with questions = {ask.questions} take {needed} tokens, over "
            f"data.text_length = {settings.length}; choose fewer"
        )
    if probe.symbols(ask.facts) > settings.symbols:
        raise UserError(
            f"{field}.facts = {ask.facts} needs {probe.symbols(ask.facts)} symbols, over data.probe.symbols = "
            f"{settings.symbols}; lower the one or raise the other"
        )


def check_file(config: ConfigDict, ask: ConfigDict, field: str) -> None:
    """Raises UserError where no file is named."""
    _check(ask, field)
    if not ask.squad:
        raise UserError(f"{field}.squad is empty; name a JSON file of questions, in the format of SQuAD")


def ready(ask: ConfigDict, field: str, texts, tokenizer) -> None:
    """Raises UserError for a file that cannot be read or has too few passages. texts, tokenizer: not read."""
    if ask.squad and (there := len(_of_file(ask.squad))) < ask.passages:
        raise UserError(
            f"{field}.passages = {ask.passages}, and {ask.squad} has {there} paragraphs with questions; choose at most "
            "that many"
        )


def of_facts(config: ConfigDict, ask: ConfigDict, tokenizer) -> Form:
    """Of the probe `passage`: an answer ends with its mark. tokenizer: not read."""
    made = data_questions.of_facts(config.data, ask.facts, ask.questions, ask.passages)
    return Form(made, frozenset({probes.MARK}))


def of_file(config: ConfigDict, ask: ConfigDict, tokenizer) -> Form:
    """The first ask.passages of a file that have questions, as text: an answer ends with its line, or with the text."""
    paragraphs = [
        Paragraph(
            f"{one.context}\n",
            tuple(
                each._replace(text=f"Question: {each.text.strip()}\nAnswer:") for each in one.questions[: ask.questions]
            ),
        )
        for one in _of_file(ask.squad)[: ask.passages]
    ]
    return Form(paragraphs, frozenset(() if tokenizer.eos is None else (tokenizer.eos,)), ("\n",))


def _of_file(path: str) -> list[Paragraph]:
    return [one for one in data_questions.squad(path) if one.questions]


class Decoder:
    """Answers requests one after the other over an engine of `lanes` branches that each has room for; counts what it
    takes. told(): raises where the work is to end."""

    def __init__(self, model, tokenizer, form: Form, ask: ConfigDict, lanes: int, told: Callable[[], None]):
        self.tokenizer, self.form, self.most_tokens, self.told = tokenizer, form, ask.most_tokens, told
        self.encode = lambda text: [int(token) for token in tokenizer.encode(text)]
        prompt = max(len(self.prompt(one)) for one in form.paragraphs)
        question = max(len(self.encode(each.text)) for one in form.paragraphs for each in one.questions)
        length = forest.needed_for(prompt, [question] * lanes, ask.most_tokens)
        self.engine = Engine(model, rows=1, length=length, branches=lanes, chunk=decoding.CHUNK)
        self.transcripts = Transcripts(self.engine, tokenizer, collections.defaultdict(lambda: form.stops))
        self.steps = self.generated = 0

    def prompt(self, paragraph: Paragraph) -> list[int]:
        """In tokens, behind the one that texts begin with."""
        return ([] if self.tokenizer.bos is None else [self.tokenizer.bos]) + self.encode(paragraph.context)

    def __call__(self, paragraph: Paragraph, texts: Sequence[str], sampling: Sampling, stream: int) -> list[Sample]:
        """The answers of branches of one passage, which begin with these texts."""
        begun = [self.encode(text) for text in texts]
        self.engine.submit(
            self.prompt(paragraph), texts=begun, sampling=sampling, stop=self.form.stop, most_tokens=self.most_tokens,
            stream=stream,
        )  # fmt: skip
        written, log_p = [""] * len(texts), [[] for _ in texts]
        while self.engine.busy:
            self.told()
            before = self.engine.read
            for passage in self.transcripts.step():
                self.generated += 1
                written[passage.branch - 1] += passage.text
                if passage.ended != "stop":
                    log_p[passage.branch - 1].append(passage.event.log_p)
            self.steps += self.engine.read > before  # not one that tells of an end alone
        return [Sample(text.strip(), tuple(nats)) for text, nats in zip(written, log_p, strict=True)]


def decode_facts(config, ask, model, texts, tokenizer, mesh, values, stop) -> Iterator[Decoded]:
    """What each method finds of the facts of the probe `passage`. texts: not read."""
    return _decode(of_facts(config, ask, tokenizer), ask, model, tokenizer, mesh, values, stop)


def decode_file(config, ask, model, texts, tokenizer, mesh, values, stop) -> Iterator[Decoded]:
    """What each method finds of a file. texts: not read."""
    return _decode(of_file(config, ask, tokenizer), ask, model, tokenizer, mesh, values, stop)


def _decode(form: Form, ask: ConfigDict, model, tokenizer, mesh, values, stop) -> Iterator[Decoded]:
    model = jax.device_put(model, mesh.devices.flat[0])  # an engine is of one
    for name in values:
        yield answered(model, tokenizer, form, ask, name, stop)


def answered(model, tokenizer, form: Form, ask: ConfigDict, name: str, told: Callable[[], None]) -> Decoded:
    """Every question of a form by one method. The model lies on one device.

    Questions by themselves, and samples of one, are requests of their own, in turn; each reads its passage. Random
    numbers are those of (question, sample, token), whatever else is asked.
    """
    method = parsed(name)
    lanes = max(method.times, 1)
    if method.kind == BRANCHES:
        lanes = max(len(one.questions) for one in form.paragraphs)
    decoder = Decoder(model, tokenizer, form, ask, lanes, told)
    sampling = Sampling(temperature=float(ask.temperature)) if method.times else Sampling()
    first = form.paragraphs[0]
    decoder(first, [first.questions[0].text], sampling, 0)  # compiles
    decoder.steps = decoder.generated = decoder.engine.read = 0
    begun, taken, number = time.perf_counter(), [], 0
    for one in form.paragraphs:
        texts = [question.text for question in one.questions]
        if method.kind == BRANCHES:
            taken.append(decoder(one, texts, sampling, number))
        else:
            several = [decoder(one, [text] * lanes, sampling, number + i) for i, text in enumerate(texts)]
            taken.append([choose(method, samples) for samples in several])
        number += len(texts)
    return _scored(name, form, taken, decoder, time.perf_counter() - begun)


def choose(method: Decoding, samples: Sequence[Sample]) -> Sample:
    """The one of several answers to a question that the method takes."""
    if method.kind == BEST:
        return samples[answers.likeliest([each.mean for each in samples])]
    return samples[answers.voted([each.text for each in samples])]


def _scored(name: str, form: Form, taken: Sequence[Sequence[Sample]], decoder: Decoder, seconds: float) -> Decoded:
    """Loss: of answers that were taken. Accuracy: a mean over questions."""
    pairs = [list(zip(given, one.questions, strict=True)) for given, one in zip(taken, form.paragraphs, strict=True)]
    right = [[answers.exact(given.text, question.answers) for given, question in of] for of in pairs]
    fits = [[answers.f1(given.text, question.answers) for given, question in of] for of in pairs]
    log_p = [nats for given in taken for answer in given for nats in answer.log_p]
    count = sum(map(len, right))
    further = {
        "f1": float(np.sum(np.concatenate(fits))) / count,
        "questions": count,
        "generated": decoder.generated,
        "processed": decoder.engine.read,
        "steps": decoder.steps,
    }
    kept = {
        "exact": [list(map(int, of)) for of in right],
        "f1": fits,
        "answers": [[answer.text for answer in given] for given in taken],
    }
    loss, accuracy = (0.0 - float(np.sum(log_p))) / max(len(log_p), 1), sum(map(sum, right)) / count
    return Decoded(name, loss, accuracy, len(log_p), decoder.generated, seconds, further, documents=kept)
