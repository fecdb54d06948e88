"""fourdvq: the mathematics of federated 4D-VQ-GAN training on longitudinal lung CT.

Pure: tensors, tables and typed values in, the same out. No network, no configuration tree, no clock, no environment.
The public names load on first use, so that a command line that only prints its help never imports torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "VQGAN3d": "fourdvq.models.vqgan",
    "LatentODE": "fourdvq.models.latent_ode",
}

__all__ = ["LatentODE", "VQGAN3d", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'fourdvq' has no attribute {name!r}")
