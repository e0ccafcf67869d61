"""LoraSbCallback and LoraSbSFTTrainer in real trainers, against hand-made initializations and loops."""

import copy
import math
import random

import numpy as np
import pytest
import tiny
import tiny_trainer
import torch
from adapter_layers import adapters, delta, everything, factors, truncation
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from transformers import Trainer, TrainerCallback, get_scheduler
from trl import SFTTrainer

from hf_reflora import (
    LoraSbCallback,
    LoraSbConfig,
    LoraSbSFTTrainer,
    RefLoraSFTTrainer,
    create_reflora_optimizer,
    initialize_lora_sb_weights,
)
from hf_reflora.lora_sb.callback import first_learning_rate, update_of
from hf_reflora.lora_sb.initialize import mean_loss
from hf_reflora.lora_sb.targets import is_initialized


CONFIGS = {"lora_sb": LoraSbConfig, "lora": LoraConfig}
LAYERS = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def config(kind: str = "lora_sb", **changes):
    return CONFIGS[kind](**{"r": 4, **LAYERS, **changes})


def adapted(kind: str = "lora_sb", base=None, **changes) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(tiny.llama() if base is None else base, config(kind, **changes))


def make_trainer(folder, callbacks=None, model=None, data=16, cls=SFTTrainer, more=None, **changes):
    """LoraSbCallback() by default."""
    if callbacks is not None or cls is not LoraSbSFTTrainer:
        more = {**(more or {}), "callbacks": [LoraSbCallback()] if callbacks is None else callbacks}
    return tiny_trainer.build(folder, cls, adapted() if model is None else model, data, more, **changes)


def start(trainer) -> nn.Module:
    """The model as the training begins: what on_train_begin leaves behind."""
    held = {}

    class Keep(TrainerCallback):
        def on_epoch_begin(self, args, state, control, model=None, **kwargs):
            if not held:
                held.update(everything(model))

    trainer.add_callback(Keep())
    trainer.train()
    model = copy.deepcopy(trainer.model)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.copy_(held[name])
    return model


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def drawn(n: int, wanted: int, seed: int = 42) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:wanted].tolist()


def test_stock_sft_trainer_is_a_hand_made_loop(tmp_path):
    """peft_config, callback and AdamW on R, from the same samples and the rate that the schedule gives first."""
    trainer = make_trainer(
        tmp_path,
        [LoraSbCallback(num_samples=6)],
        model=tiny.llama(),
        more={"peft_config": config()},
        weight_decay=0.0,
        warmup_steps=2,
    )
    trainer.train()

    model = adapted()
    tokens = torch.tensor(tiny.token_dataset(16)["input_ids"])
    samples = tokens[drawn(16, 6)]
    initialize_lora_sb_weights(model, [{"input_ids": x, "labels": x} for x in samples.split(2)], eta=0.01 / 2)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, 2, 4)
    for step in range(4):
        x = tokens[2 * step : 2 * step + 2]
        model(x, labels=x).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    tiny.assert_same(tiny.trainable(trainer.model), tiny.trainable(model), rtol=1e-4, atol=1e-6)


def full_gradients(batches, base) -> dict[str, torch.Tensor]:
    """Of the mean over the labels of all batches, which are passed through the model as the trainer would."""
    base = copy.deepcopy(base).eval().requires_grad_(True)
    total, count = 0, 0
    for batch in batches:
        labels = batch.pop("labels")
        logits = base(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        total = total + nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        count += int((labels[:, 1:] != -100).sum())
    (total / count).backward()
    return {name: m.weight.grad for name, m in base.named_modules() if isinstance(m, nn.Linear)}


DATA_CASES = {
    "plain": (lambda: tiny.chat_dataset(7), {"max_length": 64}),
    "completion only": (
        lambda: Dataset.from_list([{"prompt": f"{i} + {i * i} = ", "completion": str(i + i * i)} for i in range(7)]),
        {"completion_only_loss": True},
    ),
    "wrapped": (lambda: tiny.chat_dataset(7), {"packing": True, "packing_strategy": "wrapped", "max_length": 24}),
    "bfd": (
        lambda: Dataset.from_list([{"text": "abcdefghij"[: 3 + i] * 2} for i in range(7)]),
        {"packing": True, "packing_strategy": "bfd", "max_length": 24},
    ),
    "checkpointing": (lambda: tiny.chat_dataset(7), {"activation_checkpointing": True}),
    "reentrant": (
        lambda: tiny.chat_dataset(7),
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    ),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("case", "kind"), [*((case, "lora_sb") for case in DATA_CASES), ("plain", "lora"), ("bfd", "lora")]
)
def test_the_gradient_is_that_of_full_fine_tuning_on_what_the_trainer_sees(tmp_path, case, kind):
    """All samples, in the trainer's own batches of 3, 3 and 1: weighted by their labels."""
    data, changes = DATA_CASES[case]
    base = tiny.llama(attention_dropout=0.3).double()
    trainer = make_trainer(
        tmp_path,
        [LoraSbCallback(num_samples=100, update="gradient", eta=0.1)],
        model=adapted(kind, copy.deepcopy(base)),
        data=data(),
        max_steps=1,
        per_device_train_batch_size=3,
        **changes,
    )
    model = start(trainer)
    rows = list(trainer.train_dataset)
    batches = [trainer.data_collator(rows[i : i + 3]) for i in range(0, len(rows), 3)]
    batches = [{k: v for k, v in batch.items() if k != "seq_lengths"} for batch in batches]
    expected = full_gradients(batches, base)
    for name, layer in adapters(model).items():
        best = truncation(-0.1 * expected[name], 4)
        assert (delta(layer) - best).norm() < 1e-5 * best.norm(), name


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_fused_head_makes_no_logits(tmp_path, name):
    model = adapted() if name == "llama" else adapted(base=tiny.gpt2(), target_modules=["c_attn"])
    trainer = make_trainer(tmp_path, model=model, max_steps=1)
    calls = []
    trainer.model.get_base_model().lm_head.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert not calls
    trainer.model.eval()
    ids = torch.arange(4, 16)[None].repeat(2, 1)
    labels = ids.clone()
    labels[0, :5] = -100
    loss, count = mean_loss(trainer.model, {"input_ids": ids, "labels": labels})
    assert not calls
    plain = trainer.model(input_ids=ids, labels=labels).loss
    assert calls
    torch.testing.assert_close(loss, plain)
    assert count == 22 - 4


@pytest.mark.parametrize("model", ["llama", "bert"])
def test_stock_trainer(tmp_path, model):
    """No fused head there; a classifier counts rows, and its new head is trained as usual."""
    if model == "llama":
        base, data = tiny.llama().double(), tiny.token_dataset(7)
        peft_model = adapted(base=copy.deepcopy(base))
    else:
        base = tiny.bert().double()
        rows = [{"input_ids": [5 + i, 9, 20 - i, *range(4, 4 + i)], "labels": i % 2} for i in range(7)]
        data = Dataset.from_list([{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows])
        changes = {"target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
        peft_model = adapted(base=copy.deepcopy(base), **changes)
    callback = LoraSbCallback(num_samples=7, update="gradient", eta=0.1)
    trainer = make_trainer(tmp_path, [callback], peft_model, data, Trainer, per_device_train_batch_size=3)
    before = tiny.trainable(trainer.model)
    model_then = start(trainer)
    batch = trainer.data_collator([dict(row) for row in data])
    full = base.eval().requires_grad_(True)
    full(**batch).loss.backward()
    for name, layer in adapters(model_then).items():
        best = truncation(-0.1 * full.get_submodule(name).weight.grad, 4)
        assert (delta(layer) - best).norm() < 1e-5 * best.norm()
    if model == "bert":
        [head] = [name for name in before if name.endswith("classifier.modules_to_save.default.weight")]
        assert not torch.equal(before[head], tiny.trainable(trainer.model)[head])


# The step size


def singular_values(model) -> dict[str, torch.Tensor]:
    return {name: layer.lorasb_R["default"].diag().clone() for name, layer in adapters(model).items()}


@pytest.fixture(scope="module")
def unit_step() -> dict[str, torch.Tensor]:
    """Singular values for η = 1, by hand."""
    model = adapted()
    samples = torch.tensor(tiny.token_dataset(16)["input_ids"])[drawn(16, 16)]
    data = [{"input_ids": x, "labels": x} for x in samples.split(2)]
    initialize_lora_sb_weights(model, data, eta=1.0, show_progress_bar=False)
    return singular_values(model)


@pytest.mark.parametrize(
    ("changes", "eta"),
    [
        ({}, 0.01),
        ({"warmup_steps": 4}, 0.01 / 4),
        ({"warmup_steps": 2, "lr_scheduler_type": "cosine", "learning_rate": 0.3}, 0.15),
        ({"warmup_steps": 3, "lr_scheduler_type": "constant_with_warmup"}, 0.01 / 3),
        ({"lr_scheduler_type": "constant"}, 0.01),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2}, 0.01),
    ],
    ids=str,
)
def test_eta_is_the_first_rate_above_zero(tmp_path, unit_step, changes, eta):
    """And what the optimizer is given in its first step that moves anything."""
    more = {"eval_dataset": tiny.token_dataset(2, labels=False)} if "eval_strategy" in changes else {}
    trainer = make_trainer(tmp_path, more=more, max_steps=8, **changes)
    model = start(trainer)
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    if "plateau" not in str(changes):
        assert next(rate for rate in rates if rate > 0) == pytest.approx(eta)
    for name, values in singular_values(model).items():
        torch.testing.assert_close(values, eta * unit_step[name], rtol=1e-5, atol=0)


def test_first_learning_rate():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    assert first_learning_rate(optimizer, None) == 0.5
    schedule = get_scheduler("linear", optimizer, 10, 100)
    assert optimizer.param_groups[0]["lr"] == 0
    assert first_learning_rate(optimizer, schedule) == pytest.approx(0.05)
    slow = torch.optim.lr_scheduler.LambdaLR(
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5), lambda step: max(0, step - 20) / 10
    )
    assert first_learning_rate(slow.optimizer, slow) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("schedule", "name"),
    [
        (lambda o: StepLR(o, 10), "StepLR"),
        (lambda o: ReduceLROnPlateau(o), "ReduceLROnPlateau"),
        (lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.0), "LambdaLR"),
    ],
)
def test_a_schedule_that_does_not_tell(tmp_path, schedule, name):
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    match = rf"first learning rate is 0 and {name} does not tell when it rises. Give LoraSbCallback\(eta=...\)"
    with pytest.raises(ValueError, match=match):
        make_trainer(tmp_path, model=model, more={"optimizers": (optimizer, schedule(optimizer))}).train()
    trainer = make_trainer(
        tmp_path, [LoraSbCallback(eta=0.1)], model, more={"optimizers": (optimizer, schedule(optimizer))}
    )
    assert is_initialized(start(trainer), "default")


@pytest.mark.parametrize(
    ("optim", "update"),
    [("adamw_torch", "sign"), ("sgd", "gradient"), ("adafactor", None), ("rmsprop", None)],
)
def test_update_follows_the_optimizer(tmp_path, unit_step, optim, update):
    trainer = make_trainer(tmp_path, optim=optim, max_steps=1)
    if update is None:
        with pytest.raises(
            ValueError, match=r'The first step of \w+ is not known. Give LoraSbCallback\(update="sign"'
        ):
            trainer.train()
        assert not is_initialized(trainer.model, "default")
        return
    found = singular_values(start(trainer))
    tiny.assert_same(
        found, singular_values(start(make_trainer(tmp_path, [LoraSbCallback(update=update)], optim="rmsprop")))
    )
    for name, values in found.items():
        assert torch.allclose(values, 0.01 * unit_step[name], rtol=1e-5) == (update == "sign")


class Lion(torch.optim.SGD):
    pass


class PagedLion8bit(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})


class SomethingElse(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})


def test_update_of():
    weight = [nn.Parameter(torch.zeros(2, 2))]
    for cls in (torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, Lion, PagedLion8bit):
        assert update_of(cls(weight)) == "sign"
    assert update_of(torch.optim.SGD(weight, lr=1.0, momentum=0.9)) == "gradient"
    for cls in (SomethingElse, torch.optim.Adadelta, torch.optim.Adagrad):
        with pytest.raises(ValueError, match=f"The first step of {cls.__name__} is not known"):
            update_of(cls(weight))
    wrapped = type("AcceleratedOptimizer", (), {"optimizer": torch.optim.AdamW(weight)})()
    assert update_of(wrapped) == "sign"
    assert update_of(create_reflora_optimizer(tiny.lora(tiny.llama()), torch.optim.SGD, lr=0.1)) == "gradient"


# The samples


def seen_samples(folder, callback, data=16, **changes) -> list[list[int]]:
    """First tokens of the samples that reach forward_fn, batch by batch."""
    seen = []

    def forward_fn(model, batch):
        seen.append(batch["input_ids"][:, :3].tolist())
        return mean_loss(model, batch)

    callback.forward_fn, callback.passes = forward_fn, 1
    trainer = make_trainer(folder, [callback], data=data, max_steps=1, **changes)
    trainer.train()
    return seen


@pytest.mark.parametrize(
    ("n", "given", "expected"),
    [(16, None, 16), (60, None, 25), (25_001, None, 26), (60, 40, 40), (16, 40, 16), (16, 1, 1)],
)
def test_number_of_samples(tmp_path, n, given, expected):
    """0.1 %, rounded up, at least 25, and no more than there are."""
    data = tiny.token_dataset(60)
    data = data.select([i % 60 for i in range(n)])
    batches = seen_samples(tmp_path, LoraSbCallback(num_samples=given), data, cls=Trainer)
    sizes = [len(batch) for batch in batches]
    assert sum(sizes) == expected
    assert sizes == [2] * (expected // 2) + [1] * (expected % 2)  # the trainer's batch size
    chosen = [data[i]["input_ids"][:3] for i in drawn(n, expected)]
    assert [row for batch in batches for row in batch] == chosen


def test_samples_are_seeded_by_the_arguments(tmp_path):
    first, again, other = (seen_samples(tmp_path, LoraSbCallback(num_samples=4), seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    data = tiny.token_dataset(16)["input_ids"]
    assert [row for batch in first for row in batch] == [data[i][:3] for i in drawn(16, 4, seed=1)]


def test_streamed_data(tmp_path):
    stream = tiny.token_dataset(16, labels=False).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"a stream of unknown length. Give LoraSbCallback\(num_samples=...\)"):
        make_trainer(tmp_path, data=stream).train()
    batches = seen_samples(tmp_path, LoraSbCallback(num_samples=5), stream)
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert [row for batch in batches for row in batch] == [ids[:3] for ids in tiny.token_dataset(5)["input_ids"]]
    assert sum(len(b) for b in seen_samples(tmp_path, LoraSbCallback(num_samples=50), stream)) == 16


class Once(torch.utils.data.IterableDataset):
    """Rows that are gone when they have been read, as those of a queue or a socket."""

    def __init__(self, number=16):
        self.rows = ({"input_ids": ids, "labels": ids} for ids in tiny.token_dataset(number)["input_ids"])
        self.epochs = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        yield from self.rows


@pytest.mark.parametrize("num_samples", [1, 5, 8])
@pytest.mark.parametrize("kind", ["generator", "iterator"])
def test_a_stream_that_can_be_read_once_trains_on_all_its_rows(tmp_path, num_samples, kind):
    expected = [row["input_ids"] for row in Once()]
    stream = Once()
    if kind == "iterator":
        stream.__class__ = type("Itself", (Once,), {"__iter__": lambda self: self, "__next__": lambda s: next(s.rows)})
    seen = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            model.register_forward_pre_hook(lambda m, a, k: seen.extend(k["input_ids"].tolist()), with_kwargs=True)

    callbacks = [LoraSbCallback(num_samples=num_samples), Watch()]
    trainer = make_trainer(tmp_path, callbacks, data=stream, cls=Trainer, max_steps=8)
    trainer.train()
    assert is_initialized(trainer.model, "default")
    assert seen == expected
    if kind == "generator":
        assert stream.epochs  # what the trainer calls on the dataset still reaches it


class Random(torch.utils.data.Dataset):
    """Samples that draw from every random state, as augmentations do."""

    def __init__(self):
        self.rows = tiny.token_dataset(16)["input_ids"]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        ids = list(self.rows[i])
        ids[0] = 4 + random.randrange(200)
        ids[1] = 4 + np.random.randint(200)
        ids[2] = 4 + int(torch.randint(200, ()))
        return {"input_ids": ids, "labels": ids}


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([Random()[i] for i in range(16)])


RANDOM_DATA = {"fixed": lambda: tiny.token_dataset(16), "random": Random, "random stream": Stream}


@pytest.mark.parametrize("case", RANDOM_DATA)
def test_training_is_not_disturbed(tmp_path, case):
    """Order of the data, dropout and augmentation are those of a run that starts from the same weights by hand."""
    model = adapted(base=tiny.llama(attention_dropout=0.5), lorasb_dropout=0.5)
    changes = {"train_sampling_strategy": "random", "cls": Trainer}
    callback = LoraSbCallback(num_samples=5)
    trainer = make_trainer(tmp_path, [callback], copy.deepcopy(model), RANDOM_DATA[case](), **changes)
    begun = start(trainer)
    assert is_initialized(begun, "default")
    plain = make_trainer(tmp_path, [], begun, RANDOM_DATA[case](), **changes)
    plain.train()
    assert losses(plain) == losses(trainer)
    tiny.assert_same(tiny.trainable(plain.model), tiny.trainable(trainer.model))


# Resuming, and adapters that are initialized already


@pytest.mark.parametrize("kind", CONFIGS)
def test_resumed_run_is_the_unbroken_run(tmp_path, kind):
    """With dropout and shuffled data; the initialization is skipped, though the data differ by then."""
    dropout = {"lorasb_dropout": 0.3} if kind == "lora_sb" else {"lora_dropout": 0.3}
    changes = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "train_sampling_strategy": "random"}

    def make(callback):
        base = tiny.llama(attention_dropout=0.3)
        return make_trainer(tmp_path, [callback], model=adapted(kind, base, **dropout), **changes)

    def never(model, batch):
        raise AssertionError("initialized again")

    unbroken = make(LoraSbCallback())
    unbroken.train()
    resumed = make(LoraSbCallback(forward_fn=never))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == losses(unbroken)
    assert len(losses(resumed)) == 6
    for left, right in zip(*(adapters(t.model).values() for t in (resumed, unbroken)), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(factors(left), factors(right), strict=True))


def test_a_resumed_run_is_left_alone_even_at_the_base(tmp_path):
    """With B = 0 nothing but the step tells that it is no new one."""

    def never(model, batch):
        raise AssertionError("initialized again")

    changes = {"learning_rate": 0.0, "save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    settings = {"start_at_base": True, "eta": 0.1}
    make_trainer(tmp_path, [LoraSbCallback(**settings)], adapted("lora"), **changes).train()
    resumed = make_trainer(tmp_path, [LoraSbCallback(**settings, forward_fn=never)], adapted("lora"), **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 3
    assert not any(layer.lora_B["default"].weight.any() for layer in adapters(resumed.model).values())


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_initialized_adapter_is_left_alone(tmp_path, kind, caplog):
    """By a second call of train(), and when it was saved and loaded, or initialized by hand."""

    def never(model, batch):
        raise AssertionError("initialized again")

    trainer = make_trainer(tmp_path / "run", model=adapted(kind))
    trainer.train()
    trainer.callback_handler.callbacks[-1].forward_fn = never
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved", is_trainable=True)
    for left, right in zip(*(adapters(m).values() for m in (loaded, trainer.model)), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(factors(left), factors(right), strict=True))
    again = make_trainer(tmp_path / "again", [LoraSbCallback(forward_fn=never)], model=loaded)
    again.train()
    assert len(losses(again)) == 4


@pytest.mark.parametrize("init_weights", ["lora_xs", True])
def test_other_starts_are_left_alone(tmp_path, init_weights):
    """The callback then only takes care of R's dtype."""
    model = adapted(init_weights=init_weights)
    before = everything(model)
    for layer in adapters(model).values():
        layer.lorasb_R["default"].data = layer.lorasb_R["default"].data.to(torch.bfloat16)
    begun = start(make_trainer(tmp_path, model=model, max_steps=1))
    tiny.assert_same(everything(begun), before)


def test_checkpoint_gives_the_same_logits(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=4)
    trainer.train()
    ids = torch.arange(4, 20)[None]
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "checkpoint-4").eval()
    assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)
    assert not torch.allclose(loaded(ids).logits, tiny.llama().eval()(ids).logits, atol=1e-4)


# With RefLoRA


def test_reflora_from_the_first_step(tmp_path):
    """The start is balanced; the log shows the model after each step, which is not far from it yet."""
    rows = {}
    for name, callbacks in (("lora_sb", [LoraSbCallback()]), ("plain", [])):
        trainer = make_trainer(tmp_path / name, callbacks, adapted("lora"), cls=RefLoraSFTTrainer, learning_rate=1e-4)
        if callbacks:
            for layer in adapters(start(trainer)).values():
                B, A = factors(layer)
                torch.testing.assert_close(B.T @ B, A @ A.T, rtol=0, atol=1e-6 * (A @ A.T).norm().item())
        else:
            trainer.train()
        rows[name] = [row for row in trainer.state.log_history if "loss" in row]
    for row in rows["lora_sb"]:
        metrics = {key: value for key, value in row.items() if key.startswith("reflora/")}
        assert len(metrics) == 8
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["reflora/fallback"] == 0
    gaps = [row["reflora/balance_gap"] for row in rows["lora_sb"]]
    assert gaps[0] < 0.2
    assert rows["plain"][0].get("reflora/balance_gap", math.inf) > 10


# Refusals


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("changes", [{"label_smoothing_factor": 0.1}, {"loss_type": "dft"}], ids=str)
def test_other_losses_need_forward_fn(tmp_path, changes):
    match = r"The loss is not the model's own \(loss_type=.*, label_smoothing_factor=.*Give LoraSbCallback\(forward_fn"
    trainer = make_trainer(tmp_path, **changes)
    with pytest.raises(ValueError, match=match):
        trainer.train()
    with pytest.raises(ValueError, match=match):
        make_trainer(tmp_path, cls=LoraSbSFTTrainer, **changes)
    start(make_trainer(tmp_path, [LoraSbCallback(forward_fn=mean_loss)], max_steps=1, **changes))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_compute_loss_func_needs_forward_fn(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.square().mean()

    with pytest.raises(ValueError, match="The loss is not the model's own"):
        make_trainer(tmp_path, cls=LoraSbSFTTrainer, more={"compute_loss_func": loss})


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (tiny.llama, "of a PeftModel; got a LlamaForCausalLM without an adapter. Make one by peft.get_peft_model"),
        (lambda: adapted("lora", use_dora=True), "is a LoRA variant such as DoRA"),
        (lambda: adapted("lora", init_lora_weights="pissa"), "another start"),
        (lambda: get_peft_model(tiny.llama(), VeraConfig(r=2, target_modules=["q_proj"])), "is a VeraConfig"),
    ],
)
def test_models_that_cannot_be_initialized(tmp_path, make, match):
    with pytest.raises(ValueError, match=match):
        make_trainer(tmp_path, cls=LoraSbSFTTrainer, model=make())
    trainer = make_trainer(tmp_path, model=make())
    with pytest.raises(ValueError, match=match):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("kind", ["lora_sb", "lora"])
def test_a_frozen_adapter_is_refused(tmp_path, kind):
    """Such as PeftModel.from_pretrained loads it; a head that is trained beside it would hide that it is not."""
    adapted(kind, modules_to_save=["lm_head"]).save_pretrained(tmp_path / "saved")
    model = PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved")
    model.base_model.model.lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match=r"The adapter 'default' is frozen.*is_trainable=True"):
        make_trainer(tmp_path, cls=LoraSbSFTTrainer, model=model)
    with pytest.raises(ValueError, match=r"The adapter 'default' is frozen.*is_trainable=True"):
        make_trainer(tmp_path, model=model).train()


@pytest.mark.parametrize("kind", ["lora_sb", "lora"])
def test_an_optimizer_without_the_adapter_is_refused(tmp_path, kind):
    """A Trainer keeps its optimizer, so a second train() would leave an adapter that became active later as it is."""
    model = adapted(kind)
    model.add_adapter("other", config(kind))
    trainer = make_trainer(tmp_path, model=model)
    trainer.train()
    model.set_adapter("other")
    trainer.pop_callback(LoraSbCallback)
    trainer.add_callback(LoraSbCallback(adapter_name="other"))
    with pytest.raises(ValueError, match=r"no parameter of the adapter 'other'.*make a new Trainer"):
        trainer.train()
    make_trainer(tmp_path, [LoraSbCallback(adapter_name="other")], model=model).train()


@pytest.mark.parametrize("second", [LoraSbCallback, LoraSbCallback()], ids=["class", "instance"])
def test_a_second_callback_is_refused(tmp_path, second):
    with pytest.raises(ValueError, match=r"Pass it as lora_sb=LoraSbCallback\(...\)"):
        make_trainer(tmp_path, [second], cls=LoraSbSFTTrainer)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"eta": 0.0}, "eta must be a positive number, got 0.0"),
        ({"eta": float("nan")}, "eta must be a positive number"),
        ({"update": "adam"}, r"update must be one of \('sign', 'gradient'\), got 'adam'"),
        ({"passes": 0}, "passes must be at least 1, got 0"),
    ],
)
def test_wrong_settings_raise_at_construction(changes, match):
    with pytest.raises(ValueError, match=match):
        LoraSbCallback(**changes)


def test_an_unknown_adapter(tmp_path):
    with pytest.raises(ValueError, match="There is no adapter 'x'"):
        make_trainer(tmp_path, [LoraSbCallback(adapter_name="x")]).train()


# The trainer


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_trainer_is_the_callback_and_nothing_else(tmp_path, kind):
    results = []
    for cls in (SFTTrainer, LoraSbSFTTrainer):
        trainer = make_trainer(tmp_path, None, adapted(kind), cls=cls, max_steps=2)
        trainer.train()
        results.append(tiny.trainable(trainer.model))
    tiny.assert_same(*results)


def test_settings_reach_the_initialization(tmp_path):
    """start_at_base, adapter_name and the settings of the trainer's lora_sb=."""
    settings = LoraSbCallback(start_at_base=True, num_samples=3)
    trainer = make_trainer(tmp_path, cls=LoraSbSFTTrainer, more={"lora_sb": settings}, max_steps=1)
    assert trainer.lora_sb is settings
    for layer in adapters(start(trainer)).values():
        B, R, A = factors(layer)
        assert not R.any()
        assert A.any()
        assert B.any()
    model = get_peft_model(tiny.llama(), config(), "mine")
    begun = start(make_trainer(tmp_path, [LoraSbCallback(adapter_name="mine")], model, max_steps=1))
    assert all(layer.lorasb_R["mine"].any() for layer in adapters(begun, "mine").values())


def test_tags_and_card(tmp_path):
    trainer = make_trainer(tmp_path, cls=LoraSbSFTTrainer, save_strategy="steps", save_steps=4)
    trainer.train()
    trainer.save_model()
    assert "lora-sb" in trainer.model.model_tags
    card = ModelCard.load(tmp_path / "README.md")
    assert {"trl", "sft", "lora-sb"} <= set(card.data.tags)
    assert "https://huggingface.co/papers/2411.19557" in card.text
    assert "ponkshe2024initialization" in card.text
    assert "hf-reflora export" in card.text


@pytest.mark.parametrize("cls", [SFTTrainer, LoraSbSFTTrainer])
def test_R_is_float32_again_before_the_optimizer_sees_it(tmp_path, cls):
    model = adapted()
    for layer in adapters(model).values():
        layer.lorasb_R["default"].data = layer.lorasb_R["default"].data.to(torch.bfloat16)
    trainer = make_trainer(tmp_path, model=model, cls=cls)
    trainer.train()
    assert {R.dtype for R in tiny.trainable(trainer.model).values()} == {torch.float32}
    states = trainer.optimizer.state.values()
    assert {state["exp_avg"].dtype for state in states} == {torch.float32}
    expected = make_trainer(tmp_path, cls=cls)
    expected.train()
    tiny.assert_same(tiny.trainable(trainer.model), tiny.trainable(expected.model))


def test_bf16_autocast_goes_through_the_initialization(tmp_path):
    """The trainer's forward pass under autocast; factors stay float32."""
    seen = []

    def forward_fn(model, batch):
        loss, count = mean_loss(model, batch)
        seen.append(hidden[-1])
        return loss, count

    trainer = make_trainer(tmp_path, [LoraSbCallback(forward_fn=forward_fn)], bf16=True, max_steps=1)
    hidden = []
    layer = trainer.model.get_base_model().model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda module, args, output: hidden.append(output.dtype))
    model = start(trainer)
    assert set(seen) == {torch.bfloat16}
    for layer in adapters(model).values():
        assert {f.dtype for f in factors(layer)} == {torch.float32}


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bar_follows_the_trainer(tmp_path, capsys, shown):
    make_trainer(tmp_path, max_steps=1, disable_tqdm=not shown).train()
    assert ("LoRA-SB initialization" in capsys.readouterr().err) == shown
