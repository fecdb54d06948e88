"""What travels in one survival analysis: requests (down) and sums (up), as frozen dataclasses of named numpy arrays.

Every answer is a `Sums`: it defines `+`, and the sum of the sites' answers is the answer of their union. A field says
its dtype and the names of its axes; none of the axes is "patients" or "death times of a site", so no message can hold
a row. Axes: B codes, M = B + 1 model columns (the last one is the model of the covariates alone), q covariates,
p = 1 + q parameters (biomarker first), P = p(p+1)/2 (upper triangle row by row), A analyses (replicates times folds),
m active models (in the order of `active.nonzero()`), k chosen codes, l = k + q parameters of the model of the chosen
codes, G points of a public time grid, s versions of the same patients' codes (real, generated, carried).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fourdvq.survival.forms import F64 as F64
from fourdvq.survival.forms import I64 as I64
from fourdvq.survival.forms import MOMENT_BITS, ONE, SUM_BITS, U8, Axes
from fourdvq.survival.forms import Bool as Bool
from fourdvq.survival.forms import Message as Message
from fourdvq.survival.forms import Sums as Sums
from fourdvq.survival.forms import array_fields as array_fields
from fourdvq.survival.forms import combine as combine
from fourdvq.wire.forms import OptionalRunId, Sha256, Word

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
    source: Literal["real", "generated", "carried", "paired"] = "real"  # paired: all of them, for the same patients
    feature: Literal["level", "change"] = "level"
    versions: int = 1  # equal parts that the table's codes consist of, one a source


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
    at time 0) and end at the others: how far must a bin reach to be accepted? `group`: whose grid it is."""

    edges: Annotated[F64, Axes(("G",))]
    exact: bool = False
    from_start: bool = False
    group: Literal["all", "low", "high"] = "all"


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
class GroupRequest(Message):
    """Divide the patients, once in an analysis: high is who has a frozen risk z.beta above 0, that of the training
    mean. Grid, curves, log-rank test and calibration are then of these two groups."""

    beta: Annotated[F64, Axes(("p",))]  # the biomarker's first, in the units of the scale


@dataclass(frozen=True)
class KmRequest(Message):
    """Deaths and patients at risk on the agreed grid of the group."""

    group: Literal["all", "low", "high"] = "all"


@dataclass(frozen=True)
class LogRankRequest(Message):
    """Observed minus expected deaths, within the site, of the group of high risk."""


@dataclass(frozen=True)
class CalibrationRequest(Message):
    """The survival that the frozen model expects at every edge of the group's agreed grid, summed over the group."""

    group: Literal["low", "high"] = "low"


@dataclass(frozen=True)
class PairedRequest(Message):
    """Comparable pairs under the frozen model for every version of the patients' codes, with the second moments that
    an interval needs."""

    beta: Annotated[F64, Axes(("p",))]


@dataclass(frozen=True)
class ResultMessage(Message):
    """What the sites are told at the end: the model of the selected codes and the covariates, never totals. Estimates
    are per SD; mean and SD are the broadcast ones."""

    codes: Annotated[I64, Axes(("k",))]
    beta: Annotated[F64, Axes(("l",))]
    se: Annotated[F64, Axes(("l",))]
    p: Annotated[F64, Axes(("l",))]
    mean: Annotated[F64, Axes(("l",))]
    sd: Annotated[F64, Axes(("l",))]


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


@dataclass(frozen=True)
class CalibrationSums(Sums):
    """Patients of the group, and their expected survival, summed, at every edge."""

    patients: Annotated[I64, ONE]
    expected: Annotated[F64, Axes(("G",), SUM_BITS)]


@dataclass(frozen=True)
class PairedSums(Sums):
    """`credit`: twice the concordant plus the tied pairs of each version. `products`: upper triangle, summed over
    patients, of the products of (a patient's credit in each version, a patient's pairs)."""

    patients: Annotated[I64, ONE]
    deaths: Annotated[I64, ONE]
    pairs: Annotated[I64, ONE]
    credit: Annotated[I64, Axes(("s",))]
    products: Annotated[I64, Axes(("K2",))]


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
    "cox_groups": (GroupRequest, Receipt),
    "cox_km": (KmRequest, KmSums),
    "cox_logrank": (LogRankRequest, LogRankSums),
    "cox_calibration": (CalibrationRequest, CalibrationSums),
    "cox_paired": (PairedRequest, PairedSums),
    "cox_result": (ResultMessage, Receipt),
}


def answer_type(request: Message, baseline: str) -> type[Sums]:
    """The class of the answer to a request in an analysis with this baseline hazard."""
    if isinstance(request, CoxRequest) and baseline == "shared":
        return RiskSums
    return next(sums for asked, sums in MESSAGES.values() if asked is type(request))
