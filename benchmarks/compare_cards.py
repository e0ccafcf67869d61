"""Compares the model cards that several libraries write for the same kind of run: a tiny adapter, trained on a CPU.

    python benchmarks/compare_cards.py

Each library writes its card in its own way and is given everything that it accepts: tags, the dataset's id, an
evaluation before and after. It does so twice: for a base model from the Hub, and for one in a local folder. Prints a
Markdown table and writes records/cards.json. sentence-transformers, which is no dependency, is included if it is
installed.
"""

import importlib.util
import tempfile
from pathlib import Path

import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from hf_reflora import RefLoraSFTTrainer
from hf_reflora.report.environment import environment, write_json
from hf_reflora.report.ids import is_hub_id


RECORD = Path(__file__).parent / "records" / "cards.json"
ARGUMENTS = {"max_steps": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no"}
ARGUMENTS |= {"eval_strategy": "steps", "eval_steps": 1, "bf16": False, "disable_tqdm": True, "learning_rate": 0.0123}
TOKENS = ["<pad>", "</s>", *map(str, range(98))]
LORA = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
KNOWN = {"tags": ["mine"], "dataset_name": "org/data"}

# What a card may have. `data` is its front matter, `text` its body. The question without a function is asked of the
# card for the base model in a local folder.
QUESTIONS = {
    "says which library loads it": lambda data, text: data.get("library_name") in ("peft", "sentence-transformers"),
    "no local path as `base_model`": None,
    "tag `base_model:adapter:…`": lambda data, text: "base_model:adapter:org/base" in (data.get("tags") or []),
    "keeps the user's tags": lambda data, text: "mine" in (data.get("tags") or []),
    "the dataset, as a list of ids": lambda data, text: data.get("datasets") == ["org/data"],
    "no invented license": lambda data, text: "licence" not in data and data.get("license") != "license",
    "results in the metadata": lambda data, text: any(
        result.get("metrics") for model in data.get("model-index") or [] for result in model["results"]
    ),
    "scores before and after": lambda data, text: "| before | after |" in text,
    "loss by step": lambda data, text: "](training.png)" in text or "| Step" in text or "| Validation Loss |" in text,
    "hyper-parameters": lambda data, text: "0.0123" in text,
    "citation": lambda data, text: "```bibtex" in text,
    "versions": lambda data, text: "torch 2" in text.lower() or "torch: 2" in text.lower(),
    "the command that reproduces it": lambda data, text: "accelerate launch" in text,
    "no empty sections": lambda data, text: "nformation needed" not in text.lower().replace("[", ""),
}


def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")


def base(name: str) -> LlamaForCausalLM:
    """A tiny model that looks as if it had been loaded from `name`."""
    config = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**config, num_attention_heads=2, pad_token_id=0, eos_token_id=1))
    model.name_or_path = model.config._name_or_path = name
    return model


def rows(with_labels: bool = False) -> Dataset:
    """Tokenized rows: TRL makes the labels itself, transformers needs them."""
    tokens = [[2 + i, 3 + i, 4 + i] for i in range(8)]
    return Dataset.from_dict({"input_ids": tokens, **({"labels": tokens} if with_labels else {})})


def train(trainer):
    """Trains between two evaluations and returns the trainer."""
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    return trainer


def by_hf_reflora(folder: str, name: str) -> None:
    trainer = by_a_sft_trainer(RefLoraSFTTrainer, folder, name)
    trainer.save_model()
    trainer.create_model_card(**KNOWN)


def by_trl(folder: str, name: str) -> None:
    trainer = by_a_sft_trainer(SFTTrainer, folder, name)
    trainer.save_model()
    trainer.create_model_card(**KNOWN)


def by_a_sft_trainer(cls, folder: str, name: str):
    return train(
        cls(
            model=base(name),
            args=SFTConfig(folder, activation_checkpointing=False, **ARGUMENTS),
            train_dataset=rows(),
            eval_dataset=rows(),
            processing_class=tokenizer(),
            peft_config=LoraConfig(**LORA),
        )
    )


def by_transformers(folder: str, name: str) -> None:
    model = get_peft_model(base(name), LoraConfig(**LORA))
    arguments = TrainingArguments(folder, **ARGUMENTS)
    data = rows(with_labels=True)
    trainer = train(Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data))
    trainer.save_model()
    trainer.create_model_card(tags=["mine"], dataset_tags="org/data", dataset="org/data")


def by_peft(folder: str, name: str) -> None:
    get_peft_model(base(name), LoraConfig(**LORA)).save_pretrained(folder)
    # PEFT has no argument for tags, but keeps those of a card that is there when it saves again.
    path = Path(folder) / "README.md"
    path.write_text(path.read_text().replace("tags:\n", "tags:\n- mine\n", 1))
    get_peft_model(base(name), LoraConfig(**LORA)).save_pretrained(folder)


def by_sentence_transformers(folder: str, name: str) -> None:
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerModelCardData,
        SentenceTransformerTrainer,
        losses,
    )
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers import models as modules
    from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator

    # Its modules are made from a saved model only. The model is then renamed as in `base`.
    start = Path(folder) / "base"
    config = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    BertModel(BertConfig(**config, num_attention_heads=2)).save_pretrained(start)
    tokenizer().save_pretrained(start)
    words = modules.Transformer(str(start))
    words.auto_model.config._name_or_path = name
    card = SentenceTransformerModelCardData(tags=["mine"], train_datasets=[{"name": "data", "id": "org/data"}])
    model = SentenceTransformer(modules=[words, modules.Pooling(16)], model_card_data=card)
    model.add_adapter(LoraConfig(r=4, target_modules=["query"]))
    pairs = Dataset.from_dict({"anchor": ["1 2", "3 4"] * 4, "positive": ["5", "6"] * 4})
    arguments = Arguments(folder, **{key: value for key, value in ARGUMENTS.items() if key != "bf16"})
    loss = losses.MultipleNegativesRankingLoss(model)
    evaluator = EmbeddingSimilarityEvaluator(["1 2", "3"], ["5", "6"], [1.0, 0.0])
    data = {"train_dataset": pairs, "eval_dataset": pairs, "evaluator": evaluator}
    train(SentenceTransformerTrainer(model=model, args=arguments, loss=loss, **data))
    model.save_pretrained(folder)


LIBRARIES = {
    "hf_reflora": by_hf_reflora,
    "PEFT": by_peft,
    "TRL": by_trl,
    "transformers": by_transformers,
    "sentence-transformers": by_sentence_transformers,
}


def answers(make) -> dict[str, bool | None]:
    """The answer to each question for the cards that `make(folder, base model's name)` writes; None if not known."""
    with tempfile.TemporaryDirectory() as folder:
        make(folder, "org/base")
        data, text = card(folder)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as local_base:
        make(folder, local_base)
        local, _ = card(folder)
    by_question = {question: bool(ask(data, text)) for question, ask in QUESTIONS.items() if ask}
    by_question["no local path as `base_model`"] = "base_model" not in local or is_hub_id(local["base_model"])
    if make is by_sentence_transformers:
        # It asks the Hub whether there is such a dataset, which cannot be answered for a made-up one.
        by_question["the dataset, as a list of ids"] = None
    return {question: by_question[question] for question in QUESTIONS}


def card(folder: str) -> tuple[dict, str]:
    """Front matter and body of the folder's card."""
    _, front_matter, body = (Path(folder) / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front_matter), body


def table(by_library: dict[str, dict[str, bool | None]]) -> str:
    lines = [["the card …", *by_library], ["---", *[":---:"] * len(by_library)]]
    marks = {True: "✓", False: "–", None: "?"}
    lines += [[question, *(marks[answer[question]] for answer in by_library.values())] for question in QUESTIONS]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    by_library = {}
    for name, make in LIBRARIES.items():
        if name != "sentence-transformers" or importlib.util.find_spec("sentence_transformers"):
            print(f"{name} ...", flush=True)
            by_library[name] = answers(make)
    write_json(RECORD, {"answers": by_library, "environment": environment(Path(__file__).parent)})
    print(table(by_library))


if __name__ == "__main__":
    main()
