"""What an engine's ranks say together, and how long they wait for each other."""

import numpy as np

from cluster.actors.rank import DispatchReport, merged, step_timeout_s
from cluster.settings import ModelSettings
from router.dispatch import DispatchCounts


def test_an_engine_is_as_far_as_its_slowest_rank_and_has_sent_what_all_have():
    ahead = DispatchReport(7, np.array([[1, 2], [3, 4]]), DispatchCounts(failovers=1, rows_resent=20))
    behind = DispatchReport(6, np.array([[10, 0], [0, 10]]), DispatchCounts(failovers=2, rows_resent=3))
    report = merged([ahead, behind])
    assert report.epoch == 6
    assert report.load_LE.tolist() == [[11, 2], [3, 14]]
    assert report.counts == DispatchCounts(failovers=3, rows_resent=23)


def test_a_rank_waits_longer_for_one_that_may_wait_for_an_expert():
    assert step_timeout_s(ModelSettings("m", "c", tensor_parallel=2)) == 10
    waiting = ModelSettings("m", "c", tensor_parallel=2, expert_groups=2, expert_deadline_s=45)
    assert step_timeout_s(waiting) == 85
