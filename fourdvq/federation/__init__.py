"""The coordinator's arithmetic, pure: weighted means, robust alternatives, server optimisers, codebook merge."""

from fourdvq.federation.aggregate import AGGREGATORS, SERVER_OPTIMIZERS, check_update, site_shares, weighted_mean
from fourdvq.federation.codebook import CodebookState, CodebookStats, initial_codebook, merge_codebooks, revive_dead

__all__ = [
    "AGGREGATORS",
    "SERVER_OPTIMIZERS",
    "CodebookState",
    "CodebookStats",
    "check_update",
    "initial_codebook",
    "merge_codebooks",
    "revive_dead",
    "site_shares",
    "weighted_mean",
]
