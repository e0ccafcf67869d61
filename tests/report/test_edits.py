"""Whose text a card is, and what a new card takes over from the one before it."""

import pytest
import tiny
import yaml
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from transformers.modelcard import TrainingSummary
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import generate_model_card

from hf_reflora import RunRecordCallback
from hf_reflora.report.card import render
from hf_reflora.report.edits import headings, is_edited, is_kept, lost_lines
from hf_reflora.report.front_matter import OwnEntries, mended, own_entries
from hf_reflora.report.generated import library_of
from hf_reflora.report.record import RunRecord


LAYERS = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
RECORD = {"method": "reflora", "model": "org/base"}


def fresh(**changes):
    scores = {"rows": 3, "before": {"exact": 0.0}, "after": {"exact": 0.5}}
    record = {**RECORD, "scores": scores, "arguments": {"learning_rate": 0.1}, **changes}
    return render(RunRecord.from_dict(record), license="mit", language=["en", "de"], tags=["mine"])


def front_matter(card) -> dict:
    return yaml.safe_load(card.split("---\n", 2)[1])


def with_front_matter(card, **changes) -> str:
    data = {**front_matter(card), **changes}
    data = {name: value for name, value in data.items() if value is not None}
    return f"---\n{yaml.safe_dump(data)}---\n{card.split('---' + chr(10), 2)[2]}"


@pytest.mark.parametrize("card", [fresh(), render(RunRecord(method="lora", model="x"))])
def test_a_rendered_card_is_not_edited(card):
    assert not is_edited(card)


def test_own_entries_are_what_no_record_knows():
    assert own_entries(fresh()) == OwnEntries("mit", ["en", "de"], ["mine"])
    assert own_entries("") == own_entries("# A title\n\ntext") == OwnEntries()
    every = [
        *(
            "base_model:adapter:org/base",
            "lora",
            "reflora",
            "lora-sb",
            "lora-xs",
            "sft",
            "trl",
            "transformers",
            "peft",
        ),
        "generated_from_trainer",
    ]
    assert own_entries(with_front_matter(fresh(), tags=[*every, "a", 3, "b"])).tags == ["a", "b"]
    assert own_entries(with_front_matter(fresh(), tags="lora")).tags == []
    assert own_entries(with_front_matter(fresh(), tags="mine")).tags == ["mine"]
    assert own_entries(with_front_matter(fresh(), license=["mit", "other"])).license == ["mit", "other"]
    assert own_entries(with_front_matter(fresh(), license=3)).license is None
    assert own_entries("---\njust text\n---\n").tags == []


def test_what_is_kept_gives_the_same_card_again():
    card = fresh()
    scores = {"rows": 3, "before": {"exact": 0.0}, "after": {"exact": 0.5}}
    record = RunRecord.from_dict({**RECORD, "scores": scores, "arguments": {"learning_rate": 0.1}})
    assert render(record, **vars(own_entries(card))) == card


OTHERS_RESULTS = [
    {"task": {"type": "x"}, "dataset": {"type": "d", "name": "d"}, "metrics": [{"type": "a", "value": 1}]}
]


@pytest.mark.parametrize(
    "change",
    [
        *({"license": "apache-2.0"}, {"language": "fr"}, {"tags": ["quite", "others"]}, {"license": ["mit", "gemma"]}),
        {"license": "other", "license_name": "my-license", "license_link": "https://x.y/LICENSE"},
        *({"widget": [{"text": "Hello"}]}, {"thumbnail": "x.png"}, {"metrics": ["bleu"]}, {"new_version": "me/newer"}),
        *({"datasets": ["squad", "me/mine"]}, {"pipeline_tag": "image-text-to-text"}, {"language": "no"}),
        *({"library_name": "diffusers"}, {"base_model": ["org/base", "org/other"]}, {"co2_eq_emissions": 3}),
    ],
    ids=str,
)
def test_the_front_matter_of_a_person_survives_every_rendering(change):
    """It is no edit of the text, so that the card is rendered again."""
    card = fresh()
    changed = with_front_matter(card, **change)
    assert not is_edited(changed)
    again = render(RunRecord.from_dict(RECORD), **vars(own_entries(changed)))
    data = front_matter(again)
    assert data.items() >= {name: value for name, value in change.items() if name != "tags"}.items()
    assert set(data["tags"]) >= set(change.get("tags", ["mine"]))
    assert render(RunRecord.from_dict(RECORD), **vars(own_entries(again))) == again


def test_the_dataset_of_an_earlier_run_does_not_stay():
    card = fresh(dataset_id="org/old", dataset="org/old")
    changed = with_front_matter(card, datasets=["org/old", "org/mine"])
    again = render(RunRecord.from_dict(RECORD | {"dataset_id": "org/new"}), **vars(own_entries(changed)))
    assert front_matter(again)["datasets"] == ["org/new", "org/mine"]


def test_the_task_of_an_earlier_run_does_not_stay():
    card = fresh(peft={"task_type": "SEQ_CLS"})
    assert front_matter(card)["pipeline_tag"] == "text-classification"
    again = render(RunRecord.from_dict(RECORD), **vars(own_entries(card)))
    assert front_matter(again)["pipeline_tag"] == "text-generation"
    asked = RunRecord.from_dict(RECORD | {"card": {"task": "translation"}})
    assert front_matter(render(asked, more={"pipeline_tag": "summarization"}))["pipeline_tag"] == "translation"


def test_the_base_model_of_an_earlier_run_does_not_stay():
    assert "base_model" not in own_entries(fresh()).more
    assert own_entries(with_front_matter(fresh(), base_model="org/mine")).more["base_model"] == "org/mine"


def test_results_of_others_stay_beside_ours():
    card = fresh(scores={"before": {"exact": 0.0}, "after": {"exact": 0.5}})
    data = front_matter(card)
    data["model-index"][0]["results"] += OTHERS_RESULTS
    entries = own_entries(with_front_matter(card, **{"model-index": data["model-index"]}))
    again = render(
        RunRecord.from_dict(RECORD | {"scores": {"before": {"b": 0.0}, "after": {"b": 1.0}}}), **vars(entries)
    )
    [model] = front_matter(again)["model-index"]
    assert [m["type"] for result in model["results"] for m in result["metrics"]] == ["b", "b", "a"]
    without_scores = render(RunRecord.from_dict(RECORD), **vars(entries))
    assert front_matter(without_scores)["model-index"][0]["results"] == OTHERS_RESULTS


def test_a_persons_base_model_is_taken_where_the_record_knows_none():
    record = RunRecord(method="lora", model="runs/base")
    assert front_matter(render(record, more={"base_model": "org/base"}))["base_model"] == "org/base"
    assert "base_model" not in front_matter(render(record, more={"base_model": "runs/base"}))  # as PEFT writes it
    assert front_matter(fresh())["base_model"] == "org/base"


def test_entries_of_two_cards_are_merged():
    here = OwnEntries("other", None, ["a"], {"license_name": "x", "datasets": ["d"], "widget": 1})
    there = OwnEntries(
        "mit", "en", ["b", "a"], {"license_link": "y", "datasets": ["e"], "widget": 2, "metrics": ["m"]}
    )
    more = {"license_name": "x", "datasets": ["d", "e"], "widget": 1, "metrics": ["m"]}
    assert here.over(there) == OwnEntries("other", "en", ["a", "b"], more)
    assert OwnEntries().over(there) == there


@pytest.mark.parametrize(
    "change",
    [
        lambda card: card.replace("## Limits", "## Limits and more"),
        lambda card: card.replace("0.500", "0.900"),
        lambda card: card.replace("\n# ", "\nA sentence of mine.\n\n# ", 1),
        lambda card: card + "\nA sentence of mine.\n",
        lambda card: card + "x",
        lambda card: card + "\n### Framework versions\n\n- PEFT 0.21.2\n\nA sentence of mine.\n",
        lambda card: card + "\n### Framework versions\n\n- PEFT 0.21.2\n- Torch 3\n",
        lambda card: card.replace("<!-- rendered", "A sentence of mine.\n<!-- rendered"),
        lambda card: card.replace("as long as nobody edits it: ", "as long as nobody edits it: 0")[:-9] + " -->\n",
        lambda card: card.replace("\n", "\r\n"),
    ],
)
def test_a_body_changed_by_hand_is_edited(change):
    card = fresh()
    assert change(card) != card
    assert is_edited(change(card))


def test_without_its_mark_a_card_is_somebodys_own():
    assert is_edited(fresh().split("<!-- rendered")[0])
    assert is_edited("# My adapter\n")
    assert is_edited("---\nlicense: mit\n---\n# My adapter\n")


@pytest.mark.parametrize("space", ["", "\n", "\n\n  \n"])
def test_space_at_the_end_is_no_edit(space):
    assert not is_edited(fresh().rstrip() + space)


@pytest.mark.parametrize(
    "card", ["", "\n", "---\nlicense: mit\n---\n", "---\nlicense: mit\ntags:\n- mine\n---\n\n \n"]
)
def test_nothing_but_front_matter_is_no_card(card):
    """As the Hub makes it for a new repository with a license."""
    assert not is_edited(card)
    assert own_entries(card).license == ("mit" if "mit" in card else None)


def test_front_matter_without_a_last_line_break():
    card = "---\nlicense: mit\n---"
    assert not is_edited(card)
    assert own_entries(card).license == "mit"


@pytest.mark.parametrize("yaml_text", ["x: [", "license: mit\nlicense mit", "\t- a"])
def test_front_matter_that_cannot_be_read_raises(yaml_text):
    card = f"---\n{yaml_text}\n---\n{fresh().split('---' + chr(10), 2)[2]}"
    with pytest.raises(ValueError, match="The card has no front matter that can be read"):
        own_entries(card)
    assert is_edited(card)
    assert is_edited(f"---\n{yaml_text}\n---\n# My adapter\n")


def peft_model(name="org/base"):
    base = tiny.llama()
    base.config._name_or_path = base.name_or_path = name
    return get_peft_model(base, LoraConfig(r=2, **LAYERS))


@pytest.mark.parametrize("saves", [1, 2])
def test_peft_rewrites_a_card_and_it_stays_not_edited(tmp_path, saves):
    (tmp_path / "README.md").write_text(fresh(), encoding="utf-8")
    for _ in range(saves):
        peft_model("/data/base").save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "- PEFT " in card
    assert front_matter(card)["base_model"] == "/data/base"
    assert not is_edited(card)
    assert own_entries(card).license == "mit"
    assert own_entries(card).language == ["en", "de"]
    assert is_edited(card + "\nmine")
    assert is_edited(card.replace("## Limits", "## Limit"))


QUANTIZED = """## Training procedure

The following `bitsandbytes` quantization config was used during training:
- load_in_4bit: True
- llm_int8_skip_modules: None

"""


@pytest.mark.parametrize("versions", ["", "### Framework versions\n\n- PEFT 0.10.0\n\n- PEFT 0.21.2"])
def test_what_peft_adds_for_a_quantized_model_is_no_edit(versions):
    card = fresh() + QUANTIZED + versions
    assert not is_edited(card)
    assert is_edited(card.replace("4bit: True", "4bit: True\nI chose that.\n"))


@pytest.mark.parametrize(
    "text",
    [
        "a\nb `c` $d$ | é 漢",
        pytest.param(
            "line\u2028separator",
        ),
    ],
)
def test_peft_keeps_the_text_of_a_card(tmp_path, text):
    example = dict.fromkeys(("prompt", "before", "after", "reference"), text)
    card = fresh(examples=[example], arguments={"system_prompt": text})
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    peft_model().save_pretrained(tmp_path)
    assert not is_edited((tmp_path / "README.md").read_text(encoding="utf-8"))


def test_the_template_of_the_client_is_nobodys_text(tmp_path):
    """It is what PEFT writes where there is no card."""
    peft_model().save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "[More Information Needed]" in card
    assert not is_edited(card)
    assert own_entries(card).tags == []
    own = ModelCard.from_template(ModelCardData(license="mit", language="en", tags=["mine"]))
    assert not is_edited(str(own))
    assert own_entries(str(own)) == OwnEntries("mit", "en", ["mine"])


def template() -> str:
    return str(ModelCard.from_template(ModelCardData()))


@pytest.mark.parametrize("filled", [1, 2, 3, 5, 39])
def test_a_template_that_somebody_has_begun_to_fill_is_edited(filled):
    card = template()
    assert not is_edited(card)
    assert is_edited(card.replace("[More Information Needed]", "my mails", filled))


@pytest.mark.parametrize(
    "change",
    [
        lambda card: card + "\n## Notes\n\nMine.\n",
        lambda card: card.replace("# Model Card for Model ID", "# My model"),
        lambda card: card.replace("## Uses", "I use it.\n\n## Uses"),
    ],
)
def test_a_template_with_a_sentence_of_ones_own_is_edited(change):
    assert is_edited(change(template()))


def test_an_older_template_is_nobodys_text_either():
    """Its fields had other names; all are empty."""
    card = template().replace("- **Funded by [optional]:** [More Information Needed]\n", "")
    comment = "<!-- This should link to a Data Card if possible. -->"
    assert not is_edited(card.replace("- **Model type:**", f"{comment}\n\n- **Kind:**"))


def trl_card(**changes) -> str:
    values = {
        **{"base_model": "org/base", "model_name": "out", "hub_model_id": "me/out", "dataset_name": "org/data"},
        **{"tags": ["mine", "trl", "sft"], "wandb_url": None, "trackio_url": None, "trainer_name": "SFT"},
    }
    return str(generate_model_card(**values | changes))


def trainer_card(**changes) -> str:
    log = [{"Training Loss": "No log", "Epoch": 1.0, "Step": 4, "Validation Loss": 1.25, "Accuracy": 0.5}] * 2
    values = {
        **{"model_name": "out", "finetuned_from": "org/base", "dataset": ["squad"], "dataset_tags": ["squad"]},
        **{
            "hyperparameters": {
                "learning_rate": 5e-05,
                "optimizer": "Use OptimizerNames.ADAMW_TORCH with betas=(0.9,0.9"
                "99) and epsilon=1e-08 and optimizer_args=No additional optimizer arguments",
            },
            "eval_lines": log,
        },
        **{
            "eval_results": {"Loss": 1.25, "Accuracy": 0.5, "F1 Macro": float("nan")},
            "tags": ["generated_from_trainer"],
        },
    }
    return TrainingSummary(**values | changes).to_model_card()


@pytest.mark.parametrize(
    ("card", "library"),
    [
        (trl_card(), "trl"),
        (trl_card(base_model=None, dataset_name=None, hub_model_id="out"), "trl"),
        (trl_card(wandb_url="https://wandb.ai/me/x/runs/1", trackio_url="https://me-x.hf.space?a=b"), "trl"),
        (trainer_card(), "transformers"),
        (trainer_card(finetuned_from=None, dataset=None, eval_lines=None, eval_results=None), "transformers"),
        (trainer_card(dataset=["a/b", "c"], hyperparameters=None), "transformers"),
        (template(), "peft"),
    ],
)
def test_the_libraries_cards_are_known_also_when_peft_has_changed_them(tmp_path, card, library):
    assert library_of(card) == library
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    peft_model().save_pretrained(tmp_path)
    changed = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "- PEFT " in changed
    assert library_of(changed) == library
    assert not is_edited(changed)
    assert is_kept(changed, has_record=False) == (library != "peft")
    assert not is_kept(changed, has_record=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda card: card + "\n## My notes\n\nIt answers in rhymes.\n",
        lambda card: card.replace("More information needed", "It answers in rhymes.", 1),
        lambda card: card.replace("## Training procedure", "I trained it at home.\n\n## Training procedure"),
        lambda card: card.replace("# Model Card for out", "# My poet").replace("# out", "# My poet"),
        lambda card: (
            card.replace("### Framework versions", "- learning_rate: 1\n\n### Framework versions")
            if "TRL" in card
            else card.replace("## Intended uses & limitations", "- WER: 12.3\n\n## Intended uses & limitations")
        ),
        lambda card: card.replace("If you had a time machine", "Hello").replace("5e-05", "5e-05, as the paper says"),
    ],
)
@pytest.mark.parametrize("card", [trl_card(), trainer_card()], ids=["trl", "transformers"])
def test_a_librarys_card_with_text_of_a_person_is_edited(card, change):
    if change(card) != card:
        assert library_of(change(card)) is None
        assert is_edited(change(card))


def test_the_trainers_themselves_write_the_cards_that_are_known(tmp_path):
    common = {"train_dataset": tiny.token_dataset(16, labels=False), "processing_class": tiny.tokenizer()}
    trl = SFTTrainer(model=peft_model(), args=SFTConfig(**tiny.arguments(tmp_path / "trl")), **common)
    trl.create_model_card(model_name="out", tags=["mine"])
    args = TrainingArguments(**tiny.arguments(tmp_path / "plain"))
    plain = Trainer(
        model=peft_model(),
        args=args,
        eval_dataset=tiny.token_dataset(4),
        **common | {"train_dataset": tiny.token_dataset(16)},
    )
    plain.train()
    plain.evaluate()
    plain.save_model()
    plain.create_model_card(
        license="mit", language="en", tags=["mine"], finetuned_from="org/base", dataset_tags="squad"
    )
    cards = {name: (tmp_path / name / "README.md").read_text() for name in ("trl", "plain")}
    assert {name: library_of(card) for name, card in cards.items()} == {"trl": "trl", "plain": "transformers"}
    entries = own_entries(cards["plain"])
    assert (entries.license, entries.language, entries.more["datasets"]) == ("mit", ["en"], ["squad"])
    assert own_entries(cards["trl"]) == OwnEntries(tags=["mine"], more={"base_model": "org/base"})


# A card that is kept


def test_a_kept_card_is_mended_entry_by_entry():
    card = """---
# my own comment
license:   "mit"   # of the weights
base_model: /data/secret/base
datasets: [org/data, null]
tags:
- mine
- base_model:adapter:/data/secret/base
widget: [{text: Hello}]
---
# Mine
"""
    text, notes = mended(card, base_model="org/base", language=["en"], tags=["new", "mine"])
    assert (
        text
        == """---
# my own comment
license:   "mit"   # of the weights
base_model: org/base
datasets:
- org/data
tags:
- mine
- new
widget: [{text: Hello}]
language:
- en
---
# Mine
"""
    )
    assert notes == [
        "base_model is now org/base, because '/data/secret/base' is no id on the Hub",
        "datasets is now ['org/data'], because None is no id on the Hub",
        "tags now have new",
        "language is now en",
    ]
    assert mended(text, base_model="org/base", language="en", tags=["mine"]) == (text, [])


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("# Mine\n", "---\nlicense: mit\n---\n# Mine\n"),
        ("\ufeff\n---\nlanguage: no\n---\n# Mine\n", "---\nlanguage: no\nlicense: mit\n---\n# Mine\n"),
        ("---\n{language: en, license: other}\n---\nx", "---\nlanguage: en\nlicense: mit\n---\nx"),
        ("---\nlicense: other\nlicense_name: x\nlicense_link: y\n---\nx", "---\nlicense: mit\n---\nx"),
        ("---\nlicense: mit\n---\nx", "---\nlicense: mit\n---\nx"),
        ("---\nlicense:\n- other\n- x\nlanguage: en\n---\nx", "---\nlicense: mit\nlanguage: en\n---\nx"),
    ],
)
def test_a_license_is_written_into_a_kept_card(card, expected):
    assert mended(card, license="mit")[0] == expected


def test_a_path_that_nobody_can_name_is_removed():
    text, notes = mended("---\nbase_model: ./base\ntags:\n- base_model:adapter:./base\n---\nx")
    assert text == "---\n---\nx"
    assert notes == ["base_model was removed, because './base' is no id on the Hub"]


def test_a_librarys_card_becomes_an_adapters():
    text, _ = mended(trl_card(base_model=None), base_model="org/base", is_librarys=True)
    data = front_matter(text)
    assert (data["library_name"], data["base_model"]) == ("peft", "org/base")
    assert data["tags"][0] == "base_model:adapter:org/base"
    assert "licence" not in data
    assert library_of(text) == "trl"


def test_which_lines_would_be_lost_and_where():
    old = "---\nx: 1\n---\n# A\n\nfirst\n\n## B\n\nsecond\n- PEFT 0.1.0\n"
    assert lost_lines(old, "# A\n\nfirst\n") == ["## B", "second"]
    assert headings(["## B", "second"], old) == "“B”"
    assert headings(["plain"], "plain\n") == "“plain”"
    assert lost_lines(old, old + "more\n") == []


def test_what_a_trainers_card_tells_is_in_the_card_of_its_record(tmp_path):
    """So that nothing gets lost when it takes the place of that card."""
    args = TrainingArguments(**tiny.arguments(tmp_path, eval_strategy="steps", eval_steps=2))
    rows = {"train_dataset": tiny.token_dataset(16), "eval_dataset": tiny.token_dataset(4)}
    trainer = Trainer(model=peft_model(), args=args, callbacks=[RunRecordCallback()], **rows)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(finetuned_from="org/base")
    theirs = (tmp_path / "README.md").read_text()
    assert library_of(theirs) == "transformers"
    ours = render(RunRecord.load(tmp_path / "run_record.json"))
    assert f"| learning\\_rate | {args.learning_rate} |" in ours
    assert "| lr\\_scheduler\\_type | linear |" in ours
    assert f"| seed | {args.seed} |" in ours
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2
    for loss in losses:
        assert f"| {loss:.4f} " in theirs
        assert f" | {loss:.4g} |" in ours
