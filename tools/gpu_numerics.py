"""Does a GPU compute what a CPU computes? Small models with random weights, in every layout, on both; a part of gpu_smoke.py.

    python tools/gpu_numerics.py --device cuda

The reference is the CPU in float32, with the weights that the device has (in bfloat16: the rounded ones). For each model and dtype:

    logits        of whole images: root of the mean square error, over that of the logits themselves
    loss          difference of the training loss, nats per code
    gradients     the largest error of a parameter's gradient, over its norm
    scores        of exact orders that were found on the device, from its cache, against a whole pass of the CPU along the same orders: nats
    order         where an order parts from the CPU's, by how much the CPU's choice was better: nats
    drawing       greedy codes drawn on the device with guidance: by how much a more likely code was missed, by the CPU's logits

Limits in float32 are fixed, and lower than what TF32 would do. In bfloat16 they are three times what the CPU's own bfloat16 is off.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from oar_scale.generation.sampling import generate
from oar_scale.generation.settings import SampleSettings
from oar_scale.model import AnyOrderModel, ModelSpec
from oar_scale.model.layouts import LAYOUTS
from oar_scale.model.spec import ClassSpec
from oar_scale.orders.extraction import extract_orders, scores_along
from oar_scale.orders.settings import ExtractionSettings
from oar_scale.runtime.program import program

LIMITS = {"logits": 1e-4, "loss": 1e-4, "gradients": 1e-3, "scores": 1e-3, "order": 1e-3, "drawing": 1e-3}
"""In float32. Sums taken in another order are off by a tenth of that, TF32 by ten times as much."""
BF16, NEAR = 3.0, 20.0
CLASSES, GUIDANCE = 10, 2.0
SETTINGS = ExtractionSettings(score="gt_logprob")
TINY: dict[str, Any] = {"dim": 32, "layers": 2, "heads": 2, "ffn_hidden": 64, "vocab_size": 64, "grid": 2}
SMALL: dict[str, Any] = {"dim": 256, "layers": 2, "heads": 4, "ffn_hidden": 768, "vocab_size": 1024, "grid": 6}


class Images(NamedTuple):
    """What both sides compute with."""

    codes_BN: Tensor
    order_BN: Tensor
    labels_B1: Tensor

    def to(self, device: str) -> Images:
        return Images(*(each.to(device) for each in self))


class Seen(NamedTuple):
    """What one side computed, brought to the CPU. Raster models have no order to be found."""

    logits_BNV: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]
    found_BN: Tensor | None
    score_BN: Tensor | None
    drawn_BN: Tensor


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.side:
        print(json.dumps(side(sys.argv[1:])))
        return
    for case, dtype, name, error, limit in compared(arguments.device, tiny=arguments.tiny)["rows"]:
        print(f"{case:28} {dtype:9} {name:10} {error:9.2e} of {limit:9.2e}{'   DIFFERS' if error > limit else ''}")


def side(argv: Sequence[str]) -> dict[str, Any]:
    """What ``--side`` prints."""
    arguments = _parser().parse_args(argv)
    return compared(arguments.device, tiny=arguments.tiny)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    return parser


def compared(device: str, *, tiny: bool) -> dict[str, Any]:
    """Errors and their limits, [case, dtype, name, error, limit] each, and those that are above in words."""
    rows = []
    for case, changes in cases(tiny).items():
        spec = ModelSpec(**{**(TINY if tiny else SMALL), "condition": ClassSpec(classes=CLASSES), **changes})
        model, images = _model(spec), _images(spec, 2 if tiny else 4)
        rounded = _as(model, torch.bfloat16).float()
        for dtype, reference in ((torch.float32, model), (torch.bfloat16, rounded)):
            expected = observe(reference, images, "cpu")
            errors = errors_of(observe(_as(model, dtype), images, device), expected, reference, images)
            limits = LIMITS
            if dtype == torch.bfloat16:
                own = errors_of(observe(_as(model, dtype), images, "cpu"), expected, reference, images)
                # Where one choice is as good as another, own errors say little: a choice may be worse by what the logits are off.
                near = NEAR * own["logits"]
                limits = {name: max(BF16 * own[name], near if name in ("order", "drawing") else LIMITS[name]) for name in own}
            rows += [[case, str(dtype).removeprefix("torch."), name, error, limits[name]] for name, error in errors.items()]
    above = [f"{case}, {dtype}: {name} {error:.2e}, limit {limit:.2e}" for case, dtype, name, error, limit in rows if not error <= limit]
    return {"rows": rows, "differs": above}


def cases(tiny: bool) -> dict[str, dict[str, Any]]:
    """All layouts; grouped queries; heads of a width that the GPU's attention has to fill up."""
    wide = {"dim": 24, "heads": 2} if tiny else {"dim": 400, "heads": 4}
    layouts: dict[str, dict[str, Any]] = {layout: {"layout": layout} for layout in LAYOUTS}
    return {**layouts, "instructed, grouped queries": {"kv_heads": 1}, f"instructed, heads of {wide['dim'] // wide['heads']}": wide}


def observe(model: AnyOrderModel, images: Images, device: str) -> Seen:
    """One side: a training pass without dropout, an extraction, a drawing. The model is moved."""
    model = model.to(device)
    codes_BN, order_BN, labels_B1 = images.to(device)
    loss, _ = model.loss(codes_BN, order_BN, model.condition(labels_B1))
    loss.backward()
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        condition_BTD = model.condition(labels_B1)
        logits_BNV = model(codes_BN, order_BN, condition_BTD).float().cpu()
        found = extract_orders(model, codes_BN, condition_BTD, SETTINGS) if model.spec.layout != "raster" else None
        greedy = SampleSettings(guidance=GUIDANCE, temperature=1.0, top_k=1, order_temperature=0.0)
        drawn_BN = generate(model, condition_BTD, greedy, 0, order_BN=order_BN).codes_BN.cpu()
    model.zero_grad()
    found_BN, score_BN = (found.order_BN.cpu(), found.score_BN.cpu()) if found else (None, None)
    return Seen(logits_BNV, loss.detach().float().cpu(), gradients, found_BN, score_BN, drawn_BN)


@torch.no_grad()
def errors_of(seen: Seen, expected: Seen, reference: AnyOrderModel, images: Images) -> dict[str, float]:
    """What the module's docstring lists."""
    norm = float(torch.stack([each.norm() for each in expected.gradients.values()]).norm())
    errors = {
        "logits": float((seen.logits_BNV - expected.logits_BNV).norm() / expected.logits_BNV.norm()),
        "loss": float((seen.loss - expected.loss).abs()),
        # Gradients that are all but zero (of a condition's last rows, for instance) are compared with the whole gradient.
        "gradients": max(
            float((seen.gradients[name] - gradient).norm()) / max(float(gradient.norm()), 1e-3 * norm)
            for name, gradient in expected.gradients.items()
        ),
    }
    condition_BTD = reference.condition(images.labels_B1)
    if seen.found_BN is not None and seen.score_BN is not None:
        assert expected.found_BN is not None and expected.score_BN is not None
        along_BN = scores_along(reference, images.codes_BN, condition_BTD, SETTINGS, seen.found_BN)
        errors["scores"] = float((seen.score_BN - along_BN).abs().max())
        # Until the first difference both orders have the same prefix, so there the scores of both choices can be compared.
        differs_BN = seen.found_BN != expected.found_BN
        first_B1 = differs_BN.int().argmax(1, keepdim=True)
        better_B1 = (expected.score_BN - along_BN).gather(1, first_B1).masked_fill(~differs_BN.any(1, keepdim=True), 0.0)
        errors["order"] = float(better_B1.clamp_min(0.0).max())
    null_BTD = reference.null_condition(len(condition_BTD)).to(condition_BTD)
    conditional_BNV, null_BNV = (reference(seen.drawn_BN, images.order_BN, each).float() for each in (condition_BTD, null_BTD))
    guided_BNV = torch.lerp(null_BNV, conditional_BNV, GUIDANCE)
    chosen_BN1 = seen.drawn_BN.gather(1, images.order_BN)[..., None]
    errors["drawing"] = float((guided_BNV.amax(2, keepdim=True) - guided_BNV.gather(2, chosen_BN1)).max())
    return errors


def _model(spec: ModelSpec) -> AnyOrderModel:
    """Random weights, head included, with logits about as wide as 1."""
    torch.manual_seed(0)
    model = AnyOrderModel(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, spec.dim**-0.5)
    return model.eval()


def _as(model: AnyOrderModel, dtype: torch.dtype) -> AnyOrderModel:
    """A copy in another dtype."""
    made = AnyOrderModel(model.spec).eval().to(dtype)
    made.load_state_dict(model.state_dict())
    return made


def _images(spec: ModelSpec, count: int) -> Images:
    order_BN = torch.rand(count, spec.cells).argsort(1) if spec.layout != "raster" else torch.arange(spec.cells).expand(count, -1)
    return Images(torch.randint(spec.vocab_size, (count, spec.cells)), order_BN.contiguous(), torch.randint(CLASSES, (count, 1)))


if __name__ == "__main__":
    program(main)
