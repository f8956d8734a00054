"""Work done ahead comes in order, no further ahead than it may, and its errors where its result would have been."""

import threading

import pytest

from fusion_ray.workers.ahead import ahead


def test_results_come_in_order_and_a_few_are_made_before_they_are_asked_for() -> None:
    made: list[int] = []
    two = threading.Event()

    def make(number: int) -> int:
        assert threading.current_thread() is not threading.main_thread()
        made.append(number)
        if number == 2:
            two.set()
        return number * number

    found = ahead(make, iter(range(10)))
    assert next(found) == 0
    assert two.wait(10)  # while 0 is in hand
    assert made == [0, 1, 2]
    assert list(found) == [number * number for number in range(1, 10)]


def test_an_error_is_raised_in_its_place() -> None:
    found = ahead(lambda number: 1 // (2 - number), range(5))
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_closing_it_ends_its_thread() -> None:
    found = ahead(str, range(1000))
    next(found)
    found.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
    assert list(ahead(str, [])) == []
