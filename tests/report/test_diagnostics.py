"""`hf-reflora inspect`: what it says of an adapter, and the command line as a whole."""

import json

import pytest
import tiny
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from hf_reflora import LoraSbConfig
from hf_reflora.cli import main
from hf_reflora.report.inspection import inspect_adapter


def saved(config, folder, seed=0):
    torch.manual_seed(seed)
    get_peft_model(tiny.llama(), config).save_pretrained(folder)
    return folder


def test_lora(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2})
    model = tiny.lora(tiny.llama(), target_modules=config.target_modules, rank_pattern=config.rank_pattern)
    model.save_pretrained(tmp_path)
    facts = inspect_adapter(tmp_path)
    assert (facts["method"], facts["PEFT type"], facts["layers"], facts["rank"]) == ("lora", "LORA", 4, "2 to 4")
    assert facts["trained numbers"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    A, B = (torch.cat([t.norm()[None] for t in tensors]) for tensors in zip(*pairs(model), strict=True))
    assert facts["‖A‖, mean"] == f"{A.mean():.4g}"
    assert facts["‖B‖, mean"] == f"{B.mean():.4g}"


def pairs(model):
    return [(A.detach(), B.detach()) for A, B, _ in tiny.linear_pairs(model)]


def test_a_fresh_lora_has_no_balance_gap(tmp_path):
    facts = inspect_adapter(saved(LoraConfig(r=4, target_modules=["q_proj"]), tmp_path))
    assert facts["‖B‖, mean"] == "0"
    assert "balance gap, mean" not in facts


@pytest.mark.parametrize("init", ["lora_xs", True, False])
def test_lora_sb(tmp_path, init):
    config = LoraSbConfig(r=4, target_modules=["q_proj"], init_weights=init, modules_to_save=["lm_head"])
    facts = inspect_adapter(saved(config, tmp_path))
    assert facts["PEFT type"] == "LORASB"
    assert facts["trained numbers"] == 2 * 4**2 + 260 * 32
    assert facts["saved modules"] == "lm_head"
    assert (facts["‖R‖, mean"] == "0") == (init is not False)
    assert (float(facts["BᵀB − I, largest"]) < 1e-5) == (init != "lora_xs")
    assert float(facts["AAᵀ − I, largest"]) < 1e-5


@pytest.mark.parametrize(
    ("config", "layers", "rank", "trained"),
    [
        ({"target_modules": ["q_proj"]}, 2, "4", 2 * (4 * 32 + 32 * 4)),
        ({"target_modules": ["embed_tokens"]}, 1, "4", 4 * 260 + 32 * 4),
        ({"target_modules": ["q_proj"], "use_dora": True}, 2, "4", 2 * (4 * 32 + 32 * 4 + 32)),
        ({"target_modules": ["q_proj"], "lora_bias": True}, 2, "4", 2 * (4 * 32 + 32 * 4 + 32)),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, 2, "4", 2 * 8 * 32 + 260 * 32),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [5, 6, 7]}, 2, "4", 2 * 8 * 32 + 3 * 32),
    ],
    ids=str,
)
def test_all_that_was_trained_is_counted(tmp_path, config, layers, rank, trained):
    torch.manual_seed(0)
    model = get_peft_model(tiny.llama(), LoraConfig(r=4, **config))
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    # What PEFT saves of a base model whose vocabulary may have changed was not trained.
    model.save_pretrained(tmp_path, save_embedding_layers="embed_tokens" in config["target_modules"])
    facts = inspect_adapter(tmp_path)
    assert (facts["layers"], facts["rank"], facts["trained numbers"]) == (layers, rank, trained)


def test_experts_have_the_rank_of_their_configuration(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 260, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **experts))
    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    model = get_peft_model(model, config)
    model.save_pretrained(tmp_path)
    facts = inspect_adapter(tmp_path)
    assert (facts["layers"], facts["rank"]) == (4, "4")
    assert facts["trained numbers"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_broken_files_are_named_in_one_line(tmp_path, capsys):
    saved(LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if "lora_B" not in name}, path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "adapter_config.json").write_bytes((tmp_path / "adapter_config.json").read_bytes())
    (tmp_path / "bin" / "adapter_model.bin").write_bytes(b"no pickle")
    (tmp_path / "empty").mkdir()
    places = {
        tmp_path: "only one factor of a LoRA pair",
        tmp_path / "bin": "cannot be read",
        tmp_path / "empty": "Can't",
    }
    for folder, message in places.items():
        with pytest.raises(SystemExit):
            main(["inspect", str(folder)])
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error


def test_the_run_record_tells_the_method(tmp_path):
    saved(LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    record = {"method": "reflora", "model": "org/base", "init": "lora_sb", "environment": {"commit": "abc"}}
    (tmp_path / "run_record.json").write_text(json.dumps(record), encoding="utf-8")
    facts = inspect_adapter(tmp_path)
    assert (facts["method"], facts["start"], facts["trained at commit"]) == ("reflora", "LoRA-SB", "abc")


def test_other_adapters_are_refused_in_one_line(tmp_path, capsys):
    saved(VeraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(tmp_path)])
    assert stopped.value.code == 1
    assert capsys.readouterr().err.endswith("knows LoRA, LoRA-SB and LoRA-XS adapters; this one is VERA.\n")


def test_command_prints_a_table(tmp_path, capsys):
    main(["inspect", str(saved(LoraConfig(r=4, target_modules=["q_proj"]), tmp_path))])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["method", "lora"]
    assert len({len(line) - len(line.split("  ")[-1].lstrip()) for line in lines}) == 1


@pytest.mark.parametrize("command", ["card", "export", "inspect", "push", "space"])
def test_help_fits_a_screen(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 24
    assert f"example: hf-reflora {command}" in text
