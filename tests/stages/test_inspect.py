"""What inspect says of published models at full size, held against figures that were worked out by hand."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from full_models import full_model
from stage_runs import command

from moepress.converters.safetensors.scheme import PER_CHANNEL
from moepress.models.families.family import Shape
from moepress.stages.inspect import answer, calibration_advice, count_advice, inspect_model, scheme_for
from moepress.validation.speed.targets import gaming, load_targets

# Weights in GiB with 100, 75, 50 and 25 % of the experts, at 4.156 bits per weight (4.125 of ours and a zero point);
# and billions of parameters in attention, shared experts and dense MLPs, which have 8.125 bits in place of 16.
EXPERTS_GIB = {
    "DeepSeek-R1": ((348, 269, 190, 111), 14.13),
    "Qwen3-30B-A3B": ((16.9, 13.4, 9.9, 6.4), 0.906),
    "DeepSeek-V2-Lite": ((9.4, 7.7, 5.9, 4.2), 0.765),
    "Mixtral-8x7B": ((24.8, 19.3, 13.9, 8.4), 1.342),
}
WEIGHTS_GIB = {
    name: [size - billions * 7.875 / 8 * 1e9 / 2**30 for size in sizes]
    for name, (sizes, billions) in EXPERTS_GIB.items()
}
GIB = 1 << 30
Inspected = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> Inspected:
    @cache
    def inspect(name: str) -> dict[str, Any]:
        return inspect_model(str(full_model(name, tmp_path_factory.mktemp("full") / name)))

    return inspect


def verdicts(found: dict[str, Any], target: str) -> list[str]:
    """By expert count, the largest first."""
    rows = found["targets"]["counts"]
    return [next(str(fit["verdict"]) for fit in row["fits"] if fit["target"] == target) for row in rows]


@pytest.mark.parametrize("name", WEIGHTS_GIB)
def test_weights_are_those_of_the_table_by_hand(inspected: Inspected, name: str) -> None:
    sizes = [row["weight_bytes"] / GIB for row in inspected(name)["targets"]["counts"]]
    assert sizes == pytest.approx(WEIGHTS_GIB[name], rel=0.015)
    assert all(ours <= table * 1.01 for ours, table in zip(sizes, WEIGHTS_GIB[name], strict=True))


def test_the_kv_cache_is_what_runtimes_keep(inspected: Inspected) -> None:
    assert inspected("DeepSeek-R1")["targets"]["cache_bytes"] == 61 * (512 + 64) * 2 * 8192
    assert inspected("Qwen3-30B-A3B")["targets"]["cache_bytes"] == 48 * 2 * 4 * 128 * 2 * 8192


def test_small_models_fit_where_they_should(inspected: Inspected) -> None:
    assert verdicts(inspected("DeepSeek-V2-Lite"), "rtx-3060-12gb") == ["fits"] * 4
    assert verdicts(inspected("Qwen3-30B-A3B"), "rtx-4090") == ["fits"] * 4
    assert verdicts(inspected("Qwen3-30B-A3B"), "rtx-4080") == ["no", "fits", "fits", "fits"]
    assert verdicts(inspected("Qwen3-30B-A3B"), "arc-b580") == ["no", "no", "fits", "fits"]
    assert verdicts(inspected("Mixtral-8x7B"), "rtx-5090") == ["fits"] * 4
    assert verdicts(inspected("Mixtral-8x7B"), "rtx-3090") == ["no", "fits", "fits", "fits"]
    assert verdicts(inspected("Mixtral-8x7B"), "rtx-5080") == ["no", "no", "fits", "fits"]
    sentence = inspected("Qwen3-30B-A3B")["targets"]["answer"][0]
    assert sentence.startswith(
        "At 4 bits (attention 8 bit) 128 experts fit into 24 GiB (RTX 3090); 96 experts fit into 16 GiB"
    )


def test_no_gaming_gpu_holds_r1_and_inspect_says_so_with_the_figures(inspected: Inspected) -> None:
    found = inspected("DeepSeek-R1")
    for card in gaming(load_targets()):
        assert verdicts(found, card.id) == ["no"] * 4
    assert verdicts(found, "h200-sxm") == ["no", "no", "no", "fits"]
    cannot, making, running, quality, *like = found["targets"]["answer"]
    assert cannot.startswith(
        "No gaming GPU holds this model. At 4 bits (attention, dense and shared 8 bit) it needs 333.5 GiB"
    )
    assert "still 97.8 GiB with 64; the largest gaming GPU has 32 GiB" in cannot
    assert making.startswith("One gaming GPU can make the compressed model")
    assert "experts in system RAM or on NVMe" in running
    assert "314.0 GiB with 256, 235.5 GiB with 192, 157.0 GiB with 128, 78.5 GiB with 64" in running
    assert "measure your own task" in quality
    assert like[0].startswith("Moonlight-16B-A3B-Instruct (64 experts, top-6) is reported to keep GSM8K 80 % at 25 %")
    assert like[1].startswith("MiniMax-M2 (256 experts, top-8)")


def test_speeds_are_projected_where_it_fits_and_only_there(inspected: Inspected) -> None:
    found = inspected("Qwen3-30B-A3B")["targets"]
    assert found["projection"].keys() == {"pp512", "tg128"}
    speeds = [row["fits"][5] for row in found["counts"]]
    assert found["table"][5]["id"] == "rtx-4090"
    assert all(row["tg128"]["kind"] == "projected" and row["tg128"]["low"] < row["tg128"]["high"] for row in speeds)
    assert len({row["tg128"]["high"] for row in speeds}) == 4, "router rows go, the rest of what a token reads stays"
    assert speeds[-1]["tg128"]["high"] == pytest.approx(speeds[0]["tg128"]["high"], rel=0.01)
    assert speeds[-1]["pp512"]["high"] > 1.1 * speeds[0]["pp512"]["high"], "fewer experts are read for a prompt"
    assert [row["fits"][2]["tg128"] is None for row in found["counts"]] == [True, False, False, False]


def test_a_gpu_of_one_s_own_is_held_against_the_model(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(
        '[[target]]\nid = "mine"\nname = "Mine"\nkind = "gaming"\nmemory_gib = 1\n'
        "bandwidth_gb_per_second = 10\nfp16_tflops = 1\n"
    )
    found = inspect_model("demo", targets_file=file)["targets"]
    assert found["table"][-1]["id"] == "mine"
    assert [row["fits"][-1]["verdict"] for row in found["counts"]] == ["fits"] * len(found["counts"])
    code, printed, _ = command("inspect", "demo", "--targets-file", file)
    assert code == 0
    assert len([line for line in printed.splitlines() if line.startswith("Mine ")]) == 1
    assert "tg128, batch 1) with the most experts that fit, projected" in printed


def test_what_lies_beside_the_experts_of_r1_is_worked_out(inspected: Inspected) -> None:
    plain, packed = inspected("DeepSeek-R1")["targets"]["beside_experts"]
    attention = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    keys = 512 * 128 * 256  # kv_b_proj is never quantized
    shared, dense, tables = 58 * 3 * 7168 * 2048, 3 * 3 * 7168 * 18432, 2 * 129280 * 7168
    router = 58 * (2 * 256 * 7168 + 4 * 256)
    for row, bits in ((plain, 8), (packed, 4)):
        linears = (61 * (attention - keys) + shared + dense) * (bits + 16 / 128) / 8
        assert row["weight_bytes"] == pytest.approx(linears + 2 * (61 * keys + tables) + router, rel=1e-3)
        assert row["part_bits"] == dict.fromkeys(("attention", "dense", "shared"), bits)
    fits = {row["target"]: row["verdict"] for row in packed["fits"]}
    assert fits["rtx-4080"] == "fits"
    fits = {row["target"]: row["verdict"] for row in plain["fits"]}
    assert (fits["rtx-4080"], fits["rtx-4090"]) == ("no", "fits")


def test_a_part_that_the_group_size_does_not_divide_is_left_out(inspected: Inspected) -> None:
    plain, packed = inspected("DeepSeek-V2-Lite")["targets"]["beside_experts"]  # its dense MLP is 10,944 wide
    assert packed["part_bits"] == {"attention": 4, "shared": 4}
    assert packed["weight_bytes"] < plain["weight_bytes"]


def test_r1_s_counts_come_with_reasons_192_and_128_first(inspected: Inspected) -> None:
    found = inspected("DeepSeek-R1")
    advice = found["recommended_expert_counts"]
    assert [row["experts"] for row in advice] == [192, 128, 64]
    assert "vLLM's specialised router takes it" in advice[0]["reasons"]
    assert "24 in each of 8 groups" in advice[0]["reasons"]
    assert "SGLang's fast router wants a power of two" in advice[1]["reasons"]
    assert found["legal_expert_counts"] == list(range(16, 257, 8))
    assert found["estimates"]["experts"] == 192


def test_r1_is_inspected_in_seconds_and_its_estimates_are_of_r1_s_size(inspected: Inspected) -> None:
    rows = inspected("DeepSeek-R1")["estimates"]
    for stage in ("profile", "quantize"):
        assert rows[stage]["seconds"] == pytest.approx(sum(rows[stage]["time"].values()))
        assert rows[stage]["seconds"] > 3600
        assert rows[stage]["notes"][0].startswith("Projected")
    assert rows["prune"]["output_bytes"] / GIB == pytest.approx(474.6, rel=0.001)
    assert rows["quantize"]["output_bytes"] / GIB == pytest.approx(254.4, rel=0.001)
    # Embeddings in fp32, a window's attention scores, a dense layer: not the experts of one layer (11 GiB of fp8).
    assert 5 * GIB < rows["quantize"]["peak_memory_bytes"] < 40 * GIB


def shape(**changes: int) -> Shape:
    numbers = {"layers": 3, "hidden": 64, "experts": 64, "top_k": 4, "expert_width": 64, "groups": 1, "top_groups": 1}
    return Shape(**{**numbers, "vocabulary": 100, "context": 64, **changes})


def test_counts_below_a_quarter_and_illegal_ones_are_not_recommended() -> None:
    assert [row["experts"] for row in count_advice(shape())] == [48, 32, 16]
    assert [row["experts"] for row in count_advice(shape(groups=8, top_groups=4))] == [48, 32, 16]
    assert [row["experts"] for row in count_advice(shape(experts=60))] == [45, 32, 16]
    assert count_advice(shape(experts=4)) == []
    assert count_advice(shape(experts=60))[0]["reasons"] == [
        "three quarters; every runtime takes it, the fastest routers do not"
    ]


def test_tokens_per_expert_are_held_against_the_columns() -> None:
    few = calibration_advice(shape(hidden=7168, experts=256, top_k=8), 131_072)
    assert few["tokens_per_expert"] == 4096
    assert few["tokens_for_one_per_column"] == 229_376
    assert "--tokens 229376" in few["note"]
    assert calibration_advice(shape(hidden=7168, experts=256, top_k=8), 229_376)["note"] is None


def test_the_group_size_divides_both_widths_of_an_expert() -> None:
    assert scheme_for(shape(hidden=7168, expert_width=2048)).group_size == 128
    assert scheme_for(shape(hidden=2048, expert_width=96)).group_size == 32
    assert scheme_for(shape(hidden=2048, expert_width=36)).group_size == PER_CHANNEL


def test_the_answer_names_the_smallest_card_for_each_count_that_needs_another() -> None:
    targets = load_targets()
    fits = [{"target": target.id, "verdict": "fits"} for target in targets if target.memory_gib >= 16]
    found = {"counts": [{"experts": n, "needed_bytes": 1, "fits": fits} for n in (8, 6)]}
    found["beside_experts"] = [{"part_bits": {}}]
    assert answer(found, targets, 1)[0] == "At 4 bits 8 experts fit into 16 GiB (RTX 4060 Ti 16GB)."


def test_a_model_of_four_gigabytes_is_not_downloaded_or_made(inspected: Inspected, tmp_path: Path) -> None:
    folder = full_model("Mixtral-8x7B", tmp_path / "mixtral")
    assert sum(p.stat().st_size for p in folder.iterdir()) > 80 * GIB
    assert sum(p.stat().st_blocks for p in folder.iterdir()) * 512 < 8 << 20
