"""Both answers to one prompt, token by token: the settings, the batches that go through the model, the texts."""

import dataclasses
import time
from typing import Any

import torch
from chat import CannotAnswer, Chat
from shared_model import SharedModel, Side
from transformers import DynamicCache, TopPLogitsWarper


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to answer.

    Attributes:
        max_new_tokens: Length limit of each answer, 1 to 4096.
        temperature: 0 to 5; at 0 the most likely token is taken.
        top_p: Tokens are drawn from the smallest set that has this probability, above 0 and up to 1.
        seed: Seed of the noise, from 0 on. Both sides share the noise, so that they differ only where the models do.

    Raises:
        CannotAnswer: for a value out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        # Written so that NaN, which compares as False, is refused.
        if not 1 <= self.max_new_tokens <= 4096:
            raise CannotAnswer(f"The length limit must be between 1 and 4096 tokens, not {self.max_new_tokens}.")
        if not 0 <= self.temperature <= 5:
            raise CannotAnswer(f"The temperature must be between 0 and 5, not {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise CannotAnswer(f"top-p must be above 0 and at most 1, not {self.top_p}.")
        if not 0 <= self.seed < 2**63:
            raise CannotAnswer(f"The seed must be a whole number from 0 on, not {self.seed}.")


def settings_of(**values: Any) -> Settings:
    """Settings from the fields of a page or the variables of an environment: whole numbers may be floats or text.

    Raises:
        CannotAnswer: for a value that is no number or out of range.
    """
    types, numbers = {"max_new_tokens": int, "temperature": float, "top_p": float, "seed": int}, {}
    for name, number_type in types.items():
        try:
            numbers[name] = number_type(values[name])
        except (TypeError, ValueError, OverflowError):
            what = {int: "whole number", float: "number"}[number_type]
            raise CannotAnswer(f"{name} must be a {what}, not {values[name]!r}.") from None
    return Settings(**numbers)


@dataclasses.dataclass
class Answer:
    """One side's answer so far.

    Attributes:
        text: The text of its tokens.
        tokens: Number of tokens.
        first_token_seconds: Time for reading the prompt and choosing the first token.
        seconds: Time for the tokens after the first one. A mixed batch counts for both sides, here and above.
        ended: Why it has ended, "end of text" or "length"; None while it grows.
    """

    text: str = ""
    tokens: int = 0
    first_token_seconds: float = 0.0
    seconds: float = 0.0
    ended: str | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """The speed of decoding; None until there is a second token."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 else None


class Writer:
    """Chooses the tokens of one side's answer.

    Args:
        chat: Turns them into text, and knows the end tokens.
        settings: How to choose.
        limit: The largest number of tokens, which may be less than that of the settings.
    """

    def __init__(self, chat: Chat, settings: Settings, limit: int):
        self.chat, self.settings, self.limit = chat, settings, limit
        self.answer = Answer()
        self.next_tokens: list[int] = []  # that the model has not read yet
        self._answer_ids: list[int] = []

    def add_token(
        self,
        logits: torch.Tensor,  # (vocabulary,)
        noise: torch.Tensor | None,  # (vocabulary,) or longer; None takes the most likely token
    ) -> None:
        token = self._choose(logits, noise)
        if token in self.chat.end_tokens:
            self.answer.ended = "end of text"
            return
        self._answer_ids.append(token)
        self.next_tokens = [token]
        self.answer.tokens = len(self._answer_ids)
        # All of them each time, as several may make one character.
        self.answer.text = self.chat.decode(self._answer_ids)
        if len(self._answer_ids) == self.limit:
            self.answer.ended = "length"

    def _choose(self, logits: torch.Tensor, noise: torch.Tensor | None) -> int:
        if noise is None:
            return int(logits.argmax())
        scores = logits[None] / self.settings.temperature
        if self.settings.top_p < 1:
            scores = TopPLogitsWarper(self.settings.top_p)(None, scores)
        return int((scores[0].log_softmax(-1) + noise[: len(logits)]).argmax())


def gumbel(generator: torch.Generator, vocabulary: int) -> torch.Tensor:
    """Gumbel noise (vocabulary,): argmax(log p + noise) is a draw from p.

    It is drawn on the CPU, so that a seed gives the same noise on every device, and from a generator of its own,
    so that no other visitor changes it.
    """
    return -torch.empty(vocabulary).exponential_(generator=generator).log()


class Batch:
    """The sides that go through the model together, as rows of one batch with one cache."""

    def __init__(self, model: SharedModel, sides: list[Side]):
        self.model, self.sides = model, sides
        self._cache = DynamicCache(config=model.model.config)

    def logits(
        self,
        tokens: list[list[int]],  # the new tokens of each side, equally many
    ) -> list[torch.Tensor]:  # of each side: (vocabulary,), float32, on the CPU
        """The logits of what follows each side's tokens."""
        return self.model.logits(self.sides, tokens, self._cache)

    def read(self, tokens: list[int], writers: dict[Side, Writer]) -> None:
        """Reads a piece of the prompt, which is not its end."""
        begin = time.perf_counter()
        self.logits([tokens] * len(self.sides))
        seconds = time.perf_counter() - begin
        for side in self.sides:
            writers[side].answer.first_token_seconds += seconds

    def step(self, writers: dict[Side, Writer], noise: torch.Tensor | None) -> None:
        """Adds the next token to each side's answer. A side that is not in `writers` leaves the batch."""
        if not writers:
            return
        begin = time.perf_counter()
        if len(writers) < len(self.sides):
            rows = [row for row, side in enumerate(self.sides) if side in writers]
            # DynamicCache.batch_select_indices would say it better, but linear attention's caches lack it.
            self._cache.reorder_cache(torch.tensor(rows))
            self.sides = list(writers)
        logits = self.logits([writer.next_tokens for writer in writers.values()])
        are_first = {side: not writer.answer.tokens for side, writer in writers.items()}
        for writer, row in zip(writers.values(), logits, strict=True):
            writer.add_token(row, noise)
        seconds = time.perf_counter() - begin
        for side, writer in writers.items():
            if are_first[side]:
                writer.answer.first_token_seconds += seconds
            elif writer.answer.ended != "end of text":  # which is a token that the answer does not count
                writer.answer.seconds += seconds
