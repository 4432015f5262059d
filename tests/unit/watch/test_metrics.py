"""What a scrape says, parsed by Prometheus' own parser."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llmo.serve.gauge import Gauge
from llmo.serve.paces import Paces
from llmo.watch.metrics import Metrics


def samples(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def stats(gauge: Gauge, **more: Any) -> dict[str, Any]:
    return {"queue": 3, "queue_limit": 10, "in_flight": 2, **gauge.snapshot(), **more}


def test_requests_are_counted_by_endpoint_and_status() -> None:
    metrics = Metrics()
    for status in (200, 200, 429):
        metrics.began()
        metrics.seen("topics", status, 0.02)
    metrics.began()
    found = samples(metrics.text({}, {}))
    assert found["llmo_requests_total", (("endpoint", "topics"), ("status", "200"))] == 2
    assert found["llmo_requests_total", (("endpoint", "topics"), ("status", "429"))] == 1
    assert found["llmo_request_seconds_count", (("endpoint", "topics"),)] == 2
    assert found["llmo_request_seconds_bucket", (("endpoint", "topics"), ("le", "0.01"))] == 0
    assert found["llmo_request_seconds_bucket", (("endpoint", "topics"), ("le", "0.025"))] == 2
    assert found["llmo_open_requests", ()] == 1


def test_replicas_are_summed_and_jobs_shown() -> None:
    one, two = Gauge(), Gauge()
    one.ran([5, 10], 0.1)
    two.ran([7], 0.1)
    two.ran([1] * 200, 0.1)
    found = samples(Metrics().text({"topics": [stats(one), stats(two)], "down": []}, {"running": 4}))
    at = (("endpoint", "topics"),)
    assert found["llmo_replicas", at] == 2
    assert found["llmo_replicas", (("endpoint", "down"),)] == 0
    assert found["llmo_queue_texts", at] == 6
    assert found["llmo_texts_total", at] == 203
    assert found["llmo_tokens_total", at] == 222
    assert found["llmo_padded_tokens_total", at] == 227
    assert found["llmo_batch_texts_bucket", (*at, ("le", "1"))] == 1
    assert found["llmo_batch_texts_bucket", (*at, ("le", "2"))] == 2
    assert found["llmo_batch_texts_bucket", (*at, ("le", "128"))] == 2
    assert found["llmo_batch_texts_count", at] == 3
    assert found["llmo_jobs", (("state", "running"),)] == 4


def test_replicas_that_generate_have_numbers_of_their_own() -> None:
    one, two = Paces(), Paces()
    one.began(prompt_tokens=100, cached=64, seconds=0.03)
    one.stepped(tokens=4, finished=0, seconds=0.1)
    two.began(prompt_tokens=10, cached=0, seconds=40.0)
    two.ended("cancelled")
    both = [{**paces.snapshot(), "queue": 1, "streams": 2, "engine_free_tokens": 50} for paces in (one, two)]
    found = samples(Metrics().text({"chat": both, "topics": [stats(Gauge())]}, {}))
    at = (("endpoint", "chat"),)
    assert found["llmo_streams", at] == 4
    assert found["llmo_queue_texts", at] == 2
    assert found["llmo_cache_free_tokens", at] == 100
    assert found["llmo_prompt_tokens_total", at] == 110
    assert found["llmo_prompt_cached_tokens_total", at] == 64
    assert found["llmo_completion_tokens_total", at] == 4
    assert found["llmo_generated_tokens_per_second", at] == 40
    assert found["llmo_cancelled_requests_total", at] == 1
    assert found["llmo_first_token_seconds_bucket", (*at, ("le", "0.025"))] == 0
    assert found["llmo_first_token_seconds_bucket", (*at, ("le", "0.05"))] == 1
    assert found["llmo_first_token_seconds_bucket", (*at, ("le", "+Inf"))] == 2
    assert found["llmo_first_token_seconds_sum", at] == pytest.approx(40.03)
    assert ("llmo_streams", (("endpoint", "topics"),)) not in found
    assert ("llmo_batch_texts_count", at) not in found


def test_the_paces_say_how_long_prompts_take() -> None:
    paces = Paces()
    assert paces.seconds_for(10) == 1.0
    for _ in range(4):
        paces.stepped(tokens=2, finished=0, seconds=0.25)
    paces.stepped(tokens=2, finished=2, seconds=1.0)
    assert paces.seconds_for(10) == 10.0


def test_the_gauge_knows_its_pace() -> None:
    gauge = Gauge()
    assert gauge.seconds_for(10) == 1.0
    gauge.ran([5] * 20, 0.5)
    assert gauge.seconds_for(80) == 2.0
    gauge.ended(0.25, answered=True)
    gauge.ended(9.0, answered=False)
    numbers = gauge.snapshot()
    assert (numbers["answered"], numbers["failed"], numbers["latency_seconds"]) == (1, 1, 0.25)
