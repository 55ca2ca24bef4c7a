"""Official files as a few smaller ones, to be carried where they cannot be fetched.

A part is a zip file, ``sn-data-2-of-3.zip``, of pieces of the files, each compressed by what it
holds: CIFAR-10's images as lossless WebP, float32 numbers with their bytes sorted by significance.
Every part knows how many pieces each file has. zip's checksums say which part is damaged; the
files are checked as from anywhere else.
"""

import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from experiments.cli import UserError, write_bytes

LIMIT = 60_000_000  # bytes of a part
_INDEX = "index.json"
_ROW = 3073  # bytes: a label, and 32x32 pixels plane by plane
_IMAGES = 500  # in a piece: above each other they are nearly as tall as WebP allows
_FLOATS = 1 << 18


def write(files: Mapping[str, bytes], folder: Path, limit: int = LIMIT) -> list[Path]:
    """Write files as the fewest parts of about the same size.

    Args:
      files: path -> content: ``.bin`` in CIFAR-10's format, others mostly of float32 numbers.
      folder: where the parts go; those of before are removed.
      limit: bytes that no part exceeds.

    Returns:
      The parts' paths.
    """
    pieces = {
        f"{path}/{i}": piece
        for path, content in files.items()
        for i, piece in enumerate(_encoded(path, content))
    }
    index = {path: sum(name.startswith(f"{path}/") for name in pieces) for path in files}
    total = sum(map(len, pieces.values()))
    n = 1 + total // limit
    while max(map(len, parts := _parts(pieces, index, n))) > limit:
        n += 1
    folder.mkdir(parents=True, exist_ok=True)
    for path, _, _ in _found(folder):
        path.unlink()
    paths = [folder / f"sn-data-{i + 1}-of-{n}.zip" for i in range(n)]
    for path, part in zip(paths, parts, strict=True):
        write_bytes(path, part)
    return paths


def read(folder: Path, paths: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """The files that the parts in a folder make up.

    Args:
      folder: with any of the parts, or none.
      paths: of the files that are wanted.

    Yields:
      Name without its folders, and content.

    Raises:
      UserError: after these, if a part that is needed for others is missing or damaged.
    """
    parts, faults = {}, []
    for path, number, n in _found(folder):
        try:
            archive = zipfile.ZipFile(path)
            parts[number] = archive, n, json.loads(archive.read(_INDEX))
        except (OSError, zipfile.BadZipFile, KeyError, ValueError):
            faults.append(f"{path} is damaged: copy it again")
    if not parts and not faults:
        return
    if len({(n, json.dumps(index)) for _, n, index in parts.values()}) > 1:
        raise UserError(f"{folder} holds parts of different packs: keep those of one.")
    n, index = next(((n, index) for _, n, index in parts.values()), (0, {}))
    owners = {name: archive for archive, _, _ in parts.values() for name in archive.namelist()}
    complete = bool(parts)
    for path in paths:
        names = [f"{path}/{i}" for i in range(index.get(path, 0))]
        contents = []
        for name in names:
            try:
                contents.append(_decoded(path, owners[name].read(name)))
            except KeyError:  # in a part that is not there
                break
            except (OSError, ValueError, zipfile.BadZipFile, zlib.error, struct.error):
                faults.append(f"{owners[name].filename} is damaged: copy it again")
                break
        if len(contents) < len(names):
            complete = False
        elif names:
            yield PurePosixPath(path).name, b"".join(contents)
    if not complete:
        absent = [f"sn-data-{i}-of-{n}.zip" for i in range(1, n + 1) if i not in parts]
        absent = [name for name in absent if not (folder / name).exists()]
        if absent:
            faults.append(f"{folder} has not {' and '.join(absent)} yet")
        raise UserError("; ".join(dict.fromkeys(faults)) + ".")


def _found(folder: Path) -> list[tuple[Path, int, int]]:
    """The parts in a folder, with their numbers and how many there should be."""
    found = []
    for path in sorted(folder.glob("sn-data-*.zip")):
        if match := re.fullmatch(r"sn-data-(\d+)-of-(\d+)\.zip", path.name):
            found.append((path, int(match[1]), int(match[2])))
    return found


def _parts(pieces: Mapping[str, bytes], index: Mapping[str, int], n: int) -> list[bytes]:
    """n zip files with the pieces, in their order, as evenly as they come."""
    total, before = sum(map(len, pieces.values())), 0
    members: list[list[str]] = [[] for _ in range(n)]
    for name, piece in pieces.items():
        members[n * before // total].append(name)
        before += len(piece)
    parts = []
    for names in members:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:  # pieces are compressed already
            archive.writestr(zipfile.ZipInfo(_INDEX), json.dumps(index))
            for name in names:
                archive.writestr(zipfile.ZipInfo(name), pieces[name])
        parts.append(file.getvalue())
    return parts


# --- How a piece is compressed ------------------------------------------------------------------


def _encoded(path: str, content: bytes) -> Iterator[bytes]:
    if path.endswith(".bin"):
        rows = np.frombuffer(content, np.uint8).reshape(-1, _ROW)
        for start in range(0, len(rows), _IMAGES):
            chunk = rows[start : start + _IMAGES]
            pixels = chunk[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            file = io.BytesIO()
            # Quality is effort here: more of it takes minutes and saves one part in a hundred.
            Image.fromarray(pixels.reshape(-1, 32, 3)).save(
                file, "webp", lossless=True, quality=25, method=3
            )
            yield struct.pack("<H", len(chunk)) + chunk[:, 0].tobytes() + file.getvalue()
    else:
        for start in range(0, len(content), 4 * _FLOATS):
            chunk = content[start : start + 4 * _FLOATS]
            words, rest = chunk[: len(chunk) // 4 * 4], chunk[len(chunk) // 4 * 4 :]
            planes = np.frombuffer(words, np.uint8).reshape(-1, 4).T
            yield zlib.compress(planes.tobytes() + rest, 6)


def _decoded(path: str, piece: bytes) -> bytes:
    if path.endswith(".bin"):
        (n,) = struct.unpack_from("<H", piece)
        labels = np.frombuffer(piece, np.uint8, n, 2)
        pixels = np.asarray(Image.open(io.BytesIO(piece[2 + n :])))
        planes = pixels.reshape(n, 32, 32, 3).transpose(0, 3, 1, 2).reshape(n, -1)
        return np.column_stack([labels, planes]).tobytes()
    chunk = zlib.decompress(piece)
    planes = np.frombuffer(chunk, np.uint8, len(chunk) // 4 * 4).reshape(4, -1)
    return planes.T.tobytes() + chunk[len(chunk) // 4 * 4 :]
