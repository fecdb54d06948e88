"""Our own tables after a spreadsheet, an editor or a bad disk had them: read all the same, or named with a remedy."""

from __future__ import annotations

import shutil

import pytest

from client_calls import call
from fourdvq.data.prepared import MANIFEST_COLUMNS, REVIEW_COLUMNS, SPLIT_COLUMNS, read_table, write_table
from fourdvq.errors import CohortError
from fourdvq.preprocessing.inputs import SourceHashes
from fourdvq_client.runtime import Facts
from fourdvq_client.site_secret import real_ids
from fourdvq_client.workspace import open_workspace
from site_cases import PATIENTS, prepared_site

pytestmark = pytest.mark.usefixtures("one_thread")

DECISIONS = (
    {"pseudonym": "0123456789ab", "index": 0, "decision": "approve", "reason": "", "reviewer": "A. Person"},
    {"pseudonym": "0123456789ab", "index": 1, "decision": "reject", "reason": "breathing; moved", "reviewer": "Jörg"},
)


@pytest.fixture
def review(tmp_path):
    """prep/review.csv with two decisions."""
    path = tmp_path / "review.csv"
    write_table(path, REVIEW_COLUMNS, DECISIONS)
    return path


def resaved(text: str, separator: str) -> str:
    """As a spreadsheet of another locale writes it: its separator, Windows line ends, a row of empty cells."""
    lines = text.replace("breathing; moved", '"breathing; moved"').splitlines()
    return "\r\n".join([line.replace(",", separator) for line in lines] + [separator * 7, ""])


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_that_a_spreadsheet_has_saved_says_what_it_said(review, separator, encoding):
    before = read_table(review, REVIEW_COLUMNS)
    review.write_text(resaved(review.read_text(encoding="utf-8"), separator), encoding=encoding, newline="")
    assert read_table(review, REVIEW_COLUMNS) == before
    assert [row["reason"] for row in before] == ["", "breathing; moved"]


@pytest.mark.parametrize(
    ("name", "columns", "remedy"),
    [
        ("review.csv", REVIEW_COLUMNS, "decided about anew"),
        ("splits.csv", SPLIT_COLUMNS, "another split"),
        ("manifest.csv", MANIFEST_COLUMNS, "`fourdvq-client preprocess` makes it again"),
        ("patients.csv", ("patient_id", "pseudonym"), "`fourdvq-client preprocess` writes it"),
    ],
)
def test_a_flipped_bit_is_told_by_file_and_row_with_the_remedy_of_that_file(tmp_path, name, columns, remedy):
    path = tmp_path / name
    write_table(path, columns, [{**dict.fromkeys(columns, "1"), "decision": "auto", "split": "train"}] * 3)
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(b"\n") + 1] ^= 0x80
    path.write_bytes(damaged)
    with pytest.raises(CohortError, match="E_TABLE") as refused:
        read_table(path, columns)
    assert refused.value.where == f"{name} row 2"
    assert remedy in refused.value.fix


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        (",1,reject,breathing; moved,Jörg,,,\n", ",1,rej", "3 fields, the header has 8"),
        (",1,reject", ",l,reject", "column index"),
        (",1,reject", ",,reject", "column index"),
        (",1,reject", ",1,rejecu", "column decision"),
        (",1,reject", ",1,reject,,,,,,,,x", "16 fields, the header has 8"),
    ],
)
def test_a_row_that_cannot_be_meant_is_named_and_not_shown(review, before, after, found):
    text = review.read_text(encoding="utf-8")
    assert before in text
    review.write_text(text.replace(before, after), encoding="utf-8")
    with pytest.raises(CohortError, match="E_TABLE") as refused:
        read_table(review, REVIEW_COLUMNS)
    assert (refused.value.where, refused.value.found) == ("review.csv row 3", found)


def test_a_column_that_is_gone_is_not_to_be_mapped_in_site_yaml(review):
    review.write_text(review.read_text(encoding="utf-8").replace("decision", "decided"), encoding="utf-8")
    with pytest.raises(CohortError, match="E_COLUMN") as refused:
        read_table(review, REVIEW_COLUMNS)
    assert "decision" in refused.value.found
    assert "site.yaml" not in refused.value.wanted + refused.value.fix


# --- in a site -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return prepared_site(tmp_path_factory.mktemp("site") / "s")


@pytest.fixture
def root(site, tmp_path):
    shutil.copytree(site, tmp_path / "site")
    return tmp_path / "site"


@pytest.mark.parametrize("name", ["manifest.csv", "clinical.csv"])
def test_a_damaged_table_that_is_made_from_others_is_made_again(root, name):
    path = root / "prep" / name
    before = path.read_bytes()
    path.write_bytes(before[:-20] + b"\xff" + before[-20:])
    code, found, _ = call(root, "preprocess", "--workers", "1")
    assert (code, found["reused"]) == (0, 18)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["review.csv", "splits.csv"])
@pytest.mark.parametrize("verb", ["preprocess", "check"])
def test_a_damaged_table_that_only_people_can_mend_is_named_by_every_verb_that_needs_it(root, name, verb):
    path = root / "prep" / name
    path.write_bytes(path.read_bytes() + b"\xff\n")
    code, found, _ = call(root, verb)
    assert code == 3
    told = found if verb == "preprocess" else next(c for c in found["checks"] if c["code"] == "E_TABLE")
    assert told["code"] == "E_TABLE"
    assert "backup" in told["fix"]


def test_the_names_of_patients_are_known_also_from_a_table_that_a_spreadsheet_has_saved(root):
    workspace, _ = open_workspace(root)
    before = real_ids(workspace)
    workspace.patients.write_text(resaved(workspace.patients.read_text(), ";"), encoding="utf-8-sig", newline="")
    assert real_ids(workspace) == before
    # The door must know them too, or an id could leave in a report.
    assert set(PATIENTS) <= set(Facts(workspace).identifiers())
    assert call(root, "preprocess", "--workers", "1")[0] == 0


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"a": "\xff"}'])
def test_a_damaged_memory_of_hashes_costs_hashing_again_and_nothing_else(root, content):
    path = root / "state" / "source_hashes.json"
    before = path.read_bytes()
    path.write_bytes(content)
    code, found, _ = call(root, "preprocess", "--workers", "1")
    assert (code, found["reused"]) == (0, 18)
    assert path.read_bytes() == before


def test_hashes_of_a_file_are_added_to_a_memory_that_was_damaged_meanwhile(tmp_path):
    scan, memory = tmp_path / "scan", tmp_path / "hashes.json"
    scan.write_bytes(b"voxels")
    hashes = SourceHashes(memory)
    found = hashes.of(scan)
    memory.write_bytes(b"")
    hashes.save()
    again = SourceHashes(memory)
    assert again.of(scan) == found
    assert again.new == 0
