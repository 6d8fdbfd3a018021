"""Chat templates: what is read of a directory, what they write, and that a bad one is one line."""

import datetime
import json
import pathlib

import numpy as np
import pytest
import tokenizers as library
from tokenizers import models, pre_tokenizers

from lab.data import chat, tokenizers
from lab.errors import UserError

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
DATED = """{{- bos_token }}{% set day = strftime_now("%d %b %Y") %}
{%- if messages[0]['role'] != 'user' %}{{ raise_exception('a user begins') }}{% endif %}
{%- for message in messages %}
    {%- if loop.index > 1 %}{% break %}{% endif %}
    {%- generation %}{{ day }} {{ message | tojson }}{% endgeneration %}
{%- endfor %}
{%- if tools is not none or documents is not none %}tools{% endif %}[/INST]"""


def directory(place: pathlib.Path, template=None, **settings) -> pathlib.Path:
    if template is not None:
        (place / chat.FILE).write_text(template)
    (place / chat.SETTINGS).write_text(json.dumps(settings))
    return place


def test_what_a_template_writes_is_what_it_says(tmp_path):
    made = chat.find(directory(tmp_path, CHATML))
    assert made.asked(" Hi\n there ") == "<|im_start|>user\nHi\n there<|im_end|>\n<|im_start|>assistant\n"
    tokens = dict(bos_token={"content": "<s>"}, eos_token="</s>", add_bos_token=True)
    dated = chat.find(directory(tmp_path, DATED, **tokens))
    assert dated.asked("<é>") == '<s>26 Jul 2024 {"role": "user", "content": "<é>"}[/INST]'
    assert dated.asked("x", datetime.datetime(2031, 2, 3)).startswith("<s>03 Feb 2031 {")


def test_a_template_is_found_as_transformers_finds_it(tmp_path):
    assert chat.find(tmp_path) is None and chat.find(directory(tmp_path)) is None
    assert chat.find(directory(tmp_path, chat_template="one")).asked("") == "one"
    two = [{"name": "tools", "template": "two"}, {"name": "default", "template": "three"}]
    assert chat.find(directory(tmp_path, chat_template=two)).asked("") == "three"
    assert chat.find(directory(tmp_path, "four", chat_template=two)).asked("") == "four"
    (tmp_path / chat.SPECIAL).write_text(json.dumps({"bos_token": "<a>", "sep_token": "<b>"}))
    found = chat.find(directory(tmp_path, "{{ bos_token }}{{ sep_token }}{{ pad_token }}", bos_token="<c>"))
    assert found.asked("") == "<c><b>"


BAD = {
    "syntax": ("{% for x in %}", "Expected an expression"),
    "unknown": ("{{ messages.nothing.more }}", "has no attribute"),
    "refused": ("{{ raise_exception('no\nsystem') }}", "no system"),
    "unsafe": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "endless": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "recursive": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "a type": ("{{ messages + 1 }}", "concatenate"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_template_is_one_line(kind, tmp_path):
    template, said = BAD[kind]
    with pytest.raises(UserError, match=rf"the chat template of .*{chat.FILE} cannot be used: .*{said}") as error:
        chat.find(directory(tmp_path, template)).asked("x")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", [5, [5], [{"name": "tools", "template": "x"}], {"a": 1}, [{"name": "default"}]])
def test_what_is_no_template_is_one_line(given, tmp_path):
    with pytest.raises(UserError, match=r"tokenizer_config.json: chat_template = .* is no text, and none named"):
        chat.find(directory(tmp_path, chat_template=given))
    for content in (b"{", b"[]", b"\xff"):
        (tmp_path / chat.SETTINGS).write_bytes(content)
        with pytest.raises(UserError, match=chat.SETTINGS):
            chat.find(tmp_path)


@pytest.fixture
def saved(tmp_path):
    """A tokenizer with special tokens, and a template beside it."""
    vocabulary = {name: i for i, name in enumerate(["<unk>", "<s>", "<end>", "user", "assistant", "hi", "<"])}
    made = library.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["<s>", "<end>"])
    made.save(str(tmp_path / tokenizers.FILE))
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }} {{ m.content }}<end>{% endfor %}assistant"
    (tmp_path / chat.GENERATION).write_text(json.dumps({"eos_token_id": [2, 4]}))
    return directory(tmp_path, template, bos_token="<s>")


def test_special_tokens_of_a_template_are_such_and_those_of_a_text_are_not(saved):
    found = tokenizers.load(saved, "<end>")
    assert found.encode_chat(found.chat.asked("hi")).tolist() == [1, 3, 5, 2, 4]
    assert 1 not in found.encode("<s> hi") and found.ends == (2, 4)
    (saved / chat.GENERATION).write_text(json.dumps({"eos_token_id": "2"}))
    with pytest.raises(UserError, match=r"generation_config.json: eos_token_id = '2' must be"):
        tokenizers.load(saved, "<end>").ends  # noqa: B018
    assert tokenizers.Bytes().chat is None
    np.testing.assert_array_equal(tokenizers.load(saved).encode_chat("hi hi"), [5, 5])
