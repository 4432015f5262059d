"""What a scrape says, parsed by Prometheus' own parser."""

from __future__ import annotations

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from llmo.serve.gauge import Gauge
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


def test_the_gauge_knows_its_pace() -> None:
    gauge = Gauge()
    assert gauge.seconds_for(10) == 1.0
    gauge.ran([5] * 20, 0.5)
    assert gauge.seconds_for(80) == 2.0
    gauge.ended(0.25, answered=True)
    gauge.ended(9.0, answered=False)
    numbers = gauge.snapshot()
    assert (numbers["answered"], numbers["failed"], numbers["latency_seconds"]) == (1, 1, 0.25)
