"""How long a chunk may be, from what chunks took."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from remora_agent.runtime.estimate import Ahead, estimate
from remora_agent.runtime.pace import LEAST_CHUNK, Pace, Rates


def test_without_a_bound_a_chunk_is_as_long_as_allowed():
    assert Pace(256).chunk(float("inf")) == 256
    assert Pace(8).chunk(float("inf")) == 8


def test_before_anything_was_measured_a_bounded_chunk_is_the_least():
    assert Pace(256).chunk(0.25) == LEAST_CHUNK
    assert Pace(8).chunk(0.25) == 8


@given(st.floats(1e-5, 1e-1), st.floats(0, 0.1), st.floats(0.01, 2.0))
def test_chunk_and_step_stay_within_the_bound_whatever_the_engine(token_s, step_s, bound_s):
    pace = Pace(256)
    pace.step_took(step_s)
    for _ in range(20):
        size = pace.chunk(bound_s)
        most_s = max(bound_s, 2 * step_s * (step_s >= bound_s))
        assert size == LEAST_CHUNK or size * token_s + step_s <= most_s * (1 + 1e-6)
        pace.chunk_took(size, size * token_s)
    best = max((s for s in (16, 32, 64, 128, 256) if s * token_s + step_s <= most_s), default=16)
    assert size >= best // 2  # rounding at the edge aside, the largest that keeps the bound


def test_where_steps_alone_miss_the_bound_half_of_the_time_still_goes_to_prompts():
    pace = Pace(256)
    pace.step_took(0.6)
    for _ in range(10):
        pace.chunk_took(pace.chunk(0.25), pace.chunk(0.25) * 0.003)
    assert pace.chunk(0.25) == 128  # 0.384 s; 256 tokens would take longer than a step


def test_a_size_that_was_slow_once_is_tried_again_when_a_smaller_one_has_become_fast():
    pace = Pace(256)
    pace.chunk_took(256, 4.5)
    assert pace.chunk(0.25) == LEAST_CHUNK
    pace.chunk_took(16, 0.01)
    assert pace.chunk(0.25) == 256


def test_a_short_prompt_is_no_proof_that_long_chunks_are_fast():
    pace = Pace(256)
    pace.chunk_took(1, 0.01)
    assert pace.chunk(0.25) == LEAST_CHUNK


def test_chunks_get_smaller_while_a_context_grows_and_larger_once_the_engine_is_fast_again():
    pace, took = Pace(256), []
    for i in range(200):
        token_s = 0.001 * (1 + i / 20)
        size = pace.chunk(0.25)
        took.append(size * token_s)
        pace.chunk_took(size, took[-1])
    assert sum(t > 0.25 for t in took) <= 4  # one at each size that has become too large
    assert pace.chunk(0.25) == LEAST_CHUNK
    for _ in range(10):
        pace.chunk_took(pace.chunk(0.25), pace.chunk(0.25) * 0.0005)
    assert pace.chunk(0.25) == 256


def test_the_rest_of_a_cached_prompt_does_not_make_reading_look_slow():
    pace = Pace(256)
    pace.answered(10)
    pace.chunk_took(256, 0.256)
    for _ in range(3):
        pace.chunk_took(2, 0.03)  # as slow as one pass over the weights
    assert pace.rates.token_s < 0.003


RATES = Rates(token_s=0.01, step_s=0.1, answer_tokens=10, reused=0.0)


def test_a_free_row_means_no_wait_and_the_first_token_after_the_own_prompt():
    wait = estimate([], [], Ahead(50, 10), 2, RATES, 100)
    assert wait.row_s == 0 and abs(wait.first_token_s - 0.5) < 1e-9


def test_prompts_are_read_one_after_the_other_even_with_rows_free():
    before = [Ahead(100, 10)] * 3
    wait = estimate([], before, Ahead(100, 10), 8, RATES, 100)
    assert wait.row_s == 0 and wait.first_token_s >= 4.0


@given(
    st.lists(st.builds(Ahead, st.integers(0, 500), st.integers(1, 500)), max_size=4),
    st.lists(st.builds(Ahead, st.integers(1, 500), st.integers(1, 500)), max_size=12),
    st.builds(Ahead, st.integers(1, 500), st.integers(1, 500)),
)
def test_more_before_a_request_never_shortens_its_wait(running, before, own):
    waits = [estimate(running, before[:n], own, 4, RATES, 256) for n in range(len(before) + 1)]
    for less, more in itertools.pairwise(waits):
        assert more.row_s >= less.row_s and more.first_token_s >= less.first_token_s - 1e-9
