"""A survival analysis over three hospitals: their own guards and desks, real messages, simulated tables."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from lifelines import CoxPHFitter
from lifelines.statistics import proportional_hazard_test
from PIL import Image

from cox_sites import TOKENIZER, exchange_of, stage_context, survival_plan, table_sites
from fourdvq import console
from fourdvq.config import to_plain
from fourdvq.errors import Refused
from fourdvq.survival import PaperRule, Policy, SelectionRun, Settings
from fourdvq.survival.kaplan_meier import logrank_sums
from fourdvq.survival.local import drive
from fourdvq.survival.masking import encode, unmask_total
from fourdvq.survival.messages import CoxMoments, CoxSums, MomentsRequest
from fourdvq.survival.pictures import pictures_of
from fourdvq.training.vqgan import initial_model
from fourdvq.wire.masked import masked_sums
from fourdvq.wire.messages import COX_REPLIES, COX_TASKS, CoxKeysTask, CoxPeersTask, MaskedReply, RiskReply
from fourdvq_client.survival_model import read_model
from fourdvq_server.cli import app as server_cli
from fourdvq_server.federation_report import write_html
from fourdvq_server.local_grid import LocalGrid
from fourdvq_server.stages import survival
from fourdvq_server.stages.prognosis import prognosis
from fourdvq_server.store import open_store
from site_cases import envelope_of
from survival_data import TIGHT, cohorts

SIZES = (70, 60, 55)
RULE = to_plain(survival_plan().survival.rule) | {"max_p": 0.7, "min_c": 0.2}


@pytest.fixture
def three(tmp_path):
    plan = survival_plan(folds=3, rule=dataclasses.replace(survival_plan().survival.rule, **RULE))
    tables = cohorts(SIZES, codes=12, log_hr=0.5, seed=5)
    return tmp_path, plan, table_sites(tmp_path / "sites", tables, plan)


def federated(folder, sites, plan):
    with LocalGrid(sites, one_at_a_time=True) as grid:
        context = stage_context(folder / "coordinator", grid, sites, plan)
        return survival.select(context, exchange_of(context)), context


def in_one_process(sites, plan):
    """The same analysis without network and masks."""
    hello = survival.hello_of(_Named(plan), TOKENIZER, 1)
    run = SelectionRun(hello, Settings.under(Policy()), rule=PaperRule(**RULE), permutations=plan.survival.permutations)
    drive(run, [site.local_state() for site in sites.values()])
    return run.result()


class _Named:
    """Just what `hello_of` looks at."""

    def __init__(self, plan):
        self.plan, self.store = plan, type("Store", (), {"name": "r"})


def assert_same_table(ours, theirs, tolerance):
    assert ours["status"].tolist() == theirs["status"].tolist()
    for column in ("hr", "hr_low", "hr_high"):
        difference = np.log(ours[column]) - np.log(theirs[column])
        assert np.nanmax(np.abs(difference)) <= tolerance, column
    np.testing.assert_array_equal(ours["c"], theirs["c"])


def test_masked_sums_of_three_hospitals_give_the_unmasked_estimates(three):
    folder, plan, sites = three
    for site in sites.values():  # the steps of an analysis are no rounds of training
        site.facts.text = re.sub(r"max_rounds: \d+", "max_rounds: 1", site.facts.text)
    attempts, _ = federated(folder, sites, plan)
    (attempt,) = attempts
    reference = in_one_process(sites, plan)
    assert attempt.masked
    assert attempt.selection is not None
    assert attempt.selection.selected == reference.selected != ()
    assert_same_table(attempt.selection.table, reference.table, 1e-11)
    for site in sites.values():
        kinds = {kind for kind, _ in site.sent}
        assert kinds >= {"query.cox_keys", "query.cox_peers", "query.cox_eval", "query.cox_cindex", "query.cox_corr"}
        assert all(isinstance(r, MaskedReply) for kind, r in site.sent if kind in COX_REPLIES)


def test_one_hospitals_masked_answer_is_noise_and_only_the_sum_of_all_three_is_the_total(three):
    folder, plan, sites = three
    federated(folder, sites, plan)
    answers = [next(r for kind, r in site.sent if kind == "query.cox_eval") for site in sites.values()]
    parts = [masked_sums(answer, CoxSums) for answer in answers]
    for part in parts:
        words = part.arrays["gradient"].ravel()
        bits = np.unpackbits(words.view(np.uint8))
        assert abs(bits.mean() - 0.5) < 5 * 0.5 / np.sqrt(bits.size)
    total = unmask_total(parts)
    assert np.abs(total.gradient).max() < 1e3
    # Without the third answer the others stay noise: negative control of the same sum.
    two = {name: parts[0].arrays[name] + parts[1].arrays[name] for name in parts[0].arrays}
    assert np.abs(two["gradient"].view(np.int64) * 2.0**-40).max() > 1e3
    moments = [next(r for kind, r in site.sent if kind == "query.cox_moments") for site in sites.values()]
    state = next(iter(sites.values())).local_state()
    state.answer(survival.hello_of(_Named(plan), TOKENIZER, 1))
    own = encode(state.answer(MomentsRequest()), sites=3)
    hidden = masked_sums(moments[0], CoxMoments).arrays
    assert all((hidden[name] != own[name]).all() for name in own)


def test_a_hospital_lost_in_the_middle_ends_the_analysis_and_the_next_one_has_fresh_masks(three):
    folder, plan, sites = three
    lost = list(sites)[1]
    with LocalGrid(sites, one_at_a_time=True) as grid:
        first = next(iter(sites.values()))

        def cut():
            if sum(kind == "query.cox_eval" for kind, _ in first.sent) == 2:
                grid.offline.add(lost)

        first.before["query.cox_eval"] = cut
        context = stage_context(folder / "coordinator", grid, sites, plan)
        attempts = survival.select(context, exchange_of(context))
    assert [sorted(a.failed) for a in attempts] == [[lost], []]
    assert attempts[1].sites == [name for name in sites if name != lost]
    assert attempts[1].selection is not None
    assert attempts[1].masked
    keys = [bytes(r.public_key) for kind, r in first.sent if kind == "query.cox_keys"]
    assert len(set(keys)) == 2
    left = {name: site for name, site in sites.items() if name != lost}
    assert_same_table(attempts[1].selection.table, in_one_process(left, plan).table, 1e-11)


def test_a_shared_baseline_over_the_network_is_the_one_in_process_and_carries_a_warning(three):
    folder, plan, sites = three
    spec = dataclasses.replace(plan.survival, baseline="shared")
    plan = dataclasses.replace(plan, survival=spec)
    sites = table_sites(folder / "shared", [site.table for site in sites.values()], plan)
    attempts, _ = federated(folder, sites, plan)
    assert attempts[-1].failed == {}
    facts = survival._facts(plan, attempts)
    assert facts["warnings"][0] == survival.SHARED
    assert_same_table(attempts[-1].selection.table, in_one_process(sites, plan).table, 1e-9)
    alone = table_sites(folder / "one", [next(iter(sites.values())).table], plan)
    attempts, _ = federated(folder / "alone", alone, plan)
    sent = [r for kind, r in next(iter(alone.values())).sent if kind == "query.cox_eval"]
    assert sent
    assert all(isinstance(r, RiskReply) for r in sent)


def test_a_shared_baseline_that_the_plan_does_not_have_is_refused(three):
    _, plan, sites = three
    site = next(iter(sites.values()))
    hello = dataclasses.replace(survival.hello_of(_Named(plan), TOKENIZER, 1), baseline="shared")
    task = COX_TASKS["query.cox_hello"](1, TOKENIZER, hello)
    with pytest.raises(Refused, match="baseline"):
        site.desk.answer(task, envelope_of(task, 1), plan, site.facts.policy().rules)


def after_selection(folder, sites, plan, codes):
    """Model and risk groups of these codes over the sites, as stage survival asks for them."""
    with LocalGrid(sites, one_at_a_time=True) as grid:
        context = stage_context(folder / "further", grid, sites, plan)
        exchange = exchange_of(context)
        hello = survival.hello_of(context, TOKENIZER, len(sites))
        return prognosis(exchange, hello, codes, sorted(sites))


def test_model_risk_groups_and_proportional_hazards_over_masked_sums_are_those_of_the_rows(three):
    folder, plan, sites = three
    sites = table_sites(folder / "large", cohorts((150, 140, 130), codes=6, true=3, log_hr=0.5, seed=5), plan)
    found = after_selection(folder, sites, plan, (0, 2))
    assert found["ended"] == []
    rows = pd.concat(
        [
            pd.DataFrame(np.column_stack([s.table.X[:, [0, 2]], s.table.C]), columns=list("abxyz")).assign(
                t=s.table.t, e=s.table.e.astype(int), site=name
            )
            for name, s in sites.items()
        ],
        ignore_index=True,
    )
    model = found["model"]["coefficients"]
    assert [row["name"] for row in model] == ["code_0", "code_2", "age", "sex", "smoking"]
    sd, beta, mean = (np.array([row[key] for row in model]) for key in ("sd", "beta_per_sd", "mean"))
    scaled = rows.assign(**{c: rows[c] / s for c, s in zip("abxyz", sd, strict=True)})
    fitted = CoxPHFitter(penalizer=plan.survival.ridge / len(rows))
    fitted.fit(scaled, "t", "e", strata=["site"], fit_options=TIGHT)
    # Its penalty is on columns of exactly SD 1, ours on the SD rounded to three digits: hence the tolerance.
    np.testing.assert_allclose(beta, fitted.params_.to_numpy(), rtol=5e-3, atol=1e-4)
    tested = proportional_hazard_test(fitted, scaled, time_transform="log")
    np.testing.assert_allclose([row["ph_p"] for row in model], tested.p_value, rtol=0.03)
    groups = found["risk_groups"]
    high = (rows[list("abxyz")].to_numpy() - mean) / sd @ beta > 0
    total = [np.zeros(1), np.zeros(1)]
    for name in sites:
        part = (rows["site"] == name).to_numpy()
        sums = logrank_sums(
            rows["t"][part].to_numpy(), rows["e"][part].to_numpy() == 1, high[part], np.zeros(part.sum())
        )
        total[0] = total[0] + sums.observed_minus_expected
        total[1] = total[1] + sums.variance
    assert groups["logrank_chi2"] == pytest.approx(float(total[0][0] ** 2 / total[1][0]), rel=1e-9)
    assert set(groups["curves"]) == {"low", "high"}
    assert {row["asked_years"] for row in groups["calibration"]} >= {1.0}
    kinds = {kind for kind, _ in next(iter(sites.values())).sent}
    assert kinds >= {"query.cox_ph", "query.cox_groups", "query.cox_km", "query.cox_logrank", "query.cox_calibration"}
    assert all(isinstance(r, MaskedReply) for kind, r in next(iter(sites.values())).sent if kind in COX_REPLIES)
    # Every site was told the model, and computes the risk of its own patients from it.
    for site in sites.values():
        known = read_model(site.desk.workspace, TOKENIZER)
        assert known.codes == (0, 2)
        columns = np.column_stack([site.table.X[:, [0, 2]], site.table.C])
        np.testing.assert_allclose(known.risk(site.table), (columns - mean) / sd @ beta, atol=1e-12)
        assert read_model(site.desk.workspace, "0" * 64) is None


def test_a_death_on_day_zero_costs_the_test_of_proportional_hazards_and_not_the_model(three):
    folder, plan, _ = three
    tables = cohorts(SIZES, codes=6, log_hr=0.5, seed=5)
    t = tables[0].t.copy()
    t[np.flatnonzero(tables[0].e)[0]] = 0.0
    sites = table_sites(folder / "zero", [dataclasses.replace(tables[0], t=t), *tables[1:]], plan)
    found = after_selection(folder, sites, plan, (0,))
    assert [row["ph_p"] for row in found["model"]["coefficients"]] == [None] * 4
    assert [(part["purpose"], set(part["ended_by"].values())) for part in found["ended"]] == [
        ("multivariable", {"DATA_INVALID"})
    ]


def test_biomarkers_shows_a_finished_selection_and_writes_its_table_and_figures(three, capsys):
    folder, plan, sites = three
    with LocalGrid(sites, one_at_a_time=True) as grid:
        context = stage_context(folder / "coordinator", grid, sites, plan)
        attempts = survival.select(context, exchange_of(context))
        selected = attempts[0].selection.selected
        hello = survival.hello_of(context, TOKENIZER, len(sites))
        further = prognosis(exchange_of(context), hello, selected, sorted(sites))
    picture = pictures_of(initial_model(plan).eval(), selected, plan.window_hu)
    facts = survival.report(context, attempts, further, picture)
    stage = context.store.stage("survival")
    stage.finish(facts)
    # The run's folder is <project>/runs/<run> for the command.
    root = folder / "project"
    (root / "runs").mkdir(parents=True)
    context.store.folder.rename(root / "runs" / "r")
    code = console.run(server_cli, ["biomarkers", "r", "--json", "--workdir", str(root)], "fourdvq-server")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0
    assert found["selected"] == list(attempts[0].selection.selected)
    assert [a["masked"] for a in found["analyses"]] == [True]
    names = {Path(name).name for name in found["files"]}
    assert names >= {"selection.csv", "selection.json", "biomarkers.csv", "model.csv", "codes.png", "forest.svg"}
    assert names - {"calibration.svg", "risk_groups.svg"} >= {"correlations.svg", "model.svg"}
    folder = root / "runs" / "r" / "stages" / "survival"
    drawn = {name: (folder / name).read_text() for name in names if not name.endswith(".png")}
    with Image.open(folder / "codes.png") as opened:
        assert opened.width > 150 * len(selected)
    page = write_html(open_store(root / "runs" / "r"), root / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == sum(name.endswith(".svg") for name in names)
    assert page.count("data:image/png;base64,") == 1
    assert f"code {found['selected'][0]} *" in drawn["forest.svg"]
    assert drawn["correlations.svg"].count("1.00") >= len(found["selected"]) > 1
    rows = list(csv.DictReader(drawn["biomarkers.csv"].splitlines()))
    assert [int(row["code"]) for row in rows] == [row["code"] for row in found["codes"]]
    assert console.run(server_cli, ["biomarkers", "r", "--workdir", str(root)], "fourdvq-server") == 0
    text = capsys.readouterr().out
    assert "permutation P   not computed" in text
    assert "sitea, siteb, sitec: masked, finished" in text
    assert "proportional hazards p" in text
    assert "risk groups     log-rank p" in text


class Coordinator:
    """Asks one site's desk directly."""

    def __init__(self, site, plan):
        self.site, self.plan, self.number = site, plan, 0

    def key(self, analysis=1):
        task = CoxKeysTask(analysis, TOKENIZER)
        return self.site.desk.keys(task, envelope_of(task)).reply.public_key

    def peers(self, keys, analysis=1):
        names = tuple(sorted(keys))
        task = CoxPeersTask(analysis, TOKENIZER, names, np.stack([keys[name] for name in names]))
        return self.site.desk.peers(task, envelope_of(task)).reply

    def step(self, request, kind, analysis=1):
        task = COX_TASKS[kind](analysis, TOKENIZER, request)
        return self.site.desk.answer(task, envelope_of(task), self.plan, self.site.facts.policy().rules).reply


def public_key():
    return np.frombuffer(X25519PrivateKey.generate().public_key().public_bytes_raw(), dtype=np.uint8).copy()


def test_a_hospital_refuses_a_list_of_keys_that_would_unmask_it(three):
    _, plan, sites = three
    name, site = next(iter(sites.items()))
    coordinator = Coordinator(site, plan)
    for keys in (
        lambda own: {name: public_key(), "siteb": public_key()},  # not its own key
        lambda own: {"siteb": public_key(), "sitec": public_key()},  # not in the list
        lambda own: {name: own, "siteb": own},  # its own key twice
        lambda own: {name: own, "siteb": np.zeros(32, dtype=np.uint8)},  # of low order: the secret is known
        lambda own: {name: own},  # nobody else
    ):
        with pytest.raises(Refused) as caught:
            coordinator.peers(keys(coordinator.key()))
        assert caught.value.where == "masking"
    with pytest.raises(Refused, match="order"):
        coordinator.peers({name: public_key(), "siteb": public_key()}, analysis=2)


def test_masks_serve_one_hello_and_a_repeated_request_gets_the_same_bytes(three):
    _, plan, sites = three
    name, site = next(iter(sites.items()))
    coordinator, hello = Coordinator(site, plan), survival.hello_of(_Named(plan), TOKENIZER, 3)
    coordinator.peers({name: coordinator.key(), "siteb": public_key(), "sitec": public_key()})
    first = coordinator.step(hello, "query.cox_hello")
    assert coordinator.step(hello, "query.cox_hello") is first
    moments = coordinator.step(MomentsRequest(), "query.cox_moments")
    assert coordinator.step(MomentsRequest(), "query.cox_moments") is moments
    with pytest.raises(Refused) as caught:
        coordinator.step(hello, "query.cox_hello")
    assert caught.value.where == "masking"


def test_hospitals_that_saw_other_keys_have_another_line_in_their_logs(three):
    folder, plan, sites = three
    federated(folder, sites, plan)
    lines = {
        json.loads(text)["payload_sha256"]
        for site in sites.values()
        for text in site.audit.path.read_text().splitlines()
        if (line := json.loads(text))["kind"] == "query.cox_peers" and line["action"] == "release"
    }
    assert len(lines) == 1
    name, site = next(iter(sites.items()))
    coordinator = Coordinator(site, plan)
    own = coordinator.key()
    honest = coordinator.peers({name: own, "siteb": public_key()})
    own = coordinator.key()
    between = coordinator.peers({name: own, "siteb": public_key()})
    assert honest.sha256 != between.sha256
