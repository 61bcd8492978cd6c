"""What ``memory_efficient.py``, ``rope.py`` and ``loss.py`` compute by hand equals the plain composition, gradients included."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import random_codes, random_orders, random_text, small_model
from torch import Tensor

from oar_scale.model import loss as loss_module
from oar_scale.model import memory_efficient
from oar_scale.model.blocks import GatedLinear, Linear, in_few_shapes
from oar_scale.model.loss import mean_nll
from oar_scale.model.rope import cell_rotations, rotate, rotate_, rotate_heads

DTYPES = [torch.float32, torch.bfloat16]
BATCH, ROWS, DIM, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 2, 9, 24, 40, 4, 2, 8
ROTATION = cell_rotations(3, HEAD_DIM, 100.0)[torch.stack([torch.arange(9), torch.arange(9).flip(0)])]
ROTATION[0, -1] = 0  # the peers' condition rows


class Operation(NamedTuple):
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    shapes: list[tuple[int, ...]]


def plain_heads(qkv: Tensor) -> tuple[Tensor, ...]:
    qk, v = qkv.split([HEADS + KV_HEADS, KV_HEADS], dim=2)
    even, odd = qk.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = ROTATION[:, :, None].to(qkv.dtype).unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    return (*rotated.split([HEADS, KV_HEADS], dim=2), v)


OPERATIONS = {
    "rms_norm": Operation(
        lambda x, scale: memory_efficient.rms_norm(x, scale, 1e-5),
        lambda x, scale: F.rms_norm(x, [DIM], scale, 1e-5),
        [(BATCH, ROWS, DIM), (DIM,)],
    ),
    "gated_linear": Operation(
        memory_efficient.gated_linear,
        lambda gate, up, weight: F.linear(F.silu(gate) * up, weight),
        [(BATCH, ROWS, HIDDEN), (BATCH, ROWS, HIDDEN), (DIM, HIDDEN)],
    ),
    "gelu_linear": Operation(
        memory_efficient.gelu_linear,
        lambda x, weight, bias: F.linear(F.gelu(x), weight, bias),
        [(BATCH, ROWS, HIDDEN), (DIM, HIDDEN), (DIM,)],
    ),
    "rotate_heads": Operation(
        lambda qkv: rotate_heads(qkv, ROTATION, KV_HEADS), plain_heads, [(BATCH, ROWS, HEADS + 2 * KV_HEADS, HEAD_DIM)]
    ),
}


def outputs_and_gradients(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """Outputs and the inputs' gradients, for the same upstream gradients in whatever dtype."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*inputs)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator).to(torch.bfloat16).to(o.dtype) for o in outputs]
    torch.autograd.backward(outputs, upstream)
    return [*(o.detach() for o in outputs), *(tensor.grad for tensor in inputs if tensor.grad is not None)]


def distances(tensors: list[Tensor], exact: list[Tensor]) -> list[float]:
    assert len(tensors) == len(exact)
    return [float((f.double() - e).norm() / e.norm()) for f, e in zip(tensors, exact, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_an_operation_is_as_exact_as_its_composition(operation: Operation, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(torch.bfloat16).to(dtype) for shape in operation.shapes]
    exact = outputs_and_gradients(operation.plain, [tensor.double() for tensor in inputs])
    ours, plain = (distances(outputs_and_gradients(function, inputs), exact) for function in (operation.ours, operation.plain))
    rounding = torch.finfo(dtype).eps
    for mine, others in zip(ours, plain, strict=True):
        assert mine < 1.5 * others + rounding
        assert mine < 4 * rounding


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_an_operation_gives_gradients_to_those_who_want_them(operation: Operation) -> None:
    inputs = [torch.randn(shape) for shape in operation.shapes]
    for wanted in range(len(inputs)):
        leaves = [tensor.clone().requires_grad_(index == wanted) for index, tensor in enumerate(inputs)]
        out = operation.ours(*leaves)
        (out if isinstance(out, Tensor) else out[0]).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [index == wanted for index in range(len(inputs))]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_decoding_and_training_rotate_alike(dtype: torch.dtype) -> None:
    qkv = torch.randn(BATCH, ROWS, HEADS + 2 * KV_HEADS, HEAD_DIM).to(dtype)
    qk = qkv[:, :, :-KV_HEADS]
    rotated = torch.cat(rotate_heads(qkv, ROTATION, KV_HEADS)[:2], dim=2)
    torch.testing.assert_close(rotated, rotate(qk, ROTATION[:, :, None]), rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-6)
    assert torch.equal(rotated, rotate_(qk.to(torch.float32, copy=True), ROTATION[:, :, None]).to(dtype))


def kept_bytes(run: Callable[[], Any], known: list[Tensor]) -> int:
    """Bytes kept for the backward pass, besides tensors that exist anyway."""
    excluded, kept = {tensor.untyped_storage().data_ptr() for tensor in known}, {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    del out
    return sum(kept.values())


def test_a_block_keeps_next_to_nothing_between_products() -> None:
    """What a block keeps between matrix products is next to nothing."""
    x, y = (torch.randn(BATCH, ROWS, DIM).requires_grad_() for _ in range(2))
    gate, up = (torch.randn(BATCH, ROWS, HIDDEN).requires_grad_() for _ in range(2))
    weight, scale = torch.randn(DIM, HIDDEN).requires_grad_(), torch.randn(DIM).requires_grad_()
    numbers = BATCH * ROWS
    assert kept_bytes(lambda: memory_efficient.rms_norm(x, scale, 1e-5), [x, scale]) == 4 * numbers  # a scale a row
    assert kept_bytes(lambda: memory_efficient.gated_linear(gate, up, weight), [gate, up, weight]) == 0
    assert kept_bytes(lambda: memory_efficient.add_dropped(x, y, 0.1), [x, y]) <= 2 * DIM * numbers  # a byte each, and none of the draws
    assert kept_bytes(lambda: F.linear(F.silu(gate) * up, weight), [gate, up, weight]) == 2 * 4 * HIDDEN * numbers


@settings(max_examples=30, deadline=None)
@given(p=st.floats(0.01, 0.9), seed=st.integers(0, 2**31), shape=st.sampled_from([(401, 103), (2, 64, 300), (40_001,)]))
def test_dropout_keeps_the_share_it_should_and_scales_it(p: float, seed: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(seed)
    x, y = torch.randn(shape), torch.ones(shape, requires_grad=True)
    added = memory_efficient.add_dropped(x, y, p) - x
    kept = added > 0.5
    numbers = kept.numel()
    expected = round(p * 2**16) / 2**16
    for lane in range(4):  # four numbers share a random draw
        share = float(kept.flatten()[lane::4].float().mean())
        assert abs(share - (1 - expected)) < 6 * (expected * (1 - expected) / (numbers / 4)) ** 0.5
    torch.testing.assert_close(added, kept / (1 - expected), rtol=1e-4, atol=1e-5)
    added.sum().backward()
    assert y.grad is not None
    torch.testing.assert_close(y.grad, kept / (1 - expected))


def test_neighbours_are_dropped_independently() -> None:
    torch.manual_seed(0)
    kept = (memory_efficient.add_dropped(torch.zeros(2**18), torch.ones(2**18), 0.5) > 0).float()
    for distance in (1, 2, 3, 4):
        both = float((kept[:-distance] * kept[distance:]).mean())
        assert abs(both - 0.25) < 6 * (0.25 * 0.75 / 2**18) ** 0.5


def test_dropout_is_the_same_under_a_seed() -> None:
    x, y, added = torch.randn(5, 7), torch.randn(5, 7), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        added.append(memory_efficient.add_dropped(x, y, 0.3))
    assert torch.equal(added[0], added[1])
    assert not torch.equal(added[0], added[2])


@pytest.mark.parametrize("layout", ["raster", "instructed", "dual"])
def test_rows_the_last_block_leaves_out_change_nothing(layout: str) -> None:
    """Rows the last block does not finish are rows nobody needs."""
    model = small_model(layout=layout)
    codes, order, text = random_codes(model, 2), random_orders(model, 2), random_text(model, 2)
    if layout == "raster":
        order = torch.arange(model.spec.cells).expand_as(order)
    finishing = copy.deepcopy(model)
    last = finishing.layers[-1]
    plain = type(last).forward

    def finish_all(x: Tensor, rotation: Tensor, *, causal: bool, leaving: slice) -> Tensor:
        return plain(last, x, rotation, causal=causal)[:, leaving]

    last.forward = finish_all  # type: ignore[method-assign]
    losses = []
    for variant in (model, finishing):
        loss, _ = variant.loss(codes, order, variant.condition(text))
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    for (name, mine), other in zip(model.named_parameters(), finishing.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("numbers", [1, 3 * 13, 10**6])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_the_loss_in_chunks_is_cross_entropy(monkeypatch: pytest.MonkeyPatch, numbers: int, dtype: torch.dtype) -> None:
    monkeypatch.setitem(loss_module.CHUNK_NUMBERS, "cpu", numbers)
    torch.manual_seed(0)
    rows, weight, targets = torch.randn(10, 6).to(dtype), torch.randn(13, 6).to(dtype), torch.randint(13, (10,))
    result = outputs_and_gradients(lambda r, w: 3 * mean_nll(r, w, targets)[0], [rows, weight])
    exact = outputs_and_gradients(lambda r, w: 3 * F.cross_entropy(r @ w.t(), targets), [rows.double(), weight.double()])
    assert max(distances(result, exact)) < 4 * torch.finfo(dtype).eps
    with torch.no_grad():
        _, nll = mean_nll(rows, weight, targets)
    each = mean_nll(rows.requires_grad_(), weight, targets)[1]
    assert not each.requires_grad
    torch.testing.assert_close(each, nll)
    torch.testing.assert_close(each, F.cross_entropy((rows @ weight.t()).float(), targets, reduction="none").detach())


def test_a_second_backward_pass_of_the_loss_is_refused() -> None:
    rows = torch.randn(3, 4, requires_grad=True)
    loss, _ = mean_nll(rows, torch.randn(5, 4), torch.tensor([0, 1, 2]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 8, 63, 64, 65, 130])
def test_rows_of_zeros_behind_a_product_change_nothing(rows: int) -> None:
    layer, gated = Linear(24, 16).bfloat16(), GatedLinear(24, 16).bfloat16()
    x, gate = torch.randn(2, rows, 24).bfloat16(), torch.randn(2, rows, 24).bfloat16()
    torch.testing.assert_close(layer(x), x @ layer.weight.t(), rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(gated(gate, x), (torch.nn.functional.silu(gate) * x) @ gated.weight.t(), rtol=2e-2, atol=2e-3)
    shapes = {len(in_few_shapes(torch.zeros(count, 4, dtype=torch.bfloat16))) for count in range(1, 513)}
    assert len(shapes) == 15
    same = torch.zeros(65, 4)
    assert in_few_shapes(same) is same
