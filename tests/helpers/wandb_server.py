"""A server of W&B's protocol on the loopback: it keeps what real `wandb` clients send, and what a page would show of it."""

import gzip
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0" * 40
ENTITY = "me"


@dataclass
class Run:
    """A run as it is known to the server."""

    id: str
    project: str
    name: str | None = None
    group: str | None = None
    job_type: str | None = None
    sweep: str | None = None
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)  # rows by their place in the file
    summaries: list[dict[str, Any]] = field(default_factory=list)  # each as it replaced the one before
    exit_code: int | None = None

    @property
    def summary(self) -> dict[str, Any]:
        return self.summaries[-1] if self.summaries else {}

    def rows(self) -> list[dict[str, Any]]:
        return [self.history[place] for place in sorted(self.history)]


@dataclass
class Seen:
    """What clients have sent so far."""

    url: str
    runs: dict[str, Run] = field(default_factory=dict)  # by id
    views: dict[str, dict[str, Any]] = field(default_factory=dict)  # by name
    projects: set[str] = field(default_factory=set)
    sweeps: dict[str, dict[str, Any]] = field(default_factory=dict)  # by name: the configuration, as it was sent
    queue: list[dict[str, Any]] = field(default_factory=list)  # commands for agents
    unknown: list[str] = field(default_factory=list)  # operations that this server cannot answer
    changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def login(self) -> dict[str, str]:
        """The variables of somebody who is logged in here."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def wait_for(self, predicate: Any, timeout_s: float = 60) -> Any:
        """What `predicate` returns, once it is true after one of the requests."""
        with self.changed:
            assert self.changed.wait_for(predicate, timeout_s), "never came"
            return predicate()


@contextmanager
def serve() -> Iterator[Seen]:
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        server.seen = Seen(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.seen  # type: ignore[attr-defined]
        server.shutdown()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that has ended
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        seen: Seen = self.server.seen  # type: ignore[attr-defined]
        with seen.changed:
            if self.path == "/graphql":
                answer = _graphql(seen, **{"variables": {}} | json.loads(body))
            elif found := re.fullmatch(r"/files/(\w+)/([^/]+)/(\w+)/file_stream", self.path):
                answer = _file_stream(seen.runs[found[3]], json.loads(body))
            else:
                answer = {}  # the content of a file
            seen.changed.notify_all()
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_PUT = do_POST  # noqa: N815

    def log_message(self, *arguments: Any) -> None:
        pass


def _graphql(seen: Seen, query: str, variables: dict[str, Any] | None, **_: Any) -> dict[str, Any]:
    found = re.search(r"(?:query|mutation)\s+(\w+)", query)
    name = found[1] if found else query
    if name not in _ANSWERS:
        seen.unknown.append(name)
        return {"errors": [{"message": f"unknown operation {name}"}]}
    return {"data": _ANSWERS[name](seen, {key: value for key, value in (variables or {}).items() if value is not None})}


def _file_stream(run: Run, sent: dict[str, Any]) -> dict[str, Any]:
    for name, chunk in (sent.get("files") or {}).items():
        rows = [json.loads(row) for row in chunk["content"]] if name.startswith("wandb-") else []
        if name == "wandb-history.jsonl":
            run.history |= {chunk["offset"] + number: row for number, row in enumerate(rows)}
        elif name == "wandb-summary.json":
            run.summaries += rows
    if sent.get("complete"):
        run.exit_code = sent["exitcode"]
    return {}


def _viewer(seen: Seen, asked: dict[str, Any]) -> dict[str, Any]:
    person = {"id": "v", "entity": ENTITY, "username": ENTITY, "email": None, "name": ENTITY, "admin": False}
    return {"viewer": person | {"flags": "{}", "teams": {"edges": []}, "apiKeys": {"edges": []}, "deletedAt": None}}


def _upsert_bucket(seen: Seen, asked: dict[str, Any]) -> dict[str, Any]:
    project, is_new = asked.get("project", "uncategorized"), asked["name"] not in seen.runs
    seen.projects.add(project)
    run = seen.runs.setdefault(asked["name"], Run(asked["name"], project))
    told = {"displayName": "name", "groupName": "group", "jobType": "job_type", "sweep": "sweep", "tags": "tags"}
    for key, attribute in told.items():
        if key in asked:
            setattr(run, attribute, asked[key])
    for key, item in json.loads(asked.get("config") or "{}").items():
        run.config[key] = item["value"]
    entity = {"id": "p", "name": project, "entity": {"id": "e", "name": ENTITY}}
    bucket = {"id": "b", "name": run.id, "displayName": run.name, "description": None, "config": None}
    bucket |= {"sweepName": run.sweep, "project": entity, "historyLineCount": 0}
    return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}


def _create_run_files(seen: Seen, asked: dict[str, Any]) -> dict[str, Any]:
    files = [{"name": name, "uploadUrl": f"{seen.url}/storage/{name}"} for name in asked["files"]]
    return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}


def _create_artifact(seen: Seen, asked: dict[str, Any]) -> dict[str, Any]:
    """Each artifact is one that the server has already."""
    sequence = {"id": "s", "latestArtifact": {"id": "a", "versionIndex": 0}}
    return {"createArtifact": {"artifact": {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}}}


def _view(seen: Seen, asked: dict[str, Any]) -> dict[str, Any]:
    if asked["name"] not in seen.projects:
        return {"project": None}
    nodes = [view for name, view in seen.views.items() if name == asked["viewName"]]
    return {"project": {"allViews": {"edges": [{"node": node} for node in nodes]}}}


def _upsert_view(seen: Seen, asked: dict[str, Any]) -> dict[str, Any]:
    """As the real one: without an id, a view is new."""
    by_id = {view["id"]: name for name, view in seen.views.items()}
    number = asked.get("id") or f"view-{len(seen.views)}"
    is_new = number not in by_id
    name = asked["name"] if asked["name"] not in seen.views or not is_new else f"{asked['name']}-{number}"
    seen.views[name] = asked | {"id": number, "name": name}
    return {"upsertView": {"view": {"id": number, "name": name}, "inserted": is_new}}


def _sweep(seen: Seen, asked: dict[str, Any]) -> dict[str, Any]:
    found = {"id": "s", "name": asked["sweep"], "config": seen.sweeps[asked["sweep"]]["config"], "runs": {"edges": []}}
    return {"project": {"sweep": found}}


def _upsert_sweep(seen: Seen, asked: dict[str, Any]) -> dict[str, Any]:
    name = f"sweep{len(seen.sweeps)}"
    seen.sweeps[name] = asked
    project = {"name": asked["projectName"], "entity": {"name": ENTITY}}
    return {"upsertSweep": {"sweep": {"name": name, "project": project}, "configValidationWarnings": []}}


def _heartbeat(seen: Seen, asked: dict[str, Any]) -> dict[str, Any]:
    """The next command of the queue, for an agent that does nothing else."""
    is_busy = any(json.loads(asked["runState"]).values())
    commands = [] if is_busy else [seen.queue.pop(0) if seen.queue else {"type": "exit"}]
    return {"agentHeartbeat": {"agent": {"id": asked["id"]}, "commands": json.dumps(commands)}}


_ANSWERS = {
    "Viewer": _viewer,
    "GetDefaultEntity": _viewer,
    "ServerFeaturesQuery": lambda seen, asked: {"serverInfo": {"features": []}},
    "UpsertBucket": _upsert_bucket,
    "CreateRunFiles": _create_run_files,
    "OrganizationCoreWeaveOrganizationID": lambda seen, asked: {"entity": None},
    "ArtifactType": lambda seen, asked: {"project": None},
    "CreateArtifact": _create_artifact,
    "View": _view,
    "UpsertView2": _upsert_view,
    "SweepWithRuns": _sweep,
    "UpsertSweep": _upsert_sweep,
    "CreateAgent": lambda seen, asked: {"createAgent": {"agent": {"id": "agent"}}},
    "Heartbeat": _heartbeat,
}
