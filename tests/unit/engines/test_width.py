"""How wide a replica runs: by what was measured, for the cores that it has."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from llmo.engines.width import STREAMS, Width, choose


def rows(threads: int, speeds: Mapping[int, float]) -> list[dict[str, float]]:
    return [{"threads": threads, "streams": n, "tokens_per_second": speed} for n, speed in speeds.items()]


ONE = rows(1, {1: 140, 8: 500, 16: 510, 32: 505})
TWO = rows(2, {1: 210, 8: 770, 16: 850, 32: 900})


@pytest.mark.parametrize(
    ("measured", "cores", "expected"),
    [
        (ONE + TWO, 1, Width(8, 1)),  # within 5% of the best: more would only be slower each
        (ONE + TWO, 2, Width(32, 2)),
        (ONE + TWO, 8, Width(32, 8)),  # nobody knows that eight would be worse
        (
            rows(2, {1: 200, 8: 800}) + rows(4, {1: 150, 8: 810}),
            4,
            Width(8, 2),
        ),  # they stand in each other's way
        (rows(2, {1: 200, 8: 700}) + rows(4, {1: 190, 8: 900}), 4, Width(8, 4)),
        (TWO, 1, Width(STREAMS, 1)),
        ([], 3, Width(STREAMS, 3)),
    ],
)
def test_the_fewest_streams_on_the_threads_that_help(
    measured: list[dict[str, float]], cores: int, expected: Width
) -> None:
    assert choose(measured, cores) == expected
