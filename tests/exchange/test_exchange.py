"""Models of `transformers` give their logits here, and come out again as they came in: reference_checkpoints/."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import tiny
from flax import nnx

import lab
import lab.config
from lab import model as lab_model
from lab.coordinates import Coordinates
from lab.data import tokenizers
from lab.exchange import architecture, companions, exporting, importing, tensors
from lab.exchange.families import FAMILIES
from lab.exchange.source import DTYPES
from lab.exchange.tensors import Parameter
from lab.model import mesh as lab_mesh
from lab.model import parameter
from lab.options import set_field
from lab.storage import read_json
from lab.train import checkpoint, origin, partition, streamed

PLACE = pathlib.Path(__file__).with_name("reference_checkpoints")
NAMES = sorted(path.name for path in PLACE.iterdir())
WHOLE = "llama3", "qwen2-window", "qwen3", "mistral-window", "gemma2", "gemma3"  # written, and exported again
FAST = "qwen3"


def quiet(*told):
    """What a conversion has to say."""


def held(directory: pathlib.Path) -> dict[str, tuple[str, bytes]]:
    """The type and the bytes of every tensor of a directory."""
    found = {}
    for path in directory.glob("*.safetensors"):
        with safetensors.safe_open(path, framework="np") as file:
            found |= {
                name: (file.get_slice(name).get_dtype(), file.get_tensor(name).tobytes())
                for name in file.keys()  # noqa: SIM118
            }
    return found


def assembled(opened: importing.Opened) -> nnx.Module:
    """The model, its weights put together from pieces."""
    structure, weights, tables = parameter.split(lab_model.undrawn(opened.model, jax.devices()[0]))
    arrays = []
    for one in opened.parameters:
        lazy, whole = importing._streamed(opened.source, one), np.full(one.shape, np.nan, np.float32)
        for index in streamed.boxes(lazy.shape, lazy.chunk):
            whole[index] = lazy.piece(index)
        arrays.append(jnp.asarray(whole))
    return nnx.merge(structure, jax.tree.unflatten(jax.tree.structure(weights), arrays), tables)


def off(model, name: str) -> float:
    """The largest difference of the logits over the largest of them."""
    expected = np.load(PLACE / name / "logits.npy")
    model.execution = model.execution._replace(implementation="reference")  # compiles in half the time
    found = jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(np.load(PLACE / name / "tokens.npy")))
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", [pytest.param(one, marks=() if one == FAST else pytest.mark.slow) for one in WHOLE])
def test_logits_and_round_trip(name, tmp_path, monkeypatch):
    """What is imported gives the logits, and what is exported is byte for byte what was imported."""
    monkeypatch.setattr(tensors, "PIECE", 500)  # of tensors of some kilobytes: all are cut
    importing.from_hf(PLACE / name, tmp_path / "in", quiet, quiet)
    model, tokenizer = lab.load(tmp_path / "in")
    assert off(model, name) < 1e-5
    assert tokenizer.encode("w3 w63").tolist() == [3, 63] and tokenizer.eos == 2

    made = exporting.to_hf(tmp_path / "in", tmp_path / "out", quiet, quiet)
    assert held(tmp_path / "out") == held(PLACE / name)
    was, now = (importing.Opened(path) for path in (PLACE / name, tmp_path / "out"))
    assert (was.family, was.model) == (now.family, now.model)
    for key in ("bos_token_id", "eos_token_id", "max_position_embeddings", "tie_word_embeddings"):
        assert made[key] == was.text[key]
    for file in (tokenizers.FILE, companions.SETTINGS, companions.GENERATION):
        assert (tmp_path / "out" / file).read_bytes() == (PLACE / name / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*NAMES} - {*WHOLE}))
def test_logits_and_config(name):
    """The same of a model that is put together in memory, and of its config.json."""
    opened = importing.Opened(PLACE / name)
    assert off(assembled(opened), name) < 1e-5
    config = lab.config.base()
    config.model = opened.model
    family, made = exporting.expressed(config, {"config": opened.text})
    assert (family, architecture.read(family, made, PLACE)) == (opened.family, opened.model)


def test_every_family_and_every_difference_has_a_checkpoint():
    configs = [json.loads((PLACE / name / "config.json").read_text()) for name in NAMES]
    assert {config["model_type"] for config in configs} == {*FAMILIES}
    assert {config["tie_word_embeddings"] for config in configs} == {True, False}
    assert {config.get("dtype") for config in configs} == {*DTYPES.values()}
    windows = [config["sliding_window"] for config in configs if config.get("sliding_window")]
    assert min(windows) * 3 <= 24 < max(windows)
    assert sum(path.stat().st_size for path in PLACE.rglob("*")) < 2**20


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    place = tmp_path_factory.mktemp("imported") / "qwen3"
    importing.from_hf(PLACE / "qwen3", place, quiet, quiet)
    return place


UPON = {
    "nothing trained": dict(train__steps=0, train__warmup=0),
    "all trained": {},
    "adapters": dict(model__lora__rank=2, model__lora__targets=("q", "down")),
    "stretched": dict(model__position__scaling__name="yarn", model__position__length=256),
}


@pytest.mark.parametrize("kind", UPON)
def test_a_cell_upon_an_imported_model_is_exported_as_its_family(kind, imported, tmp_path):
    """With what came beside its weights, all of it as it was."""
    config, cell = lab.config.restored(read_json(imported / "config.json")), tmp_path / "cell"
    config.checkpoint = str(origin.pinned(imported))
    for name, value in UPON[kind].items():
        set_field(config, name.replace("__", "."), value)
    begun, _ = lab.load(imported)
    tiny.saved(cell, partition.parted(begun, partition.Partition.of(config), jax.random.key(0)), config)
    companions.copy(imported, cell)  # as a study does
    origin.keep(cell, config.checkpoint)
    made = exporting.to_hf(cell, tmp_path / "out", quiet, quiet)
    was, now = (importing.Opened(path) for path in (PLACE / "qwen3", tmp_path / "out"))
    assert made["model_type"] == "qwen3" and now.family is was.family
    for file in (tokenizers.FILE, companions.SETTINGS, companions.GENERATION, companions.TEMPLATE):
        assert (tmp_path / "out" / file).read_bytes() == (PLACE / "qwen3" / file).read_bytes()
    if kind == "stretched":
        assert (made["rope_scaling"]["rope_type"], made["rope_scaling"]["factor"]) == ("yarn", 4.0)
    else:
        assert now.model == was.model
    assert kind == "adapters" or held(tmp_path / "out") == held(PLACE / "qwen3")


@pytest.mark.parametrize(("compute", "scale"), [("float32", np.float32(3072**0.5)), ("bfloat16", np.float32(55.5))])
def test_embeddings_are_scaled_by_a_number_of_the_type_of_activations(compute, scale):
    """As transformers 5.24 does: sqrt(3072) = 55.43 is 55.5 in bfloat16, whose products are rounded once."""
    made = tiny.config(model__layers=1, model__embedding_scale=3072**0.5, model__compute=compute)
    model = tiny.model(made)
    weights = np.asarray(model.embedding[...].astype(jnp.bfloat16), np.float32)  # as a file of bfloat16 has them
    model.embedding = model.embedding.replace(jnp.asarray(weights))
    tokens = np.random.default_rng(0).integers(0, tiny.VOCABULARY, (2, 7))
    found = model.embed(jnp.asarray(tokens), Coordinates.single(2, 7))
    expected = (weights[tokens] * scale).astype(jnp.dtype(compute)).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(found, np.float32), expected)


@pytest.mark.slow
def test_what_is_placed_on_a_mesh_is_what_is_placed_on_one_device():
    """Weights over fsdp and tensor, stacked layers filled one by one; a directory is opened without being converted."""
    place = PLACE / "llama3.1-tied"
    config = lab.config.base().run.mesh
    config.update(dict(data=2, fsdp=2, tensor=2))
    opened = importing.Opened(place)
    model, (alone, tokenizer) = importing.onto_mesh(opened, lab_mesh.make(config)), lab.load(place)
    assert tokenizer.eos == 2
    found, on_one, expected = (checkpoint._named(parameter.split(x)[1]) for x in (model, alone, assembled(opened)))
    assert found.keys() == on_one.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(found[key]), err_msg=key)
        np.testing.assert_array_equal(np.asarray(array), np.asarray(on_one[key]), err_msg=key)
    assert not found["blocks.0.feedforward.gate.value"].sharding.is_fully_replicated


@pytest.mark.parametrize("seed", range(3))
def test_pieces_cover_every_number_once_and_add_up_to_the_checksum(seed):
    rng = np.random.default_rng(seed)
    arrays = {}
    for name in ("blocks.10.x", "blocks.9.x", "b"):
        shape = tuple(rng.integers(1, 7, rng.integers(1, 5)))
        arrays[name] = rng.normal(size=shape).astype(np.float32)
    total = streamed.Checksum(arrays)
    for name, array in arrays.items():
        seen = np.zeros(array.shape, int)
        for index in streamed.boxes(array.shape, tuple(rng.integers(1, 5, array.ndim))):
            seen[index] += 1
            total.add(name, array[index], index, array.shape)
        assert (seen == 1).all()
    assert total.value == int(checkpoint._checksum({name: jnp.asarray(array) for name, array in arrays.items()}))


@pytest.mark.parametrize("inputs", [0, 1, 2])
def test_a_weight_is_laid_out_as_its_matrix_product_says(inputs):
    """x W^T of theirs is x W of ours, heads taken apart; and a piece holds no more than it may."""
    rng = np.random.default_rng(inputs)
    own = tuple(rng.integers(1, 6, 3)) if inputs else (7, 5)
    one = Parameter("w", own, inputs, ("w",), False)
    theirs = rng.normal(size=one.theirs)
    ours = np.concatenate(
        [one.from_rows(theirs[one.rows(slice(i, i + 1))]) for i in range(own[one.axis])], axis=one.axis
    )
    assert ours.shape == own
    np.testing.assert_array_equal(one.to_rows(ours), theirs)
    if inputs:
        x = rng.normal(size=one.theirs[1])
        product = np.tensordot(x.reshape(own[:inputs]), ours, inputs).reshape(-1)
        np.testing.assert_allclose(product, theirs @ x)
    large = Parameter("w", (4096, 32, 128) if inputs == 1 else (32, 128, 4096)[inputs == 0 :], inputs, ("w",) * 3, True)
    assert 4 * np.prod(large.chunk) <= tensors.PIECE and large.chunk[0] == 1
