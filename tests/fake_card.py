"""A graphics card where there is none: tensors that say they are on "cuda", computed on the CPU, and a record of what is asked of the card.

    with fake_card() as card:
        model = on_card(small_model())            the same weights, on "cuda:0"
        model.loss(codes.to("cuda"), ...)
    card.mixed, card.syncs, card.kernels, card.products

The code under test takes the branches that it takes on a GPU: it asks tensors for their device, and calls the GPU's attention kernels, in
whose place the CPU's one computes here. So results are numbers, to be compared with those of a CPU; torch's ``FakeTensorMode`` has shapes
alone, with which nothing can go on where a number decides how. What cannot be seen is how a real kernel rounds and how long it takes:
``tools/gpu_smoke.py`` is for that.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, TypeVar

import pytest
import torch
import torch.nn.functional as F
from tape import Tapes
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from oar_scale.model import steps

M = TypeVar("M", bound=nn.Module)
aten = torch.ops.aten
CARD, INSIDE, CPU = torch.device("cuda:0"), torch.device("meta"), torch.device("cpu")
ON_CPU = aten._scaled_dot_product_flash_attention_for_cpu
NO_KERNEL = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten._unsafe_view.default,
}
NO_KERNEL |= {aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten.new_empty_strided.default, aten._reshape_alias.default}
COUNTING = {aten.nonzero.default, aten.masked_select.default, aten.equal.default, aten.repeat_interleave.Tensor, aten.is_nonzero.default}
"""The host waits for these, since it needs the number of their results, or the result itself."""
PRODUCTS = {aten.mm.default, aten.mm.out, aten.addmm.default, aten.addmm_.default, aten.bmm.default, aten.convolution.default}
PRODUCTS |= {aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default}


class OnCard(Tensor):
    """A tensor on the card, made of the one on the CPU that has its numbers."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> OnCard:
        # Autograd would look for a driver if it saw a GPU's tensor; for torch's inside it is one without memory.
        options: dict[str, Any] = {"strides": numbers.stride(), "dtype": numbers.dtype, "device": INSIDE}
        tensor: OnCard = torch.Tensor._make_wrapper_subclass(cls, numbers.shape, **options)  # type: ignore[attr-defined]
        tensor.numbers = numbers
        return tensor

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CARD

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def __repr__(self, **_options: object) -> str:  # type: ignore[override]
        return f"OnCard({self.numbers})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {}, True)


class Sync(NamedTuple):
    """Something that makes the host wait for the card, and the line of the package that asks for it."""

    what: str
    where: str


class FakeCard(TorchDispatchMode):
    """The record. As a mode it also takes what has no tensor among its arguments, as ``torch.zeros(..., device="cuda")``."""

    def __init__(self) -> None:
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE  # so that torch does not look for a driver
        self.tapes = Tapes()
        """What stands for CUDA graphs."""
        self.forget()

    def forget(self) -> None:
        """Begin the record anew, when what is not looked at has been made."""
        self.mixed: list[str] = []
        """Operations on tensors of both devices, other than copies."""
        self.syncs: Counter[Sync] = Counter()
        self.kernels = 0
        """Operations that a card would do; views and fresh memory are none."""
        self.products: Counter[torch.dtype] = Counter()
        """Matrix products, convolutions and attentions by the type of their numbers."""
        self.doubles: Counter[str] = Counter()
        """Lines that compute in float64, which most cards do at a small part of their speed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors((args, *kwargs.values()))
        card = [tensor for tensor in tensors if isinstance(tensor, OnCard)]
        if not card and not _is_card(kwargs.get("device") or CPU):
            return func(*args, **kwargs)
        self._before(func, args, kwargs, card, len(card) < len(tensors) and any(t.ndim for t in tensors if not isinstance(t, OnCard)))
        out = _compute(func, args, kwargs, bool(card))
        if func.is_view or func in NO_KERNEL or _stays(func, args, kwargs):
            return out
        made = [tensor for tensor in _tensors((out,)) if isinstance(tensor, OnCard)]
        if made:
            self.kernels += 1
            if any(tensor.dtype == torch.float64 for tensor in made):
                self.doubles[_line()] += 1
        return out

    def _before(self, func: Any, args: Any, kwargs: Any, card: list[OnCard], host: bool) -> None:
        if func is aten._to_copy.default:
            if kwargs.get("device") is not None:
                self._sync(bool(card) != _is_card(kwargs["device"]), "copy from the card" if card else "copy to the card")
        elif func is aten.copy_.default:
            self._sync(bool(card) and host, "copy to the card" if isinstance(args[0], OnCard) else "copy from the card")
        elif card and host:
            self.mixed.append(f"{func.name()} in {_line()}")
        if not card:
            return
        self._sync(func is aten._local_scalar_dense.default, "item")
        self._sync(func in COUNTING, str(func.name()))
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            self._sync(any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]), "index with a mask")
        if func in PRODUCTS:
            self.products[args[0].dtype] += 1

    def _sync(self, happens: bool, what: str) -> None:
        if happens:
            self.syncs[Sync(what, _line())] += 1


class _Choice(TorchFunctionMode):
    """What chooses a kernel by the device inside of torch: attention, dropout and norms."""

    def __init__(self, card: FakeCard) -> None:
        super().__init__()
        self.card = card

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and isinstance(args[0], OnCard):
            return _chosen_attention(*args, **kwargs)
        if func is F.dropout and isinstance(args[0], OnCard):
            return _chosen_dropout(*args, **kwargs)
        if func is F.rms_norm and isinstance(args[0], OnCard):
            return _ChosenNorm.apply(self.card, args[0], kwargs["weight"], kwargs["eps"])
        if func is Tensor.to:  # it would ask a driver which card is meant
            args = [args[0], *(_which(each) for each in args[1:])]
            kwargs = {name: _which(each) for name, each in kwargs.items()}
        return func(*args, **kwargs)


@contextmanager
def fake_card() -> Iterator[FakeCard]:
    """While the block lasts there is a card, ``cuda:0``; gives the record of what it is asked to do."""
    overwrites, lifts = torch.__future__.get_overwrite_module_params_on_conversion(), torch._C._only_lift_cpu_tensors()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # module.to("cuda") makes new parameters of other tensors
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") makes one of the CPU and copies it, which is seen here
    try:
        with pytest.MonkeyPatch.context() as patch, FakeCard() as card, _Choice(card):
            patch.setitem(steps.RECORDERS, "cuda", lambda: card.tapes)
            yield card
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
        torch._C._set_only_lift_cpu_tensors(lifts)


def on_card(module: M) -> M:
    """A copy of a module with the same weights, on the card."""
    return copy.deepcopy(module).to("cuda")


def numbers(tensor: Tensor | None) -> Tensor:
    """The numbers of a tensor that must be on the card, for a test to look at; not counted as a copy."""
    assert isinstance(tensor, OnCard), f"not on the card: {type(tensor)}"
    return tensor.numbers


def _line() -> str:
    """The innermost line of the package on the stack."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/oar_scale/" in name and "/tests/" not in name:
            return f"{name.rpartition('/oar_scale/')[2]} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "outside"


# -- computing -------------------------------------------------------------------------------------------------------------------


def _which(value: Any) -> Any:
    return CARD if isinstance(value, str | torch.device) and str(value) == CARD.type else value


def _is_card(device: torch.device | str) -> bool:
    return torch.device(device).type in (CARD.type, INSIDE.type)


def _stays(func: Any, args: Any, kwargs: Any) -> bool:
    """A conversion to what the tensor is already, which torch would not begin on a real card."""
    wanted = kwargs.get("dtype")
    return (
        func is aten._to_copy.default
        and kwargs.get("device") is not None
        and isinstance(args[0], OnCard)
        and wanted in (None, args[0].dtype)
    )


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among an operation's arguments, lists of them included."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    return type(value)(_mapped(change, each) for each in value) if isinstance(value, list | tuple) else change(value)


def _numbers(value: Any) -> Any:
    return value.numbers if isinstance(value, OnCard) else value


def _on_card(value: Any) -> Any:
    return OnCard(value) if isinstance(value, Tensor) else value


def _compute(func: Any, args: Any, kwargs: Any, at_card: bool) -> Any:
    if kwargs.get("device") is not None:
        at_card = _is_card(kwargs["device"])
        kwargs = {**kwargs, "device": CPU}
    elif func is aten.copy_.default:
        at_card = isinstance(args[0], OnCard)
    plain = [_mapped(_numbers, each) for each in args]
    out = KERNELS.get(func, func)(*plain, **{name: _mapped(_numbers, each) for name, each in kwargs.items()})
    if func is aten._to_copy.default and out is plain[0]:
        out = out.clone()
    return _written(func, args, kwargs, _mapped(_on_card, out) if at_card else out)


def _written(func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """The result; where an operation returns what it has written to, the tensor that it was given."""
    outs = [args[at] if at < len(args) else kwargs.get(name) for at, name in _targets(func)]
    if not outs:
        return out
    return outs[0] if len(func._schema.returns) == 1 else tuple(outs)


@cache
def _targets(func: Any) -> list[tuple[int, str]]:
    """Place and name of the arguments that an operation writes to and returns."""

    def writes(each: Any) -> bool:
        return each.alias_info is not None and each.alias_info.is_write

    if not any(writes(each) for each in func._schema.returns):
        return []
    return [(at, each.name) for at, each in enumerate(func._schema.arguments) if writes(each)]


def _chosen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash attention in half precision without a mask, otherwise the memory-efficient kernel; both filled up to 8 channels."""
    width, half = q.shape[-1], q.dtype != torch.float32
    scale = width**-0.5 if scale is None else scale
    if any(each.numbers.stride(-1) != 1 for each in (q, k, v) if isinstance(each, OnCard)):  # no fused kernel takes them
        return aten._scaled_dot_product_attention_math(q, k, v, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)[0]
    if missing := -width % 8:
        q, k, v = (F.pad(each, (0, missing)) for each in (q, k, v))
    if attn_mask is None and half and width <= 256:
        out = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0]
    else:
        if enable_gqa:  # this kernel takes as many heads of keys as of queries
            k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
        bias = None
        if attn_mask is not None:
            added = torch.where(attn_mask, 0.0, -torch.inf).to(q.dtype) if attn_mask.dtype == torch.bool else attn_mask
            _must(added.dtype == q.dtype, f"a mask of {added.dtype} for queries of {q.dtype}")
            bias = added.expand(*q.shape[:3], k.shape[2])
        out = aten._scaled_dot_product_efficient_attention(q, k, v, bias, torch.is_grad_enabled(), 0.0, is_causal, scale=scale)[0]
    return out[..., :width]


def _chosen_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p else x


def _flash(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, debug: bool = False, *, scale: float | None = None
) -> Any:
    _must(q.dtype in (torch.bfloat16, torch.float16), f"flash attention of {q.dtype}: it takes half precision")
    _must(q.shape[-1] % 8 == 0 and q.shape[-1] <= 256, f"flash attention of heads of {q.shape[-1]} channels: a multiple of 8 up to 256")
    _dense(q, k, v)
    out, lse = ON_CPU(q, *_repeated(q, k, v), 0.0, causal, scale=scale)
    seeds = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
    return out, lse.float(), None, None, q.shape[2], k.shape[2], *seeds, q.new_empty(0)


def _flash_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any, scale: float | None = None
) -> Any:
    causal = rest[5]  # behind the lengths of ragged batches and the dropout
    d_q, d_k, d_v = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        d_out, q, *_repeated(q, k, v), out, lse, 0.0, causal, scale=scale
    )
    return d_q, *(each.unflatten(1, (k.shape[1], -1)).sum(2) for each in (d_k, d_v))


def _efficient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    with_lse: bool,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    _must(q.shape[1] == k.shape[1], "this kernel takes as many heads of keys as of queries")
    _must(q.shape[-1] * q.element_size() % 16 == 0, f"this kernel takes heads of a multiple of 16 bytes, not {q.shape[-1]} of {q.dtype}")
    _dense(q, k, v)
    out, lse = ON_CPU(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    lse = F.pad(lse.float(), (0, -q.shape[2] % 32)) if with_lse else lse.new_empty(0)  # the card's kernel fills up to 32 queries
    return out, lse, torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)


def _efficient_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, *rest: Any, scale: float | None = None
) -> Any:
    causal = rest[4] if len(rest) > 4 else False  # behind the state of the dropout and the gradients that are wanted
    lse = lse[..., : q.shape[2]].contiguous()
    return *aten._scaled_dot_product_flash_attention_for_cpu_backward(
        d_out, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
    ), None


def _repeated(q: Tensor, *key_values: Tensor) -> Iterator[Tensor]:
    return (each.repeat_interleave(q.shape[1] // each.shape[1], dim=1) for each in key_values)


class _ChosenNorm(torch.autograd.Function):
    """One kernel, and one back. For other devices torch takes these operations apart before any mode sees them."""

    @staticmethod
    def forward(ctx: Any, card: FakeCard, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        shape = list(weight.shape)
        out, scale = card.__torch_dispatch__(aten._fused_rms_norm.default, (), (x, shape, weight, eps))
        ctx.card, ctx.inputs = card, (x, shape, scale, weight, [True, True])
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        return None, *ctx.card.__torch_dispatch__(aten._fused_rms_norm_backward.default, (), (d_out, *ctx.inputs)), None


def _rms_norm(x: Tensor, shape: list[int], weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    scale = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    return (x.float() * scale * weight.float()).to(x.dtype), scale


def _rms_norm_backward(d_out: Tensor, x: Tensor, shape: list[int], scale: Tensor, weight: Tensor, wanted: list[bool]) -> Any:
    normed, d_out_32 = x.float() * scale, d_out.float()
    d_normed = d_out_32 * weight.float()
    d_x = scale * (d_normed - normed * (d_normed * normed).mean(-1, keepdim=True))
    return d_x.to(x.dtype), (d_out_32 * normed).flatten(0, -2).sum(0).to(weight.dtype)


def _dense(*heads: Tensor) -> None:
    _must(all(each.stride(-1) == 1 for each in heads), "the attention kernels take heads whose channels lie side by side")


def _must(holds: bool, why: str) -> None:
    if not holds:
        raise RuntimeError(why)


KERNELS: dict[Any, Callable[..., Any]] = {
    aten._scaled_dot_product_flash_attention.default: _flash,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_efficient_attention.default: _efficient,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    aten._fused_rms_norm.default: _rms_norm,
    aten._fused_rms_norm_backward.default: _rms_norm_backward,
    aten._conj.default: aten.conj_physical.default,  # below the dispatcher's key for them, views of conjugates would be read as they lie
    aten._neg_view.default: aten.neg.default,
}
"""What has no kernel on the CPU, or another one."""
