"""A family that nobody wrote down: what an architecture is, asked of transformers.

Names come from the direction in which transformers loads (`core_model_loading.rename_source_key`), for what it would
save is not always what the model's authors stored. Which config key counts the experts, and which tensors have an axis
of them, comes of building the model a second time with fewer. What a family derived so computes is held against
transformers before any work (`forward.proof`).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn

from moepress.errors import InvalidInputError, UnsupportedError
from moepress.models.families.family import Config, Family, Part, numbered
from moepress.models.families.places import Places, Shapes
from moepress.models.families.routing_keys import COUNT_NAMES
from moepress.models.families.skeleton import build_skeleton, head_of
from moepress.models.families.structure import Structure, structure_of

_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts", "moe_top_k", "top_k")
_GROUPS = (("n_group", "topk_group"), ("num_expert_group", "num_limited_groups"))
_FEWER = (2, 4, 8, 3, 1, 6)
_COUNTS = re.compile(r"expert")


def derive(config: Config, shapes: Shapes | None = None) -> Family:
    """The family of a model, by its config and the tensors on disk.

    Args:
        config: config.json.
        shapes: names and shapes of its dense tensors; None: as transformers' modules have them.

    Raises:
        InvalidInputError: transformers can not build that config, or has no place for the experts' tensors.
        UnsupportedError: the model has no experts, or such as this does not see through.
    """
    if config.get("model_type") not in known_types():
        raise UnsupportedError(
            f"The installed transformers does not know model type {config.get('model_type')!r}; moepress never runs a "
            "checkpoint's own code: update transformers, or wait until it has that model."
        )
    model = build_skeleton(config)
    found = structure_of(model)
    if found is None:
        raise UnsupportedError(
            f"Model type {config.get('model_type')!r} has no routed experts that transformers keeps in one module; "
            "moepress presses mixture-of-experts models."
        )
    if shapes is None:
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return _Derivation(config, model, found, shapes).family()


def known_types() -> Mapping[str, Any]:
    """transformers' model types."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING  # type: ignore[no-any-return]


class _Derivation:
    """One derivation: the model, the same with fewer experts, and the names on disk with their places."""

    def __init__(self, config: Config, model: Any, structure: Structure, shapes: Shapes) -> None:
        self.config, self.model, self.structure, self.shapes = config, model, structure, shapes
        text = model.config.get_text_config()
        self.text_key = _text_key(model.config, text)
        self.text = config[self.text_key] if self.text_key else config
        self.parsed = text
        self.tensors = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.count_key, self.fewer = self._count_key()
        self.places = Places(model, shapes)
        self.layers_at = self._layers_at()
        self.outside = {  # name of the module -> part
            path: part
            for part, module in (
                (Part.EMBEDDINGS, model.get_input_embeddings()),
                (Part.LM_HEAD, head_of(model)),
            )
            for path, other in model.named_modules()
            if module is not None and other is module
        }

    def family(self) -> Family:
        """All that was found."""
        experts, layers_at = self._experts(), self.layers_at
        routers = self._routers()
        groups = next(((g, t) for g, t in _GROUPS if self._stated(g)), (None, None))
        return Family(
            name=str(self.config["model_type"]),
            architecture=type(self.model).__name__,
            experts_keys=(self.count_key, *self._count_names()),
            rule=None,
            expert_width_key=None,
            expert_width=self._expert_width(),
            router=tuple(name for name, _ in routers),
            router_axes=tuple(axis for _, axis in routers),
            router_extra=self._router_extra(routers[0][0]),
            tables=self._tables(),
            moe_module=self.structure.block,
            experts_module=self.structure.experts,
            top_k_key=self._top_k_key(),
            groups_key=groups[0],
            top_groups_key=groups[1],
            attention_groups=(),
            mlp_groups=(),
            never_quantize=self._never_quantized(),
            float32=_float32(self.model, self.places),
            derived=True,
            text_key=self.text_key,
            layers_at=layers_at,
            module_layers_at=self.structure.layers_at,
            embeddings=self._outer(Part.EMBEDDINGS, "embed_tokens"),
            head=self._outer(Part.LM_HEAD, "lm_head"),
            moe_layers=self.structure.moe_layers,
            layers=self.structure.layers,
            additive=False,
            defaults=self._defaults(groups),
            linears_outside=tuple(
                name
                for name, module in self.model.named_modules()
                if isinstance(module, nn.Linear) and self.structure.inner_name(name) is None
            ),
            templates=tuple(self._templates()),
            converted=tuple(sorted(self.places.converted)),
            **experts,
            **self._mtp(layers_at),
        )

    def _defaults(self, groups: tuple[str | None, str | None]) -> tuple[tuple[str, int], ...]:
        keys = ("hidden_size", "vocab_size", "max_position_embeddings", self._top_k_key(), *groups)
        found = ((key, getattr(self.parsed, key, None)) for key in keys if key is not None)
        return tuple((key, value) for key, value in found if type(value) is int)

    def _never_quantized(self) -> tuple[str, ...]:
        """Latent attention's `kv_b_proj`, over which runtimes trip wherever it occurs."""
        there = any(".kv_b_proj." in name for name in self.places.first)
        return ("kv_b_proj",) if there else ()

    def _stated(self, key: str) -> bool:
        return isinstance(getattr(self.parsed, key, None), int)

    def _count_key(self) -> tuple[str, dict[str, tuple[int, ...]]]:
        """The key whose change changes the experts, and the tensors of the model with fewer of them."""
        stated = self.structure.count
        keys = [k for k, v in self.parsed.to_dict().items() if type(v) is int and v == stated and k in self.text]
        keys += [k for k, v in self.text.items() if type(v) is int and v == stated and k not in keys]
        keys.sort(key=lambda key: not _COUNTS.search(key))
        for key in keys:
            for less in _FEWER:
                if stated - less < 1:
                    continue
                changed = dict(self.text) | {key: stated - less}
                config = dict(self.config) | {self.text_key: changed} if self.text_key else changed
                try:
                    other = build_skeleton(config)
                except InvalidInputError:
                    continue
                found = structure_of(other)
                if found is not None and found.count == stated - less:
                    return key, {name: tuple(tensor.shape) for name, tensor in other.state_dict().items()}
                break
        raise UnsupportedError(
            f"No key of config.json states the {stated} experts that transformers builds for "
            f"{self.config.get('model_type')}; write the number of experts into it as the original folder does."
        )

    def _count_names(self) -> list[str]:
        """Other names of the same number, which transformers takes for each other: all of them are to change."""
        stated = self.structure.count
        return [key for key in COUNT_NAMES if key != self.count_key and self.text.get(key) == stated]

    def _axis(self, module_name: str) -> int | None:
        """The axis of experts of a tensor in transformers' model, or None."""
        before, after = self.tensors.get(module_name), self.fewer.get(module_name)
        if before is None or after is None or len(before) != len(after):
            return None
        changed = [axis for axis, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        return changed[0] if len(changed) == 1 else None

    def _expert_width(self) -> int:
        module = self.structure.experts_of(self.model)
        shape = tuple(cast(Tensor, module.down_proj).shape)
        return int(shape[1] if getattr(module, "is_transposed", self.structure.transposed) else shape[2])

    def _in_experts(self, module_name: str) -> str | None:
        """The name of a tensor inside of the experts module, or None."""
        found = self.structure.inner_name(module_name)
        prefix = f"{self.structure.experts}."
        return found.removeprefix(prefix) if found is not None and found.startswith(prefix) else None

    def _experts(self) -> dict[str, Any]:
        """Names of the experts' tensors: those of the form that is there, and of single experts for what is written."""
        single: dict[str, str] = {}
        fused: dict[str, str] = {}
        example: dict[str, str] = {}
        for name, (module_name, role) in self.places.first.items():
            inner = self._in_experts(module_name)
            if inner is None or self._axis(module_name) is None:
                continue
            template, numbers = numbered(name)
            # A tensor of one expert has a number more than transformers' tensor of all.
            if len(numbers) > len(numbered(module_name)[1]):
                single[_role(inner, template)] = _pattern(template, 2)
            else:
                alone = role is not None and len(self.places.by_pattern[role].source_patterns) > 1
                key = f"gate of {inner}" if alone and role == self.places.by_pattern[role].source_patterns[0] else inner
                fused[key] = _pattern(template, 1)
                example[key] = name
        from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

        written, loads = _written(self.places, self.structure, self.layers_at)
        patched = type(self.structure.experts_of(self.model)).__name__ in MODULES_TO_PATCH_FOR_QUANTIZATION
        names: dict[str, Any] = {**written, "loads_single": loads or patched}
        down = names["down"].format(layer=self.structure.moe_layers[0], expert=0)
        names |= {role: pattern for role, pattern in single.items() if role in ("gate", "up", "down")}
        names["gate"] = names["gate"] if self.structure.gated else ""
        if fused:
            first = "gate_up_proj" if "gate_up_proj" in fused else "up_proj"
            if first not in fused or "down_proj" not in fused:
                raise InvalidInputError(
                    f"The experts lack a tensor: {sorted(fused.values())} are there; download the folder again."
                )
            names |= {"fused_gate_up": fused[first], "fused_down": fused["down_proj"]}
            names["fused_gate"] = fused.get(f"gate of {first}", "")
            names["fused_biases"] = tuple(fused[bias] for bias in (f"{first}_bias", "down_proj_bias") if bias in fused)
            names |= self._orientation(example[first], example["down_proj"], apart=bool(names["fused_gate"]))
        elif not single and down not in self.shapes:
            raise InvalidInputError(
                "None of the folder's tensors is one of the routed experts that config.json states; restore the folder."
            )
        else:
            names |= {"fused_gate_up": "", "fused_down": ""}
        return names

    def _orientation(self, first: str, down: str, *, apart: bool) -> dict[str, bool]:
        """How the fused tensors on disk lie, by what transformers makes of them and how it uses that."""
        module = self.structure.experts_of(self.model)
        turned, mixed = self.places.changes(first)
        transposed = bool(getattr(module, "is_transposed", self.structure.transposed)) != turned
        interleaved = mixed or not getattr(module, "is_concatenated", True)
        both = self.structure.gated and not apart
        # Shapes say it, for D is not both F and 2F: MXFP4 blocks lie as [E, 2F, D] whatever the class has.
        for shape, out in (
            (self.shapes[first], self._expert_width() * (2 if both else 1)),
            (self.shapes[down], int(self.parsed.hidden_size)),
        ):
            if shape[1] != shape[2] and out in shape[1:]:
                transposed = shape[2] == out
                break
        return {"fused_transposed": transposed, "fused_interleaved": interleaved}

    def _routers(self) -> list[tuple[str, int]]:
        """Names of what has an axis of experts besides the experts themselves, the router's weight first."""
        found: dict[str, tuple[bool, int]] = {}
        for name, (module_name, _role_of) in self.places.first.items():
            axis = self._axis(module_name)
            if axis is None or self._in_experts(module_name) is not None:
                continue
            if self.structure.inner_name(module_name) is None:
                continue
            dimensions = len(self.tensors[module_name])
            weight = name.endswith("weight") and dimensions == 2 and axis == 0
            found[_pattern(numbered(name)[0], 1)] = (not weight, axis)
        ordered = sorted(found, key=lambda pattern: (found[pattern][0], pattern))
        if not ordered or found[ordered[0]][0]:
            raise UnsupportedError(
                f"The router of {self.config.get('model_type')} models has no weight with a row per expert; such a "
                "model can not be pressed here."
            )
        return [(pattern, found[pattern][1]) for pattern in ordered]

    def _router_extra(self, pattern: str) -> int:
        kind = pattern.replace("{layer}", "#")
        modules = (module for name, (module, _) in self.places.first.items() if numbered(name)[0] == kind)
        return int(self.tensors[next(modules)][0]) - self.structure.count

    def _tables(self) -> tuple[str, ...]:
        """Integer tensors in the MoE block: expert numbers by token."""
        state = self.model.state_dict()
        names = {
            _pattern(numbered(name)[0], 1)
            for name, (module_name, _) in self.places.first.items()
            if module_name in state
            and not state[module_name].is_floating_point()
            and (inner := self.structure.inner_name(module_name)) is not None
            and inner.startswith(self.structure.block)
            and len(self.tensors[module_name]) == 2
        }
        return tuple(sorted(names))

    def _top_k_key(self) -> str:
        for stated in (self.text.get, lambda key: getattr(self.parsed, key, None)):
            for key in _TOP_K:
                if type(stated(key)) is int:
                    return key
        raise UnsupportedError(
            f"No key of config.json states how many experts a token gets ({', '.join(_TOP_K)}); write it down."
        )

    def _layers_at(self) -> str:
        """The prefix of the decoder layers' names on disk."""
        found: dict[str, int] = {}
        for name, (module_name, _) in self.places.first.items():
            if self.structure.inner_name(module_name) is not None:
                prefix = re.split(r"(?<=\.)\d+\.", name, maxsplit=1)[0]
                found[prefix] = found.get(prefix, 0) + 1
        if found:
            return max(found, key=lambda prefix: found[prefix])
        raise InvalidInputError("The folder has no decoder layer of the model that config.json states; restore it.")

    def _outer(self, part: Part, usual: str) -> str:
        """The name on disk of the weight of a module outside of the layers."""
        weight = next((f"{path}.weight" for path, found in self.outside.items() if found is part), f"{usual}.weight")
        names = (name for name, (module_name, _) in self.places.first.items() if module_name == weight)
        return next(names, weight)

    def _mtp(self, layers_at: str) -> dict[str, Any]:
        """Whether tensors of multi-token prediction lie behind the layers, or under a prefix of their own."""
        behind = {name.split(".layers.")[0] for name in self.shapes if re.match(r"(.*\.)?mtp\.layers\.\d+\.", name)}
        if behind:
            return {"mtp": True, "mtp_at": f"{sorted(behind)[0]}.layers."}
        last = f"{layers_at}{self.structure.layers}."
        return {"mtp": any(name.startswith(last) and name.endswith("eh_proj.weight") for name in self.shapes)}

    def _templates(self) -> Iterator[tuple[str, str, str]]:
        for name, (module_name, _) in self.places.first.items():
            part, kind, numbers = self._part(name, module_name), *numbered(name)
            there, theirs = numbered(module_name)
            if len(theirs) == len(numbers):
                yield kind, there, part.value
                continue
            yield kind, kind, part.value  # one expert's tensor goes by its name on disk
            if part is Part.TOWERS:  # under other numbers: by itself
                for each in self.places.kinds[kind]:
                    yield each, self.places.place(each)[0], part.value

    def _part(self, name: str, module_name: str) -> Part:
        if module_name not in self.tensors:
            inside = f"{self.layers_at}#.{self.structure.experts}.#."
            return Part.ROUTED if numbered(name)[0].startswith(inside) else Part.TOWERS
        if self._in_experts(module_name) is not None:
            return Part.ROUTED
        inner = self.structure.inner_name(module_name)
        if inner is None:
            return self._outer_part(module_name)
        matrix = len(self.tensors[module_name]) == 2
        if self._axis(module_name) is not None or (matrix and self.tensors[module_name][0] == 1):
            return Part.ROUTER
        if not matrix or not inner.endswith("weight"):
            return Part.NORMS
        return self.structure.part_of(self.model, module_name, inner)

    def _outer_part(self, module_name: str) -> Part:
        for path, part in self.outside.items():
            if module_name.startswith(f"{path}."):
                return part
        body = self.structure.layers_at.rpartition("layers.")[0]
        return Part.NORMS if module_name.startswith(body) else Part.TOWERS


def _text_key(whole: Any, text: Any) -> str | None:
    """Where the text model's config lies in the whole config."""
    if text is whole:
        return None
    return next(
        (
            key
            for key in ("text_config", "llm_config", "language_config", *whole.sub_configs)
            if getattr(whole, key, None) is text
        ),
        None,
    )


def _pattern(template: str, numbers: int) -> str:
    """A template whose first number is the layer's, and whose second, where there is one, the expert's."""
    fields = iter(("{layer}", "{expert}")[:numbers])
    return ".".join(next(fields, "#") if piece == "#" else piece for piece in template.split("."))


_ROLES = (("gate", ("gate_proj", "w1")), ("up", ("up_proj", "w3")), ("down", ("down_proj", "w2")))


def _role(inner: str, template: str) -> str:
    """Which matrix of an expert a tensor of one expert is: by what it is made part of, and its place in that."""
    if not template.endswith(".weight"):
        return f"{inner}{template.rpartition('.')[2]}"
    if inner.startswith("down"):
        return "down"
    if inner.startswith("up"):
        return "up"
    leaf = template.split(".")[-2]
    return next((role for role, leaves in _ROLES if leaf in leaves), leaf)


_LEAVES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


def _written(places: Places, structure: Structure, layers_at: str) -> tuple[dict[str, str], bool]:
    """Names of single experts' matrices, for what is written of experts that are stored fused.

    Where transformers makes the fused tensors of single ones they are named as its converter wants them; elsewhere as
    most models name them, and transformers does not load them.

    Returns:
        The names of gate, up and down, and whether transformers loads them.
    """
    for leaves in _LEAVES:
        for block in _blocks(places, structure):
            names = [f"{layers_at}{{layer}}.{block}.{{expert}}.{leaf}.weight" for leaf in leaves]
            tried = [places.place(n.format(layer=structure.moe_layers[0], expert=0))[0] for n in names]
            if tried[2] in places.state and tried[1] in places.state:
                return dict(zip(("gate", "up", "down"), names, strict=True)), True
    names = [f"{layers_at}{{layer}}.{structure.experts}.{{expert}}.{leaf}.weight" for leaf in _LEAVES[0]]
    return dict(zip(("gate", "up", "down"), names, strict=True)), False


def _blocks(places: Places, structure: Structure) -> list[str]:
    """Where the experts of a layer may lie on disk, by the names of its router's tensors and of the experts."""
    found = [structure.experts]
    for template in (numbered(name)[0] for name in places.first):
        inside = template.split("#.", 1)[-1]
        for leaf in ("experts", "gate", "router"):
            head, dot, _ = f".{inside}".partition(f".{leaf}.")
            if dot:
                found.append(f"{head.removeprefix('.')}.experts".removeprefix("."))
    return list(dict.fromkeys(found))


def _float32(model: Any, places: Places) -> tuple[str, ...]:
    """Suffixes of names on disk that transformers keeps in fp32, and of correction biases, which authors keep so."""
    stated = {
        *(model._keep_in_fp32_modules_strict or ()),
        *(model._keep_in_fp32_modules or ()),
        "e_score_correction_bias",
    }
    wanted = re.compile(rf"(^|\.)({'|'.join(map(re.escape, sorted(stated)))})(\.|$)")
    kinds = [numbered(name)[0] for name, (module_name, _) in places.first.items() if wanted.search(module_name)]
    return tuple(sorted({kind.rpartition("#.")[2] for kind in kinds}))
