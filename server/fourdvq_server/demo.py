"""The embedded federation: two hospitals and an external one with synthetic lungs, the whole row of stages, here.

Everything is done as at real sites, with their folders, policies and guards; only the network is left out. The site's
side is loaded by name through the entry point `fourdvq.apps: client`, never imported.

    <out>/data/<site>/          synthetic scans, clinical.csv, scans.csv
    <out>/sites/<site>/         a site folder as `fourdvq-client init` makes it
    <out>/coordinator/          runs/, releases/, mlflow.db
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from fourdvq import __version__, console
from fourdvq.config import sha256_of
from fourdvq.errors import ConfigError, FourdvqError
from fourdvq.wire.messages import Role
from fourdvq_server.app import RunOptions, new_run, run_experiment
from fourdvq_server.experiment import Experiment, compose
from fourdvq_server.local_grid import LocalGrid
from fourdvq_server.project import Project
from fourdvq_server.stages.table import STAGES, Stage
from fourdvq_server.store import open_store, read_json, write_json

_APPROVAL_WAIT_S = 60.0
_STATE = "demo.json"


@dataclass(frozen=True)
class DemoSite:
    """A synthetic hospital. Sizes and seeds differ, so sites differ as hospitals do."""

    name: str
    role: Role
    patients: int
    seed: int
    longitudinal: float  # share of patients with more than one scan; survival needs many with one


SITES = (
    DemoSite("leuven", "train", 34, 11, 0.45),
    DemoSite("southampton", "train", 28, 22, 0.45),
    DemoSite("external", "external", 8, 33, 1.0),
)
QUICK_SITES = (
    DemoSite("leuven", "train", 12, 11, 0.6),
    DemoSite("southampton", "train", 12, 22, 0.6),
    DemoSite("external", "external", 5, 33, 1.0),
)
QUICK_OVERRIDES = (
    "federation.rounds=2",
    "federation.local_steps=8",
    "federation.ode_rounds=1",
    "federation.ode_local_steps=8",
    "gan.start_step=12",
)
SCAN_SIZE = (32, 64, 64)  # voxels of a synthetic scan: finer than the grid of the demo, as real scans are
SCANS_PER_PATIENT = (2, 4)


@dataclass(frozen=True)
class DemoOptions:
    """What the verb's options say."""

    out: Path
    overrides: tuple[str, ...] = ()
    quick: bool = False
    pooled: bool = False
    processes: bool = False
    fresh: bool = False

    @property
    def sites(self) -> tuple[DemoSite, ...]:
        return QUICK_SITES if self.quick else SITES

    @property
    def all_overrides(self) -> tuple[str, ...]:
        chosen = () if any(o.startswith("experiment=") for o in self.overrides) else ("experiment=demo",)
        return (*chosen, *(QUICK_OVERRIDES if self.quick else ()), *self.overrides)


@dataclass(frozen=True)
class Folders:
    """Where the demo keeps things."""

    root: Path

    def data(self, site: str) -> Path:
        return self.root / "data" / site

    def site(self, site: str) -> Path:
        return self.root / "sites" / site

    @property
    def coordinator(self) -> Project:
        return Project(self.root / "coordinator")


def run_demo(options: DemoOptions) -> dict[str, Any]:
    """Prepare the sites, run the experiment, write reports and one trajectory; returns the JSON object of the verb.

    Raises ConfigError E_EXISTS if the folder holds a demo of other inputs and `fresh` is not set.
    """
    client = load_client()
    experiment = compose(options.all_overrides)
    folders = Folders(options.out.resolve())
    prepare(folders, options, experiment, client)
    roots = {site.name: folders.site(site.name) for site in options.sites}
    if options.processes:
        from fourdvq_server.processes import run_with_processes

        run, summary = run_with_processes(folders.coordinator, experiment, roots)
    else:
        run, summary = run_in_process(folders.coordinator, experiment, roots, client, "federated")
    result = {"run": run, **results_of(folders.coordinator, run, summary)}
    result["paths"] = write_results(folders, options, run, client)
    if options.pooled:
        result["pooled"] = run_pooled(folders, options, client)
    return result


def load_client() -> Any:
    """The site's side, by entry point. Raises FourdvqError E_UNSUPPORTED if the package is not installed whole."""
    found = [e for e in entry_points(group="fourdvq.apps") if e.name == "client"]
    if not found:
        raise FourdvqError("E_UNSUPPORTED", where="entry point fourdvq.apps: client", found="not installed")
    return found[0].load()


def prepare(folders: Folders, options: DemoOptions, experiment: Experiment, client: Any) -> None:
    """Synthetic scans and prepared site folders; what an earlier demo of the same inputs made is used again."""
    inputs = sha256_of(
        {
            "sites": options.sites,
            "size": SCAN_SIZE,
            "scans": SCANS_PER_PATIENT,
            "profile": experiment.plan.profile_sha256,
            "splits": experiment.plan.splits,
            "version": __version__,
        }
    )
    state = folders.root / _STATE
    if options.fresh:
        for part in ("data", "sites", "coordinator"):
            shutil.rmtree(folders.root / part, ignore_errors=True)
        state.unlink(missing_ok=True)
    known = read_json(state, {})
    if known and known["inputs"] != inputs:
        raise ConfigError(
            "E_EXISTS",
            where=str(folders.root),
            found="a demo with other sites, profile or version",
            wanted="the same inputs, or an empty folder",
            fix="add --fresh to start over, or choose another folder with --out",
        )
    done = set(known.get("done", ()))
    write_json(state, {"inputs": inputs, "done": sorted(done)})
    for site in options.sites:
        if site.name in done:
            console.note(f"{site.name}: prepared scans of an earlier demo are used")
            continue
        _prepare_site(folders, site, experiment, client)
        done.add(site.name)
        write_json(state, {"inputs": inputs, "done": sorted(done)})


def run_in_process(
    project: Project,
    experiment: Experiment,
    roots: Mapping[str, Path],
    client: Any,
    title: str,
    *,
    run: str = "",
    stages: tuple[Stage, ...] = STAGES,
) -> tuple[str, dict[str, Any]]:
    """One run over sites in this process, each with the role of its own policy; returns its name and summary.

    `run` names a run that is there already (it goes on), otherwise a new one is made.
    """
    project.runs.mkdir(parents=True, exist_ok=True)
    run = run or new_run(project, experiment)
    apps = {name: client.client_app(root, worker="inline") for name, root in roots.items()}

    def approve(sites: Sequence[str]) -> None:
        for site in sites:
            client.approve(roots[site], by="demo")

    with ExitStack() as stack:
        progress = stack.enter_context(_stage_progress(title))
        grid = stack.enter_context(LocalGrid(apps))
        options = RunOptions(on_unapproved=approve, approval_wait_s=_APPROVAL_WAIT_S, progress=progress, stages=stages)
        return run, run_experiment(grid, project, run, options)


def run_pooled(folders: Folders, options: DemoOptions, client: Any) -> dict[str, Any]:
    """The same experiment on the union of the training sites' data, with the same number of volumes in all."""
    trainers = [site.name for site in options.sites if site.role == "train"]
    root = folders.site("pooled")
    if not root.exists():
        client.merge_prepared(root, [folders.site(name) for name in trainers], "pooled")
    plan = compose(options.all_overrides).plan
    times = len(trainers)
    more = (
        f"vqgan.accumulate={plan.vqgan.accumulate * times}",
        f"ode.accumulate={plan.ode.accumulate * times}",
        "federation.quorum=1",
        f"name={plan.name}-pooled",
    )
    experiment = compose((*options.all_overrides, *more))
    roots = {"pooled": root}
    roots |= {site.name: folders.site(site.name) for site in options.sites if site.role == "external"}
    run, summary = run_in_process(folders.coordinator, experiment, roots, client, "pooled")
    return {"run": run, **results_of(folders.coordinator, run, summary)}


def results_of(project: Project, run: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Rounds, metrics per site and group, biomarkers and traffic of a finished run."""
    from fourdvq_server.summaries import means, sums_from

    store = open_store(project.runs / run)
    validated = store.stage("validate").result or {"sites": {}, "groups": {}, "tables": {}}
    return {
        "stages": summary["stages"],
        "rounds": {"vqgan": store.plan.federation.rounds, "ode": store.plan.federation.ode_rounds},
        "metrics": {
            site: {"role": part["role"], **means(sums_from(part["sums"]))} for site, part in validated["sites"].items()
        },
        "groups": validated["groups"],
        "tables": validated["tables"],
        "biomarkers": biomarkers_of(store.stage("survival").result),
        "bytes_down": summary["bytes_down"],
        "bytes_up": summary["bytes_up"],
    }


def biomarkers_of(result: Mapping[str, Any] | None) -> dict[str, Any]:
    """The selected codes, or why there are none."""
    facts = result or {"selected": [], "why": "the run has not reached the survival stage"}
    return {key: facts.get(key) for key in ("selected", "why", "withheld", "rounds", "analyses", "codes")}


def write_results(folders: Folders, options: DemoOptions, run: str, client: Any) -> dict[str, Any]:
    """Each site's own report, and one generated trajectory at the first training site."""
    paths: dict[str, Any] = {"reports": {}, "trajectory": {}}
    with console.progress("reports", len(options.sites) + 1) as advance:
        for site in options.sites:
            paths["reports"][site.name] = client.report(folders.site(site.name), run)
            advance(1, site.name)
        first = next(site for site in options.sites if site.role == "train")
        paths["trajectory"] = client.showcase(folders.site(first.name))
        advance(1, "trajectory")
    project = folders.coordinator
    paths["release"] = str(project.releases / run)
    paths["run"] = str(project.runs / run)
    survival_folder = project.runs / run / "stages" / "survival"
    made = [name for name in ("selection.csv", "selection.json") if (survival_folder / name).is_file()]
    paths["biomarkers"] = str(survival_folder / made[0]) if made else ""
    paths["mlflow"] = str(project.mlflow_db)
    paths["open_mlflow"] = f"fourdvq-server ui --workdir {project.root}"
    return paths


def _prepare_site(folders: Folders, site: DemoSite, experiment: Experiment, client: Any) -> None:
    data, root = folders.data(site.name), folders.site(site.name)
    # What a killed demo left half made would be taken for complete.
    for part in (data, root):
        shutil.rmtree(part, ignore_errors=True)
    with _counting(f"{site.name}: synthetic scans") as progress:
        client.make_phantom(
            data,
            site=site.name,
            patients=site.patients,
            seed=site.seed,
            size=SCAN_SIZE,
            longitudinal_share=site.longitudinal,
            scans_per_patient=SCANS_PER_PATIENT,
            workers=2,
            progress=progress,
        )
    client.create_site(
        root,
        site=site.name,
        role=site.role,
        template="demo",
        scans=data / "scans",
        clinical=data / "clinical.csv",
        scans_csv=data / "scans.csv",
        invitation=None,
        profile=experiment.profile_plain,
    )
    with _counting(f"{site.name}: preprocessing") as progress:
        client.preprocess(root, workers=2, progress=progress, decision="demo")


@contextmanager
def _counting(title: str) -> Iterator[Callable[[int, int], None]]:
    """A callback (done, total) that moves a progress line."""
    with ExitStack() as stack:
        state: dict[str, Any] = {"done": 0, "advance": None}

        def move(done: int, total: int) -> None:
            if state["advance"] is None:
                state["advance"] = stack.enter_context(console.progress(title, total))
            state["advance"](done - state["done"])
            state["done"] = done

        yield move


@contextmanager
def _stage_progress(title: str) -> Iterator[Callable[[str, int, int, str], None]]:
    """Stages as one bar; rounds appear as its text."""
    with ExitStack() as stack:
        state: dict[str, Any] = {"done": 0, "advance": None}

        def move(stage: str, done: int, total: int, text: str) -> None:
            if stage == "stages":
                if state["advance"] is None:
                    state["advance"] = stack.enter_context(console.progress(title, total))
                state["advance"](done - state["done"], text)
                state["done"] = done
            elif state["advance"] is not None:
                state["advance"](0, f"{stage} round {done} of {total}")

        yield move
