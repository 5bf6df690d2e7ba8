"""The forward pass of multi-token-prediction (MTP) layers: decoder layers behind the last, each with a joint before it.

Layer k of them gets, at position t of a window,

    h'_t = P [enorm(embed(token t+1+k)) ; hnorm(h_t)]

where h_t is what the head gets of the model (k = 0), or what the layer before gives, through its own norm. Read:

- transformers 5.23, `modeling_layers.MtpLayer`, `generation.candidate_generator.MTPCandidateGenerator`: the embedding
  stands first; h_t is `hidden_states[-1]`, which is behind the final norm; between MTP layers the norm is applied;
  positions are the token's, so one further than the hidden state's, which a relative rotation does not see.
- vLLM, `deepseek_mtp.py`, `glm4_moe_mtp.py` and `qwen3_next_mtp.py` with `deepseek_v2.py`, whose model returns hidden
  states behind `self.norm`: the same order. DeepSeek's and GLM's set the embedding at position 0 to zeros; positions
  there are the hidden state's.
- SGLang, `deepseek_nextn.py` and `qwen3_next_mtp.py`: the same order, and no position is masked. Qwen3-Next's layer is
  one of full attention in all of them.

Nothing is masked here, as in transformers and SGLang; it is one token of a window. The last k + 1 positions of a window
have no such next token: the window's last token stands in.
"""

import copy

import torch
from torch import Tensor, nn

from moepress.errors import UnsupportedError
from moepress.models.forward.streamed import StreamedModel
from moepress.models.forward.tensor_check import mtp_problems
from moepress.models.forward.walk import Stream, batches_of
from moepress.models.storage.experts import mtp_layers
from moepress.models.storage.mtp import joint_of, twin_of
from moepress.runs.phases import phase


def add_predicting(model: StreamedModel) -> tuple[int, ...]:
    """Put a model's multi-token-prediction layers behind its last, up to one that is not whole; returns their numbers.

    They count on from the last decoder layer. A second call changes nothing.
    """
    source, added = model.source, list[int]()
    for layer in mtp_layers(source):
        if layer != model.shape.layers + len(added) or mtp_problems(source, layer):
            break
        model.add_layer(layer, twin_of(source, layer))
        added.append(layer)
    return tuple(added)


def enter(stream: Stream, layer: int) -> None:
    """Make the inputs of an MTP layer of the outputs of the one before it, in place.

    Args:
        stream: its hidden states are those behind layer `layer - 1`, [N, T, D].
        layer: one of `add_predicting`.

    Raises:
        UnsupportedError: the model has several streams of hidden states.
    """
    model, depth = stream.model, layer - stream.model.shape.layers
    if len(model.stream_shape) > 1:
        raise UnsupportedError(
            "The multi-token-prediction layer of a model with several streams of hidden states is not run here."
        )
    joint = joint_of(model.family, layer)
    norms = {name: _norm(model, layer, name) for name in (joint.embedding_norm, joint.hidden_norm)}
    before = None if depth == 0 else _norm(model, layer, joint_of(model.family, layer - 1).norm)
    project = model.read(joint.project)
    batches = [slice(batch.start, batch.stop) for batch in batches_of(stream)]
    embedded = model.embed_all(following(stream.windows[rows], depth + 1) for rows in batches)
    with phase("forward", flops=2.0 * stream.tokens * project.numel()):
        for rows, embeddings in zip(batches, embedded, strict=True):
            hidden = stream.hidden[rows].to(model.device)
            hidden = model.head_inputs(hidden) if before is None else before(hidden)
            pair = (norms[joint.embedding_norm](embeddings), norms[joint.hidden_norm](hidden))
            stream.hidden[rows] = nn.functional.linear(torch.cat(pair, dim=-1).to(model.dtype), project).to("cpu")
            stream.touch(embeddings.shape[0] * embeddings.shape[1])
    stream.forget()


def following(tokens_NT: Tensor, steps: int) -> Tensor:
    """The token so many positions on, of every position; the last one where a window has none."""
    places = torch.arange(tokens_NT.shape[1]) + steps
    return tokens_NT[:, places.clamp(max=tokens_NT.shape[1] - 1)]


def _norm(model: StreamedModel, layer: int, name: str) -> nn.Module:
    """A norm of the kind that the decoder layer has (some add 1 to their weights), with these weights."""
    width = model.shape.hidden
    norms = (m for m in model.layer(layer).children() if "norm" in type(m).__name__.lower())
    made = copy.deepcopy(next(norm for norm in norms if tuple(norm.weight.shape) == (width,)))  # type: ignore[arg-type]
    made.load_state_dict({"weight": model.read(name)}, assign=True)
    return made
