"""Targets with memory behind a card, and several of one card."""

from dataclasses import replace

import pytest

from moepress.errors import UsageError
from moepress.validation.speed.projection import Load
from moepress.validation.speed.targets import GIB, Verdict, fit, offload_options, target_of

LOAD = Load(
    layers=40,
    decode_bytes=5 * GIB,
    prefill_bytes=60 * GIB,
    flops_per_token=10**10,
    cache_bytes_per_token=10_000,
    expert_layers=tuple(range(2, 40)),
    routed_bytes=50 * GIB,
    routed_decode_bytes=2 * GIB,
)
NEEDED = 61 * GIB


def test_what_a_card_does_not_hold_lies_behind_it() -> None:
    target = target_of("rtx-4090+ddr5-128")
    found = fit(target, NEEDED, LOAD)
    assert found.verdict is Verdict.FITS
    layer = LOAD.routed_bytes / len(LOAD.expert_layers)
    on_card = NEEDED - found.ram_bytes
    assert on_card <= 0.85 * target.memory_bytes < on_card + layer
    assert found.ram_bytes == pytest.approx(found.ram_layers * layer, abs=1)
    # llama.cpp moves the experts of blocks 0 to N-1, and the first two of these blocks have none.
    assert offload_options(found) == f"-ngl 999 --n-cpu-moe {found.ram_layers + 2}"
    assert found.pp512 is None
    assert found.tg128 is not None


def test_more_experts_on_the_card_are_faster_and_never_as_fast_as_all() -> None:
    small, large = (fit(target_of(f"{card}+ddr5-128"), NEEDED, LOAD) for card in ("rtx-4090", "rtx-5090"))
    whole = fit(target_of("4xrtx-4090"), NEEDED, LOAD)
    assert small.tg128 is not None
    assert large.tg128 is not None
    assert whole.tg128 is not None
    assert small.tg128.high < large.tg128.high < whole.tg128.high
    assert small.tg128.low < small.tg128.high


def test_memory_that_is_too_small_is_no_help() -> None:
    assert fit(target_of("rtx-4060-8gb+ddr4-64"), NEEDED, LOAD).verdict is Verdict.NO
    assert fit(target_of("rtx-4090"), NEEDED, LOAD).verdict is Verdict.NO
    assert offload_options(fit(target_of("4xrtx-4090"), NEEDED, LOAD)) == ""


def test_a_disk_holds_what_memory_does_not_and_is_slower() -> None:
    plain, disk, faster = (
        fit(target_of(f"rtx-4060-8gb+ddr4-64{behind}"), NEEDED - 10 * GIB, LOAD)
        for behind in ("", "+nvme-3", "+nvme-5")
    )
    smaller = replace(LOAD, routed_bytes=80 * GIB)
    short = fit(target_of("rtx-4090+ddr4-64"), NEEDED + 30 * GIB, smaller)
    assert short.verdict is Verdict.NO
    spilled = [fit(target_of(f"rtx-4090+ddr4-64+{name}"), NEEDED + 30 * GIB, smaller) for name in ("nvme-3", "nvme-5")]
    for found in spilled:
        assert found.verdict is Verdict.TIGHT
        assert found.ram_bytes - found.disk_bytes == pytest.approx(0.85 * 64 * GIB, rel=1e-6)
        assert "--n-cpu-moe" in offload_options(found)
    speeds = [found.tg128 for found in spilled]
    assert speeds[0] is not None
    assert speeds[1] is not None
    assert speeds[0].low < speeds[1].low < speeds[1].high
    assert speeds[0].high < speeds[1].high
    # The slow end has all experts used alike: what memory lacks is read from the disk for every token.
    away = smaller.routed_decode_bytes * spilled[0].ram_layers / 38 * spilled[0].disk_bytes / spilled[0].ram_bytes
    assert 1 / speeds[0].low > away / (3.5e9 * 0.3)
    assert plain == replace(disk, target=plain.target) == replace(faster, target=plain.target)  # where memory is enough


def test_several_of_a_card_have_their_memory_together_and_the_speed_of_one() -> None:
    one, two = target_of("rtx-3090"), target_of("2xrtx-3090")
    assert two.memory_bytes == 2 * one.memory_bytes
    assert two.bandwidth_gb_per_second == one.bandwidth_gb_per_second
    assert target_of("2 x RTX 3090").id == "2xrtx-3090"


def test_unknown_memory_names_what_there_is() -> None:
    with pytest.raises(UsageError, match="ddr5-128"):
        target_of("rtx-4090+ddr6-128")
    for strange in ("rtx-4090+nvme-4", "rtx-4090+nvme-4+ddr5-64"):
        with pytest.raises(UsageError, match="a disk lies behind a machine's memory"):
            target_of(strange)
    with pytest.raises(UsageError, match="shares its memory with the CPU"):
        target_of("m4-max-128gb+ddr5-64")
    with pytest.raises(UsageError, match="nvme-4"):
        target_of("rtx-4090+ddr5-128+floppy")
    with pytest.raises(UsageError, match="nvme-4"):
        target_of("rtx-4090+ddr5-128+nvme-4+nvme-4")
