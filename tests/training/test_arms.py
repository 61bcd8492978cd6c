"""Arms of a run differ in the orders of their samples and in nothing else; a seed draws everything else anew."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from small_run import prepare_small_run, small_recipe

from oar_scale.data.manifest import read_manifest
from oar_scale.data.open_shard import TokenShard
from oar_scale.data.shards import read_token_shard
from oar_scale.errors import UserError
from oar_scale.model import load_model, model_id
from oar_scale.orders.distinct import distinct_orders, nearest_orders
from oar_scale.orders.order_files import run_files
from oar_scale.orders.order_table import OrderTable, read_orders, table_name, write_orders
from oar_scale.run.context import Run
from oar_scale.storage import open_storage, write_json
from oar_scale.training.inputs import job_prompts, job_stream
from oar_scale.training.job import TrainingJob
from oar_scale.training.loop import Callback, Loop
from oar_scale.training.plain_engine import PlainEngine
from oar_scale.training.process import SingleProcess
from oar_scale.training.stored_orders import OrdersByKey, OrdersOfOthers, next_on_cycle

ARMS: dict[str, Any] = {
    "gt": {"extract": {"score": "gt_logprob"}},
    "others": {"orders_of": "other_images"},
    "fixed": {"order": "fixed_random"},
    "raster": {"order": "raster"},
    "half": {"random_share": 0.5},
    "few": {"distinct_orders": 3},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """With order tables of any permutations, the same for each key: another one in the extraction of the arm ``gt``."""
    recipe = small_recipe(
        str(tmp_path_factory.mktemp("run")),
        pipeline={"seeds": 2, "arms": ARMS},
        model={"dropout": 0.2, "caption_dropout": 0.5},
        parallel={"micro_batch": 4, "precision": "fp32"},
        finetune={"global_batch": 8, "steps": 3, "random_share": 0.25},
    )
    run = prepare_small_run(recipe)
    open_storage(run.at()).copy(run.model_uri("base"), run.model_uri("any_order"))
    found_by = model_id(run.model_uri("any_order"))
    for number, folder in enumerate(("orders", "arm_orders/gt")):
        noise = np.random.default_rng(number)
        for info in read_manifest(run.at("tokens", "train")).shards:
            keys = read_token_shard(run.at("tokens", "train", info.name), run.cache, info).keys
            order_SN = noise.permuted(np.tile(np.arange(64, dtype=np.uint16), (len(keys), 1)), axis=1)
            table = OrderTable(keys, [0] * len(keys), order_SN, np.zeros((len(keys), 64), np.float32), found_by, folder)
            write_orders(run.at(folder, "train", table_name(info.name)), table)
    return run


def job_of(run: Run, name: str) -> TrainingJob:
    stage = run.recipe.stage(name)
    start, result = run.model_uri("any_order"), run.at("result.safetensors")
    return TrainingJob(run.recipe.of(stage), name, run.at(), run.local(), start, result, orders=stage.orders)


@dataclass
class Seen(Callback):
    """What a training saw at each step."""

    samples: list[list[int]] = field(default_factory=list)
    codes: list[bytes] = field(default_factory=list)
    dropped: list[list[bool]] = field(default_factory=list)
    orders: list[np.ndarray[Any, Any]] = field(default_factory=list)
    dropout: list[int] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def after_step(self, loop: Loop) -> None:
        self.samples.append(loop.batch.uid_b.tolist())
        self.codes.append(loop.batch.codes_bN.numpy().tobytes())
        self.dropped.append(loop.batch.drop_b.tolist())
        self.orders.append(loop.batch.orders().numpy())
        self.rates.append(loop.lr)

    @property
    def all_but_orders(self) -> tuple[object, ...]:
        return self.samples, self.codes, self.dropped, self.dropout, self.rates


@pytest.fixture(scope="module")
def seen(run: Run) -> Iterator[dict[str, Seen]]:
    """Three steps of every fine-tuning of the run, by its own loop on the plain engine."""
    trained: dict[str, Seen] = {}
    plain = torch.nn.functional.dropout
    with pytest.MonkeyPatch.context() as patch:
        for stage in run.recipe.stages():
            if stage.training != "finetune":
                continue
            now = trained[stage.name] = Seen()

            def dropout(x: torch.Tensor, p: float, training: bool, now: Seen = now) -> torch.Tensor:
                noise = plain(torch.ones_like(x), p, training)
                if training:
                    now.dropout.append(crc32(noise.numpy().tobytes()))
                return x * noise

            patch.setattr(torch.nn.functional, "dropout", dropout)
            job = job_of(run, stage.name)
            prompts = job_prompts(job)
            engine = PlainEngine(load_model(job.start_from), prompts, job.training, job.recipe.parallel)
            Loop(job, SingleProcess(), engine, job_stream(job, prompts, 0, 1), None, [now]).run()
    yield trained


NAMES = ["finetune", "control", *ARMS]


@pytest.mark.parametrize("seed", ["", ".s1"])
def test_arms_differ_in_their_orders_and_in_nothing_else(seen: dict[str, Seen], seed: str) -> None:
    first = seen[f"finetune{seed}"]
    assert len(first.samples) == 3 and len(set(first.dropout)) == len(first.dropout) > 3
    assert any(any(row) for row in first.dropped) and not all(all(row) for row in first.dropped)
    for name in NAMES:
        assert seen[name + seed].all_but_orders == first.all_but_orders, name
    for one in NAMES:
        for other in NAMES[: NAMES.index(one)]:
            assert any((a != b).any() for a, b in zip(seen[one + seed].orders, seen[other + seed].orders, strict=True)), (one, other)


def test_another_seed_draws_everything_anew(seen: dict[str, Seen]) -> None:
    for name in NAMES:
        first, second = seen[name], seen[f"{name}.s1"]
        for what in ("samples", "codes", "dropped", "dropout"):
            assert getattr(first, what) != getattr(second, what), (name, what)
        assert first.rates == second.rates


def test_seed_zero_is_the_run_without_arms(run: Run, seen: dict[str, Seen]) -> None:
    plain = Run(run.recipe.model_copy(update={"pipeline": type(run.recipe.pipeline)()}))
    for name in ("finetune", "control"):
        job = TrainingJob(plain.recipe, name, run.at(), run.local(), run.model_uri("any_order"), "")
        assert job.identity == job_of(run, name).identity
        batches = list(job_stream(job, job_prompts(job), 0, 1).batches(0, 3))
        assert [batch.uid_b.tolist() for batch in batches] == seen[name].samples
        assert all((batch.orders().numpy() == order_bN).all() for batch, order_bN in zip(batches, seen[name].orders, strict=True))


def test_the_share_of_random_orders_is_a_part_of_the_larger_one(seen: dict[str, Seen]) -> None:
    """A sample that is in a random order in ``finetune`` is in the same one in ``half``, and is the control's."""
    rows = [zip(*(seen[name].orders[step] for name in ("finetune", "half", "control")), strict=True) for step in range(3)]
    random = [((own == control).all(), (half == control).all()) for step in rows for own, half, control in step]
    assert 0 < sum(own for own, _ in random) < sum(half for _, half in random) < len(random)
    assert all(half for own, half in random if own)


def shard_of(run: Run) -> tuple[str, TokenShard]:
    info = read_manifest(run.at("tokens", "train")).shards[0]
    uri = run.at("tokens", "train", info.name)
    return info.name, TokenShard(memoryview(open_storage(uri).read(uri)), uri)


def test_no_image_keeps_its_order_where_others_have_it(run: Run) -> None:
    name, shard = shard_of(run)

    def stored(name: str, samples: Any) -> Any:
        return {0: np.arange(len(samples), dtype=np.uint16)[:, None, None]}

    given = OrdersOfOthers(stored, 7)(name, shard)[0][:, 0, 0]
    assert sorted(given.tolist()) == list(range(len(shard))) and (given != np.arange(len(shard))).all()
    for count in (2, 3, 50):
        following = next_on_cycle(count, 7, "00000.tar")
        at, visited = 0, set[int]()
        while at not in visited:
            visited.add(at)
            at = int(following[at])
        assert len(visited) == count  # one cycle
    assert next_on_cycle(50, 7, "00000.tar").tolist() != next_on_cycle(50, 7, "00001.tar").tolist()
    assert next_on_cycle(50, 7, "00000.tar").tolist() != next_on_cycle(50, 8, "00000.tar").tolist()


def test_an_image_alone_has_no_other_order() -> None:
    with pytest.raises(UserError, match="one image alone"):
        OrdersOfOthers(lambda name, samples: {}, 0)("00000.tar", [0])  # type: ignore[arg-type]


def test_a_fixed_random_order_depends_on_key_and_seed_alone(run: Run, seen: dict[str, Seen]) -> None:
    name, shard = shard_of(run)
    views = OrdersByKey(5, 8, 2, {0: 2})(name, shard)
    order_SN = views[0][:, 0]
    assert list(views) == [0, 1, 2] and order_SN.shape == (len(shard), 64)
    assert (np.sort(order_SN, axis=-1) == np.arange(64)).all()
    assert (views[1][:, 0] == order_SN).all()
    assert (views[2][:, 0] // 8 == order_SN // 8).all() and (views[2][:, 0] % 8 == 7 - order_SN % 8).all()  # the mirror image's
    assert len(np.unique(order_SN, axis=0)) == len(shard)
    assert (OrdersByKey(5, 8, 1, {})("other.tar", shard)[0][:, 0] == order_SN).all()
    assert (OrdersByKey(6, 8, 1, {})(name, shard)[0][:, 0] != order_SN).any()
    job = job_of(run, "fixed")
    orders: dict[int, set[bytes]] = {}
    epochs = set[int]()
    for batch in job_stream(job, job_prompts(job), 0, 1).batches(0, 30):
        for uid, epoch, follows, order_N in zip(batch.uid_b.tolist(), batch.epoch_b.tolist(), batch.fixed_b, batch.orders(), strict=True):
            if follows:
                orders.setdefault(uid, set()).add(order_N.numpy().tobytes())
                epochs.add(epoch)
    assert len(epochs) > 2 and all(len(each) == 1 for each in orders.values())


def test_nearest_orders_are_those_of_scipys_kendall_tau() -> None:
    noise = np.random.default_rng(0)
    order_SN, chosen_KN = (noise.permuted(np.tile(np.arange(9, dtype=np.uint16), (rows, 1)), axis=1) for rows in (40, 5))
    tau_SK = np.array([[kendalltau(np.argsort(order), np.argsort(each)).statistic for each in chosen_KN] for order in order_SN])
    nearest_S = nearest_orders(order_SN, chosen_KN)
    assert np.allclose(tau_SK[np.arange(40), nearest_S], tau_SK.max(axis=1))
    ties = np.isclose(tau_SK, tau_SK.max(axis=1, keepdims=True))
    assert (ties.sum(axis=1) > 1).any() and (nearest_S == ties.argmax(axis=1)).all()  # of several the first one


def test_distinct_orders_are_some_of_the_training_sets(run: Run, seen: dict[str, Seen]) -> None:
    files = run_files(run.at())
    stored = {order.tobytes() for uri in open_storage(run.at()).list(files.tables or "") for order in read_orders(uri).order_SN}
    chosen_KN = distinct_orders(files, 3, 11, 8)
    assert len({order.tobytes() for order in chosen_KN}) == 3 and {order.tobytes() for order in chosen_KN} <= stored
    assert (distinct_orders(files, 3, 11, 8) == chosen_KN).all()
    assert {order.tobytes() for order in distinct_orders(files, 2, 11, 8)} < {order.tobytes() for order in chosen_KN}
    assert (distinct_orders(files, 3, 12, 8) != chosen_KN).any()
    with pytest.raises(UserError, match=rf"{len(stored)} different orders in all.*asks for {len(stored) + 1}"):
        distinct_orders(files, len(stored) + 1, 11, 8)
    follows = [tuple(order) for order_bN in seen["few"].orders for order in order_bN]
    of_control = {tuple(order) for order_bN in seen["control"].orders for order in order_bN}
    assert len(set(follows) - of_control) == 3


def test_an_arm_reads_the_tables_of_its_own_extraction(run: Run, seen: dict[str, Seen]) -> None:
    for name, folder in (("finetune", "orders"), ("gt", "arm_orders/gt")):
        tables = open_storage(run.at()).list(run.at(folder, "train"))
        stored = {tuple(order.tolist()) for uri in tables for order in read_orders(uri).order_SN}
        assert any(tuple(order) in stored for order_bN in seen[name].orders for order in order_bN.tolist()), name


def test_the_identity_of_a_checkpoint_tells_arms_and_seeds_apart(run: Run) -> None:
    stages = [stage.name for stage in run.recipe.stages() if stage.training == "finetune"]
    identities = [{name: value for name, value in job_of(run, stage).identity.items() if name != "stage"} for stage in stages]
    names = ["finetune", "others", "fixed", "raster", "half", "few"]
    different = [identities[stages.index(name)] for name in names]
    assert all(one != other for number, one in enumerate(different) for other in different[:number])
    assert identities[stages.index("finetune.s1")]["seed"] != identities[stages.index("finetune")]["seed"]


def test_orders_of_the_run_are_not_touched_by_a_damaged_choice(run: Run, tmp_path: Path) -> None:
    files = run_files(run.at())
    distinct_orders(files, 2, 1, 8)
    uri = f"{files.distinct}/2-1.json"
    for damaged in ([[0, 1], [1, 0]], [1, 2], ["ab", None], [[[]], [[]]], [[False, True, *range(2, 64)]] * 2):
        write_json(uri, {"orders": damaged})
        with pytest.raises(UserError, match=r"not 2 orders of 8 x 8 cells\. Delete it"):
            distinct_orders(files, 2, 1, 8)


def test_images_of_a_mixture_follow_one_order_in_all_of_their_views(tmp_path: Path) -> None:
    """The other folder has more views than the run, and the arms fewer random orders than the ordered model, whose views they see."""
    other = prepare_small_run(small_recipe(str(tmp_path / "other"), tokenizer={"views": ("center", "jitter1", "center_flip")}))
    arms = {name: {"order": order, "random_share": 0.0} for name, order in (("raster", "raster"), ("fixed", "fixed-random"))}
    recipe = small_recipe(
        str(tmp_path / "run"),
        tokenizer={"views": ("center",)},
        finetune={"random_share": 0.5, "mix": [{"shards": other.at("tokens", "train")}]},
        pipeline={"arms": arms},
    )
    run = prepare_small_run(recipe)
    open_storage(run.at()).copy(run.model_uri("base"), run.model_uri("any_order"))
    batches = {}
    for name in ("control", *arms):
        job = job_of(run, name)
        batches[name] = list(job_stream(job, job_prompts(job), 0, 1).batches(0, 10))
    for name in arms:
        assert all(bool(batch.fixed_b.all()) for batch in batches[name])
        assert all(torch.equal(one.codes_bN, two.codes_bN) for one, two in zip(batches[name], batches["control"], strict=True))
    assert all(torch.equal(batch.orders(), torch.arange(64).expand(8, -1)) for batch in batches["raster"])
