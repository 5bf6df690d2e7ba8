"""Rules about what config.json and file names state of the weights. Each function yields what it found."""

from collections.abc import Iterator

from moepress.models.storage.folder import SINGLE
from moepress.models.storage.settled import architectures_missing, leftover_quantization, same_data
from moepress.validation.rules.facts import Facts
from moepress.validation.rules.findings import Effect, Problem, Runtime

_HEAD, _TABLE = "lm_head.weight", "model.embed_tokens.weight"
_SERVERS = (Runtime.VLLM, Runtime.SGLANG)
_BY_MODULE = (Runtime.TRANSFORMERS, Runtime.GPTQMODEL)


def quantization(facts: Facts) -> Iterator[Problem]:
    """A quantization that the config states shows in the tensors."""
    method = None if facts.stored is None else leftover_quantization(facts.config, facts.stored)
    if method is not None:
        yield Problem(
            what=f"config.json states a quantization ({method}), and no tensor is quantized",
            happens=dict.fromkeys(_SERVERS, (Effect.WRONG, "takes the weights for codes whose scales it never finds"))
            | dict.fromkeys(_BY_MODULE, (Effect.WRONG, "builds quantized layers and starts their scales at random"))
            | {Runtime.LLAMA_CPP: (Effect.REFUSES, "its converter looks for scales that are not there")},
            mend="remove the quantization from config.json (prune and quantize of moepress do)",
        )


def architectures(facts: Facts) -> Iterator[Problem]:
    """The config names the class of the model."""
    if facts.stored is not None and architectures_missing(facts.config):
        asked = (Effect.REFUSES, "chooses the model's code by that key")
        yield Problem(
            what="config.json names no architectures",
            happens=dict.fromkeys((*_SERVERS, Runtime.LLAMA_CPP), asked),
            mend=f'write "architectures": ["{facts.family.architecture}"] into it (prune and quantize of moepress do)',
        )


def tied_head(facts: Facts) -> Iterator[Problem]:
    """A head that the config ties to the embeddings is not stored besides, unless it is the same."""
    if not facts.config.get("tie_word_embeddings"):
        return
    head, table = facts.tensors.get(_HEAD), facts.tensors.get(_TABLE)
    coded = any(name.startswith("lm_head.") and name != _HEAD for name in facts.tensors)
    if coded or (head is not None and table is not None and not same_data(head, table)):
        ties = (Effect.WRONG, "takes the embeddings in its place")
        happens = dict.fromkeys((*_SERVERS, Runtime.LLAMA_CPP), ties)
        if coded:
            happens |= dict.fromkeys(_BY_MODULE, ties)
        yield Problem(
            what="config.json ties lm_head to the embeddings, and an lm_head of its own is stored",
            happens=happens,
            mend="set tie_word_embeddings to false",
        )


def one_set(facts: Facts) -> Iterator[Problem]:
    """There is one set of weights."""
    found = facts.index
    if found is not None and found.there and SINGLE in found.shards and set(found.weight_map.values()) != {SINGLE}:
        yield Problem(
            what=f"{SINGLE} lies beside an index of other shards",
            happens=dict.fromkeys(_BY_MODULE, (Effect.WRONG, f"loads {SINGLE} and not the shards")),
            mend="delete the one that is not meant",
        )


def tensor_names(facts: Facts) -> Iterator[Problem]:
    """Tensors have the names of the causal language model."""
    if facts.prefix is not None:
        unknown = (Effect.REFUSES, "does not know the names")
        yield Problem(
            what=facts.prefix.partition(";")[0],
            happens=dict.fromkeys((*_SERVERS, Runtime.LLAMA_CPP), unknown)
            | dict.fromkeys(
                _BY_MODULE, (Effect.WRONG, "starts what it does not find at random, with a line in its log")
            ),
            mend=facts.prefix.partition("; ")[2],
        )
