"""The speeds of devices and links: one table, and files that `ponder-scale plan --calibrate` writes.

Sources:

    peaks, memory, PCIe     the makers' data sheets, dense
    large products          the share of the peak that they reach: the table of maximum achievable matrix products in
                            Stas Bekman's "Machine Learning Engineering" (A100 267.9, H100 and H200 794.5, B200 1,745
                            TFLOP/s)
    links inside a node     NVLink's rate in one direction, times the share that NCCL's rings reach (230 GB/s of 300 on
                            an A100, in proportion on the others)
    links between nodes     nine tenths of one adapter for each device: 200 Gbit/s in a DGX A100, 400 in later ones
    latencies               those by which NCCL itself chooses its ring (src/graph/tuning.cc: 8.4 us a call, 3.4 us a
                            step over NVLink, 14 us over a network)

Three figures have no source and are our judgement: the shares of attention, the shares of the vocabulary's products,
and the host's time for a call. If you have the device, calibrate.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ponder_scale.errors import ConfigError
from ponder_scale.files.write import write_whole

GIB = 2**30
FORMAT = "ponder-scale hardware 1"
VOCABULARY_WAYS = ("mixture", "tied", "loss", "top_k")
COLLECTIVES = ("all_gather", "all_reduce", "reduce_scatter")
SOURCES = (
    "peaks and bandwidths: the makers' data sheets; large products: github.com/stas00/ml-engineering, "
    "compute/accelerator/README.md; latencies: NCCL, src/graph/tuning.cc; the rest: our judgement"
)


@dataclass(frozen=True)
class Link:
    """A link between ranks. A collective over n ranks takes `start + (n - 1) * hop` and the time of its bytes."""

    bytes_per_second: Mapping[str, float]  # by collective: rate at which a rank sends in one direction
    start_seconds: float
    hop_seconds: float


@dataclass(frozen=True)
class Hardware:
    """A device and its links. Shares are shares of the peak."""

    name: str
    peak_flops: Mapping[str, float]  # dense, by precision
    memory_bytes: float
    memory_bytes_per_second: float
    inside: Link  # inside a node
    between: Link  # between nodes; its rate is that of one device's adapter
    host_bytes_per_second: float  # to and from the host's memory, over PCIe
    host_optimizer_bytes_per_second: float  # rate of an optimizer that runs on the host
    product_share: float
    product_edge: float = 0.0  # makes a product slower by the factor 1 + edge * (1/m + 1/n + 1/k)
    attention_share: float = 0.5
    vocabulary_share: Mapping[str, float] = field(default_factory=dict)  # of products with the vocabulary, by way
    costly_per_second: float = math.inf  # exponentials and other costly functions
    optimizer_bytes_per_second: float = math.inf  # of the update, and of gradients into buckets
    call_seconds: float = 0.0  # time that the host needs to start an operation
    asynchronous: bool = True  # the host runs ahead of the device, and links work while it computes
    source: str = SOURCES

    def peak(self, precision: str) -> float:
        """The dense FLOP/s in the precision of a run."""
        return self.peak_flops.get(precision, self.peak_flops["fp32"])


def _gpu(
    name: str,
    *,
    bf16: float,
    fp32: float,
    memory: float,
    bandwidth: float,
    reached: float,
    nvlink: float,
    network: float,
    pcie: float,
) -> Hardware:
    """A row of the table. Large products reach `reached`. Figures that are no arguments are the module's judgement."""
    same = dict.fromkeys(COLLECTIVES, 1.0)
    return Hardware(
        name=name,
        peak_flops={"bf16": bf16, "fp32": fp32},
        memory_bytes=memory,
        memory_bytes_per_second=0.85 * bandwidth,
        inside=Link(dict.fromkeys(same, nvlink), 8.4e-6, 3.4e-6),
        between=Link(dict.fromkeys(same, 0.9 * network), 8.4e-6, 14e-6),
        host_bytes_per_second=0.8 * pcie,
        host_optimizer_bytes_per_second=100e9,
        product_share=reached,
        product_edge=128.0,  # the cost of a tile that is not full
        attention_share=0.5 * reached,
        vocabulary_share=dict.fromkeys(VOCABULARY_WAYS, 0.6 * reached),
        costly_per_second=bf16 / 256,  # a processor of an H100 does 16 a clock, and 4,096 operations in bf16
        optimizer_bytes_per_second=0.85 * bandwidth,
        call_seconds=8e-6,
    )


TABLE = {
    hardware.name: hardware
    for hardware in (
        _gpu(
            "a100", bf16=312e12, fp32=19.5e12, memory=80 * GIB, bandwidth=2.039e12, reached=0.859,
            nvlink=230e9, network=25e9, pcie=32e9,
        ),
        _gpu(
            "a100-40", bf16=312e12, fp32=19.5e12, memory=40 * GIB, bandwidth=1.555e12, reached=0.859,
            nvlink=230e9, network=25e9, pcie=32e9,
        ),
        _gpu(
            "h100", bf16=989e12, fp32=67e12, memory=80 * GIB, bandwidth=3.35e12, reached=0.803,
            nvlink=345e9, network=50e9, pcie=64e9,
        ),
        _gpu(
            "h200", bf16=989e12, fp32=67e12, memory=141e9, bandwidth=4.8e12, reached=0.803,
            nvlink=345e9, network=50e9, pcie=64e9,
        ),
        _gpu(
            "b200", bf16=2250e12, fp32=80e12, memory=180e9, bandwidth=8e12, reached=0.776,
            nvlink=690e9, network=50e9, pcie=64e9,
        ),
        _gpu(  # no NVLink: PCIe inside a node
            "l40s", bf16=362e12, fp32=91.6e12, memory=48 * GIB, bandwidth=0.864e12, reached=0.75,
            nvlink=20e9, network=25e9, pcie=32e9,
        ),
    )
}  # fmt: skip

# One core of a server that is some years old, for runs without GPUs on a machine that was not calibrated.
CPU = Hardware(
    name="cpu",
    peak_flops={"bf16": 60e9, "fp32": 60e9},
    memory_bytes=16 * GIB,
    memory_bytes_per_second=6e9,
    inside=Link(dict.fromkeys(COLLECTIVES, 1e9), 150e-6, 150e-6),
    between=Link(dict.fromkeys(COLLECTIVES, 1e9), 300e-6, 300e-6),
    host_bytes_per_second=6e9,
    host_optimizer_bytes_per_second=6e9,
    product_share=1.0,
    product_edge=16.0,
    attention_share=0.5,
    vocabulary_share=dict.fromkeys(VOCABULARY_WAYS, 0.7),
    costly_per_second=3e8,
    optimizer_bytes_per_second=6e9,
    call_seconds=8e-6,
    asynchronous=False,
    source="no measurement; make one with `ponder-scale plan --calibrate FILE`",
)

# Key: part of the name that torch gives a device, and the first match counts. Value: dense bf16 FLOP/s, and the row of
# the table.
NAMES: dict[str, tuple[float, str]] = {
    r"H100 PCIE": (756e12, "h100"),
    r"H100 NVL": (835e12, "h100"),
    r"H200 NVL": (835e12, "h200"),
    r"\bG?H200\b": (989e12, "h200"),
    r"\bG?H(100|800)\b": (989e12, "h100"),
    r"\bG?B200\b": (2250e12, "b200"),
    r"\bA[18]00\b.*40GB": (312e12, "a100-40"),
    r"\bA[18]00\b": (312e12, "a100"),
    r"\bL40S\b": (362e12, "l40s"),
}


def peak_flops(device_name: str) -> float | None:
    """The dense bf16 FLOP/s of a device by its name in torch ("NVIDIA H100 80GB HBM3"). None if it is not known.

    MFU is `step_flops(...).model / (seconds * devices * peak_flops(name))`. HFU uses `.hardware` in place of `.model`.
    """
    found = _by_name(device_name)
    return None if found is None else found[0]


def hardware_of(device_name: str) -> Hardware:
    """The row for a device by its name in torch, with its own peak. An unknown GPU gets the row of an H100."""
    found = _by_name(device_name)
    if found is None:
        return replace(TABLE["h100"], name=device_name)
    peak, row = found
    return replace(TABLE[row], name=device_name, peak_flops={**TABLE[row].peak_flops, "bf16": peak})


def _by_name(device_name: str) -> tuple[float, str] | None:
    return next((row for part, row in NAMES.items() if re.search(part, device_name.upper())), None)


def write_hardware(path: Path, hardware: Hardware) -> None:
    """Write measured hardware to a file for `read_hardware`."""
    write_whole(path, json.dumps({"format": FORMAT, **asdict(hardware)}, indent=2) + "\n")


def read_hardware(path: Path) -> Hardware:
    """Read the hardware that `ponder-scale plan --calibrate` wrote.

    Raises:
        ConfigError: it is not such a file.
    """
    remedy = f"write it with `ponder-scale plan --calibrate {path}`"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as a hardware file: {error}; {remedy}") from error
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise ConfigError(f'{path}: it is not a hardware file; expected "format": "{FORMAT}"; {remedy}')
    known = {entry.name for entry in fields(Hardware)}
    if values.keys() != known:
        wrong = ", ".join(sorted(values.keys() ^ known))
        raise ConfigError(f"{path}: keys missing or unknown: {wrong}; {remedy}")
    for name in ("inside", "between"):
        values[name] = _checked_link(path, name, values[name], remedy)
    for name, value in values.items():
        if name in ("peak_flops", "vocabulary_share"):
            wanted = {"fp32"} if name == "peak_flops" else set(VOCABULARY_WAYS)
            right = isinstance(value, dict) and wanted <= value.keys() and all(map(_is_rate, value.values()))
            expected = "numbers above 0 for " + ", ".join(sorted(wanted))
        elif name in ("name", "source"):
            right, expected = isinstance(value, str), "text"
        elif name == "asynchronous":
            right, expected = isinstance(value, bool), "true or false"
        elif name in ("product_edge", "call_seconds"):
            right, expected = _is_rate(value) or value == 0, "a number, at least 0"
        else:
            right, expected = isinstance(value, Link) or _is_rate(value), "a number above 0"
        if not right:
            raise ConfigError(f"{path}: {name} is {value!r}; expected {expected}; {remedy}")
    return Hardware(**values)


def _checked_link(path: Path, name: str, values: Any, remedy: str) -> Link:
    whole = isinstance(values, dict) and values.keys() == {entry.name for entry in fields(Link)}
    rates = values["bytes_per_second"] if whole else None
    if not isinstance(rates, dict) or rates.keys() != set(COLLECTIVES) or not all(map(_is_rate, rates.values())):
        raise ConfigError(f"{path}: {name} is {values!r}; expected a link with a rate for each collective; {remedy}")
    return Link(**values)


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
