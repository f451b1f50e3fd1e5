"""Runs in MLflow: one parent a search, one child an evaluated plan. No global state, no autologging."""

from __future__ import annotations

import logging
import math
import os
import re
import socket
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mixerzoo.errors import MixerzooError
from mixerzoo.plan import Plan
from mixerzoo.temporary import temporary_of

# A library should not report on its users unasked; MLflow reads this when it is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

PARENT_TAG = "mlflow.parentRunId"
# Shows the experiment as training runs, not as a chat application.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
_BATCH = 100  # parameters that MLflow takes at once
_PARAM_LENGTH = 6000
_TAG_LENGTH = 8000
_KEY_LENGTH = 250
_CONNECT_SECONDS = 5.0
_SQLITE = "sqlite:///"


def resolve_uri(tracking_uri: str | None) -> str:
    """Return the tracking URI: as given, else $MLFLOW_TRACKING_URI, else `mlflow.db` in the working directory."""
    chosen = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    return chosen or f"{_SQLITE}{Path.cwd() / 'mlflow.db'}"


def is_there(tracking_uri: str | None) -> bool:
    """Whether there is a store already; of a server it is taken for granted."""
    uri = resolve_uri(tracking_uri)
    return not uri.startswith(_SQLITE) or Path(uri.removeprefix(_SQLITE)).exists()


class Tracker:
    """Writes the runs of one experiment.

    Args:
        tracking_uri: where to; see `resolve_uri`. Artifacts of a SQLite store go to `mlartifacts` beside it.
        experiment: name of the experiment; made if there is none.

    Raises:
        MixerzooError: from any method, naming the URI, if the store or the server does not answer.
    """

    def __init__(self, tracking_uri: str | None, experiment: str) -> None:
        self.uri = resolve_uri(tracking_uri)
        self.experiment = experiment
        with self._answering("reach"):
            _check_reachable(self.uri)
            _quiet()
            from mlflow import MlflowClient

            _make_whole(self.uri)
            self._client: Any = MlflowClient(tracking_uri=self.uri)
            self.experiment_id = self._open_experiment()

    def _open_experiment(self) -> str:
        found = self._client.get_experiment_by_name(self.experiment)
        if found is None:
            root = _artifact_root(self.uri)
            location = None if root is None else (root / _safe(self.experiment)).as_uri()
            return str(
                self._client.create_experiment(
                    self.experiment, artifact_location=location, tags=_EXPERIMENT_TAGS
                )
            )
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def start_parent(
        self, run_name: str, params: Mapping[str, object], tags: Mapping[str, str] | None = None
    ) -> str:
        """Start the run of a search and return its id."""
        with self._answering("write to"):
            run = self._client.create_run(self.experiment_id, run_name=run_name, tags=_tags(tags or {}))
            run_id = str(run.info.run_id)
            self._log(run_id, params=params)
            return run_id

    def resume_parent(self, run_id: str) -> bool:
        """Mark an earlier run as running again; False if this store has no such run."""
        from mlflow.exceptions import MlflowException

        with self._answering("read from"):
            try:
                run = self._client.get_run(run_id)
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return False
                raise
            if run.info.lifecycle_stage == "deleted" or run.info.experiment_id != self.experiment_id:
                return False
            self._client.update_run(run_id, status="RUNNING")
            return True

    def children(self, parent_id: str) -> dict[str, str]:
        """Return name -> run id of a run's finished children, so that a resumed search adds none twice.

        One that is not finished may be without its figures: the process that wrote it was killed.
        """
        with self._answering("read from"):
            found: dict[str, str] = {}
            token: str | None = None
            while True:
                page = self._client.search_runs(
                    [self.experiment_id],
                    f"tags.`{PARENT_TAG}` = '{parent_id}' and attributes.status = 'FINISHED'",
                    page_token=token,
                )
                found.update({run.info.run_name: run.info.run_id for run in page})
                token = page.token
                if not token:
                    return found

    def log_child(
        self,
        parent_id: str,
        run_name: str,
        *,
        plan: Plan,
        short_name: str,
        metrics: Mapping[str, float | None],
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """Write one evaluated plan as a finished child run and return its id.

        Args:
            parent_id: run of the search.
            run_name: name of the child.
            plan: becomes one parameter a site, and `count.<mixer>` for each mixer in it.
            short_name: nickname of the plan, a parameter.
            metrics: such as loss, agreement, accuracy, latency_ms, predicted_ms, params, on_frontier; None and
                values that are not finite are left out.
            tags: more tags, such as where the plan came from.
        """
        counts = Counter(candidate.mixer for _, candidate in plan.choices)
        params: dict[str, object] = {"plan": short_name}
        params |= {f"count.{mixer}": count for mixer, count in sorted(counts.items())}
        params |= plan.to_json()
        with self._answering("write to"):
            run = self._client.create_run(
                self.experiment_id, run_name=run_name, tags=_tags({**(tags or {}), PARENT_TAG: parent_id})
            )
            run_id = str(run.info.run_id)
            self._log(run_id, params=params, metrics=metrics)
            self._client.set_terminated(run_id, status="FINISHED")
            return run_id

    def update_child_metric(self, run_id: str, name: str, value: float) -> None:
        """Write a metric that is only known later, such as whether the plan ended on the frontier."""
        with self._answering("write to"):
            self._log(run_id, metrics={name: value})

    def log_step(self, run_id: str, step: int, metrics: Mapping[str, float | None]) -> None:
        """Write a point of a run's curves; None and values that are not finite are left out."""
        with self._answering("write to"):
            self._log(run_id, metrics=metrics, step=step)

    def last_step(self, run_id: str, metric: str) -> int:
        """Return the step of the last point of a curve, so that a resumed run adds none twice; -1 without any."""
        with self._answering("read from"):
            history = self._client.get_metric_history(run_id, metric)
            return max((point.step for point in history), default=-1)

    def log_artifacts(self, parent_id: str, paths: Iterable[Path]) -> None:
        """Upload files and directories to the run; ones that do not exist are left out."""
        with self._answering("upload artifacts to"):
            for path in paths:
                if path.is_dir():
                    self._client.log_artifacts(parent_id, str(path), artifact_path=path.name)
                elif path.exists():
                    self._client.log_artifact(parent_id, str(path))

    def finish(
        self, parent_id: str, status: str = "FINISHED", metrics: Mapping[str, float | None] | None = None
    ) -> None:
        """End the run of a search as FINISHED, FAILED or KILLED, with its last metrics."""
        with self._answering("write to"):
            self._log(parent_id, metrics=metrics or {})
            self._client.set_terminated(parent_id, status=status)

    def _log(
        self,
        run_id: str,
        *,
        params: Mapping[str, object] | None = None,
        metrics: Mapping[str, float | None] | None = None,
        step: int = 0,
    ) -> None:
        """Write in one request where MLflow's limits allow it, in several where not."""
        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        values = [
            Metric(_safe(name), float(value), now, step)
            for name, value in (metrics or {}).items()
            if value is not None and math.isfinite(value)
        ]
        texts = [Param(_safe(name), str(value)[:_PARAM_LENGTH]) for name, value in (params or {}).items()]
        if values or texts:
            self._client.log_batch(run_id, metrics=values, params=texts[:_BATCH])
        for start in range(_BATCH, len(texts), _BATCH):
            self._client.log_batch(run_id, params=texts[start : start + _BATCH])

    def close(self) -> None:
        """Let go of the database, where there is one."""
        engine = getattr(self._client._tracking_client.store, "engine", None)
        if engine is not None:
            engine.dispose()

    @contextmanager
    def _answering(self, what: str) -> Iterator[None]:
        """Turn whatever the store or the server raises into one line that names it."""
        try:
            with warnings.catch_warnings():
                # MLflow calls deprecated parts of its own dependencies: nothing that a user can mend.
                warnings.simplefilter("ignore", DeprecationWarning)
                warnings.simplefilter("ignore", FutureWarning)
                yield
        except MixerzooError:
            raise
        except Exception as error:  # MLflow, SQLAlchemy, requests and boto each raise their own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise MixerzooError(
                f"cannot {what} the MLflow store '{_without_password(self.uri)}': {reason}; "
                "give another one with --tracking-uri"
            ) from error


def open_ui(tracking_uri: str | None, port: int = 5000) -> None:
    """Serve MLflow's user interface on 127.0.0.1 until interrupted.

    Raises:
        MixerzooError: if there is nothing to show, the port is taken, or the server fails.
    """
    uri = resolve_uri(tracking_uri)
    if uri.startswith(("http://", "https://")):
        raise MixerzooError(f"'{_without_password(uri)}' is a server already: open it in a browser")
    if uri.startswith(_SQLITE) and not Path(uri.removeprefix(_SQLITE)).exists():
        raise MixerzooError(f"no runs at '{uri}' yet: run `mixerzoo search` first, or give --tracking-uri")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise MixerzooError(
                f"port {port} is taken ({error.strerror}): choose another with --port"
            ) from error
    command = [sys.executable, "-m", "mlflow", "ui", "--workers", "1", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--backend-store-uri", uri]
    # Without its job runner the server starts in a second and needs one process.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    # Without the query MLflow opens on its pages for chat applications.
    print(f"http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning", flush=True)
    try:
        code = subprocess.call(command, env=environment)
    except KeyboardInterrupt:
        return
    if code not in (0, 130, -2):
        raise MixerzooError(f"`mlflow ui` for '{_without_password(uri)}' ended with exit code {code}")


def _artifact_root(uri: str) -> Path | None:
    """Return where the artifacts of a SQLite store go; a server decides for itself."""
    if not uri.startswith(_SQLITE):
        return None
    return Path(uri.removeprefix(_SQLITE)).absolute().parent / "mlartifacts"


def _check_reachable(uri: str) -> None:
    """Fail at once where nothing listens: MLflow itself would go on trying for minutes."""
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https") and parts.hostname:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=_CONNECT_SECONDS).close()
    elif uri.startswith(_SQLITE):
        folder = Path(uri.removeprefix(_SQLITE)).absolute().parent
        if not folder.is_dir():
            raise FileNotFoundError(f"no directory '{folder}'")


def _make_whole(uri: str) -> None:
    """Make a new SQLite store under another name, and only then give it its own.

    MLflow takes seconds and hundreds of transactions to make one; a process killed in between would leave a part
    that MLflow can neither use nor mend.
    """
    path = Path(uri.removeprefix(_SQLITE)).absolute()
    if not uri.startswith(_SQLITE) or "?" in uri or path.name == ":memory:" or path.exists():
        return
    from mlflow import MlflowClient

    temporary = temporary_of(path)
    try:
        client: Any = MlflowClient(tracking_uri=f"{_SQLITE}{temporary}")
        client._tracking_client.store.engine.dispose()
        if not path.exists():  # another process may have been faster
            temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def _quiet() -> None:
    """Keep the making of a new database (some forty lines) off the screen; warnings still show."""
    for name in ("alembic", "mlflow.store", "mlflow.tracking"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _without_password(uri: str) -> str:
    return re.sub(r"//([^/@:]*):[^/@]*@", r"//\1:***@", uri)


def _safe(name: str) -> str:
    """Return a name that MLflow takes as a key."""
    return re.sub(r"[^\w\-. /:]", "_", name)[:_KEY_LENGTH]


def _tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Return tags within MLflow's limits, with what its list of runs shows as their source."""
    every = {"mlflow.source.name": "mixerzoo", "mlflow.source.type": "LOCAL", **tags}
    return {_safe(name): str(value)[:_TAG_LENGTH] for name, value in every.items()}
