"""Who takes part: sites that speak our protocol, have the role they were admitted with, and whose people said yes.

Used when a run starts and again before every round, so that a site that comes, or approves, later joins then.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping

from fourdvq.config import canonical_json
from fourdvq.errors import ConfigError, TemporaryStop
from fourdvq.federation.aggregate import ROBUST_MIN_SITES
from fourdvq.wire.messages import HelloTask, PlanAck, PlanTask, SiteCard
from fourdvq_server.stages.context import SiteInfo, StageContext

_POLL_S = 0.5
_QUESTION_DEADLINE_S = 120.0  # a person is not waited for here: the site answers "not yet" at once


def greet(context: StageContext, sites: Iterable[str]) -> None:
    """Ask sites who they are and admit them or note why not."""
    names = sorted(sites)
    if not names:
        return
    replies = context.federation.ask(dict.fromkeys(names, HelloTask()), deadline_s=_QUESTION_DEADLINE_S)
    for site, code in replies.failed.items():
        context.refused[site] = code
    for site, received in sorted(replies.good.items()):
        card = received.body
        if isinstance(card, SiteCard):
            _admit(context, site, card)


def ask_approval(context: StageContext) -> None:
    """Send the plan to every admitted site that has not approved it; note who did and who has another profile."""
    outside = sorted(set(context.sites) - context.ready)
    if not outside:
        return
    plan = context.plan
    task = PlanTask(plan_json=plan.to_json(), profile_json=canonical_json(context.store.profile))
    replies = context.federation.ask(dict.fromkeys(outside, task), deadline_s=_QUESTION_DEADLINE_S)
    context.refused.update(replies.failed)
    for site, received in replies.good.items():
        approved = isinstance(received.body, PlanAck) and received.body.approved
        # The profile first: nobody can approve a plan whose profile their scans do not have.
        if context.sites[site].profile != plan.profile_sha256:
            context.refused[site] = "PROFILE_MISMATCH"
        elif not approved:
            context.refused[site] = "PLAN_NOT_APPROVED"
        else:
            context.ready.add(site)
            context.refused.pop(site, None)


def late_joiners(context: StageContext) -> None:
    """Before a round: give sites that came or approved meanwhile their place."""
    online = set(context.federation.online())
    known = set(context.sites)
    newcomers = {site for site in online - known if _expected(context, site)}
    changed = {s for s in known - context.ready if context.refused.get(s) == "PROFILE_MISMATCH"}
    greet(context, newcomers | (changed & online))
    if (set(context.sites) - context.ready) & online:
        ask_approval(context)


def wait_for_sites(context: StageContext) -> None:
    """Greet sites until all expected ones answered, or the time is up. TemporaryStop E_QUORUM if too few train."""
    spec = context.plan.federation
    end = time.monotonic() + spec.wait_sites_s
    told: set[str] = set()
    while True:
        online = set(context.federation.online())
        greet(context, {s for s in online if s not in context.sites and _expected(context, s)})
        expected = set(context.roles) if context.roles is not None else online
        missing = sorted(expected - set(context.sites))
        if online and not missing:
            break
        if time.monotonic() > end:
            break
        context.show("hello", "wait", 0, waiting=missing)
        if set(missing) != told:
            told = set(missing)
            context.notify(f"waiting for {', '.join(missing) or 'sites'}")
        context.federation.wait_while_paused()
        time.sleep(_POLL_S)
    _need_trainers(context, [s for s, info in context.sites.items() if info.role == "train"], "E_QUORUM")
    _check_combination(context)


def wait_for_approval(context: StageContext, wait_s: float | None) -> None:
    """Until every admitted site approved; once the quorum did, the others are waited for `wait_sites_s` longer.

    `wait_s` bounds the wait for the quorum itself; None waits until a person stops the run, because people decide
    here. Raises TemporaryStop E_NO_APPROVAL when the time is up.
    """
    spec = context.plan.federation
    started = time.monotonic()
    told: set[str] = set()
    while True:
        ask_approval(context)
        missing = sorted(set(context.sites) - context.ready)
        enough = len(context.trainers) >= spec.quorum
        waited = time.monotonic() - started
        if not missing or (enough and waited > spec.wait_sites_s):
            break
        if wait_s is not None and waited > wait_s and not enough:
            break
        if set(missing) != told:
            told = set(missing)
            reasons = ", ".join(f"{site} ({context.refused.get(site, '?')})" for site in missing)
            context.notify(f"plan {context.plan.hash[:12]} waits for {reasons}")
        context.show("plan", "approval", 0, waiting=missing)
        if context.on_unapproved:
            context.on_unapproved(missing)
        else:
            context.federation.wait_while_paused()
            time.sleep(_POLL_S)
        greet(context, [s for s in missing if context.refused.get(s) == "PROFILE_MISMATCH"])
    _need_trainers(context, context.trainers, "E_NO_APPROVAL")


def remember(context: StageContext) -> dict[str, object]:
    """The admitted sites as plain facts, for the run folder."""
    return {"sites": {name: vars(info) for name, info in sorted(context.sites.items())}, "refused": context.refused}


def _admit(context: StageContext, site: str, card: SiteCard) -> None:
    wanted = context.roles.get(site) if context.roles is not None else card.role
    if card.role != wanted:
        context.refused[site] = "E_ROLE"
        context.notify(f"{site}: admitted as {wanted}, answers as {card.role} (E_ROLE)")
        return
    known = context.sites.get(site)
    # The counts that weigh a site's updates are those of its first admission: it cannot grow during a run.
    fixed = known or _fixed_before(context, site)
    info = SiteInfo(
        role=card.role,
        ode=card.ode,
        patients=fixed.patients if fixed else card.patients,
        scans=fixed.scans if fixed else card.scans,
        train_scans=fixed.train_scans if fixed else card.train_scans,
        version=card.version,
        device=card.device,
        profile=card.profile,
    )
    context.sites[site] = info
    context.refused.pop(site, None)
    # A site whose profile is waited for is asked again and again: only what is new is told.
    if info != known:
        context.notify(
            f"{site}: {card.role}, {card.patients} patients, {card.scans} scans, {card.device}, version {card.version}"
        )


def _fixed_before(context: StageContext, site: str) -> SiteInfo | None:
    """What the run folder holds of the site's first admission, when a run is resumed."""
    path = context.store.stage("hello").folder / "result.json"
    if not path.is_file():
        return None
    sites: Mapping[str, dict[str, object]] = json.loads(path.read_text(encoding="utf-8"))["facts"]["sites"]
    return SiteInfo(**sites[site]) if site in sites else None  # type: ignore[arg-type]


def _expected(context: StageContext, site: str) -> bool:
    return context.roles is None or site in context.roles


def _need_trainers(context: StageContext, trainers: list[str], code: str) -> None:
    quorum = context.plan.federation.quorum
    if len(trainers) >= quorum:
        return
    reasons = ", ".join(f"{site} {reason}" for site, reason in sorted(context.refused.items()))
    raise TemporaryStop(
        code,
        where=f"run {context.store.name}",
        found=f"{len(trainers)} training sites ({', '.join(trainers) or 'none'}){'; ' + reasons if reasons else ''}",
        wanted=f"{quorum} training sites",
    )


def _check_combination(context: StageContext) -> None:
    """What depends on how many sites train. ConfigError E_NORM or E_UNSUPPORTED before any work."""
    n = sum(info.role == "train" for info in context.sites.values())
    if n > 1 and context.plan.model.norm == "batch":
        raise ConfigError("E_NORM", where="model.norm", found=f"batch, {n} training sites")
    aggregator = context.plan.federation.aggregator
    if aggregator != "mean" and n < ROBUST_MIN_SITES:
        raise ConfigError(
            "E_UNSUPPORTED",
            where="federation.aggregator",
            found=f"{aggregator}, {n} training sites",
            wanted=f"at least {ROBUST_MIN_SITES} training sites",
            fix="set federation.aggregator=mean",
        )
