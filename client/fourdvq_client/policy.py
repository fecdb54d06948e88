"""The site's policy: what may be asked of this site and what may leave it. Read here only; no message can change it.

Everything must be stated: an unknown key, a missing one, a wrong type or a file that cannot be read means that the
client does not start (exit 5). A door with an unknown lock stays closed.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from fourdvq.config import build
from fourdvq.errors import ConfigError, Refused
from fourdvq.wire.messages import Role
from fourdvq_client.yaml_file import parse_yaml

EgressKind = Literal[
    "site_card", "plan_ack", "codebook_stats", "delta", "cox_stats", "eval_summary", "report", "receipt", "refusal"
]
WireDtype = Literal["float32", "bfloat16", "float16"]

# Answers without training: a site may say who it is and what a person decided before any plan is approved.
BEFORE_APPROVAL = frozenset({"query.hello", "query.plan", "query.report", "query.release"})


@dataclass(frozen=True)
class CoordinatorRule:
    """Whom the site talks to. `tls: loopback` allows a plain connection, on this machine only."""

    ca_file: Path
    ca_sha256: str
    tls: Literal["required", "loopback"]


@dataclass(frozen=True)
class AllowedCode:
    """An installed package that may run: its sha256 as `fourdvq-client check` prints it."""

    package: Literal["fourdvq", "fourdvq_client"]
    version: str
    sha256: str


@dataclass(frozen=True)
class Approval:
    """A person's yes to one plan on one cohort."""

    plan: str
    cohort: str
    by: str
    on: str

    def __post_init__(self) -> None:
        for name in ("plan", "cohort"):
            if not re.fullmatch(r"[0-9a-f]{64}", getattr(self, name)):
                raise ValueError(f"{name} is not 64 hex digits")


@dataclass(frozen=True)
class CohortRules:
    """Smallest groups and longest runs. Patients are counted after training: those that really took part."""

    min_patients_per_round: int
    min_scans_per_round: int
    min_patients_per_summary: int
    max_rounds: int
    max_local_steps: int

    def __post_init__(self) -> None:
        _at_least(self, 1)


@dataclass(frozen=True)
class EgressRules:
    """What a reply may hold."""

    kinds: tuple[EgressKind, ...]
    max_bytes_factor: float
    wire_dtype: WireDtype
    max_rel_update: float
    codebook_min_patients: int
    metrics: tuple[str, ...]
    sig_digits: int
    min_cell: int

    def __post_init__(self) -> None:
        if self.max_bytes_factor < 1 or self.max_rel_update <= 0:
            raise ValueError("max_bytes_factor must be at least 1 and max_rel_update above 0")
        if not 1 <= self.sig_digits <= 17 or self.codebook_min_patients < 1 or self.min_cell < 1:
            raise ValueError("sig_digits must be 1 to 17, codebook_min_patients and min_cell at least 1")


@dataclass(frozen=True)
class IngressRules:
    """What a received model may be."""

    require_finite: Literal[True]
    max_rel_change: float
    max_bytes: int

    def __post_init__(self) -> None:
        if self.max_rel_change <= 0 or self.max_bytes < 1:
            raise ValueError("max_rel_change and max_bytes must be above 0")


@dataclass(frozen=True)
class DpRules:
    """Differential privacy that this site insists on. `off` is the only mode of this version."""

    mode: Literal["off"]


@dataclass(frozen=True)
class Limits:
    """Bounds on files from the archive."""

    max_voxels: int
    spacing_mm: tuple[float, float]
    decode_memory_mb: int
    decode_seconds: int

    def __post_init__(self) -> None:
        if not 0 < self.spacing_mm[0] < self.spacing_mm[1]:
            raise ValueError("spacing_mm must be two increasing sizes")
        if min(self.max_voxels, self.decode_memory_mb, self.decode_seconds) < 1:
            raise ValueError("max_voxels, decode_memory_mb and decode_seconds must be above 0")


@dataclass(frozen=True)
class SitePolicy:
    """policy.yaml, schema 1. `cox` holds the fields of `fourdvq.survival.Policy`, by name."""

    schema: Literal[1]
    site: str
    role: Role
    coordinator: CoordinatorRule
    allowed_code: tuple[AllowedCode, ...] | Literal["any"]
    allowed_plans: tuple[Approval, ...]
    allowed_tasks: tuple[str, ...]
    cohort: CohortRules
    egress: EgressRules
    ingress: IngressRules
    cox: Mapping[str, Any]
    dp: DpRules
    limits: Limits
    on_violation: Literal["refuse"]

    def allows(self, kind: str) -> bool:
        """Whether `allowed_tasks` lists the message type; `query.cox_*` stands for a group."""
        return any(fnmatch.fnmatchcase(kind, pattern) for pattern in self.allowed_tasks)

    def approval(self, plan: str) -> Approval | None:
        """The latest approval of a plan, or None."""
        return next((a for a in reversed(self.allowed_plans) if a.plan == plan), None)


@dataclass(frozen=True)
class LoadedPolicy:
    """The policy and the sha256 of the file it was read from: every audit line names the policy in force."""

    rules: SitePolicy
    sha256: str


def load_policy(path: Path) -> LoadedPolicy:
    """Read policy.yaml. Raises Refused E_POLICY, which names the key, for anything but a complete policy."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(
            "E_POLICY", where=str(path), found=type(error).__name__, wanted="a readable policy.yaml"
        ) from None
    return LoadedPolicy(parse_policy(text), hashlib.sha256(data).hexdigest())


@lru_cache(maxsize=8)
def parse_policy(text: str) -> SitePolicy:
    """The policy in `text`; Refused E_POLICY as in `load_policy`."""
    try:
        rules = build(SitePolicy, parse_yaml(text, where="policy.yaml"), where="policy.yaml")
        _check_cox(rules.cox)
    except ConfigError as error:
        raise Refused(
            "E_POLICY", where=error.where, found=f"{error.title}: {error.found}", wanted=error.wanted, fix=error.fix
        ) from None
    return rules


def may_write(path: Path) -> bool:
    """Whether this process may change the policy; where it may not, a person with the right does."""
    return os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)


def approval_entry(plan: str, cohort: str, by: str, on: str) -> str:
    """The line that stands for an approval under `allowed_plans`."""
    # Quoted: YAML reads a bare `on` as true.
    return f'  - {{plan: "{plan}", cohort: "{cohort}", by: "{by}", "on": "{on}"}}'


def add_approval(path: Path, plan: str, cohort: str, by: str, on: str) -> None:
    """Append an approval to `allowed_plans`, leaving all other text and comments as they are.

    Raises Refused E_READ_ONLY with the entry if this process may not write the file, ConfigError E_VALUE for a name
    that would not survive YAML, Refused E_POLICY if the file is not a sound policy before or after.
    """
    if re.search(r'["\\\x00-\x1f]|\$\{', by) or not by.strip():
        raise ConfigError("E_VALUE", where="--by", found=repr(by), wanted="a name without quotes or backslashes")
    entry = approval_entry(plan, cohort, by, on)
    if not may_write(path):
        raise Refused("E_READ_ONLY", where=str(path), fix=f"have its owner add under allowed_plans:\n{entry}")
    before = load_policy(path).rules
    text = _with_entry(path.read_text(encoding="utf-8"), entry, before.allowed_plans)
    after = parse_policy(text)
    if after.allowed_plans != (*before.allowed_plans, Approval(plan, cohort, by, on)):
        raise Refused(
            "E_POLICY", where="policy.yaml.allowed_plans", found="a list this command cannot extend", fix=entry
        )
    _replace_keeping_mode(path, text)


def _with_entry(text: str, entry: str, approved: tuple[Approval, ...]) -> str:
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if re.match(r"allowed_plans\s*:", line))
    head, _, rest = lines[at].partition(":")
    value, mark, comment = rest.partition("#")
    if value.strip():
        # A list on the key's own line becomes one entry a line.
        kept = [approval_entry(a.plan, a.cohort, a.by, a.on) for a in approved]
        return "\n".join(
            [*lines[:at], f"{head}:{'  ' + mark + comment if mark else ''}", *kept, entry, *lines[at + 1 :], ""]
        )
    end = at + 1
    for i in range(at + 1, len(lines)):
        if re.match(r"[A-Za-z_]", lines[i]):
            break
        if lines[i].strip() and not lines[i].lstrip().startswith("#"):
            end = i + 1
    # YAML wants all items of a list under each other.
    indents = [found[1] for line in lines[at + 1 : end] if (found := re.match(r"(\s*)- ", line))]
    return "\n".join([*lines[:end], (indents[0] if indents else "  ") + entry.strip(), *lines[end:], ""])


def _replace_keeping_mode(path: Path, text: str) -> None:
    mode = path.stat().st_mode & 0o777
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.chmod(mode)
    temporary.replace(path)


def _check_cox(cox: Mapping[str, Any]) -> None:
    from fourdvq.survival.disclosure import Policy

    build(Policy, cox, where="policy.yaml.cox")


def _at_least(rules: Any, smallest: int) -> None:
    for name, value in vars(rules).items():
        if value < smallest:
            raise ValueError(f"{name} {value} is below {smallest}")
