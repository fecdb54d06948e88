"""CoxSite: one hospital's survival table, checked once. It never leaves the site.

Axes: n patients, B codes, q covariates, F folds.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fourdvq.errors import SurvivalError
from fourdvq.survival.messages import F64, I64, Bool


@dataclass(frozen=True, eq=False)
class CoxSite:
    """Codes X (n, B) and covariates C (n, q) of any real dtype, follow-up t (n,) in days, e (n,) 1 = died.

    `train` (F, n): training rows of each fold, None = all rows in one fold. `ids` (n,): pseudonyms, needed for folds.
    `names`: covariate names. `strata` (n,): groups with their own baseline hazard within the site, None = one.
    C may hold NaN for a missing covariate; only `complete` accepts such a table.
    Raises SurvivalError (a ValueError) that names column and rule, never a value.
    """

    X: npt.NDArray[Any]
    C: npt.NDArray[Any]
    t: npt.NDArray[Any]
    e: npt.NDArray[Any]
    train: npt.NDArray[Any] | None = None
    ids: Sequence[str] | None = None
    name: str = ""
    names: tuple[str, ...] = ()
    strata: npt.NDArray[Any] | None = None

    def __post_init__(self) -> None:
        t = _numbers(self.t, "t", self.name, ndim=1)
        n = len(t)
        e = _numbers(self.e, "e", self.name, ndim=1)
        X = _numbers(self.X, "X", self.name, ndim=2)
        C = _numbers(self.C, "C", self.name, ndim=2, missing=True)
        for column, value in (("e", e), ("X", X), ("C", C)):
            if len(value) != n:
                raise _error(self.name, column, f"{len(value)} rows", f"{n} rows, as in t")
        if (t < 0).any():
            raise _error(self.name, "t", "a negative time", "times of 0 or more")
        if not np.isin(e, (0, 1)).all():
            raise _error(self.name, "e", "an event that is neither 0 nor 1", "0 (censored) or 1 (died)")
        train = None if self.train is None else _flags(self.train, n, self.name)
        strata = None if self.strata is None else np.asarray(self.strata)
        if strata is not None and strata.shape != (n,):
            raise _error(self.name, "strata", "another number of rows", f"{n} rows, as in t")
        ids = None if self.ids is None else tuple(str(i) for i in self.ids)
        if ids is not None and (len(ids) != n or len(set(ids)) != n):
            raise _error(self.name, "ids", "a repeated or missing id", "one row per patient, each id once")
        if self.names and len(self.names) != C.shape[1]:
            raise _error(self.name, "names", f"{len(self.names)} names", f"{C.shape[1]} names, as in C")
        checked = {"X": X, "C": C, "t": t, "e": e.astype(bool), "train": train, "ids": ids, "strata": strata}
        for field, array in {**checked, "names": tuple(self.names)}.items():
            object.__setattr__(self, field, array)

    @property
    def digest(self) -> str:
        """Sha256 over ids, outcome and values: the cohort of this table. Only its HMAC may leave the site."""
        h = hashlib.sha256()
        for value in (self.X, self.C, self.t, self.e):
            h.update(repr(value.shape).encode())
            h.update(np.ascontiguousarray(value).tobytes())
        h.update("\n".join(self.ids or ()).encode())
        return h.hexdigest()


def as_site(site: CoxSite | Mapping[str, Any]) -> CoxSite:
    """A CoxSite without missing covariates, from itself or from a mapping with the same keys; raises SurvivalError."""
    table = _from_mapping(site)
    missing = np.isnan(table.C).any(axis=0)
    if missing.any():
        column = f"C[:, {int(np.flatnonzero(missing)[0])}]"
        raise _error(table.name, column, "a missing value", "complete covariates")
    return table


def complete(site: CoxSite | Mapping[str, Any]) -> tuple[CoxSite, int]:
    """The rows with complete covariates, and how many were left out."""
    table = _from_mapping(site)
    rows = ~np.isnan(table.C).any(axis=1)
    if rows.all():
        return table, 0
    kept = dataclasses.replace(
        table,
        X=table.X[rows],
        C=table.C[rows],
        t=table.t[rows],
        e=table.e[rows],
        train=None if table.train is None else table.train[:, rows],
        ids=None if table.ids is None else tuple(i for i, keep in zip(table.ids, rows, strict=True) if keep),
        strata=None if table.strata is None else table.strata[rows],
    )
    return kept, int((~rows).sum())


def _from_mapping(site: CoxSite | Mapping[str, Any]) -> CoxSite:
    if isinstance(site, CoxSite):
        return site
    name, known = str(site.get("name", "")), set(CoxSite.__dataclass_fields__)
    unknown = sorted(set(site) - known)
    if unknown:
        raise _error(name, unknown[0], "an unknown key", "one of " + ", ".join(sorted(known)))
    missing = [key for key in ("X", "C", "t", "e") if key not in site]
    if missing:
        raise _error(name, missing[0], "a missing key", "X, C, t and e")
    return CoxSite(**site)


def same_shape(sites: Sequence[CoxSite]) -> None:
    """Raise SurvivalError unless there is a site and all agree on codes, covariates and folds."""
    if not sites:
        raise SurvivalError("E_SURVIVAL_INPUT", where="sites", found="no site", wanted="at least one site")
    first = sites[0]
    for site in sites[1:]:
        for column, mine, theirs in (
            ("X", site.X.shape[1], first.X.shape[1]),
            ("C", site.C.shape[1], first.C.shape[1]),
            ("train", _n_folds(site), _n_folds(first)),
        ):
            if mine != theirs:
                raise _error(site.name, column, f"{mine} columns or folds", f"{theirs}, as at the first site")


def _n_folds(site: CoxSite) -> int:
    return 1 if site.train is None else len(site.train)


def strata_of(site: CoxSite) -> I64:
    """Stratum number of every row; all 0 when the site has one baseline hazard."""
    if site.strata is None:
        return np.zeros(len(site.t), dtype=np.int64)
    return np.unique(site.strata, return_inverse=True)[1].astype(np.int64)


def _numbers(value: Any, column: str, site: str, *, ndim: int, missing: bool = False) -> F64:
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "biuf" and array.size:
            array = array.astype(np.float64)
        array = array.astype(np.float64)
    except (TypeError, ValueError):
        raise _error(site, column, "something that is not a number", "numbers") from None
    if array.ndim != ndim:
        raise _error(site, column, f"{array.ndim} axes", f"{ndim} axes")
    finite = np.isfinite(array) | (np.isnan(array) if missing else False)
    if not finite.all():
        bad = column if ndim == 1 else f"{column}[:, {int(np.flatnonzero(~finite.all(axis=0))[0])}]"
        raise _error(site, bad, "a missing or infinite value", "finite numbers")
    return array


def _flags(value: Any, n: int, site: str) -> Bool:
    array = np.asarray(value)
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or array.shape[1] != n or not np.isin(array, (0, 1)).all():
        raise _error(site, "train", "another shape or value", f"(folds, {n}) of true and false")
    return array.astype(bool)


def _error(site: str, column: str, found: str, wanted: str) -> SurvivalError:
    where = f"site {site}, column {column}" if site else f"column {column}"
    return SurvivalError("E_SURVIVAL_INPUT", where=where, found=found, wanted=wanted)
