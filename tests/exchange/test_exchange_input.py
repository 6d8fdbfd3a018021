"""What a directory of Hugging Face's format may hold, and how it is refused: one line, and nothing is left."""

import json
import pathlib
import shutil

import pytest

from lab import command, convert
from lab.errors import UserError
from lab.exchange import importing

PLACE = pathlib.Path(__file__).with_name("reference_checkpoints")


def quiet(*told):
    """What a conversion has to say."""


def rewrite(file: pathlib.Path, change) -> None:
    """Changes the header of a file of tensors, in which each still has its numbers."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    text = json.dumps(change(header)).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def test_text_of_a_model_with_pictures_is_that_model(tmp_path):
    """Gemma 3 from 4B on: the text under text_config, its tensors under another name beside those of pictures."""
    place = shutil.copytree(PLACE / "gemma3", tmp_path / "nested")
    text = json.loads((place / "config.json").read_text())
    nested = {"model_type": "gemma3", "text_config": text, "vision_config": {}, "eos_token_id": [2, 3]}
    (place / "config.json").write_text(json.dumps(nested))
    rewrite(place / "model.safetensors", lambda header: {
        name.replace("model.", "language_model.model.", 1) if "layers.0" not in name
        else name.replace("model.", "model.language_model.", 1): one for name, one in header.items()
    } | {"vision_tower.x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})  # fmt: skip
    plain, opened = importing.Opened(PLACE / "gemma3"), importing.Opened(place)
    assert opened.model == plain.model and opened.text["eos_token_id"] == 2
    assert opened.source.tensors.keys() == plain.source.tensors.keys()


# How a directory is spoilt, what the line says of it, and of which checkpoint (llama3: two files, and more).
def config_says(**values):
    def spoil(place):
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(config | values))

    return spoil


def header_says(change):
    return lambda place: rewrite(place / "model.safetensors", change)


def _first(place):
    return sorted(place.glob("model-*.safetensors"))[0]


def _cut(file, most):
    file.write_bytes(file.read_bytes()[:most])


def _index_says(change):
    def spoil(place):
        file = place / "model.safetensors.index.json"
        file.write_text(change(file.read_text()))

    return spoil


def _tokenizer_says(change):
    def spoil(place):
        made = json.loads((place / "tokenizer.json").read_text())
        change(made)
        (place / "tokenizer.json").write_text(json.dumps(made))

    return spoil


def _without_bos(made):
    made["added_tokens"] = [token for token in made["added_tokens"] if token["id"] != 1]
    del made["model"]["vocab"]["<s>"]


NORM = "model.norm.weight"
SPOILT = {
    "a family": ("qwen3", config_says(model_type="gpt9"), r"config.json: model_type = 'gpt9'.*llama"),
    "another head": ("qwen3", config_says(architectures=["Qwen3ForX"]), r"config.json: architectures = 'Qwen3ForX'"),
    "a rope type": (
        "qwen3",
        config_says(rope_scaling={"rope_type": "spiral", "factor": 2}),
        r"config.json: rope_type = 'spiral'",
    ),
    "dropout": ("qwen3", config_says(attention_dropout=0.1), r"config.json: attention_dropout = 0.1 is not supported"),
    "quantised": ("qwen3", config_says(quantization_config={"bits": 4}), r"config.json: quantization_config"),
    "an activation": ("qwen3", config_says(hidden_act="mish"), r"config.json: hidden_act = 'mish'.*silu"),
    "experts": ("qwen3", config_says(num_experts=8), r"config.json: num_experts = 8"),
    "a layer type": ("qwen3", config_says(layer_types=["full_attention", "chunked"]), r"layer_types = 'chunked'"),
    "layer types": ("qwen3", config_says(layer_types=["full_attention"]), r"layer_types has 1 entries for 2 layers"),
    "no number": ("qwen3", config_says(rms_norm_eps="small"), r"config.json: rms_norm_eps = 'small'"),
    "no layers": ("qwen3", config_says(num_hidden_layers=0), r"config.json: num_hidden_layers = 0"),
    "groups": ("qwen3", config_says(num_key_value_heads=3), r"kv_heads = 3"),
    "a shape": ("qwen3", config_says(intermediate_size=25), r"model.safetensors: model.layers.0.mlp.*25"),
    "more layers": ("llama2", config_says(num_hidden_layers=3), r"model.safetensors has no model.layers.2"),
    "fewer layers": ("llama2", config_says(num_hidden_layers=1), r"model.safetensors holds model.layers.1"),
    "no config": ("qwen3", lambda place: (place / "config.json").unlink(), r"has no config.json"),
    "a torn config": ("qwen3", lambda place: _cut(place / "config.json", 40), r"config.json is damaged"),
    "no weights": ("qwen3", lambda place: (place / "model.safetensors").unlink(), r"has neither model.safetensors nor"),
    "a torn file": (
        "qwen3",
        lambda place: _cut(place / "model.safetensors", 6000),
        r"model.safetensors cannot be read",
    ),
    "a file of no tensors": (
        "qwen3",
        lambda place: _cut(place / "model.safetensors", 4),
        r"cannot be read as safetensors",
    ),
    "a missing tensor": (
        "qwen3",
        header_says(lambda h: {("x" + n if n == NORM else n): t for n, t in h.items()}),
        r"has no model.norm.weight, \[16\]",
    ),
    "another shape": (
        "qwen3",
        header_says(lambda h: h | {NORM: h[NORM] | {"shape": [2, 8]}}),
        r"model.norm.weight is \[2, 8\], .*\[16\]",
    ),
    "another type": (
        "qwen3",
        header_says(lambda h: h | {NORM: h[NORM] | {"dtype": "I16"}}),
        r"model.norm.weight is of I16.*BF16",
    ),
    "a missing shard": (
        "llama3",
        lambda place: _first(place).unlink(),
        r"model-00001-of-.* is missing: .* holds model",
    ),
    "a torn shard": ("llama3", lambda place: _cut(_first(place), 900), r"model-00001-of-.*cannot be read"),
    "names twice": (
        "llama3",
        _index_says(lambda t: t.replace('"weight_map": {', f'"weight_map": {{"{NORM}": "x",')),
        rf"names {NORM} twice",
    ),
    "names what is not there": (
        "llama3",
        _index_says(lambda t: t.replace(NORM, "model.norm.bias")),
        r"does not hold model.norm.bias",
    ),
    "a file elsewhere": (
        "llama3",
        _index_says(lambda t: t.replace("model-00001", "../model-00001")),
        r"must be a name of a file beside it",
    ),
    "a copied shard": (
        "llama3",
        lambda place: shutil.copy(_first(place), sorted(place.glob("model-*"))[1]),
        r"does not hold|both hold",
    ),
    "no tokenizer": ("qwen3", lambda place: (place / "tokenizer.json").unlink(), r"has no tokenizer.json"),
    "a torn tokenizer": ("qwen3", lambda place: _cut(place / "tokenizer.json", 99), r"is not a tokenizer.json"),
    "no first token": ("qwen3", _tokenizer_says(_without_bos), r"tokenizer.json has no token of id 1.*bos_token_id"),
    "too many tokens": (
        "qwen3",
        _tokenizer_says(lambda made: made["model"]["vocab"].update(w999=64)),
        r"id 64.*vocab_size = 64",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_bad_input_is_one_line_that_names_it_and_leaves_nothing(what, tmp_path):
    name, spoil, told = SPOILT[what]
    place = shutil.copytree(PLACE / name, tmp_path / "there")
    spoil(place)
    with pytest.raises(UserError, match=told) as error:
        importing.from_hf(place, tmp_path / "out", quiet, quiet)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_tied_weights_that_differ_are_refused(tmp_path):
    place = shutil.copytree(PLACE / "qwen2.5", tmp_path / "there")
    config_says(tie_word_embeddings=True)(place)
    with pytest.raises(UserError, match=r"lm_head.weight is not model.embed_tokens.weight.*tie_word_embeddings"):
        importing.Opened(place)


def test_a_conversion_that_is_stopped_leaves_nothing(tmp_path):
    def stop(size):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        importing.from_hf(PLACE / "qwen3", tmp_path / "out", quiet, stop)
    assert not [*tmp_path.iterdir()]
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="is there already"):
        importing.from_hf(PLACE / "qwen3", tmp_path / "out", quiet, quiet)


def test_names_are_asked_of_the_hub_and_paths_are_not(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, **options):
        asked.append(name)
        if name == "nobody/nothing":
            raise OSError("no network\nand more")
        return str(PLACE / "qwen3")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert importing.locate("some/model") == PLACE / "qwen3"
    assert importing.locate(str(tmp_path)) == tmp_path
    with pytest.raises(UserError, match=r"nobody/nothing.*no network\)"):
        importing.locate("nobody/nothing")
    for path in ("./here", "/a/b", "a/b/c", "~/x"):
        with pytest.raises(UserError, match="is no directory"):
            importing.locate(path)
    assert asked == ["some/model", "nobody/nothing"]


def test_a_mistake_ends_the_command_with_one_line_and_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lab.convert", "from-hf", str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        command.run(convert.main)
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert told.count("\n") == 1 and told.startswith("lab: ") and "has no config.json" in told
