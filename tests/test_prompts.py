"""Prompts built ahead of time: their order, the one place that catches a bad clip, and batches by tokens."""
import threading

import pytest

from minixmd.inputs.media import MediaError
from minixmd.inputs.prompts import batch_by_tokens, prefetch


def read(number, load=None):
    """Stands for reading a clip: every third one cannot be used."""
    if number % 3 == 2:
        raise MediaError(f"{number}.wav", "missing")
    return number * 10


def test_results_come_in_order_and_a_bad_clips_place_is_taken_by_what_on_bad_returns():
    bad = []

    def on_bad(item, error):
        bad.append((item, error.reason))
        return -item

    assert list(prefetch(read, range(50), on_bad)) == [-i if i % 3 == 2 else 10 * i for i in range(50)]
    assert bad == [(i, "missing") for i in range(2, 50, 3)]
    assert list(prefetch(read, [], on_bad)) == []


def test_on_bad_is_called_by_the_consumer_in_order_and_not_by_a_worker():
    threads = []
    list(prefetch(read, range(9), lambda item, error: threads.append(threading.current_thread())))
    assert threads == [threading.current_thread()] * 3


def test_no_more_than_ahead_items_are_taken_early():
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i

    results = prefetch(lambda i, load: i, items(), None, ahead=4)
    for i in range(10):
        assert next(results) == i and len(taken) <= i + 1 + 4 + 1
    results.close()
    assert len(taken) < 20


def test_any_other_exception_propagates_in_its_place():
    def fail(number, load):
        if number == 5:
            raise ValueError("example 'five': no such field")
        return read(number)

    seen = []
    with pytest.raises(ValueError, match="example 'five'"):
        for result in prefetch(fail, range(50), lambda item, error: None):
            seen.append(result)
    assert seen == [0, 10, None, 30, 40]


def test_a_media_error_that_the_function_did_not_raise_is_not_caught():
    def items():
        yield 0
        raise MediaError("list.wav", "missing")

    def on_bad(item, error):
        raise MediaError("again.wav", "missing") from error

    with pytest.raises(MediaError, match="list.wav"):
        list(prefetch(read, items(), on_bad))
    with pytest.raises(MediaError, match="again.wav"):
        list(prefetch(read, range(9), on_bad))
    with pytest.raises(MediaError, match="mine.wav"):
        for _ in prefetch(read, range(9), lambda item, error: None):
            raise MediaError("mine.wav", "missing")  # of whoever reads the results


def test_batches_hold_at_most_so_many_tokens_and_a_longer_prompt_goes_alone():
    pairs = [(i, "x" * length) for i, length in enumerate([3, 3, 4, 1, 12, 5, 5, 1])]
    runs = [[i for i, _ in run] for run in batch_by_tokens(pairs, 10)]
    assert runs == [[0, 1, 2], [3], [4], [5, 6], [7]]
    assert list(batch_by_tokens([], 10)) == []
