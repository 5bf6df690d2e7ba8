"""ONNX Runtime's CUDA kernels under an export: are they right, and how long do they take?

    python benchmarks/onnx_cuda.py                                    (a machine with CUDA and onnxruntime-gpu)
    python benchmarks/onnx_cuda.py --provider cpu --small             (proves that this script works)

`qmoe`: QMoE with the codes as they are (weights_prepacked=0), 4 bit, blocks of 32, 64 and 128, fp16, for 1, 16 and 128
tokens, against the same experts made dense in fp32 in torch. Router rows are those of an export: -1e4 in fp16, but at
the chosen experts. That no other expert takes part is tried with NaN scales in experts that nobody chose.
`attention`: GroupQueryAttention with heads of 576 (latent attention) and one key head against torch in fp32, and its
time against torch's scaled_dot_product_attention in fp16 on the same device.
`models`: tiny DeepSeek-V3 and Qwen3-MoE models and the demo, exported for CUDA and for the CPU: their logits against
the artifact's own in fp32, and which QMoE and attention nodes the provider took.

An error is the norm of the difference over the norm of the truth. Times are medians of calls whose inputs and outputs
stay on the device. A node that the provider refuses is a row that says so. Ends with 5 where no session gets CUDA; only
a run on CUDA is written to benchmarks/results.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from made import make_rounded
from onnx_kernels import (
    Place,
    attention_model,
    draw_layer,
    open_node,
    qmoe_model,
    relative_error,
    timed,
    torch_attention,
    torch_milliseconds,
    true_experts,
)
from setting import ROOT, save

from moepress.converters.onnx.export import OnnxRequest
from moepress.converters.onnx.folder import open_onnx
from moepress.converters.onnx.moe import FAR
from moepress.converters.onnx.runtime import CPU_PROVIDER, require_onnxruntime, session_options, session_providers
from moepress.converters.safetensors.artifact import open_artifact
from moepress.converters.safetensors.scheme import Scheme
from moepress.errors import UnsupportedError
from moepress.stages.export import onnx_stage
from moepress.stages.places import Output, model_folder
from moepress.validation.quality.onnx_check import own_logits
from moepress.validation.quality.onnx_session import CUDA_PROVIDER, Decoding, OnnxModel
from moepress.validation.speed.throughput import device_name

LATENT, ROPE, NOPE = 512, 64, 128  # DeepSeek-V3's
PREFILL, DECODE = 24, 8
LIMIT = 0.02  # of errors; fp16 alone costs about a thousandth
QWEN3 = {"hidden": 2048, "width": 768, "experts": 128, "top_k": 8}  # Qwen3-30B-A3B
TINY = {"hidden": 256, "width": 128, "experts": 16, "top_k": 4}
# Large enough for CUDA's kernels, and with DeepSeek-V3's own latent head.
MODELS: dict[str, dict[str, int]] = {
    "deepseek_v3": {
        "hidden_size": 256,
        "moe_intermediate_size": 128,
        "q_lora_rank": 64,
        "kv_lora_rank": LATENT,
        "qk_rope_head_dim": ROPE,
    },
    "qwen3_moe": {"hidden_size": 256, "moe_intermediate_size": 128, "head_dim": 64},
    "demo": {},
}


def find_place(provider: str) -> Place:
    """Where to run.

    Raises:
        UnsupportedError: CUDA was asked for and a session does not get it.
    """
    cpu = torch.device("cpu")
    if provider == "cpu":
        return Place(provider=CPU_PROVIDER, device="cpu", torch_device=cpu, name=device_name(cpu))
    got = session_providers(CUDA_PROVIDER)
    if got[0] != CUDA_PROVIDER:
        raise UnsupportedError(f"A session that asked for CUDA got {', '.join(got)}; `moepress doctor` says why.")
    if torch.cuda.is_available():
        device = torch.device("cuda")
        return Place(provider=CUDA_PROVIDER, device="cuda", torch_device=device, name=device_name(device))
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    name = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return Place(provider=CUDA_PROVIDER, device="cuda", torch_device=cpu, name=f"{name} (torch on the CPU)")


def refused(row: dict[str, Any], what: str, error: Exception) -> dict[str, Any]:
    """A row for what the provider does not run."""
    why = " ".join(str(error).split())[:300]
    print(f"{what}: refused ({why})   [{row['device']}]", flush=True)
    return row | {"refused": why}


def try_qmoe(place: Place, shape: Mapping[str, int], tokens: Sequence[int], repetitions: int) -> list[dict[str, Any]]:
    """Errors and times of QMoE at one shape."""
    rows = []
    for block in (32, 64, 128):
        what = f"QMoE H{shape['hidden']} I{shape['width']} E{shape['experts']} k{shape['top_k']} block {block:3d}"
        common = {"part": "qmoe", **shape, "block": block, "device": place.name}
        layer = draw_layer(shape["experts"], shape["hidden"], shape["width"], block)
        unused = range(layer.experts // 2, layer.experts)  # tokens choose among the first half
        with tempfile.TemporaryDirectory() as name:
            try:
                session = open_node(qmoe_model(layer, Path(name) / "plain", shape["top_k"]), place)
                poisoned = open_node(qmoe_model(layer, Path(name) / "poisoned", shape["top_k"], unused), place)
                for count in tokens:
                    value, chosen, weights, feed = _routed(count, shape, len(unused))
                    outs, milliseconds = timed(session, place, feed, repetitions)
                    others, _ = timed(poisoned, place, feed, 1)
                    error = relative_error(outs[0], true_experts(layer, value, chosen, weights, place.torch_device))
                    alone = bool(np.array_equal(outs[0], others[0]))
                    found = {"tokens": count, "error": error, "milliseconds": milliseconds, "only_chosen": alone}
                    rows.append(common | found)
                    print(
                        f"{what}, {count:3d} tokens: error {error:.1e}, {milliseconds:8.3f} ms, only the chosen "
                        f"experts: {'yes' if alone else 'NO'}   [{place.name}]",
                        flush=True,
                    )
            except Exception as error:  # ONNX Runtime raises types of its own
                rows.append(refused(common, what, error))
    return rows


def _routed(count: int, shape: Mapping[str, int], usable: int) -> tuple[torch.Tensor, ...]:
    """Tokens, their experts and weights, and what QMoE is fed."""
    generator = torch.Generator().manual_seed(count)
    value = torch.randn(count, shape["hidden"], generator=generator).half()
    chosen = torch.rand(count, usable, generator=generator).topk(shape["top_k"], dim=1).indices
    weights = torch.rand(count, shape["top_k"], generator=generator) + 0.05
    weights /= weights.sum(dim=1, keepdim=True)
    router = torch.full((count, shape["experts"]), FAR)
    router.scatter_(1, chosen, weights.log() - weights.log().amax(dim=1, keepdim=True))
    return value, chosen, weights, {"x": value.numpy(), "rows": router.half().numpy()}


def try_attention(place: Place, heads: int, contexts: Sequence[int], repetitions: int) -> list[dict[str, Any]]:
    """Errors and times of latent attention: one token behind each context, and the shortest context at once."""
    size, scale, rows = LATENT + ROPE, (NOPE + ROPE) ** -0.5, []
    common = {"part": "attention", "heads": heads, "size": size, "device": place.name}
    with tempfile.TemporaryDirectory() as name:
        for total, new in [*((context, 1) for context in contexts), (min(contexts), min(contexts))]:
            what = f"GroupQueryAttention {heads:3d} heads of {size}, {new:3d} new of {total:4d} tokens"
            try:
                file = attention_model(heads, size, scale, Path(name) / f"{total}-{new}")
                row = _attention_row(open_node(file, place), place, (heads, size, total, new), repetitions)
            except Exception as error:  # ONNX Runtime raises types of its own
                rows.append(refused(common | {"context": total, "tokens": new}, what, error))
                continue
            rows.append(common | row)
            print(
                f"{what}: error {row['error']:.1e}, {row['milliseconds']:8.3f} ms "
                f"({row['milliseconds'] / row['torch_milliseconds']:.2f} x torch), cache "
                f"{'right' if row['cache_right'] else 'WRONG'}   [{place.name}]",
                flush=True,
            )
    return rows


def _attention_row(session: Any, place: Place, sizes: tuple[int, ...], repetitions: int) -> dict[str, Any]:
    heads, size, total, new = sizes
    generator, scale = torch.Generator().manual_seed(total), (NOPE + ROPE) ** -0.5
    query = torch.randn(1, new, heads, size, generator=generator).half()
    keys = torch.randn(1, 1, total, size, generator=generator).half()
    past = keys[:, :, : total - new].contiguous().numpy()
    feed = {
        "q": query.flatten(2).numpy(),
        "k": keys[:, 0, total - new :].contiguous().numpy(),
        **{f"past_{part}": past for part in ("key", "value")},
        "seqlens": np.array([total - 1], np.int32),
        "total": np.array(total, np.int32),
    }
    outs, milliseconds = timed(session, place, feed, repetitions)
    q, k = query.transpose(1, 2).to(place.torch_device), keys.to(place.torch_device)
    truth = torch_attention(q.float(), k.float(), scale).transpose(1, 2).flatten(2).cpu()
    theirs = torch_milliseconds(lambda: torch_attention(q, k, scale), place.torch_device, repetitions)
    return {
        "context": total,
        "tokens": new,
        "error": relative_error(outs[0], truth),
        "milliseconds": milliseconds,
        "torch_milliseconds": theirs,
        "cache_right": all(np.array_equal(out, keys.numpy()) for out in outs[1:3]),
    }


def try_models(place: Place) -> list[dict[str, Any]]:
    """Logits of whole exports: for the CPU in fp32, for CUDA on the CPU, for CUDA on the provider."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import make

    rows = []
    for model, changes in MODELS.items():
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            original = make(model, work / "original", **changes) if changes else model_folder(model)
            make_rounded(original, work / "artifact", Scheme(bits=4, group_size=32))
            source = open_artifact(work / "artifact")
            vocabulary = source.config["vocab_size"]
            tokens = torch.randint(vocabulary, (PREFILL + DECODE,), generator=torch.Generator().manual_seed(0))
            truth = own_logits(source, tokens)
            for preset, where in (("cpu", CPU_PROVIDER), ("cuda", CPU_PROVIDER), ("cuda", place.provider)):
                if preset == "cuda" and where == CPU_PROVIDER == place.provider and rows and rows[-1]["for"] == "cuda":
                    continue  # --provider cpu: it was tried already
                folder = work / preset
                if not folder.is_dir():
                    onnx_stage(str(source.folder), Output(folder=folder), OnnxRequest(preset=preset), check=False)
                rows.append(_model_row(model, preset, where, folder, tokens, truth, place))
    return rows


def _model_row(
    model: str, preset: str, provider: str, folder: Path, tokens: torch.Tensor, truth: torch.Tensor, place: Place
) -> dict[str, Any]:
    device = place.name if provider == place.provider else device_name(torch.device("cpu"))
    row = {"part": "models", "model": model, "for": preset, "provider": provider, "device": device}
    what = f"{model} --for {preset} on {provider.removesuffix('ExecutionProvider')}"
    try:
        opened, taken = _open(folder, provider)
        decoding = Decoding(opened)
        parts = [decoding.step(tokens[None, :PREFILL])[0]]
        parts += [decoding.step(token[None, None])[0] for token in tokens[PREFILL:]]
    except Exception as error:  # ONNX Runtime raises types of its own
        return refused(row, what, error)
    logits = torch.cat(parts)
    errors = (logits - truth).norm(dim=1) / truth.norm(dim=1)
    same = float((logits.argmax(dim=1) == truth.argmax(dim=1)).float().mean())
    row |= {"error": float(errors.median()), "worst_token": float(errors.max()), "same_top1": same, "nodes": taken}
    print(
        f"{what}: error {row['error']:.1e} (median token; worst {row['worst_token']:.1e}), same most likely token "
        f"{same:.0%}, {', '.join(f'{n} {op}' for op, n in taken.items())} there   [{device}]",
        flush=True,
    )
    return row


def _open(folder: Path, provider: str) -> tuple[OnnxModel, dict[str, int]]:
    """A session, and how many of the nodes that matter the provider really took, where the runtime can say."""
    options = session_options()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    opened = open_onnx(folder)
    wanted = [provider, *([CPU_PROVIDER] if provider != CPU_PROVIDER else [])]
    session = require_onnxruntime().InferenceSession(str(folder / "model.onnx"), options, providers=wanted)
    asked = getattr(session, "get_provider_graph_assignment_info", None)
    taken = {} if asked is None else {"QMoE": 0, "GroupQueryAttention": 0, "MatMulNBits": 0}
    for part in asked() if asked else ():
        if part.ep_name == provider:
            for node in part.get_nodes():
                if node.op_type in taken:
                    taken[node.op_type] += 1
    return OnnxModel(folder=opened, session=session, providers=tuple(session.get_providers())), taken


def is_right(row: Mapping[str, Any]) -> bool:
    """Whether a row says that all is well."""
    flags = all(row.get(name, True) for name in ("only_chosen", "cache_right"))
    return "refused" not in row and row["error"] < LIMIT and flags


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--parts", default="qmoe,attention,models")
    parser.add_argument("--small", action="store_true", help="small shapes only")
    parser.add_argument("--repetitions", type=int, default=20)
    arguments = parser.parse_args()
    try:
        place = find_place(arguments.provider)
    except UnsupportedError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    parts, small, repetitions = arguments.parts.split(","), arguments.small, arguments.repetitions
    rows = []
    if "qmoe" in parts:
        for shape in (TINY,) if small else (TINY, QWEN3):
            rows += try_qmoe(place, shape, (1, 16, 128), repetitions)
    if "attention" in parts:
        for heads in (16, 128):
            rows += try_attention(place, heads, (64, 512) if small else (512, 4096), repetitions)
    if "models" in parts:
        rows += try_models(place)
    wrong = [row for row in rows if not is_right(row)]
    print(f"{len(rows) - len(wrong)} of {len(rows)} rows are right (errors below {LIMIT:g}) on {place.name}")
    if arguments.provider == "cuda":
        save("onnx_cuda", rows, device=place.name, onnxruntime=require_onnxruntime().__version__)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
