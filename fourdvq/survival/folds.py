"""Cross-validation folds by keyed hash: balanced over deaths within a site, and dependent on that site's patients only.

The key stays with the sites; only a digest of the assignment leaves. Row order, repeated runs and patients at other
sites change nothing. Axes: n patients, F folds.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

import numpy as np

from fourdvq.errors import SurvivalError
from fourdvq.survival.messages import I64, Bool


def assign_folds(
    ids: Sequence[str], event: Bool, *, folds: int, key: bytes, site: str, mode: str = "site_event"
) -> I64:
    """Fold 0 .. F-1 of every patient (n,), in the order of `ids`.

    `site_event`: within the site, deaths first and then the censored are sorted by HMAC-SHA256(key, pseudonym) and
    dealt round-robin, the count running on, from an offset of the site. `hash`: the HMAC modulo F, the same wherever
    the patient is, but unbalanced. Raises SurvivalError for repeated ids, fewer than 2 folds, no key, another mode.
    """
    if not key:
        raise SurvivalError("E_SURVIVAL_INPUT", where="key", found="an empty key", wanted="the site's secret bytes")
    if folds < 2:
        raise SurvivalError("E_SURVIVAL_INPUT", where="folds", found=str(folds), wanted="2 or more")
    if len(set(ids)) != len(ids):
        raise SurvivalError("E_SURVIVAL_INPUT", where="column ids", found="a repeated id", wanted="one row per patient")
    ranks = [_mac(key, pseudonym) for pseudonym in ids]
    if mode == "hash":
        return np.array([int(rank, 16) % folds for rank in ranks], dtype=np.int64)
    if mode != "site_event":
        raise SurvivalError("E_SURVIVAL_INPUT", where="fold_mode", found=repr(mode), wanted="site_event or hash")
    order = sorted(range(len(ids)), key=lambda i: (not event[i], ranks[i]))
    offset = int(_mac(key, "site:" + site)[:8], 16)
    fold = np.empty(len(ids), dtype=np.int64)
    fold[order] = (np.arange(len(ids)) + offset) % folds
    return fold


def training_rows(fold: I64, folds: int) -> Bool:
    """(F, n): the rows outside each fold."""
    return np.asarray(fold[None, :] != np.arange(folds)[:, None])


def folds_digest(ids: Sequence[str], fold: I64, *, key: bytes) -> str:
    """HMAC-SHA256 over the sorted `pseudonym:fold` lines, hex: equal for equal assignments, and nothing else."""
    return _mac(key, "\n".join(sorted(f"{pseudonym}:{f}" for pseudonym, f in zip(ids, fold, strict=True))))


def permutation(n: int, replicate: int, *, key: bytes, site: str) -> I64:
    """The site's own row order (n,) of permutation replicate r >= 1, drawn from its secret."""
    seed = int(_mac(key, f"permutation:{site}:{replicate}"), 16)
    return np.random.default_rng(seed).permutation(n).astype(np.int64)


def _mac(key: bytes, text: str) -> str:
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
