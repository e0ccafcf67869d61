"""Answers a prompt with a base model and with one of its LoRA adapters, from one model in memory.

Both answers grow together, a token at a time, in one of two ways:

- In turn: for each token the model runs twice, with the adapter disabled and with it enabled. Each answer is
  bit-identical to what its model generates alone.
- Mixed batch: for each token the model runs once, with both sides as rows of one batch (PEFT's `adapter_names`). The
  base's row is bit-identical to a row of the base model in a batch of two, which may be rounded differently than the
  base model alone.

`measure` compares both ways on this device for each adapter, and a mixed batch is used where it is clearly faster.
Without it the first question to an adapter waits for that.
"""

import dataclasses
import threading
import time
from collections.abc import Generator, Iterator

import torch
from adapter_check import trained_elsewhere
from chat import CannotAnswer, Chat
from decoding import Answer, Batch, Settings, Writer, gumbel
from loading import load_adapters, load_base, load_configs
from shared_model import SharedModel, Side
from transformers import AutoTokenizer


PROMPT_CHUNK = 128  # tokens of a prompt that the model reads at once; between chunks a visitor may stop it
MEASURED_TOKENS = 6  # generated in both ways to compare their speeds
# Of the time in turn. A smaller gain could be noise, which would choose another way at each start.
CLEARLY_FASTER = 0.8


class Engine:
    """A base model with its adapters, which answers one visitor at a time.

    Args:
        base: The base model's id on the Hub, or its folder.
        adapters: Id or folder of each adapter, by the name that visitors see. They must be ordinary LoRA adapters of
            this base model that leave its own weights as they are.
        device: Default: the GPU if there is one, otherwise the CPU.
        dtype: Of the base model: "float32", "bfloat16", "float16", or "auto" for that of its weights. Default: "auto"
            on a GPU and "float32" on a CPU, as CPUs are slow in 16 bits.

    Attributes:
        shared: The model.
        notes: Sentences for the page on each adapter, by its name, such as that it was trained from another model.

    Raises:
        ValueError: if there is no adapter, one is called `__base__`, is of another kind or does not fit the base
            model, or the base model cannot be loaded.
    """

    def __init__(self, base: str, adapters: dict[str, str], device: str | None = None, dtype: str | None = None):
        if not adapters:
            raise ValueError("Give at least one adapter.")
        if "__base__" in adapters:
            raise ValueError("__base__ is PEFT's name for the base model: give the adapter another one.")
        configs = load_configs(adapters)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = load_base(base, dtype or ("auto" if device == "cuda" else "float32"))
        # PEFT gets names of our own: it fails on names with dots and mistakes "lora" for a part of its layers' names.
        self._peft_names = {name: f"adapter{i}" for i, name in enumerate(adapters)}
        loaded = load_adapters(model, adapters, configs, self._peft_names)
        self.shared = SharedModel(loaded, device)
        self._uses_mixed_batch: dict[str, bool] = {}  # by adapter, once it is measured
        tokenizer = AutoTokenizer.from_pretrained(base)
        eos = self.shared.model.generation_config.eos_token_id
        ends = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
        vocabulary = self.shared.largest_vocabulary
        self._chats = {name: Chat(source, tokenizer, ends, vocabulary) for name, source in adapters.items()}
        self.notes = {name: list(chat.notes) for name, chat in self._chats.items()}
        for name, config in configs.items():
            if (added := loaded.trained_vocabulary - loaded.vocabulary) > 0:
                self.notes[name].append(
                    f"The adapter was trained with {added} tokens that the base model does not have. The base model "
                    "reads them as they were before the training, and cannot write them."
                )
            if trained_from := trained_elsewhere(base, config):
                self.notes[name].append(f"The adapter was trained from {trained_from}, and is shown with {base}.")
        context = getattr(self.shared.model.config.get_text_config(), "max_position_embeddings", None)
        self._context_length = context or tokenizer.model_max_length
        # Two visitors at the same time would get each other's adapter: see `SharedModel`.
        self._lock = threading.Lock()

    def compare(
        self, prompt: str, adapter: str, settings: Settings | None = None, system: str = ""
    ) -> Iterator[tuple[Answer, Answer]]:
        """Yields the base's and the adapter's answer after each token, until both have ended.

        Closing the iterator stops the generation and lets the next visitor in.

        Raises:
            CannotAnswer: see `encode_prompt`.
        """
        settings = settings or Settings()
        ids = self.encode_prompt(prompt, adapter, system)
        limit = min(settings.max_new_tokens, self._context_length - len(ids))
        with self._lock:
            yield from self._choose_way(adapter)
            generator = torch.Generator().manual_seed(settings.seed)
            in_one = [Batch(self.shared, [Side.BASE, Side.ADAPTER])]
            batches = in_one if self._uses_mixed_batch[adapter] else self._in_turn()
            writers = {side: Writer(self._chats[adapter], settings, limit) for side in Side}
            while len(ids) > PROMPT_CHUNK:
                for batch in batches:
                    batch.read(ids[:PROMPT_CHUNK], writers)
                    yield _copies(writers)
                ids = ids[PROMPT_CHUNK:]
            for writer in writers.values():
                writer.next_tokens = ids
            for _ in range(limit):
                noise = gumbel(generator, self.shared.largest_vocabulary) if settings.temperature > 0 else None
                for batch in batches:
                    batch.step({side: writers[side] for side in batch.sides if not writers[side].answer.ended}, noise)
                yield _copies(writers)
                if all(writer.answer.ended for writer in writers.values()):
                    return

    def measure(self) -> None:
        """Measures both ways for each adapter, so that no visitor waits for it. ZeroGPU has no GPU at the start."""
        with self._lock:
            for adapter in self._peft_names:
                for _ in self._choose_way(adapter):
                    pass

    def _choose_way(self, adapter: str) -> Iterator[tuple[Answer, Answer]]:
        """Makes the adapter the active one, and measures both ways with it if that was not done yet."""
        self.shared.model.set_adapter(self._peft_names[adapter], inference_mode=True)
        if adapter not in self._uses_mixed_batch:
            self._uses_mixed_batch[adapter] = yield from self._mixed_batch_is_faster()

    def _in_turn(self) -> list[Batch]:
        return [Batch(self.shared, [Side.BASE]), Batch(self.shared, [Side.ADAPTER])]

    def _mixed_batch_is_faster(self) -> Generator[tuple[Answer, Answer], None, bool]:
        """Whether a mixed batch with the active adapter is right and, on this device, saves time; yields no text.

        It is not right if PEFT has no mixed batch for this adapter (DoRA, `target_parameters`), or if the base's row
        is not that of the base model in a batch of two.
        """
        two_base_rows = Batch(self.shared, [Side.BASE, Side.BASE])
        mixed, in_turn = Batch(self.shared, [Side.BASE, Side.ADAPTER]), self._in_turn()
        seconds_mixed, seconds_in_turn = [], []
        tokens = [token % min(self.shared.vocabulary.values()) for token in range(MEASURED_TOKENS)]
        for _ in range(MEASURED_TOKENS):
            begin = time.perf_counter()
            [base_row, _] = [batch.logits([tokens])[0] for batch in in_turn]
            seconds_in_turn.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            try:
                mixed_row, _ = mixed.logits([tokens, tokens])
            except Exception:  # a ValueError, TypeError or KeyError, depending on the kind of adapter
                return False
            seconds_mixed.append(time.perf_counter() - begin)
            if not torch.equal(mixed_row, two_base_rows.logits([tokens, tokens])[0]):
                return False
            tokens = [int(base_row.argmax())]
            yield Answer(), Answer()
        # The shortest times, since whatever else runs on the machine only adds to them.
        return min(seconds_mixed) < CLEARLY_FASTER * min(seconds_in_turn)

    def encode_prompt(self, prompt: str, adapter: str, system: str = "") -> list[int]:
        """The tokens after which both sides continue: see `Chat`.

        Raises:
            CannotAnswer: for an unknown adapter, an empty prompt, one that does not fit into the model's context, or a
                system prompt that the model does not take.
        """
        if adapter not in self._peft_names:
            raise CannotAnswer(f"There is no adapter {adapter!r}; there are {', '.join(self._peft_names)}.")
        if not prompt.strip():
            raise CannotAnswer("Type a prompt first.")
        # JSON may have half of a character that takes two (a surrogate), on which tokenizers fail.
        prompt, system = (text.encode("utf-8", "replace").decode() for text in (prompt, system))
        ids = self._chats[adapter].encode(prompt, system)
        if len(ids) >= self._context_length:
            raise CannotAnswer(
                f"The prompt is {len(ids)} tokens long; the model takes {self._context_length - 1}. Shorten it."
            )
        return ids


def _copies(writers: dict[Side, Writer]) -> tuple[Answer, Answer]:
    """Both answers so far. Copies, as the answers go on."""
    return dataclasses.replace(writers[Side.BASE].answer), dataclasses.replace(writers[Side.ADAPTER].answer)
