"""Hospitals that only have a CSV: the same selection as from arrays, honest models, and a code for every bad column."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from fourdvq import console
from fourdvq.errors import CohortError
from fourdvq.survival import select_biomarkers
from fourdvq.survival.small_sample import assess_model
from fourdvq_server.biomarker_tables import read_tables
from fourdvq_server.cli import app
from fourdvq_server.table_survival import KEY
from survival_data import cohorts

CODES = 6
NAMES = [f"marker_{k}" for k in range(CODES)]


@pytest.fixture(scope="module")
def sites():
    """Two tables whose numbers survive being written with all digits, as a CSV has them."""
    return cohorts([90, 75], codes=CODES, log_hr=0.9, true=2, seed=3)


def write(path: Path, site, *, separator=",", change=None) -> Path:
    rows = []
    for i in range(len(site.t)):
        row = {
            "pseudonym": site.ids[i],
            "time_days": str(int(site.t[i])),
            "event": "death" if site.e[i] else "censored",
            "age": repr(float(70.0 + 10.0 * np.clip(site.C[i, 0], -4, 4))),
            "sex": "M" if site.C[i, 1] else "F",
            "smoking": "ever" if site.C[i, 2] else "never",
            **{name: repr(float(site.X[i, k])) for k, name in enumerate(NAMES)},
        }
        rows.append(row)
    for change_row in change or ():
        change_row(rows)
    lines = [separator.join(rows[0]), *(separator.join(row.values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def as_read(site):
    """The site as its file says: ages have gone through years."""
    years = np.array([float(repr(float(70.0 + 10.0 * np.clip(a, -4, 4)))) for a in site.C[:, 0]])
    C = site.C.copy()
    C[:, 0] = (years - 70.0) / 10.0
    return dataclasses.replace(site, C=C)


@pytest.fixture
def files(sites, tmp_path):
    return [write(tmp_path / f"{site.name}.csv", site) for site in sites]


@pytest.fixture
def call(capsys):
    def invoke(*argv: str) -> tuple[int, dict]:
        code = console.run(app, ["survival", *argv, "--json"], "fourdvq-server")
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    return invoke


def test_tables_give_the_selection_of_the_same_arrays(sites, files, tmp_path, call):
    code, found = call("--table", str(files[0]), "--table", str(files[1]), "-o", str(tmp_path), "--permutations", "3")
    assert code == 0
    wanted = select_biomarkers([as_read(site) for site in sites], key=KEY, permutations=3)
    assert found["selected"] == [NAMES[k] for k in wanted.selected] != []
    assert found["permutation_p"] == wanted.permutation_p
    assert found["folds_digest"] == wanted.folds_digest
    names = {Path(name).name for name in found["files"]}
    assert {"selection.csv", "selection.json", "biomarkers.csv", "forest.svg", "kaplan_meier.svg"} <= names
    assert found["selected"][0] in (tmp_path / "forest.svg").read_text()
    assert found["rules"] == "policy"
    assert {"model.csv", "model.svg"} <= names
    assert [row["name"] for row in found["model"]["coefficients"][: len(found["selected"])]] == found["selected"]
    assert found["risk_groups"]["logrank_p"] < 0.05


def test_a_model_never_shows_its_concordance_alone(sites, files, tmp_path, call, capsys):
    words = ["--table", str(files[0]), "--table", str(files[1]), "-o", str(tmp_path), "--permutations", "20"]
    code, found = call(*words, "--model", "marker_0", "--model", "marker_1")
    assert code == 0
    chosen = [dataclasses.replace(s, X=s.X[:, :2]) for s in (as_read(site) for site in sites)]
    wanted = assess_model(chosen, replicates=20, key=KEY)
    coefficients = [row["coef"] for row in found["model"]]
    np.testing.assert_allclose(coefficients, wanted.coef, rtol=1e-6)
    assert found["cross_validated"] == pytest.approx(wanted.cross_validated, abs=1e-12)
    assert found["permutation_p"] == wanted.permutation_p
    console.run(app, ["survival", *words, "--model", "marker_0"], "fourdvq-server")
    text = capsys.readouterr().out
    assert text.index("C in the same patients") < text.index("C cross-validated") < text.index("permutation P")


def test_a_small_model_stands_under_a_banner_and_a_small_site_is_refused_by_name(sites, tmp_path, call, capsys):
    few = np.arange(30)
    site = dataclasses.replace(
        sites[0], X=sites[0].X[few], C=sites[0].C[few], t=sites[0].t[few], e=sites[0].e[few], ids=sites[0].ids[:30]
    )
    path = write(tmp_path / "small.csv", site)
    words = ["--table", str(path), "-o", str(tmp_path), "--rules", "off", "--permutations", "5"]
    models = [word for name in NAMES for word in ("--model", name)]
    assert console.run(app, ["survival", *words, *models], "fourdvq-server") == 0
    text = capsys.readouterr().out
    assert text.startswith("Only ")
    tiny = dataclasses.replace(site, X=site.X[:15], C=site.C[:15], t=site.t[:15], e=site.e[:15], ids=site.ids[:15])
    code, found = call("--table", str(write(tmp_path / "tiny.csv", tiny)), "-o", str(tmp_path / "none"))
    assert (code, found["code"]) == (5, "E_COX_RULE")
    assert found["where"] == "tiny: min_patients"
    assert not (tmp_path / "none").exists()


def test_missing_values_are_left_out_and_counted(sites, tmp_path):
    def blank(rows):
        rows[0]["age"] = ""
        rows[1]["marker_2"] = "NA"
        rows[2]["smoking"] = "sometimes"

    path = write(tmp_path / "a.csv", sites[0], separator=";", change=[blank])
    found = read_tables([path])
    assert len(found.sites[0].t) == len(sites[0].t) - 3
    assert found.left_out == {"a": {"incomplete clinical row": 2, "missing biomarker": 1}}
    assert found.biomarkers == tuple(NAMES)


def without(column):
    def change(rows):
        for row in rows:
            del row[column]

    return change


def with_value(column, value):
    def change(rows):
        rows[3][column] = value

    return change


def repeated(rows):
    rows[4]["pseudonym"] = rows[3]["pseudonym"]


@pytest.mark.parametrize(
    ("change", "code", "where"),
    [
        (without("event"), "E_COLUMN", "event"),
        (without("pseudonym"), "E_COLUMN", "pseudonym"),
        (without("smoking"), "E_COLUMN", "smoking"),
        (with_value("event", "gone"), "E_WORD", "event"),
        (with_value("sex", "x"), "E_WORD", "sex"),
        (with_value("time_days", "-3"), "E_TIME", "time_days"),
        (with_value("age", "700"), "E_AGE", "age"),
        (with_value("marker_1", "high"), "E_VALUE", "marker_1"),
        (repeated, "E_DUPLICATE", "row 6"),
    ],
)
def test_a_bad_column_has_a_code_a_file_and_a_place(sites, tmp_path, change, code, where):
    path = write(tmp_path / "a.csv", sites[0], change=[change])
    with pytest.raises(CohortError) as caught:
        read_tables([path])
    assert caught.value.code == code
    assert "a.csv" in caught.value.where
    assert where in caught.value.where


def test_tables_without_biomarkers_with_other_ones_or_of_one_name_are_refused(sites, tmp_path, files, call):
    bare = write(tmp_path / "bare.csv", sites[0], change=[without(name) for name in NAMES])
    other = write(tmp_path / "other.csv", sites[1], change=[without("marker_5")])
    (tmp_path / "twin").mkdir()
    twin = write(tmp_path / "twin" / files[0].name, sites[1])
    for paths, code in (([bare], "E_COLUMN"), ([files[0], other], "E_COLUMN"), ([files[0], twin], "E_DUPLICATE")):
        with pytest.raises(CohortError) as caught:
            read_tables(paths)
        assert caught.value.code == code
    with pytest.raises(CohortError, match="E_FILE"):
        read_tables([tmp_path / "nothing.csv"])
    assert call("--table", str(files[0]), "--model", "height", "-o", str(tmp_path))[1]["code"] == "E_VALUE"
