"""Turns a prompt into tokens and tokens into text, as an adapter was trained to see them."""

import json
from typing import Any

from jinja2 import TemplateError
from loading import file_of
from transformers import AutoTokenizer, PreTrainedTokenizerBase


class CannotAnswer(ValueError):
    """A question that cannot be answered as it is. The message tells the visitor what to change."""


class Chat:
    """The tokens of a comparison. Both sides use the same, so that they get the same prompt and end alike.

    The base model's chat template is used, or the adapter's where the base model has none: it was trained with that
    one. An answer ends with an end token of the base model or of the adapter.

    Args:
        source: The adapter's folder or its id on the Hub.
        tokenizer: The base model's.
        end_tokens: The base model's.
        vocabulary: Number of tokens that the model can read.

    Attributes:
        notes: Sentences for the page, on what is the adapter's and not the base model's. May be empty.
    """

    def __init__(self, source: str, tokenizer: PreTrainedTokenizerBase, end_tokens: set[int], vocabulary: int):
        self.tokenizer, self.template, self.end_tokens = tokenizer, tokenizer.chat_template, set(end_tokens)
        self.notes: list[str] = []
        own = _tokenizer_of(source)
        if own is not None and _numbers_differ(tokenizer, own):
            self.notes.append(
                "The adapter was saved with a tokenizer that numbers the tokens differently than the base model's. "
                "Both sides use the base model's."
            )
            own = None
        template = _template_of(source, own)
        if own is not None and own.eos_token_id is not None:
            self.end_tokens.add(own.eos_token_id)
        self.end_tokens |= _end_tokens_of(source)
        if template is None:
            return
        if self.template is None:
            self.template = template
            self.notes.append("The base model has no chat template, so both sides get the adapter's.")
            # The adapter's tokenizer may have the template's special tokens as tokens of their own. Some have tokens
            # that no model has rows for, such as one for padding.
            if own is not None and max(_example(own, template), default=0) < vocabulary:
                self.tokenizer = own
        elif own is not None and _example(tokenizer, self.template) != _example(own, template):
            self.notes.append(
                "The adapter was saved with another chat template than the base model's. Both sides get the base "
                "model's."
            )

    def encode(self, prompt: str, system: str) -> list[int]:
        """The tokens after which both sides continue.

        A model with a chat template gets a conversation; one without gets the plain text to complete.

        Raises:
            CannotAnswer: for a system prompt that the template does not take.
        """
        if self.template is None:
            ids = self.tokenizer(f"{system}\n{prompt}" if system else prompt)["input_ids"]
            while ids[-1] in self.end_tokens:  # some tokenizers end each text with one; here it shall go on
                ids.pop()
            return ids
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": prompt})
        try:
            return _tokens(self.tokenizer, self.template, turns)
        except TemplateError:
            if not system:
                raise
            raise CannotAnswer("This model takes no system prompt: leave it empty.") from None

    def decode(self, ids: list[int]) -> str:
        # U+FFFD stands for an incomplete character, which the next token may complete.
        return self.tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")


def _tokens(tokenizer: PreTrainedTokenizerBase, template: Any, turns: list[dict[str, str]]) -> list[int]:
    # A template may be a dictionary of several; transformers takes its "default" then if it is the tokenizer's own.
    chosen = None if template == tokenizer.chat_template else template
    encoded = tokenizer.apply_chat_template(turns, chat_template=chosen, add_generation_prompt=True, return_dict=True)
    return encoded["input_ids"]


def _example(tokenizer: PreTrainedTokenizerBase, template: Any) -> list[int]:
    try:
        return _tokens(tokenizer, template, [{"role": "user", "content": "Hello"}])
    except (TemplateError, ValueError, TypeError, KeyError):
        return []


def _tokenizer_of(source: str) -> PreTrainedTokenizerBase | None:
    if file_of(source, "tokenizer_config.json") is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError):  # only its configuration is there, or its class is unknown
        return None


def _template_of(source: str, own: PreTrainedTokenizerBase | None) -> Any:
    if own is not None and own.chat_template is not None:
        return own.chat_template
    path = file_of(source, "chat_template.jinja")
    return path.read_text(encoding="utf-8") if path else None


def _numbers_differ(tokenizer: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase) -> bool:
    numbers = own.get_vocab()
    return any(numbers.get(token) != number for token, number in tokenizer.get_vocab().items())


def _end_tokens_of(source: str) -> set[int]:
    """The end tokens in an adapter's generation_config.json, a file that its author may have written by hand."""
    path = file_of(source, "generation_config.json")
    try:
        eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path else None
    except (ValueError, AttributeError):
        return set()
    return {token for token in (eos if isinstance(eos, list) else [eos]) if isinstance(token, int)}
