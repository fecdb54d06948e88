"""Hashes of a hospital's files are remembered as long as nothing about a file has changed, and no longer."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from client_calls import call
from fourdvq.preprocessing.inputs import SourceHashes
from site_cases import prepared_site

GONE = "f" * 64


def test_a_file_put_in_anothers_place_with_its_size_and_time_is_hashed_again(tmp_path):
    scan = tmp_path / "scan"
    scan.write_bytes(b"voxels")
    hashes = SourceHashes(tmp_path / "hashes.json")
    found, before = hashes.of(scan), scan.stat()
    hashes.save()
    scan.write_bytes(b"VOXELS")
    os.utime(scan, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (scan.stat().st_size, scan.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert SourceHashes(tmp_path / "hashes.json").of(scan) == SourceHashes().of(scan) != found


def test_what_files_hold_is_one_hash_whatever_their_names_order_and_folder(tmp_path):
    places = [tmp_path / name for name in ("a", "b/1", "b/2", "c/1")]
    for place, content in zip(places, (b"x", b"x", b"y", b"x"), strict=True):
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(content)
    a, one, two, alone = places
    of = SourceHashes().of
    assert of(one.parent) == of((two, one)) == of((two, a))
    assert of(a) == of(one) != of(alone.parent)  # a folder is not the file in it


@pytest.mark.parametrize(("words", "kept"), [(("--shard", "1/2"), True), ((), False)])
def test_only_a_run_over_the_whole_cohort_forgets_files_that_are_gone(tmp_path: Path, words, kept):
    root = prepared_site(tmp_path / "site")
    memory = root / "state" / "source_hashes.json"
    known = json.loads(memory.read_bytes())
    memory.write_text(json.dumps(known | {GONE: GONE}))
    assert call(root, "preprocess", *words)[0] == 0
    assert json.loads(memory.read_bytes()) == known | ({GONE: GONE} if kept else {})
