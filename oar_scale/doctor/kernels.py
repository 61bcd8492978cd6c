"""The kernels that a model would run here: each is run once, recorded by name, and compared with the plain computation."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from oar_scale.doctor.finding import INSTALL, Finding
from oar_scale.doctor.machine import device
from oar_scale.errors import error_line

if TYPE_CHECKING:
    import torch

    from oar_scale.config.schema import Recipe

TOLERANCE = {"bf16": 0.05, "fp32": 0.01}
"""Largest difference that rounding (TF32 included) explains between two attentions over values of unit variance."""
SLOW_S = 0.02
"""A product of matrices of 256 rows that takes longer is below 2 GFLOP/s."""
BACKENDS = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cuDNN": "CUDNN_ATTENTION", "math": "MATH"}
OPERATORS = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": "CPU flash",
    "aten::_scaled_dot_product_flash_attention": "flash",
    "aten::_scaled_dot_product_efficient_attention": "efficient",
    "aten::_scaled_dot_product_cudnn_attention": "cuDNN",
}


class AttentionShape(NamedTuple):
    """Attention of a model: B images, heads of queries and of keys, L rows, width of a head."""

    batch: int
    heads: int
    kv_heads: int
    rows: int
    head_dim: int


DEFAULT_SHAPE = AttentionShape(batch=2, heads=4, kv_heads=4, rows=128, head_dim=64)


def shape_of(recipe: Recipe) -> AttentionShape:
    """The shape of a recipe's model, for two images and without the rows of a caption."""
    model = recipe.model
    return AttentionShape(2, model.heads, model.kv_heads or model.heads, 2 * recipe.grid**2, model.dim // model.heads)


def attention(shape: AttentionShape) -> Iterator[Finding]:
    """The kernel that ``scaled_dot_product_attention`` takes, forward and backward, and which others take these inputs."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for precision, dtype in _precisions().items():
        q, k, v = (tensor.requires_grad_() for tensor in _qkv(shape, dtype))
        mask = torch.ones(shape.rows, shape.rows, dtype=torch.bool, device=q.device).tril()
        call = partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=shape.heads != shape.kv_heads)
        causal, masked = partial(call, is_causal=True), partial(call, attn_mask=mask)
        runs = []
        for name, backend in BACKENDS.items():
            with sdpa_kernel(getattr(SDPBackend, backend)):
                if _works(causal):
                    runs.append(name)
        with sdpa_kernel(SDPBackend.MATH):
            plain = causal()
        chosen = _kernel(causal)
        error = _difference(causal(), plain)
        text = f"causal {chosen}, with a mask {_kernel(masked)}; runs here: {', '.join(runs)}"
        yield _judged("attention", precision, text, chosen, error)


def decoding_attention(shape: AttentionShape) -> Iterator[Finding]:
    """The model's own attention of candidates to a prefix, which calls a fused kernel by its name."""
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from oar_scale.model.attention import attention_with_lse

    for precision, dtype in _precisions().items():
        q, k, v = _qkv(shape, dtype)
        chosen = _kernel(partial(attention_with_lse, q, k, v))
        with sdpa_kernel(SDPBackend.MATH):
            plain = F.scaled_dot_product_attention(q, k, v, enable_gqa=shape.heads != shape.kv_heads)
        yield _judged("decoding attention", precision, chosen, chosen, _difference(attention_with_lse(q, k, v)[0], plain))


def _judged(item: str, precision: str, text: str, chosen: str, error: float) -> Finding:
    item, text = f"{item} {precision}", f"{text}; differs from math by {error:.1g}"
    if not error <= TOLERANCE[precision]:  # also where it is not a number
        return Finding("FAIL", item, f"{text}, more than rounding explains; {INSTALL}, or change the driver")
    if chosen == "math":
        return Finding("warn", item, f"{text}: slow; heads 64 or 128 wide (model.dim / model.heads) have a fused kernel on most devices")
    return Finding("ok", item, text)


def _precisions() -> dict[str, torch.dtype]:
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}


def _qkv(shape: AttentionShape, dtype: torch.dtype) -> list[torch.Tensor]:
    """Seeded queries, keys and values [B, heads, L, head_dim] on the device."""
    import torch

    generator = torch.Generator().manual_seed(0)
    sizes = [(shape.batch, heads, shape.rows, shape.head_dim) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
    return [torch.randn(size, generator=generator).to(device(), dtype) for size in sizes]


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference, in float32."""
    return float((a.float() - b.float()).abs().max().detach())


def _works(call: Callable[[], object]) -> bool:
    """Whether a kernel accepts its inputs; torch's warnings about the reasons why not are suppressed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except RuntimeError:
            return False
    return True


def _kernel(call: Callable[[], object]) -> str:
    """Name of the attention kernel that a call runs, backward pass included where inputs need gradients, from the operators dispatched."""
    import torch
    from torch._ops import OpOverload
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: OpOverload, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
        ) -> object:
            seen.add(func.name())
            return func(*args, **(kwargs or {}))

    with Recorder():  # type: ignore[no-untyped-call]
        out = call()
        if isinstance(out, torch.Tensor) and out.requires_grad:
            out.float().square().mean().backward()
    return next((shown for operator, shown in OPERATORS.items() if operator in seen), "math")


def bf16_matmul() -> Iterator[Finding]:
    """Speed of a square matrix product in bfloat16 against float32."""
    import torch

    target = device()
    if target.type == "cuda":
        native = "native" if torch.cuda.is_bf16_supported(including_emulation=False) else "emulated"
    else:
        has = torch.cpu.get_capabilities()
        native = "native AMX" if has.get("amx_bf16") else "native AVX512-bf16" if has.get("avx512_bf16") else "emulated"
    rates = {precision: _matmul_rate(dtype) for precision, dtype in _precisions().items()}
    speedup = rates["bf16"] / rates["fp32"]
    tflops = ", ".join(f"{precision} {rate / 1e12:.2g}" for precision, rate in rates.items())
    text = f"{speedup:.2g} x the speed of fp32 ({native}; {tflops} TFLOP/s)"
    if speedup < 0.9:
        yield Finding("warn", "bf16 matmul", f"{text}; try parallel.precision: fp32, which may train faster here")
    else:
        yield Finding("ok", "bf16 matmul", text)


def _matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of the best of four products of square matrices; large ones, unless small ones take so long that nobody need wait for more."""
    import torch

    for size in (256, 1024):
        a = torch.randn(size, size, device=device()).to(dtype)
        seconds = min(_seconds(partial(torch.matmul, a, a)) for _ in range(4))
        if seconds > SLOW_S:
            break
    return 2 * size**3 / seconds


def _seconds(call: Callable[[], object]) -> float:
    import torch

    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def fused_adamw() -> Iterator[Finding]:
    """One step of the optimizer in one kernel."""
    import torch

    target = device()
    weight = torch.nn.Parameter(torch.ones(8, device=target))
    weight.grad = torch.ones_like(weight)
    try:
        torch.optim.AdamW([weight], lr=0.1, fused=True).step()
    except RuntimeError as error:
        yield Finding("warn", "fused AdamW", f"not on {target.type} ({error_line(error)}), so steps are slower; {INSTALL}")
        return
    if bool((weight < 1).all()):
        yield Finding("ok", "fused AdamW", f"works on {target.type}")
    else:
        yield Finding("FAIL", "fused AdamW", f"changed no weight on {target.type}; {INSTALL}")
