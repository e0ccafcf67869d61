"""Pairs of every kind of PEFT layer: what they are, that PEFT's update depends on them as the maths assumes, and what
a preconditioning does to their gradients and to nothing else."""

import copy
import itertools
import warnings

import pytest
import tiny
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, VeraConfig, create_arrow_model, get_peft_model
from peft.tuners.lora import ParamWrapper
from peft.tuners.lora import config as lora_config
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard
from transformers.pytorch_utils import Conv1D
from versions import needs

from hf_reflora import RefLora, create_reflora_optimizer
from hf_reflora.distributed.parameters import full_tensor
from hf_reflora.reflora.factors import LoraPair, dense_gradient, lora_layers, require_pairs, trainable_pairs
from hf_reflora.reflora.step import choose_step
from hf_reflora.reflora.step_plain import PlainStep


class Experts(nn.Module):
    """3-D parameters of 3 experts, (experts, out, in) or, with is_transposed, (experts, in, out)."""

    def __init__(self, is_transposed: bool):
        super().__init__()
        self.is_transposed = is_transposed
        shapes = ((3, 6, 7), (3, 7, 5)) if is_transposed else ((3, 7, 6), (3, 5, 7))
        self.up, self.down = (nn.Parameter(torch.randn(shape) / 3) for shape in shapes)

    def forward(self, x):
        x = x.expand(3, *x.shape)
        for weight in (self.up, self.down):
            x = torch.bmm(x, weight if self.is_transposed else weight.mT).tanh()
        return x.sum(0)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


TOKENS = torch.tensor([[1, 5, 2, 9], [3, 3, 0, 7]])
IMAGE, IMAGE_1D, IMAGE_3D = (torch.linspace(-1, 1, 2 * 4 * 5**n).sin().view(2, 4, *[5] * n) for n in (2, 1, 3))
ROWS = torch.linspace(-2, 2, 30).sin().view(5, 6)

# kind: (the layers, the input, LoraConfig); every model also has a layer that is no target
KINDS = {
    "linear": (lambda: {"a": nn.Linear(6, 9), "b": nn.Linear(9, 5)}, ROWS, {}),
    "linear rslora": (lambda: {"a": nn.Linear(6, 9)}, ROWS, {"use_rslora": True}),
    "linear dora": (lambda: {"a": nn.Linear(6, 9)}, ROWS, {"use_dora": True}),
    "linear lora_bias": (lambda: {"a": nn.Linear(6, 9)}, ROWS, {"lora_bias": True}),
    "linear modules_to_save": (lambda: {"a": nn.Linear(6, 9)}, ROWS, {"modules_to_save": ["head"]}),
    "linear rank_pattern": (lambda: {"a": nn.Linear(6, 9), "b": nn.Linear(9, 5)}, ROWS, {"rank_pattern": {"b": 2}}),
    "Conv1D": (lambda: {"a": Conv1D(9, 6)}, ROWS, {"fan_in_fan_out": True}),
    "embedding": (lambda: {"a": nn.Embedding(10, 6)}, TOKENS, {}),
    "embedding dora": (lambda: {"a": nn.Embedding(10, 6)}, TOKENS, {"use_dora": True}),
    "conv1d": (lambda: {"a": nn.Conv1d(4, 6, 3)}, IMAGE_1D, {}),
    "conv2d": (lambda: {"a": nn.Conv2d(4, 6, (3, 2), padding=1)}, IMAGE, {}),
    "conv2d 1x1": (lambda: {"a": nn.Conv2d(4, 6, 1)}, IMAGE, {}),
    "conv2d dora": (lambda: {"a": nn.Conv2d(4, 6, 3)}, IMAGE, {"use_dora": True}),
    "conv2d grouped": (lambda: {"a": nn.Conv2d(4, 6, 3, groups=2)}, IMAGE, {}),
    "conv2d channels_last": (lambda: {"a": nn.Conv2d(4, 6, 3)}, IMAGE, {}),
    "conv2d grouped channels_last": (lambda: {"a": nn.Conv2d(4, 6, 3, groups=2)}, IMAGE, {}),
    "conv3d": (lambda: {"a": nn.Conv3d(4, 6, 2)}, IMAGE_3D, {}),
    "attention": (lambda: {"a": Attention()}, ROWS[None], {"target_modules": ["attn"]}),
    "experts": (lambda: {"a": Experts(False)}, ROWS, {"target_parameters": ["a.up", "a.down"]}),
    "experts transposed": (lambda: {"a": Experts(True)}, ROWS, {"target_parameters": ["a.up", "a.down"]}),
    "parameter 2-D": (lambda: {"a": nn.Linear(6, 9)}, ROWS, {"target_parameters": ["a.weight"]}),
}


def build(kind: str) -> tuple[nn.Module, torch.Tensor]:
    layers, x, config = KINDS[kind]
    torch.manual_seed(0)
    model = nn.Sequential()
    for name, layer in layers().items():
        model.add_module(name, layer)
    width = 5 if "experts" in kind else model(x).shape[-1]
    model.add_module("tanh", nn.Tanh())
    model.add_module("head", nn.Linear(width, 2))
    model.double()
    if "channels_last" in kind:
        model.to(memory_format=torch.channels_last)
    targets = [] if "target_parameters" in config else [name for name in ("a", "b") if hasattr(model, name)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT: no merging with groups, target_parameters is experimental
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, **{"target_modules": targets, **config}))
    tiny.fill_B(model)
    if "channels_last" in kind:
        model.to(memory_format=torch.channels_last)
    return model, x.double() if x.is_floating_point() else x


def pairs_of(model: nn.Module) -> list[LoraPair]:
    return trainable_pairs(lora_layers(model))


def by_hand(layer: nn.Module, tensor: torch.Tensor, side: str) -> torch.Tensor:
    """Blocks (blocks, r, in) of A or (blocks, out, r) of B: a copy, from PEFT's shapes."""
    if isinstance(layer, ParamWrapper):  # A: (experts r, in), B: (out, r experts)
        E = layer.num_experts
        if side == "A":
            return tensor.detach().reshape(E, -1, tensor.shape[1]).clone()
        return tensor.detach().reshape(len(tensor), -1, E).permute(2, 0, 1).clone()
    groups = getattr(layer.get_base_layer(), "groups", 1)
    return tensor.detach().reshape(groups, len(tensor) // groups, -1).clone()


def loss(model, x):
    return model(x).square().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_views_and_cover_the_tensor(kind):
    model, x = build(kind)
    loss(model, x).backward()
    layers, pairs = lora_layers(model), pairs_of(model)
    assert len(pairs) == len(layers) > 0
    for pair, layer in zip(pairs, layers.values(), strict=True):
        for side, parameter, split in (("A", pair.A, pair.split_A), ("B", pair.B, pair.split_B)):
            torch.testing.assert_close(
                torch.stack(split(parameter)).sort().values, by_hand(layer, parameter, side).sort().values
            )
            for i, view in enumerate(split(parameter.grad)):
                view.fill_(i + 1)
            number = torch.arange(1.0, pair.blocks + 1, dtype=torch.float64)[:, None, None]
            written = by_hand(layer, parameter.grad, side)
            assert torch.equal(written, number.expand_as(written))


def test_whatever_the_order_of_memory_nothing_is_copied():
    """A gradient that no view can show as a matrix must raise: writing to a copy would do nothing, silently."""
    pair = LoraPair("", nn.Parameter(torch.zeros(4, 3, 2, 5)), nn.Parameter(torch.zeros(6, 4, 1, 1)), 1.0)
    for order in itertools.permutations(range(4)):
        memory = torch.zeros([(4, 3, 2, 5)[dim] for dim in order])
        grad = memory.permute([order.index(dim) for dim in range(4)])
        try:
            [view] = pair.split_A(grad)
        except RuntimeError:
            assert order[0] != 0
            continue
        view.fill_(1)
        assert memory.all(), order


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("both", [True, False])
def test_refactoring_the_blocks_leaves_the_model_as_it_is(kind, both):
    """(Tᵀ A, B T⁻ᵀ), block by block, is the same model and the same weight update, and Tᵀ A alone is not."""
    model, x = build(kind)
    layers = {name: layer for name, layer in lora_layers(model).items() if "grouped" not in kind}  # PEFT has no delta

    def deltas():
        return [layer.get_delta_weight("default").clone() for layer in layers.values()]

    with torch.no_grad():
        before, weights = model(x), deltas()
        for pair in pairs_of(model):
            for A, B in zip(pair.split_A(pair.A), pair.split_B(pair.B), strict=True):
                T = torch.randn(len(A), len(A), dtype=torch.float64)
                A.copy_(T.T @ A)
                if both:
                    B.copy_(torch.linalg.solve(T, B.T).T)
        same = [torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(weights, deltas(), strict=True)]
        assert all(same) if both else not any(same)
        assert torch.allclose(model(x), before, rtol=1e-9, atol=1e-11) == both


@pytest.mark.parametrize("kind", ["experts", "experts transposed", "parameter 2-D", "linear", "linear rslora"])
def test_update_is_scaling_times_B_A(kind):
    model, _ = build(kind)
    for pair, layer in zip(pairs_of(model), lora_layers(model).values(), strict=True):
        delta = layer.get_delta_weight("default").detach()
        delta = delta if delta.ndim == 3 else delta[None]
        assert len(delta) == pair.blocks
        for A, B, expert in zip(pair.split_A(pair.A), pair.split_B(pair.B), delta, strict=True):
            product = pair.scaling * B @ A
            # PEFT versions differ in which of the experts' two dimensions they take for the input.
            torch.testing.assert_close(product if product.shape == expert.shape else product.T, expert)


@pytest.mark.parametrize("method", ["reflora", "reflora_s"])
@pytest.mark.parametrize("kind", KINDS)
def test_preconditioning_is_the_one_by_hand_and_touches_nothing_else(kind, method):
    model, x = build(kind)
    loss(model, x).backward()
    layers, pairs = lora_layers(model), pairs_of(model)
    factors = {id(p) for pair in pairs for p in (pair.A, pair.B)}
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    expected, total = {}, 0.0
    for pair, layer in zip(pairs, layers.values(), strict=True):
        A, B, grad_A, grad_B = (
            by_hand(layer, t, side) for t, side in zip((pair.A, pair.B, pair.A.grad, pair.B.grad), "ABAB", strict=True)
        )
        S = torch.stack([tiny.hand_S(a, b, method) for a, b in zip(A, B, strict=True)])
        expected[pair.name] = torch.linalg.solve(S, grad_A), grad_B @ S
        total += sum(g.square().sum() for g in expected[pair.name])

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    step = PlainStep(RefLora(method, form="precondition"), {})
    norm = step.precondition(pairs, optimizer, measure_norm=True)

    for pair, layer in zip(pairs, layers.values(), strict=True):
        for parameter, side, value in zip((pair.A, pair.B), "AB", expected[pair.name], strict=True):
            torch.testing.assert_close(by_hand(layer, parameter.grad, side), value, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(norm, total.sqrt())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
        if parameter.grad is not None and id(parameter) not in factors:
            assert torch.equal(parameter.grad, grads[name])


def test_other_trainable_parameters_are_there_to_be_left_alone():
    others = {
        kind: [n for n, p in build(kind)[0].named_parameters() if p.requires_grad and ".weight" not in n[-7:]]
        for kind in KINDS
    }
    assert any("magnitude" in n for n in [n for n, p in build("linear dora")[0].named_parameters() if p.requires_grad])
    assert any(n.endswith("lora_B.default.bias") for n in others["linear lora_bias"])
    assert any("modules_to_save" in n for n in others["linear modules_to_save"])


def test_ranks_and_scalings_of_a_rank_pattern():
    model, _ = build("linear rank_pattern")
    assert [(len(p.A), p.scaling) for p in pairs_of(model)] == [(4, 1.5), (2, 3.0)]


def two_adapters() -> nn.Module:
    model = tiny.lora(tiny.mlp())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0", "4"]))
    tiny.fill_B(model, seed=5)
    return model


def test_set_adapter_switches_the_pairs():
    model = two_adapters()
    layers = lora_layers(model)  # once: layers are modules

    def names():
        return [p.name.removeprefix("base_model.model.") for p in trainable_pairs(layers)]

    assert names() == ["0[default]", "2[default]"]
    model.set_adapter("other")
    assert names() == ["0[other]", "4[other]"]
    model.base_model.set_adapter(["default", "other"])
    assert names() == ["0[default]", "0[other]", "2[default]", "4[other]"]


def test_frozen_factors_are_skipped():
    model = tiny.lora(tiny.mlp())
    first, second = pairs_of(model)
    first.A.requires_grad_(False)
    assert [p.name for p in pairs_of(model)] == [second.name]
    second.B.requires_grad_(False)
    assert pairs_of(model) == []


def test_tied_pairs_come_once():
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), LoraConfig(target_modules=["0", "1"]))
    first, second = lora_layers(model).values()
    assert len(pairs_of(model)) == 2
    second.lora_A, second.lora_B = first.lora_A, first.lora_B
    assert len(pairs_of(model)) == 1


def embedding_tied_to_head() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tiny.lora(
            tiny.llama(tie_word_embeddings=True).double(),
            target_modules=["embed_tokens", "lm_head"],
            ensure_weight_tying=True,
        )


@needs("peft", "0.19", "weight tying of target modules")
@pytest.mark.parametrize("method", ["reflora", "reflora_s"])
def test_tied_embedding_and_head(method):
    """PEFT's ensure_weight_tying: the head's factors are other Parameters on the embedding's memory, transposed."""
    model = embedding_tied_to_head()
    ids = torch.randint(4, 260, (2, 8))
    model(ids, labels=ids).loss.backward()
    embedding, head = (layer for layer in lora_layers(model).values())
    A, B = embedding.lora_embedding_A["default"], embedding.lora_embedding_B["default"]
    head_A, head_B = head.lora_A["default"].weight, head.lora_B["default"].weight
    assert head_A.data_ptr() == B.data_ptr()
    assert head_B.data_ptr() == A.data_ptr()
    S = tiny.hand_S(A, B, method)
    expected = [torch.linalg.solve(S, A.grad), B.grad @ S, S.T @ head_A.grad, torch.linalg.solve(S, head_B.grad.T).T]
    PlainStep(RefLora(method, form="precondition"), {}).precondition(
        pairs_of(model), torch.optim.SGD(model.parameters())
    )
    for parameter, value in zip((A, B, head_A, head_B), expected, strict=True):
        torch.testing.assert_close(parameter.grad, value, rtol=1e-7, atol=1e-12)


@needs("peft", "0.19", "weight tying of target modules")
def test_rescaling_a_tied_embedding_and_head_is_refused():
    """Each of the two pairs would be scaled by the other's s, too: norms would swap, moments go wrong."""
    model = embedding_tied_to_head()
    with pytest.raises(ValueError, match="share"):
        PlainStep(RefLora("reflora_s"), {}).rescale(pairs_of(model), torch.optim.SGD(model.parameters()))


@pytest.mark.parametrize("form", ["precondition", "rescale"])
def test_one_A_shared_by_two_B_is_refused(form):
    """Such an A would be refactored twice, and rescaling it would change the model."""
    model = tiny.lora(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double(), r=2)
    first, second = lora_layers(model).values()
    second.lora_A = first.lora_A
    model(tiny.batch(0)[0]).square().mean().backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    step = PlainStep(RefLora("reflora_s", form=form), {})
    with pytest.raises(ValueError, match="share"):
        (step.precondition if form == "precondition" else step.rescale)(pairs_of(model), optimizer)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (tiny.mlp, "Sequential has no adapter; wrap it"),
        (lambda: get_peft_model(tiny.mlp(), VeraConfig(r=2, target_modules=["0"])), "(?i)vera.*pass a LoraConfig"),
        (
            lambda: get_peft_model(tiny.mlp(), IA3Config(target_modules=["0"], feedforward_modules=[])),
            "(?i)ia3.*LoraConfig",
        ),
        (
            lambda: get_peft_model(tiny.mlp(), AdaLoraConfig(target_modules=["0"], total_step=10)),
            "(?i)adalora.*LoraConfig",
        ),
        (lambda: tiny.lora(tiny.mlp()).requires_grad_(False), "2 LoRA layers, but none has both factors trainable"),
        pytest.param(
            lambda: tiny.lora(tiny.mlp(dtype=torch.float32), init_lora_weights="mica"),
            r"freeze a factor \(LoRA-FA, MiCA\)",
            marks=needs("peft", "0.20", "MiCA"),
        ),
        pytest.param(
            lambda: tiny.lora(tiny.mlp(), kasa_config=lora_config.KasaConfig()),
            "KaSA has a diagonal",
            marks=needs("peft", "0.21", "KaSA"),
        ),
        pytest.param(
            lambda: tiny.lora(
                tiny.mlp(),
                use_bdlora=lora_config.BdLoraConfig(target_modules_bd_a=["0"], match_strict=False, nblocks=2),
            ),
            "BD-LoRA has block-diagonal",
            marks=needs("peft", "0.19", "BD-LoRA"),
        ),
        pytest.param(
            lambda: tiny.lora(tiny.mlp(), monteclora_config=lora_config.MontecloraConfig()),
            "MonteCLoRA samples",
            marks=needs("peft", "0.20", "MonteCLoRA"),
        ),
    ],
    ids=["none", "VeRA", "IA3", "AdaLoRA", "frozen", "MiCA", "KaSA", "BD-LoRA", "MonteCLoRA"],
)
def test_models_without_pairs_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        require_pairs(make())


def test_arrow_router_is_refused(tmp_path):
    for name in ("one", "two"):
        tiny.lora(tiny.llama()).save_pretrained(tmp_path / name)
    model = create_arrow_model(
        tiny.llama(), [str(tmp_path / "one"), str(tmp_path / "two")], lora_config.ArrowConfig(top_k=1)
    )
    with pytest.raises(ValueError, match="Arrow mixes several adapters"):
        require_pairs(model)


@needs("peft", "0.20", "MonteCLoRA")
def test_variants_that_are_frozen_do_not_disturb():
    model = tiny.lora(tiny.mlp(), monteclora_config=lora_config.MontecloraConfig())
    model.add_adapter("plain", LoraConfig(target_modules=["0"]))
    model.set_adapter("plain")
    assert [p.name for p in require_pairs(model)] == ["base_model.model.0[plain]"]


def test_loaded_adapters_need_is_trainable(tmp_path):
    tiny.lora(tiny.mlp()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is_trainable=True"):
        require_pairs(PeftModel.from_pretrained(tiny.mlp(), tmp_path))
    assert len(require_pairs(PeftModel.from_pretrained(tiny.mlp(), tmp_path, is_trainable=True))) == 2


def test_sparse_gradients_are_refused():
    model = tiny.lora(nn.Sequential(nn.Embedding(10, 6)).double(), r=2)
    [pair] = pairs_of(model)
    pair.A.grad, pair.B.grad = torch.zeros_like(pair.A).to_sparse(), torch.zeros_like(pair.B)
    with pytest.raises(ValueError, match="dense gradients, found torch"):
        dense_gradient(pair.A)
    with pytest.raises(ValueError, match="sparse=False"):
        PlainStep(RefLora(), {}).precondition([pair], torch.optim.SGD([pair.A, pair.B]))


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", ["reflora", "reflora_s"])
def test_factors_sharded_by_fsdp2(mesh, method):
    """An optimizer made before raises at its first step; one made after takes the steps of a model in one piece."""
    results = []
    for sharded in (False, True):
        model = tiny.lora(tiny.mlp())
        optimizers = [create_reflora_optimizer(model, torch.optim.AdamW, lr=0.02, method=method)]
        if sharded:
            fully_shard(model, mesh=mesh)
            assert len(trainable_pairs(lora_layers(model))) == 2
            optimizers.append(create_reflora_optimizer(model, torch.optim.AdamW, lr=0.02, method=method))
        for seed in range(3):
            model.zero_grad()
            tiny.mlp_loss(model, seed).backward()
            if sharded:
                with pytest.raises(ValueError, match=r"made before the model was sharded.*after fully_shard"):
                    optimizers[0].step()
            optimizers[-1].step()
        results.append({name: full_tensor(value) for name, value in tiny.trainable(model).items()})
    tiny.assert_same(*results, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["conv2d", "conv2d grouped", "experts"])
def test_other_sharded_layers_are_refused(mesh, kind):
    model = build(kind)[0]
    fully_shard(model, mesh=mesh)
    match = r"sharded factors in .*a convolution or expert layer.*Train with DDP or DeepSpeed, or leave the layer out"
    with pytest.raises(NotImplementedError, match=match):
        choose_step(RefLora(), lora_layers(model))


@pytest.mark.parametrize("placement", [Shard(1), Partial()], ids=str)
def test_tensor_parallel_factors_are_refused(mesh, placement):
    model = tiny.lora(tiny.mlp())
    layers = lora_layers(model)
    A = next(iter(layers.values())).lora_A["default"]
    A.weight = nn.Parameter(DTensor.from_local(A.weight.detach(), mesh, [placement]))
    with pytest.raises(NotImplementedError, match=r"shards of rows, not tensor parallelism\. Train with FSDP2"):
        choose_step(RefLora(), layers)


def test_pairs_are_looked_up_again_when_parameters_are_replaced():
    model = tiny.lora(tiny.mlp())
    layers = lora_layers(model)
    layer = next(iter(layers.values()))
    layer.lora_A["default"].weight = nn.Parameter(copy.deepcopy(layer.lora_A["default"].weight.data))
    assert trainable_pairs(layers)[0].A is layer.lora_A["default"].weight


def test_a_factor_without_gradient_is_left_out():
    model = tiny.lora(tiny.mlp())
    tiny.mlp_loss(model, 0).backward()
    (first, second), optimizer = pairs_of(model), torch.optim.SGD(model.parameters())
    first.A.grad = first.B.grad = second.A.grad = None
    expected = second.B.grad @ tiny.hand_S(second.A, second.B, "reflora")
    PlainStep(RefLora(), {}).precondition([first, second], optimizer)
    assert first.A.grad is first.B.grad is second.A.grad is None
    torch.testing.assert_close(second.B.grad, expected, rtol=1e-7, atol=1e-12)
    second.B.grad = None
    assert PlainStep(RefLora(), {}).precondition([first, second], optimizer) is None


def test_layers_of_a_module_with_a_short_name_are_named():
    layer = type("Layer", (nn.Module, BaseTunerLayer), {"__module__": "mine"})
    with pytest.raises(ValueError, match=r"layers of this model are others: mine\.Layer\. Pass a LoraConfig"):
        require_pairs(nn.Sequential(nn.Linear(2, 2), layer()))
