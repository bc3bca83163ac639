import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.step import Chunk, StepBatch
from shards.step_wire import decode_step, encode_step

numbers = st.integers(0, 2**32 - 1)
chunks = st.builds(
    Chunk, st.lists(numbers).map(tuple), numbers, st.lists(numbers, max_size=5).map(tuple), st.booleans()
)
steps = st.lists(chunks, max_size=5).map(tuple).map(StepBatch)


@given(steps)
def test_a_step_survives_its_journey(sent):
    assert decode_step(encode_step(sent)) == sent


def test_a_step_may_be_read_from_a_links_buffer():
    sent = StepBatch((Chunk((7, 8), 30, (1, 5), True), Chunk((9,), 0, (2,), False)))
    assert decode_step(memoryview(encode_step(sent))) == sent


@given(steps, st.binary(max_size=30))
def test_what_is_no_step_is_a_value_error_or_another_step(sent, behind):
    damaged = encode_step(sent) + behind
    try:
        received = decode_step(damaged)
    except ValueError:
        return
    assert encode_step(received) == damaged


def test_a_step_that_ends_within_a_chunk_is_refused():
    whole = encode_step(StepBatch((Chunk((7, 8), 30, (1, 5), True),)))
    for num_bytes in (4, 12, 16, len(whole) - 4):
        with pytest.raises(ValueError, match="not a step"):
            decode_step(whole[:num_bytes])
