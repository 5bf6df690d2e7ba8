"""The made DeepSeek-R1: the published numbers, what is written, and that its experts are not all alike."""

import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from r1_models import SMALL, make_r1, small_r1
from stage_runs import content, corpus_of, in_torch, profile_of
from tiny_models import windows

from moepress.models.forward.tensor_check import check_mtp, check_tensors
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.models.storage.tensors import read_tensor
from moepress.stages.groundwork import load_tokenizer

SCRIPT = Path(make_r1.__file__)


def test_with_all_layers_it_has_the_published_tensors_and_parameters() -> None:
    config = make_r1.r1_config(dense_layers=3, moe_layers=58, experts=256, mtp=True)
    assert config == make_r1.CONFIG
    rows = list(make_r1.r1_tensors(config))
    assert len({name for name, _, _ in rows}) == len(rows) == 91_991
    parameters = Counter[str]()
    for _, dtype, shape in rows:
        parameters[dtype] += math.prod(shape)
    # Counted over the published headers, block scales included: 684,531,386,000 elements in 641.29 GiB.
    assert parameters.total() == 684_531_386_000
    assert parameters["F8_E4M3"] + 2 * parameters["BF16"] + 4 * parameters["F32"] == 688_574_839_360
    shapes = {name: (dtype, shape) for name, dtype, shape in rows}
    assert shapes["model.layers.3.self_attn.kv_a_proj_with_mqa.weight_scale_inv"] == ("F32", (5, 56))
    assert shapes["model.layers.60.mlp.gate.weight"] == ("BF16", (256, 7168))
    assert shapes["model.layers.61.eh_proj.weight"] == ("BF16", (7168, 14336))


def test_what_is_written_is_a_sound_sharded_checkpoint(tmp_path: Path) -> None:
    folder = small_r1(tmp_path / "r1", mtp=True)
    found = open_checkpoint(folder)
    check_tensors(found.family, found.config, found.outline.shape, found.shapes, folder=folder)
    check_mtp(found, 3, folder=folder)
    assert found.config.keys() == make_r1.CONFIG.keys()
    assert len(found.shards) > 2
    assert all(name.endswith(f"-of-{len(found.shards):06d}.safetensors") for name in found.shards)
    rows = {name: (dtype, shape) for name, dtype, shape in make_r1.r1_tensors(found.config)}
    assert {name: (entry.dtype, entry.shape) for name, entry in found.stored.items()} == rows
    assert all(bool(found.read(name).isfinite().all()) for name in found.shapes)
    assert len(load_tokenizer(folder)) == 2048
    for name, copy in (("model.embed_tokens", "embed_tokens"), ("lm_head", "shared_head.head")):
        assert torch.equal(found.read(f"{name}.weight"), found.read(f"model.layers.3.{copy}.weight"))


def test_bytes_depend_on_the_seed_and_not_on_how_many_layers_there_are(tmp_path: Path) -> None:
    one, same, other = (small_r1(tmp_path / n, seed=s) for n, s in (("one", 0), ("same", 0), ("other", 1)))
    assert content(one) == content(same)
    assert content(one) != content(other)
    deeper = open_checkpoint(small_r1(tmp_path / "deeper", moe_layers=3))
    for name, entry in open_checkpoint(one).stored.items():
        assert torch.equal(read_tensor(entry).float(), read_tensor(deeper.stored[name]).float()), name


def test_experts_columns_and_routing_differ(tmp_path: Path) -> None:
    folder = small_r1(tmp_path / "r1")
    found = open_checkpoint(folder)
    weights = [found.read(f"model.layers.1.mlp.experts.{e}.up_proj.weight") for e in range(32)]
    sizes = torch.stack([weight.std() for weight in weights])
    assert sizes.max() > 2 * sizes.min()
    columns = weights[0].norm(dim=0)
    assert columns.max() > 2.5 * columns.median()
    normal = weights[0] / columns
    alike = (normal.T @ normal).fill_diagonal_(0)
    assert alike.max() > 0.999  # a copied column
    assert (normal.T @ (weights[1] / weights[1].norm(dim=0))).abs().max() < 0.6  # another expert is another matrix
    profile = profile_of(folder, corpus_of(windows(256, count=8, length=64)), tmp_path / "profile")
    counts = in_torch(profile)[1]["count"].sum(dim=(0, 1))
    assert counts.max() > 2 * counts.min() > 0


def test_outliers_are_four_times_as_large_and_never_nan() -> None:
    """Every fp8 number that the pool can hold, in a column that is an outlier."""
    every = np.arange(256, dtype=np.uint8)
    pool = np.tile(every[(every & 0x7F) != 0x7F], 40)
    (data,) = make_r1._fp8(make_r1._Pools(seed=0, fp8=pool, bf16={}), "x", (len(pool) // 4, 2))
    values = torch.frombuffer(bytearray(data), dtype=torch.float8_e4m3fn).float()
    assert not values.isnan().any()
    for before, after in ((0x38, 4.0), (0x67, 240.0), (0xE7, -240.0), (0x68, 448.0), (0x6F, 448.0), (0xFE, -448.0)):
        whole = torch.full((8, 1024), before, dtype=torch.uint8).numpy()
        (data,) = make_r1._fp8(make_r1._Pools(seed=0, fp8=whole.reshape(-1), bf16={}), "x", (4, 1024))
        row = torch.frombuffer(bytearray(data), dtype=torch.float8_e4m3fn).float().reshape(4, 1024)
        plain = torch.tensor([before], dtype=torch.uint8).view(torch.float8_e4m3fn).item()
        assert sorted(set(row[0].tolist())) == sorted({plain, after})
        assert (row[0] == after).sum() == 1 or plain == after


def test_keys_that_r1_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="R1's config has no"):
        make_r1.r1_config(dense_layers=1, moe_layers=1, experts=32, mtp=False, hidden=64)


def test_the_script_teaches_and_refuses(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)

    taught = run("--help")
    assert taught.returncode == 0
    for option in ("--dense-layers", "--moe-layers", "--experts", "--mtp", "--no-mtp", "--vocab"):
        assert option in taught.stdout
    (tmp_path / "mine.txt").write_text("mine")
    refused = run(str(tmp_path))
    assert refused.returncode == 2
    assert "is not empty" in refused.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_small_widths_have_cut_off_blocks() -> None:
    config = make_r1.r1_config(dense_layers=1, moe_layers=1, experts=32, mtp=False, **SMALL)
    cut = [s for n, d, s in make_r1.r1_tensors(config) if d == "F8_E4M3" and (s[0] % 128 or s[1] % 128)]
    assert len(cut) > 90
