"""The SQL that ships with the package: `migrations/` (each file once) and `sql/` (re-applied by every setup)."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path


@dataclass(frozen=True)
class SqlFile:
    """One file, with line ends of its own platform turned into newlines."""

    name: str
    text: str

    @property
    def checksum(self) -> str:
        return sha256(self.text.encode()).hexdigest()


def read(folder: str) -> list[SqlFile]:
    """The files of `migrations` or `sql`, in the order of their names.

    They lie inside the installed package (a wheel, a zip) or beside it (a checkout, an editable install); where they
    are missing the installation is broken, and FileNotFoundError says so.
    """
    found = sorted(_sql_files(_folder(folder)), key=lambda file: file.name)
    if not found:
        raise FileNotFoundError(f"ducto_pg was installed without its {folder}/*.sql")
    return found


def template() -> str:
    """The text around them that installs."""
    return files("ducto_pg.install").joinpath("install.sql").read_text("utf-8")


def _folder(name: str) -> Traversable:
    inside = files("ducto_pg").joinpath(name)
    return inside if inside.is_dir() else Path(__file__).parents[2] / name


def _sql_files(folder: Traversable) -> Iterator[SqlFile]:
    if folder.is_dir():
        for file in folder.iterdir():
            if file.name.endswith(".sql"):
                yield SqlFile(file.name, file.read_text("utf-8").replace("\r\n", "\n"))
