"""The site's ClientApp on a real prepared folder: a whole small run, repeated rounds, restarts, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from flwr.app import Message
from flwr.clientapp import ClientApp

from fourdvq.federation.codebook import CodebookStats, initial_codebook, merge_codebooks
from fourdvq.models.vqgan import load_codebook, load_generator, tokenizer_sha256
from fourdvq.plan import EvaluationSpec
from fourdvq.tensors import payload_sha256
from fourdvq.training.update import apply
from fourdvq.training.vqgan import initial_model, initial_weights
from fourdvq.wire.messages import (
    TASKS,
    CodebookInitTask,
    CodebookSums,
    ConformalCounts,
    ConformalTask,
    EncodeTask,
    EvalSummary,
    HelloTask,
    OdeTask,
    OdeUpdate,
    PlanAck,
    PlanTask,
    Receipt,
    ReconstructionTask,
    Refusal,
    ReleaseTask,
    Report,
    ReportTask,
    SiteCard,
    TrajectoryTask,
    VqganUpdate,
)
from fourdvq_client.app import make_client_app
from fourdvq_client.audit import read_entries, verify
from fourdvq_client.runtime import open_site
from fourdvq_client.tasks import HANDLERS
from site_cases import (
    PATIENTS,
    Caller,
    codebook,
    codebook_fields,
    ode_weights,
    prepared_site,
    tiny_plan,
    tiny_task,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def caller(tmp_path):
    plan = dataclasses.replace(tiny_plan(), evaluation=EvaluationSpec(conformal=True))
    made = Caller(prepared_site(tmp_path / "site"), plan)
    made.introduce()
    return made


def after(weights, state, update):
    stats = CodebookStats(torch.from_numpy(update.code_counts), torch.from_numpy(update.code_sums))
    return apply(weights, update.delta), merge_codebooks(state, [stats], decay=0.37)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_a_whole_run_is_answered_and_logged(caller):
    plan, root = caller.plan, caller.root
    card = caller.ask(HelloTask())
    assert isinstance(card, SiteCard)
    assert (card.patients, card.scans, card.ode, card.role) == (6, 18, True, "train")
    weights = initial_weights(plan)
    sums = caller.ask(CodebookInitTask(seed=plan.seed, n_codes=8, code_dim=2, weights=weights))
    assert isinstance(sums, CodebookSums)
    stats = CodebookStats(torch.from_numpy(sums.counts), torch.from_numpy(sums.sums))
    state = initial_codebook([stats], n_codes=8, seed=plan.seed)
    for number in range(2):
        update = caller.ask(tiny_task(plan, weights, state, number))
        assert isinstance(update, VqganUpdate)
        assert ("loss_discriminator" in update.losses) == (number == 1)
        weights, state = after(weights, state, update)
    model = initial_model(plan)
    load_generator(model, weights)
    load_codebook(model, state)
    tokenizer = tokenizer_sha256(model)
    identity = payload_sha256({**weights, "codebook.codes": state.codes})
    test = ReconstructionTask(split="test", model_sha256=identity, weights=weights, **codebook_fields(state))
    scores = caller.ask(test)
    assert isinstance(scores, EvalSummary)
    assert "reconstruction/reconstruction/psnr/lung" in scores.rows
    encoded = caller.ask(EncodeTask(tokenizer_sha256=tokenizer, weights=weights, **codebook_fields(state)))
    assert encoded == Receipt(sha256=tokenizer, scans=18, code_usage=encoded.code_usage)
    ode = ode_weights(plan)
    update = caller.ask(OdeTask(steps=16, tokenizer_sha256=tokenizer, weights=ode))
    assert isinstance(update, OdeUpdate)
    ode = apply(ode, update.delta)
    trajectory = {"model_sha256": payload_sha256(ode), "tokenizer_sha256": tokenizer, "weights": ode}
    scores = caller.ask(TrajectoryTask(split="test", mode="extrapolation", **trajectory))
    assert isinstance(scores, EvalSummary)
    assert {row.split("/")[0] for row in scores.rows} >= {"model", "persistence", "ceiling", "cohort"}
    errors = caller.ask(ConformalTask(split="test", **trajectory))
    assert isinstance(errors, ConformalCounts)
    scored = next(int(n) for row, n in zip(scores.rows, scores.n, strict=True) if row == "cohort/extrapolation/pairs")
    assert errors.counts.sum(axis=(1, 2)).tolist() == [scored] * 3
    assert caller.ask(ReportTask()) == Report(report_json="{}")
    release(caller, weights, state, ode, tokenizer)
    head = verify(root / "audit.jsonl", (root / "state" / "fingerprint").read_text())
    assert head.first_bad is None
    assert sum(e["action"] == "release" for e in read_entries(root / "audit.jsonl")) == caller.number


def release(caller, weights, state, ode, tokenizer):
    named = {f"vqgan.{n}": t for n, t in weights.items()} | {f"ode.{n}": t for n, t in ode.items()}
    named |= {f"codebook.{n}": getattr(state, n) for n in ("codes", "counts", "sums")}
    card = {
        "version": "r1", "run": "run-1", "plan_sha256": caller.plan.hash, "tokenizer_sha256": tokenizer,
        "weights_sha256": payload_sha256(named),
    }  # fmt: skip
    receipt = caller.ask(ReleaseTask(card_json=json.dumps(card), weights=named))
    assert receipt == Receipt(sha256=payload_sha256(named))
    lying = {**card, "weights_sha256": "0" * 64, "version": "r2"}
    assert caller.ask(ReleaseTask(card_json=json.dumps(lying), weights=named)) == Refusal(code="MODEL_REJECTED")
    escaping = {**card, "version": "../../keys"}
    assert caller.ask(ReleaseTask(card_json=json.dumps(escaping), weights=named)) == Refusal(code="MODEL_REJECTED")


def test_no_patient_id_or_pseudonym_or_path_is_in_anything_that_left(tmp_path, monkeypatch):
    sent = []
    from fourdvq_client import guard

    original = guard.pack
    monkeypatch.setattr(guard, "pack", lambda *a: sent.append(original(*a)) or sent[-1])  # listens, changes nothing
    caller = Caller(prepared_site(tmp_path / "site"), tiny_plan())
    caller.introduce()
    caller.ask(HelloTask())
    caller.ask(tiny_task(caller.plan, initial_weights(caller.plan), codebook()))
    known = [*PATIENTS, str(tmp_path), *(line.split(",")[1] for line in names(caller.root))]
    assert len(sent) == 3
    for records in sent:
        text = "".join(str(v) for r in records.config_records.values() for v in r.values())
        text += "".join(a.data.decode("latin1") for r in records.array_records.values() for a in r.values())
        assert not [word for word in known if word in text]


def names(root):
    return (root / "private" / "patients.csv").read_text().splitlines()[1:]


@pytest.mark.parametrize("restart", [False, True], ids=["warm", "restarted"])
def test_a_repeated_round_gives_the_same_bits_and_the_run_goes_on_as_if_it_never_was(tmp_path, restart):
    def run(root, *, repeat):
        caller = Caller(prepared_site(root), tiny_plan())
        caller.introduce()
        weights, state = initial_weights(caller.plan), codebook()
        for number in range(3):
            task = tiny_task(caller.plan, weights, state, number)
            update = caller.ask(task)
            if repeat and number == 1:
                if restart:
                    caller.site = open_site(root, worker="inline")
                again = caller.ask(task)
                assert same(again.delta, update.delta)
                np.testing.assert_array_equal(again.code_sums, update.code_sums)
            weights, state = after(weights, state, update)
        return weights

    # The sites are copies: the same secret, so the same seeds.
    assert same(run(tmp_path / "a", repeat=False), run(tmp_path / "b", repeat=True))


def test_a_site_that_restarts_between_rounds_trains_bit_for_bit_as_one_that_did_not(tmp_path):
    def run(root, *, restart):
        caller = Caller(prepared_site(root), tiny_plan())
        caller.introduce()
        weights, state, updates = initial_weights(caller.plan), codebook(), []
        for number in range(3):
            if restart and number:
                caller.site = open_site(root, worker="inline")
            update = caller.ask(tiny_task(caller.plan, weights, state, number))
            updates.append(update)
            weights, state = after(weights, state, update)
        return updates

    steady, restarted = run(tmp_path / "a", restart=False), run(tmp_path / "b", restart=True)
    for one, other in zip(steady, restarted, strict=True):
        assert same(one.delta, other.delta)


def test_a_damaged_checkpoint_falls_back_to_the_round_before(caller):
    weights, state = initial_weights(caller.plan), codebook()
    for number in range(2):
        update = caller.ask(tiny_task(caller.plan, weights, state, number))
        weights, state = after(weights, state, update)
    newest = sorted((caller.root / "runs" / "run-1" / "checkpoints" / "vqgan").iterdir())[-1]
    tensors = next(newest.glob("*.safetensors"))
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(bytes(data))
    caller.site = open_site(caller.root, worker="inline")
    assert isinstance(caller.ask(tiny_task(caller.plan, weights, state, 2)), VqganUpdate)


def test_codes_of_another_tokenizer_are_refused(caller):
    weights, state = initial_weights(caller.plan), codebook()
    wrong = EncodeTask(tokenizer_sha256="0" * 64, weights=weights, **codebook_fields(state))
    assert caller.ask(wrong) == Refusal(code="MODEL_REJECTED")
    ode = OdeTask(steps=1, tokenizer_sha256="0" * 64, weights=ode_weights(caller.plan))
    assert caller.ask(ode) == Refusal(code="MODEL_REJECTED")


def test_without_approval_the_site_stays_connected_and_says_no(tmp_path):
    caller = Caller(prepared_site(tmp_path / "site"), tiny_plan())
    profile = (caller.root / "profile.json").read_text()
    ack = caller.ask(PlanTask(plan_json=caller.plan.to_json(), profile_json=profile))
    assert ack == PlanAck(approved=False)
    task = tiny_task(caller.plan, initial_weights(caller.plan), codebook())
    assert caller.ask(task) == Refusal(code="PLAN_NOT_APPROVED")
    caller.introduce()
    assert caller.ask(PlanTask(plan_json=caller.plan.to_json(), profile_json=profile)) == PlanAck(approved=True)
    assert isinstance(caller.ask(task), VqganUpdate)


def test_a_decision_after_the_approval_stops_the_run_until_it_is_approved_again(caller):
    from fourdvq.data.review import reject
    from fourdvq_client import embedded

    task = tiny_task(caller.plan, initial_weights(caller.plan), codebook())
    pseudonym = names(caller.root)[0].split(",")[1]
    reject(caller.root / "prep", [(pseudonym, 2)], reviewer="t", time="2026-01-01T00:00:00", reason="motion")
    assert caller.ask(task) == Refusal(code="COHORT_CHANGED")
    embedded.approve(caller.root, by="Dr Test")
    assert isinstance(caller.ask(task), VqganUpdate)


def test_too_few_patients_for_the_policy_means_that_nothing_of_the_round_leaves(caller):
    policy = caller.root / "policy.yaml"
    policy.write_text(policy.read_text().replace("min_patients_per_round: 3", "min_patients_per_round: 20"))
    task = tiny_task(caller.plan, initial_weights(caller.plan), codebook())
    assert caller.ask(task) == Refusal(code="TOO_FEW_PATIENTS")
    assert read_entries(caller.root / "audit.jsonl")[-1]["decision"] == "refusal TOO_FEW_PATIENTS"


def test_the_models_of_two_sites_do_not_share_their_randomness(tmp_path):
    plan = tiny_plan()
    root = prepared_site(tmp_path / "a")
    seed = open_site(root, worker="inline").seed(plan)
    (root / "private" / "secret").write_bytes(b"x" * 32)
    assert open_site(root, worker="inline").seed(plan) != seed
    assert open_site(root, worker="inline").seed(dataclasses.replace(plan, seed=1)) != seed


def test_the_app_is_a_standard_flower_object_that_knows_every_message_type(caller):
    from flwr.app import Context, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    from fourdvq.wire.flower import pack
    from site_cases import reply_in

    app = make_client_app(caller.site)
    assert isinstance(app, ClientApp)
    assert set(HANDLERS) == set(TASKS.values())
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    task = HelloTask()
    message = Message(pack(caller.envelope(task), task), 7, task.kind)
    context = Context(run_id=1, node_id=7, node_config={}, state=RecordDict(), run_config={})
    assert isinstance(reply_in(app(message, context).content, task.kind)[1], SiteCard)
