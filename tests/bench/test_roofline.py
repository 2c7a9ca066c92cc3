"""Memory bandwidth by chip."""

from __future__ import annotations

import pytest

from lfm_mlx.bench.roofline import apple_bandwidth, measure_copy


@pytest.mark.parametrize(
    ("chip", "cores", "gb_per_s"),
    [
        ("Apple M1", 8, 68.25),
        ("Apple M2 Ultra", None, 800),
        ("Apple M3 Max", 30, 300),
        ("Apple M3 Max", 40, 400),
        ("Apple M4", None, 120),
        ("Apple M4 Pro", 20, 273),
        ("Apple M5 Max", 32, 460),
        ("Apple M5 Max", 40, 614),
    ],
)
def test_apple_chips_have_the_bandwidth_of_their_specification(chip: str, cores: int | None, gb_per_s: float) -> None:
    found = apple_bandwidth(chip, cores)
    assert found is not None
    assert found.gb_per_s == gb_per_s
    assert "Apple's specification" in found.source


def test_a_variant_that_is_not_known_is_called_the_largest() -> None:
    found = apple_bandwidth("Apple M4 Max", None)
    assert found is not None
    assert found.source.endswith("with the most cores")


@pytest.mark.parametrize("chip", ["Apple M17", "Apple M5 Giga", "Intel(R) Xeon(R)", "NVIDIA M40", ""])
def test_other_chips_are_measured(chip: str) -> None:
    found = apple_bandwidth(chip)
    assert found is None or found.gb_per_s == 153  # "M5 Giga" is still an M5


def test_copying_takes_time() -> None:
    assert 0 < measure_copy(1 << 20, repeats=2) < 100_000
