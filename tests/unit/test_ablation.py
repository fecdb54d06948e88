"""The ablation tables: rows that differ in what the paper varies, figures from the sites' sums, and going on."""

from __future__ import annotations

import csv
import json

import pytest

from coordinator_runs import SMALL, grid_of, three_sites
from fourdvq.config import to_plain
from fourdvq.errors import ConfigError
from fourdvq_server.ablation import (
    ABLATION_STAGES,
    CONTROLS,
    TABLE_1,
    TABLE_3,
    TABLES,
    Row,
    experiment_of,
    run_rows,
    write_table,
)
from fourdvq_server.app import RunOptions, new_run, run_experiment
from fourdvq_server.experiment import compose, flatten
from fourdvq_server.project import Project
from fourdvq_server.store import open_store

FAST = (*SMALL, "federation.rounds=1", "federation.ode_rounds=1")


def experiments(table: int, *more: str) -> dict:
    return {row.preset: experiment_of(table, row, (*FAST, *more), demo=True) for row in TABLES[table]}


class Runner:
    """Runs a row over sites in memory; remembers which, and can be told to die at one."""

    def __init__(self, project: Project, dies_at: str = "") -> None:
        self.project, self.dies_at, self.ran = project, dies_at, list[str]()

    def __call__(self, experiment, name: str) -> None:
        self.ran.append(name)
        if not (self.project.runs / name).is_dir():
            new_run(self.project, experiment, name=name)
        if name == self.dies_at:
            raise KeyboardInterrupt
        with grid_of(three_sites()) as grid:
            run_experiment(grid, self.project, name, RunOptions(approval_wait_s=1.0, stages=ABLATION_STAGES))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    project = Project(tmp_path_factory.mktemp("ablation"))
    runner = Runner(project, dies_at=TABLE_1[2].run_name())
    with pytest.raises(KeyboardInterrupt):
        run_rows(project, 1, experiments(1), runner, lambda _: None)
    again = Runner(project)
    rows = run_rows(project, 1, experiments(1), again, lambda _: None)
    return project, runner.ran, again.ran, rows


def test_a_table_that_was_stopped_goes_on_with_the_row_that_it_was_at(finished):
    _, first, second, _ = finished
    names = [row.run_name() for row in TABLE_1]
    assert (first, second) == (names[:3], names[2:])


def test_figures_are_the_means_over_all_sites_with_the_papers_beside_them(finished):
    project, _, _, rows = finished
    proposed = next(row for row in rows if row["preset"] == "table1_proposed")
    groups = open_store(project.runs / proposed["run"]).stage("validate").result["groups"]["all"]
    stored = {(r["row"], r["metric"]): r for r in groups}
    assert proposed["extrapolation_mse"] == stored["model", "extrapolation/mse/lung"]["mean"]
    assert proposed["extrapolation_mse_n"] == stored["model", "extrapolation/mse/lung"]["n"]
    assert (proposed["paper_extrapolation_mse"], proposed["paper_interpolation_psnr"]) == (0.019, 17.387)


def test_the_controls_stand_below_the_four_variants(finished):
    rows = finished[3]
    assert [row["row"] for row in rows[:4]] == [row.label for row in TABLE_1]
    controls = {f"control: {name.replace('_', ' ')}" for name in CONTROLS} - {"control: population change"}
    assert {row["row"] for row in rows[4:]} == controls  # sites in memory send no population row


def test_nothing_is_run_again_when_all_rows_are_finished_and_other_settings_are_refused(finished):
    project, *_ = finished
    runner = Runner(project)
    run_rows(project, 1, experiments(1), runner, lambda _: None)
    assert runner.ran == []
    with pytest.raises(ConfigError, match="E_EXISTS"):
        run_rows(project, 1, experiments(1, "seed=9"), runner, lambda _: None)
    assert runner.ran == []


def test_the_written_table_holds_every_row_and_column(finished, tmp_path):
    rows = finished[3]
    as_csv, as_json = write_table(tmp_path, 1, rows)
    with as_csv.open(newline="") as stream:
        read = list(csv.DictReader(stream))
    assert [r["row"] for r in read] == [row["row"] for row in rows]
    assert float(read[1]["extrapolation_mse"]) == rows[1]["extrapolation_mse"]
    assert read[-1]["paper_extrapolation_mse"] == ""
    assert json.loads(as_json.read_text())["rows"] == rows


@pytest.mark.parametrize("table", [1, 3])
def test_over_synthetic_hospitals_rows_differ_in_what_the_paper_varies_and_in_their_name(table):
    plans = {name: flatten(to_plain(e.plan)) for name, e in experiments(table).items()}
    first = next(iter(plans.values()))
    for plan in plans.values():
        differs = {key for key in plan if plan[key] != first.get(key)}
        allowed = {"temporal.skip", "temporal.encoder", "temporal.mask_prob"}
        if table == 3:
            allowed = {"model.n_codes", "model.compression", "vqgan.lr"}
        assert differs <= allowed | {"name"}


def test_over_synthetic_hospitals_table_1_is_the_papers_latent_ode_at_the_demos_size():
    plan = experiments(1)["table1_proposed"].plan
    assert (plan.temporal.projector, plan.temporal.anchor, plan.temporal.solver) == ("paper", "paper", "dopri5")
    assert not plan.temporal.lung_context
    assert plan.ode.lambda_drift == 0.0
    small = compose(FAST).plan
    assert (plan.temporal.hidden, plan.model.size) == (small.temporal.hidden, small.model.size)


def test_over_a_real_federation_a_row_is_its_preset():
    row = TABLE_3[4]
    plan = experiment_of(3, row, ("federation.rounds=7",), demo=False).plan
    assert (plan.name, plan.model.compression, plan.federation.rounds) == ("table3_r8", 8, 7)


def test_the_learning_rates_of_table_3_keep_their_ratio():
    found = {name: e.plan.vqgan.lr for name, e in experiments(3).items()}
    assert found["table3_lr1e4"] == pytest.approx(found["table3_chosen"] / 3)


def test_a_tables_row_has_a_name_that_a_run_may_have():
    names = [row.run_name() for rows in TABLES.values() for row in rows]
    assert len(set(names)) == 9
    assert Row("table1_x_y", "", ()).run_name() == "ablate-table1-x-y"
