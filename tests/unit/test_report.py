from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from fourdvq.reports.validation import (
    BiomarkerRow,
    Biomarkers,
    CohortFlow,
    Egress,
    MetricRow,
    ModelFacts,
    Picture,
    QualityCase,
    ReportData,
    report_json,
    verdicts,
    write_report,
)

HEX = "ab" * 32
DATA = ReportData(
    site="leuven",
    role="train",
    created="2026-11-24",
    model=ModelFacts("released", HEX, HEX, "demo-1", 4, HEX, "demo"),
    flow=CohortFlow(30, 55, 54, 53, 12, 3, {"E_GAP": 1}, {"train": 21, "validation": 3, "test": 6}),
    reconstruction=(MetricRow("lung", "psnr", 12, 21.5, 20.9, 22.1), MetricRow("whole", "psnr", 3, 22.0, 21.0, 23.0)),
    extrapolation=(
        MetricRow("model_residual", "skill", 9, 0.12, 0.03, 0.21),
        MetricRow("persistence", "mse", 9, 0.002, 0.001, 0.003),
    ),
    history={"leuven": (15.0, 17.0, 19.5)},
    biomarkers=Biomarkers((BiomarkerRow(17, 1.8, 1.3, 2.5, 0.002, 0.66, True),), "", 3, 21, 10),
    egress=(Egress("delta", 4, 1_200_000),),
    refusals={"TOO_FEW_PATIENTS": 1},
    environment={"package": "0.1.0"},
    cases=(QualityCase("ab12cd34ef56", 0, 0.0, "PASS", "approve", 4100.0, None),),
    pictures=(Picture("<b>quality</b>", "aligned tissue is grey", b"\x89PNG"),),
)


def test_share_edition_holds_no_case_no_picture_and_no_day(tmp_path):
    html, facts = write_report(DATA, tmp_path, "share")
    for text in (html.read_text(), facts.read_text()):
        assert "ab12cd34ef56" not in text
        assert "2026-11-24" not in text
        assert "base64" not in text


def test_small_counts_are_withheld_in_the_share_edition_and_shown_in_the_local_one():
    shared, local = report_json(DATA, "share"), report_json(DATA, "local")
    assert (shared["flow"]["deaths"], local["flow"]["deaths"]) == ("<5", 3)
    assert shared["flow"]["refused"] == {"E_GAP": "<5"}
    assert [r["row"] for r in shared["reconstruction"]] == ["lung"]
    assert len(local["reconstruction"]) == 2


def test_report_needs_no_network_and_no_script(tmp_path):
    text = write_report(DATA, tmp_path, "local")[0].read_text()
    addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", text)
    assert all(a.startswith(("data:", "#")) for a in addresses)
    assert "<script" not in text


def test_text_of_the_facts_is_escaped(tmp_path):
    text = write_report(DATA, tmp_path, "local")[0].read_text()
    assert "<b>quality</b>" not in text
    assert "&lt;b&gt;quality&lt;/b&gt;" in text


def test_json_and_page_show_the_same_number(tmp_path):
    html, facts = write_report(DATA, tmp_path, "local")
    assert json.loads(facts.read_text())["reconstruction"][0]["mean"] == 21.5
    assert "21.5" in html.read_text()


@pytest.mark.parametrize(
    ("low", "high", "colour"), [(0.03, 0.21, "green"), (-0.1, 0.2, "amber"), (-0.3, -0.1, "red"), (None, None, "amber")]
)
def test_a_forecast_is_called_better_only_if_its_interval_excludes_copying(low, high, colour):
    rows = (MetricRow("model_residual", "skill", 9, 0.0, low, high),)
    assert {what: c for c, what, _ in verdicts(replace(DATA, extrapolation=rows))}["forecast"] == colour


def test_an_empty_site_gets_a_complete_report(tmp_path):
    empty = ReportData("external", "external", "", DATA.model, CohortFlow(0, 0, 0, 0, 0, 0))
    text = write_report(empty, tmp_path, "local")[0].read_text()
    assert "Nothing has left this site" in text


def test_the_same_facts_give_the_same_bytes(tmp_path):
    first = write_report(DATA, tmp_path / "a", "local")[0].read_bytes()
    assert write_report(DATA, tmp_path / "b", "local")[0].read_bytes() == first
