"""The stages on tiny models, fed with windows of the test's own, and transformers' models to hold them against."""

import hashlib
import io
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moepress.calibration.collect import collect
from moepress.calibration.corpus import Corpus, build_corpus, evaluation_windows
from moepress.calibration.hessian import HessianOptions
from moepress.calibration.profile import Profile, describe_corpus, fingerprint
from moepress.calibration.sources import embedded_sources
from moepress.compress.gptq.coded import QuantizeOptions
from moepress.compress.gptq.include import Include
from moepress.compress.gptq.layer_bits import model_dtype, scale_value_dtype
from moepress.compress.gptq.pipeline import quantize
from moepress.compress.pruning.plan import Plan, Quantization, Sizes
from moepress.compress.pruning.rewrite import prune
from moepress.compress.pruning.scoring import Criterion, Groups
from moepress.converters.safetensors.artifact import Artifact
from moepress.converters.safetensors.scheme import Scheme
from moepress.models.forward.inventory import inventory
from moepress.models.forward.proof import proven_family
from moepress.models.forward.streamed import StreamedModel
from moepress.models.forward.walk import Limits, Scratch, forward
from moepress.models.storage.checkpoint import Checkpoint, Source, open_checkpoint
from moepress.models.storage.experts import prune_source
from moepress.models.storage.mtp import Mtp
from moepress.models.storage.safetensors_file import read_bytes
from moepress.runs.journal import open_run
from moepress.stages.places import model_folder

CPU = torch.device("cpu")
LIMITS = Limits(memory_bytes=1 << 30, batch_windows=4)
G32 = Scheme(bits=4, group_size=32)


def corpus_of(windows: Tensor, domain_index: Tensor | None = None, domains: tuple[str, ...] = ("all",)) -> Corpus:
    """A corpus of these windows, all of one domain where no index is given."""
    index = torch.zeros(len(windows), dtype=torch.int64) if domain_index is None else domain_index
    counts = tuple(int((index == d).sum()) * windows.shape[1] for d in range(len(domains)))
    digest = hashlib.sha256(windows.numpy().tobytes() + index.numpy().tobytes()).hexdigest()
    return Corpus(
        windows=windows,
        domain_index=index,
        domains=domains,
        digest=digest,
        embedded=False,
        bos_policy="none",
        documents=(1,) * len(domains),
        tokens_per_domain=counts,
        notes=(),
    )


def profile_of(
    folder: Path,
    corpus: Corpus,
    work: Path,
    *,
    limits: Limits = LIMITS,
    leave_one_out: bool = True,
    resume: bool = False,
) -> Profile:
    """What `moepress profile` observes, in memory; `work` is made."""
    checkpoint = open_checkpoint(folder)
    model = StreamedModel(checkpoint, device=CPU, dtype=torch.float32)
    with open_run(work, {}, resume=resume) as run:
        found = collect(model, corpus, run, limits, leave_one_out=leave_one_out)
    return Profile(
        model=fingerprint(checkpoint),
        model_name=folder.name,
        family=checkpoint.family.name,
        config=checkpoint.config,
        shape=checkpoint.shape,
        domains=corpus.domains,
        layers=checkpoint.outline.moe_layers,
        calibration=describe_corpus(corpus, 0),
        inventory=inventory(checkpoint),
        statistics={layer: found[layer] for layer in checkpoint.outline.moe_layers},
        mtp={layer: statistics for layer, statistics in found.items() if layer >= checkpoint.shape.layers},
    )


def keep_of(source: Source, count: int, seed: int = 3) -> dict[int, list[int]]:
    """`count` random experts, as many in each router group, others in every layer."""
    shape, generator = source.outline.shape, torch.Generator().manual_seed(seed)
    size = shape.experts // shape.groups
    return {
        layer: [
            group * size + expert
            for group in range(shape.groups)
            for expert in sorted(torch.randperm(size, generator=generator)[: count // shape.groups].tolist())
        ]
        for layer in source.outline.moe_layers
    }


def plan_of(source: Checkpoint, keep: Mapping[int, Sequence[int]], *, groups: Groups = Groups.BALANCED) -> Plan:
    """A plan with just this keep list."""
    return Plan(
        model=fingerprint(source),
        model_name=source.folder.name,
        family=source.family.name,
        criterion=Criterion.REAP,
        domain_weights={"all": 1.0},
        groups=groups,
        experts_before=source.shape.experts,
        experts=len(next(iter(keep.values()))),
        keep={layer: list(kept) for layer, kept in keep.items()},
        quantization=Quantization(),
        loss={},
        stability=1.0,
        protected={},
        unsupported={},
        sizes=Sizes(before_bytes=0, after_bytes=0),
        calibration={},
        notes=[],
    )


def pruned_folder(
    folder: Path, keep: Mapping[int, Sequence[int]], out: Path, *, mtp: Mtp = Mtp.KEEP, **options: Any
) -> dict[str, Any]:
    """`moepress prune` by this keep list; returns its result."""
    source = open_checkpoint(folder)
    with open_run(out, {}) as run:
        return prune(source, plan_of(source, keep, **options), run, mtp=mtp)


def quantized_folder(
    folder: Path,
    windows: Tensor,
    out: Path,
    *,
    keep: Mapping[int, Sequence[int]] | None = None,
    scheme: Scheme = G32,
    include: Iterable[Include] = (),
    hessian: HessianOptions | None = None,
    layer_bits: Mapping[int, int] | None = None,
    limits: Limits = LIMITS,
    mtp_notes: Sequence[str] = (),
    max_pieces: int | None = None,
) -> dict[str, Any]:
    """`moepress quantize` on these windows; returns its result. With notes on MTP layers those stay."""
    checkpoint = open_checkpoint(folder)
    source: Source = checkpoint if keep is None else prune_source(checkpoint, keep)
    stored = model_dtype(checkpoint.config)
    options = QuantizeOptions(
        scheme=scheme,
        scale_dtype=scale_value_dtype(stored),
        stored_dtype=stored,
        hessian=hessian or HessianOptions(),
        layer_bits=layer_bits or {},
    )
    model = StreamedModel(source, device=CPU, dtype=torch.float32)
    with open_run(out, {}, resume=max_pieces is not None) as run:
        return quantize(
            model,
            corpus_of(windows),
            run,
            limits,
            options=options,
            include=include,
            companions=folder,
            summary={},
            mtp_notes=mtp_notes,
            max_pieces=max_pieces,
        )


class AsTransformers(Artifact):
    """A folder as transformers 5.23 has it in fp32: codes times scales of experts in the scales' dtype, else exact."""

    def read(self, name: str) -> Tensor:
        exact = self.is_quantized(name) and self.family.expert_of(name) is None
        return Artifact.read(replace(self, exact=True) if exact and not self.exact else self, name)

    @classmethod
    def of(cls, artifact: Artifact) -> "AsTransformers":
        return cls(**{field.name: getattr(artifact, field.name) for field in fields(artifact)})


def streamed_logits(source: Source, windows: Tensor, scratch_folder: Path) -> Tensor:
    """Logits of our own layer-by-layer forward, fp32 [N, T, V]."""
    scratch = Scratch(scratch_folder, LIMITS.memory_bytes)
    model = StreamedModel(source, device=CPU, dtype=torch.float32)
    with torch.inference_mode():
        return model.head()(forward(model, windows, scratch, LIMITS))


def demo_windows() -> Tensor:
    """A little of the demo model's calibration text, [48, 128]."""
    from moepress.stages.groundwork import load_tokenizer

    tokenizer = load_tokenizer(model_folder("demo"))
    return build_corpus(embedded_sources("calibration"), tokenizer, tokens=6144, window=128, seed=0).windows


def demo_costs(source: Source, scratch_folder: Path) -> tuple[float, float]:
    """Of a model made of the demo: its KL divergence from it in nats a token, and by how much its loss is larger."""
    from moepress.stages.groundwork import load_tokenizer

    folder = model_folder("demo")
    test = evaluation_windows(embedded_sources("evaluation"), load_tokenizer(folder), window=128, max_windows=4).windows
    one, other = (
        streamed_logits(model, test, scratch_folder).log_softmax(dim=2) for model in (open_checkpoint(folder), source)
    )
    more = (one - other)[:, :-1].gather(2, test[:, 1:, None]).mean()
    return float((one.exp() * (one - other)).sum(dim=2).mean()), float(more)


def logits_of(model: Any, windows: Tensor) -> Tensor:
    """Logits of a transformers model."""
    with torch.inference_mode():
        logits: Tensor = model(windows).logits
    return logits


def assert_near(ours: Tensor, theirs: Tensor, relative: float) -> None:
    """The largest difference is below that share of the largest value."""
    assert ours.shape == theirs.shape
    difference, scale = (ours.double() - theirs.double()).abs().max().item(), theirs.abs().max().item()
    assert difference <= relative * scale, f"differs by {difference:.3g} where the largest value is {scale:.3g}"


@contextmanager
def masked(model: Any, keep: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """Add -1e9 to what the routers of a transformers model choose by, for every expert that is not kept."""
    plain, undo = nn.functional.linear, []

    def hide_logits(gate: nn.Module, mask: Tensor) -> None:
        inner = gate.forward

        def forward_masked(hidden: Tensor) -> Any:
            nn.functional.linear = lambda *arguments: plain(*arguments) + mask  # type: ignore[assignment]
            try:
                return inner(hidden)
            finally:
                nn.functional.linear = plain  # type: ignore[assignment]

        gate.forward = forward_masked  # type: ignore[assignment]
        undo.append(lambda: gate.__dict__.pop("forward"))

    for layer, kept in keep.items():
        gate = model.model.layers[layer].mlp.gate
        mask = torch.full((gate.weight.shape[0],), -1e9).index_fill(0, torch.tensor(list(kept)), 0.0)
        before = getattr(gate, "e_score_correction_bias", None)
        if before is None:
            hide_logits(gate, mask)
        else:
            gate.e_score_correction_bias = nn.Buffer(before + mask)
            undo.append(lambda gate=gate, before=before: setattr(gate, "e_score_correction_bias", before))
    try:
        yield
    finally:
        for step in undo:
            step()


@contextmanager
def watched(model: Any) -> Iterator[dict[int, dict[str, Tensor]]]:
    """What passes the routers and experts of a transformers model, by layer: residual, logits, inputs, ..."""
    seen: dict[int, dict[str, Tensor]] = {}
    handles = []

    def watch(layer: int, module: nn.Module) -> None:
        seen[layer] = row = {}

        def residual(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            row["residual"] = arguments[0].flatten(0, 1)

        def router(_module: nn.Module, _arguments: Any, output: tuple[Tensor, ...]) -> None:
            row["logits"] = output[0]

        def experts(_module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            names = ("hidden_states", "top_k_index", "top_k_weights")
            values = dict(zip(names, arguments, strict=False)) | named
            row["inputs"] = values["hidden_states"].reshape(-1, values["hidden_states"].shape[-1])
            row["chosen"], row["weights"] = values["top_k_index"], values["top_k_weights"]

        handles.append(module.post_attention_layernorm.register_forward_pre_hook(residual))
        handles.append(module.mlp.gate.register_forward_hook(router))
        handles.append(module.mlp.experts.register_forward_pre_hook(experts, with_kwargs=True))

    for layer, module in enumerate(model.model.layers):
        if hasattr(module.mlp, "experts"):
            watch(layer, module)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def expert_outputs(model: Any, layer: int, inputs_TD: Tensor) -> Tensor:
    """Every expert applied to every token, fp64 [T, E, D]: what no real implementation would do."""
    experts = model.model.layers[layer].mlp.experts
    inputs = inputs_TD.double()
    gate, up = experts.gate_up_proj.detach().double().chunk(2, dim=1)
    middle = nn.functional.silu(torch.einsum("td,efd->tef", inputs, gate)) * torch.einsum("td,efd->tef", inputs, up)
    return torch.einsum("tef,edf->ted", middle, experts.down_proj.detach().double())


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, as bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def add_tokenizer(folder: Path) -> None:
    """A tokenizer of one token per byte, for tiny models of 256 ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def command(*arguments: object) -> tuple[int, str, str]:
    """`moepress ...` in this process: exit code, stdout, stderr."""
    from moepress.cli import main

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    before, sys.argv = sys.argv, ["moepress", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, out.getvalue(), err.getvalue()


def in_torch(profile: Profile) -> dict[int, dict[str, torch.Tensor]]:
    """A profile's statistics as tensors."""
    return {n: {k: torch.from_numpy(v) for k, v in row.items()} for n, row in profile.statistics.items()}


def opened(folder: Path) -> Checkpoint:
    """A model whose family has proved itself."""
    source = open_checkpoint(folder)
    return replace(source, family=proven_family(source.family, source.config))


def stored(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor of a folder."""
    return {n: (e.dtype, e.shape, bytes(read_bytes(e))) for n, e in checkpoint.stored.items()}
