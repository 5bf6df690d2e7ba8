"""Every accumulator is held against transformers' own model, with every expert applied to every token in fp64."""

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from stage_runs import CPU, LIMITS, corpus_of, expert_outputs, in_torch, logits_of, profile_of, watched
from torch import Tensor

from moepress.calibration import observe
from moepress.calibration.accumulators import ACCUMULATORS, TOTALS
from moepress.calibration.collect import collect
from moepress.calibration.observe import shard_of_windows
from moepress.calibration.profile import SHARDS, Profile
from moepress.models.forward.streamed import StreamedModel
from moepress.models.forward.walk import Limits, Scratch, add_experts, first_step, open_stream
from moepress.models.storage.checkpoint import Checkpoint, open_checkpoint
from moepress.runs.journal import open_run

GROUPED = ("deepseek_v3", "deepseek_v2")
UNGROUPED = ("moonlight", "deepseek_v2_lite", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
DOMAINS = ("prose", "code", "numbers")

Seen = dict[int, dict[str, Tensor]]


def text(vocabulary: int, count: int = 9, length: int = 8) -> tuple[Tensor, Tensor]:
    """Windows of three domains, of which the last one is small."""
    windows = tiny_models.windows(vocabulary, count=count, length=length, seed=11)
    return windows, torch.tensor([0, 1, 0, 1, 1, 0, 2, 0, 1])[torch.arange(count) % 9]


class Case:
    """One tiny model, observed by us and watched in transformers."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.model = tiny_models.reference(folder)
        self.windows, self.index = text(self.model.config.vocab_size)
        corpus = corpus_of(self.windows, self.index, DOMAINS)
        self.profile: Profile = profile_of(folder, corpus, work)
        with watched(self.model) as seen:
            logits_of(self.model, self.windows)
        self.seen: Seen = seen

    def cells(self) -> list[tuple[int, int]]:
        """Domain and shard of every token, the shard by its definition."""
        shards = [
            int.from_bytes(hashlib.sha256(row.numpy().tobytes()).digest()[:4], "little") % SHARDS
            for row in self.windows
        ]
        pairs = zip(self.index.tolist(), shards, strict=True)
        return [pair for pair in pairs for _ in range(self.windows.shape[1])]


@pytest.fixture(scope="module")
def case(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    made: dict[str, Case] = {}

    def get(key: str, **changes: Any) -> Case:
        name = f"{key}{changes}"
        if name not in made:
            made[name] = Case(tiny_model(key, **changes), tmp_path_factory.mktemp("work") / "profile")
        return made[name]

    return get


def by_hand(case: Case, layer: int) -> dict[str, Tensor]:
    """The sums of FORMULAS, token by token."""
    seen, experts = case.seen[layer], case.profile.shape.experts
    outputs = expert_outputs(case.model, layer, seen["inputs"])
    names = [name for name in ACCUMULATORS if name != "leave_one_out"]
    out = {name: torch.zeros(len(DOMAINS), SHARDS, experts, dtype=torch.float64) for name in names}
    out |= {name: torch.zeros(len(DOMAINS), SHARDS, dtype=torch.float64) for name in TOTALS}
    for token, (domain, shard) in enumerate(case.cells()):
        chosen, weights = seen["chosen"][token].tolist(), seen["weights"][token].double().tolist()
        routed = sum(w * outputs[token, e] for e, w in zip(chosen, weights, strict=True))
        residual = seen["residual"][token].double()
        beta = max(0.0, 1 - float(torch.nn.functional.cosine_similarity(residual, residual + routed, dim=0)))
        for expert, weight in zip(chosen, weights, strict=True):
            norm, where = float(outputs[token, expert].norm()), (domain, shard, expert)
            out["count"][where] += 1
            out["gate"][where] += weight
            out["norm"][where] += norm
            out["norm_squared"][where] += norm**2
            out["weighted_norm"][where] += weight * norm
            out["weighted_norm_squared"][where] += (weight * norm) ** 2
            out["turned_norm"][where] += beta * weight * norm
            out["peak"][where] = max(float(out["peak"][where]), float(outputs[token, expert].abs().max()))
        out["tokens"][domain, shard] += 1
        out["routed_squared"][domain, shard] += float(routed.square().sum())
        out["residual_squared"][domain, shard] += float(residual.square().sum())
    return out


@pytest.mark.parametrize("key", [*GROUPED, *UNGROUPED])
def test_every_accumulator_equals_a_sum_over_tokens_in_transformers(case: Callable[..., Case], key: str) -> None:
    made = case(key)
    assert set(in_torch(made.profile)) == set(made.seen)
    for layer, found in in_torch(made.profile).items():
        expected = by_hand(made, layer)
        assert set(found) == set(ACCUMULATORS) | set(TOTALS)
        for name, value in expected.items():
            assert found[name].dtype == torch.float64
            torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-5 * float(value.max()), msg=name)
        assert torch.equal(found["count"], expected["count"])
        assert torch.equal(found["tokens"], expected["tokens"])
        assert int(found["count"].sum()) == made.windows.numel() * made.profile.shape.top_k
        assert (found["count"].sum(dim=(1, 2)) > 0).all()  # every domain


def routed_without(case: Case, layer: int, removed: int | None, *, fixed_groups: bool = False) -> tuple[Tensor, Tensor]:
    """Chosen experts and weights when an expert is really away: its logit is gone before the scores are formed.

    `fixed_groups`: the router's groups stay as they were chosen with all experts.
    """
    config, logits = case.model.config, case.seen[layer]["logits"].double().clone()
    gate = case.model.model.layers[layer].mlp.gate
    bias = getattr(gate, "e_score_correction_bias", None)
    allowed = torch.ones_like(logits, dtype=torch.bool)
    if fixed_groups:
        full = logits.sigmoid() + bias.double() if bias is not None else logits.softmax(dim=1)
        grouped = full.view(len(full), config.n_group, -1)
        rank = grouped.topk(2, dim=2).values.sum(dim=2) if bias is not None else grouped.amax(dim=2)
        best = torch.zeros_like(rank, dtype=torch.bool).scatter(1, rank.topk(config.topk_group).indices, value=True)
        allowed = best.repeat_interleave(grouped.shape[2], dim=1)
    if removed is not None:
        logits[:, removed] = -torch.inf
        allowed[:, removed] = False
    score = logits.sigmoid() if bias is not None else logits.softmax(dim=1)
    choice = (score if bias is None else score + bias.double()).masked_fill(~allowed, -torch.inf)
    chosen = choice.topk(config.num_experts_per_tok, dim=1)
    weights = score.gather(1, chosen.indices) * torch.isfinite(chosen.values)
    if config.model_type == "mixtral" or (config.model_type != "deepseek_v2" and config.norm_topk_prob):
        weights = weights / weights.sum(dim=1, keepdim=True)
    scaled = config.model_type in {"deepseek_v3", "deepseek_v2"}
    return chosen.indices, weights * (config.routed_scaling_factor if scaled else 1.0)


def losses_by_hand(case: Case, layer: int, *, fixed_groups: bool = False) -> Tensor:
    """L_e by routing again without each expert, fp64 [S, B, E]."""
    seen, experts = case.seen[layer], case.profile.shape.experts
    outputs = expert_outputs(case.model, layer, seen["inputs"])

    def routed(chosen: Tensor, weights: Tensor) -> Tensor:
        dense = torch.zeros(outputs.shape[:2], dtype=torch.float64).scatter(1, chosen, weights.double())
        return torch.einsum("te,ted->td", dense, outputs)

    full = routed(seen["chosen"], seen["weights"])
    same = routed(*routed_without(case, layer, None, fixed_groups=fixed_groups))
    torch.testing.assert_close(same, full, rtol=1e-5, atol=1e-5)  # the reference routes as the model does
    out = torch.zeros(len(DOMAINS), SHARDS, experts, dtype=torch.float64)
    for expert in range(experts):
        change = full - routed(*routed_without(case, layer, expert, fixed_groups=fixed_groups))
        for token, (domain, shard) in enumerate(case.cells()):
            if expert in seen["chosen"][token].tolist():
                out[domain, shard, expert] += float(change[token].square().sum())
    return out


@pytest.mark.parametrize("key", UNGROUPED)
def test_leave_one_out_equals_routing_again_without_the_expert(case: Callable[..., Case], key: str) -> None:
    made = case(key)
    for layer, found in in_torch(made.profile).items():
        expected = losses_by_hand(made, layer)
        scale = float(expected.max())
        assert scale > 0
        torch.testing.assert_close(found["leave_one_out"], expected, rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize("key", GROUPED)
def test_leave_one_out_of_grouped_routers_keeps_the_chosen_groups(case: Callable[..., Case], key: str) -> None:
    made = case(key)
    for layer, found in in_torch(made.profile).items():
        expected = losses_by_hand(made, layer, fixed_groups=True)
        torch.testing.assert_close(found["leave_one_out"], expected, rtol=1e-3, atol=1e-5 * float(expected.max()))


def test_leave_one_out_without_a_spare_expert_goes_on_with_fewer(case: Callable[..., Case]) -> None:
    """One group of four experts is allowed and all four are chosen: nothing can take the place of the one that goes."""
    made = case("deepseek_v3", topk_group=1)
    for layer, found in in_torch(made.profile).items():
        expected = losses_by_hand(made, layer, fixed_groups=True)
        assert float(expected.max()) > 0
        torch.testing.assert_close(found["leave_one_out"], expected, rtol=1e-3, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize("leave_one_out", [True, False])
@pytest.mark.parametrize("key", ["mixtral", "deepseek_v3"])
def test_memory_files_and_passes_give_the_same_bits(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, leave_one_out: bool
) -> None:
    folder, corpus = tiny_model(key), corpus_of(*text(256, count=24, length=16), DOMAINS)  # 384 tokens
    monkeypatch.setattr(observe, "BLOCK_TOKENS", 64)
    monkeypatch.setattr(observe, "CHUNK_BYTES", 20_000)
    passes, profiles = [], []
    plain = observe._observe_pass
    monkeypatch.setattr(
        observe, "_observe_pass", lambda *args, **named: (passes.append(args[2]), plain(*args, **named))
    )
    for memory, free in ((1 << 30, 1 << 40), (1000, 1 << 40), (1000, 0)):
        monkeypatch.setattr(Scratch, "free_bytes", lambda _self, free=free: free)
        limits = Limits(memory_bytes=memory, batch_windows=8)
        work = tmp_path / f"{memory}-{free}"
        profiles.append(profile_of(folder, corpus, work, limits=limits, leave_one_out=leave_one_out))
    moe_layers = len(profiles[0].layers)
    assert passes == moe_layers * 2 * [slice(0, 384)] + moe_layers * [slice(n, n + 64) for n in range(0, 384, 64)]
    for layer in profiles[0].layers:
        for name in (*ACCUMULATORS, *TOTALS):
            first, *others = (in_torch(p)[layer][name] for p in profiles)
            assert all(torch.equal(first, other) for other in others), name
        assert bool(in_torch(profiles[0])[layer]["leave_one_out"].any()) == leave_one_out


@pytest.mark.parametrize("leave_one_out", [True, False])
def test_blocks_and_chunks_of_another_size_give_the_same_sums(
    case: Callable[..., Case],
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    leave_one_out: bool,
) -> None:
    made = case("deepseek_v3")
    for name, value in (("BLOCK_TOKENS", 24), ("ROWS_AT_ONCE", 5), ("CHUNK_BYTES", 1)):
        monkeypatch.setattr(observe, name, value)
    corpus = corpus_of(made.windows, made.index, DOMAINS)
    profile = profile_of(tiny_model("deepseek_v3"), corpus, tmp_path / "work", leave_one_out=leave_one_out)
    for layer, found in in_torch(profile).items():
        for name in {*ACCUMULATORS, *TOTALS} - (set() if leave_one_out else {"leave_one_out"}):
            whole = in_torch(made.profile)[layer][name]
            torch.testing.assert_close(found[name], whole, rtol=1e-4, atol=1e-6 * float(whole.max()), msg=name)


class Counting:
    """A checkpoint that counts what is read from it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.read_names = checkpoint, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.checkpoint, name)

    def read(self, name: str) -> Tensor:
        self.read_names[name] += 1
        return self.checkpoint.read(name)


@pytest.mark.parametrize("leave_one_out", [True, False])
def test_an_expert_is_read_once_however_little_memory_there_is(
    tiny_model: Callable[..., Path], tmp_path: Path, leave_one_out: bool
) -> None:
    source = Counting(open_checkpoint(tiny_model("deepseek_v3")))
    corpus = corpus_of(tiny_models.windows(256, count=80, length=16))
    model = StreamedModel(source, device=CPU, dtype=torch.float32)  # type: ignore[arg-type]
    with open_run(tmp_path / "work", {}) as run:
        collect(model, corpus, run, Limits(memory_bytes=1, batch_windows=4), leave_one_out=leave_one_out)
    names = [name for name in source.checkpoint.shapes if ".mlp.experts." in name]
    assert len(names) == 3 * model.shape.experts * len(model.moe_layers)
    assert {name: source.read_names[name] for name in names} == dict.fromkeys(names, 1)


def test_a_pass_is_all_tokens_where_memory_or_half_of_the_disk_holds_them() -> None:
    block = observe.BLOCK_TOKENS
    at_once = observe.tokens_at_once
    assert at_once(10 * block, 100, 0, None) == 10 * block
    assert at_once(10 * block, 100, 1000 * block, 0) == 10 * block
    assert at_once(10 * block, 100, 0, 2000 * block) == 10 * block
    assert at_once(10 * block, 100, 0, 1999 * block) == 5 * block  # two of one size
    assert at_once(10 * block - 1, 100, 450 * block, 0) == 4 * block  # three passes
    assert at_once(10 * block, 100, 0, 0) == block
    assert at_once(5, 100, 0, 0) == 5


@pytest.mark.parametrize("key", ["deepseek_v3", "qwen2_moe"])
def test_observing_does_not_change_the_hidden_states(tiny_model: Callable[..., Path], tmp_path: Path, key: str) -> None:
    from moepress.calibration.collect import cells_of
    from moepress.calibration.observe import observe_layer

    model = StreamedModel(open_checkpoint(tiny_model(key)), device=CPU, dtype=torch.float32)
    windows, _ = text(256)
    scratch = Scratch(tmp_path, LIMITS.memory_bytes)
    ends = []
    with torch.inference_mode():
        for observing in (False, True):
            stream = open_stream(model, windows, scratch, LIMITS, observe=True)
            for layer in range(model.shape.layers):
                model.load_layer(layer)
                if first_step(stream, layer) and observing:
                    observe_layer(stream, layer, cells_of(corpus_of(windows)), leave_one_out=True)
                elif layer in model.moe_layers:
                    add_experts(stream, layer)
                model.unload_layer(layer)
            ends.append(stream.hidden.clone())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-4)


def test_a_window_falls_into_the_same_shard_wherever_it_stands() -> None:
    windows = tiny_models.windows(256, count=400)
    shards = shard_of_windows(windows, SHARDS)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(2))
    assert torch.equal(shard_of_windows(windows[order], SHARDS), shards[order])
    assert torch.equal(shard_of_windows(windows[::2], SHARDS), shards[::2])
    assert torch.bincount(shards, minlength=SHARDS).min() > 25  # 50 each on average
