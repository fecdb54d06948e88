"""The plan: everything that both sides agree on before an experiment, as frozen values with an identity (its sha256).

A site answers only to a plan that a person there approved; every task carries the plan's hash. The defaults are the
`fast` preset; a number that comes from the publication or its released code has its source beside it. Sources:
"paper" is the 4D-VQ-GAN publication (equations and appendices by number), "code" its released implementation.

Axis letters: D H W voxels (z, y, x); d h w latent grid; K codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fourdvq.config import build, canonical_json, sha256_of

GIVEN_FOR_EXTRAPOLATION = 2  # the first two scans are given, paper section 2.3


@dataclass(frozen=True)
class ModelSpec:
    """The 3D-VQ-GAN generator. Source: paper section 2.1 and appendix A; widths and layers from the code."""

    size: tuple[int, int, int] = (96, 256, 256)  # D H W, paper appendix A.3
    base_width: int = 32  # code
    compression: Literal[4, 8] = 4  # per axis, paper table 3
    n_codes: int = 256  # K, paper table 3
    code_dim: int = 16  # c, paper section 2.1
    norm: Literal["group", "batch"] = "group"  # code: batch; cannot be federated
    padding: Literal["zeros", "replicate"] = "zeros"  # code: replicate
    decoder: Literal["tats", "thin", "half"] = "half"  # code: tats
    quantiser: Literal["ema", "loss", "fsq"] = "ema"  # paper equation 2: loss; code: ema
    ema_decay: float = 0.99  # code, per optimiser step

    def __post_init__(self) -> None:
        if any(s % self.compression for s in self.size):
            raise ValueError(f"size {self.size} is not divisible by compression {self.compression}")


@dataclass(frozen=True)
class GanSpec:
    """The two discriminators and their losses. Source: paper equation 3; layout and weights from the code."""

    loss: Literal["hinge", "log", "none"] = "hinge"  # paper equation 3: log; code: hinge
    start_step: int = 10_000  # global optimiser steps, paper appendix A.1
    weight: float = 1.0  # lambda_gan, paper appendix A.1
    feature_matching: float = 4.0  # code
    width: int = 64  # code
    layers: int = 3  # code
    adaptive_weight: bool = False
    discriminators: Literal["local", "shared"] = "local"


@dataclass(frozen=True)
class VqganTraining:
    """How stage 1 is optimised. Source: paper appendix A.1."""

    accumulate: int = 6  # scans per optimiser step
    lr: float = 3e-4
    betas: tuple[float, float] = (0.5, 0.9)
    clip: float = 1.0  # gradient norm, code
    l1_weight: float = 4.0  # lambda_rec
    commitment: float = 0.25  # beta, code
    perceptual: Literal["none", "vgg_lpips"] = "none"
    perceptual_weight: float = 4.0  # lambda_perc
    perceptual_sha256: str = ""  # of the weight file that every site must hold
    precision: Literal["fp32", "bf16"] = "bf16"
    crop: tuple[int, int, int] | None = None  # D H W of a random part of each scan to train on; none: the whole scan


@dataclass(frozen=True)
class TemporalSpec:
    """The latent disease ODE. Source: paper section 2.2; open points as in docs/reference/model.md."""

    hidden: int = 16  # ConvGRU channels, code
    dynamics_width: int = 64
    dynamics_layers: int = 3  # paper: three stacked 3D convolutions
    encoder: Literal["conv_gru", "ode_conv_gru"] = "conv_gru"
    skip: bool = True
    projector: Literal["rate", "paper"] = "rate"
    anchor: Literal["last_given", "identity", "paper"] = "last_given"
    grid: Literal["exact", "halfyear"] = "exact"  # code: halfyear
    solver: Literal["rk4", "dopri5"] = "rk4"  # code: dopri5
    max_step_years: float = 0.5
    t_scale_years: float = 6.0  # times are divided by this in the dynamics; later ones are flagged
    horizon_factor: float = 1.5  # generation refuses times beyond t_scale_years x this
    rtol: float = 1e-3  # code
    atol: float = 1e-4  # code
    mask_prob: float = 0.0  # probability that an observed input is hidden in training
    time_gap_channel: bool = False
    velocity_input: bool = False  # the encoder also sees how fast the codes changed until the scan after
    lung_context: bool = False  # every voxel's first state also knows the lung's mean state and mean rate of change
    initial_state: Literal["deterministic", "variational"] = "deterministic"  # paper: deterministic


@dataclass(frozen=True)
class OdeTraining:
    """How stage 2 is optimised. Source: paper appendix A.2."""

    lr: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.9)
    weight_decay: float = 0.01
    clip: float = 1.0
    accumulate: int = 1  # patients per optimiser step
    lambda_recon: float = 1.0
    lambda_diff: float = 1.0
    lambda_drift: float = 0.0  # of the change of the lung's mean, before quantisation; ours, not the paper's
    weight_rise: tuple[float, float] = (1.0, 2.0)  # time weights rise linearly over the observed order, then mean 1
    kl_weight: float = 1e-3  # of the patient's random part, used where temporal.initial_state is variational
    precision: Literal["fp32", "bf16"] = "bf16"  # of the convolutions in training with rk4; dopri5 is float32


@dataclass(frozen=True)
class FederationSpec:
    """Rounds, quorum and aggregation."""

    rounds: int = 100  # stage 1; 100 x 200 are the 20,000 optimiser steps of paper appendix A.1
    local_steps: int = 200  # optimiser steps a round and site
    ode_rounds: int = 50  # stage 2; 50 x 350 are 100 epochs over the paper's 175 patients, appendix A.2
    ode_local_steps: int = 350
    quorum: int = 2  # training sites whose valid reply a round needs
    deadline_s: float = 7200.0  # a round ends then
    ttl_margin_s: float = 600.0
    wait_sites_s: float = 600.0
    weight_cap_two: float = 0.7  # largest share of one of two sites
    weight_cap_many: float = 0.5  # largest share of one of three or more
    weight_cap: bool = True
    aggregator: Literal["mean", "median", "trimmed_mean"] = "mean"
    server_optimizer: Literal["none", "momentum", "adam"] = "none"
    server_lr: float = 1.0
    proximal_mu: float = 0.0
    codebook_sync: Literal["round_frozen", "local_ema"] = "round_frozen"
    codebook_round_decay: float = 0.37  # of the codebook sums, per round; a site uses the T-th root per micro-batch
    dead_code_share: float = 0.0026  # a code below this share of the mean count is dead; code's N < 1 at 98,304 vectors
    dead_code_rounds: int = 2
    wire_dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    worker: Literal["process", "inline"] = "process"


@dataclass(frozen=True)
class PaperRule:
    """The paper's rule for a prognostic code. Source: paper section 3; strict < and >."""

    min_hr: float = 1.0
    max_p: float = 0.01
    min_c: float = 0.5
    top: int = 5
    p_value: Literal["wald", "lr"] = "wald"
    c_model: Literal["full", "biomarker"] = "full"
    bh_q: float | None = None


@dataclass(frozen=True)
class SurvivalSpec:
    """Federated Cox selection. Source: paper section 3; decisions in docs/reference/survival.md."""

    folds: int = 5
    fold_mode: Literal["site_event", "hash"] = "site_event"
    baseline: Literal["site", "shared"] = "site"
    ties: Literal["efron", "breslow"] = "efron"
    region: Literal["lung", "all"] = "lung"
    covariates: tuple[str, ...] = ("age", "sex", "smoking")
    rule: PaperRule = field(default_factory=PaperRule)
    permutations: int = 0
    transplant: Literal["censor", "event"] = "censor"
    test_origin: Literal["landmark", "baseline"] = "landmark"
    ridge: float = 1.0
    followup_window_days: int = 90
    max_rounds: int = 12


@dataclass(frozen=True)
class SplitSpec:
    """Shares of patients at a training site; an external site is all test."""

    train: float = 0.7
    validation: float = 0.1
    test: float = 0.2

    def __post_init__(self) -> None:
        if (
            abs(self.train + self.validation + self.test - 1.0) > 1e-9
            or min(self.train, self.validation, self.test) < 0
        ):
            raise ValueError(f"split shares {self.train}, {self.validation}, {self.test} do not add up to 1")


@dataclass(frozen=True)
class EvaluationSpec:
    """What is scored, and where."""

    every_rounds: int = 1  # reconstruction on validation scans after every so many rounds
    times_per_patient: int = 1  # target scans after the given ones
    horizon_bins_years: tuple[float, ...] = (0.5, 1.0, 2.0)
    fast_hu_per_year: float = 20.0  # a lung whose mean rises faster from the last given scan to the target is `fast`
    modes: tuple[Literal["extrapolation", "interpolation"], ...] = ("extrapolation", "interpolation")
    conformal: bool = False  # count the errors of calibration patients, for bands around predicted numbers
    conformal_largest: float = 0.5  # upper end of the public bins of an error
    conformal_bins: int = 500
    conformal_coverages: tuple[float, ...] = (0.8, 0.9, 0.95)


@dataclass(frozen=True)
class PrivacySpec:
    """Differential privacy asked for by the plan; a site's policy may ask for more, never for less."""

    mode: Literal["off"] = "off"


@dataclass(frozen=True)
class Plan:
    """One experiment, without paths, secrets, tracking and site list. `hash` is its identity."""

    name: str
    profile_sha256: str  # of the federation's preprocessing profile
    seed: int = 0
    window_hu: tuple[float, float] = (-1000.0, 400.0)  # as in the profile; scales HU to [0, 1] at load
    model: ModelSpec = field(default_factory=ModelSpec)
    gan: GanSpec = field(default_factory=GanSpec)
    vqgan: VqganTraining = field(default_factory=VqganTraining)
    temporal: TemporalSpec = field(default_factory=TemporalSpec)
    ode: OdeTraining = field(default_factory=OdeTraining)
    federation: FederationSpec = field(default_factory=FederationSpec)
    survival: SurvivalSpec = field(default_factory=SurvivalSpec)
    splits: SplitSpec = field(default_factory=SplitSpec)
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    privacy: PrivacySpec = field(default_factory=PrivacySpec)

    def __post_init__(self) -> None:
        crop, model = self.vqgan.crop, self.model
        if crop and any(not 0 < c <= s or c % model.compression for c, s in zip(crop, model.size, strict=True)):
            raise ValueError(f"crop {crop} is not inside {model.size} or not divisible by {model.compression}")

    @property
    def hash(self) -> str:
        """Hex sha256 of the canonical JSON."""
        return sha256_of(self)

    def to_json(self) -> str:
        """Canonical JSON: what travels in `query.plan` and what is hashed."""
        return canonical_json(self)


def plan_from(data: Mapping[str, Any]) -> Plan:
    """The inverse of `Plan.to_json` after json.loads; raises ConfigError with the dotted key."""
    return build(Plan, data, where="plan")
