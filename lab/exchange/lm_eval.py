"""Standard benchmarks of any checkpoint: the command of the LM Evaluation Harness, with the lab's models, as in
`python -m lab.exchange.lm_eval --checkpoint DIRECTORY --tasks hellaswag`.
"""

import argparse
import json
import sys

from lab import command, runtime
from lab.errors import UserError

COMMANDS = ("ls", "validate")  # of the harness that evaluate nothing


def main(arguments: list[str]) -> None:
    """Runs `lm-eval` with these arguments on its model `lab`, which --checkpoint names.

    The name of a cell has commas and equals signs, which --model_args take apart unless they are JSON.
    """
    try:
        from lm_eval.__main__ import cli_evaluate

        from lab.exchange import harness  # noqa: F401  names the model
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise UserError(
            f"lm_eval is not installed, or too old ({error}): pip install -r requirements-lm-eval.txt"
        ) from None
    runtime.start_alone()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--checkpoint")
    flags, rest = parser.parse_known_args(arguments)
    if flags.checkpoint:
        rest += ["--model_args", json.dumps({"checkpoint": flags.checkpoint})]
    if rest[:1] and rest[0] not in COMMANDS:
        rest += ["--model", "lab"]
    sys.argv[1:] = rest
    cli_evaluate()


if __name__ == "__main__":
    command.run(main)
