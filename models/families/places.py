"""Where transformers' loader puts the tensors of a checkpoint, and what its converters make of them."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moepress.models.families.family import numbered

Shapes = Mapping[str, tuple[int, ...]]


class Places:
    """Where transformers' loader puts every name on disk.

    Attributes:
        first: a name on disk of each kind (numbers apart) -> (tensor in transformers' model, pattern of its converter).
        converted: kinds of names that pass through a converter without being an expert's.
    """

    def __init__(self, model: Any, shapes: Shapes) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        transforms = get_model_conversion_mapping(model)
        self.model = model
        self.renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self.converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self.state = model.state_dict()
        self.by_pattern = {p: c for c in self.converters for p in c.source_patterns}
        self.first: dict[str, tuple[str, str | None]] = {}
        self.kinds: dict[str, list[str]] = {}
        for name in shapes:
            self.kinds.setdefault(numbered(name)[0], []).append(name)
        for names in self.kinds.values():
            self._place_kind(names)
        self.converted = {
            numbered(name)[0]
            for name, (module, pattern) in self.first.items()
            if pattern is not None and ".experts." not in module
        }

    def place(self, name: str) -> tuple[str, str | None]:
        """The tensor that a name on disk goes into, and the pattern of the converter that it passes through."""
        from transformers.core_model_loading import rename_source_key

        base = self.model.base_model_prefix
        found, pattern = rename_source_key(name, self.renamings, self.converters, base, self.state)
        if found not in self.state and name in self.state:
            found, pattern = rename_source_key(name, [], [], base_model_prefix=base, meta_state_dict=self.state)
        return found, pattern

    def _place_kind(self, names: list[str]) -> None:
        """One name stands for its kind; one that has a place is preferred, for a kind may go on behind the layers."""
        for name in (names[0], names[-1]):
            found = self.place(name)
            if found[0] in self.state:
                self.first[name] = found
                return
        self.first[names[0]] = self.place(names[0])

    def changes(self, name: str) -> tuple[bool, bool]:
        """Whether the converter of a fused tensor turns its last axes, and whether it sorts interleaved rows."""
        _found, pattern = self.first[name]
        operations = [] if pattern is None else [type(op).__name__ for op in self.by_pattern[pattern].operations]
        return "Transpose" in operations, "Interleave" in operations


def tensors_of(places: Places, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of transformers' model that its converters make of tensors on disk.

    Args:
        places: of the model.
        given: names on disk -> tensors; all that a converter wants.
    """
    grouped: dict[str, list[str]] = {}
    for name in given:
        grouped.setdefault(places.place(name)[0], []).append(name)
    made: dict[str, Tensor] = {}
    for target, names in grouped.items():
        pattern = places.place(names[0])[1]
        assert pattern is not None
        converter = copy.deepcopy(places.by_pattern[pattern])
        for name in sorted(names):
            converter.add_tensor(target, name, places.place(name)[1], given[name])
        found = converter.convert(target, model=places.model, config=places.model.config)
        made |= {key: value[0] if isinstance(value, list) else value for key, value in found.items()}
    return made
