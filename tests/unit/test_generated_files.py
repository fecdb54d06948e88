"""What `fourdvq-client generate` leaves at a site: complete, labelled and listed, or nothing new at all."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from PIL import Image, ImageSequence

from client_calls import call
from fourdvq.data.dicom import find_series, scan_folder
from fourdvq.data.files import file_sha256
from fourdvq.data.series import read_series
from fourdvq.data.synthetic_dicom import Provenance, write_synthetic_series
from fourdvq.data.volume import Volume, read_volume
from fourdvq.models.latent_ode import LatentODE
from fourdvq.plan import TemporalSpec
from fourdvq_client.preparation import pseudonym_of
from fourdvq_client.workspace import open_workspace
from site_cases import PATIENTS, give_model, prepared_site, tiny_plan
from temporal_cases import randomise

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def root(tmp_path):
    return give_model(prepared_site(tmp_path / "site"))


def held(root: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted((root / "generated").rglob("*")) if p.is_file()}


def test_the_manifest_lists_every_file_by_its_hash_and_every_input_by_its_content(root):
    code, found, _ = call(root, "generate", "--patient", PATIENTS[0], "--times", "0,1,2", "--residual", "--given", "2")
    assert code == 0
    manifest = json.loads(Path(found["facts"]).read_text())
    folder = Path(found["facts"]).parent
    on_disk = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"manifest.json"}
    assert set(manifest["files"]) == on_disk
    assert all(file_sha256(folder / name) == digest for name, digest in manifest["files"].items())
    card = json.loads((root / "models" / "r1" / "card.json").read_text())
    assert {n: manifest[n] for n in ("weights_sha256", "tokenizer_sha256", "plan_sha256")} == {
        n: card[n] for n in ("weights_sha256", "tokenizer_sha256", "plan_sha256")
    }
    with (root / "prep" / "manifest.csv").open(newline="") as stream:
        known = {r["content_sha256"] for r in csv.DictReader(stream) if r["pseudonym"] == found["patient"]}
    assert len(manifest["inputs"]) == 2
    assert {one["content_sha256"] for one in manifest["inputs"]} < known
    assert (manifest["detail"], manifest["kinds"][0]) == ("residual", "given")
    assert manifest["label"].startswith("SYNTHETIC")
    assert PATIENTS[0] not in json.dumps(manifest)


def test_code_shares_are_a_table_whose_rows_add_up_to_one(root):
    _, found, _ = call(root, "generate", "--times", "1,2.5")
    rows = list(csv.DictReader((Path(found["facts"]).parent / "codes.csv").open(newline="")))
    assert [r["years"] for r in rows] == ["1", "2.5"]
    assert [sum(float(v) for k, v in r.items() if k.startswith("code_")) for r in rows] == pytest.approx([1, 1])


def test_every_frame_of_the_moving_picture_is_marked_in_its_pixels(root):
    _, found, _ = call(root, "generate", "--times", "0:2:0.5")
    with Image.open(found["animation"]) as picture:
        frames = [np.asarray(f.convert("L")) for f in ImageSequence.Iterator(picture)]
    assert len(frames) == 5
    feet = [f[-24:-4] for f in frames]
    assert all(foot.max() > 200 and np.array_equal(foot, feet[0]) for foot in feet)  # the same words below each
    heads = {f[:20].tobytes() for f in frames}
    assert len(heads) == 5  # and another time above each


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--times", "9.5"], "E_HORIZON"),
        (["--interval", "1", "--years", "20"], "E_HORIZON"),
        (["--times", "1", "--given", "1"], "E_GIVEN"),
        (["--times", "-1"], "E_TIMES"),
        (["--times", "1", "--samples", "5"], "E_UNSUPPORTED"),
        (["--times", "1", "--precision", "int8"], "E_USAGE"),
    ],
)
def test_after_a_refusal_the_former_trajectory_is_as_it_was(root, words, code):
    call(root, "generate", "--times", "1")
    before = held(root)
    _, error, _ = call(root, "generate", *words)
    assert error["code"] == code
    assert error["fix"]
    assert before
    assert held(root) == before


def test_a_write_that_fails_leaves_the_former_trajectory_and_no_rest(root, monkeypatch):
    _, found, _ = call(root, "generate", "--times", "1")
    before = held(root)
    full = Path(found["facts"]).parent.parent
    import fourdvq.reports.animation as animation

    def no_space(*_: object, **__: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(animation, "trajectory_animation", no_space)
    code, error, _ = call(root, "generate", "--times", "2")
    assert code != 0
    assert error["code"]
    assert held(root) == before
    assert [p.name for p in full.iterdir()] == [found["patient"]]


def test_a_person_may_insist_on_times_that_nobody_was_seen_at_and_the_flag_stays(root):
    code, found, _ = call(root, "generate", "--times", "9.5", "--beyond-horizon")
    assert (code, found["flags"]) == (0, ["W_HORIZON"])
    assert json.loads(Path(found["facts"]).read_text())["flags"] == ["W_HORIZON"]


def test_a_scan_that_nobody_approved_is_not_an_input(root):
    workspace, _ = open_workspace(root)
    name = pseudonym_of(workspace, PATIENTS[2])
    for index in (1, 2):
        code, _, _ = call(root, "qc", "reject", f"{name}/{index}", "--reason", "motion", "--by", "reader")
        assert code == 0
    code, error, _ = call(root, "generate", "--patient", name, "--times", "2")
    assert (code, error["code"]) == (3, "E_GIVEN")
    assert "1 approved scan" in error["found"]
    assert not (root / "generated" / name).exists()


def test_a_model_whose_tokenizer_is_another_one_is_refused(root):
    folder = root / "models" / "r1"
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(card | {"tokenizer_sha256": "f" * 64}))
    sums = "".join(f"{file_sha256(folder / n)}  {n}\n" for n in ("card.json", "plan.json", "weights.safetensors"))
    (folder / "SHA256SUMS").write_text(sums)
    _, error, _ = call(root, "generate", "--times", "2")
    assert error["code"] == "E_TOKENIZER"
    assert held(root) == {}


def test_a_patient_whose_lung_mask_is_empty_is_refused(root):
    workspace, _ = open_workspace(root)
    name = pseudonym_of(workspace, PATIENTS[0])
    mask = root / "prep" / name / "0" / "mask.npy"
    np.save(mask, np.zeros_like(np.load(mask)))
    _, error, _ = call(root, "generate", "--patient", name, "--times", "2")
    assert error["code"] == "E_NOLUNG"
    assert held(root) == {}


def test_samples_add_a_mean_and_a_spread_that_is_none_at_the_last_given_scan(tmp_path):
    plan = dataclasses.replace(
        tiny_plan(), temporal=TemporalSpec(hidden=4, dynamics_width=4, initial_state="variational")
    )
    model = LatentODE(plan.temporal, plan.model.code_dim)
    randomise(model, seed=3, scale=0.5)
    root = give_model(
        prepared_site(tmp_path / "site"), plan, {n: t.detach().clone() for n, t in model.state_dict().items()}
    )
    _, found, _ = call(root, "generate", "--times", "3")
    last = json.loads(Path(found["facts"]).read_text())["given"][-1]
    words = ["generate", "--times", f"{last!r},5", "--residual", "--samples", "4", "--seed", "1"]
    code, found, _ = call(root, *words)
    assert code == 0
    sd = [read_plain(Path(v).with_name("spread.nii.gz")) for v in found["volumes"]]
    assert sd[0].max() == 0
    assert sd[1].mean() > 0
    assert read_volume(Path(found["volumes"][0]).with_name("mean.nii.gz")).hu.shape == (16, 32, 32)
    manifest = json.loads(Path(found["facts"]).read_text())
    assert (manifest["samples"], manifest["seed"]) == (4, 1)


def read_plain(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_a_synthetic_series_has_the_voxels_and_the_place_of_its_nifti_file_and_names_nobody(root):
    _, found, _ = call(root, "generate", "--patient", PATIENTS[1], "--times", "1,2", "--dicom")
    for image, series in zip(found["volumes"], found["dicom"], strict=True):
        names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(series)
        ours, theirs = sitk.ReadImage(image), sitk.ReadImage(names)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(theirs), sitk.GetArrayFromImage(ours))
        np.testing.assert_allclose(theirs.GetSpacing(), ours.GetSpacing(), rtol=1e-6)
        np.testing.assert_allclose(theirs.GetOrigin(), ours.GetOrigin(), atol=1e-3)
    heads = [pydicom.dcmread(p) for s in found["dicom"] for p in sorted(Path(s).iterdir())]
    assert len({h.SOPInstanceUID for h in heads}) == len(heads) == 32
    assert len({h.SeriesInstanceUID for h in heads}) == 2
    for head in heads:
        assert head.ImageType[:2] == ["DERIVED", "SECONDARY"]
        assert "SYNTHETIC" in head.ImageComments
        assert "SYNTHETIC" in head.DerivationDescription
        assert (head.PatientID, str(head.PatientName), head.StudyDate) == ("SYNTHETIC", "SYNTHETIC", "")
    text = b"".join(p.read_bytes() for s in found["dicom"] for p in Path(s).iterdir())
    assert PATIENTS[1].encode() not in text
    assert found["patient"].encode() not in text


def test_the_intake_leaves_a_synthetic_series_out_and_would_read_it_rightly_if_it_were_original(tmp_path):
    rng = np.random.default_rng(0)
    hu = rng.integers(-1000, 400, (6, 20, 24)).astype(np.int16)
    c, s = np.cos(0.1), np.sin(0.1)
    turned = (c, -s, 0.0, s, c, 0.0, 0.0, 0.0, 1.0)  # the patient lay a little turned
    volume = Volume(hu, (2.5, 0.7, 0.9), (-100.25, 50.5, -300.0), turned)
    made_by = Provenance(2.0, "run-1", "ab" * 32, "SYNTHETIC, for research")
    paths = write_synthetic_series(volume, tmp_path / "series", made_by)
    left_out = scan_folder(tmp_path / "series")
    assert (left_out.candidates, left_out.skipped["E_DERIVED"]) == ((), 6)
    for path in paths:
        head = pydicom.dcmread(path)
        head.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        head.save_as(path)
    (candidate,) = find_series(tmp_path / "series")
    read = read_series(candidate)
    np.testing.assert_array_equal(read.hu, hu)
    np.testing.assert_allclose(read.spacing, volume.spacing)
    np.testing.assert_allclose(read.origin, volume.origin)
    np.testing.assert_allclose(read.direction, turned, atol=1e-9)


def test_the_same_volume_gives_the_same_series_and_another_one_other_identifiers(tmp_path):
    volume = Volume(np.zeros((2, 4, 4), dtype=np.int16), (1.0, 1.0, 1.0))
    other = Volume(np.ones((2, 4, 4), dtype=np.int16), (1.0, 1.0, 1.0))
    made_by = Provenance(1.0, "run-1", "ab" * 32, "SYNTHETIC")
    named = {"a": volume, "b": volume, "c": other}
    a, b, c = (write_synthetic_series(v, tmp_path / n, made_by)[0] for n, v in named.items())
    assert a.read_bytes() == b.read_bytes()
    assert pydicom.dcmread(io.BytesIO(c.read_bytes())).SeriesInstanceUID != pydicom.dcmread(a).SeriesInstanceUID
