"""Prometheus metrics of the gateway, and of replicas and jobs as they are when somebody asks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_WAKE = (0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BATCH = ("1", "2", "4", "8", "16", "32", "64", "128", "+Inf")
_FIRST_TOKEN = ("0.025", "0.05", "0.1", "0.25", "0.5", "1.0", "2.5", "5.0", "10.0", "30.0", "+Inf")
# Encoders' replicas and those that generate have numbers of their own; an endpoint is shown where it has them.
_GAUGES = {
    "queue": ("llmo_queue_texts", "texts or prompts that wait in the replicas"),
    "queue_limit": ("llmo_queue_limit_texts", "texts or prompts that may wait in the replicas"),
    "in_flight": ("llmo_in_flight_requests", "requests that the replicas have accepted and not answered"),
    "texts_per_second": ("llmo_texts_per_second", "texts a second while the engine runs, of late"),
    "queue_tokens": ("llmo_queue_tokens", "tokens of the prompts that wait in the replicas"),
    "streams": ("llmo_streams", "answers being written"),
    "streams_limit": ("llmo_streams_limit", "answers that may be written at once"),
    "tokens_per_second": ("llmo_generated_tokens_per_second", "tokens written a second of the engine's, of late"),
    "engine_cache_tokens": ("llmo_cache_tokens", "tokens whose keys and values are kept"),
    "engine_free_tokens": ("llmo_cache_free_tokens", "tokens for whose keys and values there is room"),
}
_COUNTERS = {
    "texts": ("llmo_texts", "texts the engine has run"),
    "tokens": ("llmo_tokens", "tokens the engine has run, without padding"),
    "repeated": ("llmo_repeated_texts", "texts that were asked before and answered from memory"),
    "padded_tokens": ("llmo_padded_tokens", "tokens the engine has run, padding included"),
    "engine_seconds": ("llmo_engine_seconds", "seconds the engine has run"),
    "prompt_tokens": ("llmo_prompt_tokens", "tokens of the prompts that were answered"),
    "cached_tokens": ("llmo_prompt_cached_tokens", "of those, the ones that were found in the cache"),
    "completion_tokens": ("llmo_completion_tokens", "tokens written"),
    "engine_drafted": ("llmo_drafted_tokens", "tokens of answers that were guessed and computed"),
    "engine_accepted": ("llmo_accepted_tokens", "of those, the ones that were right"),
    "steps": ("llmo_steps", "steps of the engines that generate"),
    "cancelled": ("llmo_cancelled_requests", "requests whose client went before the answer was complete"),
}
ReplicaStats = Mapping[str, Sequence[Mapping[str, Any]]]


class Metrics:
    """One registry of its own. `seen` counts a request; `text` renders everything for a scrape."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter("llmo_requests", "predict requests", ["endpoint", "status"], registry=self._registry)
        self._seconds = Histogram(
            "llmo_request_seconds",
            "time from the request's headers to its answer",
            ["endpoint"],
            buckets=_LATENCY,
            registry=self._registry,
        )
        self._open = Gauge("llmo_open_requests", "predict requests being handled", registry=self._registry)
        self._wakes = Histogram(
            "llmo_wake_seconds",
            "time from the first request to an endpoint that was asleep until it was up",
            ["endpoint"],
            buckets=_WAKE,
            registry=self._registry,
        )
        self._counts: dict[tuple[str, int], Counter] = {}
        self._timers: dict[str, Histogram] = {}

    def began(self) -> None:
        self._open.inc()

    def seen(self, endpoint: str, status: int, seconds: float) -> None:
        """One request is over. `endpoint` must be a known name: callers must not be able to make up labels."""
        self._open.dec()
        counter = self._counts.get((endpoint, status))
        if counter is None:
            counter = self._counts[endpoint, status] = self._requests.labels(endpoint, str(status))
        counter.inc()
        if status == 200:
            timer = self._timers.get(endpoint)
            if timer is None:
                timer = self._timers[endpoint] = self._seconds.labels(endpoint)
            timer.observe(seconds)

    def woken(self, endpoint: str, seconds: float) -> None:
        """An endpoint that was asleep is up, so long after somebody asked for it."""
        self._wakes.labels(endpoint).observe(seconds)

    def text(self, replicas: ReplicaStats, jobs: Mapping[str, int]) -> bytes:
        """The scrape, in Prometheus' text format: the gateway's own numbers, the replicas' and the jobs'."""
        now = CollectorRegistry()
        now.register(_Now(replicas, jobs))
        return generate_latest(self._registry) + generate_latest(now)


class _Now(Collector):
    """Numbers that are read when asked for, summed over an endpoint's replicas."""

    def __init__(self, replicas: ReplicaStats, jobs: Mapping[str, int]) -> None:
        self._replicas = replicas
        self._jobs = jobs

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("llmo_replicas", "replicas that answer", labels=["endpoint"])
        for name, found in self._replicas.items():
            up.add_metric([name], len(found))
        yield up
        for key, (name, help_text) in _GAUGES.items():
            yield self._summed(GaugeMetricFamily(name, help_text, labels=["endpoint"]), key)
        for key, (name, help_text) in _COUNTERS.items():
            yield self._summed(CounterMetricFamily(name, help_text, labels=["endpoint"]), key)
        texts = HistogramMetricFamily("llmo_batch_texts", "texts in a batch", labels=["endpoint"])
        yield self._histogram(texts, _BATCH, "batch_sizes", "texts")
        first = HistogramMetricFamily(
            "llmo_first_token_seconds",
            "time from a prompt's arrival to its first token",
            labels=["endpoint"],
        )
        yield self._histogram(first, _FIRST_TOKEN, "first_tokens", "first_token_seconds")
        states = GaugeMetricFamily("llmo_jobs", "jobs by state", labels=["state"])
        for state, number in self._jobs.items():
            states.add_metric([state], number)
        yield states

    def _summed(self, family: Any, key: str) -> Metric:
        for name, found in self._replicas.items():
            values = [float(numbers[key]) for numbers in found if key in numbers]
            if values or not found:
                family.add_metric([name], sum(values))
        metric: Metric = family
        return metric

    def _histogram(self, family: HistogramMetricFamily, edges: Sequence[str], counts: str, total: str) -> Metric:
        for name, found in self._replicas.items():
            have = [numbers for numbers in found if counts in numbers]
            if have:
                column = [sum(one) for one in zip(*(numbers[counts] for numbers in have), strict=True)]
                whole = sum(float(numbers[total]) for numbers in have)
                family.add_metric([name], list(zip(edges, _running_sum(column), strict=True)), whole)
        return family


def _running_sum(counts: Iterable[int]) -> Iterator[float]:
    total = 0.0
    for number in counts:
        total += number
        yield total
