"""The doctor's checks, by group. Each looks at one thing and says what to do; none changes anything.

A new check is one function and one line in `CHECKS`.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fourdvq.errors import (
    EXIT_OK,
    EXIT_REFUSED,
    EXIT_SOME_REFUSED,
    EXIT_UNREACHABLE,
    EXIT_USAGE,
    FourdvqError,
    explain,
)
from fourdvq.os_errors import from_os, place_of
from fourdvq_client.workspace import SiteConfig, Workspace, read_site_config

Status = Literal["PASS", "WARN", "FAIL"]
_MIN_FREE_GB = 20.0
_LOWEST = {"torch": (2, 10), "flwr": (1, 41)}


@dataclass(frozen=True)
class Check:
    """One line of the table; `exit_code` is what the command ends with if this is the first failure."""

    name: str
    status: Status
    found: str
    fix: str = ""
    code: str = ""
    exit_code: int = EXIT_OK


@dataclass(frozen=True)
class Patient:
    """What the doctor looks at: the folder, and its settings if they can be read."""

    workspace: Workspace
    config: SiteConfig | None


CheckFunction = Callable[[Patient], Iterable[Check]]


def run_checks(root: Path, groups: Iterable[str]) -> list[Check]:
    """All checks of the named groups; one that breaks down is a failure with its code, and the others go on."""
    workspace = Workspace(root.resolve())
    if not workspace.site_yaml.is_file():
        return [_failed("site folder", FourdvqError("E_NOT_A_SITE", where=str(root)), EXIT_USAGE)]
    found: list[Check] = []
    config: SiteConfig | None = None
    try:
        config = read_site_config(workspace)
        found.append(Check("site.yaml", "PASS", f"site {config.site}"))
    except FourdvqError as error:
        found.append(_failed("site.yaml", error))
    patient = Patient(workspace, config)
    for group in groups:
        for function in CHECKS[group]:
            found += _outcome(function, patient)
    return found


def _outcome(function: CheckFunction, patient: Patient) -> Iterator[Check]:
    name = function.__name__.strip("_").replace("_", " ")
    try:
        yield from function(patient)
    except FourdvqError as error:
        yield _failed(name, error)
    except Exception as error:  # the doctor looks at what is broken, and goes on
        where = place_of(error, patient.workspace.root) if isinstance(error, OSError) else ""
        told = from_os(error, where) if isinstance(error, OSError) else None
        yield _failed(name, told or FourdvqError("E_INTERNAL", where=where, found=type(error).__name__))


def exit_code_of(checks: Iterable[Check]) -> int:
    """That of the first failure; warnings alone are fine."""
    return next((c.exit_code for c in checks if c.status == "FAIL"), EXIT_OK)


def _python(_: Patient) -> Iterator[Check]:
    found = platform.python_version()
    ok = sys.version_info >= (3, 11)
    yield Check("python", "PASS" if ok else "FAIL", found, "" if ok else "install Python 3.11 or newer", "", EXIT_USAGE)


def _packages(_: Patient) -> Iterator[Check]:
    for name, lowest in _LOWEST.items():
        version = importlib.metadata.version(name)
        parts = tuple(int(p) for p in version.split("+")[0].split(".")[:2])
        wanted = ".".join(map(str, lowest))
        ok = parts >= lowest
        yield Check(name, "PASS" if ok else "FAIL", version, "" if ok else f"install {name} {wanted}", "", EXIT_USAGE)


def _code(_: Patient) -> Iterator[Check]:
    from fourdvq_client.code_identity import installed_code

    for one in installed_code():
        yield Check(f"code {one.package}", "PASS", f"{one.version} sha256 {one.sha256}")


def _policy(patient: Patient) -> Iterator[Check]:
    from fourdvq_client.code_identity import check_code, installed_code
    from fourdvq_client.policy import load_policy

    workspace = patient.workspace
    policy = load_policy(workspace.policy_yaml)
    yield Check("policy.yaml", "PASS", f"role {policy.rules.role}, {len(policy.rules.allowed_plans)} approved plans")
    if patient.config is not None and policy.rules.site != patient.config.site:
        error = FourdvqError("E_POLICY", found=f"site {policy.rules.site}", fix=f"site: {patient.config.site}")
        yield _failed("policy.yaml: site", error, 5)
    mode = workspace.policy_yaml.stat().st_mode
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        fix = f"chmod go-w {workspace.policy_yaml}"
        yield Check("policy.yaml: rights", "FAIL", "others may write it", fix, "E_POLICY", 5)
    elif os.access(workspace.policy_yaml, os.W_OK):
        yield Check("policy.yaml: rights", "WARN", "this account may change it", "let root or the data officer own it")
    check_code(policy.rules, installed_code())
    yield Check("allowed_code", "PASS", "any" if policy.rules.allowed_code == "any" else "as installed")


def _folders(patient: Patient) -> Iterator[Check]:
    workspace = patient.workspace
    for folder in (workspace.keys, workspace.private):
        if not folder.is_dir():
            yield _failed(folder.name, FourdvqError("E_FOLDER", where=str(folder)), EXIT_USAGE)
        elif folder.stat().st_mode & 0o077:
            yield Check(folder.name, "FAIL", "others may look into it", f"chmod 700 {folder}", "E_FOLDER", EXIT_USAGE)
        else:
            yield Check(folder.name, "PASS", "for the owner alone")


def _key(patient: Patient) -> Iterator[Check]:
    from fourdvq_client.keys import load_site_key

    yield Check("site key", "PASS", load_site_key(patient.workspace.keys / "site.key").fingerprint)


def _audit(patient: Patient) -> Iterator[Check]:
    from fourdvq_client.audit import verify
    from fourdvq_client.runtime import site_fingerprint

    verdict = verify(patient.workspace.audit_file, site_fingerprint(patient.workspace))
    if verdict.first_bad is None:
        yield Check("audit log", "PASS", f"{verdict.lines} lines, unbroken")
    else:
        error = FourdvqError("E_AUDIT_LOG", found=f"line {verdict.first_bad}: {verdict.reason}")
        yield _failed("audit log", error, 5)


def _disk(patient: Patient) -> Iterator[Check]:
    free = shutil.disk_usage(patient.workspace.root).free / 1e9
    ok = free >= _MIN_FREE_GB
    yield Check("disk", "PASS" if ok else "WARN", f"{free:.0f} GB free", "" if ok else "700 scans need about 15 GB")


def _telemetry(_: Patient) -> Iterator[Check]:
    wanted = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    wrong = [name for name, value in wanted.items() if os.environ.get(name) != value]
    fix = " ".join(f"export {n}={wanted[n]}" for n in wrong)
    yield Check("telemetry", "FAIL" if wrong else "PASS", "on" if wrong else "off", fix, "", EXIT_USAGE)


def _profile(patient: Patient) -> Iterator[Check]:
    from fourdvq.preprocessing.profile import require_supported
    from fourdvq_client.workspace import read_profile

    profile = read_profile(patient.workspace)
    require_supported(profile)
    yield Check("profile", "PASS", f"{profile.name}, sha256 {profile.sha256[:12]}")


def _weights(patient: Patient) -> Iterator[Check]:
    from fourdvq.preprocessing.segmentation import NEED_WEIGHTS, check_weights
    from fourdvq_client.workspace import read_profile

    spec = read_profile(patient.workspace).segmentation
    if patient.config is None or spec.method not in NEED_WEIGHTS:
        return
    check_weights(spec, patient.config.weights)
    yield Check("weights", "PASS", f"{patient.config.weights.name}, sha256 {spec.weights_sha256[:12]}")


def _prepared(patient: Patient) -> Iterator[Check]:
    from fourdvq.data.datasets import open_prepared
    from fourdvq_client.workspace import read_profile

    if not (patient.workspace.prep / "manifest.csv").is_file():
        yield Check("prepared scans", "WARN", "none", "fourdvq-client preprocess")
        return
    cohort = open_prepared(patient.workspace.prep)
    scans = sum(len(p.scans) for p in cohort.patients)
    if cohort.profile_sha256 == read_profile(patient.workspace).sha256:
        yield Check("prepared scans", "PASS", f"{scans} approved scans of {len(cohort.patients)} patients")
    else:
        yield _failed("prepared scans", FourdvqError("E_PROFILE", found=cohort.profile_sha256[:12]), EXIT_USAGE)


def _tables(patient: Patient) -> Iterator[Check]:
    from fourdvq_client.preparation import blocking, read_cohort

    if patient.config is None:
        return
    cohort = read_cohort(patient.workspace, patient.config)
    blocked = blocking(cohort.findings)
    found = f"{len(cohort.usable)} usable patients, {len(cohort.scans)} scans, {blocked} blocking findings"
    fix = f"see {patient.workspace.findings}" if blocked else ""
    yield Check("tables", "FAIL" if blocked else "PASS", found, fix, "", EXIT_SOME_REFUSED)


def _cohort_size(patient: Patient) -> Iterator[Check]:
    from fourdvq.data.datasets import clinical_of, open_prepared
    from fourdvq_client.policy import load_policy

    if not (patient.workspace.prep / "manifest.csv").is_file():
        return
    rules = load_policy(patient.workspace.policy_yaml).rules
    cohort = open_prepared(patient.workspace.prep)
    training = len(cohort.of("train"))
    least = rules.cohort.min_patients_per_round
    if rules.role == "train" and training < least:
        fix = "add approved scans; nothing can leave a round with fewer patients"
        yield Check("training patients", "FAIL", f"{training}, the policy wants {least}", fix, "TOO_FEW_PATIENTS", 5)
    deaths = sum(row.event == 1 for row in clinical_of(patient.workspace.prep))
    floor = int(rules.cox.get("min_events", 5))
    if deaths < floor:
        yield Check(
            "deaths", "WARN", f"{deaths}, the Cox rules want {floor}", "the survival analysis will leave us out"
        )


def _device(patient: Patient) -> Iterator[Check]:
    import torch

    wanted = patient.config.device if patient.config is not None else "cpu"
    if not wanted.startswith("cuda"):
        yield Check("device", "WARN", f"cpu, {os.cpu_count()} cores", "a GPU makes training some hundred times faster")
        return
    if not torch.cuda.is_available():
        yield Check("device", "FAIL", f"{wanted}, but torch sees no GPU", "check the driver and the torch build", "", 2)
        return
    facts = torch.cuda.get_device_properties(wanted)
    yield Check("device", "PASS", f"{facts.name}, {facts.total_memory / 1e9:.0f} GB")


def _network(patient: Patient) -> Iterator[Check]:
    from fourdvq_client.network_checks import Target, network_checks
    from fourdvq_client.policy import load_policy

    if patient.config is None or not patient.config.coordinator:
        error = FourdvqError("E_INVITE", found="no address in site.yaml: coordinator")
        yield _failed("coordinator", error, EXIT_USAGE)
        return
    rule = load_policy(patient.workspace.policy_yaml).rules.coordinator
    target = Target(
        address=patient.config.coordinator,
        ca_file=patient.workspace.root / rule.ca_file,
        ca_fingerprint=rule.ca_sha256,
        key_file=patient.workspace.keys / "site.key",
    )
    for row in network_checks(target):
        unreachable = row.state == "FAIL" and row.code in ("", "E_UNREACHABLE")
        exit_code = EXIT_OK if row.state != "FAIL" else EXIT_UNREACHABLE if unreachable else EXIT_REFUSED
        yield Check(f"network: {row.check}", row.state, row.found, row.fix, row.code, exit_code)


def _failed(name: str, error: FourdvqError, exit_code: int | None = None) -> Check:
    found = ": ".join(filter(None, (error.where, error.found or explain(error.code).title)))
    return Check(name, "FAIL", found, error.fix, error.code, exit_code if exit_code is not None else error.exit_code)


CHECKS: dict[str, list[CheckFunction]] = {
    "base": [
        _python,
        _packages,
        _code,
        _telemetry,
        _disk,
        _folders,
        _key,
        _policy,
        _audit,
        _profile,
        _weights,
        _prepared,
    ],
    "data": [_tables, _cohort_size],
    "gpu": [_device],
    "network": [_network],
}
