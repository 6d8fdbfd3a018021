"""Text as tokens come: nothing is shown that is taken back, and stop strings end it wherever tokens are cut."""

import decoding
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lab.data.tokenizers import Bytes, Json, Symbols
from lab.decode.text import BROKEN, Transcript, spelled, transcribed

LETTERS = st.text(st.sampled_from("ab¢€😀"), max_size=12)


def stopped(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text up to the first stop string that is complete, letter by letter."""
    for end in range(len(text) + 1):
        if found := [text[:end].find(stop) for stop in stops if stop in text[:end]]:
            return text[: min(found)], True
    return text, False


@given(LETTERS, st.lists(st.text(st.sampled_from("ab¢€😀"), min_size=1, max_size=3), max_size=3))
def test_pieces_are_the_text_up_to_a_stop_string(text, stops):
    transcript, pieces = Transcript(Bytes(), stops), []
    for token in Bytes().encode(text).tolist():
        pieces.append(transcript.add(token))
        assert "�" not in pieces[-1]
        if transcript.stopped:
            break
    pieces.append(transcript.finish())
    assert ("".join(pieces), transcript.stopped) == stopped(text, stops)
    assert transcript.text == "".join(pieces)


def test_a_letter_is_shown_when_it_is_whole_and_a_stop_string_never():
    transcript = Transcript(Bytes(), ["STOP"])
    shown = [transcript.add(token) for token in "é ST! STO".encode()]
    assert shown == ["", "é", " ", "", "", "ST!", " ", "", "", ""]
    assert transcript.finish() == "STO"


@given(st.binary(max_size=10))
def test_bytes_that_are_no_letters_end_nothing(found):
    """They are shown as broken after four at the latest, and what follows is read."""
    transcript = Transcript(Bytes())
    pieces = [transcript.add(token) for token in found] + [transcript.add(token) for token in b"\x00\x00\x00\x00 end"]
    assert "".join(pieces).endswith("\x00 end")


@given(st.lists(st.binary(min_size=1, max_size=1) | st.sampled_from(["😀".encode(), "€".encode()]), max_size=9))
def test_letters_behind_broken_bytes_are_read(parts):
    """Of bytes that are no letter there may be more or fewer marks; each letter is there, and no other."""
    found = b"".join(parts)
    transcript = Transcript(Bytes())
    text = "".join(transcript.add(token) for token in found) + transcript.finish()
    assert text.replace(BROKEN, "") == found.decode(errors="replace").replace(BROKEN, "")


def words() -> Json:
    """A tokenizer that writes a space before each word, and takes it from the first, as Llama 2's does."""
    ids = {word: i for i, word in enumerate(["<unk>", "▁0", "▁hello", "▁world", "world"])}
    made = Tokenizer(models.WordLevel(ids, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return Json(made.to_str())


@pytest.mark.parametrize(("tokenizer", "prompt", "tokens", "text"), [
    (Symbols(20), [1, 2], [3, 14, 15], "1 2 3 14 15"),
    (words(), [2], [3, 3], "hello world world"),
    (words(), [2], [4, 3], "helloworld world"),
])  # fmt: skip
def test_a_text_goes_on_from_its_prompt(tokenizer, prompt, tokens, text):
    """The first word has its space, and a token that goes on in a word is told from one that begins it."""
    transcript = Transcript(tokenizer)
    pieces = [transcript.add(token) for token in tokens]
    assert tokenizer.decode(prompt) + "".join(pieces) == text
    assert pieces == [spelled(token, tokenizer) for token in tokens]


def test_a_stop_string_ends_a_branch_and_not_the_others():
    """Found in what a model writes, so that it is there."""
    model = decoding.built("default", **decoding.ALONE)

    def written(stops: list[str]) -> dict[int, tuple[str, str]]:
        engine, texts = decoding.engine(model), {1: ("", ""), 2: ("", "")}
        engine.submit([1, 2, 3], branches=2, most_tokens=9)
        for piece in transcribed(engine, Symbols(29), [stops]):
            texts[piece.branch] = texts[piece.branch][0] + piece.text, piece.ended
        assert engine.free_slots == decoding.SHAPE["rows"] * decoding.SHAPE["length"]
        return texts

    whole = written([])
    assert {ended for _, ended in whole.values()} == {"length"}
    stop = whole[1][0][5:8]
    for branch, (text, ended) in written([stop]).items():
        expected, stops = stopped(whole[branch][0], [stop])
        assert (text, ended) == (expected, "stop" if stops else "length")
