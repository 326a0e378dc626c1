"""Programs that tests run and that are no Python packages: from npm and from Debian, kept in the user's cache."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from psycopg.conninfo import conninfo_to_dict

_VARIABLES = {"host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "password": "PGPASSWORD", "dbname": "PGDATABASE"}


def environment(dsn: str, **more: str) -> dict[str, str]:
    """This process's environment, with the PG… variables of this database and no others."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PG") and name != "DATABASE_URL"}
    parts = conninfo_to_dict(dsn)
    return kept | {variable: str(parts[key]) for key, variable in _VARIABLES.items() if parts.get(key)} | more


def npm_packages(folder: Path) -> Path:
    """`node_modules` as the lock file of a folder says, installed once; skips where that cannot be."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("needs node and npm")
    lock = (folder / "package-lock.json").read_bytes()

    def install(part: Path) -> None:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(folder / name, part)
        _run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], part)

    return _cached(f"npm-{hashlib.sha256(lock).hexdigest()[:16]}", install) / "node_modules"


def debian_program(program: str, *packages: str, folder: Path) -> Path:
    """A program of Debian's packages: this machine's own, or else theirs, unpacked and not installed.

    Then it lies in `folder`, its libraries beside it. Skips where it cannot be had.
    """
    if found := shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin"):
        return Path(found)
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        pytest.skip(f"needs {program}")

    def unpack(part: Path) -> None:
        try:
            _run(["apt-get", "download", *packages], part)
        except ProgramError:
            if os.geteuid():
                raise
            _run(["apt-get", "update"], part)
            _run(["apt-get", "download", *packages], part)
        for package in list(part.glob("*.deb")):
            _run(["dpkg-deb", "--extract", str(package), "unpacked"], part)
        for path in [*part.rglob(f"*bin/{program}"), *part.rglob("*.so.*")]:
            shutil.copy(path, part)

    home = _cached(f"debian-{program}", unpack)
    for path in home.iterdir():
        if path.is_file() and path.suffix != ".deb":
            shutil.copy(path, folder)
    return folder / program


class ProgramError(Exception):
    """A program that gets programs failed."""


def _cached(name: str, make: Callable[[Path], None]) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ducto_pg"
    home = cache / name
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not home.exists():
            part = Path(tempfile.mkdtemp(dir=cache))
            try:
                make(part)
                part.rename(home)
            except ProgramError as error:
                shutil.rmtree(part)
                if os.environ.get("CI"):
                    pytest.fail(str(error))
                pytest.skip(str(error))
    return home


def _run(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ProgramError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()[-300:]}")
