"""transformers' model of a config: building it leaves the config as it was."""

import copy
from pathlib import Path

from r1_models import small_r1

from moepress.calibration.profile import fingerprint
from moepress.models.families.skeleton import build_skeleton
from moepress.models.forward.tensor_check import check_tensors
from moepress.models.storage.checkpoint import open_checkpoint


def test_building_a_model_does_not_touch_its_config(tmp_path: Path) -> None:
    """transformers writes rope_type and rope_theta into rope_scaling; a plan would then be for another model."""
    source = open_checkpoint(small_r1(tmp_path / "r1"))
    config, digest = copy.deepcopy(source.config), fingerprint(source)
    assert "rope_type" not in config["rope_scaling"]
    build_skeleton(source.config)
    check_tensors(source.family, source.config, source.outline.shape, source.shapes, folder=source.folder)
    assert source.config == config
    assert fingerprint(source) == digest
