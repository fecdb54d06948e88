"""A rehearsal: a copy of the site's settings on its real prepared scans, a coordinator in the same process, no network.

The copy has its own policy, log and state, so a rehearsal neither spends approvals nor leaves lines in the real log.
The coordinator is loaded by name through the entry point `fourdvq.apps: server`; nothing here imports it.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from fourdvq.errors import ConfigError, FourdvqError
from fourdvq_client import embedded
from fourdvq_client.audit import read_entries
from fourdvq_client.policy import load_policy
from fourdvq_client.workspace import Workspace, read_profile

# The smallest schedule that still passes through every stage; a person may override each of them.
SHORT = (
    "federation.rounds=1",
    "federation.local_steps=1",
    "federation.ode_rounds=1",
    "federation.ode_local_steps=1",
    "federation.quorum=1",
    "federation.worker=inline",
    "federation.wait_sites_s=5",
)
_SMALLEST = re.compile(r"^(\s+(?:min_patients_per_round|min_scans_per_round|min_patients_per_summary):[ ]*)\d+", re.M)
_OWN_EXPERIMENT = ("tiny", "demo")


@dataclass(frozen=True)
class Rehearsal:
    """How it went. `refusals`: kind of message, code, rule."""

    stages: tuple[str, ...]
    messages: int
    seconds: float
    refusals: tuple[tuple[str, str, str], ...]
    summary: dict[str, Any]


def rehearse(workspace: Workspace, overrides: Sequence[str], *, until: str, notify: Callable[[str], None]) -> Rehearsal:
    """Run the short experiment up to stage `until`. Raises what the run raises, E_UNSUPPORTED for an external site."""
    if load_policy(workspace.policy_yaml).rules.role == "external":
        raise ConfigError(
            "E_UNSUPPORTED",
            where="dry-run",
            found="role external",
            wanted="a site that trains",
            fix="fourdvq-client check",
        )
    server = _server()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fourdvq-rehearsal-", ignore_cleanup_errors=True) as folder:
        copy = _copy(workspace, Path(folder) / "site")
        site = load_policy(copy.policy_yaml).rules.site
        summary = server.run_local(
            Path(folder) / "coordinator",
            {site: embedded.client_app(copy.root, worker="inline")},
            overrides=(*_fitting(copy), *SHORT, *overrides),
            until=until,
            on_unapproved=lambda _sites: embedded.approve(copy.root, by="dry-run"),
            notify=notify,
        )
        entries = read_entries(copy.audit_file)
    refusals = tuple((e["kind"], e["decision"], e["rule"]) for e in entries if e["action"] == "refuse")
    return Rehearsal(
        stages=tuple(summary.get("stages", {}) or ()),
        messages=sum(e["action"] == "release" for e in entries),
        seconds=time.monotonic() - started,
        refusals=refusals,
        summary=summary,
    )


def _fitting(workspace: Workspace) -> tuple[str, ...]:
    """The experiment that belongs to the site's profile: its scans can be used under no other."""
    profile = read_profile(workspace)
    name = profile.profile.name
    if name in _OWN_EXPERIMENT:
        return (f"experiment={name}",)
    depth, height, width = profile.grid.size
    return (f"preprocessing={name}", f"model.size=[{depth},{height},{width}]")


def _copy(workspace: Workspace, root: Path) -> Workspace:
    """Settings and secrets are copied, prepared scans are linked: they are large, and only read."""
    copy = Workspace(root)
    copy.make_folders()
    for name in ("site.yaml", "policy.yaml", "profile.json"):
        if (workspace.root / name).is_file():
            shutil.copy2(workspace.root / name, root / name)
    for name in ("secret", "patients.csv"):
        if (workspace.private / name).is_file():
            shutil.copy2(workspace.private / name, copy.private / name)
    # One step sees one patient. Nothing leaves a rehearsal, so the smallest groups need not hold in it.
    policy = copy.policy_yaml.read_text(encoding="utf-8")
    copy.policy_yaml.write_text(_SMALLEST.sub(r"\g<1>1", policy), encoding="utf-8")
    shutil.copy2(workspace.state / "fingerprint", copy.state / "fingerprint")
    copy.prep.rmdir()
    copy.prep.symlink_to(workspace.prep.resolve(), target_is_directory=True)
    return copy


def _server() -> Any:
    found = [e for e in entry_points(group="fourdvq.apps") if e.name == "server"]
    if not found:
        raise FourdvqError("E_UNSUPPORTED", where="entry point fourdvq.apps: server", found="not installed")
    return found[0].load()
