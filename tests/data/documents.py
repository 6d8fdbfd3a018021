"""Opens a corpus, and writes the files of one."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

import lab.config
from lab.data import corpora


def opened(corpus, path="", field="text", **options):
    data = lab.config.base().data
    data.update(corpus=corpus, path=str(path), field=field, **options)
    return corpora.open(data)


def texts(corpus):
    return [document.text for document in corpus.read()]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path, rows, type=None):
    pq.write_table(pa.table({"text": pa.array(rows, type), "n": range(len(rows))}), path, row_group_size=3)
    return path
