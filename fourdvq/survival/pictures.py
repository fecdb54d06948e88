"""What a code looks like: the decoded patch of a latent filled with it; and, at a site alone, where it lies in a scan.

A patch comes from the model and shows no patient. A place shows a slice of a scan and stays where the scan is. Source:
paper, appendix E.4. Volumes are x01 (D, H, W) = (z, y, x); d h w latent grid, k codes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fourdvq.survival.forms import F64, I64, Bool

if TYPE_CHECKING:
    from PIL import Image

    from fourdvq.models.vqgan import VQGAN3d

LATENT = 8  # tokens along each axis of a patch: more than a decoder's reach matters little
TILE, GAP, HEAD = 150, 6, 34  # pixels
INK, PAPER, MARK = (34, 48, 60), (255, 255, 255), (240, 140, 30)


def pictures_of(model: VQGAN3d, codes: Sequence[int], window_hu: tuple[float, float]) -> bytes:
    """PNG with a column for each code: the middle axial slice of its patch, its mean and spread in HU."""
    low, high = window_hu
    columns = []
    for code in codes:
        patch = code_patch(model, code)
        hu = low + patch * (high - low)
        columns.append((f"code {code}", f"{hu.mean():.0f} HU, SD {hu.std():.0f}", [_grey(patch[len(patch) // 2])]))
    return _sheet(columns)


def code_patch(model: VQGAN3d, code: int) -> F64:
    """x01 (D, H, W): the decoder's answer to a latent that is this code everywhere, without its outer quarters.

    The borders are left out since there the decoder sees padding. Raises ValueError for a code that does not exist.
    """
    import torch

    if not 0 <= code < model.spec.n_codes:
        raise ValueError(f"code {code} of a codebook of {model.spec.n_codes}")
    device = model.codebook.codes.device
    indices = torch.full((1, LATENT, LATENT, LATENT), code, dtype=torch.long, device=device)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            volume = (model.decode(model.embed(indices))[0, 0].float() + 0.5).clamp(0, 1).cpu().numpy()
    finally:
        model.train(training)
    inner = tuple(slice(n // 4, n - n // 4) for n in volume.shape)
    return np.asarray(volume[inner], dtype=np.float64)


def places_of(scan: F64, indices: I64, lung: Bool, codes: Sequence[int], patches: Sequence[F64]) -> bytes:
    """PNG for people at the site: under each code's patch the slice of the scan in which it lies most, marked.

    `scan` (D, H, W) in [0, 1]; `indices` and `lung` (d, h, w). A code that is nowhere in the lung has a bare slice.
    """
    columns = []
    for code, patch in zip(codes, patches, strict=True):
        here = (indices == code) & lung
        layer = int(here.sum(axis=(1, 2)).argmax())
        step = len(scan) // len(here)
        tile = _marked(scan[min(layer * step + step // 2, len(scan) - 1)], here[layer])
        share = float(here.sum() / max(int(lung.sum()), 1))
        columns.append((f"code {code}", f"{share:.2%} of the lung", [_grey(patch[len(patch) // 2]), tile]))
    return _sheet(columns)


def _marked(grey: F64, here: Bool) -> Image.Image:
    """A slice with the tokens of a code drawn over it, half transparent."""
    from PIL import Image

    tile = _grey(grey)
    mask = Image.fromarray((here * 130).astype(np.uint8)).resize(tile.size, Image.Resampling.NEAREST)
    tile.paste(Image.new("RGB", tile.size, MARK), mask=mask)
    return tile


def _grey(plane: F64) -> Image.Image:
    from PIL import Image

    scale = TILE / max(plane.shape)
    size = (max(1, round(plane.shape[1] * scale)), max(1, round(plane.shape[0] * scale)))
    pixels = np.round(np.clip(plane, 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BILINEAR).convert("RGB")


def _sheet(columns: Sequence[tuple[str, str, list[Any]]]) -> bytes:
    """Titles above tiles, one column each; the same pictures give the same bytes."""
    from PIL import Image, ImageDraw, ImageFont

    rows = max((len(tiles) for _, _, tiles in columns), default=0)
    pitch = TILE + GAP
    canvas = Image.new("RGB", (GAP + pitch * len(columns), HEAD + pitch * rows), PAPER)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for c, (title, text, tiles) in enumerate(columns):
        left = GAP + c * pitch
        pen.text((left, 3), f"{title}\n{text}", fill=INK, font=font)
        for r, tile in enumerate(tiles):
            canvas.paste(tile, (left + (TILE - tile.width) // 2, HEAD + r * pitch))
    stream = io.BytesIO()
    canvas.save(stream, format="PNG", optimize=False)
    return stream.getvalue()
