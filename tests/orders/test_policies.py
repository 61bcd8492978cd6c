"""What each order policy promises, on grids of every size; and that a policy is found by its file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_models import random_codes, random_text, small_model

from oar_scale.config.schema import SampleConfig
from oar_scale.data.manifest import Manifest, ShardInfo, write_manifest
from oar_scale.errors import UserError
from oar_scale.generation.editing import box_mask, redraw
from oar_scale.generation.model_bundle import ModelBundle
from oar_scale.generation.pretrained import Pretrained
from oar_scale.generation.sampling import generate
from oar_scale.generation.settings import SampleSettings
from oar_scale.model import AnyOrderModel, Decoder, model_id, save_model
from oar_scale.orders import policies
from oar_scale.orders.head import HeadSpec, OrderHead, save_head
from oar_scale.orders.order_files import OrderFiles, folder_files, head_file, run_files
from oar_scale.orders.order_table import OrderTable, table_name, write_orders
from oar_scale.orders.policies import GridPolicy, LateOrder, OrderRequest, TrainingOrders, grid_policies, known, policy, sampling_order

GRIDS = range(1, 34)
POWERS = (1, 2, 4, 8, 16, 32)
NOWHERE = folder_files("nowhere")


def path(name: str, grid: int) -> NDArray[np.int64]:
    return grid_policies()[name].path(grid)


def cells(name: str, grid: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of each cell, in order."""
    return np.divmod(path(name, grid), grid)


def request(model: AnyOrderModel, images: int = 3, *, seed: int = 0, files: OrderFiles = NOWHERE, model_file: str = "") -> OrderRequest:
    return OrderRequest(model, torch.arange(images), seed, files, model_file)


def test_all_policies_are_there_under_their_names() -> None:
    assert set(known()) >= {
        "random",
        "raster",
        "spiral",
        "centre-out",
        "halton",
        "checkerboard",
        "stored",
        "mean",
        "confidence",
        "order-head",
    }
    assert all(policy(name).name == name for name in known())


def test_a_policy_is_one_file_and_no_edit_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there_and_back.py").write_text(
        "import numpy as np\n"
        "from oar_scale.orders.policies import GridPolicy\n"
        "def path(grid):\n"
        "    cells = np.arange(grid * grid).reshape(grid, grid)\n"
        "    return np.where(np.arange(grid)[:, None] % 2 == 0, cells, cells[:, ::-1]).ravel()\n"
        "POLICY = GridPolicy(__name__, path)\n"
    )
    monkeypatch.setattr(policies, "__path__", [*policies.__path__, str(tmp_path)])
    assert "there-and-back" in known()
    entry = policy("there-and-back")
    assert isinstance(entry, GridPolicy) and entry.path(3).tolist() == [0, 1, 2, 5, 4, 3, 6, 7, 8]
    assert entry.training(NOWHERE, 2) == TrainingOrders(order=(0, 1, 3, 2))


@pytest.mark.parametrize("name", sorted(grid_policies()))
def test_every_grid_has_one_permutation_for_both_uses(name: str) -> None:
    """Every grid from 1 to 33 has a permutation that both uses share."""
    for grid in GRIDS:
        order = path(name, grid)
        assert order.dtype == np.int64 and np.array_equal(np.sort(order), np.arange(grid * grid)), grid
    order = path(name, 3)
    assert policy(name).training(NOWHERE, 3).order == tuple(order.tolist())
    drawn = policy(name).sampling(request(small_model(grid=3)))
    assert isinstance(drawn, torch.Tensor) and drawn.tolist() == [order.tolist()] * 3


def test_raster_is_line_by_line() -> None:
    assert path("raster", 5).tolist() == list(range(25))


@pytest.mark.parametrize("grid", GRIDS)
def test_the_spiral_goes_outwards_in_steps_to_neighbours(grid: int) -> None:
    """The spiral goes from the middle outwards in steps to neighbours."""
    row, column = cells("spiral", grid)
    assert np.all(np.abs(np.diff(row)) + np.abs(np.diff(column)) == 1)
    ring = np.maximum(np.abs(2 * row - (grid - 1)), np.abs(2 * column - (grid - 1)))
    assert np.all(np.diff(ring) >= 0)


@pytest.mark.parametrize("grid", GRIDS)
def test_centre_out_never_comes_closer_to_the_middle(grid: int) -> None:
    row, column = cells("centre-out", grid)
    assert np.all(np.diff((2 * row - (grid - 1)) ** 2 + (2 * column - (grid - 1)) ** 2) >= 0)


def discrepancy(order: NDArray[np.int64], grid: int, count: int) -> float:
    """Largest difference, over all boxes with a corner in the upper left, of the share of the first cells in the box and its area."""
    there = np.zeros((grid, grid))
    there.ravel()[order[:count]] = 1 / count
    area = np.outer(np.arange(1, grid + 1), np.arange(1, grid + 1)) / grid**2
    return float(np.abs(there.cumsum(0).cumsum(1) - area).max())


@pytest.mark.parametrize("grid", [8, 12, 16, 24, 33])
def test_halton_covers_the_image_more_evenly_than_random(grid: int) -> None:
    """Halton covers the image more evenly than random orders wherever it stops."""
    random = [np.random.default_rng(seed).permutation(grid * grid) for seed in range(20)]
    for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2):
        count = max(8, round(share * grid * grid))
        assert discrepancy(path("halton", grid), grid, count) < 0.75 * np.mean([discrepancy(order, grid, count) for order in random])


@pytest.mark.parametrize("grid", POWERS)
def test_the_checkerboard_passes_through_every_coarser_lattice(grid: int) -> None:
    """The checkerboard passes through every coarser lattice and its checkerboard."""
    row, column = cells("checkerboard", grid)
    side = 1
    while side < grid:
        step = grid // side
        lattice = {(r, c) for r in range(0, grid, step) for c in range(0, grid, step)}
        between = {(r + step // 2, c + step // 2) for r, c in lattice}
        first = list(zip(row.tolist(), column.tolist(), strict=True))
        assert set(first[: side**2]) == lattice
        assert set(first[: 2 * side**2]) == lattice | between
        side *= 2


@pytest.mark.parametrize("grid", sorted(set(range(3, 34)) - set(POWERS)))
def test_other_checkerboards_follow_the_next_power_of_two(grid: int) -> None:
    """The checkerboard of other grids keeps the order of the next power of two."""
    larger = next(power for power in (*POWERS, 64) if power > grid)
    row, column = cells("checkerboard", larger)
    inside = (row < grid) & (column < grid)
    assert path("checkerboard", grid).tolist() == (row * grid + column)[inside].tolist()


def test_random_orders_differ_by_image_and_follow_the_seed() -> None:
    """Random orders differ between images and are those of the seed."""
    assert policy("random").training(NOWHERE, 4) == TrainingOrders()  # the stream makes them, from (seed, epoch, sample)
    model = small_model(grid=4)
    first, again, other = (policy("random").sampling(request(model, 5, seed=seed)) for seed in (1, 1, 2))
    assert isinstance(first, torch.Tensor) and isinstance(again, torch.Tensor) and isinstance(other, torch.Tensor)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first.sort(1).values, torch.arange(16).expand(5, -1)) and len(first.unique(dim=0)) == 5


def test_stored_orders_are_for_training_only() -> None:
    assert policy("stored").training(run_files("runs/a"), 4) == TrainingOrders(tables="runs/a/orders/train")
    with pytest.raises(
        UserError,
        match=r"order 'stored' belongs to images that are there already.* halton, locality, mean, order-head, random, raster, spiral\.$",
    ):
        policy("stored").sampling(request(small_model()))


def test_confidence_is_for_drawing_only() -> None:
    assert policy("confidence").sampling(request(small_model())) is None
    with pytest.raises(UserError, match=r"order 'confidence' has no orders to train on.*stored"):
        policy("confidence").training(NOWHERE, 4)


def test_a_policy_nobody_wrote_is_answered_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"finetune\.order 'diagonal': no such policy\. There are: .*spiral"):
        policy("diagonal", "finetune.order")


def test_without_a_name_the_model_decides_or_its_raster() -> None:
    """Without a name the model decides and a raster model continues in raster order."""
    assert sampling_order(None, request(small_model())) is None
    raster = sampling_order(None, request(small_model(layout="raster"), 1))
    assert isinstance(raster, torch.Tensor) and raster.tolist() == [list(range(9))]


# -- the mean order -----------------------------------------------------------------------------------------------------------


def write_tables(root: str, *orders: NDArray[np.integer], models: tuple[str, ...] = ("m",)) -> OrderFiles:
    """A run with one shard for each array of orders [S, 4]."""
    files, infos = run_files(root), []
    for index, order in enumerate(orders):
        name = f"{index:05d}.tar"
        infos.append(ShardInfo(name=name, bytes=0, samples=len(order), crc32c=0))
        keys = [f"{index}-{row}" for row in range(len(order))]
        table = OrderTable(
            keys, [0] * len(order), order.astype(np.uint16), np.zeros(order.shape, np.float32), models[index % len(models)], "s"
        )
        write_orders(f"{files.tables}/{table_name(name)}", table)
    assert files.tokens is not None
    write_manifest(files.tokens, Manifest(shards=tuple(infos), grid=2, vocab_size=8, views=("center",)))
    return files


def test_the_mean_order_sorts_by_time_and_ties_by_raster(tmp_path: Path) -> None:
    """The mean order sorts by mean placing time over all tables and ties in raster order."""
    # Times of the cells: (0 1 2 3), (3 0 1 2), (2 1 0 3) have the means 5/3, 2/3, 1, 8/3.
    files = write_tables(str(tmp_path), np.array([[0, 1, 2, 3], [1, 2, 3, 0]]), np.array([[2, 1, 0, 3]]))
    assert policy("mean").training(files, 2).order == (1, 2, 0, 3)
    tied = write_tables(str(tmp_path / "tied"), np.array([[0, 1, 2, 3], [3, 2, 1, 0]]))
    assert policy("mean").training(tied, 2).order == (0, 1, 2, 3)


def test_the_mean_order_is_found_once_and_kept(tmp_path: Path) -> None:
    files = write_tables(str(tmp_path), np.array([[3, 1, 2, 0]]))
    first = policy("mean").training(files, 2)
    for table in (tmp_path / "orders" / "train").glob("*.parquet"):
        table.unlink()
    assert policy("mean").training(files, 2) == first
    drawn = policy("mean").sampling(request(small_model(grid=2), 2, files=files))
    assert isinstance(drawn, torch.Tensor) and drawn.tolist() == [[3, 1, 2, 0]] * 2
    with pytest.raises(UserError, match=r"mean\.json: not an order of 3 x 3 cells"):
        policy("mean").training(files, 3)


def test_a_mean_over_missing_tables_or_two_models_is_refused(tmp_path: Path) -> None:
    mixed = write_tables(str(tmp_path / "a"), np.array([[0, 1, 2, 3]]), np.array([[0, 1, 2, 3]]), models=("m", "n"))
    with pytest.raises(UserError, match="orders of several models"):
        policy("mean").training(mixed, 2)
    lacking = write_tables(str(tmp_path / "b"), np.array([[0, 1, 2, 3]]), np.array([[0, 1, 2, 3]]))
    (tmp_path / "b" / "orders" / "train" / "00001.parquet").unlink()
    with pytest.raises(UserError, match=r"00001\.parquet: missing, and the mean order needs the orders of all images"):
        policy("mean").training(lacking, 2)
    with pytest.raises(UserError, match=r"there is no mean order here"):
        policy("mean").training(folder_files(str(tmp_path)), 2)


# -- the order head -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 4])
@torch.no_grad()
def test_an_order_head_orders_what_follows_its_first_cells(first: int, tmp_path: Path) -> None:
    """An order head draws its first cells and then what it says."""
    model, file = small_model(grid=4), str(tmp_path / "model.safetensors")
    save_model(file, model)
    torch.manual_seed(3)
    head = OrderHead(HeadSpec.of(model.spec, model_id(file), width=8, first=first)).eval()
    save_head(head_file(file), head)
    late = policy("order-head").sampling(request(model, 5, model_file=file))
    assert isinstance(late, LateOrder)
    settings = SampleSettings(guidance=2.0, temperature=1.0, top_k=1, order_temperature=0.0)
    condition = model.condition(random_text(model, 5))
    drawn = generate(model, condition, settings, 0, late)
    lattice = path("checkerboard", 4)[:first]
    assert drawn.order_BN[:, :first].tolist() == [lattice.tolist()] * 5
    assert torch.equal(drawn.order_BN.sort(1).values, torch.arange(16).expand(5, -1))
    # Its prediction, computed by hand after the cells it drew first.
    first_cells = drawn.order_BN[:, :first]
    prefix = Decoder(model).prefill(Decoder(model).begin(condition), first_cells, drawn.codes_BN.gather(1, first_cells))
    rest = torch.tensor([cell for cell in range(16) if cell not in lattice]).expand(5, -1)
    order = rest.gather(1, head.ahead(Decoder(model).candidate_rows(prefix, rest).rows_BRD, rest).argsort(1))
    assert torch.equal(drawn.order_BN[:, first:], order)


@torch.no_grad()
def test_an_order_head_continues_known_cells_in_fewer_passes(tmp_path: Path) -> None:
    """An order head continues from known cells, and in fewer passes."""
    model, file = small_model(grid=4), str(tmp_path / "model.safetensors")
    save_model(file, model)
    save_head(head_file(file), OrderHead(HeadSpec.of(model.spec, model_id(file), width=8, first=4)))
    late, condition = policy("order-head").sampling(request(model, 2, model_file=file)), model.condition(random_text(model, 2))
    assert isinstance(late, LateOrder)
    settings = SampleSettings(guidance=1.0, temperature=1.0, top_k=0, order_temperature=0.0, steps=6)
    codes, redo = random_codes(model, 2), box_mask(4, 1, 1, 2, 3)
    edited = redraw(model, codes, redo, condition, settings, 0, late)
    assert torch.equal(edited.codes_BN[:, ~redo], codes[:, ~redo])
    assert torch.equal(edited.order_BN.sort(1).values, torch.arange(16).expand(2, -1))
    drawn = generate(model, condition, settings, 0, late)
    assert torch.equal(drawn.order_BN.sort(1).values, torch.arange(16).expand(2, -1))


def test_the_head_of_another_model_is_refused_and_none_is_named(tmp_path: Path) -> None:
    model, file = small_model(), str(tmp_path / "model.safetensors")
    save_model(file, model)
    with pytest.raises(
        UserError, match=r"model\.order-head\.safetensors: this model has no order head.*--train-head --model NAME\), and export"
    ):
        policy("order-head").sampling(request(model, model_file=file))
    with pytest.raises(UserError, match=r"has no order head.*--train-head --model gt\.s1$"):  # without the name another model would get one
        policy("order-head").sampling(replace(request(model, model_file=str(tmp_path / "gt.s1.safetensors")), model_id=lambda: "id"))
    save_head(head_file(file), OrderHead(HeadSpec.of(model.spec, "0123456789abcdef", width=8, first=0)))
    with pytest.raises(UserError, match=f"trained on the rows of model 0123456789abcdef, the model here is {model_id(file)}"):
        policy("order-head").sampling(request(model, model_file=file))


def test_the_weights_file_is_read_once_for_all_orders(tmp_path: Path) -> None:
    """A server asks for orders with each request: the head is compared with the model that was loaded."""
    model, file = small_model(), str(tmp_path / "model.safetensors")
    save_model(file, model)
    save_head(head_file(file), OrderHead(HeadSpec.of(model.spec, model_id(file), width=8, first=2)))
    drawer = Pretrained(model, None, None, ModelBundle(str(tmp_path), file, None, None, "", SampleConfig(), None))
    first = drawer.orders("order-head", np.arange(2), 0)
    Path(file).unlink()
    again = drawer.orders("order-head", np.arange(2), 0)
    assert isinstance(first, LateOrder) and isinstance(again, LateOrder) and torch.equal(first.first_BK, again.first_BK)


def test_training_by_an_order_head_needs_its_predictions(tmp_path: Path) -> None:
    files = write_tables(str(tmp_path), np.array([[0, 1, 2, 3]]))
    with pytest.raises(UserError, match=r"predicted/00000\.parquet: missing.*--train-head --predict"):
        policy("order-head").training(files, 2)
