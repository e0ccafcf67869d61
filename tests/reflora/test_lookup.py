"""The list of pairs that is kept from step to step: never out of date, and not looked up without need."""

import pytest
import tiny
import torch
from peft import LoraConfig
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_reflora import create_reflora_optimizer
from hf_reflora.reflora import factors
from hf_reflora.reflora.factors import PairLookup, lora_layers


def model_with_embedding() -> nn.Module:
    return tiny.lora(tiny.llama(), target_modules=["embed_tokens", "q_proj"])


def two_adapters() -> nn.Module:
    model = tiny.lora(tiny.mlp())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0", "4"]))
    tiny.fill_B(model, seed=5)
    return model


def first_layer(model):
    return next(iter(lora_layers(model).values()))


def replace_parameter(model):
    layer = first_layer(model)
    layer.lora_A["default"].weight = nn.Parameter(layer.lora_A["default"].weight.detach().clone())


def replace_linear(model):
    layer = first_layer(model)
    layer.lora_B["default"] = nn.Linear(*reversed(layer.lora_B["default"].weight.shape), bias=False).double()


def replace_dictionary(model):
    layer = first_layer(model)
    layer.lora_A = nn.ModuleDict({**layer.lora_A, "default": nn.Linear(6, 4, bias=False).double()})


def freeze(model):
    first_layer(model).lora_A["default"].weight.requires_grad_(False)


def scale(model):
    first_layer(model).set_scale("default", 3.0)


def gradient_of_a_frozen_adapter(model):
    """As after the backward pass of an adapter that set_adapter has switched off since."""
    for name, parameter in model.named_parameters():
        if "other" in name:
            parameter.grad = torch.zeros_like(parameter)


CHANGES = {
    "set_adapter": lambda model: model.set_adapter("other"),
    "both adapters": lambda model: model.base_model.set_adapter(["default", "other"]),
    "add_adapter": lambda model: model.add_adapter("third", LoraConfig(r=2, target_modules=["2"])),
    "delete_adapter": lambda model: model.delete_adapter("default"),
    "parameter": replace_parameter,
    "linear": replace_linear,
    "dictionary": replace_dictionary,
    "freeze": freeze,
    "scale": scale,
    "gradient": gradient_of_a_frozen_adapter,
    "nothing": lambda model: None,
    "data": lambda model: first_layer(model).lora_A["default"].weight.data.mul_(2),
    "float": lambda model: model.float(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_kept_list_is_what_a_new_lookup_finds(name):
    model = two_adapters()
    lookup = PairLookup(lora_layers(model))
    assert [pair.name for pair in lookup.pairs()] == ["base_model.model.0[default]", "base_model.model.2[default]"]
    CHANGES[name](model)
    pairs = lookup.pairs()
    for pair, new in zip(pairs, PairLookup(lora_layers(model)).pairs(), strict=True):
        assert (pair.name, pair.scaling, pair.blocks) == (new.name, new.scaling, new.blocks)
        assert pair.A is new.A
        assert pair.B is new.B


@pytest.mark.parametrize("name", ["nothing", "data", "float"])
def test_pairs_are_not_looked_up_without_need(name, monkeypatch):
    calls, actual = [], factors._pairs_of
    monkeypatch.setattr(factors, "_pairs_of", lambda *args: (calls.append(1), actual(*args))[1])
    model = two_adapters()
    lookup = PairLookup(lora_layers(model))
    for _ in range(3):
        lookup.pairs()
        CHANGES[name](model)
        tiny.mlp_loss(model, 0).backward()
    assert len(calls) == 1


def test_a_replaced_factor_of_an_embedding_is_noticed():
    model = model_with_embedding()
    lookup = PairLookup(lora_layers(model))
    lookup.pairs()
    layer = first_layer(model)
    layer.lora_embedding_A["default"] = nn.Parameter(layer.lora_embedding_A["default"].detach().clone())
    assert lookup.pairs()[0].A is layer.lora_embedding_A["default"]


def test_a_parametrized_factor_is_looked_up_each_time():
    model = tiny.lora(tiny.mlp())
    linear = first_layer(model).lora_A["default"]
    torch.nn.utils.parametrize.register_parametrization(linear, "weight", nn.Identity())
    lookup = PairLookup(lora_layers(model))
    assert lookup.pairs() is not lookup.pairs()


def test_swapped_data_is_preconditioned_as_it_is_now():
    """Another tensor behind the same Parameter, of another dtype too: nothing of the old one is remembered."""
    for dtype in (torch.float64, torch.float32):
        results = []
        for fresh in (False, True):
            model = tiny.lora(tiny.mlp())
            optimizer = create_reflora_optimizer(model, torch.optim.SGD, lr=0.1)
            for step in range(2):
                if step == 1:
                    for parameter in model.parameters():
                        parameter.data = (3 * parameter.data).to(dtype)
                    if fresh:
                        optimizer = create_reflora_optimizer(model, torch.optim.SGD, lr=0.1)
                model.zero_grad()
                tiny.mlp_loss(model, step).backward()
                optimizer.step()
            results.append(tiny.trainable(model))
        tiny.assert_same(*results)


def test_parameters_that_fsdp2_replaces_are_noticed():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = tiny.lora(tiny.mlp())
        lookup = PairLookup(lora_layers(model))
        before = lookup.pairs()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        after = lookup.pairs()
        assert all(new.A is not old.A for new, old in zip(after, before, strict=True))
        model(tiny.batch(0)[0]).sum().backward()
        assert lookup.pairs() is after  # gathering for the forward pass and sharding again leaves the same Parameters
    finally:
        torch.distributed.destroy_process_group()
