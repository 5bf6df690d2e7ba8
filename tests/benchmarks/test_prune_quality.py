"""The benchmark of pruning and repair: how seeds are put together, repairs compared, tables made."""

import importlib
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from r1_models import make_r1

from moepress.stages import model_folder

FOLDER = Path(make_r1.__file__).parent


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("prune_quality")


def seed_row(seed: int, perplexity: float, kl: float, paired: float = 0.003) -> dict[str, Any]:
    change = perplexity / 10 - 1
    domains = {"a": perplexity - 1, "b": perplexity + 1}
    row = {"seed": seed, "perplexity": perplexity, "change": change, "paired_error": paired, "kl": kl}
    return row | {"domains": domains, "kl_by_domain": {"a": kl, "b": kl}}


def test_seeds_give_a_mean_and_both_errors(benchmark: ModuleType) -> None:
    found = benchmark.over_seeds([seed_row(0, 11, 0.1, 0.003), seed_row(1, 12, 0.2, 0.004), seed_row(2, 13, 0.3, 0.0)])
    assert found["perplexity"] == pytest.approx(12)
    assert found["change"] == pytest.approx(0.2)
    assert found["seed_error"] == pytest.approx(0.1 / math.sqrt(3))
    assert found["kl_seed_error"] == pytest.approx(0.1 / math.sqrt(3))
    assert found["paired_error"] == pytest.approx(math.sqrt((9 + 16) / 3) * 1e-3)
    assert found["domains"] == {"a": pytest.approx(11), "b": pytest.approx(13)}
    assert benchmark.over_seeds([seed_row(0, 11, 0.1)])["seed_error"] is None


def test_a_repair_is_held_against_the_same_keep_set_without_it(benchmark: ModuleType) -> None:
    plain = {"criterion": "loo", "keep": 0.5, "repair": "none"}
    plain |= benchmark.over_seeds([seed_row(0, 12, 0.2), seed_row(1, 14, 0.4)])
    mended = {"criterion": "loo", "keep": 0.5, "repair": "gain"}
    mended |= benchmark.over_seeds([seed_row(0, 11, 0.1), seed_row(1, 14, 0.5)])
    chance = {**mended, "criterion": "random", "repair": "none"}
    (found,) = benchmark.repair_effect([plain, mended, chance])
    assert (found["keep"], found["repair"], found["cells"], found["better"]) == (0.5, "gain", 2, 1)
    assert found["perplexity"] == pytest.approx(math.log(11 / 12) / 2)
    assert found["kl"] == pytest.approx((-0.5 + 0.25) / 2)
    assert found["kl_error"] == pytest.approx(0.75 / 2)
    original = {"perplexity": 10.0, "domains": {"a": 9.0, "b": 11.0}}
    lines = list(benchmark.markdown({"original": original, "pruning": [plain, mended, chance], "repair": [found]}))
    assert "| 50% | gain | -4.35% ± 4.35% | -12.5% ± 37.5% | 1 of 2 |" in lines
    assert len({line.count("|") for line in lines[:6]}) == 1


def test_counts_are_legal_for_groups(benchmark: ModuleType) -> None:
    base = benchmark.open_checkpoint(model_folder("demo"))
    assert [benchmark.count_of(base, share) for share in (0.75, 0.5, 0.3)] == [12, 8, 4]
