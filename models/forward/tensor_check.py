"""A checkpoint's tensors against its config: nothing missing, nothing surplus, every shape as transformers has it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moepress.errors import InvalidInputError
from moepress.models.families.family import Family, Part, Shape, numbered
from moepress.models.families.router import router_of
from moepress.models.forward.expected import Expected, built, expected_of, remember
from moepress.models.storage.settled import CACHE_SCALES

if TYPE_CHECKING:
    from moepress.models.storage.checkpoint import Source

_IGNORED_SUFFIXES = ("rotary_emb.inv_freq", *CACHE_SCALES)


def check_tensors(
    family: Family,
    config: Mapping[str, Any],
    shape: Shape,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    folder: object,
    model: Any = None,
) -> None:
    """Hold the tensors of a checkpoint against transformers' model; `model` where it is built already.

    Raises:
        InvalidInputError: tensors are missing, surplus or of another shape (the first ten are listed).
    """
    wanted = expected_of(config) if model is None else remember(config, model)
    problems = _problems(family, config, shape, shapes, wanted)
    if problems and wanted.remembered:  # what is refused is refused by transformers' model, never from memory
        problems = _problems(family, config, shape, shapes, built(config))
    _refuse(problems, folder)


def _problems(
    family: Family,
    config: Mapping[str, Any],
    shape: Shape,
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Expected,
) -> list[str]:
    if family.derived:
        return _derived_problems(family, shape, shapes, wanted)
    expected = dict(wanted.shapes)
    if config.get("tie_word_embeddings"):
        expected.pop("lm_head.weight", None)
    disk = {family.module_name(name): name for name in shapes}
    found = {name: shapes[disk_name] for name, disk_name in disk.items()}
    expected = _split_experts(family, expected, found)
    for name in list(found):
        tied = name == "lm_head.weight" and bool(config.get("tie_word_embeddings"))
        if name.endswith(_IGNORED_SUFFIXES) or tied or _is_mtp(family, shape.layers, name, disk):
            del found[name]
    renames = _renames_on_disk(family, disk)
    missing = [name for name in sorted(expected.keys() - found.keys()) if 0 not in expected[name]]  # nothing is nothing
    problems = [f"{_disk_name(renames, name)} is missing" for name in missing]
    problems += [f"{disk[name]} belongs to no part of the model" for name in sorted(found.keys() - expected.keys())]
    problems += [f"{name} is there twice" for name in sorted(shapes.keys() - disk.values())]
    problems += [
        f"{disk[name]} has shape {list(found[name])} and the config wants {list(size)}"
        for name, size in sorted(expected.items())
        if name in found and found[name] != size
    ]
    return problems + _unstated(family, config, shape, wanted.config)


def _derived_problems(
    family: Family, shape: Shape, shapes: Mapping[str, tuple[int, ...]], wanted: Expected
) -> list[str]:
    """Of a derived family: every tensor of transformers' model is there, and nothing but what it leaves out itself.

    Names come from the loader, so a tensor that has no place may be of a part that transformers does not build. Within
    the decoder layers there is no such part.
    """
    problems, covered = list[str](), set[str]()
    fused = {name for layer in range(shape.layers) for name in family.fused_names(layer)}
    for name, found in shapes.items():
        layer, part = family.layer_of(name), family.part_of(name)
        module = family.module_name(name)
        if (layer is not None and layer >= shape.layers) or name.endswith(_IGNORED_SUFFIXES):
            continue
        if family.expert_of(name) is not None or name in fused:
            continue
        if numbered(name)[0] in family.converted:
            continue
        if part in (None, Part.TOWERS) or module not in wanted.shapes:
            if layer is not None:
                problems.append(f"{name} belongs to no part of the model")
            continue
        covered.add(module)
        if wanted.shapes[module] != found:
            problems.append(f"{name} has shape {list(found)} and the config wants {list(wanted.shapes[module])}")
    problems += _missing(family, wanted, covered)
    for layer in family.moe_layers or ():
        problems += _expert_problems(family, shape, shapes, layer)
    return problems


def _missing(family: Family, wanted: Expected, covered: set[str]) -> list[str]:
    """Tensors of the layers, and outside of them of the language model, that have no counterpart on disk."""
    made_of = {disk: module for disk, module, _ in family.templates}
    converted = {made_of[disk] for disk in family.converted}
    known = {module for _, module, part in family.templates if part != Part.TOWERS}
    missing = []
    for name, size in wanted.shapes.items():
        kind = numbered(name)[0]
        inside = name.startswith(family.module_layers_at)
        experts = inside and name.removeprefix(family.module_layers_at).partition(".")[2].startswith(
            f"{family.experts_module}."
        )
        if name in covered or 0 in size or experts or kind in converted or not (inside or kind in known):
            continue
        if any(module.rpartition(".")[0] == kind.rpartition(".")[0] for module in converted):
            continue  # one stored tensor makes several
        missing.append(f"{name} is missing")
    return missing


def _expert_problems(family: Family, shape: Shape, shapes: Mapping[str, tuple[int, ...]], layer: int) -> list[str]:
    """Every expert of a layer is whole, and of the size that the config states."""
    wide, hidden = family.expert_width, shape.hidden
    names = family.fused_names(layer)
    if names and names[0] in shapes:
        missing = [f"{name} is missing" for name in names if name not in shapes]
        rows = [
            f"{name} has {shapes[name][0]} experts and the config states {shape.experts}"
            for name in names
            if name in shapes and shapes[name][0] != shape.experts
        ]
        return missing + rows
    problems = []
    for expert in range(shape.experts):
        *firsts, down = family.expert_names(layer, expert)
        for name, size in (*((first, (wide, hidden)) for first in firsts), (down, (hidden, wide))):
            if name not in shapes:
                problems.append(f"{name} is missing")
            elif shapes[name] != size:
                problems.append(f"{name} has shape {list(shapes[name])} and the config wants {list(size)}")
    beyond = family.expert_names(layer, shape.experts)[-1]
    return [*problems, f"{beyond} belongs to no part of the model"] if beyond in shapes else problems


def _refuse(problems: Sequence[str], folder: object) -> None:
    if problems:
        more = f" (and {len(problems) - 10} more)" if len(problems) > 10 else ""
        raise InvalidInputError(
            f"The tensors in {folder} do not fit its config.json: {'; '.join(problems[:10])}{more}; restore the folder."
        )


_MTP_OWN = ("enorm.weight", "hnorm.weight", "eh_proj.weight")
_MTP_COPIES = ("embed_tokens.weight", "shared_head.norm.weight", "shared_head.head.weight")  # not in every checkpoint


def check_mtp(source: "Source", layer: int, *, folder: object) -> None:
    """Hold a multi-token-prediction layer against the decoder layers: it is one of them and the parts that join it.

    `check_tensors` lets such a layer be as it is, for transformers has no module for it. Who keeps it calls this.

    Args:
        source: the model; its last layer with experts is the pattern.
        layer: the layer's number.
        folder: for the message.

    Raises:
        InvalidInputError: tensors are missing, surplus or of another shape, such as another number of experts.
    """
    own, pattern = f"model.layers.{layer}.", f"model.layers.{max(source.outline.moe_layers)}."
    hidden = source.outline.shape.hidden
    expected = {own + n.removeprefix(pattern): s for n, s in source.shapes.items() if n.startswith(pattern)}
    expected |= dict(zip((own + n for n in _MTP_OWN), ((hidden,), (hidden,), (hidden, 2 * hidden)), strict=True))
    optional = {own + name for name in _MTP_COPIES}
    found = {n: s for n, s in source.shapes.items() if n.startswith(own) and not n.endswith(_IGNORED_SUFFIXES)}
    expected = {n: s for n, s in expected.items() if not n.endswith(_IGNORED_SUFFIXES)}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    surplus = found.keys() - expected.keys() - optional
    problems += [f"{name} belongs to no part of the model" for name in sorted(surplus)]
    problems += [
        f"{name} has shape {list(found[name])} and the other layers have {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in found and found[name] != shape
    ]
    _refuse(problems, folder)


def _is_mtp(family: Family, layers: int, name: str, names: Mapping[str, str]) -> bool:
    """A layer behind the last one is a multi-token-prediction layer when it joins hidden state and embedding."""
    layer = family.layer_of(name) if family.mtp else None
    return layer is not None and layer >= layers and f"model.layers.{layer}.eh_proj.weight" in names


def _renames_on_disk(family: Family, disk: Mapping[str, str]) -> list[tuple[str, str]]:
    """The family's renames that this checkpoint uses; one scan, not one per tensor that is missing."""
    return [(old, new) for old, new in family.renames if any(old in there for there in disk.values())]


def _disk_name(renames: Sequence[tuple[str, str]], name: str) -> str:
    """The name that a missing tensor would have in this checkpoint, for messages."""
    for old, new in renames:
        name = name.replace(new, old)
    return name


def _unstated(family: Family, config: Mapping[str, Any], shape: Shape, parsed: Mapping[str, Any]) -> list[str]:
    """Routing numbers that the config leaves out and that transformers would take differently from us."""
    router, rule = router_of(family, config, shape), family.known_rule
    ours = {
        family.groups_key: router.groups,
        family.top_groups_key: router.top_groups,
        rule.renormalise_key: router.renormalise,
        rule.scale_key: router.scale,
    }
    return [
        f"config.json does not state {key} (transformers takes {parsed[key]}, moepress {value})"
        for key, value in ours.items()
        if key is not None and key not in config and parsed.get(key) not in {None, value}
    ]


def _split_experts(
    family: Family, expected: dict[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Replace the fused [E, 2F, D] and [E, D, F] of transformers by per-expert names, unless they lie fused on disk."""
    out: dict[str, tuple[int, ...]] = {}
    for name, shape in expected.items():
        layer, block = family.layer_of(name), name.rpartition(".")[0]
        fused = f"{block}.gate_up_proj" in found or f"{block}.down_proj" in found
        if layer is None or fused or not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            out[name] = shape
            continue
        for expert in range(shape[0]):
            gate, up, down = map(family.module_name, family.expert_names(layer, expert))
            if name.endswith("gate_up_proj"):
                out[gate] = out[up] = (shape[1] // 2, shape[2])
            else:
                out[down] = shape[1:]
    return out
