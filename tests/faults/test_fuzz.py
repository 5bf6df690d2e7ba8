"""Spoiled inputs by the thousand: each ends with a sentence of ours, in time, and nothing is written anywhere.

`make test` tries a few hundred of a fixed seed; `make test-faults` ten thousand of a seed that it prints.
"""

import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import mutate
from spoiling import Spoiler, checked, outcome, spoil_json, spoil_quantization, spoil_records, spoil_shard, spoil_types
from stage_runs import G32, add_tokenizer, corpus_of, keep_of, profile_of, quantized_folder

from moepress.calibration.documents import read_documents
from moepress.calibration.profile import load_profile, save_profile
from moepress.calibration.records import content_of
from moepress.calibration.templates import ChatTemplate
from moepress.compress.pruning.plan import check_plan, load_plan, make_plan, plan_text
from moepress.converters.safetensors.artifact import open_source
from moepress.converters.safetensors.scheme import Scheme
from moepress.errors import InvalidInputError
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.stages.export import export_stage
from moepress.stages.places import Output
from moepress.stages.run.recipe import make_recipe
from moepress.validation.speed.targets import load_targets


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> dict[str, Path]:
    """One sound input of each kind."""
    place = tmp_path_factory.mktemp("sound")
    model = place / "model"
    shutil.copytree(tiny_model("deepseek_v3", shards=3), model)
    add_tokenizer(model)
    windows = torch.arange(64).reshape(8, 8) % 32
    made = profile_of(model, corpus_of(windows, torch.arange(8) % 2, ("a", "b")), place / "work")
    (place / "profile").mkdir()
    save_profile(made, place / "profile")
    plans = place / "plans"
    plans.mkdir()
    (plans / "plan.json").write_text(plan_text(make_plan(made, count=12, scheme=Scheme(bits=4, group_size=32))))
    recipes = place / "recipes"
    recipes.mkdir()
    recipe = make_recipe({"model": "demo", "keep": 0.5, "to": ["gptq"], "domain_weight": {"a": 2.0}})
    (recipes / "recipe.json").write_text(recipe.model_dump_json())  # YAML reads JSON too
    texts = place / "texts"
    texts.mkdir()
    rows = [
        {"text": "one"},
        {"prompt": "a", "completion": "b", "id": 3},
        {"content": "c", "meta": {"lang": ["en"]}},
        {"instruction": "do", "input": "", "output": "done"},
    ]
    (texts / "rows.json").write_text(json.dumps(rows))
    (texts / "records.json").write_text(json.dumps(RECORDS))
    codes, gptq = place / "codes", place / "gptq"
    quantized_folder(model, windows, codes, keep=keep_of(open_checkpoint(model), 16), scheme=G32)
    export_stage(str(codes), Output(folder=gptq), "gptq")
    return {
        "codes": codes,
        "gptq": gptq,
        "model": model,
        "profile": place / "profile",
        "plan": plans,
        "recipe": recipes,
        "text": texts,
    }


def opened(folder: Path) -> None:
    source = open_source(folder)
    source.read(next(iter(source.shapes)))


def read_through(folder: Path) -> None:
    """Every tensor, as `validate` reads them."""
    source = open_source(folder)
    for name in source.shapes:
        source.read(name)


def profiled(folder: Path) -> None:
    make_plan(load_profile(folder), count=12, scheme=Scheme(bits=4, group_size=32))


def planned(folder: Path) -> None:
    plan = load_plan(folder / "plan.json")
    model = open_checkpoint(folder.parent / "sound-model")
    check_plan(plan, model.shape, model.outline.moe_layers, None)


def recipe_read(folder: Path) -> None:
    from moepress.stages.run.recipe_file import load_recipe

    make_recipe(load_recipe(folder / "recipe.json"))


def text_read(folder: Path) -> None:
    with ChatTemplate(object()) as chat:  # without a template: conversations are refused, other records read
        list(read_documents(folder / "rows.json", chat))


def records_read(folder: Path) -> None:
    """Each alone, as most of them end with an error."""
    errors = []
    for row in json.loads((folder / "records.json").read_bytes()):
        try:
            content_of(row, "records.json: record 1")
        except InvalidInputError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def targets_read(folder: Path) -> None:
    load_targets(folder / "targets.toml")


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": [1]}}}
RECORDS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]},
    {"messages": [{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": {"x": 1}}], "tools": [CALL]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": '{"name": "f"}'}]},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]], "system": "f"},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    {"question": "a", "answer": "b", "tools": '[{"name": "f"}]'},
]
KINDS: dict[str, tuple[str, Spoiler, Callable[[Path], None], float]] = {
    "config opened": ("model", spoil_json("config.json"), opened, 1.0),
    "index": ("model", spoil_json("model.safetensors.index.json"), opened, 0.5),
    "index checked": ("model", spoil_json("model.safetensors.index.json"), checked, 0.2),
    "codes opened": ("codes", spoil_quantization, read_through, 0.6),
    "codes checked": ("codes", spoil_quantization, checked, 0.4),
    "shard of codes": ("codes", spoil_shard, read_through, 0.3),
    "gptq opened": ("gptq", spoil_quantization, read_through, 0.4),
    "gptq checked": ("gptq", spoil_quantization, checked, 0.4),
    "quantize_config.json": ("gptq", spoil_json("quantize_config.json"), checked, 0.2),
    "shard of gptq": ("gptq", spoil_shard, read_through, 0.3),
    "config checked": ("model", spoil_json("config.json"), checked, 0.3),
    "shard opened": ("model", spoil_shard, opened, 1.0),
    "types": ("model", spoil_types, read_through, 0.3),
    "types of codes": ("codes", spoil_types, read_through, 0.5),
    "types of gptq": ("gptq", spoil_types, read_through, 0.5),
    "types checked": ("codes", spoil_types, checked, 0.3),
    "types of gptq checked": ("gptq", spoil_types, checked, 0.3),
    "types of a profile": ("profile", spoil_types, profiled, 0.3),
    "shard checked": ("model", spoil_shard, checked, 0.3),
    "profile.json": ("profile", spoil_json("profile.json"), profiled, 0.6),
    "statistics": ("profile", spoil_shard, profiled, 0.3),
    "plan.json": ("plan", spoil_json("plan.json"), planned, 1.0),
    "recipe": ("recipe", spoil_json("recipe.json"), recipe_read, 1.0),
    "text": ("text", spoil_json("rows.json"), text_read, 0.6),
    "records": ("text", spoil_records, records_read, 0.6),
}


@pytest.mark.parametrize("kind", KINDS)
def test_spoiled_inputs_end_with_a_sentence(
    whole: dict[str, Path], tmp_path: Path, kind: str, fuzz: tuple[int, int]
) -> None:
    inputs, seed = fuzz
    what, spoil, work, share = KINDS[kind]
    weight = share / sum(row[3] for row in KINDS.values())
    said = 0
    shutil.copytree(whole["model"], tmp_path / "sound-model")
    for number in range(max(4, round(inputs * weight))):
        draw = random.Random(f"{seed}-{kind}-{number}")
        folder = tmp_path / "spoiled"
        shutil.copytree(whole[what], folder)
        try:
            spoil(folder, draw)
            said += outcome(partial(work, folder)) is not None
        except Exception as error:
            raise AssertionError(f"seed {seed}, {kind}, input {number}: {error!r}") from error
        finally:
            shutil.rmtree(folder)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["sound-model"]
    assert said or work is checked  # most of it is noticed; `check` reports more than it refuses


def test_a_spoiled_table_of_gpus_ends_with_a_sentence(tmp_path: Path, fuzz: tuple[int, int]) -> None:
    inputs, seed = fuzz
    row = {"id": "a", "name": "A", "kind": "gaming", "memory_gib": 8, "bandwidth_gb_per_second": 1, "fp16_tflops": 1}
    for number in range(max(4, inputs // 40)):
        draw = random.Random(f"{seed}-targets-{number}")
        changed: Any = mutate(row, draw)
        lines = [f"{key} = {json.dumps(value)}" for key, value in changed.items()] if isinstance(changed, dict) else []
        text = "[[target]]\n" + "\n".join(lines)
        (tmp_path / "targets.toml").write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            outcome(partial(targets_read, tmp_path))
        except Exception as error:
            raise AssertionError(f"seed {seed}, targets, input {number}: {error!r}") from error


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nmodel: [*c,*c,*c,*c,*c,*c]",
        "model: !!python/object/apply:os.system ['true']",
        "? [1, 2]\n: x",
        "model: demo\nkeep: " + "9" * 5000,
        "model: demo\nseed: 0x" + "f" * 5000,
        "x: &x\n  <<: *x\nmodel: demo",
        "[" * 5000,
        "model: demo\nbits: 2024-01-01",
        "\x00",
    ],
)
def test_yaml_that_means_harm_ends_with_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.json").write_text(text)
    assert outcome(partial(recipe_read, tmp_path)) is not None
