"""LoRA-SB adapters exported as ordinary LoRA adapters: what stock PEFT makes of them."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference_sb
import tiny
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from hf_reflora import LoraSbConfig
from hf_reflora.cli import main
from hf_reflora.lora_sb import LoraSbLayer
from hf_reflora.lora_sb.export import ExportReport, export_lora
from hf_reflora.reflora.factors import require_pairs


IDS = torch.randint(4, 260, (2, 8), generator=torch.Generator().manual_seed(0))
CLOSE = {"rtol": 0, "atol": 1e-5}
WEIGHTS = "adapter_model.safetensors"


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = {"vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=1, eos_token_id=1, pad_token_id=0, **config)).eval()


def llama() -> nn.Module:
    return tiny.llama().eval()


# kind: (the base model, LoraSbConfig)
KINDS = {
    "llama": (llama, {"target_modules": ["q_proj", "down_proj"]}),
    "all-linear": (llama, {"target_modules": "all-linear"}),
    "default targets": (llama, {}),
    "regex": (llama, {"target_modules": r".*\.1\.self_attn\.[qv]_proj"}),
    "scaling": (llama, {"scaling": 0.25}),
    "clamped": (llama, {"r": 40, "target_modules": ["q_proj", "gate_proj", "k_proj"]}),
    "rank_pattern": (llama, {"r": 3, "rank_pattern": {"q_proj": 5, "layers.1.self_attn.v_proj": 2}}),
    "some layers": (llama, {"layers_to_transform": [1], "layers_pattern": "layers", "exclude_modules": ["v_proj"]}),
    "modules_to_save": (llama, {"modules_to_save": ["lm_head"]}),
    "dropout": (llama, {"lorasb_dropout": 0.1}),
    "lora_xs": (llama, {"init_weights": "lora_xs", "target_modules": ["q_proj", "down_proj"]}),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "c_fc"]}),
    "Conv1D clamped": (gpt2, {"r": 40, "target_modules": ["c_attn", "c_proj"], "scaling": 2.0}),
}


@torch.no_grad()
def trained(base: nn.Module, **config) -> PeftModel:
    """An adapter with the R of a training."""
    torch.manual_seed(1)
    task = {"task_type": "CAUSAL_LM"} if hasattr(base, "config") else {}
    model = get_peft_model(base, LoraSbConfig(**{"r": 4, "init_weights": True, **task, **config}))
    for layer in sb_layers(model).values():
        R = layer.lorasb_R["default"]
        R.copy_(torch.randn(R.shape) * torch.logspace(0, -2, len(R)) / layer.lorasb_B["default"].norm(dim=0).max())
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.add_(0.02)
    return model.eval()


def build(kind: str) -> PeftModel:
    base, config = KINDS[kind]
    return trained(base(), **config)


def layers_of(model: nn.Module, kind: type) -> dict[str, nn.Module]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    return {name.removeprefix("base_model.model."): layer for name, layer in layers.items()}


def sb_layers(model: nn.Module) -> dict[str, LoraSbLayer]:
    return layers_of(model, LoraSbLayer)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    return layers_of(model, LoraLayer)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def deltas(model: nn.Module) -> dict[str, np.ndarray]:
    """s B R A by hand in float64, (out, in)."""
    found = {}
    for name, layer in sb_layers(model).items():
        B, R, A = (getattr(layer, f"lorasb_{k}")["default"].detach().double().numpy() for k in "BRA")
        found[name] = layer.scaling["default"] * B @ R @ A
    return found


def adapter(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((path / "adapter_config.json").read_text()), load_file(path / WEIGHTS)


@pytest.mark.parametrize("source", ["model", "folder", "folder as str", "cli"])
@pytest.mark.parametrize("kind", KINDS)
def test_stock_peft_computes_the_same(kind, source, tmp_path, capsys):
    model = build(kind)
    native, out = tmp_path / "native", tmp_path / "out"
    model.save_pretrained(native)
    if source == "cli":
        main(["export", str(native), str(out)])
        assert "Exact" in capsys.readouterr().out
    else:
        report = export_lora({"model": model, "folder": native, "folder as str": str(native)}[source], out)
        assert report.relative_error == 0
        assert set(report.relative_error_by_layer.values()) == {0}
        assert report.relative_error_by_layer.keys() == report.ranks.keys() == sb_layers(model).keys()
        assert report.ranks == {name: len(layer.lorasb_R["default"]) for name, layer in sb_layers(model).items()}
    stock = PeftModel.from_pretrained(KINDS[kind][0](), out)
    torch.testing.assert_close(logits(stock), logits(model), **CLOSE)
    layers = lora_layers(stock)
    assert layers.keys() == sb_layers(model).keys()
    assert {layer.scaling["default"] for layer in layers.values()} == {1.0}
    with model.disable_adapter():
        assert (logits(stock) - logits(model)).abs().max() > 1e-3  # it is not nothing that is the same
    assert sorted(os.listdir(tmp_path)) == ["native", "out"]
    assert sorted(os.listdir(out)) == ["adapter_config.json", WEIGHTS]


IN_A_FRESH_PROCESS = """
import sys, warnings
from pathlib import Path
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
folder, failed = Path(sys.argv[1]), False
saved = torch.load(folder / "logits.pt")
for kind, expected in saved["logits"].items():
    base = AutoModelForCausalLM.from_pretrained(folder / kind / "base").eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, folder / kind / "out").eval()
    about = [str(w.message) for w in caught if "missing" in str(w.message) or "unexpected" in str(w.message).lower()]
    with torch.no_grad():
        print(kind, (model(input_ids=saved["ids"]).logits - expected).abs().max().item(), len(about), sep="|")
assert "hf_reflora" not in sys.modules
"""


def test_stock_peft_in_a_process_without_hf_reflora(tmp_path):
    kinds, expected = ["rank_pattern", "modules_to_save", "Conv1D clamped", "lora_xs", "regex"], {}
    for kind in kinds:
        model = build(kind)
        expected[kind] = logits(model)
        KINDS[kind][0]().save_pretrained(tmp_path / kind / "base")
        export_lora(model, tmp_path / kind / "out")
    torch.save({"ids": IDS, "logits": expected}, tmp_path / "logits.pt")
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line.split("|") for line in done.stdout.splitlines()]
    assert [kind for kind, *_ in lines] == kinds
    for kind, difference, warned in lines:
        assert float(difference) <= 1e-5, kind
        assert warned == "0", kind


@pytest.mark.parametrize("kind", ["llama", "scaling", "Conv1D", "modules_to_save"])
def test_merging_the_export_is_merging_the_adapter(kind, tmp_path):
    model = build(kind)
    export_lora(model, tmp_path / "out")
    stock = PeftModel.from_pretrained(KINDS[kind][0](), tmp_path / "out").merge_and_unload()
    native = model.merge_and_unload()
    tiny.assert_same(dict(native.state_dict()), dict(stock.state_dict()), rtol=0, atol=1e-6)


def test_it_is_the_fold_itself(tmp_path):
    """lora_B = s B R, lora_A = A, to the rounding of float32, contiguous, on the CPU."""
    model = build("scaling")
    export_lora(model, tmp_path)
    _, tensors = adapter(tmp_path)
    layers = sb_layers(model)
    assert len(tensors) == 2 * len(layers)
    for name, layer in layers.items():
        A, B = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        assert torch.equal(A, layer.lorasb_A["default"])
        own = (layer.lorasb_B["default"].double(), layer.lorasb_R["default"].detach().double())
        assert torch.equal(B, (0.25 * own[0] @ own[1]).float())


def test_config(tmp_path):
    model = build("rank_pattern")
    model.peft_config["default"].base_model_name_or_path = "some/model"
    model.peft_config["default"].revision = "v2"
    report = export_lora(model, tmp_path)
    config, _ = adapter(tmp_path)
    prefix = "model.layers.{}.self_attn.{}_proj"
    ranks = {prefix.format(0, "q"): 5, prefix.format(1, "q"): 5, prefix.format(0, "v"): 3, prefix.format(1, "v"): 2}
    assert report.ranks == ranks
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == 5
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["init_lora_weights"] is True
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == "some/model"
    assert config["revision"] == "v2"
    assert config["inference_mode"] is True
    assert set(config["target_modules"]) == {"q_proj", "v_proj"}
    for unwanted in ("use_dora", "use_rslora", "lora_bias"):
        assert config[unwanted] is False


@pytest.mark.parametrize("from_folder", [False, True], ids=["model", "folder"])
def test_what_the_config_keeps(from_folder, tmp_path):
    kept = {
        "exclude_modules": ["v_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
        "modules_to_save": ["lm_head"],
        "target_modules": ["q_proj", "v_proj"],
    }
    source = trained(llama(), lorasb_dropout=0.125, **kept)
    if from_folder:
        source.save_pretrained(tmp_path / "native")
        source = tmp_path / "native"
    export_lora(source, tmp_path / "out")
    config, tensors = adapter(tmp_path / "out")
    assert {k: sorted(v) if k.endswith("modules") else v for k, v in config.items() if k in kept} == kept
    assert config["lora_dropout"] == 0.125
    assert config["r"] == 4
    assert config["rank_pattern"] == {}
    assert {name for name in tensors if "lora_" not in name} == {"base_model.model.lm_head.weight"}


@pytest.mark.parametrize("rank", [None, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_alpha_is_the_rank_in_every_layer(kind, rank, tmp_path):
    """llama.cpp scales a layer by alpha / its own number of rows, and neither it nor vLLM reads PEFT's patterns."""
    model = build(kind)
    if rank is not None and rank > max(model.peft_config["default"].r, 3):
        pytest.skip("the adapter's own rank is smaller")
    export_lora(model, tmp_path, rank=rank)
    config, tensors = adapter(tmp_path)
    A = [tensor for name, tensor in tensors.items() if "lora_A" in name or "embedding_A" in name]
    B = [tensor for name, tensor in tensors.items() if "lora_B" in name or "embedding_B" in name]
    assert {config["lora_alpha"] / len(tensor) for tensor in A} == {1.0}
    assert {config["lora_alpha"] / tensor.shape[1] for tensor in B} == {1.0}
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


def test_tokenizer_templates_and_license_go_along(tmp_path):
    """Without them an adapter with new tokens, or with a template of its own, cannot be used."""
    native = saved(build("llama"), tmp_path)
    tiny.tokenizer().save_pretrained(native)
    (native / "additional_chat_templates").mkdir()
    for name in ("additional_chat_templates/tools.jinja", "LICENSE", "spiece.model", "notes.md", "trainer_state.json"):
        (native / name).write_text("x")
    export_lora(native, tmp_path / "out")
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {
        *("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json", "LICENSE"),
        *("chat_template.jinja", "additional_chat_templates/tools.jinja", "spiece.model"),
    }


def test_a_regex_stays_a_regex(tmp_path):
    export_lora(build("regex"), tmp_path)
    assert adapter(tmp_path)[0]["target_modules"] == KINDS["regex"][1]["target_modules"]


@pytest.mark.parametrize("orthonormal", [True, False])
@pytest.mark.parametrize("kind", ["llama", "Conv1D", "clamped", "scaling", "lora_xs"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_retruncation_is_the_best_and_its_error_the_one_stated(kind, rank, orthonormal, tmp_path):
    model = build(kind)
    if not orthonormal:  # as after pruning
        for layer in sb_layers(model).values():
            A, B, R = (getattr(layer, f"lorasb_{k}")["default"].detach() for k in "ABR")
            layer.set_factors("default", B + 0.1 * torch.randn_like(B), R, A + 0.1 * torch.randn_like(A))
    report = export_lora(model, tmp_path / "out", rank=rank)
    assert isinstance(report, ExportReport)
    stock = lora_layers(PeftModel.from_pretrained(KINDS[kind][0](), tmp_path / "out"))
    lost = whole = 0.0
    for name, delta in deltas(model).items():
        layer = stock[name]
        A, B = (getattr(layer, f"lora_{k}")["default"].weight.detach().double().numpy() for k in "AB")
        assert (layer.r["default"], len(A), layer.scaling["default"]) == (rank, rank, 1.0)
        error = np.linalg.norm(B @ A - delta)
        assert report.relative_error_by_layer[name] == pytest.approx(error / np.linalg.norm(delta), rel=1e-4)
        assert error == pytest.approx(reference_sb.tail(delta, rank), rel=1e-4)
        assert error > 0
        np.testing.assert_allclose(B.T @ B, A @ A.T, rtol=0, atol=1e-6)  # balanced
        lost, whole = lost + error**2, whole + np.linalg.norm(delta) ** 2
    assert report.relative_error == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert set(report.ranks.values()) == {rank}
    config, _ = adapter(tmp_path / "out")
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (rank, rank, {})


def test_a_rank_that_is_no_smaller_is_exact(tmp_path):
    model = build("rank_pattern")  # 5, 3 and 2
    whole = export_lora(model, tmp_path / "whole", rank=5)
    assert whole == export_lora(model, tmp_path / "none")
    tiny.assert_same(adapter(tmp_path / "whole")[1], adapter(tmp_path / "none")[1])
    mixed = export_lora(model, tmp_path / "mixed", rank=3)
    assert sorted(mixed.ranks.values()) == [2, 3, 3, 3]
    exact = {name for name, error in mixed.relative_error_by_layer.items() if error == 0}
    assert exact == {name for name in mixed.ranks if "v_proj" in name}
    assert 0 < mixed.relative_error < 1


def test_a_layer_of_R_zero(tmp_path):
    """Initialized and not trained: nothing is lost, and nothing divides by 0."""
    model = get_peft_model(llama(), LoraSbConfig(r=4, init_weights=True))
    report = export_lora(model, tmp_path / "out", rank=2)
    assert report.relative_error == 0
    stock = PeftModel.from_pretrained(llama(), tmp_path / "out")
    assert torch.equal(logits(stock), logits(llama()))


def test_low_precision_and_merged_adapters(tmp_path):
    model = build("llama")
    expected = logits(model)
    model.merge_adapter()
    export_lora(model, tmp_path / "merged")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path / "merged")), expected, **CLOSE)
    model.unmerge_adapter()
    model.to(torch.bfloat16)
    export_lora(model, tmp_path / "half")
    _, tensors = adapter(tmp_path / "half")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_one_adapter_of_several(tmp_path):
    model = build("llama")
    model.add_adapter("other", LoraSbConfig(r=2, target_modules=["v_proj"], init_weights=False))
    model.set_adapter("other")
    report = export_lora(model, tmp_path / "out", adapter_name="other")
    assert report.ranks == dict.fromkeys([f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)], 2)
    stock = PeftModel.from_pretrained(llama(), tmp_path / "out")
    torch.testing.assert_close(logits(stock), logits(model), **CLOSE)
    model.save_pretrained(tmp_path / "native")  # one folder each; PEFT puts "default" at the top
    export_lora(tmp_path / "native" / "other", tmp_path / "again")
    tiny.assert_same(adapter(tmp_path / "out")[1], adapter(tmp_path / "again")[1])


@pytest.mark.parametrize("kind", ["llama", "Conv1D", "clamped", "modules_to_save"])
def test_the_export_can_be_trained_on(kind, tmp_path):
    model = build(kind)
    export_lora(model, tmp_path / "out")
    stock = PeftModel.from_pretrained(KINDS[kind][0](), tmp_path / "out", is_trainable=True)
    assert len(require_pairs(stock)) == len(sb_layers(model))  # what RefLoraCallback requires
    optimizer = torch.optim.AdamW([p for p in stock.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = stock(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def mlp_adapter(**config) -> PeftModel:
    return trained(tiny.mlp(dtype=torch.float32), **{"r": 2, "target_modules": ["0", "2"], **config})


def test_models_that_are_not_of_transformers(tmp_path):
    model = mlp_adapter(rank_pattern={"0": 3}, scaling=3.0)
    model.save_pretrained(tmp_path / "native")
    export_lora(tmp_path / "native", tmp_path / "out")
    x = tiny.batch(0, torch.float32)[0]
    stock = PeftModel.from_pretrained(tiny.mlp(dtype=torch.float32), tmp_path / "out")
    torch.testing.assert_close(stock(x), model(x), **CLOSE)
    native, exported = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("native", "out"))
    assert exported["auto_mapping"] == native["auto_mapping"]


class Nested(nn.Module):
    """One module's name is the end of another's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.sub, self.lin = nn.ModuleDict({"lin": nn.Linear(6, 6)}), nn.Linear(6, 3)

    def forward(self, x):
        return self.lin(self.sub["lin"](x))


def test_a_name_that_is_the_end_of_another(tmp_path):
    model = trained(Nested(), r=6, target_modules=["lin"])  # clamped to 3 in "lin", 6 in "sub.lin"
    export_lora(model, tmp_path / "out")
    x = torch.randn(2, 6)
    torch.testing.assert_close(PeftModel.from_pretrained(Nested(), tmp_path / "out")(x), model(x), **CLOSE)


def lora_adapter(folder: Path) -> PeftModel:
    return tiny.lora(tiny.mlp(dtype=torch.float32))


def vera_adapter(folder: Path) -> PeftModel:
    return get_peft_model(tiny.mlp(dtype=torch.float32), VeraConfig(r=2, target_modules=["0"]))


def saved(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder / "native")
    return folder / "native"


def without(*missing: str):
    def make(folder: Path) -> Path:
        path = saved(mlp_adapter(), folder)
        tensors = load_file(path / WEIGHTS)
        keep = {name: t for name, t in tensors.items() if not any(part in name for part in missing)}
        assert len(keep) < len(tensors)
        save_file(keep, path / WEIGHTS)
        return path

    return make


def with_value(kind: str, value: float):
    @torch.no_grad()
    def make(folder: Path) -> PeftModel:
        model = mlp_adapter()
        getattr(model.base_model.model[2], f"lorasb_{kind}")["default"][0, 0] = value
        return model

    return make


def uninitialized(folder: Path) -> PeftModel:
    return get_peft_model(tiny.mlp(dtype=torch.float32), LoraSbConfig(r=2, target_modules=["0", "2"]))


REFUSALS = {
    "LoRA": (lora_adapter, {}, "this one is LORA. It is an ordinary LoRA already"),
    "LoRA's folder": (lambda f: saved(lora_adapter(f), f), {}, "this one is LORA. It is an ordinary LoRA already"),
    "VeRA": (vera_adapter, {}, "this one is VERA. Only LoRA-SB and LoRA-XS"),
    "VeRA's folder": (lambda f: saved(vera_adapter(f), f), {}, "this one is VERA. Only LoRA-SB and LoRA-XS"),
    "no R": (
        without("lorasb_R"),
        {},
        r"is incomplete: it lacks base_model.model.0.lorasb_R, base_model.model.2.lorasb_R",
    ),
    "no A of a layer": (without("2.lorasb_A"), {}, r"it lacks base_model.model.2.lorasb_A\. Save it again"),
    "no layer": (without("lorasb_"), {}, "it lacks A, B and R of any layer"),
    "NaN in R": (with_value("R", float("nan")), {}, r"not finite, in 2\.$"),
    "inf in B": (with_value("B", float("inf")), {}, r"not finite, in 2\.$"),
    "NaN in A": (with_value("A", float("nan")), {}, r"not finite, in 2\.$"),
    "uninitialized": (uninitialized, {}, r"not initialized yet: A is 0 in 0\. Train it first"),
    "uninitialized folder": (lambda f: saved(uninitialized(f), f), {}, "not initialized yet"),
    "unknown adapter": (lambda f: mlp_adapter(), {"adapter_name": "x"}, "no adapter 'x'; the model has default"),
    "rank 0": (lambda f: mlp_adapter(), {"rank": 0}, "between 1 and the adapter's own rank, 2; got 0"),
    "rank -1": (lambda f: mlp_adapter(), {"rank": -1}, "between 1 and the adapter's own rank, 2; got -1"),
    "rank too large": (lambda f: mlp_adapter(), {"rank": 3}, "between 1 and the adapter's own rank, 2; got 3"),
    "rank 1.5": (
        lambda f: mlp_adapter(),
        {"rank": 1.5},
        "an integer between 1 and the adapter's own rank, 2; got 1.5",
    ),
    "no such folder": (lambda f: f / "none", {}, "adapter_config.json"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_refusals(kind, tmp_path, capsys):
    make, options, match = REFUSALS[kind]
    source = make(tmp_path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match=match):
        export_lora(source, tmp_path / "out", **options)
    assert sorted(os.listdir(tmp_path)) == before  # no folder, half a folder or temporary one
    if isinstance(source, Path):
        with pytest.raises(SystemExit) as exit:
            main(["export", str(source), str(tmp_path / "out")])
        assert exit.value.code == 1
        error = capsys.readouterr().err
        assert error.startswith("hf-reflora: ")
        assert "Traceback" not in error
        assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("what", ["file", "folder with a file"])
def test_nothing_is_overwritten(what, tmp_path, capsys):
    native, out = saved(mlp_adapter(), tmp_path), tmp_path / "out"
    if what == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match=r"exists and is not empty\. Choose another folder or remove it"):
        export_lora(native, out)
    with pytest.raises(SystemExit):
        main(["export", str(native), str(out)])
    assert "exists and is not empty" in capsys.readouterr().err
    assert (out if what == "file" else out / "notes").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["native", "out"]


def test_an_empty_folder_is_filled_and_missing_parents_are_made(tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        export_lora(mlp_adapter(), out)
        assert sorted(os.listdir(out)) == ["adapter_config.json", WEIGHTS]
        assert out.stat().st_mode & 0o777 == 0o755
    assert sorted(os.listdir(tmp_path)) == ["a", "empty"]
    assert os.listdir(tmp_path / "a" / "b") == ["c"]


def test_a_write_that_fails_leaves_nothing(tmp_path):
    """Here the disk is full, as it were: more than the process may write to a file."""
    model = build("all-linear")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        with pytest.raises(Exception, match=r"(?i)large|I/O|space"):
            export_lora(model, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []


def test_export_changes_neither_model_nor_random_state(tmp_path):
    model = build("modules_to_save")
    before, state = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    export_lora(model, tmp_path / "out", rank=2)
    tiny.assert_same(before, dict(model.state_dict()))
    assert torch.equal(torch.get_rng_state(), state)
    assert type(model.peft_config["default"]) is LoraSbConfig
    assert not isinstance(model.peft_config["default"], LoraConfig)


def test_cli_states_ranks_and_error(tmp_path, capsys):
    native = saved(build("rank_pattern"), tmp_path)
    report = export_lora(native, tmp_path / "one", rank=2)
    main(["export", str(native), str(tmp_path / "two"), "--rank", "2"])
    printed = capsys.readouterr().out
    worst = max(report.relative_error_by_layer, key=report.relative_error_by_layer.get)
    assert "LoRA of rank 2 in 4 layers" in printed
    assert f"{report.relative_error:.2e} in all, {report.relative_error_by_layer[worst]:.2e}" in printed
    assert f"in the worst layer, {worst}." in printed
    main(["export", str(native), str(tmp_path / "three")])
    assert "LoRA of rank 2, 3, 5 in 4 layers" in capsys.readouterr().out
    tiny.assert_same(adapter(tmp_path / "one")[1], adapter(tmp_path / "two")[1])


@pytest.mark.parametrize(
    "arguments", [[], ["export"], ["export", "a"], ["fold", "a", "b"], ["export", "a", "b", "-q"]]
)
def test_cli_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert "usage: hf-reflora" in capsys.readouterr().err


HEADS = {"head": ["lm_head", "q_proj"], "all": ["lm_head", "q_proj", "down_proj"]}


@pytest.mark.parametrize("targets", HEADS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_output_layer_goes_without_the_base_weight_of_the_base_model(tmp_path, targets, tied):
    """PEFT saves the base weight of an adapted lm_head, which other readers of a LoRA do not expect."""
    tiny.save(tmp_path / "base", tie_word_embeddings=tied)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    model = trained(base, target_modules=HEADS[targets])
    model.save_pretrained(tmp_path / "native")
    expected = model(IDS).logits
    for folder, adapter in (("a", model), ("b", tmp_path / "native")):
        export_lora(adapter, tmp_path / folder)
        assert not any("base_layer" in name for name in load_file(tmp_path / folder / WEIGHTS))
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        loaded = PeftModel.from_pretrained(base, tmp_path / folder).eval()
        torch.testing.assert_close(loaded(IDS).logits, expected, **CLOSE)


@pytest.mark.parametrize("targets", HEADS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_output_layer_goes_with_its_rows(tmp_path, targets, tied):
    """They are nowhere else: whoever loads the adapter has random rows for the new tokens."""
    tiny.save(tmp_path / "base", tie_word_embeddings=tied)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    torch.manual_seed(5)
    base.resize_token_embeddings(272)
    model = trained(base, target_modules=HEADS[targets])
    model.save_pretrained(tmp_path / "native")
    ids = torch.cat([IDS, torch.tensor([[260, 265], [271, 262]])], dim=1)
    expected = model(ids).logits
    export_lora(tmp_path / "native", tmp_path / "exported")
    for folder in ("native", "exported"):
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        torch.manual_seed(6)
        base.resize_token_embeddings(272)
        loaded = PeftModel.from_pretrained(base, tmp_path / folder).eval()
        rows = slice(None) if tied else slice(0, 8)  # the untied embedding is saved by nobody
        torch.testing.assert_close(loaded(ids).logits[:, rows], expected[:, rows], **CLOSE)


def test_the_base_weight_of_an_unknown_base_goes_along(tmp_path):
    model = trained(llama(), target_modules=["lm_head", "q_proj"])
    export_lora(model, tmp_path / "out")
    assert any("base_layer" in name for name in load_file(tmp_path / "out" / WEIGHTS))
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "out")
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, **CLOSE)


def test_a_link_to_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    export_lora(trained(llama()), tmp_path / "link")
    assert (tmp_path / "disk" / WEIGHTS).exists()


def test_a_damaged_file_is_told_in_one_line(tmp_path, capsys):
    trained(llama()).save_pretrained(tmp_path / "sb")
    (tmp_path / "sb" / WEIGHTS).write_bytes(b"\x00" * 20)
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(tmp_path / "sb"), str(tmp_path / "out")])
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("hf-reflora: ")
    assert not (tmp_path / "out").exists()
