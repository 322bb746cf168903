"""The table of devices against their data sheets, and the files that a calibration writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ponder_scale.errors import ConfigError
from ponder_scale.planning.hardware import CPU, TABLE, hardware_of, peak_flops, read_hardware, write_hardware


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H20", None),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA A10", None),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H800", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", None),
        ("NVIDIA GB200", 2250),
        ("NVIDIA B200", 2250),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_device_is_known_by_its_name(name: str, teraflops: float | None) -> None:
    assert peak_flops(name) == (None if teraflops is None else teraflops * 1e12)


def test_the_devices_that_are_planned_for_are_as_their_data_sheets_say() -> None:
    """Dense bf16 operations a second, and memory: that of the A100 and the H100 in GiB, of later ones in GB."""
    assert {name: (row.peak("bf16"), row.memory_bytes) for name, row in TABLE.items()} == {
        "a100": (312e12, 85_899_345_920),
        "a100-40": (312e12, 42_949_672_960),
        "h100": (989e12, 85_899_345_920),
        "h200": (989e12, 141_000_000_000),
        "b200": (2250e12, 180_000_000_000),
        "l40s": (362e12, 51_539_607_552),
    }


def test_a_device_is_planned_for_by_its_own_name() -> None:
    assert hardware_of("NVIDIA H100 PCIe").peak("bf16") == 756e12
    assert hardware_of("NVIDIA H200 NVL").memory_bytes_per_second == TABLE["h200"].memory_bytes_per_second
    unknown = hardware_of("NVIDIA H20")
    assert unknown.name == "NVIDIA H20" and unknown.inside == TABLE["h100"].inside
    assert "data sheets" in unknown.source and "src/graph/tuning.cc" in unknown.source


def test_a_hardware_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    write_hardware(path, CPU)
    assert read_hardware(path) == CPU


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "other"}, "it is not a hardware file"),
        ({"product_share": 0}, "product_share is 0; expected a number above 0"),
        ({"memory_bytes": "much"}, "memory_bytes is 'much'"),
        ({"vocabulary_share": {"loss": 1}}, "vocabulary_share is {'loss': 1}"),
        ({"peak_flops": {"bf16": 1e9}}, "peak_flops is {'bf16': 1000000000.0}"),
        ({"inside": {}}, "inside is {}; expected a link"),
        ({"call_seconds": -1}, "call_seconds is -1"),
        ({"asynchronous": "no"}, "asynchronous is 'no'"),
        ({"surplus": 1}, "keys missing or unknown: surplus"),
    ],
)
def test_what_is_no_hardware_file_is_refused_with_the_command_that_makes_one(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    path = tmp_path / "machine.json"
    write_hardware(path, CPU)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError) as refused:
        read_hardware(path)
    text = str(refused.value)
    assert said in text and f"`ponder-scale plan --calibrate {path}`" in text and "\n" not in text


def test_a_hardware_file_that_is_not_there_or_no_json_is_refused(tmp_path: Path) -> None:
    for content in (None, "{"):
        path = tmp_path / "machine.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(ConfigError, match="cannot be read as a hardware file"):
            read_hardware(path)
