"""A PostgreSQL server of one's own for the time of a test: on loopback, in a temporary folder, without a password."""

import glob
import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

SECONDS = 60.0
DRIVERS = ("psycopg", "psycopg2")


def missing():
    """Return what is missing for a server, in words; None if nothing is."""
    if _binary("initdb") is None or _binary("postgres") is None:
        return "there is no PostgreSQL server (Debian's package: postgresql)"
    if not any(importlib.util.find_spec(name) for name in DRIVERS):
        return "there is no driver for PostgreSQL (pip install 'mixerzoo[postgres]')"
    if os.name != "posix" or (os.getuid() == 0 and _user() is None):
        return "PostgreSQL does not run as root, and there is no other user"
    return None


@contextmanager
def server():
    """Start a server; yields the URL of an empty database, and stops it."""
    folder = Path(tempfile.mkdtemp(prefix="mixerzoo-postgres-"))
    as_user = {}
    if os.getuid() == 0:
        user = _user()
        shutil.chown(folder, user)
        as_user = {"user": user, "extra_groups": []}
    try:
        subprocess.run(
            [
                _binary("initdb"),
                "-D",
                "data",
                "-U",
                "mixerzoo",
                "-A",
                "trust",
                "-E",
                "UTF8",
                "--locale=C",
                "--no-sync",
            ],
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
            **as_user,
        )
        port = _free_port()
        with (
            open(folder / "log", "wb") as log,
            subprocess.Popen(
                [_binary("postgres"), "-D", "data", "-h", "127.0.0.1", "-p", str(port), "-k", "", "-F"],
                cwd=folder,
                stdout=log,
                stderr=log,
                **as_user,
            ) as process,
        ):
            try:
                _wait(process, port, folder / "log")
                yield f"postgresql://mixerzoo@127.0.0.1:{port}/postgres"
            finally:
                process.send_signal(2)  # a fast shutdown
                with suppress(subprocess.TimeoutExpired):
                    process.wait(SECONDS)
                process.kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(process, port, log):
    until = time.monotonic() + SECONDS
    while b"ready to accept connections" not in log.read_bytes():
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"PostgreSQL did not start: {log.read_text()}")
        time.sleep(0.05)
    socket.create_connection(("127.0.0.1", port), SECONDS).close()


def _binary(name):
    found = sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"))
    return found[-1] if found else shutil.which(name)


def _user():
    import pwd

    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            pwd.getpwnam(name)
            return name
    return None


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
