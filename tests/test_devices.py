"""The table of devices: known names, formats that exist, and the device that this machine is."""

import platform
from types import SimpleNamespace

import pytest
import torch

from qcompile.backends import devices
from qcompile.backends.devices import DEVICES, cpu_features, nearest_below, this_device
from qcompile.formats import FORMATS
from qcompile.spec import SCALES


def test_devices_multiply_formats_that_exist() -> None:
    for device in DEVICES.values():
        for written in device.multiplies:
            fmt, _, scale = written.partition("/")
            assert fmt in FORMATS, device.name
            assert not scale or scale in SCALES, device.name


@pytest.mark.parametrize(
    ("capability", "name"),
    [(61, "sm_75"), (75, "sm_75"), (87, "sm_86"), (90, "sm_90"), (103, "sm_100"), (121, "sm_120")],
)
def test_an_unknown_capability_counts_as_the_nearest_below(capability: int, name: str) -> None:
    assert nearest_below(capability) == name


@pytest.mark.parametrize(
    ("features", "name"),
    [
        ({"sse2"}, "cpu"),
        ({"avx2"}, "cpu_avx2"),
        ({"avx2", "avx_vnni"}, "cpu_avx_vnni"),
        ({"avx2", "avx512_f"}, "cpu_avx512"),
        ({"avx2", "avx512_f", "avx512_vnni"}, "cpu_vnni"),
        ({"avx2", "avx512_f", "avx512_vnni", "avx512_bf16"}, "cpu_vnni_bf16"),
        ({"avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"}, "cpu_amx"),
        ({"neon"}, "cpu_neon"),
        ({"neon", "i8mm"}, "cpu_i8mm"),
    ],
)
def test_a_cpu_is_the_ablest_kind_that_its_features_allow(
    features: set[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "cpu_features", lambda: frozenset(features))
    assert this_device("cpu") is DEVICES[name]


def test_an_older_torch_is_asked_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    older = SimpleNamespace(_is_avx2_supported=lambda: True, _is_vnni_supported=lambda: True)
    monkeypatch.setattr(torch, "cpu", older)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert cpu_features() == {"avx2", "avx512_vnni"}


def test_a_device_that_the_table_lacks_multiplies_nothing() -> None:
    unknown = this_device("meta")
    assert (unknown.name, unknown.multiplies) == ("meta", ())
