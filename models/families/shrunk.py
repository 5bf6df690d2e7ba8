"""The same architecture, tiny: a config whose sizes are small and whose features are those of a given one.

What a model is made of stays: which kinds of layers there are and in which order, groups, shared experts, which parts
are optional, what is tied to what. Sizes become small by the names of their keys, so a new release of transformers
brings its new models along. A random model of such a config is built in a second, and tells of the large one what no
config does (`forward.proof`).
"""

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from moepress.models.families.hf_config import hf_config

if TYPE_CHECKING:
    import torch

HIDDEN, EXPERTS, TOP_K, CONTEXT = 64, 12, 4, 256
LAYERS, MOST_LAYERS, TOWER_LAYERS = 4, 16, 2
TEXT_VOCABULARY = 256  # random windows below it meet no special token
VOCABULARY = TEXT_VOCABULARY + 32  # the special ids are the last 32

COUNT = "num_experts|num_local_experts|n_routed_experts|moe_num_experts"
_TOP_K = "num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|moe_top_k|top_k_experts"
_HEADS = "num_attention_heads|num_heads|n_heads|encoder_attention_heads|attention_heads"

# Whole key -> size; the first that fits counts. All widths are multiples of 32, as groups of 32 weights ask.
_SIZES: tuple[tuple[str, int], ...] = (
    (COUNT, EXPERTS),
    ("zero_expert_num", 4),
    ("num_nextn_predict_layers|num_mtp_layers|mtp_num_hidden_layers", 0),
    (f"{_HEADS}|num_sliding_attention_heads|swa_num_attention_heads|index_n_heads|indexer_n_heads|o_groups", 4),
    ("linear_num_heads|linear_num_value_heads", 4),
    ("linear_num_key_heads|swa_num_key_value_heads|num_global_key_value_heads|kv_n_heads", 2),
    ("mamba_num_heads|mamba_n_heads|mamba_dt_rank", 8),
    ("hidden_size|d_model|emb_dim|moe_hidden_size|.*_hidden_size|.*_hidden_dim|.*hidden_size_per_layer_input", HIDDEN),
    (r"adapter_(in_dim|out_dim|input_size)|projector_(in|out)put_dim|vision_output_dim|output_dim", HIDDEN),
    ("(moe|expert)_intermediate_size|expert_ffn_hidden_size", 64),
    (r"shared?_expert\w*_(intermediate_size|dim)|moe_shared_expert_intermediate_size|shared_intermediate_size", 96),
    (r"(\w+_)?intermediate_size(_mlp)?|ffn_hidden_size|encoder_ffn_dim|mlp_dim", 128),
    (r"(index|indexer)_head_dim", 32),
    (r"(\w+_)?head_dim|mamba_d_head|kv_channels|rotary_dim|ssm_state_size|mamba_d_state", 16),
    (r"[qkvo]+_lora_rank|\w+_lowrank|gated_norm_rank|router_hidden_size|kv_lora_rank", 32),
    ("n_groups", 2),
    ("vocab_size|vocab_size_per_layer_input|unpadded_vocab_size|padded_vocab_size", VOCABULARY),
    (r"(original_)?max_position_embeddings|max_seq_len|model_max_length", CONTEXT),
    (r"index_topk|indexer_budget", CONTEXT),  # all tokens: which are chosen would hang on the last bit of a score
    (r"(sliding_window|attention_chunk)(_size)?|chunk_size|mamba_chunk_size", 8),
    ("heavily_compressed_attention", 8),  # tokens that become one; 128 would not show in a short window
    ("image_size|max_img_size", 32),
    ("patch_size", 8),
    ("num_position_embeddings|position_embedding_size", 16),
    ("pos_emb_height|pos_emb_width|posemb_grid_size", 4),
)
_SPECIAL = re.compile(r"\w*(_token_ids?|_token_index|_(bos|pad|nothink|eos)_id)")
_WIDEST = 4  # times the rotated part of a head
_DEPTH = ("num_hidden_layers", "n_layers", "num_layers", "depth", "encoder_layers")
_BY_LAYER = ("layer_types", "layers_block_type")  # where the number of layers is not stated
# What layers differ by besides lists with an entry per layer: those before a number, and each so-manieth.
_FIRST_LAYERS = re.compile(r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|num_hash_layers")
_PERIODS = re.compile(
    r"\w+_layer_(period|interval)|full_attention_interval|layer_group_size|\w+_every_n_layers|decoder_sparse_step|"
    r"sliding_window_pattern|interleave_moe_layer_step|moe_layer_freq|n_layers_per_\w+"
)
_LAYER_NUMBERS = re.compile(r"\w*layers|\w*layer_ids|\w*(idxs|indexes|indices)")
_GROUPS = (("n_group", "topk_group"), ("num_expert_group", "topk_group"), ("num_expert_group", "num_limited_groups"))


def shrunk(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a tiny model with the same features.

    Args:
        config: any config.json; keys that it leaves out are those that transformers takes.

    Returns:
        Plain JSON, every key stated.

    Raises:
        InvalidInputError: transformers refuses the config.
    """
    values = plain(hf_config(config))
    _shrink(values, iter(range(TEXT_VOCABULARY, VOCABULARY)), text=True)
    return values


def plain(parsed: Any) -> dict[str, Any]:
    """A transformers config as plain JSON, with every key that it knows."""
    found: dict[str, Any] = json.loads(parsed.to_json_string(use_diff=False))
    return found


def text_keys(values: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that speaks of the text model."""
    inner = values.get("thinker_config", values)
    found = next((inner[key] for key in ("text_config", "llm_config", "language_config") if inner.get(key)), None)
    return values if found is None else found


def _shrink(values: dict[str, Any], special: Iterator[int], *, text: bool) -> None:
    """Make the sizes of a config small, in place, those of its sub-configs too."""
    before = dict(values)
    for key in ("dtype", "transformers_version", "per_layer_config"):
        values.pop(key, None)
    depth = depth_of(before)
    layers = _prefix(before, depth, LAYERS if text else TOWER_LAYERS)
    for key, value in list(values.items()):
        if key in ("id2label", "label2id"):
            continue
        if isinstance(value, dict):
            inner = any(word in key for word in ("text", "llm", "language", "thinker"))
            _shrink(value, special, text=inner or (text and not key.endswith("_config")))
        elif isinstance(value, list | str):
            values[key] = _sequence(key, value, depth, layers, text=text)
        elif isinstance(value, int) and not isinstance(value, bool):
            values[key] = _number(key, value, layers, special)
    _fit(before, values, layers)


def depth_of(values: Mapping[str, Any]) -> int:
    """How many layers a config states; 0 where it has none."""
    stated = next((values[key] for key in _DEPTH if isinstance(values.get(key), int) and values[key]), None)
    return stated or next((len(values[key]) for key in _BY_LAYER if values.get(key)), 0)


def _prefix(before: Mapping[str, Any], depth: int, least: int) -> int:
    """So many layers that each kind of layer is among them: the first ones, so that their order stays."""
    if not depth:
        return least
    lists = [v for v in before.values() if isinstance(v, list | str) and len(v) == depth and len(set(map(str, v))) < 5]
    numbers = [v for k, v in before.items() if isinstance(v, list) and _LAYER_NUMBERS.fullmatch(k) and _ascending(v)]
    whole = [(k, v) for k, v in before.items() if isinstance(v, int) and not isinstance(v, bool)]
    first = [v for k, v in whole if _FIRST_LAYERS.fullmatch(k) and 0 < v < depth]
    periods = [v for k, v in whole if _PERIODS.fullmatch(k) and 1 < v <= MOST_LAYERS]
    seen, needed = set[str](), 0
    for layer in range(min(depth, MOST_LAYERS)):
        flags = (
            [layer < v for v in first],
            [layer in v for v in numbers if len(v) != depth],
            [layer % p for p in periods],
        )
        kind = json.dumps([[v[layer] for v in lists], *flags])
        if kind not in seen:
            seen.add(kind)
            needed = layer + 1
    wanted = max([needed, least, *(v + 2 for v in first)])
    wanted = wanted * 2 if before.get("num_kv_shared_layers") else wanted
    return min(wanted, depth, MOST_LAYERS)


def _ascending(value: list[Any]) -> bool:
    whole = bool(value) and all(type(item) is int for item in value)
    return whole and all(a < b for a, b in itertools.pairwise(value))


def _sequence(key: str, value: Any, depth: int, layers: int, *, text: bool) -> Any:
    """A list or a string, cut where it has an entry per layer or holds numbers of layers."""
    if isinstance(value, list) and _SPECIAL.fullmatch(key):
        return list(range(1, 1 + len(value)))
    if isinstance(value, list) and _LAYER_NUMBERS.fullmatch(key) and _ascending(value):
        if not text:
            return list(range(min(len(value), layers)))
        last = layers if depth in value else layers - 1  # some count from 1
        return [number for number in value if number <= last]
    if depth and len(value) == depth:
        value = value[:layers]
    whole = isinstance(value, list) and bool(value) and all(type(item) is int for item in value)
    if whole and key == "hidden_sizes":  # of a tower that grows wider
        return [item * (HIDDEN // 2) // min(value) for item in value]
    size = _size(key.removesuffix("_per_layer"))
    if not whole or size is None:
        return value
    return [size if item == max(value) else item and max(size // 2, 1) for item in value]


def _size(key: str) -> int | None:
    return next((size for names, size in _SIZES if re.fullmatch(names, key)), None)


def _number(key: str, value: int, layers: int, special: Iterator[int]) -> int:
    """The small number in place of a given one; 0 and -1 say that there is none of it, and 1 is as small as can be."""
    if key in ("bos_token_id", "eos_token_id"):
        return int(key == "eos_token_id")
    if _SPECIAL.fullmatch(key):
        return next(special)
    if re.fullmatch(_TOP_K, key):
        return min(value, TOP_K)
    if value < 1 or key in ("n_group", "num_expert_group", "topk_group", "num_limited_groups"):
        return value
    if key in _DEPTH:
        return layers
    size = _size(key)
    return value if size is None else size


def _fit(before: Mapping[str, Any], values: dict[str, Any], layers: int) -> None:
    """Set the sizes that hang on others of the same config."""
    for key, top in _GROUPS:
        if (before.get(key) or 1) > 1 and before.get(top):
            values[key], values[top] = 4, 4 if before[top] == before[key] else 2
    heads, shared = before.get("num_attention_heads"), before.get("num_key_value_heads")
    if type(heads) is int and type(shared) is int and heads and shared:
        values["num_key_value_heads"] = 4 if shared == heads else min(shared, 2)
    _fit_latent(before, values)
    if before.get("global_head_dim") and before.get("head_dim") != before["global_head_dim"]:
        values["global_head_dim"] = 32
    own_width = any(re.fullmatch(r"moe_intermediate_size|\w*expert\w*_size", key) for key in before)
    if any(re.fullmatch(COUNT, key) for key in before) and not own_width:
        values["intermediate_size"] = 64  # it is the experts' width
    if before.get("num_hidden_layers") and before.get("num_layers"):  # a layer has sub-layers, which the first counts
        values["num_layers"] = max(layers * before["num_layers"] // before["num_hidden_layers"], 1)
    if before.get("num_kv_shared_layers"):
        values["num_kv_shared_layers"] = layers // 2
    _fit_rotary(before, values)
    _fit_layers(before, values)


def _fit_latent(before: Mapping[str, Any], values: dict[str, Any]) -> None:
    """Widths of heads whose keys are rotated in part: how they stand to the rotated part stays."""
    rotated = before.get("qk_rope_head_dim")
    if not rotated:
        return
    for key in ("qk_nope_head_dim", "v_head_dim", "head_dim"):
        wide = before.get(key)
        if wide and wide % rotated == 0 and wide // rotated <= _WIDEST:
            values[key] = values["qk_rope_head_dim"] * (wide // rotated)
    if before.get("qk_head_dim"):
        values["qk_head_dim"] = values["qk_nope_head_dim"] + values["qk_rope_head_dim"]
        if before.get("head_dim") == before["qk_head_dim"] != rotated:
            values["head_dim"] = values["qk_head_dim"]


def _fit_rotary(before: Mapping[str, Any], values: dict[str, Any]) -> None:
    """Lists with an entry per rotated pair of numbers, or parts of those pairs."""
    wide, small = _rotated(before), _rotated(values)
    for name in ("rope_parameters", "rope_scaling"):
        for old, new in _ropes(before.get(name), values.get(name)):
            sections = old.get("mrope_section")
            if wide and small and sections:
                new["mrope_section"] = _parts(sections, small)
            for key in ("short_factor", "long_factor"):
                if small and isinstance(old.get(key), list):
                    new[key] = old[key][:small]


def _ropes(old: Any, new: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The rotary embedding's keys, before and after; of each kind of layer where they differ."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return []
    inner = [(old[key], new[key]) for key in old if isinstance(old[key], dict) and isinstance(new.get(key), dict)]
    return [(old, new), *inner]


def _rotated(values: Mapping[str, Any]) -> int:
    """How many pairs of a head's numbers are rotated; 0 where the config does not say."""
    width = values.get("qk_rope_head_dim") or values.get("head_dim")
    if not width and values.get("num_attention_heads") and values.get("hidden_size"):
        width = values["hidden_size"] // values["num_attention_heads"]
    rope = values.get("rope_parameters") or {}
    share = rope.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0
    return int(width * share) // 2 if width else 0


def _parts(sections: list[int], total: int) -> list[int]:
    """Sections in about the same proportion that make up `total`."""
    ends = [round(total * sum(sections[: n + 1]) / sum(sections)) for n in range(len(sections))]
    return [end - start for start, end in itertools.pairwise((0, *ends))]


def _fit_layers(before: Mapping[str, Any], values: dict[str, Any]) -> None:
    """Sizes that differ from layer to layer: each kind of layer keeps how it stands to the others."""
    if not before.get("per_layer_config") or "layer_types" not in before:
        return
    by_kind = {before["layer_types"][int(layer)]: sizes for layer, sizes in before["per_layer_config"].items()}
    values["per_layer_config"] = {
        str(layer): {key: max(values[key] * size // before[key], 1) for key, size in by_kind[kind].items()}
        for layer, kind in enumerate(values["layer_types"])
        if kind in by_kind
    }


def random_model(config: Mapping[str, Any], seed: int = 0) -> Any:
    """transformers' model of a config in fp32 on the CPU, in eval mode, with random weights that decide.

    Args:
        config: config.json, of a tiny model.
        seed: of the weights.

    Raises:
        InvalidInputError: transformers refuses the config.
    """
    import torch

    from moepress.models.families.skeleton import auto_class

    parsed = hf_config(config)
    auto = auto_class(parsed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # what transformers itself fills
        model = auto.from_config(parsed, dtype=torch.float32, **implementations(auto, parsed)).eval()
    generator = torch.Generator().manual_seed(seed)
    stated = text_keys(plain(parsed))
    stated = stated | (stated.get("ffn_config") or {})
    experts = next((value for key, value in stated.items() if re.fullmatch(COUNT, key) and value), EXPERTS)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():  # the order is fixed, so the weights are
            tensor.copy_(_weight(name, tensor, experts, generator))
    return model


def implementations(auto: Any, parsed: Any) -> dict[str, str]:
    """Plain experts, and sdpa where the class has it."""
    found = auto._model_mapping[type(parsed)]
    classes = found if isinstance(found, list | tuple) else (found,)
    attention = "sdpa" if all(one._supports_sdpa for one in classes) else "eager"
    return {"attn_implementation": attention, "experts_implementation": "eager"}


def _weight(name: str, like: "torch.Tensor", experts: int, generator: "torch.Generator") -> "torch.Tensor":
    """The values of one parameter or buffer, which still holds what transformers filled it with."""
    import torch

    if name.endswith("tid2eid"):  # [vocabulary, top-k] numbers of experts, different ones in a row
        return torch.rand(len(like), experts, generator=generator).argsort(dim=1)[:, : like.shape[1]]
    if not like.is_floating_point():
        return like.clone()
    values = torch.randn(like.shape, generator=generator, dtype=torch.float32)
    if name.endswith("running_var"):
        return like + 0.1 * values.abs()
    if is_correction_bias(name):
        return torch.where(like < 0, like, values * 0.2)  # zaya: -1 of the class that skips; its loader sets it again
    if like.ndim < 2:
        return like + 0.1 * values  # norms near 1, or near 0 where the class adds the 1; biases near 0
    if re.search("gate|router", name) and experts <= len(like) <= experts + 4:
        return values * 0.3
    if re.search("embed_tokens|lm_head|wte", name):
        return values * 0.5
    fan_in = math.prod(like.shape[1:]) if "conv" in name else like.shape[-1]
    return values * math.sqrt(1 / fan_in)  # keeps the scale of what passes through


def is_correction_bias(name: str) -> bool:
    """Whether a tensor shifts the choice of experts and not their weights."""
    return name.endswith(("e_score_correction_bias", "expert_bias", "balancing_biases"))
