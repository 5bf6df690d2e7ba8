"""What stays of tensors with an axis of experts, and of tables of expert numbers."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from moepress.models.storage.experts import Cut, renumbered


def test_rows_and_columns_are_taken() -> None:
    values = torch.arange(24.0).view(4, 6)
    assert torch.equal(Cut(axis=0, kept=(1, 3)).of(values), values[[1, 3]])
    assert torch.equal(Cut(axis=1, kept=(0, 5)).of(values), values[:, [0, 5]])
    assert Cut(axis=1, kept=(0, 5)).shape((1, 6)) == (1, 2)


@given(st.integers(0, 1000), st.integers(2, 12), st.integers(1, 3))
def test_a_table_names_only_experts_that_stay_and_no_expert_twice(seed: int, experts: int, chosen: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    chosen = min(chosen, experts)
    table = torch.stack([torch.randperm(experts, generator=generator)[:chosen] for _ in range(20)])
    count = int(torch.randint(chosen, experts + 1, (1,), generator=generator))
    kept = tuple(sorted(torch.randperm(experts, generator=generator)[:count].tolist()))
    new = renumbered(table, kept)
    assert new.dtype == table.dtype
    assert int(new.min()) >= 0
    assert int(new.max()) < count
    assert all(len(set(row)) == chosen for row in new.tolist())
    for before, after in zip(table.tolist(), new.tolist(), strict=True):  # who stays keeps its place
        for old, now in zip(before, after, strict=True):
            if old in kept:
                assert kept[now] == old
