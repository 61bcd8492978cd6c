"""The stream load follows the real sample plan, and is exact when every position of an epoch is computed."""

from __future__ import annotations

import numpy as np
import pytest

from oar_scale.data.sample_plan import SamplePlan, step_slots
from oar_scale.errors import UserError
from oar_scale.planning.stream_load import StreamLoad, check_sharing, stream_load
from tests.planning.cases import case

SMALL = (
    "data.samples_per_shard=64",
    "data.canonical_streams=16",
    "pretrain.global_batch=64",
    "finetune.global_batch=64",
    "parallel.micro_batch=8",
)
IMAGES, RANKS, PER_NODE = 5003, 8, 4


def small(ranks: int = RANKS) -> StreamLoad:
    small = case("imagenet", *SMALL, nodes=ranks // PER_NODE, gpus_per_node=PER_NODE, images=IMAGES)
    return stream_load(small, ranks, step_s=0.5, batch=64)


def test_it_is_what_an_epoch_in_full_shows() -> None:
    load = small()
    plan = SamplePlan([64] * 78 + [11], case("imagenet", *SMALL).recipe.seed, 16, 8)
    seen = [step_slots(plan, step, 64, rank, RANKS).uid for rank in range(RANKS) for step in range(plan.per_epoch // 64)]
    ranks = np.concatenate(seen).reshape(RANKS, -1)
    shards = [set(plan.shard_of(row)[0].tolist()) for row in ranks]
    assert len(np.unique(ranks)) == ranks.size == load.steps * 64
    assert load.skipped == IMAGES - plan.per_epoch and load.per_step == (8, 8)
    # Steps are whole: the last samples of a stream may belong to no full step of the epoch.
    assert load.shards_per_rank[0] >= min(map(len, shards)) and load.shards_per_rank[2] <= max(map(len, shards)) + 1
    nodes = [len(set().union(*shards[first : first + PER_NODE])) for first in range(0, RANKS, PER_NODE)]
    assert load.read_twice * load.shards == pytest.approx(sum(nodes), abs=3)


def test_requests_follow_from_the_shards_that_are_fetched() -> None:
    load = small()
    assert load.gets_per_epoch == round(load.read_twice * load.shards)  # shards of one part each
    assert load.gets_per_s == pytest.approx(load.gets_per_epoch / (load.steps * 0.5))
    assert 16 <= load.first_gets <= 64


def test_more_ranks_read_fewer_shards_each() -> None:
    assert small(16).shards_per_rank[1] < small(8).shards_per_rank[1]


def test_a_billion_images_are_planned_without_a_table_of_them() -> None:
    large = case("imagenet", "data.canonical_streams=1024", images=10**9, nodes=128, gpus_per_node=8)
    load = stream_load(large, 1024, step_s=1.0, batch=1024)
    assert load.shards == 488_282 and load.per_step == (1, 1) and load.checked == 400_000
    assert load.read_twice < 1.001


@pytest.mark.parametrize("ranks", [7, 48, 512])
def test_ranks_that_cannot_share_the_streams_hear_which_could(ranks: int) -> None:
    with pytest.raises(UserError, match=rf"^{ranks} workers cannot share .* Workers that can: .*-o data\.canonical_streams="):
        check_sharing(case().recipe, ranks)


def test_the_change_that_is_proposed_works() -> None:
    with pytest.raises(UserError) as raised:
        check_sharing(case().recipe, 48)
    proposed = str(raised.value).split("-o ")[1:]
    check_sharing(case("imagenet", *(change.strip() for change in proposed), "parallel.workers=48", "parallel.micro_batch=1").recipe, 48)
