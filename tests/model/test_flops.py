"""The formulas against what torch counts while the real model runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import random_codes, random_orders, small_model, small_spec
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from oar_scale.config.loading import load_recipe
from oar_scale.generation.sampling import generate
from oar_scale.generation.settings import SampleSettings
from oar_scale.model import AnyOrderModel, ModelSpec
from oar_scale.model.flops import (
    brute_force_flops,
    drawing_steps,
    extraction_flops,
    forward_flops,
    look_ahead_flops,
    training_flops,
    useful_flops,
)
from oar_scale.model.spec import ClassSpec, FeatureSpec, TextSpec
from oar_scale.orders.extraction import brute_force_orders, extract_orders
from oar_scale.orders.settings import ExtractionSettings
from oar_scale.orders.step_sizes import cells_per_step, step_sizes
from oar_scale.planning.shape import parameters

IMAGES = 2
ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "model.md").read_text(encoding="utf-8")
CONDITIONS = {
    "class": ClassSpec(classes=5),
    "text": TextSpec(vocab=11, rows=4, encoder_layers=2),
    "features": FeatureSpec(width=24, rows=3),
}
SPECS = {
    **{
        f"{layout}-{name}": small_spec(layout=layout, condition=c)
        for layout in ("raster", "instructed", "dual", "decoupled", "grouped")
        for name, c in CONDITIONS.items()
    },
    "grouped": small_spec(heads=4, kv_heads=2),
    "decoupled-grouped": small_spec(layout="decoupled", heads=4, kv_heads=2),
    "grouped-grouped": small_spec(layout="grouped", heads=4, kv_heads=2),
    "frozen-null": small_spec(layout="raster", condition=CONDITIONS["features"], trainable_null=False),
}
SIZE_L = ModelSpec(dim=1024, layers=24, heads=16, ffn_hidden=2816, vocab_size=16384, grid=16, condition=ClassSpec(classes=1000))
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
ANY_ORDER = ["instructed", "dual", "decoupled", "grouped"]


def crossed(name: str) -> bool:
    """A layout with a condition that another layout has, too; conditions know nothing of layouts, only a class makes a start blind."""
    layout, _, condition = name.partition("-")
    return condition in ("class", "features") and layout != "instructed" and name != "decoupled-class"


def specs(layouts: Sequence[str]) -> pytest.MarkDecorator:
    """The specs of these layouts, for what takes long."""
    of_them = [(name, spec) for name, spec in SPECS.items() if spec.layout in layouts]
    return pytest.mark.parametrize(
        "spec", [pytest.param(spec, id=name, marks=[pytest.mark.slow] if crossed(name) else []) for name, spec in of_them]
    )


def hows(of_all: list[dict[str, Any]], of_one: list[dict[str, Any]], layouts: Sequence[str] = ANY_ORDER) -> pytest.MarkDecorator:
    """Settings for all layouts, and others that are in the daily tests for layout instructed alone."""
    daily = [pytest.param(layout, how) for layout in layouts for how in of_all + (of_one if layout == "instructed" else [])]
    rest = [pytest.param(layout, how, marks=pytest.mark.slow) for layout in layouts if layout != "instructed" for how in of_one]
    return pytest.mark.parametrize(("layout", "how"), daily + rest)


def addmm_flops(_out: Any, a_shape: Any, b_shape: Any, *_rest: Any, **_named: Any) -> int:
    return 2 * int(a_shape[0]) * int(a_shape[1]) * int(b_shape[1])


def counted(run: Callable[[], object]) -> int:
    """Operations that torch sees; it does not know the in-place form of a product that is added, which the loss uses."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops}) as counter:
        run()
    return int(counter.get_total_flops())


def batch(model: AnyOrderModel, images: int = IMAGES) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, orders and condition inputs."""
    kind, order_BN = model.spec.condition, random_orders(model, images)
    if model.spec.layout == "raster":
        order_BN = torch.arange(model.spec.cells).expand_as(order_BN)
    inputs = torch.ones(images, kind.rows, dtype=torch.long)
    return random_codes(model, images), order_BN, torch.ones(images, kind.rows, kind.width) if isinstance(kind, FeatureSpec) else inputs


@each_spec
def test_the_forward_formula_counts_what_torch_counts(spec: ModelSpec) -> None:
    model = AnyOrderModel(spec)
    codes_BN, order_BN, inputs = batch(model)
    with torch.no_grad():
        assert counted(lambda: model(codes_BN, order_BN, model.condition(inputs))) == IMAGES * forward_flops(spec)
        assert counted(lambda: model.nll(codes_BN, order_BN, model.condition(inputs))) == IMAGES * forward_flops(spec)


@each_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_training_formula_counts_what_torch_counts(spec: ModelSpec, dtype: torch.dtype) -> None:
    model = AnyOrderModel(spec).to(dtype)
    codes_BN, order_BN, inputs = batch(model)
    operations = counted(lambda: model.loss(codes_BN, order_BN, model.condition(inputs))[0].backward())
    assert operations == IMAGES * training_flops(spec)


@specs(["raster", *ANY_ORDER])
def test_recomputed_blocks_cost_one_more_trunk_forward(spec: ModelSpec) -> None:
    """Recomputed blocks cost one more forward pass of the trunk."""
    model = AnyOrderModel(spec)
    for layer in model.layers:
        plain = layer.forward
        layer.forward = lambda *args, plain=plain, **named: checkpoint(plain, *args, use_reentrant=False, **named)  # type: ignore[method-assign]
    codes_BN, order_BN, inputs = batch(model)
    with set_checkpoint_early_stop(False):
        operations = counted(lambda: model.loss(codes_BN, order_BN, model.condition(inputs))[0].backward())
    assert operations == IMAGES * training_flops(spec, recompute=True)


@specs(ANY_ORDER)
def test_the_extraction_formula_counts_what_torch_counts(spec: ModelSpec) -> None:
    model = AnyOrderModel(spec).eval()
    codes_BN, _, inputs = batch(model)
    with torch.no_grad():
        operations = counted(lambda: extract_orders(model, codes_BN, model.condition(inputs), ExtractionSettings()))
    assert operations == IMAGES * extraction_flops(spec)


@pytest.mark.parametrize("layout", ["instructed", "dual", "decoupled", "grouped"])
def test_guided_extraction_takes_both_branches(layout: str) -> None:
    model = small_model(layout=layout)
    codes_BN, _, inputs = batch(model)
    with torch.no_grad():
        operations = counted(lambda: extract_orders(model, codes_BN, model.condition(inputs), ExtractionSettings(guidance=2.0)))
    assert operations == IMAGES * extraction_flops(model.spec, guided=True)


@hows(
    [{"commit_per_step": 5, "first_cell": "random"}, {"commit_per_step": 3, "guidance": 2.0}],
    [{"first_cell": 3}, {"commit_per_step": 4}, {"cosine_steps": 5}],
)
def test_steps_that_place_several_cells_cost_what_torch_counts(how: dict[str, Any], layout: str) -> None:
    model, settings = small_model(layout=layout), ExtractionSettings(**how)
    codes_BN, _, inputs = batch(model)
    with torch.no_grad():
        operations = counted(lambda: extract_orders(model, codes_BN, model.condition(inputs), settings))
    cells, given = model.spec.cells, settings.first_cell != "free"
    guided, sizes = settings.guidance != 1, step_sizes(settings, cells)
    assert operations == IMAGES * extraction_flops(model.spec, guided=guided, sizes=sizes, first_given=given)


@pytest.mark.parametrize("name", ["instructed-text", "dual-class", "decoupled-text", "grouped-class"])
@pytest.mark.parametrize("how", [{}, {"guidance": 2.0}, {"commit_per_step": 4, "first_cell": 3}])
def test_brute_force_costs_what_torch_counts(how: dict[str, Any], name: str) -> None:
    """The output head sees the candidates' rows alone, not those before them."""
    model, settings = AnyOrderModel(SPECS[name]).eval(), ExtractionSettings(**how)
    codes_BN, _, inputs = batch(model)
    with torch.no_grad():
        condition_BTD = model.condition(inputs)
        operations = counted(lambda: brute_force_orders(model, codes_BN, condition_BTD, settings))
    guided, sizes = settings.guidance != 1, step_sizes(settings, model.spec.cells)
    assert operations == IMAGES * brute_force_flops(model.spec, guided=guided, sizes=sizes, first_given="first_cell" in how)


@hows(
    [{"commit_per_step": 3}, {"info_gain_samples": 1, "cosine_steps": 4}],
    [{}, {"info_gain_samples": 0, "info_gain_candidates": 2}],
)
def test_looking_ahead_costs_what_torch_counts(how: dict[str, Any], layout: str) -> None:
    model, settings = small_model(layout=layout), ExtractionSettings(score="info_gain", **how)
    codes_BN, _, inputs = batch(model)
    with torch.no_grad():
        operations = counted(lambda: extract_orders(model, codes_BN, model.condition(inputs), settings))
    spec, sizes = model.spec, step_sizes(settings, model.spec.cells)
    ahead = look_ahead_flops(spec, sizes, settings.info_gain_samples, settings.info_gain_candidates)
    assert operations == IMAGES * (extraction_flops(spec, sizes=sizes) + ahead)


PLAIN = {"guidance": 1.0, "temperature": 1.0, "top_k": 0, "order_temperature": 0.0}


def drawn_flops(model: AnyOrderModel, settings: SampleSettings, *, ordered: bool) -> int:
    """Operations that torch counts while images are drawn."""
    _, order_BN, inputs = batch(model)
    with torch.no_grad():
        return counted(lambda: generate(model, model.condition(inputs), settings, 0, order_BN if ordered else None))


@specs(ANY_ORDER)
def test_drawing_by_confidence_costs_what_torch_counts(spec: ModelSpec) -> None:
    drawing_costs_what_torch_counts(spec, ordered=False)


@specs(["raster", *ANY_ORDER])
def test_drawing_along_an_order_costs_what_torch_counts(spec: ModelSpec) -> None:
    drawing_costs_what_torch_counts(spec, ordered=True)


def drawing_costs_what_torch_counts(spec: ModelSpec, *, ordered: bool) -> None:
    steps = drawing_steps(spec, [1] * spec.cells, ordered=ordered)
    operations = drawn_flops(AnyOrderModel(spec).eval(), SampleSettings(**PLAIN), ordered=ordered)
    assert operations == IMAGES * sum(step.flops for step in steps) and len(steps) == 1 + spec.cells


@pytest.mark.parametrize("ordered", [True, False])
@hows(
    [{"steps": 4, "guidance": 2.0}, {"steps": 1}],
    [{"steps": 4}, {"guidance": 2.0}, {"score": "sampled"}],
    layouts=["instructed", "decoupled", "grouped"],
)
def test_guided_drawing_in_few_steps_costs_what_torch_counts(how: dict[str, Any], layout: str, ordered: bool) -> None:
    model, settings = small_model(layout=layout, condition=ClassSpec(classes=5)), SampleSettings(**{**PLAIN, **how})
    steps = drawing_steps(model.spec, cells_per_step(model.spec.cells, settings.steps), guided=settings.guided, ordered=ordered)
    assert drawn_flops(model, settings, ordered=ordered) == IMAGES * sum(step.flops for step in steps)


@pytest.mark.parametrize("layout", ["raster", "instructed", "dual", "decoupled", "grouped"])
def test_a_step_of_drawing_sees_all_that_is_in_the_cache(layout: str) -> None:
    """At the last step: condition, and what each other cell leaves; a question of its own row, in the cache or not, is not among it."""
    spec = small_spec(layout=layout, condition=ClassSpec(classes=5))
    by_hand = {"raster": 1 - 1 + 8, "instructed": 1 + 2 * 8, "dual": 1 + 8, "decoupled": 1 + 8, "grouped": 1 + 8}[layout]
    last = drawing_steps(spec, [1] * 9, ordered=True)[-1]
    assert last.keys == by_hand and last.rows == (1 if layout in ("raster", "dual") else 2)
    if layout != "raster":
        assert [step.rows for step in drawing_steps(spec, [1] * 9)[2:]] == [left + last.rows - 1 for left in range(8, 0, -1)]


def test_a_raster_model_has_nothing_to_extract() -> None:
    with pytest.raises(ValueError, match="a raster model has one order"):
        extraction_flops(small_spec(layout="raster"))


def test_the_l_size_in_full_shapes() -> None:
    """Of its layers two: those between are like the first."""
    spec = SIZE_L.model_copy(update={"layers": 2})
    # Fake tensors: the shapes and kernels of a CPU without its memory or its time.
    with FakeTensorMode():
        model = AnyOrderModel(spec)
        codes_BN, order_BN, inputs = (torch.zeros(1, n, dtype=torch.long) for n in (spec.cells, spec.cells, 1))
        operations = counted(lambda: model.loss(codes_BN, order_BN, model.condition(inputs))[0].backward())
    assert operations == training_flops(spec)


TABLE = [line for line in DOCUMENT.splitlines() if line.startswith("| ") and not line.startswith(("| size", "| ---"))]


def test_the_documentation_has_a_table() -> None:
    assert len(TABLE) >= 5


@pytest.mark.parametrize("line", TABLE)
def test_the_documented_table_is_what_the_formulas_give(line: str) -> None:
    """The table in the documentation is what the formulas give."""
    size, *figures = (cell.strip() for cell in line.strip("|").split("|"))
    shape = load_recipe(str(ROOT / "recipes" / "base" / f"model-{size}.yaml"), ["name=x"]).model
    spec = ModelSpec.from_recipe(shape, vocab_size=16384, grid=16, condition=ClassSpec(classes=1000))
    slots, qkv_out_swiglu = 2 * spec.cells + 1, 4 * spec.dim + 3 * spec.ffn_hidden  # RandAR: all of them through trunk and head
    randars = spec.layers * (2 * slots * spec.dim * qkv_out_swiglu + 4 * slots**2 * spec.dim) + 2 * slots * spec.dim * spec.vocab_size
    giga = [f"{number / 1e9:,.0f}" for number in (forward_flops(spec), training_flops(spec), useful_flops(spec))]
    assert figures == [*giga, f"{extraction_flops(spec) / 1e12:.1f}", f"{randars / 1e9:,.0f}"]


def figures_of(layout: str) -> list[list[str]]:
    """The lines of the document's table of a layout, in words."""
    after = DOCUMENT.partition(f"The same sizes in layout `{layout}`")[2].partition("\n\n    ")[2].partition("\n\n")[0]
    return [line.split() for line in after.splitlines()[1:]]


DECOUPLED, GROUPED = figures_of("decoupled"), figures_of("grouped")


@pytest.mark.parametrize(("layout", "line"), [("decoupled", line) for line in DECOUPLED] + [("grouped", line) for line in GROUPED])
def test_the_table_of_a_layout_is_what_the_formulas_give(layout: str, line: list[str]) -> None:
    shapes = [
        load_recipe(str(ROOT / "recipes" / "base" / f"model-{line[0]}.yaml"), ["name=x", f"model.layout={each}"]).model
        for each in (layout, "instructed")
    ]
    spec, beside = (ModelSpec.from_recipe(shape, vocab_size=16384, grid=16, condition=ClassSpec(classes=1000)) for shape in shapes)
    giga = [f"{number / 1e9:,.0f}" for number in (forward_flops(spec), training_flops(spec), useful_flops(spec))]
    shares = [f"{cost(spec) / cost(beside):.2f}" for cost in (forward_flops, extraction_flops)]
    cache = f"{spec.cached_pairs * 2 * spec.dim * 2 / 1024:.0f}"
    assert line[1:] == [f"{parameters(spec).total:,}", *giga, f"{extraction_flops(spec) / 1e12:.1f}", cache, *shares]


def test_arpgs_sizes_cost_what_is_known_of_them() -> None:
    """Forward pass in GFLOP, extraction in TFLOP, cache in KiB a row: of L, XL and XXL."""
    published = {line[0]: (line[2], line[5], line[6]) for line in DECOUPLED if line[0] in ("l", "xl", "xxl")}
    assert published == {"l": ("161", "9.8", "52"), "xl": ("369", "22.0", "95"), "xxl": ("672", "39.7", "150")}


def test_lpds_sizes_cost_what_is_known_of_them() -> None:
    """As above, but for the forward pass: in LPD's code all rows leave the last block, here only those that predict a code."""
    published = {line[0]: (line[5], line[6]) for line in GROUPED if line[0] in ("l", "xl", "xxl")}
    assert published == {"l": ("21.4", "96"), "xl": ("48.8", "180"), "xxl": ("92.6", "288")}
    for size, whole in (("l", 344), ("xl", 784), ("xxl", 1482)):
        config = load_recipe(str(ROOT / "recipes" / "base" / f"model-{size}.yaml"), ["name=x", "model.layout=grouped"]).model
        spec = ModelSpec.from_recipe(config, vocab_size=16384, grid=16, condition=ClassSpec(classes=1000))
        unfinished = 2 * spec.cells * spec.dim * (spec.dim + 2 * spec.ffn_hidden)
        assert round((forward_flops(spec) + unfinished) / 1e9) == whole


def test_what_is_useful_is_less_than_what_is_computed() -> None:
    for spec in SPECS.values():
        assert useful_flops(spec) < training_flops(spec) < training_flops(spec, recompute=True)
    rows = 2 * SIZE_L.cells
    half = 3 * SIZE_L.layers * 4 * SIZE_L.dim * (rows * (rows - 1) // 2)
    assert useful_flops(SIZE_L) == 3 * forward_flops(SIZE_L) - half
