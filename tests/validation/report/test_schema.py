"""The published JSON Schema of report.json: it is the code's, and real reports pass it while broken ones do not."""

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError

from moepress.converters.safetensors.artifact import open_artifact
from moepress.models.storage.checkpoint import Checkpoint
from moepress.stages.evaluation import Evaluation
from moepress.stages.places import Machine
from moepress.stages.subjects import subject_of
from moepress.stages.validate import validate_stage
from moepress.validation.quality.thresholds import Thresholds
from moepress.validation.report.schema import schema_text

PUBLISHED = Path(__file__).resolve().parents[3] / "docs" / "report.schema.json"
WRITE = "from moepress.validation.report.schema import schema_text as s; print(s(), end='')"
REFRESH = f'python -c "{WRITE}" > docs/report.schema.json'


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.fixture(scope="module")
def real(demo: Checkpoint, artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What validate writes: with thresholds, and targets."""
    subjects = [subject_of("before", demo), subject_of("after", open_artifact(artifact))]
    limits = Thresholds(max_ppl_increase=0.5, max_kl=1e-9)
    evaluation = Evaluation(window=32, max_windows=1, throughput=False, thresholds=limits)
    report = validate_stage(subjects, demo.folder, evaluation, Machine(device="cpu"), tmp_path_factory.mktemp("work"))
    made: dict[str, Any] = json.loads(report.model_dump_json())
    return made


def test_the_published_schema_is_that_of_the_code() -> None:
    assert PUBLISHED.read_text(encoding="utf-8") == schema_text(), f"refresh it: {REFRESH}"


def test_a_real_report_passes(validator: Draft202012Validator, real: dict[str, Any]) -> None:
    validator.validate(real)
    assert real["thresholds"]
    assert real["targets"]["rows"]


def test_infinite_numbers_pass_and_other_strings_do_not(validator: Draft202012Validator, real: dict[str, Any]) -> None:
    row = real["quality"]["rows"][0]
    for value in ("Infinity", "NaN"):
        validator.validate(
            real | {"quality": real["quality"] | {"rows": [row | {"nll": {"value": value, "error": None}}]}}
        )
    with pytest.raises(ValidationError):
        validator.validate(
            real | {"quality": real["quality"] | {"rows": [row | {"nll": {"value": "1", "error": None}}]}}
        )


@pytest.mark.parametrize(
    "change", [{"surplus": 1}, {"schema_version": "2.0"}, {"quality": None}, {"subjects": [{"label": 1}]}], ids=str
)
def test_what_is_no_report_fails(validator: Draft202012Validator, real: dict[str, Any], change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        validator.validate(real | change)
