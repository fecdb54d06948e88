"""Risk of a site's own patients under the model it was told, and pictures of codes: from the model, and in a scan."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
import torch
from PIL import Image

from client_calls import call
from fourdvq.data.datasets import clinical_of, open_prepared
from fourdvq.models.vqgan import load_codebook, load_generator, tokenizer_sha256
from fourdvq.survival.biomarkers import scaled_age
from fourdvq.survival.messages import ResultMessage
from fourdvq.survival.pictures import MARK, code_patch, pictures_of, places_of
from fourdvq.tensors import payload_sha256
from fourdvq.training.vqgan import initial_model, initial_weights
from fourdvq_client.released import store_release
from fourdvq_client.runtime import store_plan
from fourdvq_client.survival_model import keep_model
from fourdvq_client.workspace import open_workspace, read_profile
from site_cases import codebook, ode_weights, prepared_site, tiny_plan

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    plan = tiny_plan()
    made = initial_model(plan)
    load_generator(made, initial_weights(plan))
    load_codebook(made, codebook())
    return made.eval()


def test_a_codes_picture_is_the_middle_of_the_decoded_latent_that_is_the_code_everywhere(model):
    for code in (1, 5):
        z = model.codebook.codes[code].detach().reshape(1, -1, 1, 1, 1).expand(1, 2, 8, 8, 8)
        with torch.inference_mode():
            whole = (model.decode(z)[0, 0] + 0.5).clamp(0, 1).numpy()
        n = len(whole)
        middle = whole[n // 4 : n - n // 4, n // 4 : n - n // 4, n // 4 : n - n // 4]
        np.testing.assert_allclose(code_patch(model, code), middle, atol=1e-6)
    assert not np.allclose(code_patch(model, 1), code_patch(model, 5))
    first, again = (pictures_of(model, (1, 5), (-1000.0, 400.0)) for _ in range(2))
    assert first == again
    with pytest.raises(ValueError, match="codebook of 8"):
        code_patch(model, 8)


def test_places_mark_the_tokens_of_the_code_in_the_slice_that_has_most_of_them():
    indices = np.zeros((4, 4, 4), dtype=np.int64)
    indices[2, 1, 0:2] = 3  # most of code 3 lies in layer 2
    indices[0, 0, 0] = 3
    lung = np.ones((4, 4, 4), dtype=bool)
    scan = np.full((16, 16, 16), 0.2)
    drawn = places_of(scan, indices, lung, (3,), [np.full((4, 4, 4), 0.5)])
    with Image.open(io.BytesIO(drawn)) as opened:
        pixels = np.asarray(opened).astype(int)
    tile = pixels[-156:-6, 6:156]
    marked = tile[..., 0] - tile[..., 2] > 40  # orange over grey
    assert MARK[0] > MARK[2]
    rows, columns = np.nonzero(marked)
    assert (rows.min() // 37, rows.max() // 38) == (1, 1)
    assert (columns.min(), columns.max() // 38) == (0, 1)


def test_biomarkers_shows_risk_where_a_run_told_a_model_and_shares_alone_without(tmp_path, model):
    root = prepared_site(tmp_path / "site")
    workspace, _ = open_workspace(root)
    plan, state = tiny_plan(), codebook()
    store_plan(workspace, plan, read_profile(workspace))
    named = {f"vqgan.{n}": t for n, t in initial_weights(plan).items()}
    named |= {f"ode.{n}": t for n, t in ode_weights(plan).items()}
    named |= {f"codebook.{n}": getattr(state, n) for n in ("codes", "counts", "sums")}
    tokenizer = tokenizer_sha256(model)
    card = {"version": "r1", "run": "run-1", "round": 3, "plan_sha256": plan.hash, "tokenizer_sha256": tokenizer}
    store_release(workspace, {**card, "weights_sha256": payload_sha256(named)}, named)
    code, before, _ = call(root, "biomarkers")
    assert (code, before["with_risk"], before["selected"], before["picture"]) == (0, 0, [], "")
    beta, mean, sd = np.array([0.7, 0.4, -0.2, 0.1]), np.array([0.1, 0.0, 0.5, 0.5]), np.array([0.2, 1.0, 0.5, 0.5])
    result = ResultMessage(np.array([4]), beta, np.ones(4), np.ones(4), mean=mean, sd=sd)
    keep_model(workspace, "run-1", result, ("age", "sex", "smoking"), tokenizer)
    code, after, _ = call(root, "biomarkers")
    patients = [p.pseudonym for p in open_prepared(workspace.prep).patients]
    assert (code, after["with_risk"], after["selected"]) == (0, len(patients), [4])
    rows = list(csv.DictReader((root / "reports" / "biomarkers.csv").read_text().splitlines()))
    clinical = {row.pseudonym: row for row in clinical_of(workspace.prep)}
    for row in rows:
        person = clinical[row["pseudonym"]]
        columns = np.array([float(row["code_4"]), scaled_age(person.age), person.sex, person.smoking])
        assert float(row["log_hazard_ratio"]) == pytest.approx(float((columns - mean) / sd @ beta), abs=1e-5)
    for name in ("codes.png", "biomarkers.csv"):
        assert (root / "reports" / name).stat().st_mode & 0o777 == 0o600
