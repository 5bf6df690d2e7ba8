"""The table of GPUs: read, checked, and models held against it."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stage_runs import command

from moepress.errors import InvalidInputError, UsageError
from moepress.validation.speed.targets import (
    RESERVE,
    TABLE,
    TIGHT_RESERVE,
    Target,
    Verdict,
    all_targets,
    fit,
    gaming,
    load_targets,
    target_of,
)

GIB = 1 << 30
CARD = '[[target]]\nid = "a-1"\nname = "A"\nkind = "gaming"\nmemory_gib = 8\nbandwidth_gb_per_second = 100\n'
CARD += "fp16_tflops = 10\n"


def test_the_shipped_table_can_be_read() -> None:
    targets = load_targets()
    assert len(targets) == 25
    by_id = {target.id: target for target in targets}
    card = by_id["rtx-4060-ti-16gb"]
    assert (card.memory_gib, card.bandwidth_gb_per_second, card.fp16_tflops, card.pcie) == (16, 288, 44.1, "4.0 x8")
    assert {t.id for t in targets if t.uncertain} == {
        *("rx-9070-xt", "arc-b580", "m4-max-128gb", "rtx-pro-6000", "arc-pro-b60"),
        *("dgx-spark", "strix-halo-128gb", "m3-ultra-512gb"),
    }
    assert [t.id for t in targets if t.kind == "reference"] == ["h100-sxm", "h200-sxm", "rtx-pro-6000"]
    assert all((t.pcie is None) == (t.kind == "unified") for t in targets)


def test_no_data_centre_card_and_no_shared_memory_is_a_gaming_gpu() -> None:
    cards = gaming(load_targets())
    assert len(cards) == 18
    assert cards[0].id == "rtx-4060-8gb"
    assert cards[-1].id == "rtx-5090"


BROKEN = [
    ("", "target: Field required"),
    ("[[target]", "is not valid TOML"),
    (CARD.replace("8\n", '"8 GiB"\n', 1), "target.0.memory_gib"),
    (CARD.replace("memory_gib = 8", "memory_gib = 0"), "target.0.memory_gib"),
    (CARD.replace('"a-1"', '"A 1"'), "target.0.id"),
    (CARD.replace("gaming", "toy"), "target.0.kind"),
    (CARD + 'colour = "red"\n', "target.0.colour"),
    (CARD + 'pcie = "fast"\n', "target.0.pcie"),
    (CARD.replace("fp16_tflops = 10\n", ""), "target.0.fp16_tflops"),
    (CARD + CARD, "two targets with the id 'a-1'"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN, ids=[row[1] for row in BROKEN])
def test_a_broken_table_is_refused_in_one_sentence_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "targets.toml"
    file.write_text(text)
    with pytest.raises(InvalidInputError) as caught:
        load_targets(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"nothing\.toml: No such file.*give a TOML file with a \[\[target\]\]"):
        load_targets(tmp_path / "nothing.toml")
    assert TABLE.is_file()


def test_own_rows_come_last_and_take_the_place_of_the_same_id(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(CARD + CARD.replace('"a-1"', '"rtx-4090"').replace('"A"', '"Mine"'))
    shipped, merged = load_targets(), all_targets(file)
    assert [t.id for t in merged] == [*(t.id for t in shipped), "a-1"]
    assert target_of("rtx-4090", file).name == "Mine"
    assert [t for t in merged if t.id not in {"a-1", "rtx-4090"}] == [t for t in shipped if t.id != "rtx-4090"]
    with pytest.raises(UsageError, match=r"--target b is not in the table; it has rtx-3060-12gb, .*, a-1\."):
        target_of("b", file)


def test_targets_lists_the_table_with_one_s_own(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(CARD)
    code, printed, errors = command("targets", "--targets-file", file, "--json")
    assert (code, errors) == (0, "")
    assert json.loads(printed)["targets"] == [t.model_dump() for t in all_targets(file)]
    code, printed, _ = command("targets")
    lines = printed.splitlines()
    assert code == 0
    assert [line.split()[0] for line in lines[1:26]] == [t.id for t in load_targets()]
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("rx-9070-xt") and "~195" in line for line in lines)


@pytest.mark.parametrize(("text", "message"), [BROKEN[1], BROKEN[3], ("[" * 10_000, "is not valid TOML")])
def test_every_command_refuses_a_wrong_file_in_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    file, out = tmp_path / "own.toml", tmp_path / "out"
    file.write_text(text)
    for arguments in (["targets"], ["inspect", "demo"], ["validate", "demo", "demo"], ["run", "demo", "-o", out]):
        code, printed, errors = command(*arguments, "--targets-file", file)
        assert (code, printed) == (4, ""), arguments
        assert message in errors
        assert errors.count("\n") == 1
    assert not out.exists()


@given(needed=st.integers(0, 200 * GIB), memory=st.sampled_from([8.0, 12.0, 24.0, 141.0]))
def test_a_verdict_says_how_much_is_free_and_how_much_is_lacking(needed: int, memory: float) -> None:
    card = Target(id="a", name="A", kind="gaming", memory_gib=memory, bandwidth_gb_per_second=1, fp16_tflops=1)
    found = fit(card, needed)
    assert found.left_bytes == card.memory_bytes - needed
    assert (found.lacking_bytes == 0) == (found.verdict is not Verdict.NO)
    if found.verdict is Verdict.FITS:
        assert found.left_bytes >= RESERVE * card.memory_bytes
    if found.verdict is Verdict.TIGHT:
        assert TIGHT_RESERVE * card.memory_bytes <= found.left_bytes < RESERVE * card.memory_bytes
    if found.verdict is Verdict.NO:
        larger = card.model_copy(update={"memory_gib": (card.memory_bytes + found.lacking_bytes) / GIB})
        assert fit(larger, needed).lacking_bytes <= 1
