"""Which series of a study to use: every candidate gets a score with words, and a person's choice wins over all of them.

Hard filters come first (geometry, coverage, thickness, not breathed out), then: thin, inspiration, largest lung, the
kernel class that the patient's visits share, no contrast, most slices. A study in which every candidate fails a filter
still has a best one: preparation then refuses it by name.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fourdvq.data.dicom import FolderScan, SeriesCandidate, scan_files, scan_folder
from fourdvq.data.limits import shown
from fourdvq.data.technical import breath_of, kernel_class
from fourdvq.errors import ConfigError, VolumeError

NONE = "none"  # said by a person instead of a series key: the study is left out
LUNG_TIE = 0.95  # within 5 % of the largest two volumes are the same breath in other words
Estimate = Callable[[SeriesCandidate], float | None]


@dataclass(frozen=True)
class ChoiceRules:
    """The hard filters, as in the preprocessing profile, and what counts as thin."""

    min_coverage_mm: float = 180.0
    max_thickness_mm: float = 2.5
    thin_mm: float = 1.5


@dataclass(frozen=True)
class Judged:
    """A candidate with its score (compared from the left, larger is better) and a word for each criterion."""

    candidate: SeriesCandidate
    score: tuple[int, ...]
    words: Mapping[str, str]
    reject: str = ""  # code and reason of the first hard filter it fails


@dataclass(frozen=True)
class Choice:
    """All candidates of a study, the best first, and the one to use: the first, or the one a person named."""

    judged: tuple[Judged, ...]
    used: SeriesCandidate
    by: str = "score"


@dataclass(frozen=True)
class _Look:
    """What is known about a candidate before it is compared with others."""

    candidate: SeriesCandidate
    thickness: float | None
    breath: str
    kernel: str
    reject: str
    lung_ml: float | None = None
    filters: tuple[int, ...] = field(default=())


def choose_series(
    studies: Sequence[Sequence[SeriesCandidate]],
    *,
    rules: ChoiceRules | None = None,
    estimate: Estimate | None = None,
    overrides: Mapping[str, str] | None = None,
) -> list[Choice]:
    """The choice for each of one patient's studies.

    `estimate` gives the lung volume in ml, and is asked only where candidates tie before it. `overrides` maps study
    keys to series keys; studies it does not name are chosen by score. Raises ConfigError E_VALUE for a series key that
    its study does not have.
    """
    looks = [[_look(c, rules or ChoiceRules()) for c in study] for study in studies]
    if estimate is not None:
        looks = [_with_lungs(study, estimate) for study in looks]
    kernel = _shared_kernel(looks)
    result = []
    for study in looks:
        judged = tuple(sorted((_judged(x, study, kernel) for x in study), key=_order))
        named = (overrides or {}).get(judged[0].candidate.study_key)
        used = judged[0].candidate if named is None else _named(judged, named)
        result.append(Choice(judged, used, "score" if named is None else "series.yaml"))
    return result


def best_series(
    folder: Path, *, study_key: str = "", series_key: str = "", files: Sequence[Path] = ()
) -> SeriesCandidate:
    """The series of a folder (of one study, or exactly one, if named) to use; `files` saves looking at all others.

    Raises VolumeError E_CORRUPT for a file that cannot be read, E_FILE if the named series is gone, and E_NOTCT,
    E_DERIVED, E_ARCHIVE or E_EMPTY if there is no series, by what was there instead.
    """
    found = scan_files(files) if files else scan_folder(folder)
    if found.unreadable:
        # A damaged header does not say which series it belongs to; leaving it out could lose a slice.
        number = len(found.unreadable)
        raise VolumeError("E_CORRUPT", where=shown(found.unreadable[0]), found=f"{number} damaged files")
    candidates = [c for c in found.candidates if study_key in ("", c.study_key)]
    if not candidates:
        raise nothing_found(found, folder)
    if series_key:
        for candidate in candidates:
            if candidate.series_key == series_key:
                return candidate
        fix = "run `fourdvq-client scan` again"
        raise VolumeError("E_FILE", where=shown(folder), found=f"no {series_key}", fix=fix)
    return choose_series([candidates])[0].used


def nothing_found(found: FolderScan, folder: Path) -> VolumeError:
    """The error that says what a folder without a series holds instead."""
    code = next((c for c in ("E_NOTCT", "E_DERIVED", "E_ARCHIVE") if found.skipped[c]), "E_EMPTY")
    counts = ", ".join(f"{n} x {reason}" for reason, n in sorted(found.skipped.items()))
    return VolumeError(code, where=shown(folder), found=counts or "no file")


def check_overrides(overrides: Mapping[str, str], studies: Sequence[Sequence[SeriesCandidate]], where: str) -> None:
    """Raise ConfigError E_KEY for a study that is not there and E_VALUE for a series that its study does not have.

    `NONE` instead of a series leaves the study out.
    """
    known: dict[str, set[str]] = {}
    for candidate in (c for study in studies for c in study):
        known.setdefault(candidate.study_key, set()).add(candidate.series_key)
    for study_key, series_key in overrides.items():
        if study_key not in known:
            close = difflib.get_close_matches(study_key, list(known), n=1)
            fix = f"did you mean {close[0]}?" if close else "remove the line, or take a study from candidates.csv"
            raise ConfigError("E_KEY", where=where, found=study_key, wanted="a study of candidates.csv", fix=fix)
        if series_key not in known[study_key] and series_key != NONE:
            raise _no_such_series(series_key, sorted(known[study_key]), f"{where}: {study_key}")


def _look(candidate: SeriesCandidate, rules: ChoiceRules) -> _Look:
    head = candidate.first
    breath = breath_of(head)
    thickness = head.thickness
    covered = candidate.coverage_mm
    thick = thickness is None or thickness > rules.max_thickness_mm * (1 + 1e-6)
    filters = {
        "E_GEOMETRY: no position, orientation or pixel spacing": not candidate.has_geometry,
        f"E_FOV: {len(candidate.slices)} slices": len(candidate.slices) < 3,
        f"E_FOV: {covered:.0f} mm of {rules.min_coverage_mm:g} mm": covered < rules.min_coverage_mm,
        f"E_THICK: {_mm(thickness)}, above {rules.max_thickness_mm:g} mm": thick,
        "V_EXPIR: breathed out, by its name": breath == "expiration",
    }
    reject = next((reason for reason, fails in filters.items() if fails), "")
    thin = int(thickness is not None and thickness <= rules.thin_mm * (1 + 1e-6))
    passed = tuple(int(not fails) for fails in filters.values())
    return _Look(candidate, thickness, breath, kernel_class(head.kernel), reject, filters=(*passed, thin))


def _before_lung(look: _Look) -> tuple[int, ...]:
    return *look.filters, int(look.breath == "inspiration")


def _with_lungs(study: list[_Look], estimate: Estimate) -> list[_Look]:
    best = max(_before_lung(x) for x in study)
    tied = [x for x in study if _before_lung(x) == best]
    if len(tied) < 2:
        return study
    return [replace(x, lung_ml=estimate(x.candidate)) if x in tied else x for x in study]


def _is_largest(look: _Look, study: Sequence[_Look]) -> int:
    known = [x.lung_ml for x in study if x.lung_ml is not None]
    return int(bool(known) and look.lung_ml is not None and look.lung_ml >= LUNG_TIE * max(known))


def _shared_kernel(looks: Sequence[Sequence[_Look]]) -> str:
    """The kernel class that most visits could use without giving up anything more important; soft if it is a draw."""
    visits: Counter[str] = Counter()
    for study in looks:
        best = max((*_before_lung(x), _is_largest(x, study)) for x in study)
        visits.update({x.kernel for x in study if (*_before_lung(x), _is_largest(x, study)) == best})
    return max(("soft", "sharp", "unknown"), key=lambda kind: visits[kind])


def _judged(look: _Look, study: Sequence[_Look], kernel: str) -> Judged:
    head, slices = look.candidate.first, len(look.candidate.slices)
    largest, alike = _is_largest(look, study), int(look.kernel == kernel)
    score = (*_before_lung(look), largest, alike, int(look.kernel == "soft"), int(not head.contrast), slices)
    words = {
        "thickness": f"{_mm(look.thickness)}{', thin' if look.filters[-1] else ''}",
        "breath": look.breath,
        "lung": "not compared" if look.lung_ml is None else f"about {round(look.lung_ml, -1):.0f} ml",
        "kernel": f"{look.kernel}{', as at most visits' if alike else ''}",
        "contrast": "yes" if head.contrast else "no",
        "slices": str(slices),
    }
    return Judged(look.candidate, score, words, look.reject)


def _order(judged: Judged) -> tuple[tuple[int, ...], str]:
    # The key settles a draw, so that the order of files never does.
    return tuple(-n for n in judged.score), judged.candidate.series_key


def _named(judged: Sequence[Judged], series_key: str) -> SeriesCandidate:
    for j in judged:
        if j.candidate.series_key == series_key:
            return j.candidate
    raise _no_such_series(series_key, sorted(j.candidate.series_key for j in judged), judged[0].candidate.study_key)


def _no_such_series(found: str, known: Sequence[str], where: str) -> ConfigError:
    return ConfigError("E_VALUE", where=where, found=found, wanted="one of " + ", ".join([*known, NONE]))


def _mm(thickness: float | None) -> str:
    return "no thickness" if thickness is None else f"{thickness:g} mm"
