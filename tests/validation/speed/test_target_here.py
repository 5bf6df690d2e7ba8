"""This machine's GPU in the table, by the names that drivers give; measured speeds beside projected ones."""

from collections.abc import Sequence

import pytest

from moepress.models.storage.checkpoint import Checkpoint
from moepress.validation.quality.results import Estimate, Quality, Throughput, ThroughputRow
from moepress.validation.report.schema import Report, SubjectInfo
from moepress.validation.report.tables import tables
from moepress.validation.speed.fits import fits_section
from moepress.validation.speed.results import Targets
from moepress.validation.speed.target_here import target_here
from moepress.validation.speed.targets import load_targets, target_of

GIB = 1 << 30


@pytest.mark.parametrize(
    ("device", "gib", "target"),
    [
        ("NVIDIA GeForce RTX 3060", 11.76, "rtx-3060-12gb"),
        ("NVIDIA GeForce RTX 3060", 7.8, None),  # the card with 8 GB
        ("NVIDIA GeForce RTX 3060 Ti", 7.8, None),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", 11.7, None),
        ("NVIDIA GeForce RTX 4060 Ti", 15.6, "rtx-4060-ti-16gb"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 15.6, "rtx-4070-ti-super"),
        ("NVIDIA GeForce RTX 4080", 15.6, "rtx-4080"),
        ("NVIDIA GeForce RTX 4080 SUPER", 15.6, None),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx-4090"),
        ("NVIDIA GeForce RTX 4090 D", 23.6, None),
        ("AMD Radeon RX 7900 XTX", 24.0, "rx-7900-xtx"),
        ("AMD Radeon RX 7900 XT", 20.0, None),
        ("NVIDIA H100 80GB HBM3", 79.2, "h100-sxm"),
        ("NVIDIA H100 PCIe", 79.2, None),
        ("Tesla T4", 14.6, None),
    ],
)
def test_a_driver_s_name_is_found_in_the_table(device: str, gib: float, target: str | None) -> None:
    found = target_here(device, round(gib * GIB), load_targets())
    assert (found.id if found else None) == target


def section(demo: Checkpoint, speeds: Sequence[tuple[str, str, float | None]]) -> Targets:
    rows = tuple(
        ThroughputRow(
            subject="demo",
            test=test,
            tokens_per_second=None if speed is None else Estimate(value=speed),
            runtime="transformers",
            provider=provider,
        )
        for test, provider, speed in speeds
    )
    throughput = Throughput(device="NVIDIA GeForce RTX 3060", threads=1, repetitions=1, rows=rows)
    card = target_of("rtx-3060-12gb")
    found = fits_section([("demo", demo)], [card, target_of("rtx-4090")], 64, here=card, throughput=throughput)
    assert found is not None
    return found


def test_measured_speeds_stand_beside_the_projected_ones(demo: Checkpoint) -> None:
    plain = section(demo, [])
    assert plain.measured == ()
    (card,) = (row for row in plain.rows if row.target == "rtx-3060-12gb")
    assert card.tg128 is not None
    assert card.pp512 is not None
    middle = (card.tg128.low + card.tg128.high) / 2
    found = section(
        demo,
        [
            ("tg128", "CUDA", middle),
            ("pp512", "CUDA", card.pp512.low / 2),
            ("pp512", "CUDA", 3 * card.pp512.high),
            ("tg128", "CPU", 1.0),
            ("pp384", "CUDA", 1.0),
            ("pp512", "CUDA", None),
        ],
    )
    assert [row.off for row in found.measured] == [1, pytest.approx(0.5), pytest.approx(3)]
    assert [row.projected for row in found.measured] == [card.tg128, card.pp512, card.pp512]
    assert {row.target for row in found.measured} == {"rtx-3060-12gb"}


def test_the_report_shows_how_far_the_projection_was_off(demo: Checkpoint, quality: Quality) -> None:
    speed = section(demo, []).rows[0].tg128
    assert speed is not None
    report = Report(
        subjects=(SubjectInfo(label="original", stored_bytes=1, parameters=1),),
        quality=quality,
        targets=section(demo, [("tg128", "CUDA", 2 * speed.high)]),
    )
    titles = {table.title: table for table in tables(report)}
    rows = titles["Measured here, on RTX 3060 12GB"].rows
    assert rows[0][0] == "demo, transformers"
    assert rows[0][-1] == "2.00 times its nearer end"
