"""Text as tokens come: nothing is shown that is taken back, and stop strings end it wherever tokens are cut."""

import decoding
from hypothesis import given
from hypothesis import strategies as st

from lab.data.tokenizers import Bytes, Symbols
from lab.decode.text import Transcript, transcribed

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


def test_tokens_that_are_words_keep_their_spaces():
    transcript = Transcript(Symbols(20))
    assert "".join(transcript.add(token) for token in (3, 14, 15)) == "3 14 15"


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
