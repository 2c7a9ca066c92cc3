"""What a report says about the machine."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

from lfm_mlx.bench.machine import backend, machine, read_gpu_cores


def test_gpu_cores_are_read_from_the_profile() -> None:
    profile = {"SPDisplaysDataType": [{"_name": "Apple M4 Max", "sppci_cores": "40"}, {"_name": "a display"}]}
    assert read_gpu_cores(json.dumps(profile)) == 40


@pytest.mark.parametrize("profile", ["", "[]", "{}", '{"SPDisplaysDataType": [{"sppci_cores": "many"}]}'])
def test_a_profile_that_says_nothing_gives_no_cores(profile: str) -> None:
    assert read_gpu_cores(profile) is None


def test_the_backend_is_the_one_of_the_default_device() -> None:
    with mx.stream(mx.cpu):
        assert backend() == "cpu"
    assert (backend() == "metal") == (mx.default_device().type == mx.gpu and mx.metal.is_available())
    assert machine()["backend"] == backend()
