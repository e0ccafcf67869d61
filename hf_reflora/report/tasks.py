"""What an adapter is for, as far as its configuration tells: the Hub's pipeline tag and the classes that load it."""

from dataclasses import dataclass, replace
from typing import Any

from .record import RunRecord


@dataclass(frozen=True)
class Task:
    """How a card shows an adapter. What the configuration does not tell is None and not shown."""

    pipeline_tag: str | None = None  # the Hub's
    model_class: str | None = None  # transformers' class that loads the base model
    # What the snippet puts in and prints: "text" to go on from, "translation" (of encoder-decoders), "classes",
    # "tokens", "answer", "features" or "image"
    example: str | None = None

    @property
    def is_generation(self) -> bool:
        """Whether it is a decoder that writes text, which vLLM and llama.cpp serve."""
        return self.example == "text"


# By PEFT's task type. The Hub's pipeline tag of encoder-decoders has become text-generation, too.
TASK_TYPES = {
    "CAUSAL_LM": Task("text-generation", "AutoModelForCausalLM", "text"),
    "SEQ_2_SEQ_LM": Task("text-generation", "AutoModelForSeq2SeqLM", "translation"),
    "SEQ_CLS": Task("text-classification", "AutoModelForSequenceClassification", "classes"),
    "TOKEN_CLS": Task("token-classification", "AutoModelForTokenClassification", "tokens"),
    "QUESTION_ANS": Task("question-answering", "AutoModelForQuestionAnswering", "answer"),
    "FEATURE_EXTRACTION": Task("feature-extraction", "AutoModel", "features"),
}
# Without a task type PEFT notes the class of the base model; by the end of its name: the tag and the example.
CLASS_ENDINGS = {
    "ForCausalLM": ("text-generation", "text"),
    "LMHeadModel": ("text-generation", "text"),
    "ForSequenceClassification": ("text-classification", "classes"),
    "ForTokenClassification": ("token-classification", "tokens"),
    "ForQuestionAnswering": ("question-answering", "answer"),
    "ForMaskedLM": ("fill-mask", None),
    "ForImageClassification": ("image-classification", "image"),
    "ForSemanticSegmentation": ("image-segmentation", None),
    "ForObjectDetection": ("object-detection", None),
    "ForAudioClassification": ("audio-classification", None),
    "ForCTC": ("automatic-speech-recognition", None),
}
PIPELINE_TAGS = {task.pipeline_tag for task in TASK_TYPES.values()} | {tag for tag, _ in CLASS_ENDINGS.values()}
# Adapters of several tasks, whose models take the number of one along with the tokens.
NEEDS_TASK_IDS = ("poly", "multitask_prompt_tuning")
# Tags of TRL's trainers that train decoders. A record without PEFT's settings may be of one of them.
LANGUAGE_TAGS = {"sft", "dpo", "grpo", "kto", "rloo"}


def task_of(record: RunRecord) -> Task:
    """The task by PEFT's task type, or by the class of the base model; neither: by the trainer's tags."""
    task = _task_of_settings(record)
    return replace(task, example=None) if record.method in NEEDS_TASK_IDS else task


def _task_of_settings(record: RunRecord) -> Task:
    task_type = record.peft.get("task_type")
    if task_type in TASK_TYPES:
        return TASK_TYPES[task_type]
    mapping = record.peft.get("auto_mapping")
    if isinstance(mapping, dict):
        return _task_of_class(str(mapping.get("base_model_class")), str(mapping.get("parent_library")))
    return TASK_TYPES["CAUSAL_LM"] if LANGUAGE_TAGS & set(record.tags) else Task()


def _task_of_class(name: str, library: str) -> Task:
    # Not transformers_modules, where the code of models from the Hub is, nor diffusers.
    if not library.startswith("transformers."):
        return Task()
    for ending, (tag, example) in CLASS_ENDINGS.items():
        if name.endswith(ending):
            return Task(tag, name, example)
    return Task(None, name)


def auto_mapping(model: Any) -> dict[str, str]:
    """What PEFT writes into the configuration of an adapter without a task type: the base model's class."""
    base = type(model.get_base_model())
    return {"base_model_class": base.__name__, "parent_library": base.__module__}
