"""Every mixture-of-experts model of the installed transformers, against transformers: see tests/family_criteria.py.

`make test` tries ten types, `make test-families` all of them. What a type shows, or why it does not, stands in
families_golden.json; a new release of transformers that changes it shows here.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import every_family
import pytest
from family_criteria import CRITERIA, GOLDEN, LEAST, TEN, Subject, attempt

from moepress.models.families.derive import derive
from moepress.models.families.hf_config import ALIASES
from moepress.models.families.table import FAMILIES
from moepress.models.storage.checkpoint import open_checkpoint

KNOWN: dict[str, dict[str, str]] = json.loads(GOLDEN.read_text())
ALL = tuple(sorted(KNOWN))


def marked(model_type: str) -> Any:
    return pytest.param(model_type, marks=() if model_type in TEN else pytest.mark.slow)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Subject]]:
    """The subject at hand; one at a time is kept."""
    held: dict[str, Subject] = {}

    class Subjects(dict[str, Subject]):
        def __missing__(self, model_type: str) -> Subject:
            held.clear()
            held[model_type] = Subject(model_type, tmp_path_factory.mktemp(model_type))
            return held[model_type]

        def __getitem__(self, model_type: str) -> Subject:
            return held.get(model_type) or self.__missing__(model_type)

    yield Subjects()
    held.clear()


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("model_type", [marked(t) for t in ALL if t not in every_family.REFUSED])
def test_a_family_shows_what_the_golden_list_says(
    model_type: str, criterion: str, subjects: dict[str, Subject]
) -> None:
    outcome, known = attempt(subjects[model_type], criterion), KNOWN[model_type][criterion]
    assert bool(outcome.why) == bool(known), outcome.why or f"it does now, and the golden list says: {known}"


def test_enough_families_show_all() -> None:
    assert sum(not any(why.values()) for why in KNOWN.values()) >= LEAST
    for criterion in ("names", "streamed", "keeps bytes", "pruned"):
        assert sum(not why[criterion] for why in KNOWN.values()) >= 70, criterion


@pytest.mark.slow
def test_no_type_of_the_installed_transformers_is_left_out() -> None:
    assert set(every_family.moe_types()) == set(ALL)


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - set(ALIASES)))
def test_what_is_derived_of_a_row_s_model_is_what_the_row_says(model_type: str, tmp_path: Path) -> None:
    """Rows are written down to open without torch; asking transformers gives the same."""
    folder = every_family.save(every_family.build(model_type), tmp_path / "model")
    source = open_checkpoint(folder)
    row, found = source.family, derive(source.config, source.shapes)
    for layer in source.outline.moe_layers:
        assert found.expert_names(layer, 3) == row.expert_names(layer, 3)
        assert found.router_names(layer) == row.router_names(layer)
    assert found.moe_layers == source.outline.moe_layers
    assert found.experts_keys[0] in row.experts_keys
    assert found.top_k_key == row.top_k_key
    assert (found.groups_key, found.top_groups_key) == (row.groups_key, row.top_groups_key)
    for name in source.shapes:
        if row.expert_of(name) is None:
            assert found.module_name(name) == row.module_name(name)
        assert found.expert_of(name) == row.expert_of(name)
        assert found.layer_of(name) == row.layer_of(name)
