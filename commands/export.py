"""`moepress export`: the command, and what an ONNX export made and its self-check found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moepress.commands.console import emit, note, quiet_libraries, say, upload
from moepress.commands.options import (
    dry_run_option,
    gguf_options,
    json_option,
    model_argument,
    onnx_options,
    output_options,
    push_options,
    talk_options,
)
from moepress.commands.requests import all_default, push_of
from moepress.commands.tables import human_bytes, plain_console, plain_table
from moepress.errors import UsageError

if TYPE_CHECKING:
    from moepress.converters.onnx.export import OnnxRequest
    from moepress.stages.export import OnnxResult
    from moepress.stages.places import Output
    from moepress.stages.push import Push


@click.command()
@model_argument("artifact")
@output_options("Folder for the export; with --to gguf also a file, FILE.gguf.")
@click.option(
    "--to",
    "target",
    required=True,
    type=click.Choice(["gptq", "compressed-tensors", "onnx", "gguf", "mlx"]),
    help="The format.",
)
@click.option(
    "--names",
    type=click.Choice(["hub", "transformers"]),
    default="hub",
    help="With --to gptq: names of tensors as hub folders have them, which vLLM and SGLang want, or as transformers' "
    "modules have them, which GPTQModel wants. They differ in few families, such as Mixtral.",
)
@onnx_options
@gguf_options
@push_options
@dry_run_option
@talk_options
@json_option
def export(artifact: str, output: Path, resume: bool, force: bool, target: Any, as_json: bool, **options: Any) -> None:
    """Write a quantized ARTIFACT in another format. Codes do not change; nothing is solved again.

    gptq, compressed-tensors and mlx take a quantized folder. onnx takes any folder: quantized, pruned, or the original,
    whose experts then stay dense. Its result runs in ONNX Runtime and onnxruntime-genai, and is held against ARTIFACT
    before it appears. --for, --experts, --accuracy-level and --no-check belong to onnx.

    gguf takes any folder, too, and writes a file for llama.cpp, LM Studio and Ollama: 4-bit codes as Q4_0, 8-bit
    codes as Q8_0, what is not quantized in BF16 and F32. --outtype and --split-max-size belong to gguf; --dry-run
    to onnx and gguf.

    \b
    Example:  moepress export quantized --to gptq -o quantized-gptq
              moepress export mixtral --to gptq --names transformers -o mixtral-for-gptqmodel
              moepress export quantized --to onnx -o quantized-onnx
              moepress export quantized --to onnx --for cuda -o quantized-onnx-cuda
              moepress export quantized --to gguf -o quantized-gguf
              moepress export quantized --to gguf -o quantized.gguf
              moepress export quantized --to mlx -o quantized-mlx
    """
    from moepress.runs.output import check_output
    from moepress.stages.places import Output, local_folders, names_gguf

    place, single = Output(folder=output, resume=resume, force=force), target == "gguf" and names_gguf(output)
    if single and options["push"] is not None:
        raise UsageError("--push uploads a folder; give -o a folder, not a file.")
    inputs = local_folders(artifact)
    if not single:  # of a file all is checked by the stage
        check_output(output, inputs, resume=resume, force=force)  # before anything heavy is imported
    if target != "gptq" and not all_default("names"):
        raise UsageError("--names goes with --to gptq only.")
    push = push_of(options)
    if target == "onnx":
        _require_no_gguf_options()
        _export_onnx(artifact, place, push, options, as_json=as_json)
        return
    if not all_default("preset", "kernel", "accuracy_level", "no_check"):
        raise UsageError("--for, --experts, --accuracy-level and --no-check go with --to onnx only.")
    if target == "gguf":
        _export_gguf(artifact, place, push, options, as_json=as_json)
        return
    _require_no_gguf_options()
    if not all_default("dry_run"):
        raise UsageError("--dry-run goes with --to onnx and --to gguf only.")
    from moepress.converters.safetensors.names import Names
    from moepress.stages.export import export_stage, mlx_stage

    names = Names(options["names"])
    result = mlx_stage(artifact, place) if target == "mlx" else export_stage(artifact, place, target, names)
    note(*result.notes)
    if as_json:
        emit({"output": str(output), **asdict(result)})
    else:
        say(f"{output}: {result.modules} matrices in {target} layout, {human_bytes(result.bytes_after)}")
    upload(push, output, artifact, as_json=as_json)


def _require_no_gguf_options() -> None:
    if not all_default("outtype", "split_max_size"):
        raise UsageError("--outtype and --split-max-size go with --to gguf only.")


def _export_gguf(artifact: str, place: Output, push: Push | None, options: Mapping[str, Any], *, as_json: bool) -> None:
    from moepress.converters.gguf.export import GgufRequest
    from moepress.stages.export import gguf_estimate, gguf_stage
    from moepress.stages.places import names_gguf

    request = GgufRequest(exact=options["outtype"] == "f32", split_bytes=options["split_max_size"])
    if options["dry_run"]:
        found = gguf_estimate(artifact, place, request)
        emit(found) if as_json else _print_sizes(found)
        return
    result = gguf_stage(artifact, place, request)
    note(*result.notes)
    if as_json:
        emit({"output": str(place.folder), **asdict(result)})
    else:
        for name, size in result.files.items():
            file = place.folder if names_gguf(place.folder) else place.folder / name
            say(f"{file}: {human_bytes(size)}")
        _print_types(result.types)
    upload(push, place.folder, artifact, as_json=as_json)


def _print_sizes(found: Mapping[str, Any]) -> None:
    """What a GGUF export would write, to the byte."""
    for name, size in found["files"].items():
        say(f"{name}: {human_bytes(size)} ({size:,} bytes)")
    _print_types(found["types"])
    note(*found["notes"])


def _print_types(types: Mapping[str, int]) -> None:
    """Bytes by type of tensor."""
    table = plain_table("type", "size")
    for kind, size in types.items():
        table.add_row(kind, human_bytes(size))
    plain_console().print(table)


def _export_onnx(artifact: str, place: Output, push: Push | None, options: Mapping[str, Any], *, as_json: bool) -> None:
    quiet_libraries()
    from moepress.stages.export import onnx_estimate, onnx_stage

    request = _onnx_of(options)
    if options["dry_run"]:
        emit(onnx_estimate(artifact, place, request))
        return
    result = onnx_stage(artifact, place, request, check=not options["no_check"])
    note(*result.notes)
    emit({"output": str(place.folder), **asdict(result)}) if as_json else _print_onnx(result, place.folder)
    upload(push, place.folder, artifact, as_json=as_json)


def _onnx_of(options: Mapping[str, Any]) -> OnnxRequest:
    """The ONNX model that --for, --experts and --accuracy-level describe."""
    from moepress.converters.onnx.runtime import require_onnx

    require_onnx()  # before the module below, which imports it
    from moepress.converters.onnx.export import OnnxRequest

    return OnnxRequest(
        preset=options["preset"], kernel=options["kernel"], accuracy_level=int(options["accuracy_level"])
    )


def _print_onnx(result: OnnxResult, folder: Path) -> None:
    """What `export --to onnx` made, and what its self-check found."""
    console = plain_console()
    console.print(f"{folder}: ONNX, {result.nodes} nodes, {human_bytes(result.bytes_after)}")
    found = result.checked
    if found is None:
        return
    prefill, decode = found.tokens
    console.print(f"checked against {found.compared_with}, in a session on {', '.join(found.providers)}:")
    table = plain_table("tokens", "largest difference, of the largest logit")
    table.add_row(f"{prefill} prefill", f"{found.prefill_error:.1e}")
    table.add_row(f"{decode} decode", f"{found.decode_error:.1e}")
    console.print(table)
    console.print(f"same most likely token: {found.same_top1:.0%}")
    if found.genai_same is not None:
        console.print(f"onnxruntime-genai goes on with the same greedy tokens: {'yes' if found.genai_same else 'no'}")
    for line in found.notes:
        console.print(f"Note: {line}.")
