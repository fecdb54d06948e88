"""What the site does for each kind of task. A handler gets a task that the guard accepted and gives an `Outcome`.

A new kind is one function and one line in `HANDLERS`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

from fourdvq import __version__
from fourdvq.data.datasets import open_prepared
from fourdvq.data.prepared import MANIFEST_COLUMNS, read_table
from fourdvq.errors import CODES, CohortError, Refused
from fourdvq.plan import Plan
from fourdvq.wire.messages import (
    COX_TASKS,
    CodebookInitTask,
    ConformalTask,
    CoxFutureTask,
    CoxKeysTask,
    CoxPeersTask,
    CoxTask,
    EncodeTask,
    HelloTask,
    OdeTask,
    PlanAck,
    PlanTask,
    Receipt,
    ReconstructionTask,
    ReleaseTask,
    Report,
    ReportTask,
    SiteCard,
    Task,
    TaskEnvelope,
    TrajectoryTask,
    VqganTask,
)
from fourdvq_client.egress import Outcome
from fourdvq_client.ingress import read_plan
from fourdvq_client.released import store_release
from fourdvq_client.runtime import Site, store_plan
from fourdvq_client.worker import Job
from fourdvq_client.workspace import read_profile

OUTBOX_FILE = "report.json"


def handle(task: Task, envelope: TaskEnvelope, site: Site) -> Outcome:
    """Do the task. Raises Refused TASK_REFUSED for a kind without a handler, and what its handler raises."""
    handler = HANDLERS.get(type(task))
    if handler is None:
        raise Refused("TASK_REFUSED", where=type(task).kind, found="no handler", wanted="a kind of this version")
    return handler(task, envelope, site)


def hello(_task: Task, _envelope: TaskEnvelope, site: Site) -> Outcome:
    """Who answers: role, versions and counts. A site without prepared scans answers too, with counts of 0."""
    workspace = site.workspace
    policy = site.facts.policy().rules
    try:
        cohort = open_prepared(workspace.prep)
        patients, profile = cohort.patients, cohort.profile_sha256
    except CohortError:
        patients, profile = (), ""
    if not profile and workspace.profile_json.is_file():
        profile = read_profile(workspace).sha256
    # Only patients whose scans may train count for a training site; an external site has test patients alone.
    counted = [p for p in patients if policy.role == "external" or p.split == "train"]
    card = SiteCard(
        role=policy.role,
        version=__version__,
        code=next(one.sha256 for one in site.facts.installed() if one.package == "fourdvq"),
        profile=profile,
        device="cuda" if site.config.device.startswith("cuda") else "cpu",
        ode=any(len(p.scans) > 1 for p in counted),
        patients=len(patients),
        scans=sum(len(p.scans) for p in patients),
        train_scans=sum(len(p.scans) for p in patients if p.split == "train"),
        refused=_refused_scans(site),
    )
    return Outcome(card, card.patients, card.scans)


def plan(task: PlanTask, envelope: TaskEnvelope, site: Site) -> Outcome:
    """Keep the plan for a person to read, and say whether one has approved it on the present cohort."""
    found, profile = read_plan(task, envelope)
    store_plan(site.workspace, found, profile)
    approval = site.facts.policy().rules.approval(found.hash)
    try:
        approved = approval is not None and site.facts.cohort() == (approval.cohort, found.profile_sha256)
    except CohortError:
        approved = False
    return Outcome(PlanAck(approved=approved))


def survival(task: CoxTask, envelope: TaskEnvelope, site: Site) -> Outcome:
    """One step of a survival analysis: sums over the site's patients, under the `cox` rules of its policy."""
    return site.cox.answer(task, envelope, _plan_of(task, envelope, site), site.facts.policy().rules)


def report(_task: Task, _envelope: TaskEnvelope, site: Site) -> Outcome:
    """What a person submitted; an empty object if nothing lies in the outbox."""
    path = site.workspace.outbox / OUTBOX_FILE
    return Outcome(Report(report_json=path.read_text(encoding="utf-8") if path.is_file() else "{}"))


def release(task: ReleaseTask, _envelope: TaskEnvelope, site: Site) -> Outcome:
    """Keep the released model under models/<version>/ and confirm its hash."""
    card = json.loads(task.card_json)
    return Outcome(Receipt(sha256=store_release(site.workspace, card, task.weights)))


def _job(task: Task, envelope: TaskEnvelope, site: Site) -> Job:
    found = _plan_of(task, envelope, site)
    return Job(task, envelope, found, site.seed(found))


def _plan_of(task: Task, envelope: TaskEnvelope, site: Site) -> Plan:
    found = site.facts.plan(envelope.plan)
    if found is None:
        raise Refused("PLAN_NOT_APPROVED", where=type(task).kind)
    return found


def _refused_scans(site: Site) -> dict[str, int]:
    path = site.workspace.prep / "manifest.csv"
    rows = read_table(path, MANIFEST_COLUMNS) if path.is_file() else []
    return dict(Counter(row["code"] for row in rows if row["status"] == "refused" and row["code"] in CODES))


Handler = Callable[..., Outcome]
HANDLERS: dict[type[Task], Handler] = {
    HelloTask: hello,
    PlanTask: plan,
    CodebookInitTask: lambda task, envelope, site: site.worker.codebook_init(_job(task, envelope, site)),
    VqganTask: lambda task, envelope, site: site.worker.train_vqgan(_job(task, envelope, site)),
    EncodeTask: lambda task, envelope, site: site.worker.encode(_job(task, envelope, site)),
    OdeTask: lambda task, envelope, site: site.worker.train_ode(_job(task, envelope, site)),
    ReconstructionTask: lambda task, envelope, site: site.worker.evaluate_reconstruction(_job(task, envelope, site)),
    TrajectoryTask: lambda task, envelope, site: site.worker.evaluate_trajectory(_job(task, envelope, site)),
    ConformalTask: lambda task, envelope, site: site.worker.evaluate_conformal(_job(task, envelope, site)),
    ReportTask: report,
    ReleaseTask: release,
    CoxFutureTask: lambda task, envelope, site: site.worker.future_codes(_job(task, envelope, site)),
    CoxKeysTask: lambda task, envelope, site: site.cox.keys(task, envelope),
    CoxPeersTask: lambda task, envelope, site: site.cox.peers(task, envelope),
    **dict.fromkeys(COX_TASKS.values(), survival),
}
