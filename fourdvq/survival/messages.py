"""What travels in one survival analysis: requests (down) and sums (up), as frozen dataclasses of named numpy arrays.

Every answer is a `Sums`: it defines `+`, and the sum of the sites' answers is the answer of their union. A field says
its dtype and the names of its axes; none of the axes is "patients" or "death times of a site", so no message can hold
a row. Axes: B codes, M = B + 1 model columns (the last one is the model of the covariates alone), q covariates,
p = 1 + q parameters (biomarker first), P = p(p+1)/2 (upper triangle row by row), A analyses (replicates times folds),
m active models (in the order of `active.nonzero()`), k chosen codes, G points of a public time grid.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
import numpy.typing as npt

from fourdvq.errors import WireError
from fourdvq.wire.forms import OptionalRunId, Sha256, Word

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]
MOMENT_BITS = 48  # fractional bits under masking: the range is small and a standard deviation is a difference
SUM_BITS = 40  # resolution 9e-13, range +-8.4e6


@dataclass(frozen=True)
class Axes:
    """The declared form of an array field: axis names, and fractional bits when it is masked (0: whole numbers)."""

    names: tuple[str, ...]
    bits: int = 0


ONE: typing.Final = Axes(("one",))
T = TypeVar("T", bound="Message")
S = TypeVar("S", bound="Sums")


class Message:
    """A frozen dataclass whose array fields are `Annotated[array type, Axes(...)]`."""

    def __post_init__(self) -> None:
        sizes: dict[str, int] = {"one": 1}
        for name, (dtype, axes) in array_fields(type(self)).items():
            value = getattr(self, name)
            if not isinstance(value, np.ndarray) or value.dtype != dtype or value.ndim != len(axes.names):
                raise _bad(self, name, f"{len(axes.names)} axes of {dtype}")
            for axis, size in zip(axes.names, value.shape, strict=True):
                if sizes.setdefault(axis, size) != size:
                    raise _bad(self, name, f"axis {axis} of one size in the whole message")

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The array fields by name, in declared order."""
        return {name: getattr(self, name) for name in array_fields(type(self))}

    def scalars(self) -> dict[str, Any]:
        """The other fields by name: numbers, words, tuples of words."""
        names = array_fields(type(self))
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in names}  # type: ignore[arg-type]

    @classmethod
    def from_parts(cls, arrays: Mapping[str, npt.NDArray[Any]], scalars: Mapping[str, Any] | None = None) -> Self:
        """The inverse of `arrays` and `scalars`; raises WireError E_MESSAGE for other fields than the declared ones."""
        given = {**arrays, **(scalars or {})}
        wanted = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if set(given) != wanted:
            raise WireError("E_MESSAGE", where=cls.__name__, found="other fields", wanted=", ".join(sorted(wanted)))
        return cls(**given)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays; booleans count one bit."""
        return sum(-(-a.size // 8) if a.dtype == bool else a.nbytes for a in self.arrays().values())


class Sums(Message):
    """An additive answer."""

    def __add__(self, other: Self) -> Self:
        if type(other) is not type(self) or self.scalars() != other.scalars():
            return NotImplemented
        mine, theirs = self.arrays(), other.arrays()
        for name, value in mine.items():
            if value.shape != theirs[name].shape:
                raise _bad(other, name, "the same shape at every site")
        return dataclasses.replace(self, **{name: mine[name] + theirs[name] for name in mine})  # type: ignore[type-var]


_FIELDS: dict[str, dict[str, tuple[np.dtype[Any], Axes]]] = {}  # type hints are slow to resolve: once per class


def array_fields(cls: type[Message]) -> dict[str, tuple[np.dtype[Any], Axes]]:
    """Name -> (dtype, axes) of the array fields of a message class."""
    if cls.__qualname__ not in _FIELDS:
        _FIELDS[cls.__qualname__] = _read_fields(cls)
    return _FIELDS[cls.__qualname__]


def _read_fields(cls: type[Message]) -> dict[str, tuple[np.dtype[Any], Axes]]:
    found = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        array, *forms = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        for axes in (form for form in forms if isinstance(form, Axes)):
            found[name] = (np.dtype(typing.get_args(typing.get_args(array)[1])[0]), axes)
    return found


def combine(answers: Iterable[S]) -> S:
    """The sum of the sites' answers to one request, in the order of site; raises WireError if there is none."""
    items = list(answers)
    if not items:
        raise WireError("E_MESSAGE", found="no answer", wanted="one answer per site")
    return functools.reduce(lambda a, b: a + b, items)


def _bad(message: Message, name: str, wanted: str) -> WireError:
    return WireError("E_MESSAGE", where=f"{type(message).__name__}.{name}", found="another form", wanted=wanted)


# ---- requests, in the order of an analysis ----------------------------------------------------------------------


@dataclass(frozen=True)
class HelloRequest(Message):
    """What the analysis is. The site makes its folds from its own key; `codes` non-empty: one model of these codes and
    the covariates instead of one model per code. `folds` = 0: one fit on all rows; -1: the folds the caller gave."""

    folds: int = 5
    fold_mode: Literal["site_event", "hash"] = "site_event"
    baseline: Literal["site", "shared"] = "site"
    ties: Literal["efron", "breslow"] = "efron"
    covariates: tuple[Word, ...] = ()  # empty: those the site has
    codes: tuple[int, ...] = ()
    purpose: Word = "selection"
    run: OptionalRunId = ""
    sites: int = 1  # in this run; from the policy's number on, answers must be masked
    codebook_sha256: Sha256 = ""
    cohort: Literal["train", "test"] = "train"
    source: Literal["real", "generated", "carried"] = "real"
    feature: Literal["level", "change"] = "level"


@dataclass(frozen=True)
class MomentsRequest(Message):
    """Send n, events and the sums for standardisation, once."""


@dataclass(frozen=True)
class ScaleRequest(Message):
    """The common scale. `kept`: codes that every site allows."""

    mean: Annotated[F64, Axes(("B+q",))]
    sd: Annotated[F64, Axes(("B+q",))]
    kept: Annotated[Bool, Axes(("B",))]


@dataclass(frozen=True)
class GridRequest(Message):
    """A public time grid: `edges` are the upper ends of its bins in days (the last bin is open); with `exact` the very
    death times, which only `disclosure="off"` answers. With `from_start` the bins all begin at the first edge (below 0:
    at time 0) and end at the others: how far must a bin reach to be accepted?"""

    edges: Annotated[F64, Axes(("G",))]
    exact: bool = False
    from_start: bool = False


@dataclass(frozen=True)
class CoxRequest(Message):
    """Evaluate models at beta (standardised units). Replicate 0 is the data; r > 0 the site's r-th permutation."""

    replicates: Annotated[I64, Axes(("R",))]
    active: Annotated[Bool, Axes(("A", "M"))]  # A = len(replicates) * folds, replicate by replicate
    beta: Annotated[F64, Axes(("m", "p"))]


@dataclass(frozen=True)
class PairRequest(Message):
    """Count comparable pairs of the risk scores z.beta on the rows outside (`validation`) or inside the fold."""

    replicates: Annotated[I64, Axes(("R",))]
    active: Annotated[Bool, Axes(("A", "M"))]
    beta: Annotated[F64, Axes(("m", "p"))]
    rows: Literal["validation", "training"] = "validation"


@dataclass(frozen=True)
class CorrelationRequest(Message):
    """Sums for Pearson correlations of these codes."""

    codes: Annotated[I64, Axes(("k",))]


@dataclass(frozen=True)
class PhRequest(Message):
    """Sums of the Grambsch-Therneau test of the model of all covariates at beta, in the units of the scale."""

    beta: Annotated[F64, Axes(("p",))]
    transform: Literal["log", "identity"] = "log"


@dataclass(frozen=True)
class KmRequest(Message):
    """Deaths and patients at risk on the agreed grid."""


@dataclass(frozen=True)
class LogRankRequest(Message):
    """Observed minus expected deaths, within the site, of the patients whose frozen risk z.beta is above 0."""

    beta: Annotated[F64, Axes(("p",))]  # the biomarker's first, in the units of the scale


@dataclass(frozen=True)
class ResultMessage(Message):
    """What the sites are told at the end: estimates of the selected codes, never totals."""

    codes: Annotated[I64, Axes(("k",))]
    beta: Annotated[F64, Axes(("k", "p"))]
    se: Annotated[F64, Axes(("k", "p"))]
    p: Annotated[F64, Axes(("k", "p"))]


# ---- answers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Receipt(Sums):
    """Done, or understood; `sites` counts the sites that say so."""

    sites: Annotated[I64, ONE]


@dataclass(frozen=True)
class CoxMoments(Sums):
    """Sums over a site's training patients. `allowed` counts the sites whose policy allows the code; the sums of a code
    that this site withholds are zero. `fold_events` are the deaths among the training rows of each fold."""

    sites: Annotated[I64, ONE]
    n: Annotated[I64, ONE]
    events: Annotated[I64, ONE]
    fold_events: Annotated[I64, Axes(("F",))]
    sx: Annotated[F64, Axes(("B+q",), MOMENT_BITS)]
    sxx: Annotated[F64, Axes(("B+q",), MOMENT_BITS)]
    allowed: Annotated[I64, Axes(("B",))]


@dataclass(frozen=True)
class GridSums(Sums):
    """How many sites accept each bin: one bit per site and bin, no counts."""

    sites: Annotated[I64, ONE]
    accepting: Annotated[I64, Axes(("G",))]


@dataclass(frozen=True)
class CoxSums(Sums):
    """Partial log-likelihood, gradient and information; `refused` counts sites that withhold the model at this beta."""

    log_likelihood: Annotated[F64, Axes(("m",), SUM_BITS)]
    gradient: Annotated[F64, Axes(("m", "p"), SUM_BITS)]
    information: Annotated[F64, Axes(("m", "P"), SUM_BITS)]
    refused: Annotated[U8, Axes(("m",))]


@dataclass(frozen=True)
class RiskSums(Sums):
    """Shared baseline only: risk-set and tied-death sums of w [1, z, zz'] at every grid point (Q = 1 + p + P rows)."""

    risk: Annotated[F64, Axes(("Q", "G", "m"), SUM_BITS)]
    tied: Annotated[F64, Axes(("Q", "G", "m"), SUM_BITS)]
    deaths: Annotated[I64, Axes(("A", "G"))]
    eta: Annotated[F64, Axes(("m",), SUM_BITS)]  # sum over deaths
    z: Annotated[F64, Axes(("m", "p"), SUM_BITS)]  # sum over deaths
    refused: Annotated[U8, Axes(("m",))]


@dataclass(frozen=True)
class PairCounts(Sums):
    """Concordant, tied and comparable pairs; first axis V: full model, biomarker alone."""

    concordant: Annotated[I64, Axes(("V", "m"))]
    tied: Annotated[I64, Axes(("V", "m"))]
    pairs: Annotated[I64, Axes(("A",))]


@dataclass(frozen=True)
class CorrelationSums(Sums):
    """n, sum x and packed sum xx' of standardised codes."""

    n: Annotated[I64, ONE]
    sx: Annotated[F64, Axes(("k",), SUM_BITS)]
    sxx: Annotated[F64, Axes(("K2",), SUM_BITS)]


@dataclass(frozen=True)
class PhSums(Sums):
    """Schoenfeld residuals r against the transformed time g, summed over deaths."""

    gr: Annotated[F64, Axes(("p",), SUM_BITS)]
    r: Annotated[F64, Axes(("p",), SUM_BITS)]
    g: Annotated[F64, Axes(("one",), SUM_BITS)]
    gg: Annotated[F64, Axes(("one",), SUM_BITS)]
    d: Annotated[I64, ONE]


@dataclass(frozen=True)
class KmSums(Sums):
    """Deaths in, and patients at risk at the start of, every bin of the public grid."""

    deaths: Annotated[I64, Axes(("G",))]
    at_risk: Annotated[I64, Axes(("G",))]


@dataclass(frozen=True)
class LogRankSums(Sums):
    """Observed minus expected deaths of one group, and the hypergeometric variance."""

    observed_minus_expected: Annotated[F64, Axes(("one",), SUM_BITS)]
    variance: Annotated[F64, Axes(("one",), SUM_BITS)]


# Flower type `query.<name>` -> (request, answer). `cox_eval` answers RiskSums when the baseline is shared.
MESSAGES: dict[str, tuple[type[Message], type[Sums]]] = {
    "cox_hello": (HelloRequest, Receipt),
    "cox_moments": (MomentsRequest, CoxMoments),
    "cox_scale": (ScaleRequest, Receipt),
    "cox_grid": (GridRequest, GridSums),
    "cox_eval": (CoxRequest, CoxSums),
    "cox_cindex": (PairRequest, PairCounts),
    "cox_corr": (CorrelationRequest, CorrelationSums),
    "cox_ph": (PhRequest, PhSums),
    "cox_km": (KmRequest, KmSums),
    "cox_logrank": (LogRankRequest, LogRankSums),
    "cox_result": (ResultMessage, Receipt),
}


def answer_type(request: Message, baseline: str) -> type[Sums]:
    """The class of the answer to a request in an analysis with this baseline hazard."""
    if isinstance(request, CoxRequest) and baseline == "shared":
        return RiskSums
    return next(sums for asked, sums in MESSAGES.values() if asked is type(request))
