"""An episode is one alert, however many events it has, and whoever reads them."""

from __future__ import annotations

from typing import get_args

from fake_clock import FakeClock

from oar_scale.config.run_sections import AlertKind
from oar_scale.observe.alarms import EVENT_ALERTS, Alarms, Silence, TrainingSigns
from oar_scale.observe.events import Event
from oar_scale.observe.formatting import ALERTS


class Story:
    """Events, a minute after each other, and the alerts that they made."""

    def __init__(self) -> None:
        self.alarms, self.minute, self.step = Alarms(), 0.0, 0
        self.alerts: list[tuple[str, str]] = []

    def tell(self, kind: str, minutes: float = 1.0, **fields: object) -> None:
        self.minute += minutes
        event: Event = {"time": 60 * self.minute, "stage": "pretrain", "kind": kind, **fields}
        self.alerts += [(alert.kind, alert.text) for alert in self.alarms.take(event)]

    def train(self, times: int, **fields: object) -> None:
        usual = {"images_per_s": 60.0, "step_s": 1.0, "data_wait_s": 0.01}
        for _ in range(times):
            self.step += 1
            self.tell("train", step=self.step, **(usual | fields))

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.alerts]


def test_every_alert_has_a_title_and_every_event_alert_a_kind() -> None:
    assert set(ALERTS) == set(get_args(AlertKind)) and set(EVENT_ALERTS) < set(ALERTS)


def test_waiting_for_data_is_one_alert_an_episode() -> None:
    story = Story()
    story.train(3)
    story.train(4, data_wait_s=0.4)  # a moment
    story.train(3)
    assert not story.alerts
    story.train(40, data_wait_s=0.4)
    assert story.alerts == [("data_wait", "40% of a step waits for data")]
    story.train(6)
    story.train(6, data_wait_s=0.2)
    assert story.kinds == ["data_wait", "data_wait"]


def test_a_drop_of_speed_is_against_the_run_itself_per_worker() -> None:
    story = Story()
    story.tell("start", world_size=8)
    story.train(10, images_per_s=20.0)  # too early to tell what is usual
    story.train(30, images_per_s=80.0)
    story.tell("start", world_size=4)  # half the workers, half the images
    story.train(10, images_per_s=40.0)
    assert not story.alerts
    story.train(20, images_per_s=28.0)
    assert story.alerts == [("slow", "a worker's images/s, and its MFU, are at 70% of the stage's median so far")]
    story.alarms.begin_anew()
    story.train(20, images_per_s=28.0)
    assert len(story.alerts) == 1


def test_a_straggler_is_the_same_rank_again_and_again() -> None:
    story = Story()
    for rank in (1, 2, 3, 4) * 5:  # somebody is always last
        story.train(1, slowest_rank=rank, slowest_host="n1", slowest_rank_s=1.6, median_rank_s=1.0)
    story.train(20, slowest_rank=1, slowest_host="n1", slowest_rank_s=1.1, median_rank_s=1.0)
    assert not story.alerts
    story.train(20, slowest_rank=5, slowest_host="node-3", slowest_rank_s=1.6, median_rank_s=1.0)
    assert story.alerts == [("straggler", "rank 5 on node-3 takes 1.60 times as long as the median rank")]


def test_many_starts_within_an_hour_are_one_alert() -> None:
    story = Story()
    for _ in range(8):
        story.tell("start", minutes=30, world_size=2)
    assert not story.alerts
    for _ in range(8):
        story.tell("start", minutes=5, world_size=2)
    assert story.kinds == ["restarts"]


def test_a_flood_of_faults_is_one_alert_and_each_end_is_its_own() -> None:
    story = Story()
    for step in range(50):
        story.tell("non_finite", minutes=0.5, step=step, loss=None, uids=[])
    assert story.kinds == ["non_finite"]
    story.tell("non_finite", minutes=11, step=99, loss=None, uids=[])
    for step in range(5):  # the storage is away
        story.tell("checkpoint_failed", step=step, fault="no answer")
    story.tell("failed", cause="RuntimeError: a", final=False)
    story.tell("failed", cause="RuntimeError: b", final=True)
    assert story.kinds == ["non_finite", "non_finite", "checkpoint_failed", "failed", "failed"]
    assert [text for kind, text in story.alerts if kind == "failed"] == [
        "the stage has ended: RuntimeError: a; its job starts it again",
        "the stage has ended: RuntimeError: b",
    ]


def test_the_same_events_are_the_same_alerts_with_the_same_numbers() -> None:
    events = [{"time": 60.0 * n, "kind": "train", "step": n, "step_s": 1.0, "data_wait_s": 0.5} for n in range(20)]
    events[12:12] = [{"time": 720.0, "kind": "spike", "step": 12, "loss": 9.0, "expected": 3.0}]
    first, second = Alarms(), Alarms()
    assert [first.take(event) for event in events] == [second.take(event) for event in events]
    assert first.count == 2


def test_silence_is_noticed_once_and_says_what_it_is() -> None:
    clock = FakeClock()
    silence = Silence(600.0, clock)
    clock.now += 599
    assert silence.noticed(waiting=True) is None
    clock.now += 2
    kind, text = silence.noticed(waiting=True) or ("", "")
    assert kind == "pending" and "for 10 min 01 s" in text
    clock.now += 5000
    assert silence.noticed(waiting=False) is None
    silence.progress()
    clock.now += 700
    assert silence.noticed(waiting=False) == ("stall", "no progress for 11 min 40 s")


def test_signs_of_a_training_without_these_numbers_are_none() -> None:
    signs = TrainingSigns()
    signs.take({"kind": "train", "step": 1, "images_per_s": None, "step_s": None})
    assert (signs.speed, signs.data_wait, signs.straggling, signs.slowest) == (None, None, None, None)
