from router.engine_epochs import ENGINE_TTL_S, EngineEpochs

LATER_S = ENGINE_TTL_S  # when an engine that nobody has heard of would have reported


def test_at_first_any_engine_may_use_anything():
    epochs = EngineEpochs(now_s=0.0)
    assert not epochs.all_use(1, LATER_S - 0.1)
    assert epochs.all_use(1, LATER_S)


def test_an_engine_that_uses_an_older_epoch_is_waited_for():
    epochs = EngineEpochs(now_s=0.0)
    epochs.saw("a", 2, LATER_S)
    epochs.saw("b", 1, LATER_S)
    assert not epochs.all_use(2, LATER_S)
    epochs.saw("b", 2, LATER_S)
    assert epochs.all_use(2, LATER_S)


def test_an_engine_that_uses_the_epoch_of_an_earlier_router_is_waited_for():
    epochs = EngineEpochs(now_s=0.0)
    epochs.saw("a", 7, LATER_S)
    assert not epochs.all_use(0, LATER_S)


def test_an_engine_that_has_said_nothing_for_long_uses_nothing():
    epochs = EngineEpochs(now_s=0.0)
    epochs.saw("a", 1, 0.0)
    assert epochs.all_use(2, ENGINE_TTL_S + 0.1)
