"""Headers that promise the world, name other files, or hide more than they announce are refused before decoding."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from fourdvq.data.limits import ReaderLimits
from fourdvq.data.volume import Volume, read_volume, to_image, write_nifti
from fourdvq.errors import VolumeError
from fourdvq.preprocessing.inputs import ScanInput, source_key
from peak_memory import forget_peak, peak_bytes
from synthetic_lungs import chest

HUGE = 10_000  # an edge: 10^12 voxels


@pytest.fixture(scope="module")
def scan() -> Volume:
    return chest((12, 20, 24))[0]


def refusal(path: Path, **limits) -> VolumeError:
    """The refusal, and proof that no memory was taken for what the header promised."""
    forget_peak()
    before = peak_bytes()
    with pytest.raises(VolumeError) as caught:
        read_volume(path, readers=ReaderLimits(**limits))
    assert peak_bytes() - before < 200_000 * 1024
    return caught.value


def saved(scan: Volume, path: Path, *, compressed: bool = False) -> Path:
    sitk.WriteImage(to_image(scan), str(path), useCompression=compressed)
    return path


def changed(path: Path, old: bytes, new: bytes) -> None:
    raw = path.read_bytes()
    assert old in raw
    path.write_bytes(raw.replace(old, new, 1))


def nifti_of(size: tuple[int, ...], data: bytes, scan: Volume, path: Path) -> Path:
    """A .nii.gz whose header announces `size` and whose voxels are `data`."""
    write_nifti(scan, path.with_suffix(""))
    raw = bytearray(path.with_suffix("").read_bytes()[:352])
    struct.pack_into("<8h", raw, 40, len(size), *size, *[1] * (7 - len(size)))
    path.write_bytes(gzip.compress(bytes(raw) + data))
    return path


@pytest.mark.parametrize("name", ["a.nii.gz", "a.mha", "a.nrrd"])
def test_a_compressed_header_of_a_million_million_voxels_is_refused(scan, tmp_path, name):
    path = tmp_path / name
    if name == "a.nii.gz":
        nifti_of((HUGE, HUGE, HUGE), bytes(1000), scan, path)
    elif name == "a.mha":
        saved(scan, path, compressed=True)
        changed(path, b"DimSize = 24 20 12", f"DimSize = {HUGE} {HUGE} {HUGE}".encode())
    else:
        saved(scan, path, compressed=True)
        changed(path, b"sizes: 24 20 12", f"sizes: {HUGE} {HUGE} {HUGE}".encode())
    error = refusal(path)
    assert error.code == "E_BOMB"
    assert str(HUGE**3) in error.found


def test_the_sites_own_numbers_are_the_bounds(scan, tmp_path):
    for name in ("a.nii.gz", "a.mha", "a.nrrd"):
        path = saved(scan, tmp_path / name)
        read_volume(path, readers=ReaderLimits(max_voxels=scan.hu.size))
        assert refusal(path, max_voxels=scan.hu.size - 1).code == "E_BOMB"
        assert refusal(path, spacing_mm=(0.1, 2.0)).code == "E_GEOMETRY"
        assert refusal(path, decode_memory_mb=0).code == "E_BOMB"


@pytest.mark.parametrize("name", ["a.nii.gz", "a.mha", "a.nrrd"])
def test_a_stream_that_holds_more_than_its_header_announces_is_not_inflated_to_the_end(scan, tmp_path, name):
    path = tmp_path / name
    zeros = bytes(256 << 20)
    if name == "a.nii.gz":
        nifti_of((24, 20, 12), zeros, scan, path)
    elif name == "a.mha":
        saved(scan, path, compressed=True)
        head = path.read_bytes().partition(b"ElementDataFile = LOCAL\n")
        path.write_bytes(head[0] + head[1] + zlib.compress(zeros))
    else:
        saved(scan, path, compressed=True)
        head = path.read_bytes().partition(b"\n\n")
        path.write_bytes(head[0] + head[1] + gzip.compress(zeros))
    del zeros
    assert path.stat().st_size < 2 << 20
    assert refusal(path).code == "E_BOMB"


@pytest.mark.parametrize(
    "named", ["/etc/passwd", "../other.raw", "sub/other.raw", "other.raw", "LIST", "slice%03d.raw 1 12 1", "~/a.raw"]
)
def test_an_mha_that_names_another_file_is_refused_and_the_file_is_not_read(scan, tmp_path, named):
    (tmp_path / "other.raw").write_bytes(scan.hu.tobytes())
    path = saved(scan, tmp_path / "a.mha")
    changed(path, b"ElementDataFile = LOCAL", f"ElementDataFile = {named}".encode())
    assert refusal(path).code == "E_NIFTI"


def test_an_mhd_may_have_its_data_beside_it_and_nowhere_else(scan, tmp_path):
    path = saved(scan, tmp_path / "a.mhd")
    np.testing.assert_array_equal(read_volume(path).hu, scan.hu)
    one = ScanInput(0, 0, path)
    before = source_key(one)
    raw = bytearray((tmp_path / "a.raw").read_bytes())
    raw[100] ^= 1
    (tmp_path / "a.raw").write_bytes(raw)
    assert source_key(one) != before
    secret = tmp_path / "elsewhere" / "a.raw"
    secret.parent.mkdir()
    (tmp_path / "a.raw").rename(secret)
    assert refusal(path).code == "E_CORRUPT"
    (tmp_path / "a.raw").symlink_to(secret)
    assert refusal(path).code == "E_NIFTI"
    for named in ("elsewhere/a.raw", "../a.raw", str(secret), ".a.raw"):
        text = path.read_text().splitlines()
        path.write_text("\n".join([*text[:-1], f"ElementDataFile = {named}"]) + "\n")
        assert refusal(path).code == "E_NIFTI"


def test_an_nrrd_that_names_another_file_or_skips_bytes_is_refused(scan, tmp_path):
    for line in ("data file: other.raw", "data file: /etc/passwd", "line skip: 3", "byte skip: -1", "encoding: txt"):
        path = saved(scan, tmp_path / "a.nrrd")
        old = b"encoding: raw\n" if line.startswith("encoding") else b"dimension: 3\n"
        kept = b"" if line.startswith("encoding") else old
        changed(path, old, kept + line.encode() + b"\n")
        assert refusal(path).code == "E_NIFTI"


def test_headers_that_never_end_or_say_things_twice_are_refused(scan, tmp_path):
    for name, start in (("a.mha", b"ObjectType = Image\n"), ("a.nrrd", b"NRRD0004\n")):
        path = tmp_path / name
        path.write_bytes(start + b"Comment = x\n# y: z\n" * 1_000_000)
        assert refusal(path).code == "E_CORRUPT"
        path.write_bytes(start + b"x" * 50_000_000)
        assert refusal(path).code == "E_CORRUPT"
    path = saved(scan, tmp_path / "twice.mha")
    changed(path, b"DimSize = 24 20 12", b"DimSize = 24 20 12\nDimSize = 9 9 9")
    assert refusal(path).code == "E_CORRUPT"


@pytest.mark.parametrize(
    ("form", "at", "values"),
    [
        ("h", 70, (8,)),  # int32 voxels of 16 bits
        ("h", 40, (4,)),  # 4-D
        ("b", 123, (1,)),  # metres
        ("b", 123, (3,)),  # micrometres
        ("f", 112, (2.0,)),  # a slope
        ("f", 116, (-512.0,)),  # an offset
        ("f", 116, (-1024.0,)),  # a usual offset, but the stored values are HU already
        ("4s", 344, (b"ni1\0",)),  # data in another file
        ("f", 108, (100.0,)),  # voxels inside the header
        ("f", 108, (352.5,)),  # between two bytes
        ("f", 108, (-352.0,)),
        ("f", 108, (1e9,)),  # beyond all that a header may hold
        ("f", 108, (1e13,)),
        ("f", 108, (3e19,)),
        ("f", 108, (float("nan"),)),
        ("f", 108, (float("inf"),)),
        ("f", 256, (float("nan"),)),  # a placement that is no number
    ],
)
def test_a_nifti_header_that_says_something_else_is_refused(scan, tmp_path, form, at, values):
    write_nifti(scan, tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    struct.pack_into("<" + form, raw, at, *values)
    (tmp_path / "a.nii").write_bytes(raw)
    assert refusal(tmp_path / "a.nii").code in ("E_NIFTI", "E_CORRUPT")


def test_what_lies_between_a_nifti_header_and_its_voxels_is_not_inflated_without_bound(scan, tmp_path):
    write_nifti(scan, tmp_path / "a.nii")
    header = bytearray((tmp_path / "a.nii").read_bytes()[:352])
    struct.pack_into("<f", header, 108, 1e9)
    with gzip.open(tmp_path / "a.nii.gz", "wb", compresslevel=1) as stream:
        stream.write(header)
        for _ in range(256):
            stream.write(bytes(1 << 20))
    error = refusal(tmp_path / "a.nii.gz", decode_memory_mb=64)
    assert (error.code, error.found) == ("E_NIFTI", "voxels from byte 1e+09 on")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_nifti_file_with_notes_behind_its_header_is_read(scan, tmp_path, name):
    write_nifti(scan, tmp_path / "plain.nii")
    raw = bytearray((tmp_path / "plain.nii").read_bytes())
    notes = struct.pack("<4b2i", 1, 0, 0, 0, 4096, 6) + bytes(4096 - 8)
    struct.pack_into("<f", raw, 108, 348 + len(notes))
    packed = gzip.compress if name.endswith(".gz") else bytes
    (tmp_path / name).write_bytes(packed(bytes(raw[:348]) + notes + bytes(raw[352:])))
    np.testing.assert_array_equal(read_volume(tmp_path / name).hu, scan.hu)


def test_a_scanners_unsigned_values_with_their_usual_offset_are_read(scan, tmp_path):
    stored = Volume((scan.hu.astype(np.int32) + 1024).astype(np.int16), scan.spacing, scan.origin)
    write_nifti(stored, tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    struct.pack_into("<2f", raw, 112, 1.0, -1024.0)
    (tmp_path / "a.nii").write_bytes(raw)
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii").hu, scan.hu)


@pytest.mark.parametrize("kind", ["<i2", ">i2", "<i4", "<f4", "<f8"])
def test_every_type_and_byte_order_of_voxels_is_read(scan, tmp_path, kind):
    nrrd = "NRRD0004\ntype: {}\ndimension: 3\nsizes: 24 20 12\nspacings: 1 1 2\nencoding: raw\nendian: {}\n\n"
    names = {"i2": "short", "i4": "int", "f4": "float", "f8": "double"}
    text = nrrd.format(names[kind[1:]], "big" if kind[0] == ">" else "little")
    (tmp_path / "a.nrrd").write_bytes(text.encode() + scan.hu.astype(kind).tobytes())
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nrrd").hu, scan.hu)
