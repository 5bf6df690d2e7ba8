"""A checkpoint's tensors against its config: nothing missing, nothing surplus, every shape as transformers has it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moepress.errors import InvalidInputError
from moepress.models.families.family import Family, Part, Shape, numbered
from moepress.models.families.router import router_of
from moepress.models.forward.expected import Expected, built, expected_of, remember
from moepress.models.storage.experts import is_fused
from moepress.models.storage.mtp import joint_of, prefix_of, twin_of
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
        problems += _expert_problems(family, shape, shapes, layer, _expert_hidden(family, wanted, layer))
    return problems


def _missing(family: Family, wanted: Expected, covered: set[str]) -> list[str]:
    """Tensors of the layers, and outside of them of the language model, that have no counterpart on disk."""
    made_of = {disk: module for disk, module, _ in family.templates}
    converted = {made_of[disk] for disk in family.converted}
    body, tied = family.module_layers_at.removesuffix("layers."), bool(wanted.config.get("tied_head"))
    missing = []
    for name, size in wanted.shapes.items():
        kind = numbered(name)[0]
        inside = name.startswith(family.module_layers_at)
        experts = inside and name.removeprefix(family.module_layers_at).partition(".")[2].startswith(
            f"{family.experts_module}."
        )
        needed = name.startswith(body) or (name.endswith("lm_head.weight") and not tied)
        if name in covered or 0 in size or experts or kind in converted or not needed:
            continue
        if any(module.rpartition(".")[0] == kind.rpartition(".")[0] for module in converted):
            continue  # one stored tensor makes several
        missing.append(f"{name} is missing")
    return missing


def _expert_hidden(family: Family, wanted: Expected, layer: int) -> int:
    """D of the experts, which may have another one than the model."""
    down = wanted.shapes[f"{family.module_layers_at}{layer}.{family.experts_module}.down_proj"]
    return down[1] * down[2] // family.expert_width


def _fused_sizes(family: Family, experts: int, hidden: int) -> list[tuple[int, ...]]:
    """What `Family.fused_names` are to have, in that order."""
    first = family.expert_width * (2 if family.gate and not family.fused_gate else 1)
    sizes = [(first, hidden), (hidden, family.expert_width)]
    if family.fused_transposed:
        sizes = [(columns, rows) for rows, columns in sizes]
    biases = [(first,), (hidden,)][: len(family.fused_biases)]
    more = [sizes[0]] if family.fused_gate else []
    return [(experts, *size) for size in (*sizes, *biases, *more)]


def _expert_problems(
    family: Family, shape: Shape, shapes: Mapping[str, tuple[int, ...]], layer: int, hidden: int
) -> list[str]:
    """Every expert of a layer is whole, there once, and of the size that the config states."""
    wide, names = family.expert_width, family.fused_names(layer)
    if names and names[0] in shapes:
        problems = [f"{name} is missing" for name in names if name not in shapes]
        problems += [
            f"{name} has shape {list(shapes[name])} and the config wants {list(size)}"
            for name, size in zip(names, _fused_sizes(family, shape.experts, hidden), strict=True)
            if name in shapes and shapes[name] != size
        ]
        single = family.expert_names(layer, 0)[-1]
        return [*problems, f"{single} is there twice, fused too"] if single in shapes else problems
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


def _refuse(problems: Sequence[str], folder: object, mend: str = "restore the folder") -> None:
    if problems:
        more = f" (and {len(problems) - 10} more)" if len(problems) > 10 else ""
        raise InvalidInputError(
            f"The tensors in {folder} do not fit its config.json: {'; '.join(problems[:10])}{more}; {mend}."
        )


def check_mtp(source: "Source", layer: int, *, folder: object) -> None:
    """Hold a multi-token-prediction layer against the decoder layers: it is one of them and the parts that join it.

    `check_tensors` lets such a layer be as it is, for transformers' model has no module for it. Who runs or keeps it
    calls this.

    Args:
        source: the model; the layer's `twin_of` is the pattern.
        layer: the layer's number.
        folder: for the message.

    Raises:
        InvalidInputError: tensors are missing, surplus or of another shape, such as another number of experts.
    """
    _refuse(mtp_problems(source, layer), folder, "restore the folder, or use --mtp drop")


def mtp_problems(source: "Source", layer: int) -> list[str]:
    """What `check_mtp` refuses."""
    family, by_layer = source.family, source.outline.names_by_layer
    twin, hidden, joint = twin_of(source, layer), source.outline.shape.hidden, joint_of(source.family, layer)
    own, pattern = prefix_of(family, layer), prefix_of(family, twin)
    expected = {own + n.removeprefix(pattern): source.shapes[n] for n in by_layer[twin]}
    found = {n: source.shapes[n] for n in by_layer.get(layer, ()) if not n.endswith(_IGNORED_SUFFIXES)}
    if is_fused(source, twin) != is_fused(source, layer):
        expected = {n: s for n, s in expected.items() if n not in _expert_tensors(source, layer, expected)}
        expected |= _expert_shapes(source, layer)
    joined = {joint.embedding_norm: (hidden,), joint.hidden_norm: (hidden,), joint.project: (hidden, 2 * hidden)}
    missing = {n for n in joined if n not in source.shapes}
    if layer > source.outline.shape.layers:  # what the layer before gives comes to this one through its norm
        before = joint_of(family, layer - 1).norm
        joined[before], missing = (hidden,), missing | ({before} - source.shapes.keys())
    expected |= {n: s for n, s in joined.items() if n in missing or family.layer_of(n) == layer}
    optional = {joint.norm, *joint.copies}
    expected = {n: s for n, s in expected.items() if not n.endswith(_IGNORED_SUFFIXES)}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    surplus = found.keys() - expected.keys() - optional
    problems += [f"{name} belongs to no part of the model" for name in sorted(surplus)]
    return problems + [
        f"{name} has shape {list(found[name])} and the other layers have {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in found and found[name] != shape
    ]


def _expert_tensors(source: "Source", layer: int, names: Iterable[str]) -> set[str]:
    """Those of a layer's names that are of routed experts, in either form."""
    fused = set(source.family.fused_names(layer))
    return {name for name in names if name in fused or source.family.expert_of(name) is not None}


def _expert_shapes(source: "Source", layer: int) -> dict[str, tuple[int, ...]]:
    """The experts' tensors of a layer that has them in another form than its twin, by the shapes of the first."""
    family, shapes = source.family, source.shapes
    if is_fused(source, layer):
        return {name: shapes[name] for name in family.fused_names(layer) if name in shapes}
    first = family.expert_names(layer, 0)
    return {
        name: shapes.get(like, ())
        for expert in range(source.outline.shape.experts)
        for name, like in zip(family.expert_names(layer, expert), first, strict=True)
    }


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
