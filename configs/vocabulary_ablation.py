"""How large a vocabulary should a small model have, in bits per byte?

    python -m lab.main --config=configs/vocabulary_ablation.py         # :cpu, 5 cells, minutes on two cores
    python -m lab.main --config=configs/vocabulary_ablation.py:gpu     # 22.5M parameters besides embeddings

A byte-level BPE is trained anew for each size, on the training texts of the same corpus; the smallest vocabulary is
that of the bytes themselves. Bytes cut the documents into texts, so that every cell reads and is asked the same ones in
the same order, and each stands behind an end of text: every byte of it is predicted, whatever a token is.

Matched: the bytes trained on, step by step; the model but for its embedding; the learning rate, which is tuned for no
cell. Not matched: the embedding (vocabulary x width), and the tokens, of which a larger vocabulary needs fewer, so that
it computes less for a byte. A row has room for as many tokens as a text has bytes, and the costs in the report are
those of full rows; the tokens that were trained on are in results.csv.

Published: 30 to 50 thousand tokens for a model of one language, 100 to 250 thousand for one of many; vocabularies are
compared in bits per byte, never in loss per token, which grows with what a token holds.
"""

from lab.config import base
from lab.data.tokenizers import Bytes
from lab.errors import choose
from lab.study.define.cells import vary, zipped

BYTES = "bytes"
# Tokens of a text besides those of its bytes: it begins with an end of text, and the last of a document ends with one.
ENDS = 2


def get_config(scale: str = "cpu"):
    config = base()
    study = config.study
    study.name = "vocabulary_ablation"
    study.question = "How large a vocabulary should a model of this size have, in bits per byte?"
    study.labels = (("data.tokenizer", "tokenizer"),)
    study.baseline = (("tokenizer", BYTES),)
    config.data.long_texts = "refuse"
    SCALES[choose("the scale of configs/vocabulary_ablation.py", scale, SCALES)](config)
    return config


def cells(sizes: tuple[int, ...]):
    """Bytes, and a BPE of each size."""
    names, vocabularies = (BYTES, *(f"bpe:{size}" for size in sizes)), (Bytes.size, *sizes)
    return zipped(vary("data.tokenizer", names), vary("model.vocabulary", vocabularies))


def of_bytes(config, size: int) -> None:
    """Texts of at most `size` bytes, and rows with room for as many tokens."""
    config.data.update(dict(text_bytes=size, text_length=size + ENDS))


def cpu(config) -> None:
    """2 layers of width 64 on Python's own sources, 300 steps of 8 texts of at most 126 bytes."""
    config.study.cells = cells((512, 1024, 2048, 4096))
    config.study.seeds = 3
    config.model.update(dict(dim=64, layers=2))
    config.model.mixer.update(dict(heads=4, kv_heads=2, head_dim=16))
    config.model.feedforward.width = 176
    config.run.implementation = "reference"  # rows this short gain nothing from tiles
    of_bytes(config, 126)
    config.data.rows = 8
    config.evaluate.loss.rows = 64
    config.train.steps = config.run.checkpoint.every = 300


def gpu(config) -> None:
    """512 wide, 8 layers, on Python's own sources: 1,000 steps of 32 texts of 1,022 bytes at most, three epochs."""
    config.study.cells = cells((1024, 4096, 16_384, 32_768))
    config.study.seeds = 3
    config.model.update(dict(dim=512, layers=8, compute="bfloat16"))
    config.model.mixer.update(dict(heads=8, kv_heads=2, head_dim=64))
    config.model.feedforward.width = 1408
    config.run.update(dict(scan=True, remat="dots"))
    of_bytes(config, 1022)
    config.data.rows = 32
    config.train.update(dict(steps=1000, learning_rate=1e-3, final_learning_rate=1e-4, warmup=50))
    config.evaluate.loss.update(dict(texts=0, rows=32))
    config.run.checkpoint.every = 500


SCALES = {"cpu": cpu, "gpu": gpu}
