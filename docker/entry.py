"""What a container of ducto_pg does.

`secrets` makes the passwords and the key that signs tokens, once; `install` makes the roles, installs and publishes the
prices, as often as you like; `token [USER_ID]` prints a token of the server side, or of an end user; `url` prints the
owner's connection string; any other command is one of `ducto-pg`, as the owner.
"""

import base64
import hmac
import json
import os
import secrets
import sys
import time
from importlib import import_module
from pathlib import Path

import psycopg
from psycopg.conninfo import make_conninfo

import ducto_pg

OWNER = "ducto_owner"
ROLES = Path(__file__).with_name("roles.sql")
PRICES = Path(os.environ.get("DUCTO_PRICES", "/etc/ducto/prices.yaml"))

# Two folders, so that PostgREST sees nothing of the database's superuser.
FOLDERS = Path(os.environ.get("DUCTO_SECRETS", "/secrets"))
SUPERUSER, OWNERS = FOLDERS / "database" / "superuser", FOLDERS / "database" / "owner"
AUTHENTICATOR, JWT, URI = (FOLDERS / "api" / name for name in ("authenticator", "jwt", "uri"))


def make_secrets() -> None:
    """Make what is missing; what is there stays."""
    for path in (SUPERUSER, OWNERS, AUTHENTICATOR, JWT):
        keep(path, secrets.token_urlsafe(48))
    place = f"{os.environ['PGHOST']}:{os.environ.get('PGPORT', '5432')}/{os.environ['PGDATABASE']}"
    keep(URI, f"postgresql://authenticator:{AUTHENTICATOR.read_text()}@{place}")


def keep(path: Path, text: str) -> None:
    """Write a file that others read and nobody changes, all of it or nothing."""
    if not path.exists():
        part = path.with_name(f".{path.name}")
        part.unlink(missing_ok=True)
        part.write_text(text)
        part.chmod(0o444)
        part.rename(path)


def install() -> None:
    """Bring roles, schema and prices to what they shall be."""
    with psycopg.connect(make_conninfo(user="postgres", password=SUPERUSER.read_text())) as conn:
        for role, path in {OWNER: OWNERS, "authenticator": AUTHENTICATOR}.items():
            conn.execute("select set_config(%s, %s, true)", [f"docker.{role}", path.read_text()])
        conn.execute(ROLES.read_bytes())
    with ducto_pg.CreditManager(owner()) as credits:
        credits.setup().or_raise()
        version = credits.publish_pricing(PRICES).version
    print(f"ducto_pg {ducto_pg.__version__} is installed, version {version} of the prices is active")


def owner() -> str:
    """The connection string of the role that owns the database, which is no superuser."""
    return make_conninfo(user=OWNER, password=OWNERS.read_text())


def token(user_id: str | None) -> str:
    """A JWT for PostgREST, good for an hour."""
    claims: dict[str, object] = {"role": "authenticated", "sub": user_id} if user_id else {"role": "service_role"}
    claims["exp"] = int(time.time()) + 3600
    signed = ".".join(_base64(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, claims))
    return f"{signed}.{_base64(hmac.digest(JWT.read_bytes(), signed.encode(), 'sha256'))}"


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def main(command: str, *arguments: str) -> int:
    """Do one of them; the exit code."""
    match command:
        case "secrets":
            make_secrets()
        case "install":
            install()
        case "token":
            print(token(*arguments or [None]))
        case "url":
            port = os.environ.get("DUCTO_DATABASE_PORT", "5433")
            print(f"postgresql://{OWNER}:{OWNERS.read_text()}@127.0.0.1:{port}/{os.environ['PGDATABASE']}")
        case _:
            os.environ["DATABASE_URL"] = owner()
            code: int = import_module("ducto_pg.cli").main([command, *arguments])
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
