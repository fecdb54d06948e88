"""Later scans of held-out patients as the world model expects them from the first two: their code shares, kept here.

The longitudinal stage compares them with the real third scan and the second one carried forward, and compares changes
over the year after the second scan. Nothing of it leaves but sums. Source: paper section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

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
from fourdvq_client.third_scans import SECOND, THIRD, FutureCodes, follow_up_of, keep_future_codes, with_third_scan
from fourdvq_client.worker import Job


class FutureBench(Bench):
    """A Bench that also generates scans for the survival analysis."""

    def future_codes(self, job: Job) -> Outcome:
        """Generate the third scan of every test patient who has one, and the year after the second where the patient
        has a scan then, and keep their shares.

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
        third, change = {}, {}
        for patient in patients:
            later = follow_up_of(patient, job.plan.survival.followup_window_days)
            wanted = [THIRD] if later is None else [THIRD, SECOND, later]
            third[patient.pseudonym], *year = generated_shares(world, patient, job.plan, wanted)
            if year:
                change[patient.pseudonym] = year[1] - year[0]
        ode_name = payload_sha256(task.weights)
        made = FutureCodes(third=third, change=change)
        keep_future_codes(self._workspace, job.envelope.run, made, tokenizer=found, ode=ode_name)
        return Outcome(Receipt(sha256=found), len(patients))


def generated_shares(
    world: WorldModel, patient: PreparedPatient, plan: Plan, wanted: Sequence[int]
) -> list[np.ndarray]:
    """Shares (K,) of the codes at the times of the scans `wanted`, generated from the first two scans.

    Each time once: a follow-up can be the third scan itself.
    """
    given = patient.scans[:THIRD]
    times = sorted({patient.scans[index].years for index in wanted})
    made = generate(
        world,
        torch.stack([load_x01(scan, plan.window_hu) for scan in given]),
        [scan.years for scan in given],
        times,
        lung=load_lung(given[0]),
    )
    if plan.survival.region == "lung":
        shares = [histogram.numpy() for histogram in made.histograms]
    else:
        shares = [code_histogram(indices, None, plan.model.n_codes).numpy() for indices in made.indices]
    return [shares[times.index(patient.scans[index].years)] for index in wanted]
