"""Cox estimates that are known in closed form. Source: Therneau and Grambsch, Modeling Survival Data, appendix E."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from fourdvq.survival import fit_federated_cox

DATA = pd.DataFrame({"t": [9, 1, 1, 6, 6, 8], "e": [1, 1, 0, 1, 1, 0], "x": [0, 1, 1, 1, 0, 0]})
BRESLOW = np.log(1.5 + np.sqrt(33) / 2)
EFRON = np.log(2 * np.sqrt(23 / 3) * np.cos(np.arccos(45 / 23 * np.sqrt(3 / 23)) / 3))


@pytest.mark.parametrize(("ties", "coef"), [("breslow", BRESLOW), ("efron", EFRON)])
@pytest.mark.parametrize("baseline", ["site", "shared"])
def test_tied_deaths_give_the_closed_form_coefficient(ties, coef, baseline):
    assert pytest.approx([1.475285, 1.676857], abs=1e-6) == [BRESLOW, EFRON]
    fitted = fit_federated_cox([DATA], "t", "e", ["x"], ties=ties, baseline=baseline)
    assert fitted.coef[0] == pytest.approx(coef, abs=1e-8)


@pytest.mark.parametrize("ties", ["breslow", "efron"])
def test_three_copies_as_three_sites_keep_the_coefficient_and_triple_the_information(ties):
    one = fit_federated_cox([DATA], "t", "e", ["x"], ties=ties)
    three = fit_federated_cox([DATA, DATA, DATA], "t", "e", ["x"], ties=ties)
    assert three.coef[0] == pytest.approx(one.coef[0], abs=1e-9)
    assert one.se[0] ** 2 / three.se[0] ** 2 == pytest.approx(3.0, rel=1e-7)
    assert three.log_likelihood == pytest.approx(3 * one.log_likelihood, abs=1e-9)


def test_two_patients_without_ties_have_the_likelihood_of_one_choice():
    # One death with both at risk: at beta = 0 the likelihood is 1/2.
    data = pd.DataFrame({"t": [1.0, 2.0], "e": [1, 0], "x": [0.0, 1.0]})
    assert fit_federated_cox([data], "t", "e", ["x"]).log_likelihood_null == pytest.approx(np.log(0.5))
