"""The tiny models of every MoE type of transformers: some of them here, all by `python tests/every_family.py`."""

from pathlib import Path

import pytest
import torch
from every_family import EXPERTS, REFUSED, TEXT_VOCAB, auto_class, build, experts_of, load_report, logits, save
from tiny_models import windows

# Biased groups, biased experts, a hash table of experts, experts without a gate, layers of several kinds, vision.
SOME = ("glm4_moe", "gpt_oss", "deepseek_v4", "nemotron_h", "gemma4", "qwen3_5_moe")


@pytest.fixture(params=SOME)
def model_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("fused", [False, True])
def test_a_saved_model_loads_to_the_same_logits(model_type: str, fused: bool, tmp_path: Path) -> None:
    tokens = windows(TEXT_VOCAB, count=2)
    model = build(model_type)
    want = logits(model, tokens)
    again, report = load_report(save(model, tmp_path, fused=fused))
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert want.isfinite().all()
    torch.testing.assert_close(logits(again, tokens), want, atol=1e-4, rtol=1e-4)


def test_the_seed_makes_the_weights(model_type: str) -> None:
    tokens = windows(TEXT_VOCAB, count=1)
    first, same, other = (logits(build(model_type, seed), tokens) for seed in (3, 3, 4))
    assert torch.equal(first, same)
    assert (first - other).abs().max() > 1


def test_routed_experts_show_in_the_logits(model_type: str) -> None:
    tokens = windows(TEXT_VOCAB, count=1)
    model = build(model_type)
    want = logits(model, tokens)
    for name in experts_of(model):
        torch.nn.init.zeros_(model.get_submodule(name).down_proj)
    assert (logits(model, tokens) - want).norm() > 0.1 * want.norm()


def test_a_hash_table_names_experts_that_there_are() -> None:
    tables = [t for n, t in build("deepseek_v4").state_dict().items() if n.endswith("tid2eid")]
    assert tables
    for table in tables:
        assert table.unique().tolist() == list(range(EXPERTS))
        assert all(len(set(row)) == len(row) for row in table.tolist())


def test_changes_go_into_the_text_config() -> None:
    assert build("qwen3_5_moe", num_experts=8).config.text_config.num_experts == 8


def test_refused_types_have_an_auto_class() -> None:
    assert all(auto_class(model_type) for model_type in REFUSED)
