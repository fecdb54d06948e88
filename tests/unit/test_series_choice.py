"""Which series of a study is used: in the order of the criteria, in words, and by a person's word before all."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from client_calls import call
from dicom_factory import CANARY_ID, compress, rewrite, write_enhanced, write_series
from fourdvq.data.air_apart import AirApart, _request, _requested
from fourdvq.data.choice import Choice, ChoiceRules, best_series, choose_series
from fourdvq.data.cohort import Cohort, load_cohort
from fourdvq.data.dicom import SeriesCandidate, find_series
from fourdvq.data.dicom_studies import DicomOptions
from fourdvq.data.rough_lung import rough_lung_ml
from fourdvq.data.series import read_series
from fourdvq.data.technical import TechnicalTags, kernel_class, maker_of
from fourdvq.data.volume import Volume
from fourdvq.preprocessing.inputs import load_input, scan_inputs
from fourdvq.preprocessing.profile import LimitsSpec
from site_cases import new_site, tiny_profile
from synthetic_lungs import chest

RULES = ChoiceRules(min_coverage_mm=20.0)


@pytest.fixture(scope="module")
def volume() -> Volume:
    scan, _ = chest((16, 24, 24))
    return Volume(scan.hu, (1.5, 0.7, 0.7), (-80.0, -70.0, -200.0))


def series(folder: Path, volume: Volume, name: str, *, study: str = "study", **tags) -> None:
    def edit(i, data):
        data.SeriesDescription = "Thorax"
        for tag, value in tags.items():
            setattr(data, tag, value)

    write_series(folder / study / name, volume, study=study, series=name, edit=edit)


def chosen(folder: Path, **options) -> Choice:
    return choose_series([find_series(folder)], rules=RULES, **options)[0]


def name_of(candidate: SeriesCandidate) -> str:
    return candidate.first.path.parent.name


SOFT, SHARP = "B30f", "B70f"


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        # each better one loses in everything that comes after
        ({"SliceThickness": 2.0, "SeriesDescription": "Thorax", "ConvolutionKernel": SHARP},
         {"SliceThickness": 1.0, "SeriesDescription": "Thorax expiratie"}),
        ({"SliceThickness": 1.0, "ConvolutionKernel": SHARP}, {"SliceThickness": 2.0, "SeriesDescription": "insp"}),
        ({"SeriesDescription": "Inspiration", "ConvolutionKernel": SHARP}, {"SeriesDescription": "Thorax"}),
        ({"ConvolutionKernel": SOFT, "ContrastBolusAgent": "Iomeron"}, {"ConvolutionKernel": SHARP}),
        ({"ConvolutionKernel": SOFT}, {"ConvolutionKernel": SOFT, "ContrastBolusAgent": "Iomeron"}),
    ],
)  # fmt: skip
def test_each_criterion_counts_before_all_that_come_after_it(volume, tmp_path, better, worse):
    series(tmp_path, volume, "worse", **worse)
    fewer = Volume(volume.hu[:-1], volume.spacing, volume.origin)
    series(tmp_path, fewer, "better", **better)
    assert name_of(chosen(tmp_path).used) == "better"


def test_of_equal_ones_the_longer_wins_and_a_draw_never_depends_on_names_or_order(volume, tmp_path):
    series(tmp_path, Volume(volume.hu[:-1], volume.spacing, volume.origin), "short")
    series(tmp_path, volume, "long")
    assert name_of(chosen(tmp_path).used) == "long"
    pair = find_series(tmp_path)
    draws = {choose_series([order], rules=RULES)[0].used.series_key for order in (pair, pair[::-1])}
    assert len(draws) == 1


def test_the_larger_lung_wins_over_the_kernel_but_only_beyond_five_percent(volume, tmp_path):
    series(tmp_path, volume, "full", ConvolutionKernel=SHARP)
    series(tmp_path, volume, "shallow", ConvolutionKernel=SOFT)
    lungs = {"full": 5000.0, "shallow": 4000.0}
    assert name_of(chosen(tmp_path, estimate=lambda c: lungs[name_of(c)]).used) == "full"
    lungs["shallow"] = 4800.0
    found = chosen(tmp_path, estimate=lambda c: lungs[name_of(c)])
    assert name_of(found.used) == "shallow"
    assert found.judged[0].words["lung"] == "about 4800 ml"


def test_the_lung_is_only_looked_at_where_candidates_tie(volume, tmp_path):
    asked = []
    series(tmp_path, volume, "thin", SliceThickness=1.0)
    series(tmp_path, volume, "thick", SliceThickness=2.0)
    chosen(tmp_path, estimate=lambda c: asked.append(c))
    assert asked == []


def test_the_quick_guess_of_the_lung_is_near_the_truth(tmp_path):
    scan, lung = chest((64, 128, 128))
    write_series(tmp_path, scan)
    truth = float(lung.hu.sum()) * scan.voxel_ml
    found = rough_lung_ml(find_series(tmp_path)[0])
    assert found == pytest.approx(truth, rel=0.1)


@pytest.mark.parametrize("how", ["RLE", "JPEG", "JPEG2000"])
def test_the_lung_is_also_looked_at_in_compressed_series(tmp_path, how):
    """An abdomen of more slices must not win over the chest."""
    scan, lung = chest((40, 48, 48))
    no_lung = np.where(lung.hu > 0, np.int16(40), scan.hu)
    series(tmp_path, Volume(scan.hu[:-2], scan.spacing, scan.origin), "chest")
    series(tmp_path, Volume(no_lung, scan.spacing, scan.origin), "abdomen")
    uncompressed = {name_of(c): rough_lung_ml(c) for c in find_series(tmp_path)}
    for path in tmp_path.rglob("*.dcm"):
        compress(path, how)
    found = {name_of(c): rough_lung_ml(c) for c in find_series(tmp_path)}
    assert found == {name: pytest.approx(ml, rel=0.1, abs=50) for name, ml in uncompressed.items()}
    assert name_of(chosen(tmp_path, estimate=rough_lung_ml).used) == "chest"


def test_an_image_that_cannot_be_decoded_or_ends_its_process_leaves_the_lung_unknown(volume, tmp_path):
    series(tmp_path, volume, "one")
    for path in tmp_path.rglob("*.dcm"):
        compress(path, "JPEG2000")
    slices = find_series(tmp_path)[0].slices
    assert _requested(_request(slices, 4)) == (list(slices), 4)
    apart = AirApart()
    whole = apart.air_pixels(slices, 1)
    assert whole is not None
    assert apart.process is not None
    apart.process.kill()
    assert apart.air_pixels(slices, 1) is None
    assert apart.air_pixels(slices, 1) == whole
    slices[0].path.write_bytes(slices[0].path.read_bytes()[:-500])
    assert apart.air_pixels(slices, 1) is None
    apart.stop()


def test_the_kernel_class_that_the_visits_share_is_kept_through_all_of_them(volume, tmp_path):
    """Two visits exist as sharp only, one as both: alone it would be the soft one."""
    for study in ("one", "two", "three"):
        series(tmp_path, volume, f"{study}-sharp", study=study, ConvolutionKernel=SHARP)
    series(tmp_path, volume, "two-soft", study="two", ConvolutionKernel=SOFT)
    studies = [find_series(tmp_path / study) for study in ("one", "two", "three")]
    assert name_of(choose_series([studies[1]], rules=RULES)[0].used) == "two-soft"
    together = choose_series(studies, rules=RULES)
    assert [name_of(c.used) for c in together] == ["one-sharp", "two-sharp", "three-sharp"]


def test_every_candidate_has_words_and_the_reason_of_its_reject(volume, tmp_path):
    series(tmp_path, volume, "good")
    series(tmp_path, volume, "thick", SliceThickness=5.0)
    series(tmp_path, Volume(volume.hu[:8], volume.spacing, volume.origin), "short")
    series(tmp_path, volume, "exp", SeriesDescription="Thorax EXP 1.0")
    found = {name_of(j.candidate): j for j in chosen(tmp_path).judged}
    assert found["good"].reject == ""
    assert found["thick"].reject == "E_THICK: 5 mm, above 2.5 mm"
    assert found["short"].reject == "E_FOV: 12 mm of 20 mm"
    assert found["exp"].reject.startswith("V_EXPIR")
    assert set(found["good"].words) == {"thickness", "breath", "lung", "kernel", "contrast", "slices"}


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [("B30f", "soft"), ("B40s", "soft"), ("Br36d/3", "soft"), ("STANDARD", "soft"), ("FC08", "soft"), ("B", "soft"),
     ("B70f", "sharp"), ("Bl57d/3", "sharp"), ("LUNG", "sharp"), ("BONEPLUS", "sharp"), ("FC51", "sharp"),
     ("YC", "sharp"), ("I70f/3", "sharp"), ("", "unknown")],
)  # fmt: skip
def test_kernels_of_the_usual_makers_have_their_class(kernel, kind):
    assert kernel_class(kernel) == kind


def test_only_known_words_of_the_scanner_pass_on(volume, tmp_path):
    makers = {
        "SIEMENS Healthineers": "siemens",
        "GE MEDICAL SYSTEMS": "ge",
        "TOSHIBA": "canon",
        "Dr Canary": "other",
        "": "",
    }
    assert {text: maker_of(text) for text in makers} == makers
    series(tmp_path, volume, "a", Manufacturer="Canary of Leuven", ConvolutionKernel="CANARY", KVP=120)
    write_clinical(tmp_path)
    cohort = load_cohort(tmp_path / "clinical.csv", None, tmp_path / "study")
    (scan,) = scan_inputs(cohort, CANARY_ID)
    assert load_input(scan, LimitsSpec(), with_mask=False).technical == TechnicalTags("other", "soft", 120, False)


def write_clinical(folder: Path) -> Path:
    text = f"patient_id,age,sex,smoking,time_days,event\n{CANARY_ID},60,M,ever,900,censored\n"
    (folder / "clinical.csv").write_text(text)
    return folder / "clinical.csv"


def test_preparation_reads_exactly_the_series_that_was_shown(volume, tmp_path):
    other = Volume(volume.hu + 9, volume.spacing, volume.origin)
    series(tmp_path / "ct", volume, "soft", ConvolutionKernel=SOFT)
    series(tmp_path / "ct", other, "sharp", ConvolutionKernel=SHARP)
    clinical = write_clinical(tmp_path)
    rows = load_cohort(clinical, None, tmp_path / "ct").candidates
    assert [(r.used, r.by) for r in rows] == [(True, "score"), (False, "")]
    wanted = {rows[1].study_key: rows[1].series_key}
    cohort = load_cohort(clinical, None, tmp_path / "ct", dicom=DicomOptions(overrides=wanted))
    (scan,) = scan_inputs(cohort, CANARY_ID)
    assert {p.parent.name for p in scan.files} == {"sharp"}
    np.testing.assert_array_equal(load_input(scan, LimitsSpec(), with_mask=False).volume.hu, other.hu)
    before = scan.source_sha256 or scan_inputs(cohort, CANARY_ID)[0]
    series(tmp_path / "ct", volume, "third", ConvolutionKernel="B50f")  # a new neighbour changes nothing
    again = load_cohort(clinical, None, tmp_path / "ct", dicom=DicomOptions(overrides=wanted))
    assert scan_inputs(again, CANARY_ID)[0] == before


def test_a_row_of_the_scan_table_that_names_a_dicom_folder_is_chosen_the_same_way(volume, tmp_path):
    later = Volume(volume.hu + 9, volume.spacing, volume.origin)
    series(tmp_path / "ct", volume, "a", study="one", StudyDate="20150301")
    series(tmp_path / "ct", later, "b", study="two", StudyDate="20160301")
    (tmp_path / "ct" / "notes").mkdir()
    (tmp_path / "ct" / "notes" / "a.txt").write_text("nothing")
    clinical = write_clinical(tmp_path)
    rows = [f"{CANARY_ID},x,.,2015-03-01", f"{CANARY_ID},y,.,2016-03-01", f"{CANARY_ID},z,notes,2017-03-01"]
    (tmp_path / "scans.csv").write_text("\n".join(["patient_id,scan_id,path,date", *rows]))
    cohort = load_cohort(clinical, tmp_path / "scans.csv", tmp_path / "ct")
    assert [(s.days, s.files[0].parent.name) for s in cohort.scans_of(CANARY_ID)] == [(0, "a"), (366, "b")]
    assert ("E_EMPTY", "z") in {(f.code, f.scan_id) for f in cohort.findings}


def test_two_acquisitions_of_a_series_and_two_enhanced_files_of_one_can_be_told_apart(volume, tmp_path):
    other = Volume(volume.hu + 9, volume.spacing, volume.origin)
    series(tmp_path / "acquisitions", volume, "one", AcquisitionNumber=1)
    series(tmp_path / "acquisitions", other, "two", AcquisitionNumber=2, SeriesInstanceUID="1.2.3")
    for path in (tmp_path / "acquisitions" / "study" / "one").iterdir():
        rewrite(path, lambda d: setattr(d, "SeriesInstanceUID", "1.2.3"))
    write_enhanced(tmp_path / "enhanced" / "one.dcm", volume)
    write_enhanced(tmp_path / "enhanced" / "two.dcm", other, edit=lambda d: setattr(d, "SOPInstanceUID", "1.2.5"))
    for name in ("acquisitions", "enhanced"):
        pair = find_series(tmp_path / name)
        assert len({c.first.series for c in pair}) == 1
        assert len({c.series_key for c in pair}) == 2
        for c in pair:
            # Preparation is given the files of the one that was chosen, and finds it again among them.
            assert best_series(tmp_path, series_key=c.series_key, files=c.files).slices == c.slices


def table_cohort(folder: Path, rows: list[str], *patients: str, column: str = "date") -> Cohort:
    """The cohort of `folder`/ct by a table of scans."""
    people = [f"{p},60,M,ever,900,censored" for p in patients]
    (folder / "clinical.csv").write_text("\n".join(["patient_id,age,sex,smoking,time_days,event", *people]))
    (folder / "scans.csv").write_text("\n".join([f"patient_id,scan_id,path,{column}", *rows]))
    return load_cohort(folder / "clinical.csv", folder / "scans.csv", folder / "ct")


def codes_of(cohort: Cohort) -> set[tuple[str, str, str]]:
    return {(f.code, f.patient_id, f.scan_id) for f in cohort.findings if f.code != "W_ONE_SCAN"}


def two_visits(folder: Path, volume: Volume, *ids: str) -> None:
    """ct/one of 2015 and ct/two of 2016, with the ids in their headers; the second one names no sex."""
    later = Volume(volume.hu + 7, volume.spacing, volume.origin)
    series(folder, volume, "one", study="ct", PatientID=ids[0], StudyInstanceUID="1.1", StudyDate="20150301")
    series(folder, later, "two", study="ct", PatientID=ids[1], StudyInstanceUID="1.2", StudyDate="20160301",
           PatientSex="U")  # fmt: skip


def test_a_row_may_name_one_enhanced_file(volume, tmp_path):
    path = write_enhanced(tmp_path / "ct" / "one.dcm", volume)
    (tmp_path / "ct" / "one_lung.nii.gz").touch()
    cohort = table_cohort(tmp_path, ["P1,a,one.dcm,2015-03-01"], "P1")
    (scan,) = scan_inputs(cohort, "P1")
    assert (scan.files, scan.mask_path) == ((path,), tmp_path / "ct" / "one_lung.nii.gz")
    np.testing.assert_array_equal(load_input(scan, LimitsSpec(), with_mask=False).volume.hu, volume.hu)


def test_of_two_studies_on_one_day_the_one_with_more_lung_is_used_and_shown_as_used(tmp_path):
    scan, lung = chest((64, 64, 64))
    no_lung = np.where(lung.hu > 0, np.int16(40), scan.hu)
    series(tmp_path, Volume(scan.hu[:-4], scan.spacing, scan.origin), "chest", study="one")
    series(tmp_path, Volume(no_lung, scan.spacing, scan.origin), "abdomen", study="two")
    rules = DicomOptions(rules=ChoiceRules(max_thickness_mm=5.0))
    cohort = load_cohort(write_clinical(tmp_path), None, tmp_path, dicom=rules)
    assert [s.path.name for s in cohort.scans] == ["chest"]
    assert [(c.folder.name, c.used) for c in cohort.candidates] == [("chest", True), ("abdomen", False)]
    assert "findings.csv" in cohort.candidates[1].reject


def test_a_person_can_leave_a_study_out_and_days_still_count_from_it(volume, tmp_path):
    two_visits(tmp_path, volume, CANARY_ID, CANARY_ID)
    first = load_cohort(write_clinical(tmp_path), None, tmp_path / "ct").candidates[0]
    options = DicomOptions(overrides={first.study_key: "none"})
    cohort = load_cohort(write_clinical(tmp_path), None, tmp_path / "ct", dicom=options)
    assert [(s.days, s.path.name) for s in cohort.scans] == [(366, "two")]
    assert {c.reject for c in cohort.candidates if not c.used} == {"series.yaml: none"}


def test_rows_whose_dates_are_swapped_are_found_by_the_headers(volume, tmp_path):
    two_visits(tmp_path, volume, "P1", "P1")
    cohort = table_cohort(tmp_path, ["P1,a,two,2015-03-01", "P1,b,one,2016-03-01"], "P1")
    assert {("E_DATE", "P1", "a"), ("E_DATE", "P1", "b")} <= codes_of(cohort)
    assert cohort.scans == ()
    by_days = table_cohort(tmp_path, ["P1,a,one,0", "P1,b,two,300"], "P1", column="days_from_baseline")
    assert [s.days for s in by_days.scans] == [0, 300]  # the way out where the dates in headers were shifted


def test_rows_whose_patients_are_swapped_are_found_by_the_headers(volume, tmp_path):
    two_visits(tmp_path, volume, "P1", "P2")
    cohort = table_cohort(tmp_path, ["P2,a,one,2015-03-01", "P1,b,two,2016-03-01"], "P1", "P2")
    assert codes_of(cohort) == {("E_IDENTITY", "P1", ""), ("E_IDENTITY", "P2", "")}
    assert cohort.usable == ()


def test_a_patient_of_the_table_may_have_an_id_in_the_headers_of_each_visit(volume, tmp_path):
    two_visits(tmp_path, volume, "ANON-7", "ANON-9")
    cohort = table_cohort(tmp_path, ["P1,a,one,2015-03-01", "P1,b,two,2016-03-01"], "P1")
    assert codes_of(cohort) == {("W_IDENTITY", "P1", "")}
    assert [s.days for s in cohort.scans_of("P1")] == [0, 366]


def test_a_study_with_series_of_two_days_has_no_date(volume, tmp_path):
    series(tmp_path / "ct", volume, "soft", ConvolutionKernel=SOFT, StudyDate="20150301")
    series(tmp_path / "ct", volume, "sharp", ConvolutionKernel=SHARP, StudyDate="20160301")
    cohort = load_cohort(write_clinical(tmp_path), None, tmp_path / "ct")
    assert ("E_DATE", CANARY_ID, "study-1") in codes_of(cohort)
    assert cohort.scans == ()


# --- the files of a site ---------------------------------------------------------------------------------------------


@pytest.fixture
def site(volume, tmp_path) -> Path:
    series(tmp_path / "data" / "scans", volume, "soft", ConvolutionKernel=SOFT)
    series(tmp_path / "data" / "scans", Volume(volume.hu + 9, volume.spacing, volume.origin), "sharp",
           ConvolutionKernel=SHARP, SeriesDescription="CANARY description")  # fmt: skip
    write_clinical(tmp_path / "data")
    (tmp_path / "data" / "scans.csv").write_text("")
    profile = {**tiny_profile(), "limits": {"min_coverage_mm": 20.0}}
    root = new_site(tmp_path / "site", tmp_path / "data", profile=profile)
    text = (root / "site.yaml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("scans_csv:")]
    scans = f"scans: {tmp_path / 'data' / 'scans'}"
    (root / "site.yaml").write_text("\n".join(scans if t.startswith("scans:") else t for t in lines) + "\n")
    return root


def candidates(root: Path) -> list[dict[str, str]]:
    with (root / "candidates.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_scan_writes_the_candidates_for_the_owner_alone_and_names_the_file(site):
    code, found, _ = call(site, "scan")
    assert (code, found["scans"], found["series"], found["by_code"]) == (0, 1, 2, {"W_ONE_SCAN": 1})
    assert found["candidates"] == str(site / "candidates.csv")
    rows = candidates(site)
    assert [(r["used"], r["kernel"].split(",")[0]) for r in rows if r["used"]] == [("yes", "soft")]
    assert {r["reject"] for r in rows} == {"", "another kernel than the other visits"}
    for name in ("candidates.csv", "findings.csv", "private/series.csv"):
        assert (site / name).stat().st_mode & 0o777 == 0o600
    text = (site / "candidates.csv").read_text()
    assert not [word for word in (CANARY_ID, "CANARY", "Thorax", "1.2.826", "study/") if word in text]
    places = (site / "private" / "series.csv").read_text()
    assert all(r["series"] in places for r in rows)


def test_a_study_is_left_out_by_none_in_series_yaml(site):
    call(site, "scan")
    (site / "series.yaml").write_text(f"{candidates(site)[0]['study']}: none\n")
    call(site, "scan")
    assert {r["used"] for r in candidates(site)} == {""}


def test_a_line_of_series_yaml_wins_over_every_score(site):
    call(site, "scan")
    (loser,) = [r for r in candidates(site) if not r["used"]]
    (site / "series.yaml").write_text(f"# agreed on 2 May\n{loser['study']}: {loser['series']}\n")
    assert call(site, "scan")[0] == 0
    (used,) = [r for r in candidates(site) if r["used"]]
    assert (used["series"], used["by"]) == (loser["series"], "series.yaml")


@pytest.mark.parametrize(
    ("line", "code", "found"),
    [
        ("study-000000000000: {series}", "E_KEY", "study-000000000000"),
        ("{study}: series-000000000000", "E_VALUE", "series-000000000000"),
        ("{study}: thin one", "E_VALUE", "thin one"),
        ("{study}: 3", "E_VALUE", "3"),
        ("LEU-1: {series}", "E_VALUE", "LEU-1"),
        ("- {study}", "E_TYPE", ""),
    ],
)
def test_a_wrong_line_of_series_yaml_stops_with_what_it_should_be(site, line, code, found):
    call(site, "scan")
    row = candidates(site)[0]
    (site / "series.yaml").write_text(line.format(study=row["study"], series=row["series"]) + "\n")
    exit_code, error, _ = call(site, "scan")
    assert (exit_code, error["code"]) == (2, code)
    assert found in error["found"]
    assert error["wanted"]
    assert error["fix"]


def test_a_series_that_is_gone_is_named_and_no_other_is_read(volume, tmp_path):
    from fourdvq.errors import VolumeError

    series(tmp_path, volume, "a")
    with pytest.raises(VolumeError, match=r"E_FILE.*series-000000000000"):
        best_series(tmp_path, series_key="series-000000000000")
    assert read_series(best_series(tmp_path)).hu.shape == volume.hu.shape
