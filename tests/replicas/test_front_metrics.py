"""The counters of all servers in one text."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from lfm_mlx.replicas.front_metrics import join_metrics

TEXT = """# HELP a_total Counts.
# TYPE a_total counter
a_total{kind="x"} 2.0
# HELP b Shows.
# TYPE b gauge
b 5.0
# HELP c Sizes.
# TYPE c histogram
c_bucket{le="1.0"} 1.0
c_bucket{le="+Inf"} 3.0
c_count 3.0
c_sum 7.0
"""


def test_every_sample_gets_the_name_of_its_server() -> None:
    own = "# HELP b Shows.\n# TYPE b gauge\nb 9.0\n"
    joined = join_metrics(own, {"mac1:80": TEXT, "mac2:80": TEXT.replace("2.0", "4.0")}).decode()
    assert 'a_total{kind="x",replica="mac1:80"} 2.0' in joined
    assert 'a_total{kind="x",replica="mac2:80"} 4.0' in joined
    assert "\nb 9.0" in joined
    assert 'b{replica="mac2:80"} 5.0' in joined
    assert 'c_bucket{le="+Inf",replica="mac1:80"} 3.0' in joined
    families = list(text_string_to_metric_families(joined))
    names = [family.name for family in families]
    assert sorted(names) == ["a", "b", "c"], "each name is declared once"
    assert sum(len(family.samples) for family in families) == 1 + 2 * 6
