"""The policy as sentences, and doubts that a strict reader cannot have: words that match nothing, low floors."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fourdvq.errors import Refused
from fourdvq.wire.messages import TASKS
from fourdvq_client.code_identity import Installed, check_code
from fourdvq_client.policy import SitePolicy

_SAFE_PATIENTS = 20  # below it, a round's update can be inverted to scans more easily


@dataclass(frozen=True)
class Doubt:
    """One remark; FAIL keeps the site from working, WARN is for a person to judge."""

    level: Literal["FAIL", "WARN"]
    text: str


def in_words(policy: SitePolicy) -> Iterator[str]:
    """What the policy means, rule by rule."""
    cohort, egress = policy.cohort, policy.egress
    yield f"This is {policy.site}, role {policy.role}" + (": it never trains." if policy.role == "external" else ".")
    yield f"It may be asked for: {', '.join(policy.allowed_tasks)}."
    yield f"{len(policy.allowed_plans)} plans are approved" + "".join(
        f"; {a.plan[:12]} by {a.by} on {a.on}" for a in policy.allowed_plans
    )
    code = "whatever is installed" if policy.allowed_code == "any" else f"{len(policy.allowed_code)} listed packages"
    yield f"Code that may run: {code}."
    yield (
        f"No training result leaves from fewer than {cohort.min_patients_per_round} patients or "
        f"{cohort.min_scans_per_round} scans, no summary from fewer than {cohort.min_patients_per_summary} patients."
    )
    yield f"At most {cohort.max_rounds} training rounds of at most {cohort.max_local_steps} steps in one run."
    yield f"Kinds of data that may leave: {', '.join(egress.kinds)}."
    yield (
        f"Weight changes leave as {egress.wire_dtype}, at most {egress.max_rel_update:g} times the weights' size; "
        f"a code seen in fewer than {egress.codebook_min_patients} patients leaves as zeros."
    )
    yield f"Metrics: {', '.join(egress.metrics)}; {egress.sig_digits} digits; counts in steps of {egress.min_cell}."
    yield (
        f"A received model must be finite and may differ by at most {policy.ingress.max_rel_change:g} times its size "
        "from the one before."
    )
    yield f"Survival rules changed from the federation's defaults: {dict(policy.cox) or 'none'}."
    yield "Differential privacy: off. There is no differential privacy guarantee; the rules above are what protects."


def doubts(policy: SitePolicy, site: str, installed: tuple[Installed, ...]) -> list[Doubt]:
    """Remarks on a policy that could be read."""
    found = []
    if policy.site != site:
        found.append(Doubt("FAIL", f"policy.yaml is of site {policy.site}, site.yaml of {site}"))
    try:
        check_code(policy, installed)
    except Refused as error:
        found.append(Doubt("FAIL", f"{error.where}: installed is {error.found}, which the policy does not list"))
    if policy.allowed_code == "any":
        found.append(Doubt("WARN", "allowed_code: any: changed code would run unseen; for synthetic data only"))
    for pattern in policy.allowed_tasks:
        if not any(fnmatch.fnmatchcase(kind, pattern) for kind in TASKS):
            found.append(Doubt("WARN", f"allowed_tasks: {pattern} matches no task of this version"))
    if policy.cohort.min_patients_per_round < _SAFE_PATIENTS:
        text = f"min_patients_per_round {policy.cohort.min_patients_per_round} is below {_SAFE_PATIENTS}"
        found.append(Doubt("WARN", f"{text}: for synthetic data only"))
    if policy.egress.min_cell < 5 or policy.egress.codebook_min_patients < 5:
        found.append(Doubt("WARN", "min_cell or codebook_min_patients is below 5: for synthetic data only"))
    if policy.coordinator.tls != "required":
        found.append(Doubt("WARN", "tls: loopback: only for a coordinator on this machine"))
    return found
