"""Matrix products one by one, as on a CPU, and stacked, as on a GPU: equal results, and how many operations they take.

The stacked way runs here on the CPU. What only a GPU can show is marked `gpu`.
"""

import pytest
import torch
from factor_pairs import BF16, F16, F32, F64, SHAPES, clones, identical, make, preconditioned
from torch.utils._python_dispatch import TorchDispatchMode

from hf_reflora.reflora import products
from hf_reflora.reflora.polar import polar_coefficients
from hf_reflora.reflora.precondition import precondition_, precondition_scalar_, rescale_
from hf_reflora.reflora.products import gram_stack
from hf_reflora.reflora.refactor import refactoring


@pytest.fixture
def stacked(monkeypatch):
    """The way of a GPU, on the CPU."""
    monkeypatch.setattr(products, "stacks", lambda device: True)


WAYS = [False, True]


@pytest.mark.parametrize("stack", WAYS, ids=["one by one", "stacked"])
@pytest.mark.parametrize("of_columns", [False, True])
def test_gram_stack_keeps_the_order_of_mixed_shapes(stack, of_columns, monkeypatch):
    monkeypatch.setattr(products, "stacks", lambda device: stack)
    dtypes = (F64, F32) * 3
    factors = [A.to(d) for A, d in zip(make([(3, k, 3) for k in (5, 8, 5, 1, 8)])[0], dtypes, strict=False)]
    grams = gram_stack([A.mT.contiguous() if of_columns else A for A in factors], F64, of_columns=of_columns)
    assert grams.shape == (5, 3, 3)
    assert grams.dtype == F64
    for gram, A in zip(grams, factors, strict=True):
        torch.testing.assert_close(gram, A.double() @ A.double().mT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grad_dtype", [BF16, F16, F32, F64])
@pytest.mark.parametrize("dtype", [BF16, F32, F64])
@pytest.mark.parametrize("method", [precondition_, precondition_scalar_])
def test_both_ways_precondition_alike(method, dtype, grad_dtype, monkeypatch):
    As, Bs, _, _ = make(SHAPES, dtype=dtype)
    _, _, grads_A, grads_B = make(SHAPES, dtype=grad_dtype)
    grads_A[1] = grads_B[4] = grads_B[1] = None
    if grad_dtype == F16:
        grads_A[0] *= 6e4 / grads_A[0].abs().max()  # S⁻¹ makes it larger than float16 can hold
    results = []
    for stack in WAYS:
        monkeypatch.setattr(products, "stacks", lambda device, stack=stack: stack)
        results.append(preconditioned(As, Bs, grads_A, grads_B, method=method))
    # A batch is summed up in another order.
    rtol = max(1e-5 if dtype != F64 else 1e-12, 2 * torch.finfo(grad_dtype).eps)
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * one.abs().max().item())


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
def test_both_ways_rescale_to_the_same_bits(dtype, monkeypatch):
    results = []
    for stack in WAYS:
        monkeypatch.setattr(products, "stacks", lambda device, stack=stack: stack)
        As, Bs, moments_A, moments_B = map(clones, make(SHAPES, dtype=dtype))
        rescale_(As, Bs, [[(m, 1)] for m in moments_A], [[(m, 2)] for m in moments_B])
        results.append([*As, *Bs, *moments_A, *moments_B])
    assert identical(*results)


# How many operations there are, and which ones there must not be


class Operations(TorchDispatchMode):
    """Counts operations that are not views, and refuses those that wait for the device or copy from it."""

    WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "item", "unique", "_unique2")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.WAITS, name
        # Indexing with a list, or with a mask: the indices come from the host, or their number must reach it.
        assert name not in ("index", "index_put_"), name
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def layers(count: int, dtype=F32):
    """The pairs of `count` layers of seven linear modules, as in a Llama, in small."""
    sizes = [(16, 16), (16, 8), (16, 8), (16, 16), (16, 40), (16, 40), (40, 16)]
    return make([(4, *size) for size in sizes] * count, dtype=dtype)


def operations(method, parts, **options) -> int:
    with Operations() as counted:
        method(*parts, **options)
    return counted.count


def with_moments(As, Bs, grads_A, grads_B):
    rescale_(As, Bs, *([[(g, 1), (g.clone(), 2)] for g in grads] for grads in (grads_A, grads_B)))


@pytest.mark.parametrize("method", [precondition_, precondition_scalar_, rescale_, with_moments])
def test_stacked_operations_do_not_grow_with_the_layers(method, stacked):
    """At most 200 at 224 pairs, which is Llama-3-8B with all linear layers."""
    counts = {}
    for count in (2, 32):
        parts = layers(count)
        if method is rescale_:
            parts = parts[:2]
        counts[count] = operations(method, parts) - (2 * len(parts[0]) if method is with_moments else 0)  # the clones
    assert counts[2] == counts[32] <= 200


def test_a_stack_of_16_bit_gradients_takes_few_operations_too(stacked):
    As, Bs, _, _ = layers(32)
    _, _, *grads = layers(32, BF16)
    assert operations(precondition_, (As, Bs, *grads)) <= 200


@pytest.mark.parametrize("stack", WAYS, ids=["one by one", "stacked"])
@pytest.mark.parametrize("steps", [None, 3.0])
@pytest.mark.parametrize("method", [precondition_, precondition_scalar_, rescale_])
def test_nothing_waits_for_the_device(method, steps, stack, monkeypatch):
    monkeypatch.setattr(products, "stacks", lambda device: stack)
    parts = layers(1)[: 2 if method is rescale_ else 4]
    assert operations(method, parts, inverse_steps=None if steps is None else [steps] * len(parts[0])) > 0
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Operations():
        torch.ones(1).item()


# On a GPU


def on_gpu(parts):
    return [[tensor.cuda() for tensor in part] for part in parts]


@pytest.fixture
def sync_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("steps", [None, 3.0])
@pytest.mark.parametrize("method", [precondition_, precondition_scalar_, rescale_])
def test_no_call_waits_for_a_gpu(method, steps, sync_is_an_error):
    torch.cuda.set_sync_debug_mode("default")
    parts = on_gpu(layers(4))[: 2 if method is rescale_ else 4]
    options = {} if steps is None else {"inverse_steps": [steps] * len(parts[0])}
    method(*parts, **options)  # the first call loads libraries
    torch.cuda.set_sync_debug_mode("error")
    method(*parts, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("method", [precondition_, precondition_scalar_, rescale_])
def test_a_gpu_computes_what_a_cpu_does(method):
    parts = layers(2)[: 2 if method is rescale_ else 4]
    copies = on_gpu(parts)
    method(*parts)
    method(*copies)
    for part, copy in zip(parts, copies, strict=True):
        for expected, result in zip(part, copy, strict=True):
            torch.testing.assert_close(result.cpu(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.gpu
def test_preconditioning_in_a_cuda_graph():
    As, Bs, grads_A, grads_B = on_gpu(layers(2))
    start = clones(grads_A + grads_B)
    precondition_(As, Bs, grads_A, grads_B)  # the first call loads libraries, and is the expected result
    expected = clones(grads_A + grads_B)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        precondition_(As, Bs, grads_A, grads_B)
    for grad, value in zip(grads_A + grads_B, start, strict=True):
        grad.copy_(value)
    graph.replay()
    for grad, value in zip(grads_A + grads_B, expected, strict=True):
        torch.testing.assert_close(grad, value, rtol=1e-5, atol=1e-6)


def test_the_whole_of_S_compiles_into_one_graph():
    """From factors to S, stacked as on a GPU: no break for the host to look at a number."""
    coefficients = polar_coefficients(1e-5 / 4)

    def core(A: torch.Tensor, B: torch.Tensor):
        R = refactoring(A @ A.mT, B.mT @ B, eps=1e-5, coefficients=coefficients)
        return R.S, R.S_inv

    As, Bs, _, _ = make([(4, 9, 7)] * 3, dtype=F32)
    A, B = torch.stack(As), torch.stack(Bs)
    torch._dynamo.reset()
    for one, other in zip(torch.compile(core, fullgraph=True, backend="eager")(A, B), core(A, B), strict=True):
        torch.testing.assert_close(one, other)
