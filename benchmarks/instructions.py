"""How many instructions a call costs the server, counted by valgrind, so that a busy machine does not matter.

    .venv/bin/python benchmarks/instructions.py

A server prepares a database; copies of its data are run by `postgres --single` under callgrind with 20 and with 120
calls. The difference is told, less an empty function's. Needs valgrind (apt install valgrind) and some minutes.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psycopg
from common import ROWS_FUNCTION, USAGE, open_accounts, publish, start

import ducto_pg
from ducto_pg.embedded import Server

EMPTY = "create function bench_empty() returns bigint language plpgsql as $$ begin return 1; end $$"
CALLS = {
    "its two rows alone": "bench_rows('plain-1', $1::jsonb, $2)",
    "plain account": "ducto.deduct('plain-1', $1::jsonb, $2)",
    "on a plan": "ducto.deduct('planned-1', $1::jsonb, $2)",
    "plan, two caps": "ducto.deduct('capped-1', $1::jsonb, $2)",
    "plan, one cap": "ducto.deduct('one-1', $1::jsonb, $2)",
    "a label's cap, 3 labels": "ducto.deduct('label-1', $1::jsonb, $2, p_labels => '{key-1,chat,session-1}')",
    "of it a hold": "ducto.reserve('capped-1', $1::jsonb, p_idempotency_key => $2)",
    "of it hold + settlement": "ducto.deduct('capped-1', $1::jsonb, $2, null, (select h.reservation_id"
    " from ducto.reserve('capped-1', $1::jsonb, p_idempotency_key => $2) as h))",
}
# Accounts on a plan with one cap, of everything or of a label.
ONE_CAP = {"one-1": "", "label-1": ", p_label => 'key-1'"}
FEW, MANY = 20, 120


def main() -> None:
    if not shutil.which("valgrind"):
        raise SystemExit("valgrind is not installed: apt install valgrind")
    with start({"fsync": "off"}) as server, TemporaryDirectory(dir="/tmp") as folder:
        with psycopg.connect(server.dsn(), autocommit=True) as conn:
            ducto_pg.setup(conn).or_raise()
            publish(conn, 10)
            conn.execute(ROWS_FUNCTION + EMPTY)
            open_accounts(conn, 500)
            for account, of in ONE_CAP.items():
                conn.execute("select ducto.add_credits(%s, 1000000000000)", [account])
                conn.execute("select ducto.set_user_plan(%s, 'free')", [account])
                conn.execute(f"select ducto.set_spend_cap(%s, 1000000000000, 'monthly'{of})".encode(), [account])
                conn.execute("select ducto.deduct(%s, %s, 'first', p_labels => '{key-1}')", [account, USAGE])
            conn.execute("checkpoint")
            row = conn.execute("select current_setting('data_directory')").fetchone()
            assert row
        counter = Counter(server, Path(row[0]), Path(folder))
        empty = counter.per_call("bench_empty()")
        print(f"{server.origin}: thousand instructions of a call, beyond an empty function's {empty // 1000}")
        for name, call in CALLS.items():
            print(f"  {name:<28}{(counter.per_call(call) - empty) // 1000:>8,}")


class Counter:
    """Runs calls on copies of a cluster."""

    def __init__(self, server: Server, data: Path, folder: Path) -> None:
        self.server, self.data, self.folder = server, data, folder
        folder.chmod(0o755)

    def per_call(self, call: str) -> int:
        """Instructions of one call."""
        return (self._count(call, MANY) - self._count(call, FEW)) // (MANY - FEW)

    def _count(self, call: str, times: int) -> int:
        copy = self.folder / "data"
        shutil.rmtree(copy, ignore_errors=True)
        subprocess.run(["cp", "-a", str(self.data), str(copy)], check=True)
        (copy / "postmaster.pid").unlink()
        owner = self.data.stat()
        arguments = f"('{USAGE}', 'key-%s')" if "$1" in call else ""
        lines = [f"prepare call as select * from {call}"]
        lines += [f"execute call{arguments.replace('%s', str(number))}" for number in range(times)]
        # The copy must be run by the user that it belongs to.
        user: dict[str, Any] = {} if os.geteuid() else {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}
        assert self.server.bindir
        command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
        command += [str(self.server.bindir / "postgres"), "--single", "-D", str(copy), "postgres"]
        for setting in ("jit=off", "autovacuum=off", "synchronous_commit=off"):
            command[-1:-1] = ["-c", setting]
        done = subprocess.run(
            command, input="\n".join(lines) + "\n", capture_output=True, text=True, check=False, cwd="/", **user
        )
        found = re.search(r"Collected : (\d+)", done.stderr)
        if not found or "ERROR:" in done.stderr:
            raise SystemExit(f"{call}: {done.stderr[-2000:]}")
        return int(found[1])


if __name__ == "__main__":
    main()
