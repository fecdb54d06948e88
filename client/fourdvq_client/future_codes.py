"""The third scan of held-out patients as the world model expects it from the first two: its code shares, kept here.

The survival stage compares them with the real third scan and with the second one carried forward. Nothing of it leaves
but sums. Source: paper section 3, the cross-sectional test.
"""

from __future__ import annotations

import numpy as np
import torch

from fourdvq.data.datasets import PreparedPatient, load_lung, load_x01
from fourdvq.errors import ModelError
from fourdvq.generation import WorldModel, code_histogram, generate
from fourdvq.models.latent_ode import LatentODE
from fourdvq.plan import Plan
from fourdvq.tensors import payload_sha256
from fourdvq.wire.messages import CoxFutureTask, Receipt
from fourdvq_client.bench import Bench
from fourdvq_client.egress import Outcome
from fourdvq_client.third_scans import THIRD, keep_future_codes, with_third_scan
from fourdvq_client.worker import Job


class FutureBench(Bench):
    """A Bench that also generates scans for the survival analysis."""

    def future_codes(self, job: Job) -> Outcome:
        """Generate the third scan of every test patient who has one, and keep its shares.

        Raises ModelError E_TOKENIZER if the run was frozen under another tokenizer than the task names.
        """
        task = job.task
        if not isinstance(task, CoxFutureTask):
            raise TypeError(f"{type(task).__name__} given to the job of CoxFutureTask")
        vqgan, _, found = self._frozen_model(job)
        if found != task.tokenizer_sha256:
            raise ModelError("E_TOKENIZER", where="frozen model", found=found[:12], wanted=task.tokenizer_sha256[:12])
        ode = LatentODE(job.plan.temporal, job.plan.model.code_dim)
        ode.load_state_dict(dict(task.weights))
        world = WorldModel(vqgan, ode.to(vqgan.codebook.codes.device).eval(), found)
        patients = with_third_scan(self._cohort().of("test"))
        shares = {p.pseudonym: third_scan_shares(world, p, job.plan) for p in patients}
        ode_name = payload_sha256(task.weights)
        keep_future_codes(self._workspace, job.envelope.run, shares, tokenizer=found, ode=ode_name)
        return Outcome(Receipt(sha256=found), len(patients))


def third_scan_shares(world: WorldModel, patient: PreparedPatient, plan: Plan) -> np.ndarray:
    """Shares (K,) of the codes of the third scan, generated at its own time from the first two."""
    given = patient.scans[:THIRD]
    made = generate(
        world,
        torch.stack([load_x01(scan, plan.window_hu) for scan in given]),
        [scan.years for scan in given],
        [patient.scans[THIRD].years],
        lung=load_lung(given[0]),
    )
    if plan.survival.region == "lung":
        return made.histograms[0].numpy()
    return code_histogram(made.indices[0], None, plan.model.n_codes).numpy()
