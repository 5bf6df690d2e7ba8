"""Projected decoding speed beside what others have measured: unified memory, and cards with experts in RAM behind them.

    python benchmarks/hybrid_projection.py [--json FILE]

Each row is a published figure with its rig; the interval is what `inspect --target` would say. Nothing is measured
here. Sizes of the models are computed from their published shapes and the bits of the file that was run. The second
table is DeepSeek-R1 pressed for machines that people own: experts kept, their type, where they lie, tokens per second.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from setting import RESULTS

from moepress.validation.speed.projection import Interval, Load, project, project_behind
from moepress.validation.speed.targets import fit, offload_options, target_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What a token reads of a model: `routed` and `rest` weights, and the bits that each of them takes in the file."""

    name: str
    layers: int
    routed: float
    rest: float
    routed_bits: float
    rest_bits: float
    cache_bytes: int
    dense: int = 0
    stored: float = 0

    def load(self) -> Load:
        away, near = self.routed * self.routed_bits / 8, self.rest * self.rest_bits / 8
        return Load(
            layers=self.layers,
            decode_bytes=round(near + away),
            prefill_bytes=0,
            flops_per_token=0,
            cache_bytes_per_token=self.cache_bytes,
            expert_layers=tuple(range(self.dense, self.layers)),
            routed_decode_bytes=round(away),
            routed_bytes=round(self.stored * self.routed_bits / 8),
        )


# Routed: layers x top-k x 3 x hidden x width. Rest: attention, shared and dense MLPs, head.
R1 = Model(
    name="DeepSeek-R1 Q4_K_M",
    layers=61,
    routed=58 * 8 * 3 * 7168 * 2048,
    rest=17.1e9,
    routed_bits=4.83,
    rest_bits=5.0,
    cache_bytes=61 * 576 * 2,
)
V3_SIX = Model(
    name="DeepSeek-V3-0324, 227 GiB, 6 experts a token",
    layers=61,
    routed=58 * 6 * 3 * 7168 * 2048,
    rest=17.1e9,
    routed_bits=8 * (227 * 2**30 - 17.1e9 * 8.5 / 8) / (58 * 256 * 3 * 7168 * 2048),
    rest_bits=8.5,
    cache_bytes=61 * 576 * 2,
    dense=3,
    stored=58 * 256 * 3 * 7168 * 2048,
)
OSS_120 = Model(
    name="gpt-oss-120b MXFP4",
    layers=36,
    stored=36 * 128 * 3 * 2880 * 2880,
    routed=36 * 4 * 3 * 2880 * 2880,
    rest=36 * 2880 * 9216 + 201_088 * 2880,
    routed_bits=4.25,
    rest_bits=8.5,
    cache_bytes=36 * 2 * 512 * 2,
)
OSS_20 = Model(
    name="gpt-oss-20b MXFP4",
    layers=24,
    routed=24 * 4 * 3 * 2880 * 2880,
    rest=24 * 2880 * 9216 + 201_088 * 2880,
    routed_bits=4.25,
    rest_bits=8.5,
    cache_bytes=24 * 2 * 512 * 2,
)
CODER = Model(
    name="Qwen3-Coder-30B Q8_0",
    layers=48,
    routed=48 * 8 * 3 * 2048 * 768,
    rest=48 * 2048 * 9216 + 151_936 * 2048,
    routed_bits=8.5,
    rest_bits=8.5,
    cache_bytes=48 * 2 * 512 * 2,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Someone's figure: tokens per second on a target, all routed experts in RAM or none unless the model says how many
    there are: then they lie where `inspect` would place them."""

    model: Model
    target: str
    rig: str
    measured: tuple[float, float]


PUBLISHED = (
    Published(
        model=R1,
        target="rtx-4090+ddr5-8ch-512",
        rig="RTX 4090, Xeon 6454S, 8 x DDR5-4800 (ktransformers)",
        measured=(8.73, 8.73),
    ),
    Published(
        model=V3_SIX,
        target="rtx-3090-ti+ddr5-96+nvme-5",
        rig="RTX 3090 Ti, 9950X, 96 GB DDR5, NVMe on PCIe 5.0 (ik_llama.cpp), more than",
        measured=(4.0, 4.0),
    ),
    Published(model=OSS_120, target="dgx-spark", rig="DGX Spark (llama.cpp)", measured=(59.0, 59.0)),
    Published(model=OSS_20, target="dgx-spark", rig="DGX Spark (llama.cpp)", measured=(84.1, 84.1)),
    Published(model=CODER, target="dgx-spark", rig="DGX Spark (llama.cpp)", measured=(60.9, 60.9)),
    Published(model=OSS_120, target="strix-halo-128gb", rig="Strix Halo (llama.cpp)", measured=(52.0, 52.0)),
    Published(model=OSS_120, target="rtx-4060-8gb+ddr5-96", rig="8 GB card, 14900K", measured=(18.0, 25.6)),
)


TYPES = {"Q4_K": 4.5, "Q3_K": 3.4375, "Q2_K": 2.625}
REST = 6.5625
"""Bits of all but the routed experts, Q6_K."""
CONTEXT = 8192
RIGS = (
    "rtx-4090+ddr5-128",
    "rtx-4090+ddr5-128+nvme-5",
    "rtx-4090+ddr5-256",
    "rtx-3090+ddr4-128",
    "rtx-4090+ddr5-8ch-512",
)


def pressed_r1(experts: int, kind: str) -> Model:
    """R1 with so many experts in each of its 58 layers."""
    stored = 58 * experts * 3 * 7168 * 2048
    return replace(R1, routed_bits=TYPES[kind], rest_bits=REST, dense=3, stored=stored)


def pressed_rows() -> Iterator[dict[str, Any]]:
    """For every machine and type the most experts that fit, and the speed projected."""
    for rig in RIGS:
        for kind in TYPES:
            for experts in range(256, 15, -8):
                model = pressed_r1(experts, kind)
                load = model.load()
                rest = round(model.rest * REST / 8)
                found = fit(target_of(rig), load.routed_bytes + rest + CONTEXT * model.cache_bytes, load)
                if found.tg128 is not None:
                    yield {
                        "target": rig,
                        "type": kind,
                        "experts": experts,
                        "file_bytes": load.routed_bytes + rest,
                        "ram_bytes": found.ram_bytes - found.disk_bytes,
                        "disk_bytes": found.disk_bytes,
                        "options": offload_options(found),
                        "projected": asdict(found.tg128),
                    }
                    break


def interval(one: Published) -> Interval:
    target, load = target_of(one.target), one.model.load()
    bandwidth = 1e9 * target.bandwidth_gb_per_second
    if target.ram is None:
        return project(load, bandwidth=bandwidth, flops=1e12 * target.fp16_tflops)[1]
    ram = 1e9 * target.ram.bandwidth_gb_per_second
    if one.model.stored:  # as `inspect` places them: some on the card, some in RAM, some on the disk
        model = one.model
        needed = load.routed_bytes + round(model.rest * model.rest_bits / 8) + CONTEXT * model.cache_bytes
        found = fit(target, needed, load).tg128
        assert found is not None
        return found
    return project_behind(load, bandwidth=bandwidth, ram_bandwidth=ram, share=1.0)


def off(found: Interval, measured: tuple[float, float]) -> float:
    """How far the farther end of what was measured lies outside, as a share of the nearer bound; 0 inside."""
    low, high = measured
    return max(0.0, found.low / low - 1, high / found.high - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS / "hybrid_projection.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("| model | rig | measured, tokens/s | projected | outside by |\n|---|---|---:|---:|---:|")
    for one in PUBLISHED:
        found = interval(one)
        low, high = one.measured
        text = f"{low:g}" if low == high else f"{low:g}-{high:g}"
        away = off(found, one.measured)
        print(f"| {one.model.name} | {one.rig} | {text} | {found.low:.1f}-{found.high:.1f} | {away:.0%} |")
        rows.append(
            {"model": one.model.name, "target": one.target, "rig": one.rig, "measured": one.measured}
            | {"projected": asdict(found), "outside": away}
        )
    made = list(pressed_rows())
    print("\n| machine | experts at | most that fit | file, GiB | of it in RAM | llama.cpp | projected, tokens/s |")
    print("|---|---|---:|---:|---:|---|---:|")
    for row in made:
        size, ram, disk = (row[name] / 2**30 for name in ("file_bytes", "ram_bytes", "disk_bytes"))
        away = f"{ram:.0f}" + (f", {disk:.0f} more on the disk" if disk else "")
        speed = f"{row['projected']['low']:.1f}-{row['projected']['high']:.1f}"
        name, kept = target_of(row["target"]).name, f"{row['experts']} of 256"
        print(f"| {name} | {row['type']} | {kept} | {size:.0f} | {away} | `{row['options']}` | {speed} |")
    options.json.write_text(json.dumps({"rows": rows, "r1_pressed": made}, indent=2) + "\n")


if __name__ == "__main__":
    main()
