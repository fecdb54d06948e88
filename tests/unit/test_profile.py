"""The profile is one identity for everything that changes a voxel."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from fourdvq.errors import ConfigError
from fourdvq.preprocessing.profile import (
    FovSpec,
    GridSpec,
    LimitsSpec,
    OutsideSpec,
    Profile,
    ProfileName,
    RegistrationSpec,
    ResampleSpec,
    SegmentationSpec,
    StepVersions,
    load_profile,
    profile_from,
    profile_to_plain,
    require_supported,
)

PRESETS = sorted((Path(__file__).parents[2] / "configs" / "preprocessing").glob("*.yaml"))


def test_the_presets_load_can_be_run_and_survive_a_round_trip():
    assert sorted(p.stem for p in PRESETS) == ["demo", "paper-v1", "paper-v1-threshold", "realdata-test", "tiny"]
    for path in PRESETS:
        profile = load_profile(path)
        assert profile.profile.name == path.stem
        require_supported(profile)
        assert profile_from(profile_to_plain(profile)).sha256 == profile.sha256


def test_the_paper_preset_has_the_papers_grid_and_the_documented_limits():
    paper = load_profile(next(p for p in PRESETS if p.stem == "paper-v1"))
    assert paper.grid.size == (96, 256, 256)
    assert paper.window_hu == (-1000, 400)
    assert (paper.fov.mode, paper.fov.margin_mm) == ("lung_bbox", 10)
    assert (paper.limits.max_thickness_mm, paper.limits.min_coverage_mm, paper.limits.min_lung_ml) == (2.5, 180, 1000)
    assert paper == Profile(ProfileName("paper-v1"), segmentation=paper.segmentation)
    assert (paper.segmentation.method, paper.segmentation.step_mm) == ("lungmask_r231", None)
    assert paper.segmentation.weights_sha256.startswith("d5d2fc3d")  # as the published file's name says
    without = load_profile(next(p for p in PRESETS if p.stem == "paper-v1-threshold"))
    assert without == Profile(ProfileName("paper-v1-threshold"))
    assert (without.segmentation.method, without.segmentation.air_hu) == ("threshold", -400)


CHANGES = {
    "profile": ProfileName("other"),
    "grid": GridSpec(depth=64),
    "fov": FovSpec(margin_mm=11.0),
    "window_hu": (-1000.0, 401.0),
    "resample": ResampleSpec(antialias=False),
    "outside_lung": OutsideSpec(feather_voxels=2),
    "segmentation": SegmentationSpec(method="provided"),
    "registration": RegistrationSpec(field_sigma=1.6),
    "limits": LimitsSpec(thick="warn"),
    "step_versions": StepVersions(resample=2),
}


@pytest.mark.parametrize("name", [f.name for f in fields(Profile)])
def test_any_change_is_another_identity(name):
    profile = Profile(ProfileName("a"))
    assert replace(profile, **{name: CHANGES[name]}).sha256 != profile.sha256


def test_the_order_of_keys_and_whole_numbers_do_not_change_the_identity():
    plain = profile_to_plain(Profile(ProfileName("a")))
    turned = dict(reversed(list(plain.items())))
    turned["window_hu"] = [-1000, 400]
    assert profile_from(turned).sha256 == profile_from(plain).sha256


@pytest.mark.parametrize(
    ("section", "value", "code"),
    [
        ("window_hu", [400, -1000], "E_VALUE"),
        ("grid", {"depth": 4}, "E_VALUE"),
        ("grid", {"depht": 96}, "E_KEY"),
        ("limits", {"thick": "ignore"}, "E_TYPE"),
        ("fov", {"margin_mm": -1}, "E_VALUE"),
        ("outside_lung", {"feather_voxels": -1}, "E_VALUE"),
        ("registration", {"spacing_mm": 0}, "E_VALUE"),
        ("registration", {"margin_mm": -1}, "E_VALUE"),
        ("registration", {"clamp_hu": [500, -1000]}, "E_VALUE"),
        ("registration", {"affine_iterations": 0}, "E_VALUE"),
        ("registration", {"affine_sample_share": 0}, "E_VALUE"),
        ("registration", {"affine_sample_share": 1.1}, "E_VALUE"),
        ("registration", {"shrink": [4, 2]}, "E_VALUE"),
        ("registration", {"shrink": [4, 2, 0]}, "E_VALUE"),
        ("registration", {"iterations": [60, 40, 0]}, "E_VALUE"),
        ("registration", {"field_sigma": 0}, "E_VALUE"),
        ("limits", {"max_thickness_mm": 0}, "E_VALUE"),
        ("limits", {"min_coverage_mm": 0}, "E_VALUE"),
        ("limits", {"min_lung_ml": 0}, "E_VALUE"),
        ("limits", {"min_lung_ml": 8000}, "E_VALUE"),
        ("limits", {"fail_dice": 0.96}, "E_VALUE"),
        ("limits", {"pass_dice": 1.01}, "E_VALUE"),
        ("segmentation", {"method": "lungmask_r231"}, "E_VALUE"),
        ("segmentation", {"weights_sha256": "d5d2fc3d"}, "E_VALUE"),
        ("segmentation", {"air_hu": 40}, "E_VALUE"),
        ("segmentation", {"step_mm": 0}, "E_VALUE"),
        ("segmentation", {"method": "totalsegmentator"}, "E_TYPE"),
    ],
)
def test_a_wrong_value_names_its_key(section, value, code):
    plain = profile_to_plain(Profile(ProfileName("a")))
    plain[section] = {**plain[section], **value} if isinstance(value, dict) else value
    with pytest.raises(ConfigError, match=f"{code}.*profile"):
        profile_from(plain)


@pytest.mark.parametrize(
    ("fov", "backend", "loads"),
    [
        ({"mode": "lung_bbox", "margin_mm": 15}, "corrfield", True),
        ({"mode": "lung_bbox", "margin_mm": 16}, "corrfield", False),
        ({"mode": "full"}, "demons", False),
        ({"mode": "full"}, "affine", True),
    ],
)
def test_a_follow_up_keeps_its_own_tissue_only_where_the_field_covers_the_grid(fov, backend, loads):
    plain = {"profile": {"name": "a"}, "fov": fov, "registration": {"backend": backend}}
    assert profile_from(plain).outside_lung.source == "baseline"
    plain["outside_lung"] = {"source": "own"}
    if loads:
        profile_from(plain)
    else:
        with pytest.raises(ConfigError, match=r"E_VALUE.*a seam"):
            profile_from(plain)


def test_a_file_that_is_missing_or_no_yaml_is_refused(tmp_path):
    (tmp_path / "bad.yaml").write_text("grid: {depth: 96")
    with pytest.raises(ConfigError, match="E_TYPE"):
        load_profile(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match="E_FILE"):
        load_profile(tmp_path / "none.yaml")
