"""Scores of predicted scans on patients held out, with every control row beside the model. Source: evaluation page.

Target scans only, against the real prepared scan (never its autoencoded version), in the baseline's lung mask, whole
volume as well. `persistence` is the last given scan at or before the target's time: what a person would carry forward.
Nothing here can be tuned on the scored scans: no blending, no scale, no choice.

Modes: `extrapolation` gives the first two scans and asks for the later ones (as many as
`plan.evaluation.times_per_patient`), `interpolation` gives the first and the last and asks for those between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fourdvq.data.datasets import Acquisition, PreparedPatient, load_acquisition, load_lung, load_x01
from fourdvq.errors import ConfigError
from fourdvq.evaluation.changes import change_metrics, correlation
from fourdvq.evaluation.levels import level_metrics
from fourdvq.evaluation.rows import CODE_ROWS, ROWS, Bench, Case, Forecaster, code_shares
from fourdvq.evaluation.summary import RowSums, combine, sums_of
from fourdvq.generation import WorldModel, base_index, check_world, encode_given, evaluating
from fourdvq.plan import GIVEN_FOR_EXTRAPOLATION, Plan
from fourdvq.training.seeds import generator

MODES = ("extrapolation", "interpolation")
THIN_MM = 1.5  # slices up to this are thin; judgement


@dataclass(frozen=True)
class LongitudinalPatient:
    """A held-out patient: years (T,) since scan 1, `scan(i)` (1, D, H, W) x01, lung (D, H, W) bool of scan 1.

    `acquired` tells how each scan was taken; empty where nothing is known of it.
    """

    pseudonym: str
    years: tuple[float, ...]
    scan: Callable[[int], Tensor]
    lung: Tensor
    acquired: tuple[Acquisition, ...] = ()


@dataclass(frozen=True)
class PatientScore:
    """One value of one patient. It stays at the site; only sums over patients leave."""

    row: str
    metric: str
    value: float


def longitudinal(patient: PreparedPatient, window_hu: tuple[float, float]) -> LongitudinalPatient:
    """A prepared patient as the evaluation reads it."""
    scans = patient.scans
    known = [load_acquisition(scan) for scan in scans]
    return LongitudinalPatient(
        pseudonym=patient.pseudonym,
        years=tuple(scan.years for scan in scans),
        scan=lambda i: load_x01(scans[i], window_hu),
        lung=load_lung(scans[0]),
        acquired=() if None in known else tuple(a for a in known if a),
    )


def score_trajectories(
    world: WorldModel,
    patients: Iterable[LongitudinalPatient],
    plan: Plan,
    *,
    modes: Sequence[str] | None = None,
    population_rate: Tensor | None = None,
    forecasters: Mapping[str, Forecaster] | None = None,
) -> list[RowSums]:
    """Sums over patients of every row and metric, ready to be added to those of other sites.

    `modes` defaults to the plan's. `population_rate` (c,) adds the row `population_change`; `forecasters` adds other
    people's models by name, scored exactly as ours. Patients with too few scans for a mode are left out of it; how
    many took part, and with how many scans, is the row `cohort`. Raises ModelError E_TOKENIZER if the world's two
    networks do not belong together.
    """
    check_world(world)
    sums: list[RowSums] = []
    for patient in patients:
        for mode in modes or plan.evaluation.modes:
            scores = score_patient(
                world, patient, plan, mode=mode, population_rate=population_rate, forecasters=forecasters
            )
            sums += [sums_of(score.row, score.metric, [score.value]) for score in scores]
    return combine(sums)


def score_patient(
    world: WorldModel,
    patient: LongitudinalPatient,
    plan: Plan,
    *,
    mode: str = "extrapolation",
    population_rate: Tensor | None = None,
    forecasters: Mapping[str, Forecaster] | None = None,
) -> list[PatientScore]:
    """All values of one patient in one mode; empty if the patient has too few scans for it."""
    case = case_of(patient, plan, mode)
    if case is None:
        return []
    predictions = predict_rows(world, case, plan.seed, population_rate=population_rate, forecasters=forecasters or {})
    shares = code_scores(world, case, plan.seed, population_rate=population_rate)
    pooled = predictions.pop("paper_pooled")
    scores = [PatientScore("cohort", f"{mode}/pairs", len(case.targets))]
    values = {row: _level_values(volumes, case.targets, case, plan) for row, volumes in predictions.items()}
    for row, volumes in predictions.items():
        scores += _scores_of(row, mode, values[row], values["persistence"], case, plan)
        scores += _change_scores(row, mode, volumes, case, plan)
    scores += [PatientScore(row, f"{mode}/{name}/lung", value) for row, name, value in shares]
    everything = [*case.scans[:, 0], *case.targets]
    for name, series in _level_values(pooled, everything, case, plan).items():
        scores.append(PatientScore("paper_pooled", f"{mode}/{name}", sum(series) / len(series)))
    return scores


def case_of(patient: LongitudinalPatient, plan: Plan, mode: str) -> Case | None:
    """Which scans are given and which are targets; None if the patient has too few. ConfigError E_VALUE for a mode."""
    if mode not in MODES:
        raise ConfigError("E_VALUE", where="mode", found=mode, wanted=" or ".join(MODES))
    n = len(patient.years)
    given = list(range(GIVEN_FOR_EXTRAPOLATION)) if mode == "extrapolation" else [0, n - 1]
    targets = [i for i in range(1, n) if i not in given][: plan.evaluation.times_per_patient]
    if n <= GIVEN_FOR_EXTRAPOLATION or not targets:
        return None
    return Case(
        pseudonym=patient.pseudonym,
        years_given=tuple(patient.years[i] for i in given),
        scans=torch.stack([patient.scan(i) for i in given]),
        years=tuple(patient.years[i] for i in targets),
        targets=tuple(patient.scan(i)[0] for i in targets),
        lung=patient.lung.bool(),
        strata=tuple(acquisition_strata(patient, given, i) for i in targets),
    )


def acquisition_strata(patient: LongitudinalPatient, given: Sequence[int], target: int) -> tuple[str, ...]:
    """Of what kind the pair of a target and the scan that a copy of it would be is: its scanner, and its slices.

    `scanner-<maker>` where both are of one maker, else `scanner-changed`; `slices-thin` where both are at most
    `THIN_MM`, else `slices-thick`. Nothing where nothing is known.
    """
    if not patient.acquired:
        return ()
    base = given[base_index(patient.years[target], [patient.years[i] for i in given])]
    pair = [patient.acquired[i] for i in (base, target)]
    slices = "slices-thin" if max(a.thickness_mm for a in pair) <= THIN_MM else "slices-thick"
    makers = {a.maker for a in pair}
    if "" in makers:
        return (slices,)
    return ("scanner-" + (makers.pop().replace(" ", "-") if len(makers) == 1 else "changed"), slices)


@torch.inference_mode()
def predict_rows(
    world: WorldModel,
    case: Case,
    seed: int,
    *,
    population_rate: Tensor | None = None,
    forecasters: Mapping[str, Forecaster],
) -> dict[str, list[Tensor]]:
    """Predicted volumes x01 (D, H, W) of every row, one for each target; in `paper_pooled` the given scans come first.

    Raises ConfigError E_VALUE if a forecaster takes the name of one of our rows.
    """
    taken = sorted(set(forecasters) & {*ROWS, "paper_pooled", "cohort"})
    if taken:
        raise ConfigError("E_VALUE", where="forecasters", found=taken[0], wanted="a name that is not one of our rows")
    with evaluating(world):
        bench = Bench(world, case, generator(seed, "noise-control", case.pseudonym), population_rate)
        predictions = {name: row(bench) for name, row in ROWS.items()}
    for name, forecast in forecasters.items():
        predictions[name] = list(forecast(case.scans, case.years_given, case.years, case.lung))
    return {name: volumes for name, volumes in predictions.items() if volumes is not None}


@torch.inference_mode()
def code_scores(
    world: WorldModel, case: Case, seed: int, *, population_rate: Tensor | None = None
) -> list[tuple[str, str, float]]:
    """(row, metric, value): how well the rows that predict codes know the shares of the codes in the lung.

    code_share_error         half the sum of absolute differences of the shares, 0 to 1
    code_change_correlation  over the codes, of the predicted with the true change of share since the last scan; what
                             never changes has none
    """
    found = []
    with evaluating(world):
        bench = Bench(world, case, generator(seed, "codes", case.pseudonym), population_rate)
        scans = [encode_given(world, target[None, None], [0.0], case.lung).z[0] for target in case.targets]
        true, last = code_shares(bench, torch.stack(scans)), code_shares(bench, bench.given.z[bench.bases])
        for row, codes in CODE_ROWS.items():
            z = codes(bench)
            if z is not None:
                ours = code_shares(bench, z)
                errors = [0.5 * float((a - b).abs().sum()) for a, b in zip(ours, true, strict=True)]
                found.append((row, "code_share_error", sum(errors) / len(errors)))
                pairs = zip(ours, true, last, strict=True)
                known = [correlation((a - c).numpy(), (b - c).numpy()) for a, b, c in pairs]
                defined = [value for value in known if value is not None]
                if defined:
                    found.append((row, "code_change_correlation", sum(defined) / len(defined)))
    return found


def _level_values(
    volumes: Sequence[Tensor], targets: Sequence[Tensor], case: Case, plan: Plan
) -> dict[str, list[float]]:
    """`name/region` to one value per volume."""
    values: dict[str, list[float]] = {}
    for volume, target in zip(volumes, targets, strict=True):
        for region, mask in (("lung", case.lung), ("whole", None)):
            for name, value in level_metrics(volume, target, mask, plan.window_hu).items():
                values.setdefault(f"{name}/{region}", []).append(value)
    return values


def _scores_of(
    row: str,
    mode: str,
    values: Mapping[str, list[float]],
    copied: Mapping[str, list[float]],
    case: Case,
    plan: Plan,
) -> list[PatientScore]:
    """Means over the patient's targets, with gains over copying beside them.

    In the lung also for each horizon bin, apart for lungs whose true density rises fast and slowly, and by scanner and
    slice thickness.
    """
    bins: dict[str, list[int]] = {"": list(range(len(case.targets)))}
    for i, year in enumerate(case.years):
        base = base_index(year, case.years_given)
        ahead = year - case.years_given[base]
        bins.setdefault("/" + horizon_label(ahead, plan.evaluation.horizon_bins_years), []).append(i)
        rise = _mean_hu(case.targets[i], case, plan) - _mean_hu(case.scans[base, 0], case, plan)
        for stratum in case.strata[i]:
            bins.setdefault("/" + stratum, []).append(i)
        bins.setdefault("/fast" if rise > plan.evaluation.fast_hu_per_year * ahead else "/slow", []).append(i)
    scores = []
    for suffix, members in bins.items():
        chosen = {name: series for name, series in values.items() if not suffix or name.endswith("/lung")}
        means = {name: _mean(series, members) for name, series in chosen.items()}
        for region in ("lung", "whole") if not suffix else ("lung",):
            copy_mse, copy_psnr = (_mean(copied[f"{name}/{region}"], members) for name in ("mse", "psnr"))
            # Two equal scans leave nothing to gain: skill is then undefined, and the patient is left out of it.
            means[f"skill/{region}"] = 1 - means[f"mse/{region}"] / copy_mse if copy_mse > 0 else math.nan
            means[f"psnr_gain/{region}"] = means[f"psnr/{region}"] - copy_psnr if copy_mse > 0 else math.nan
        scores += [PatientScore(row, f"{mode}/{name}{suffix}", value) for name, value in means.items()]
    return scores


def _change_scores(row: str, mode: str, volumes: Sequence[Tensor], case: Case, plan: Plan) -> list[PatientScore]:
    found: dict[str, list[float]] = {}
    for volume, target, year in zip(volumes, case.targets, case.years, strict=True):
        last = case.scans[base_index(year, case.years_given), 0]
        for name, value in change_metrics(volume, last, target, case.lung).items():
            found.setdefault(name, []).append(value)
        density = abs(_mean_hu(volume, case, plan) - _mean_hu(target, case, plan))
        found.setdefault("density_error_hu", []).append(density)
    return [PatientScore(row, f"{mode}/{name}/lung", sum(series) / len(series)) for name, series in found.items()]


def horizon_label(years: float, bins: Sequence[float]) -> str:
    """The bin of a horizon, such as `0-0.5`, `0.5-1` (upper end included) or `2+`."""
    edges = [0.0, *bins]
    for low, high in zip(edges, bins, strict=False):
        if years <= high:
            return f"{low:g}-{high:g}"
    return f"{edges[-1]:g}+"


def _mean_hu(volume: Tensor, case: Case, plan: Plan) -> float:
    """Mean HU of the lung: with the lung's volume, its tissue mass."""
    low, high = plan.window_hu
    return float(volume.cpu()[case.lung].double().mean()) * (high - low) + low


def _mean(series: Sequence[float], members: Sequence[int]) -> float:
    return sum(series[i] for i in members) / len(members)
