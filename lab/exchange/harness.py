"""Any checkpoint as the model `lab` of the LM Evaluation Harness, which must be installed (lab/exchange/lm_eval.py)."""

from collections.abc import Sequence

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from lab.data.chat import Chat
from lab.decode.engine import Engine
from lab.decode.forest import needed_for
from lab.decode.sampling import Sampling
from lab.decode.scoring import log_likelihoods
from lab.decode.text import transcribed
from lab.errors import UserError, choose

SETTINGS = tuple(name for name in Sampling._fields if name != "temperature")


@register_model("lab")
class Lab(TemplateLM):
    """The model and tokenizer of a checkpoint. A text without a context is conditioned on the token that begins texts,
    or else on the one that ends them.

    checkpoint: what `lab.load` opens. add_bos_token: begins every context with the token that begins texts, if there is
    one; off, as in the harness's own models. batch_size: rows of a batch, and requests that are decoded at once.
    max_length: tokens that the model is given at most; of longer contexts the end is kept. max_gen_toks: tokens that a
    request generates at most, where its task does not say.
    """

    def __init__(
        self,
        checkpoint: str,
        batch_size: int | str = 8,
        max_length: int = 2048,
        max_gen_toks: int = 256,
        add_bos_token: bool | str = False,
        max_batch_size=None,  # what the harness hands every model
        device=None,
    ):
        super().__init__()
        import lab

        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"batch_size = {batch_size!r} is no number of rows; choose a whole one from 1 on")
        self.model, self.tokens = lab.load(checkpoint)
        self.first = self.tokens.bos if str(add_bos_token).lower() == "true" else None
        self.talks = False  # texts are written by the chat template
        self.batch_size, self.max_length, self.max_gen_toks = int(batch_size), int(max_length), int(max_gen_toks)

    @property
    def tokenizer_name(self) -> str:
        return self.tokens.name

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.tokens.bos is None else self.tokens.bos

    @property
    def eot_token_id(self) -> int:
        if self.tokens.eos is None:
            raise UserError(
                f"the tokenizer {self.tokens.name!r} has no token that ends a text: nothing comes before a first one"
            )
        return self.tokens.eos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        if self.talks:  # the template has written what a text begins with
            return self.tokens.encode_chat(string).tolist()
        first = [] if self.first is None or add_special_tokens is False else [self.first]
        return first + self.tokens.encode(string).tolist()

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The text that messages are written by, which the harness keeps with what it finds."""
        if isinstance(chat_template, str):
            raise UserError(f"--apply_chat_template {chat_template}: no template is chosen by name; leave the name out")
        return self._talking().text

    def apply_chat_template(self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of messages; without a prompt for an answer the last one is an answer that is begun."""
        *said, begun = chat_history if not add_generation_prompt else [*chat_history, {"content": ""}]
        return self._talking().talk(said) + begun["content"]

    def _talking(self) -> Chat:
        """The template; from now on it writes what is read here."""
        if self.tokens.chat is None:
            raise UserError(
                f"--apply_chat_template: no chat template came with the tokenizer {self.tokens.name!r}; leave it out"
            )
        self.talks = True
        return self.tokens.chat

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [self.cut(context, continuation) for _, context, continuation in requests]
        found = log_likelihoods(self.model, pairs, rows=self.batch_size)
        for (text, _, _), likely in zip(requests, found, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, likely)
        return found

    def cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """The end of a context, so that it fits with the continuation."""
        if len(continuation) > self.max_length:
            raise UserError(
                f"a continuation of {len(continuation)} tokens is longer than max_length = {self.max_length}"
            )
        return context[-(self.max_length + 1 - len(continuation)) :], continuation

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        windows = [self.windows(*request.args) for request in requests]
        found = iter(self._loglikelihood_tokens([(None, *window) for of_text in windows for window in of_text]))
        totals = [sum(next(found)[0] for _ in of_text) for of_text in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """(context, continuation) that score each token of a text once."""
        tokens = self.tok_encode(text)
        found = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
        return [utils.make_disjoint_window(window) for window in found]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        asked = [self.asked(*request.args) for request in requests]
        length = max((needed_for(len(one["prompt"]), [], one["most_tokens"]) for one in asked), default=1)
        engine = Engine(self.model, rows=max(1, min(self.batch_size, len(asked))), length=length)
        stops = [one.pop("until") for one in asked]
        for one in asked:
            engine.submit(**one)
        texts = [""] * len(requests)
        for piece in transcribed(engine, self.tokens, stops):
            texts[piece.request] += piece.text
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def asked(self, context: str, settings: dict) -> dict:
        """What to submit, and the stop strings."""
        settings = normalize_gen_kwargs(settings, self.max_gen_toks)
        most = settings.pop("max_gen_toks")
        if most >= self.max_length:
            raise UserError(f"max_gen_toks = {most} leaves no room for a prompt in max_length = {self.max_length}")
        until = handle_stop_sequences(settings.pop("until", None), eos=None)
        draws, temperature = settings.pop("do_sample"), float(settings.pop("temperature", 0.0) or 0.0)
        for name in settings:
            choose("a setting of generate_until", name, SETTINGS)
        penalty = {name: value for name, value in settings.items() if name == "repetition_penalty"}  # greedy heeds it
        prompt = self.tok_encode(context)[-(self.max_length - most) :] or [self.prefix_token_id]
        return {
            "prompt": prompt,
            "sampling": Sampling(temperature, **settings) if draws else Sampling(**penalty),
            "stop": self.tokens.ends if self.talks else () if self.tokens.eos is None else (self.tokens.eos,),
            "most_tokens": most,
            "until": [stop for stop in until if stop],
        }
