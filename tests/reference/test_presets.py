"""The presets against the publication's tables and appendices, and against each other."""

from __future__ import annotations

import pytest

from fourdvq.errors import ConfigError
from fourdvq_server.experiment import compose


def plan(*overrides: str):
    return compose(list(overrides)).plan


def test_paper_preset_equals_the_appendix():
    p = plan("experiment=paper")
    found = {
        "grid": p.model.size,
        "codes": p.model.n_codes,
        "code dimension": p.model.code_dim,
        "compression": p.model.compression,
        "scans per step": p.vqgan.accumulate,
        "steps": p.federation.rounds * p.federation.local_steps,
        "adversarial from": p.gan.start_step,
        "stage 1 rate": p.vqgan.lr,
        "stage 1 betas": p.vqgan.betas,
        "lambda rec": p.vqgan.l1_weight,
        "lambda perc": p.vqgan.perceptual_weight,
        "lambda gan": p.gan.weight,
        "adversarial loss": p.gan.loss,
        "codebook": p.model.quantiser,
        "stage 2 rate": p.ode.lr,
        "stage 2 betas": p.ode.betas,
        "patients per step": p.ode.accumulate,
        "epochs over 175 patients": p.federation.ode_rounds * p.federation.ode_local_steps / 175,
        "skip": p.temporal.skip,
        "dynamics layers": p.temporal.dynamics_layers,
        "split": (p.splits.train, p.splits.test),
        "folds": p.survival.folds,
        "rule": (p.survival.rule.min_hr, p.survival.rule.max_p, p.survival.rule.min_c, p.survival.rule.top),
    }
    assert found == {
        "grid": (96, 256, 256),
        "codes": 256,
        "code dimension": 16,
        "compression": 4,
        "scans per step": 6,
        "steps": 20_000,
        "adversarial from": 10_000,
        "stage 1 rate": 3e-4,
        "stage 1 betas": (0.5, 0.9),
        "lambda rec": 4.0,
        "lambda perc": 4.0,
        "lambda gan": 1.0,
        "adversarial loss": "log",
        "codebook": "loss",
        "stage 2 rate": 2e-4,
        "stage 2 betas": (0.5, 0.9),
        "patients per step": 1,
        "epochs over 175 patients": 100.0,
        "skip": True,
        "dynamics layers": 3,
        "split": (0.8, 0.2),
        "folds": 5,
        "rule": (1.0, 0.01, 0.5, 5),
    }


TABLE_1 = {
    "no_skip": {"skip": False, "encoder": "conv_gru", "mask_prob": 0.0},
    "proposed": {"skip": True, "encoder": "conv_gru", "mask_prob": 0.0},
    "ode_conv_gru": {"skip": True, "encoder": "ode_conv_gru", "mask_prob": 0.0},
    "masked": {"skip": True, "encoder": "conv_gru", "mask_prob": 0.5},
}
TABLE_3 = {
    "k1024": (1024, 4, 3e-4),
    "k4096": (4096, 4, 3e-4),
    "lr1e4": (256, 4, 1e-4),
    "chosen": (256, 4, 3e-4),
    "r8": (256, 8, 3e-4),
}


@pytest.mark.parametrize("row", TABLE_1)
def test_rows_of_table_1_differ_in_the_ablated_parts_only(row):
    p = plan(f"experiment=table1_{row}").temporal
    assert {"skip": p.skip, "encoder": p.encoder, "mask_prob": p.mask_prob} == TABLE_1[row]


@pytest.mark.parametrize("row", TABLE_3)
def test_rows_of_table_3_have_the_printed_codes_compression_and_rate(row):
    p = plan(f"experiment=table3_{row}")
    assert (p.model.n_codes, p.model.compression, p.vqgan.lr) == TABLE_3[row]


def test_released_code_differs_from_the_text_where_it_does():
    text, code = plan("experiment=paper"), plan("experiment=paper_code")
    assert (code.gan.loss, code.model.quantiser, code.temporal.grid) == ("hinge", "ema", "halfyear")
    assert (code.vqgan.lr, code.ode.lr, code.ode.betas, code.ode.accumulate, code.ode.lambda_recon) == (
        5.6e-5,
        1.2e-3,
        (0.9, 0.95),
        6,
        0.2,
    )
    assert text.temporal.solver == code.temporal.solver == "dopri5"


def test_fast_preset_is_the_same_model_on_the_same_schedule():
    text, fast = plan("experiment=paper"), plan("experiment=fast")
    for part in ("size", "n_codes", "code_dim", "compression", "base_width"):
        assert getattr(text.model, part) == getattr(fast.model, part)
    assert text.federation.rounds * text.federation.local_steps == fast.federation.rounds * fast.federation.local_steps
    assert fast.model.norm == "group"


def test_every_preset_composes_and_is_its_own_plan():
    from importlib.resources import files

    names = [
        f.name.removesuffix(".yaml")
        for f in (files("fourdvq_configs") / "experiment").iterdir()
        if f.name.endswith(".yaml")
    ]
    hashes = {name: plan(f"experiment={name}").hash for name in names}
    assert len(set(hashes.values())) == len(names) == 14


def test_an_override_changes_the_plan_and_a_typing_error_is_refused():
    assert plan("experiment=tiny", "federation.rounds=5").federation.rounds == 5
    with pytest.raises(ConfigError):
        compose(["experiment=tiny", "federation.roundz=5"])
    with pytest.raises(ConfigError):
        compose(["experiment=tiny", "+federation.roundz=5"])
    with pytest.raises(ConfigError):
        compose(["experiment=tini"])
