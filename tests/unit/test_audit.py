"""The audit log: what was done to it shows."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime

import pytest

from fourdvq.errors import Refused
from fourdvq_client.audit import AuditLog, Entry, bucket, first_hash, read_entries, verify


def clock():
    return datetime(2026, 1, 1, tzinfo=UTC)


def log(tmp_path, lines=6):
    audit = AuditLog(tmp_path / "audit.jsonl", "key", clock=clock)
    heads = [audit.append(Entry("release", kind="train.vqgan", run="r", round=k)) for k in range(lines)]
    return audit.path, heads


def rewrite(path, change):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(change(lines)))


def test_an_untouched_log_verifies_and_each_line_points_to_the_one_before(tmp_path):
    path, heads = log(tmp_path)
    verdict = verify(path, "key", head=heads[2])
    assert (verdict.first_bad, verdict.lines, verdict.head) == (None, 6, heads[-1])
    previous = [e["prev_hash"] for e in read_entries(path)]
    assert previous == [first_hash("key"), *heads[:-1]]


@pytest.mark.parametrize("at", range(6))
def test_an_edited_line_is_found_where_it_is(tmp_path, at):
    path, _ = log(tmp_path)

    def edit(lines):
        line = json.loads(lines[at])
        line["round"] += 1
        return [*lines[:at], json.dumps(line, sort_keys=True, separators=(",", ":")) + "\n", *lines[at + 1 :]]

    rewrite(path, edit)
    assert verify(path, "key").first_bad == at


def test_an_edited_line_with_a_fitting_hash_breaks_the_line_after_it(tmp_path):
    import hashlib

    path, _ = log(tmp_path)

    def forge(lines):
        line = json.loads(lines[2])
        line.pop("hash")
        line["round"] = 99
        text = json.dumps(line, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        line["hash"] = hashlib.sha256(text.encode()).hexdigest()
        return [*lines[:2], json.dumps(line, sort_keys=True, separators=(",", ":")) + "\n", *lines[3:]]

    rewrite(path, forge)
    assert verify(path, "key").first_bad == 3


@pytest.mark.parametrize("at", range(5))
def test_a_deleted_line_is_found(tmp_path, at):
    path, _ = log(tmp_path)
    rewrite(path, lambda lines: [*lines[:at], *lines[at + 1 :]])
    assert verify(path, "key").first_bad == at


def test_reordered_lines_are_found(tmp_path):
    path, _ = log(tmp_path)
    rewrite(path, lambda lines: [lines[1], lines[0], *lines[2:]])
    assert verify(path, "key").first_bad == 0


@pytest.mark.parametrize("kept", range(6))
def test_lines_cut_off_the_end_are_found_by_the_head_that_the_coordinator_keeps(tmp_path, kept):
    path, heads = log(tmp_path)
    rewrite(path, lambda lines: lines[:kept])
    assert verify(path, "key").first_bad is None  # the chain alone cannot know
    assert verify(path, "key", head=heads[-1]).first_bad == kept


def test_another_sites_log_does_not_verify(tmp_path):
    path, _ = log(tmp_path)
    assert verify(path, "another key").first_bad == 0


def test_a_torn_last_line_is_dropped_and_noted(tmp_path):
    path, heads = log(tmp_path)
    with path.open("a") as stream:
        stream.write('{"seq": 6, "half a li')
    audit = AuditLog(path, "key", clock=clock)
    entries = read_entries(path)
    assert entries[-1]["action"] == "start"
    assert entries[-1]["prev_hash"] == heads[-1]
    assert verify(path, "key").first_bad is None
    assert audit.head == entries[-1]["hash"]


def test_a_broken_log_is_not_continued(tmp_path):
    path, _ = log(tmp_path)
    rewrite(path, lambda lines: lines[1:])
    with pytest.raises(Refused) as caught:
        AuditLog(path, "key")
    assert caught.value.code == "E_AUDIT_LOG"
    assert caught.value.exit_code == 5


def test_lines_cut_off_while_the_client_runs_stop_it(tmp_path):
    path, _ = log(tmp_path)
    audit = AuditLog(path, "key")
    rewrite(path, lambda lines: lines[:3])
    with pytest.raises(Refused, match="cut off"):
        audit.append(Entry("release"))


def test_a_log_that_cannot_be_written_is_an_error_not_a_silence(tmp_path):
    audit = AuditLog(tmp_path / "audit.jsonl", "key")
    (tmp_path / "audit.jsonl").mkdir()
    with pytest.raises(Refused, match="E_AUDIT_LOG"):
        audit.append(Entry("release"))


def test_two_writers_share_one_chain(tmp_path):
    path = tmp_path / "audit.jsonl"
    logs = [AuditLog(path, "key"), AuditLog(path, "key")]

    def write(audit):
        for k in range(20):
            audit.append(Entry("approve", round=k))

    threads = [threading.Thread(target=write, args=(audit,)) for audit in logs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verify(path, "key").lines == 40
    assert verify(path, "key").first_bad is None


def test_an_append_after_a_stale_head_is_refused(tmp_path):
    audit, other = (AuditLog(tmp_path / "audit.jsonl", "key") for _ in range(2))
    head = audit.head
    other.append(Entry("approve"))
    with pytest.raises(Refused, match="E_AUDIT_LOG"):
        audit.append(Entry("release"), after=head)
    assert verify(audit.path, "key").lines == 1


def test_counts_are_written_as_buckets():
    assert [bucket(n, 5) for n in (0, 1, 4, 5, 9, 10, 123)] == ["0", "<5", "<5", "5+", "5+", "10+", "120+"]
