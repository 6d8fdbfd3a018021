"""Whether what long asks read is there: looked at once the data is, and before anything is trained."""

from ml_collections import ConfigDict

from lab.data import Data
from lab.evaluate import asks, keys


def check(config: ConfigDict, data: Data) -> None:
    """Raises UserError for the first ask that has too little text, documents that are longer than asked, or an
    evaluator that is not there or cannot read them."""
    for name, asked in config.evaluate.items():
        if ready := asks.ASKS[asked.kind].ready:
            ready(asked, f"evaluate.{name}", data.validation, data.tokenizer)
            keys.check(asked, f"evaluate.{name}", data.tokenizer)
