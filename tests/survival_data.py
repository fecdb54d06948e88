"""Simulated survival tables for tests and benchmarks: code shares as multinomial counts around Zipf-like means."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from fourdvq.survival import CoxSite

KEY = b"k" * 32
TOKENS = 24 * 64 * 64  # codes of one scan
TIGHT = {"precision": 1e-22, "r_precision": -1}  # lifelines stops early by default, up to 4e-4 standard errors away


def cohort(
    n: int,
    *,
    codes: int = 256,
    seed: int = 0,
    name: str = "leuven",
    true: int = 8,
    log_hr: float = 0.0,
    step: float = 1.0,
) -> CoxSite:
    """A site of `n` patients, about half of whom die; `true` codes carry `log_hr` per SD; times are whole steps.

    Of 256 codes the default policy keeps about 190 at sites of 85 and 56 patients.
    """
    rng = np.random.default_rng(seed)
    means = 1.0 / (np.arange(codes) + 2.0) ** 1.1
    means /= means.sum()
    shares = np.stack([rng.multinomial(TOKENS, rng.dirichlet(means * 230 + 1e-9)) for _ in range(n)]) / TOKENS
    C = np.column_stack([rng.normal(0.0, 0.8, n), rng.integers(0, 2, n), rng.integers(0, 2, n)]).astype(float)
    effect = shares[:, :true]
    spread = np.where(effect.std(axis=0) > 0, effect.std(axis=0), 1.0)
    risk = 0.3 * C[:, 0] + 0.2 * C[:, 1] + (log_hr * (effect - effect.mean(axis=0)) / spread).sum(axis=1)
    death = rng.exponential(1000.0 * np.exp(-risk))
    end = rng.exponential(1100.0, n)
    t = np.maximum(np.ceil(np.minimum(death, end) / step), 1.0) * step
    ids = tuple(f"{name}-{i:05d}" for i in range(n))
    return CoxSite(X=shares, C=C, t=t, e=death <= end, ids=ids, name=name, names=("age", "sex", "smoking"))


def cohorts(sizes: Sequence[int], **options: object) -> list[CoxSite]:
    """One site per size, with different names and seeds."""
    seed = int(options.pop("seed", 0))  # type: ignore[call-overload]
    return [
        cohort(n, seed=seed + 101 * k, name=f"site{chr(97 + k)}", **options)  # type: ignore[arg-type]
        for k, n in enumerate(sizes)
    ]


def with_folds(site: CoxSite, folds: int = 5) -> CoxSite:
    """The site with fold = row number modulo folds."""
    fold = np.arange(len(site.t)) % folds
    return dataclasses.replace(site, train=fold[None] != np.arange(folds)[:, None])


def rows(site: CoxSite, index: np.ndarray) -> CoxSite:
    """The site with these rows only, in this order."""
    return dataclasses.replace(
        site,
        X=site.X[index],
        C=site.C[index],
        t=site.t[index],
        e=site.e[index],
        train=None if site.train is None else site.train[:, index],
        ids=None if site.ids is None else tuple(np.array(site.ids)[index]),
        strata=None if site.strata is None else site.strata[index],
    )


def stacked(sites: Sequence[CoxSite], *, name: str = "all") -> CoxSite:
    """One table of all sites' rows; the strata are the sites."""
    trains = [s.train for s in sites]
    return CoxSite(
        X=np.concatenate([s.X for s in sites]),
        C=np.concatenate([s.C for s in sites]),
        t=np.concatenate([s.t for s in sites]),
        e=np.concatenate([s.e for s in sites]),
        train=None if trains[0] is None else np.concatenate([t for t in trains if t is not None], axis=1),
        ids=tuple(i for s in sites for i in (s.ids or ())),
        name=name,
        strata=np.repeat(np.arange(len(sites)), [len(s.t) for s in sites]),
    )
