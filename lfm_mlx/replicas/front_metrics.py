"""What the front counts, and the counters of all servers behind it in one text, for Prometheus."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from lfm_mlx.replicas.fleet import Fleet
from lfm_mlx.replicas.prompt_trace import PromptTrace
from lfm_mlx.replicas.replica import Replica
from lfm_mlx.server.metrics import PREFIX


class FrontMetrics:
    """The counters of one front.

    Args:
        fleet: the servers behind it.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(_Gauges(fleet))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"{PREFIX}router_{name}", text, labels, registry=self._registry)

        self._http = Counter(
            "http_requests", "HTTP requests.", ["method", "handler", "status"], registry=self._registry
        )
        self._requests = counter("requests", "Requests that were sent to a server.", "replica")
        self._retries = counter("retries", "Requests that a server did not answer and another one got.", "replica")
        self._lost = counter("lost_streams", "Answers that broke off because the server was gone.", "replica")
        self._chars = counter("prompt_chars", "Characters of prompts.")
        self._matched = counter("prompt_chars_matched", "Of these, sent to a server that had got them before.")

    def count_http(self, method: str, handler: str, status: int) -> None:
        """Note a request that was answered."""
        self._http.labels(method, handler, str(status)).inc()

    def count_request(self, replica: Replica, trace: PromptTrace, matched_chars: int) -> None:
        """Note a request that is sent to a server.

        Args:
            replica: the server.
            trace: of the prompt.
            matched_chars: of the prompt, sent there before.
        """
        self._requests.labels(replica.name).inc()
        self._chars.inc(trace.num_chars)
        self._matched.inc(matched_chars)

    def count_retry(self, name: str) -> None:
        """Note a request that a server did not answer."""
        self._retries.labels(name).inc()

    def count_lost(self, name: str) -> None:
        """Note an answer that broke off."""
        self._lost.labels(name).inc()

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)


class _Gauges(Collector):
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> list[Metric]:
        open_ = GaugeMetricFamily(f"{PREFIX}router_open_requests", "Requests that wait there.", labels=["replica"])
        ready = GaugeMetricFamily(f"{PREFIX}router_replica_ready", "1 where requests are sent.", labels=["replica"])
        for replica in self._fleet.replicas:
            open_.add_metric([replica.name], replica.num_open)
            ready.add_metric([replica.name], replica.is_ready)
        return [open_, ready]


def join_metrics(own: str, others: Mapping[str, str]) -> bytes:
    """Several texts of metrics as one.

    Args:
        own: goes in as it is.
        others: texts by the name of their server, which becomes the label `replica`.
    """
    families: dict[str, Metric] = {}
    for name, text in [(None, own), *others.items()]:
        for family in text_string_to_metric_families(text):
            joined = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                labels = sample.labels if name is None else {**sample.labels, "replica": name}
                joined.samples.append(sample._replace(labels=labels))
    registry = CollectorRegistry()
    registry.register(_Families(list(families.values())))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families
