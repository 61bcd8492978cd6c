"""Roll-backs are counted against the step that they return to."""

from oar_scale.training.loop import RollBack


def test_a_newer_checkpoint_ends_a_row_of_roll_backs() -> None:
    """A spike now and then in a long run is none of several in a row, after which the guard only warns."""
    third = RollBack(next_batch=31, started_at=20, times=3)
    assert third.times_back_to(20) == 3
    assert third.times_back_to(25) == 1
