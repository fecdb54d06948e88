"""A hospital with real CT among its patients goes the whole way, from tables to a real patient's next scan."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from fourdvq.data.volume import Volume, read_mask, read_volume, to_image, write_nifti
from fourdvq_client import embedded
from fourdvq_client.preparation import real_ids
from fourdvq_client.workspace import open_workspace
from fourdvq_server.embedded import default_profile, run_local

PAIR, CHEST = "LEU-900417", "LEU-900064"  # ids that the hospital gave the public scans
SITES = {"leuven": 11, "southampton": 22}  # seed of the synthetic patients beside them
GRID = (16, 32, 32)
EXPERIMENT = (
    "experiment=tiny",
    "preprocessing=realdata-test",
    # Coarser than the profile's own figures: what is looked at here is the way, and it must take seconds.
    f"model.size=[{GRID[0]},{GRID[1]},{GRID[2]}]",
    f"preprocessing.grid.depth={GRID[0]}",
    f"preprocessing.grid.height={GRID[1]}",
    f"preprocessing.grid.width={GRID[2]}",
    "preprocessing.registration.spacing_mm=6",
    "federation.local_steps=10",
    "federation.ode_local_steps=8",
    "gan.start_step=15",
    "federation.wait_sites_s=1",
)


@dataclass(frozen=True)
class Outcome:
    """What the story left behind."""

    folder: Path
    preparation: dict
    summary: dict

    @property
    def site(self) -> Path:
        return self.folder / "leuven"

    def named(self, patient: str) -> str:
        """The pseudonym of a patient of leuven."""
        workspace, _ = open_workspace(self.site)
        return next(name for name, real in real_ids(workspace).items() if real == patient)

    def rows(self, patient: str) -> list[dict[str, str]]:
        """The patient's rows of the manifest."""
        with (self.site / "prep" / "manifest.csv").open(newline="") as stream:
            return [row for row in csv.DictReader(stream) if row["pseudonym"] == self.named(patient)]


def add_real_patients(data: Path, real: Path) -> None:
    """Put the public scans into a hospital's tables: read where they lie, with the masks that came with them."""
    pair, pelvis = real / "elastix", read_volume(real / "ts" / "example_ct.nii.gz")
    baseline = read_volume(pair / "3DCT_lung_baseline_small.mha")
    fine = sitk.Cast(to_image(read_mask(pair / "3DCT_lung_baseline_mask.mha")), sitk.sitkFloat32)
    moved = sitk.Resample(fine, to_image(baseline), sitk.Transform(), sitk.sitkLinear, 0.0)
    lung = (sitk.GetArrayFromImage(moved) >= 0.5).astype(np.uint8)
    write_nifti(Volume(lung, baseline.spacing, baseline.origin), data / "baseline_lung.nii.gz")
    nothing = np.zeros(pelvis.hu.shape, np.uint8)
    write_nifti(Volume(nothing, pelvis.spacing, pelvis.origin, pelvis.direction), data / "pelvis_lung.nii.gz")
    scans = [
        (PAIR, "baseline", pair / "3DCT_lung_baseline_small.mha", 0, data / "baseline_lung.nii.gz"),
        (PAIR, "follow-up", pair / "followup_reconstructed.nii.gz", 300, pair / "3DCT_lung_followup_mask.mha"),
        (CHEST, "chest", real / "cip" / "ct-64.nrrd", 0, real / "cip" / "wholeLung-64.nrrd"),
        (CHEST, "slab", real / "dicom" / "LIDC-IDRI-0001", 90, ""),
        (CHEST, "pelvis", real / "ts" / "example_ct.nii.gz", 180, data / "pelvis_lung.nii.gz"),
    ]
    with (data / "scans.csv").open(newline="") as stream:
        rows = list(csv.reader(stream))
    with (data / "scans.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([*rows[0], "mask"])
        writer.writerows([*row, ""] for row in rows[1:])
        writer.writerows((who, scan, path, days, mask) for who, scan, path, days, mask in scans)
    with (data / "clinical.csv").open("a") as stream:
        stream.write(f"{PAIR},66,M,ever,700,censored\n{CHEST},71,F,never,400,death\n")


def federate(folder: Path, real: Path, experiment: tuple[str, ...], *, patients: int = 5) -> Outcome:
    """Two training sites, one of them with the public scans, prepared and taken up to the release."""
    profile = default_profile(experiment)
    prepared = {}
    for name, seed in SITES.items():
        data = folder / "data" / name
        embedded.make_phantom(
            data, site=name, patients=patients, seed=seed, size=(32, 64, 64), scans_per_patient=(2, 3)
        )
        if name == "leuven":
            add_real_patients(data, real)
        tables = {"scans": data / "scans", "clinical": data / "clinical.csv", "scans_csv": data / "scans.csv"}
        embedded.create_site(folder / name, site=name, role="train", profile=profile, **tables)
        # Fixed, and such that the pair is among the patients that train.
        (folder / name / "private" / "secret").write_bytes(b"k" * 32)
        prepared[name] = embedded.preprocess(folder / name, decision="demo")
    summary = run_local(
        folder / "coordinator",
        {name: embedded.client_app(folder / name) for name in SITES},
        overrides=experiment,
        on_unapproved=lambda names: [embedded.approve(folder / name, by="test") for name in names],
    )
    return Outcome(folder, prepared["leuven"], summary)


def generate(site: Path, *words: str) -> dict:
    """`fourdvq-client generate --json` as a person at the site types it, in the site's folder."""
    command = [str(Path(sys.executable).with_name("fourdvq-client")), "generate", *words, "--json"]
    done = subprocess.run(command, cwd=site, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def outcome(real_data, tmp_path_factory) -> Outcome:
    return federate(tmp_path_factory.mktemp("real"), real_data, EXPERIMENT)


@pytest.fixture(scope="module")
def next_scan(outcome) -> dict:
    return generate(outcome.site, "--patient", PAIR, "--times", "1,1.6")


def test_the_real_pair_and_the_whole_chest_are_taken_and_what_holds_no_lung_is_named(outcome):
    pair, chest = outcome.rows(PAIR), outcome.rows(CHEST)
    # The baseline has 15 % less lung than the follow-up: a person must look, and here has.
    assert [(r["status"], r["code"]) for r in pair] == [("review", "V_EXPIR"), ("ok", "W_MASK_FOV")]
    assert float(pair[1]["dice"]) > 0.95
    # No mask came with the slab, and the pelvis' is empty: without a lung to look at neither is used.
    assert [r["status"] for r in chest] == ["ok", "refused", "refused"]
    assert [r["code"] for r in chest] == ["W_THICK", "E_MASK", "E_MASK"]
    assert float(chest[0]["lung_ml"]) == pytest.approx(4554, rel=0.01)
    assert outcome.preparation["by_status"]["refused"] == 2
    told = " ".join(outcome.preparation["details"])
    assert "no mask" in told
    assert "no voxel inside" in told


def test_the_real_patient_trains_and_the_run_reaches_its_release_at_both_sites(outcome):
    with (outcome.site / "prep" / "splits.csv").open(newline="") as stream:
        splits = {row["pseudonym"]: row["split"] for row in csv.DictReader(stream)}
    assert splits[outcome.named(PAIR)] == "train"
    stages = outcome.summary["stages"]
    assert stages["hello"]["refused"] == {}
    assert sorted(stages["release"]["received_by"]) == sorted(SITES)


def test_the_next_scan_lies_on_the_patients_grid_in_finite_hu_and_is_labelled_synthetic(outcome, next_scan):
    assert next_scan["times"] == [1.0, 1.6]
    baseline = outcome.site / "prep" / outcome.named(PAIR) / "0"
    grid = json.loads((baseline / "step.json").read_text())["grid"]
    image = sitk.ReadImage(next_scan["volumes"][1])
    hu = sitk.GetArrayFromImage(image)
    assert hu.shape == GRID
    np.testing.assert_allclose(image.GetSpacing()[::-1], grid["spacing"], rtol=1e-5)
    np.testing.assert_allclose(image.GetOrigin(), grid["origin"], rtol=1e-5)
    assert np.isfinite(hu).all()
    assert hu.min() >= -1000
    assert hu.max() <= 400
    assert hu.std() > 10
    facts = json.loads(Path(next_scan["facts"]).read_text())
    for label in (next_scan["label"], facts["label"]):
        assert label.startswith("SYNTHETIC")
    assert facts["given"] == [0.0, pytest.approx(300 / 365.25)]
    assert Path(next_scan["figure"]).read_bytes().startswith(b"\x89PNG")


def test_nothing_at_the_coordinator_and_nothing_generated_names_a_real_patient_or_a_real_file(
    outcome, next_scan, real_data
):
    words = [PAIR, CHEST, outcome.named(PAIR), outcome.named(CHEST), "3DCT_lung", "elastix", "LIDC-IDRI", "ct-64"]
    words += [str(real_data.resolve()), str(outcome.site), "/prep/", "clinical.csv", "scans.csv"]
    held = {p: p.read_bytes() for p in (outcome.folder / "coordinator").rglob("*") if p.is_file()}
    assert any(path.suffix == ".safetensors" for path in held)
    assert [(path.name, word) for path, text in held.items() for word in words if word.encode() in text] == []
    made = b"".join(p.read_bytes() for p in (outcome.site / "generated").rglob("*") if p.is_file())
    assert PAIR.encode() not in made
    assert b"3DCT_lung" not in made
