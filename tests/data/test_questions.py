"""Files as SQuAD has them: what both versions hold, and the line that a damaged one is refused by."""

import copy
import gzip
import json

import pytest

from lab.data.questions import Paragraph, Question, squad
from lab.errors import UserError


def answer(text: str) -> dict:
    return {"text": text, "answer_start": 0}


FIRST = {
    "version": "1.1",
    "data": [
        {"title": "Rivers", "paragraphs": [
            {"context": "The Nile is long.", "qas": [
                {"id": "a", "question": "What is long?", "answers": [answer("The Nile"), answer("Nile")]},
                {"id": "b", "question": "How is the Nile?", "answers": [answer("long")]},
            ]},
            {"context": "Nobody asks of this.", "qas": []},
        ]},
        {"title": "Café", "paragraphs": [
            {"context": "Café au lait: milk.", "qas": [{"id": "c", "question": "Of?", "answers": [answer("lait")]}]},
        ]},
    ],
}  # fmt: skip
READ = [
    Paragraph(
        "The Nile is long.", (Question("What is long?", ("The Nile", "Nile")), Question("How is the Nile?", ("long",)))
    ),
    Paragraph("Nobody asks of this.", ()),
    Paragraph("Café au lait: milk.", (Question("Of?", ("lait",)),)),
]


@pytest.fixture
def write(tmp_path):
    def write(content, name="squad.json") -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return str(path)

    return write


def test_the_first_version_is_read_in_its_order(write):
    assert squad(write(FIRST)) == READ
    assert squad(write(gzip.compress(json.dumps(FIRST, ensure_ascii=False).encode()), "squad.json.gz")) == READ
    assert squad(write(b"\xef\xbb\xbf" + json.dumps(FIRST).encode())) == READ


def test_the_second_version_says_what_has_no_answer(write):
    second = copy.deepcopy(FIRST)
    first, other = second["data"][0]["paragraphs"][0]["qas"]
    first |= {"is_impossible": True, "answers": [], "plausible_answers": [answer("long")]}
    other["is_impossible"] = False
    (paragraph, *_) = squad(write(second))
    assert [question.answers for question in paragraph.questions] == [("",), ("long",)]


def changed(place: list, value) -> dict:
    """The first version with a value in a place of it; None: without what is there."""
    made = copy.deepcopy(FIRST)
    *path, last = place
    held = made
    for step in path:
        held = held[step]
    if value is None:
        del held[last]
    else:
        held[last] = value
    return made


PARAGRAPH = ["data", 0, "paragraphs", 0]
QA = [*PARAGRAPH, "qas", 1]


@pytest.mark.parametrize(("content", "told"), [
    (changed(["data"], None), " lacks 'data'; it has: version"),
    (changed(["data"], {}), ": 'data' is {}, no list"),
    (changed(["data", 1], "Rivers"), ": data[1] is 'Rivers', no object"),
    (changed(["data", 1, "paragraphs"], None), ": data[1] lacks 'paragraphs'; it has: title"),
    (changed([*PARAGRAPH, "context"], None), ": data[0].paragraphs[0] lacks 'context'; it has: qas"),
    (changed([*PARAGRAPH, "context"], 3), ": data[0].paragraphs[0]: 'context' is 3, no text"),
    (changed([*PARAGRAPH, "context"], "a\ud800"), ": data[0].paragraphs[0]: 'context' has a lone surrogate at"),
    (changed([*PARAGRAPH, "qas"], None), ": data[0].paragraphs[0] lacks 'qas'; it has: context"),
    (changed([*QA, "question"], None), ": data[0].paragraphs[0].qas[1] lacks 'question'; it has: id, answers"),
    (changed([*QA, "answers"], None), ": data[0].paragraphs[0].qas[1] lacks 'answers'; it has: id, question"),
    (changed([*QA, "answers"], []), ": data[0].paragraphs[0].qas[1] has no answer, and no is_impossible = true"),
    (changed([*QA, "answers"], [{}]), ": data[0].paragraphs[0].qas[1].answers[0] lacks 'text'; it has: nothing"),
    (changed([*QA, "is_impossible"], "no"), ": data[0].paragraphs[0].qas[1]: 'is_impossible' is 'no', no true or"),
    ([FIRST], " lacks 'data'; it is a list"),
    ({"data": []}, " has no question in its 0 paragraphs"),
    (json.dumps(FIRST).encode()[:-9], " is no JSON: "),
    (b"", " is no JSON: "),
    (b"\xff\xfe", " is not UTF-8 at byte 0"),
    (b"[" * 100_000, " is no JSON: "),
    (gzip.compress(json.dumps(FIRST).encode())[:-12], "cannot read "),
])  # fmt: skip
def test_what_is_damaged_is_refused_by_its_file_and_place(write, content, told):
    path = write(content)
    with pytest.raises(UserError) as refusal:
        squad(path)
    message = str(refusal.value)
    assert path in message and "\n" not in message and len(message) < 600
    assert (told if told.startswith("cannot") else f"{path}{told}") in message


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none\.json: No such file"):
        squad(str(tmp_path / "none.json"))
