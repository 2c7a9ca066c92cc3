"""What the server counts, for Prometheus; names are vLLM's with another prefix."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lfm_mlx.chat import Usage

Read = Callable[[], dict[str, tuple[str, float]]]
"""Text and number by name."""

PREFIX = "lfm_mlx:"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_TOKENS = (1, 10, 50, 100, 500, 1000, 2000, 5000, 10_000, 30_000, 60_000, 128_000)


class Metrics:
    """The counters of one server."""

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        # Resident memory, open files, processor time; on Linux only, elsewhere it shows nothing.
        ProcessCollector(registry=self._registry)
        self._model_name = model_name

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, ["model_name", *labels], registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(PREFIX + name, text, ["model_name"], buckets=buckets, registry=self._registry)
            return made.labels(model_name)

        self._http = Counter(
            "http_requests", "HTTP requests.", ["method", "handler", "status"], registry=self._registry
        )
        self._prompt = counter("prompt_tokens", "Prompt tokens.").labels(model_name)
        self._cached = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.").labels(model_name)
        self._queried = counter("prefix_cache_queries", "Prompt tokens looked up there.").labels(model_name)
        self._generated = counter("generation_tokens", "Generated tokens.").labels(model_name)
        self._ended = counter("request_success", "Answers that ended.", "finished_reason")
        self._first = histogram("time_to_first_token_seconds", "Request to first token.", _SECONDS)
        self._between = histogram("inter_token_latency_seconds", "Between two tokens.", _STEP_SECONDS)
        self._mean = histogram(
            "request_time_per_output_token_seconds", "Between two tokens, mean of an answer.", _STEP_SECONDS
        )
        self._whole = histogram("e2e_request_latency_seconds", "Request to end.", _SECONDS)
        self._prompt_sizes = histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._answer_sizes = histogram("request_generation_tokens", "Generated tokens of an answer.", _TOKENS)

    def show(self, gauges: Read, totals: Read) -> None:
        """Show values that are read when they are asked for."""
        self._registry.register(_Gauges(gauges, totals, self._model_name))

    def count_http(self, method: str, handler: str, status: int) -> None:
        """Note a request that was answered."""
        self._http.labels(method, handler, str(status)).inc()

    def count_answer(self, usage: Usage, reason: str, *, first_s: float | None, whole_s: float) -> None:
        """Note an answer that ended.

        Args:
            usage: its tokens.
            reason: why it ended.
            first_s: seconds to its first token; None where there was none.
            whole_s: seconds to its end.
        """
        self._prompt.inc(usage.prompt_tokens)
        self._queried.inc(usage.prompt_tokens)
        self._cached.inc(usage.cached_tokens)
        self._generated.inc(usage.completion_tokens)
        self._ended.labels(self._model_name, reason).inc()
        self._prompt_sizes.observe(usage.prompt_tokens)
        self._answer_sizes.observe(usage.completion_tokens)
        self._whole.observe(whole_s)
        if first_s is not None:
            self._first.observe(first_s)
            if usage.completion_tokens > 1:
                self._mean.observe((whole_s - first_s) / (usage.completion_tokens - 1))

    def count_tokens(self, num_tokens: int, seconds: float) -> None:
        """Note tokens that came so many seconds after the ones before; of several at once, each took its part."""
        for _ in range(num_tokens):
            self._between.observe(seconds / num_tokens)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)


class _Gauges(Collector):
    def __init__(self, gauges: Read, totals: Read, model_name: str) -> None:
        self._gauges = gauges
        self._totals = totals
        self._model_name = model_name

    def collect(self) -> list[Metric]:
        families: list[Metric] = []
        for read, kind in ((self._gauges, GaugeMetricFamily), (self._totals, CounterMetricFamily)):
            for name, (text, value) in read().items():
                family = kind(PREFIX + name, text, labels=["model_name"])
                family.add_metric([self._model_name], value)
                families.append(family)
        return families
