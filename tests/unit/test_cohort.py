"""Tables of a hospital become rows and findings; a fault blocks its patient and no other."""

from __future__ import annotations

import datetime
import hashlib
import hmac
from pathlib import Path

import pytest

from fourdvq.data.cohort import Cohort, load_cohort, pseudonym
from fourdvq.errors import CohortError, ConfigError

CLINICAL = """patient_id,age,sex,smoking,time_days,event
007,64.5,M,ever,800,death
LEU-2,71,F,never,900,censored
LEU-3,58,M,former,1000,transplant
"""
SCANS = """patient_id,scan_id,path,days_from_baseline
007,a,007_a.nii.gz,0
007,b,007_b.nii.gz,365
LEU-2,a,LEU-2_a.nii.gz,0
LEU-2,b,LEU-2_b.nii.gz,200
LEU-3,a,LEU-3_a.nii.gz,0
LEU-3,b,LEU-3_b.nii.gz,400
"""
DATED_SCANS = """patient_id,scan_id,path,date
007,a,007_a.nii.gz,2015-03-01
007,b,007_b.nii.gz,2016-02-29
LEU-2,a,LEU-2_a.nii.gz,20150301
LEU-2,b,LEU-2_b.nii.gz,2015-09-17
LEU-3,a,LEU-3_a.nii.gz,2015-03-01
LEU-3,b,LEU-3_b.nii.gz,2016-04-04 10:30
"""


@pytest.fixture
def site(tmp_path: Path):
    """A function that writes the two tables (with the scans they name) and loads them."""

    def load(clinical: str = CLINICAL, scans: str = SCANS, *, encoding: str = "utf-8", **options) -> Cohort:
        folder = tmp_path / "ct"
        folder.mkdir(exist_ok=True)
        for line in SCANS.splitlines()[1:]:
            (folder / line.split(",")[2]).touch()
        (folder / "007_a_lung.nii.gz").touch()
        (tmp_path / "clinical.csv").write_text(clinical, encoding=encoding)
        (tmp_path / "scans.csv").write_text(scans, encoding="utf-8")
        return load_cohort(tmp_path / "clinical.csv", tmp_path / "scans.csv", folder, **options)

    return load


def codes(cohort: Cohort, patient: str | None = None) -> set[str]:
    return {f.code for f in cohort.findings if patient in (None, f.patient_id)}


def usable(cohort: Cohort) -> list[str]:
    return [p.patient_id for p in cohort.usable]


def test_good_tables_give_rows_and_no_finding(site):
    cohort = site()
    assert cohort.findings == ()
    assert usable(cohort) == ["007", "LEU-2", "LEU-3"]
    first, second, third = cohort.patients
    assert (first.age, first.sex, first.smoking, first.time_days, first.event) == (64.5, "M", 1, 800, "death")
    assert (second.smoking, second.event) == (0, "censored")
    assert (third.smoking, third.event) == (1, "transplant")
    scans = cohort.scans_of("007")
    assert [s.days for s in scans] == [0, 365]
    assert scans[0].mask_path is not None
    assert scans[0].mask_path.name == "007_a_lung.nii.gz"
    assert scans[1].mask_path is None


def test_semicolons_decimal_commas_and_a_byte_order_mark_are_read_with_a_warning(site):
    cohort = site(CLINICAL.replace(",", ";").replace("64.5", "64,5"), encoding="utf-8-sig")
    assert cohort.patients[0].age == 64.5
    assert codes(cohort) == {"W_COMMA"}
    assert usable(cohort) == ["007", "LEU-2", "LEU-3"]


def test_ids_are_text_and_keep_their_zeros(site):
    assert "007" in usable(site())


def test_the_hospitals_own_columns_and_words_are_translated(site):
    theirs = CLINICAL.replace("patient_id", "record_id").replace("sex", "geslacht").replace("ever", "1")
    theirs = theirs.replace(",M,", ",man,").replace(",F,", ",vrouw,").replace("n1", "0")
    cohort = site(
        theirs,
        columns={"patient_id": "record_id", "sex": "geslacht"},
        values={"sex": {"man": "M", "vrouw": "F"}, "smoking": {"1": "ever", "0": "never"}},
        scans=SCANS.replace("patient_id", "record_id"),
    )
    assert cohort.findings == ()
    assert [(p.sex, p.smoking) for p in cohort.patients] == [("M", 1), ("F", 0), ("M", 1)]


def test_an_id_in_one_table_only_is_found_in_both_directions_with_the_nearest_id(site):
    cohort = site(CLINICAL.replace("LEU-3", "LEU-03"))
    ids = {f.patient_id: f for f in cohort.findings if f.code == "E_ID"}
    assert set(ids) == {"LEU-3", "LEU-03"}
    assert "LEU-03" in ids["LEU-3"].fix
    assert "LEU-3" in ids["LEU-03"].fix
    assert usable(cohort) == ["007", "LEU-2"]


@pytest.mark.parametrize(
    ("before", "after", "code"),
    [
        ("71,F", "17,F", "E_AGE"),
        ("71,F", "111,F", "E_AGE"),
        ("71,F", "old,F", "E_AGE"),
        ("71,F", "71,X", "E_WORD"),
        ("900,censored", "900,gone", "E_WORD"),
        ("900,censored", "-1,censored", "E_TIME"),
        ("900,censored", "soon,censored", "E_TIME"),
        ("900,censored", "199,censored", "E_TIME"),
        ("LEU-3,58", "LEU-2,58", "E_DUPLICATE"),
    ],
)
def test_a_fault_in_a_clinical_row_blocks_its_patient_and_no_other(site, before, after, code):
    cohort = site(CLINICAL.replace(before, after))
    assert code in codes(cohort, "LEU-2")
    assert "LEU-2" not in usable(cohort)
    assert "007" in usable(cohort)
    finding = next(f for f in cohort.findings if f.code == code)
    assert finding.where.startswith("clinical.csv row ")
    assert finding.fix


@pytest.mark.parametrize(
    ("before", "after"), [("71,F", ",F"), ("71,F", "71,"), ("never", "unknown"), ("never", "pipe")]
)
def test_a_missing_covariate_warns_and_keeps_the_patient_in_training(site, before, after):
    cohort = site(CLINICAL.replace(before, after))
    assert codes(cohort) == {"W_COVARIATE"}
    assert "LEU-2" in usable(cohort)


@pytest.mark.parametrize(
    ("before", "after", "code", "still_used"),
    [
        ("LEU-2,b,LEU-2_b.nii.gz,200", "LEU-2,b,gone.nii.gz,200", "E_FILE", True),
        ("LEU-2,b,LEU-2_b.nii.gz,200", "LEU-2,b,LEU-2_b.nii.gz,", "E_DATE", True),
        ("LEU-2,b,LEU-2_b.nii.gz,200", "LEU-2,b,LEU-2_b.nii.gz,-5", "E_TIME", False),
        ("LEU-2,b,LEU-2_b.nii.gz,200", "LEU-2,a,LEU-2_b.nii.gz,200", "E_DUPLICATE", False),
        ("LEU-2,a,LEU-2_a.nii.gz,0", "LEU-2,a,LEU-2_a.nii.gz,30", "E_TIME", False),
        ("LEU-2,b,LEU-2_b.nii.gz,200", "LEU-2,b,LEU-2_b.nii.gz,0", "W_SAMEDAY", True),
    ],
)
def test_a_fault_in_a_scan_row_is_found(site, before, after, code, still_used):
    cohort = site(scans=SCANS.replace(before, after))
    assert code in codes(cohort)
    assert ("LEU-2" in usable(cohort)) == still_used
    assert "007" in usable(cohort)


def test_a_patient_with_one_scan_is_kept_with_a_warning(site):
    cohort = site(scans=SCANS.replace("LEU-2,b,LEU-2_b.nii.gz,200\n", ""))
    assert codes(cohort, "LEU-2") == {"W_ONE_SCAN"}
    assert "LEU-2" in usable(cohort)


def test_dates_become_days_since_the_first_scan(site):
    scans = (
        SCANS.replace("days_from_baseline", "date").replace(",0\n", ",2015-03-01\n").replace(",365\n", ",2016-02-29\n")
    )
    scans = scans.replace(",200\n", ",2015-09-17\n").replace(",400\n", ",2016-04-04 10:30\n")
    clinical = CLINICAL.replace("time_days", "last_contact_date").replace(",800,", ",2017-05-09,")
    clinical = clinical.replace(",900,", ",2017-08-17,").replace(",1000,", ",2015-02-01,")
    cohort = site(clinical, scans, today=datetime.date(2020, 1, 1))
    assert [s.days for s in cohort.scans] == [0, 365, 0, 200, 0, 400]
    assert [p.time_days for p in cohort.patients] == [800, 900, None]
    assert codes(cohort, "LEU-3") == {"E_TIME"}
    future = site(clinical, scans, today=datetime.date(2016, 1, 1))
    assert "E_DATE" in codes(future, "007")


@pytest.mark.parametrize("how", ["date", "days_from_baseline"])
def test_times_count_from_the_first_ct_also_where_its_file_is_missing(site, how):
    dated = dict(zip((0, 365, 730), ("2015-03-01", "2016-02-29", "2017-02-28"), strict=True))
    days = {0: ("LEU-2", "a", "gone"), 365: ("LEU-2", "b", "LEU-2_a"), 730: ("LEU-2", "c", "LEU-2_b")}
    rows = [f"{p},{s},{file}.nii.gz,{dated[n] if how == 'date' else n}" for n, (p, s, file) in days.items()]
    cohort = site(scans="\n".join([f"patient_id,scan_id,path,{how}", *rows]))
    assert [s.days for s in cohort.scans_of("LEU-2")] == [365, 730]
    assert codes(cohort, "LEU-2") == {"E_FILE"}
    assert "LEU-2" in usable(cohort)
    assert next(p.time_days for p in cohort.patients if p.patient_id == "LEU-2") == 900


@pytest.mark.parametrize(
    ("times", "days", "fault"),
    [
        ([",0", "2016-01-01,365", "2017-01-01,731"], [0, 365, 731], ""),
        (["2015-01-01,", "2016-01-01,", "2017-01-01,731"], [0, 365, 731], ""),
        ([",0", "2016-01-01,", "2017-01-01,"], None, "which day is 0"),
        (["2015-01-01,0", "2016-01-01,365", "2017-01-01,365"], None, "disagree"),
        (["2015-01-01,10", "2016-01-01,375", ",500"], None, "no scan on day 0"),
    ],
)
def test_dates_and_days_count_from_one_first_ct_or_the_patient_waits(site, times, days, fault):
    files = ("LEU-2_a", "LEU-2_b", "LEU-3_a")
    rows = [f"LEU-2,{n},{file}.nii.gz,{time}" for n, (file, time) in enumerate(zip(files, times, strict=True))]
    cohort = site(scans="\n".join(["patient_id,scan_id,path,date,days_from_baseline", *rows]))
    told = [f.found for f in cohort.findings if f.code == "E_TIME" and f.patient_id == "LEU-2"]
    assert [fault in text for text in told] == ([True] if fault else [])
    assert ("LEU-2" in usable(cohort)) is not bool(fault)
    if days is not None:
        assert [s.days for s in cohort.scans_of("LEU-2")] == days


@pytest.mark.parametrize("lost", ["", "2015-13-01", "2031-03-01"])
def test_a_scan_without_a_date_may_be_the_first_so_that_its_patients_times_cannot_be_used(site, lost):
    scans = DATED_SCANS.replace("LEU-2_a.nii.gz,20150301", f"LEU-2_a.nii.gz,{lost}")
    cohort = site(scans=scans, today=datetime.date(2020, 1, 1))
    assert codes(cohort, "LEU-2") == {"E_DATE", "E_TIME", "W_ONE_SCAN"}
    assert usable(cohort) == ["007", "LEU-3"]


def test_time_may_count_from_another_day_than_the_first_scan(site):
    scans = (
        SCANS.replace("days_from_baseline", "date").replace(",0\n", ",2015-03-01\n").replace(",365\n", ",2016-02-29\n")
    )
    scans = scans.replace(",200\n", ",2015-09-17\n").replace(",400\n", ",2016-04-04\n")
    lines = CLINICAL.splitlines()
    with_origin = "\n".join([lines[0] + ",diagnosis", *[line + ",2015-02-19" for line in lines[1:]]])
    cohort = site(with_origin, scans, columns={"time_origin": "diagnosis"})
    assert [p.time_days for p in cohort.patients] == [790, 890, 990]


def test_a_table_that_cannot_be_read_stops_with_its_code(site, tmp_path):
    for clinical, code in (
        (CLINICAL.replace("smoking", "tobacco"), "E_COLUMN"),
        (CLINICAL.replace("time_days", "followup"), "E_COLUMN"),
        ("patient_id,age,sex,smoking,time_days,event\n", "E_TABLE"),
        (CLINICAL.replace("LEU-2,71", "LEU-2,71,9,9"), "E_TABLE"),
    ):
        with pytest.raises(CohortError, match=code):
            site(clinical)
    with pytest.raises(CohortError, match="E_WORD"):
        site(values={"sex": {"1": "mann"}})
    with pytest.raises(CohortError, match="E_FOLDER"):
        load_cohort(tmp_path / "clinical.csv", None, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "clinical.csv").write_text(CLINICAL)
    with pytest.raises(CohortError, match="E_EMPTY"):
        load_cohort(tmp_path / "clinical.csv", None, tmp_path / "empty")
    (tmp_path / "latin.csv").write_bytes(CLINICAL.replace("007", "Jos\u00e9").encode("latin-1"))
    with pytest.raises(CohortError, match="E_TABLE"):
        load_cohort(tmp_path / "latin.csv", None, tmp_path / "empty")


@pytest.mark.parametrize("word", ["nan", "inf", "-inf", "1e999"])
def test_what_is_no_finite_number_is_no_number(site, word):
    by_age = site(CLINICAL.replace("71,F", f"{word},F"))
    by_time = site(CLINICAL.replace("900,censored", f"{word},censored"))
    by_day = site(scans=SCANS.replace(",200\n", f",{word}\n"))
    assert codes(by_age, "LEU-2") == {"W_COVARIATE" if word == "nan" else "E_AGE"}  # nan is a usual word for missing
    assert codes(by_time, "LEU-2") == {"W_COVARIATE" if word == "nan" else "E_TIME"}
    assert codes(by_day, "LEU-2") == {"E_DATE", "W_ONE_SCAN"}


@pytest.mark.parametrize("opened", ['"LEU-2,71', 'LEU-2,"71'])
def test_a_quote_without_an_end_stops_with_its_row_and_swallows_no_patient(site, opened):
    with pytest.raises(CohortError, match=r"E_TABLE.*clinical\.csv row 3"):
        site(CLINICAL.replace("LEU-2,71", opened))


def test_empty_fields_after_the_last_and_a_line_that_names_the_separator_are_passed_over(site):
    assert site(CLINICAL.replace("censored\n", "censored,,\n")).findings == ()
    cohort = site("sep=;\n" + CLINICAL.replace(",", ";"), "sep=,\n" + SCANS)
    assert codes(cohort) == {"W_COMMA"}
    assert usable(cohort) == ["007", "LEU-2", "LEU-3"]


def test_a_pseudonym_is_the_start_of_a_keyed_hash():
    expected = hmac.new(b"secret", b"LEU-2", hashlib.sha256).hexdigest()[:12]
    assert pseudonym(b"secret", "LEU-2") == expected
    assert pseudonym(b"other", "LEU-2") != expected


@pytest.mark.parametrize(
    ("columns", "nearest"),
    [({"time_orgin": "diagnosis"}, "time_origin"), ({"masks": "masker"}, "mask"), ({"diagnosis": "time_origin"}, "")],
)
def test_a_mapping_of_a_column_that_is_none_of_ours_is_refused_with_the_nearest(site, columns, nearest):
    with pytest.raises(ConfigError, match="E_KEY") as refused:
        site(columns=columns)
    assert repr(next(iter(columns))) in refused.value.found
    assert nearest in refused.value.fix


@pytest.mark.parametrize(
    ("columns", "place"),
    [
        ({"time_origin": "diag_dat"}, "clinical.csv, column 'diag_dat' (for time_origin)"),
        ({"last_contact_date": "seen"}, "clinical.csv, column 'seen' (for last_contact_date)"),
        ({"mask": "masker"}, "scans.csv, column 'masker' (for mask)"),
        ({"date": "scan_dat"}, "scans.csv, column 'scan_dat' (for date)"),
    ],
)
def test_a_mapped_column_that_the_table_lacks_is_refused_also_where_it_is_optional(site, columns, place):
    clinical = CLINICAL.replace("event\n", "event,diag_date\n")
    with pytest.raises(CohortError, match="E_COLUMN") as refused:
        site(clinical, DATED_SCANS.replace("date\n", "scan_date\n"), columns={"date": "scan_date", **columns})
    assert refused.value.where == place


def test_one_mapping_serves_both_tables_each_with_its_own_optional_columns(site):
    clinical = CLINICAL.replace("time_days", "fu_days")
    columns = {"time_days": "fu_days", "date": "scan_date"}
    cohort = site(clinical, DATED_SCANS.replace("date\n", "scan_date\n"), columns=columns)
    assert cohort.findings == ()
    assert [p.time_days for p in cohort.patients] == [800, 900, 1000]
