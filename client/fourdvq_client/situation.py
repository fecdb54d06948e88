"""What can be said about a site's work from its own files: progress, last round, traffic, who holds the folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from fourdvq_client import keys, workspace
from fourdvq_client.audit import read_entries
from fourdvq_client.workspace import Holder, SiteConfig, Workspace


@dataclass(frozen=True)
class Situation:
    """One look; empty fields are not known."""

    site: str
    running: bool
    holders: tuple[Holder, ...]  # several where shards are prepared side by side
    progress: dict[str, Any]
    last_round: dict[str, Any]
    bytes_up: int
    bytes_down: int
    last_contact: str
    last_refusal: str
    waiting_plan: str  # hash of the plan that came last, if nobody approved it

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)

    def lines(self) -> tuple[str, ...]:
        """For people."""
        who = ", ".join(f"process {h['pid']} on {h['host']}" for h in self.holders)
        lines = [f"{self.site}: {who or 'no client at work'}"]
        if self.progress and self.running:
            p = self.progress
            lines.append(
                f"  run {p['run']}, stage {p['stage']}, round {p['round']}: step {p['step']} of {p['steps']}, "
                f"{p['seconds_left']:.0f} s left, losses {p['losses']}"
            )
        if self.last_round:
            r = self.last_round
            lines.append(f"  last round answered: {r['stage']} {r['round']} in {r['seconds']:.0f} s at {r['utc']}")
        if self.waiting_plan:
            lines.append(f"  plan {self.waiting_plan[:12]} waits for a yes: fourdvq-client approve --latest")
        up, down = self.bytes_up / 1e6, self.bytes_down / 1e6
        lines.append(f"  sent {up:.1f} MB, received {down:.1f} MB, last contact {self.last_contact or 'never'}")
        if self.last_refusal:
            lines.append(f"  last refusal: {self.last_refusal}")
        return tuple(lines)


def look(site: Workspace, config: SiteConfig) -> Situation:
    """Read the site's files once; nothing is locked or changed."""
    joined = keys.lock_holder(site.keys / "site.key")
    holders = (Holder(pid=joined["pid"], host=joined["host"]),) if joined else workspace.lock_holders(site)
    entries = read_entries(site.audit_file)
    refusals = [e for e in entries if e["action"] == "refuse"]
    sent = sum(int(e["bytes"]) for e in entries if e["action"] == "release")
    received = sum(int(e["bytes"]) for e in entries if e["action"] == "accept")
    last = refusals[-1] if refusals else None
    return Situation(
        site=config.site,
        running=bool(holders),
        holders=holders,
        progress=_read(site.state / "progress.json"),
        last_round=_last_round(site),
        bytes_up=sent,
        bytes_down=received,
        last_contact=str(entries[-1]["utc"]) if entries else "",
        last_refusal=f"{last['kind']}: {last['decision']} ({last['rule']}) at {last['utc']}" if last else "",
        waiting_plan=_waiting(site),
    )


def _read(path: Any) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _last_round(site: Workspace) -> dict[str, Any]:
    files = sorted(site.runs.glob("*/rounds.jsonl"), key=lambda p: p.stat().st_mtime_ns)
    if not files:
        return {}
    lines = files[-1].read_text(encoding="utf-8").splitlines()
    found: dict[str, Any] = {"run": files[-1].parent.name, **json.loads(lines[-1])} if lines else {}
    return found


def _waiting(site: Workspace) -> str:
    from fourdvq_client.policy import load_policy

    pointer = site.plans / "latest"
    if not pointer.is_file():
        return ""
    plan = pointer.read_text(encoding="utf-8").strip()
    return "" if load_policy(site.policy_yaml).rules.approval(plan) is not None else plan
