import asyncio

import pytest

from router.epochs import Epochs
from router.placement import Group, Placement

A, B = Group("a", "host@1:1/a", ((0, 0),)), Group("b", "host@1:2/b", ((0, 1),))


def after(epochs: Epochs, epoch: int, timeout_s: float, meanwhile=lambda: None) -> Placement | None:
    """Wait for a placement, while something else is done on the loop."""

    async def wait() -> Placement | None:
        waiting = asyncio.ensure_future(epochs.after(epoch, timeout_s))
        await asyncio.sleep(0)
        meanwhile()
        return await waiting

    return asyncio.run(wait())


def test_before_the_first_placement_there_is_epoch_0_without_groups():
    assert (Epochs().newest.epoch, Epochs().newest.groups) == (0, ())


def test_each_change_is_a_new_epoch_and_no_change_is_none():
    epochs = Epochs()
    for groups, epoch in (((A, B), 1), ((A, B), 1), ((A,), 2), ((A, B), 3)):
        epochs.publish(groups)
        assert (epochs.newest.epoch, epochs.newest.groups) == (epoch, groups)


def test_a_placement_without_groups_is_published_too():
    epochs = Epochs()
    epochs.publish(())
    assert epochs.newest.epoch == 1


def test_who_has_an_older_epoch_gets_the_newest_at_once():
    epochs = Epochs()
    epochs.publish((A,))
    epochs.publish((A, B))
    assert after(epochs, 0, timeout_s=0) == epochs.newest


def test_who_has_the_newest_epoch_waits_in_vain():
    epochs = Epochs()
    epochs.publish((A,))
    assert after(epochs, 1, timeout_s=0.01) is None


def test_who_waits_is_woken_by_a_new_placement():
    epochs = Epochs()
    epochs.publish((A,))
    assert after(epochs, 1, timeout_s=10, meanwhile=lambda: epochs.publish((A, B))) == epochs.newest


def test_a_new_router_counts_on_from_what_its_engines_have():
    epochs = Epochs()  # of a router whose predecessor had come to epoch 7
    epochs.publish((A,))
    assert after(epochs, 7, timeout_s=0) is None
    epochs.publish((A,))  # nothing has changed, but nobody would take epoch 1
    assert epochs.newest.epoch == 8
    assert after(epochs, 7, timeout_s=0) == epochs.newest


def test_who_waits_for_a_first_placement_hears_that_none_will_come():
    epochs = Epochs()
    with pytest.raises(ValueError, match="the checkpoint is broken"):
        after(epochs, 0, timeout_s=10, meanwhile=lambda: epochs.fail("the checkpoint is broken"))


def test_a_placement_that_comes_after_all_takes_the_failure_back():
    epochs = Epochs()
    epochs.fail("the checkpoint is broken")
    epochs.publish((A,))
    assert after(epochs, 0, timeout_s=0) == epochs.newest
