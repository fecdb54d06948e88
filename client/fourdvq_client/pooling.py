"""Several sites' prepared scans in one site folder: the pooled training that a federation is compared with.

Only on one machine, with data that may be pooled: synthetic cohorts, or public ones.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from fourdvq.data.prepared import (
    CLINICAL_COLUMNS,
    MANIFEST_COLUMNS,
    REVIEW_COLUMNS,
    read_splits,
    read_table,
    write_splits,
    write_table,
)
from fourdvq.errors import CohortError
from fourdvq_client import site_folder
from fourdvq_client.policy import load_policy
from fourdvq_client.workspace import Workspace, open_workspace


def merge_sites(out_root: Path, roots: Sequence[Path], site: str) -> None:
    """Make the site `site` in `out_root` from the prepared scans of `roots`: splits and decisions stay as they are.

    Raises CohortError E_DUPLICATE if two sites have one pseudonym, E_PROFILE if they were prepared differently.
    """
    sources = [open_workspace(root)[0] for root in roots]
    _check(sources)
    first = sources[0]
    settings = site_folder.SiteSettings(site=site, role="train", scans=out_root, clinical=first.root / "clinical.csv")
    site_folder.create_site(out_root, settings, template="demo")
    target = Workspace(out_root.resolve())
    shutil.copy2(first.profile_json, target.profile_json)
    for source in sources:
        for folder in sorted(p for p in source.prep.iterdir() if p.is_dir() and not p.name.startswith(".")):
            shutil.copytree(folder, target.prep / folder.name)
    for name, columns in (
        ("manifest.csv", MANIFEST_COLUMNS),
        ("review.csv", REVIEW_COLUMNS),
        ("clinical.csv", CLINICAL_COLUMNS),
    ):
        rows = [row for s in sources if (s.prep / name).is_file() for row in read_table(s.prep / name, columns)]
        write_table(target.prep / name, columns, rows)
    shutil.copy2(first.prep / "manifest.json", target.prep / "manifest.json")
    write_splits(target.prep, {p: split for s in sources for p, split in _train_splits(s).items()})


def _train_splits(source: Workspace) -> dict[str, str]:
    """An external site's patients stay test patients; training sites keep their splits."""
    splits = read_splits(source.prep)
    if load_policy(source.policy_yaml).rules.role == "external":
        return dict.fromkeys(splits, "test")
    return splits


def _check(sources: Sequence[Workspace]) -> None:
    seen: set[str] = set()
    profiles: set[str] = set()
    for source in sources:
        for row in read_table(source.prep / "manifest.csv", MANIFEST_COLUMNS):
            profiles.add(row["profile_sha256"])
        names = set(read_splits(source.prep))
        if names & seen:
            raise CohortError("E_DUPLICATE", where=str(source.prep), found="a pseudonym of another site")
        seen |= names
    if len(profiles - {""}) > 1:
        raise CohortError("E_PROFILE", where=str(sources[0].prep), found=f"{len(profiles)} profiles")
