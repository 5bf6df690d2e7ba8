"""Let another quantizer read a GPTQ folder that moepress wrote. Run it with that peer's python (see setup.sh).

    PEER_PYTHON benchmarks/peers/read_gptq.py FOLDER [--dequantized FOLDER] [--reference reference.npz]

AutoGPTQ: its own QuantLinear classes (the pure torch path) take the tensors of several matrices; their weights (the
outputs for an identity) and their outputs for random inputs are compared with those of an unpacking written here.
GPTQModel: the whole model is loaded; every quantized weight is compared in the same way, and the logits with those of
reference.npz (input_ids and logits). With --dequantized the unpacking itself is compared with the plain weights of
that folder, which finds a code or scale that was written wrong. The last line is `ok` or `FAILED`, the exit status 0
or 1: weights must be equal, outputs and logits within the tolerance.

It needs torch, numpy and safetensors only: nothing of moepress, so that no mistake of ours can hide itself.
"""

import argparse
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
OUTPUT_LIMIT = 1e-4  # float32 sums in another order
Matrix = dict[str, torch.Tensor]
Figure = tuple[str, float, float]  # label, value, largest value that is not a failure


def matrices(folder: Path) -> Iterator[tuple[str, Matrix]]:
    """Every quantized matrix of the folder, whichever shard holds it."""
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as tensors:
            for name in sorted(tensors.keys()):
                if name.endswith(".qweight"):
                    module = name.removesuffix(".qweight")
                    yield module, {suffix: tensors.get_tensor(f"{module}.{suffix}") for suffix in SUFFIXES}


def codes_of(words_WN: torch.Tensor, bits: int) -> np.ndarray:
    """Codes [count, N] of columns of words, each a little-endian stream of bits."""
    stream = np.ascontiguousarray(words_WN.numpy().T).view(np.uint8)
    each_bit = np.unpackbits(stream, axis=1, bitorder="little").reshape(stream.shape[0], -1, bits)
    return (each_bit @ (1 << np.arange(bits))).T


def dequantize(matrix: Matrix, bits: int) -> torch.Tensor:
    """W [in, out] = (code - (stored zero + 1)) * scale, in float32."""
    codes_IO, zeros_GO = codes_of(matrix["qweight"], bits), codes_of(matrix["qzeros"].T, bits).T + 1
    scales_GO, group_I = matrix["scales"].float().numpy(), matrix["g_idx"].numpy()
    return torch.from_numpy(((codes_IO - zeros_GO[group_I]) * scales_GO[group_I]).astype(np.float32))


def largest(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left.float() - right.float()).abs().max())


def compare_with_plain(options: argparse.Namespace, config: dict) -> list[Figure]:
    """Our unpacking against the weights that the codes stand for."""
    stored, difference, count = dict(matrices(options.folder)), 0.0, 0
    for shard in sorted(options.dequantized.glob("*.safetensors")):
        with safe_open(shard, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dictionary)
                matrix = stored.get(name.removesuffix(".weight"))
                if matrix is not None:
                    plain_OI = tensors.get_tensor(name)
                    difference = max(
                        difference, largest(dequantize(matrix, config["bits"]).T.to(plain_OI.dtype), plain_OI)
                    )
                    count += 1
    print(f"{options.dequantized}: plain weights of {count} of {len(stored)} matrices")
    return [("stored codes and scales against plain weights", difference, 0.0)]


def try_autogptq(options: argparse.Namespace, config: dict) -> list[Figure]:
    from auto_gptq.nn_modules.qlinear import qlinear_cuda, qlinear_cuda_old

    figures: list[Figure] = []
    for path in (qlinear_cuda_old, qlinear_cuda):
        weights, outputs, count = 0.0, 0.0, 0
        for _, matrix in list(matrices(options.folder))[: options.matrices]:
            expected_IO = dequantize(matrix, config["bits"])
            size = expected_IO.shape
            layer = path.QuantLinear(config["bits"], config["group_size"], *size, False, weight_dtype=torch.float32)
            layer.load_state_dict(matrix)  # strict: a tensor of another shape or name stops here
            inputs = torch.randn(16, size[0], generator=torch.Generator().manual_seed(count))
            weights = max(weights, largest(layer(torch.eye(size[0])), expected_IO))
            outputs = max(outputs, largest(layer(inputs), inputs @ expected_IO))
            count += 1
        name = path.__name__.rpartition(".")[2]
        print(f"AutoGPTQ {name}: {count} matrices of {config['bits']} bits, groups of {config['group_size']}, float32")
        figures.append((f"{name}: largest weight difference", weights, 0.0))
        figures.append((f"{name}: largest output difference", outputs, OUTPUT_LIMIT))
    return figures


def try_gptqmodel(options: argparse.Namespace, config: dict) -> list[Figure]:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default thread pool needs more than 2 CPUs
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(str(options.folder), device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH).model
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "dequantize_weight")}
    stored, bits = dict(matrices(options.folder)), config["bits"]
    one_sided = sorted(layers.keys() ^ stored.keys())
    if one_sided:
        return [(f"quantized on one side only ({', '.join(one_sided[:3])} ...)", float(len(one_sided)), 0.0)]
    weights = max(
        largest(layer.dequantize_weight(), dequantize(stored[name], bits).half()) for name, layer in layers.items()
    )
    print(f"GPTQModel: {len(layers)} matrices of {bits} bits, groups of {config['group_size']}, float16")
    figures: list[Figure] = [("largest weight difference", weights, 0.0)]
    if options.reference:
        reference = np.load(options.reference)
        with torch.no_grad():
            logits = model(torch.from_numpy(reference["input_ids"])).logits
        difference = (logits.float() - torch.from_numpy(reference["logits"])).abs()
        print(f"logits up to {np.abs(reference['logits']).max():.4g}, median difference {difference.median():.2g}")
        figures.append(("largest logit difference", float(difference.max()), options.tolerance))
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dequantized", type=Path, help="a folder with the plain weights that the codes stand for")
    parser.add_argument("--reference", type=Path, help="reference.npz (GPTQModel only)")
    parser.add_argument("--matrices", type=int, default=12, help="how many matrices AutoGPTQ reads")
    parser.add_argument("--tolerance", type=float, default=0.02, help="largest logit difference that is not a failure")
    options = parser.parse_args()
    config = json.loads((options.folder / "quantize_config.json").read_text())
    is_gptqmodel = importlib.util.find_spec("gptqmodel") is not None
    figures = (try_gptqmodel if is_gptqmodel else try_autogptq)(options, config)
    if options.dequantized:
        figures += compare_with_plain(options, config)
    for label, figure, _ in figures:
        print(f"{label}: {figure:.3g}")
    failed = not all(figure <= limit for _, figure, limit in figures)
    print("FAILED" if failed else "ok")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
