"""Laws of the door out: nothing undeclared leaves, every release and refusal has its line, small groups stay small."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fourdvq.errors import CODES, WIRE_CODES, DataError, FourdvqError, Refused
from fourdvq.tensors import payload_sha256
from fourdvq.training.update import global_norm, relative_norm
from fourdvq.wire.body import body_sha256
from fourdvq.wire.flower import pack, wire_bytes
from fourdvq.wire.messages import (
    CodebookInitTask,
    CodebookSums,
    EncodeTask,
    EvalSummary,
    HelloTask,
    OdeTask,
    OdeUpdate,
    PlanAck,
    Receipt,
    ReconstructionTask,
    Refusal,
    Report,
    ReportTask,
    SiteCard,
    VqganUpdate,
)
from fourdvq_client.audit import verify
from fourdvq_client.egress import (
    EVAL_ROWS,
    Context,
    Outcome,
    allowed_row,
    clear,
    find_identifier,
    round_significant,
    round_up,
)
from fourdvq_client.guard import NO_ENVELOPE, error_code
from fourdvq_client.policy import parse_policy
from site_cases import IDS, SMALL, Door, envelope_of, policy_text, reply_in, small_weights, vqgan_task, vqgan_update

K, C = SMALL.model.n_codes, SMALL.model.code_dim
METRICS = policy_text().split("metrics: [")[1].split("]")[0].replace("\n", "").replace(" ", "")
many = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
words = st.text(string.ascii_letters + string.digits + "-_./ ^", min_size=1, max_size=30)
numbers = st.floats(allow_nan=True, allow_infinity=True, width=64)


@pytest.fixture
def door(tmp_path):
    return Door(tmp_path)


def through(door, reply, task, *, patients=50, scans=50, code_patients=None, number=1):
    """Send a reply through the door: (envelope, reply) as the coordinator reads it; raises what the door raises."""
    outcome = Outcome(reply, patients, scans, code_patients)
    records = door.guard.release(outcome, envelope_of(task, number), task.kind, task)
    return reply_in(records, task.kind)


def cleared(update, code_patients, **policy):
    """An update after the rules of the door, without log and packing."""
    context = Context(vqgan_task(), SMALL, parse_policy(policy_text(**policy)), lambda: IDS)
    return clear(Outcome(update, 50, 8, code_patients), context).reply


def card(**changes):
    fields = {
        "role": "train", "version": "1.0.0", "code": "", "profile": "", "device": "cpu", "ode": True,
        "patients": 23, "scans": 61, "train_scans": 42, "refused": {"E_GAP": 7, "E_HU": 3},
    }  # fmt: skip
    return SiteCard(**{**fields, **changes})


def reconstruction_task():
    task = vqgan_task()
    return ReconstructionTask(
        split="test", model_sha256="", weights=task.weights, codes=task.codes, code_counts=task.code_counts,
        code_sums=task.code_sums,
    )  # fmt: skip


def summary(rows, n, total, total_sq, patients=50):
    return EvalSummary(tuple(rows), np.array(n), np.array(total, float), np.array(total_sq, float), patients)


# --- what is not declared cannot leave ---------------------------------------------------------------------------


@many
@given(key=words, value=numbers, good=st.floats(-10, 10))
def test_only_listed_metrics_leave_and_only_finite_ones(door, key, value, good):
    weights = {"w": torch.ones(4)}
    task = OdeTask(steps=1, tokenizer_sha256="", weights=weights)
    update = OdeUpdate(delta={"w": torch.full((4,), 0.1)}, patients=50, losses={"recon": good, key: value})
    try:
        _, sent = through(door, update, task)
    except FourdvqError:
        assert key in METRICS.split(",")
        assert not math.isfinite(value)
        return
    assert isinstance(sent, OdeUpdate)
    assert set(sent.losses) <= set(METRICS.split(","))
    assert all(v == round_significant(v, 4) for v in sent.losses.values())


@many
@given(rows=st.lists(st.tuples(words, st.integers(0, 400), numbers), min_size=1, max_size=8, unique_by=lambda r: r[0]))
def test_only_rows_of_the_evaluation_leave_a_summary(door, rows):
    names = [name for name, _, _ in rows]
    reply = summary(names, [n for _, n, _ in rows], [v for *_, v in rows], [v for *_, v in rows])
    try:
        _, sent = through(door, reply, reconstruction_task())
    except FourdvqError:
        return
    for name in sent.rows:
        assert name.split("/")[0] in EVAL_ROWS
        assert name.split("/")[2] in METRICS.split(",")


@many
@given(reason=words, count=st.integers(-5, 5000), patients=st.integers(0, 5000))
def test_a_site_card_holds_codes_and_rounded_counts_only(door, reason, count, patients):
    door.facts.text = policy_text(min_cell="5")
    try:
        _, sent = through(door, card(patients=patients, refused={reason: count, "E_GAP": 7}), HelloTask())
    except FourdvqError:
        assert reason not in CODES or count < 0
        return
    assert set(sent.refused) <= set(CODES)
    counts = (sent.patients, sent.scans, sent.train_scans, *sent.refused.values())
    assert all(c % 5 == 0 for c in counts)
    assert sent.patients >= patients
    assert all(n >= 5 for n in sent.refused.values())


@many
@given(text=words, patient=st.sampled_from(IDS), where=st.sampled_from(["key", "value", "inside"]))
def test_no_patient_leaves_in_a_report(door, text, patient, where):
    report = {"key": {patient: 1}, "value": {"case": patient}, "inside": {"t": f"{text} {patient} {text}"}}[where]
    with pytest.raises(Refused) as caught:
        through(door, Report(report_json=json.dumps(report)), ReportTask())
    assert caught.value.code == "E_IDENTIFIER"


@pytest.mark.parametrize(
    ("report", "found"),
    [
        ({"x": "/data/ct/scan.nii"}, "a path"),
        ({"x": "see C:\\data\\ct"}, "a path"),
        ({"/home/ann/x": 1}, "a path"),
        ({"x": "2015-03-02"}, "a date"),
        ({"x": "taken 20150302"}, "a date"),
        ({"a": [{"b": "2.3.2015", "c": "2015/03/02"}]}, "a date"),
        ({"x": "ratio 0.5 of 1/2, page 2015 of 10"}, ""),
        ({"sha256": "a20150302" + "0" * 55}, ""),
    ],
)
def test_paths_and_dates_are_identifiers_and_hashes_are_not(report, found):
    assert find_identifier(json.dumps(report), IDS) == found


@dataclasses.dataclass(frozen=True)
class CardWithMore(SiteCard):
    note: str = "LEU-004217"


@dataclasses.dataclass(frozen=True)
class AckWithMore(PlanAck):
    note: str = "LEU-004217"


@pytest.mark.parametrize(
    ("reply", "task"),
    [
        (CardWithMore(**vars(card())), HelloTask()),
        (AckWithMore(approved=True), HelloTask()),
        (PlanAck(approved=True), HelloTask()),
        (card(), vqgan_task()),
        (card(role="external"), HelloTask()),
        (card(refused={"LEU-004217": 9}), HelloTask()),
        (vqgan_update(), HelloTask()),
        (OdeUpdate(delta={}, patients=50, losses={}), vqgan_task()),
        ("LEU-004217", HelloTask()),
        ({"note": "LEU-004217"}, HelloTask()),
    ],
)
def test_a_reply_of_any_other_type_is_refused(door, reply, task):
    with pytest.raises(FourdvqError):
        through(door, reply, task, code_patients=np.full(K, 50), scans=8)
    assert door.lines[-1]["action"] == "refuse"
    assert "LEU-004217" not in door.audit.path.read_text()


def broken(change):
    delta = {n: t.clone() for n, t in vqgan_update().delta.items()}
    change(delta, next(iter(delta)))
    return delta


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"delta": broken(lambda d, n: d.update(hidden=torch.zeros(9)))}, "EGRESS_REFUSED"),
        ({"delta": broken(lambda d, n: d.pop(n))}, "EGRESS_REFUSED"),
        ({"delta": broken(lambda d, n: d.update({n: d[n].double()}))}, "EGRESS_REFUSED"),
        ({"delta": broken(lambda d, n: d.update({n: d[n][:1]}))}, "EGRESS_REFUSED"),
        ({"delta": broken(lambda d, n: d[n].view(-1)[:1].fill_(torch.nan))}, "NONFINITE"),
        ({"code_counts": np.ones(K + 1)}, "EGRESS_REFUSED"),
        ({"code_counts": np.full(K, -1.0)}, "EGRESS_REFUSED"),
        ({"code_counts": np.full(K, np.inf)}, "NONFINITE"),
        ({"code_sums": np.ones((K, C, 1))}, "EGRESS_REFUSED"),
        ({"code_counts": np.ones(K, np.float32)}, "EGRESS_REFUSED"),
        ({"scans": 9}, "EGRESS_REFUSED"),  # another number than was counted
        ({"losses": {"loss_rec": math.nan}}, "EGRESS_REFUSED"),
    ],
)
def test_an_update_that_is_not_the_tasks_is_refused(door, changes, code):
    with pytest.raises(FourdvqError) as caught:
        through(door, vqgan_update(**changes), vqgan_task(), scans=8, code_patients=np.full(K, 50))
    assert error_code(caught.value) == code


# --- small groups ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patients", [0, 1, 5, 19, 20, 21])
def test_no_update_of_fewer_than_the_minimum_of_patients_leaves(door, patients):
    door.facts.text = policy_text(min_patients_per_round="20")
    args = {"scans": 8, "code_patients": np.full(K, 50)}
    if patients >= 20:
        assert isinstance(through(door, vqgan_update(), vqgan_task(), patients=patients, **args)[1], VqganUpdate)
        return
    with pytest.raises(Refused, match="TOO_FEW_PATIENTS"):
        through(door, vqgan_update(), vqgan_task(), patients=patients, **args)
    assert str(patients) not in (door.lines[-1]["rule"], door.lines[-1]["decision"])


@many
@given(seen=st.lists(st.integers(0, 12), min_size=K, max_size=K), least=st.integers(1, 8))
def test_a_code_of_too_few_patients_leaves_as_zeros_and_others_unchanged(seen, least):
    update, patients = vqgan_update(), np.array(seen)
    sent = cleared(update, patients, codebook_min_patients=str(least))
    hidden = patients < least
    assert not sent.code_counts[hidden].any()
    assert not sent.code_sums[hidden].any()
    np.testing.assert_array_equal(sent.code_counts[~hidden], update.code_counts[~hidden])
    np.testing.assert_array_equal(sent.code_sums[~hidden], update.code_sums[~hidden])


def test_codebook_sums_without_a_count_of_patients_stay(door):
    task = CodebookInitTask(seed=0, n_codes=K, code_dim=C, weights=small_weights())
    sums = CodebookSums(counts=np.ones(K), sums=np.ones((K, C)))
    with pytest.raises(Refused, match="codebook_min_patients"):
        through(door, sums, task)
    assert isinstance(through(door, sums, task, code_patients=np.full(K, 9))[1], CodebookSums)


@many
@given(n=st.integers(1, 300), mean=st.floats(-50, 50), spread=st.floats(0.01, 20), cell=st.sampled_from([1, 5, 10]))
def test_a_summary_keeps_mean_and_spread_to_its_digits_and_withholds_small_cells(door, n, mean, spread, cell):
    door.facts.text = policy_text(min_cell=str(cell))
    total, total_sq = n * mean, n * (mean**2 + spread**2)
    reply = summary(["model/extrapolation/psnr/lung"], [n], [total], [total_sq])
    _, sent = through(door, reply, reconstruction_task())
    if n < cell:
        assert sent.rows == ()
        return
    assert sent.n[0] % cell == 0
    sent_mean = sent.total[0] / sent.n[0]
    sent_spread = math.sqrt(max(0.0, sent.total_sq[0] / sent.n[0] - sent_mean**2))
    assert sent_mean == pytest.approx(mean, rel=6e-4)
    assert sent_spread == pytest.approx(spread, rel=6e-4, abs=2e-6 * abs(mean) + 1e-9)


def test_a_summary_over_too_few_patients_stays(door):
    door.facts.text = policy_text(min_patients_per_summary="10")
    reply = summary(["model/extrapolation/mse/lung"], [9], [1.0], [1.0], patients=9)
    with pytest.raises(Refused, match="TOO_FEW_PATIENTS"):
        through(door, reply, reconstruction_task(), patients=9)


# --- clipping, precision, binding --------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(scale=st.floats(1e-4, 1e4), limit=st.sampled_from([0.01, 1.0, 10.0]))
def test_an_update_is_clipped_to_its_share_of_the_weights_in_its_own_direction(scale, limit):
    update = vqgan_update()
    delta = {n: scale * t for n, t in update.delta.items()}
    sent = cleared(dataclasses.replace(update, delta=delta), np.full(K, 50), max_rel_update=str(limit))
    assert relative_norm(sent.delta, small_weights()) <= limit * (1 + 1e-5)
    inner = sum(float((sent.delta[n].double() * delta[n].double()).sum()) for n in delta)
    assert inner == pytest.approx(global_norm(sent.delta) * global_norm(delta), rel=1e-5)
    if relative_norm(delta, small_weights()) <= limit:
        assert all(torch.equal(sent.delta[n], delta[n]) for n in delta)


@pytest.mark.parametrize(
    ("allowed", "asked", "sent"),
    [
        ("float32", "float32", torch.float32),
        ("bfloat16", "float32", torch.bfloat16),
        ("float32", "bfloat16", torch.bfloat16),
        ("float16", "bfloat16", torch.bfloat16),
        ("float16", "float32", torch.float16),
    ],
)
def test_the_coarser_of_policy_and_plan_has_the_last_word_on_precision(door, allowed, asked, sent):
    plan = dataclasses.replace(SMALL, federation=dataclasses.replace(SMALL.federation, wire_dtype=asked))
    door.facts.text = policy_text(wire_dtype=allowed)
    door.facts.plans = {SMALL.hash: plan}
    _, reply = through(door, vqgan_update(), vqgan_task(), scans=8, code_patients=np.full(K, 50))
    assert {t.dtype for t in reply.delta.values()} == {sent}


def test_low_bits_of_an_update_do_not_survive_a_16_bit_wire(door):
    """The hidden-scan attack: 2 bits in the mantissa of each weight; after the door they agree by chance only."""
    door.facts.text = policy_text(wire_dtype="bfloat16")
    secret = torch.Generator().manual_seed(5)
    update, hidden = vqgan_update(), {}
    for name, tensor in update.delta.items():
        bits = torch.randint(0, 4, tensor.shape, generator=secret, dtype=torch.int32)
        hidden[name] = bits
        update.delta[name] = ((tensor.view(torch.int32) & ~3) | bits).view(torch.float32)
    _, sent = through(door, update, vqgan_task(), scans=8, code_patients=np.full(K, 50))

    def agreement(delta):
        same = sum(int(((delta[n].float().view(torch.int32) & 3) == hidden[n]).sum()) for n in hidden)
        return same / sum(t.numel() for t in hidden.values())

    assert agreement(update.delta) == 1.0
    assert agreement(sent.delta) == pytest.approx(0.25, abs=0.01)


def test_a_reply_is_bound_to_its_task_its_site_and_its_bytes(door):
    task = vqgan_task()
    envelope, sent = through(door, vqgan_update(), task, scans=8, code_patients=np.full(K, 50), number=7)
    assert (envelope.site, envelope.run, envelope.round) == ("leuven", "run-1", 7)
    assert envelope.parent == payload_sha256(task.weights)
    assert envelope.payload_sha256 == body_sha256(sent)
    line = door.lines[-1]
    assert (line["payload_sha256"], line["prev_hash"]) == (envelope.payload_sha256, envelope.audit_head)


@pytest.mark.parametrize("sha256", ["", "a" * 64])
def test_a_receipt_can_only_repeat_a_hash_that_came_down(door, sha256):
    t = vqgan_task()
    task = EncodeTask(
        tokenizer_sha256="b" * 64, weights=t.weights, codes=t.codes, code_counts=t.code_counts, code_sums=t.code_sums
    )
    with pytest.raises(Refused, match="receipt"):
        through(door, Receipt(sha256=sha256, scans=40, code_usage=3), task)
    with pytest.raises(Refused, match="receipt"):
        through(door, Receipt(sha256="b" * 64, scans=40, code_usage=K + 1), task)
    assert through(door, Receipt(sha256="b" * 64, scans=40, code_usage=K), task)[1].code_usage == K


# --- errors and the log ------------------------------------------------------------------------------------------

CANARIES = (*IDS, "/data/ct/LEU-004217/1.2.840.113619.2.55", "1948-03-02", "ACC0042177")
FAULTS = (
    lambda text: RuntimeError(text),
    lambda text: FileNotFoundError(2, "No such file", text),
    lambda text: KeyError(text),
    lambda text: DataError("E_CORRUPT", where=text, found=text, fix=text),
    lambda text: MemoryError(text),
    lambda text: OSError(28, "No space left", text),
    lambda text: UnicodeDecodeError("utf-8", text.encode(), 0, 1, text),
    lambda text: type(text.replace("/", "_"), (Exception,), {})(text),
)


@pytest.mark.parametrize("canary", CANARIES)
@pytest.mark.parametrize("fault", FAULTS)
def test_of_an_error_only_its_code_leaves_in_any_encoding(door, canary, fault):
    import base64

    records = door.guard.refusal(fault(canary), envelope_of(HelloTask()), "query.hello")
    sent = "".join(str(v) for r in records.config_records.values() for v in r.values())
    sent += "".join(a.data.decode("latin1") for r in records.array_records.values() for a in r.values())
    for form in (canary, canary.encode().hex(), base64.b64encode(canary.encode()).decode()):
        assert form not in sent
        assert form not in door.audit.path.read_text()
    _, reply = reply_in(records, "query.hello")
    assert isinstance(reply, Refusal)
    assert reply.code in WIRE_CODES


def test_a_stock_exception_reply_would_have_carried_the_canary():
    """The negative control: what Flower itself answers for an exception in a ClientApp."""
    error = FileNotFoundError(2, "No such file", CANARIES[2])
    assert CANARIES[2] in f"{type(error)}:<'{error}'>"


@many
@given(code=st.sampled_from(sorted(CODES)))
def test_every_code_of_ours_leaves_as_one_of_the_wire_codes(door, code):
    records = door.guard.refusal(FourdvqError(code, where="LEU-004217"), envelope_of(HelloTask()), "query.hello")
    assert reply_in(records, "query.hello")[1].code in WIRE_CODES


def test_a_task_that_could_not_be_read_is_answered_with_a_well_formed_refusal(door):
    envelope, reply = reply_in(door.guard.refusal(ValueError("x"), NO_ENVELOPE, "query.hello"), "query.hello")
    assert (envelope.run, reply.code) == ("unknown", "INTERNAL")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    acts=st.lists(st.sampled_from(["accept", "refuse in", "release", "refuse out", "code"]), min_size=1, max_size=12)
)
def test_every_release_and_every_refusal_has_its_line(tmp_path_factory, acts):
    door = Door(tmp_path_factory.mktemp("door"))
    expected = []
    for act in acts:
        if act == "accept":
            door.guard.accept("query.hello", pack(envelope_of(HelloTask()), HelloTask()))
            expected.append("accept")
        elif act == "refuse in":
            with pytest.raises(FourdvqError):
                door.guard.accept("query.hello", pack(envelope_of(HelloTask(), protocol=99), HelloTask()))
            expected.append("refuse")
        elif act == "release":
            through(door, card(), HelloTask())
            expected.append("release")
        elif act == "refuse out":
            with pytest.raises(FourdvqError):
                through(door, PlanAck(approved=True), HelloTask())
            expected.append("refuse")
        else:
            door.guard.refusal(ValueError(), envelope_of(HelloTask()), "query.hello")
            expected.append("release")
    assert [line["action"] for line in door.lines] == expected
    assert verify(door.audit.path, "key").first_bad is None


def test_if_the_line_cannot_be_written_nothing_is_sent(door):
    door.audit.path.unlink(missing_ok=True)
    door.audit.path.mkdir()
    with pytest.raises(Refused, match="E_AUDIT_LOG"):
        through(door, card(), HelloTask())
    with pytest.raises(Refused, match="E_AUDIT_LOG"):
        door.guard.refusal(ValueError(), envelope_of(HelloTask()), "query.hello")


def test_a_line_that_another_process_slipped_in_stops_the_reply_that_names_the_old_head(door):
    from fourdvq_client.audit import AuditLog, Entry

    other = AuditLog(door.audit.path, "key")
    through(door, card(), HelloTask())
    other.append(Entry("approve"))
    with pytest.raises(Refused, match="E_AUDIT_LOG"):
        through(door, card(), HelloTask())
    assert isinstance(through(door, card(), HelloTask())[1], SiteCard)  # the next reply knows the new head


def test_a_reply_above_its_size_is_refused(door):
    door.facts.text = policy_text().replace("max_bytes_factor: 1.1", "max_bytes_factor: 1.0")
    task, update = vqgan_task(), vqgan_update()
    records = door.guard.release(Outcome(update, 50, 8, np.full(K, 50)), envelope_of(task), task.kind, task)
    assert wire_bytes(records) < 1.3 * sum(4 * t.numel() for t in update.delta.values()) + 65_536


def test_rounding_helpers_do_what_they_say():
    assert [round_up(n, 5) for n in (0, 1, 5, 6)] == [0, 5, 5, 10]
    assert round_significant(123456.0, 4) == 123500.0
    assert allowed_row("model/extrapolation/skill/lung/1-2", ("skill",))
    assert allowed_row("cohort/interpolation/pairs", ("pairs",))
    for row in ("model/extrapolation/skill/LEU-004217", "leu-004217/extrapolation/skill/lung", "model/skill"):
        assert not allowed_row(row, ("skill",))


def test_the_wire_is_packed_in_one_place_of_the_client_only():
    client = Path(__file__).resolve().parents[2] / "client" / "fourdvq_client"
    users = []
    for path in client.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "fourdvq.wire.flower":
                users += [path.name for alias in node.names if alias.name == "pack"]
            if isinstance(node, ast.ImportFrom) and node.module == "flwr.app":
                assert not {"ArrayRecord", "ConfigRecord", "MetricRecord", "Array"} & {a.name for a in node.names}
    assert users == ["guard.py"]
