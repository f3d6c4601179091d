"""As much of a Kubernetes API server as kubectl needs to create, list and delete JobSets; no controller behind it."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jsonschema

GROUP, VERSION = "jobset.x-k8s.io", "v1alpha2"
SERVED = f"{GROUP}/{VERSION}"
RESOURCE = {"name": "jobsets", "singularName": "jobset", "namespaced": True, "kind": "JobSet"}
# kubectl reads here that the server itself refuses fields that it does not know.
OPENAPI = {
    "paths": {
        f"/apis/{SERVED}/namespaces/{{namespace}}/jobsets/{{name}}": {
            "patch": {
                "x-kubernetes-group-version-kind": {"group": GROUP, "version": VERSION, "kind": "JobSet"},
                "parameters": [{"name": "fieldValidation", "in": "query"}],
            }
        }
    }
}
GROUP_VERSION = {"groupVersion": SERVED, "version": VERSION}
DISCOVERY = {
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": []},
    "/apis": {
        "kind": "APIGroupList",
        "groups": [{"name": GROUP, "versions": [GROUP_VERSION], "preferredVersion": GROUP_VERSION}],
    },
    f"/apis/{SERVED}": {
        "kind": "APIResourceList",
        "groupVersion": SERVED,
        "resources": [RESOURCE | {"verbs": ["create", "delete", "get", "list", "watch"]}],
    },
    "/openapi/v3": {"paths": {f"apis/{SERVED}": {"serverRelativeURL": "/openapi/jobset"}}},
    "/openapi/jobset": {"openapi": "3.0.0", "info": {"title": "x", "version": "1"}} | OPENAPI,
}


class ApiServer:
    """Serves on a free port of this machine while entered. items: name -> JobSet; requests: method and path of each."""

    def __init__(self, schema: jsonschema.Draft202012Validator):
        self.schema, self.items, self.requests = schema, {}, []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> "ApiServer":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def configuration(self, folder: Path) -> Path:
        """A kubeconfig that leads here."""
        address = f"http://127.0.0.1:{self._server.server_address[1]}"
        path = folder / "kubeconfig"
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": address}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "nobody"}}],
            "users": [{"name": "nobody", "user": {}}],
        }
        path.write_text(json.dumps(content))
        return path

    def answer(self, method: str, target: str, body: Any) -> tuple[int, dict[str, Any]]:
        """Status and content of an answer."""
        url = urlsplit(target)
        if url.path in DISCOVERY:
            return 200, {"apiVersion": "v1"} | DISCOVERY[url.path]
        base, _, name = url.path.partition("/jobsets")
        if not base.startswith(f"/apis/{SERVED}/namespaces/"):
            return _failure(404, "NotFound", f"{url.path} is not here")
        self.requests.append(f"{method} {url.path.removeprefix(base)}")
        if method == "POST":
            return self._create(body)
        name = name.removeprefix("/")
        if name and name not in self.items:
            return _failure(404, "NotFound", f'jobsets.{GROUP} "{name}" not found')
        if method == "DELETE":
            del self.items[name]
            return 200, {"kind": "Status", "apiVersion": "v1", "status": "Success", "details": {"name": name}}
        return 200, self.items[name] if name else self._list(parse_qs(url.query))

    def _create(self, item: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        name = item["metadata"]["name"]
        if name in self.items:
            return _failure(409, "AlreadyExists", f'jobsets.{GROUP} "{name}" already exists')
        if found := [error.message for error in self.schema.iter_errors(item)]:
            return _failure(400, "BadRequest", f"JobSet in version {VERSION}: strict decoding error: {found[0]}")
        self.items[name] = item
        return 201, item

    def _list(self, query: dict[str, list[str]]) -> dict[str, Any]:
        wanted = [pair.split("=") for pair in query.get("labelSelector", [])]
        items = [item for item in self.items.values() if all(item["metadata"]["labels"].get(k) == v for k, v in wanted)]
        return {"kind": "JobSetList", "apiVersion": SERVED, "metadata": {"resourceVersion": "1"}, "items": items}


def _failure(code: int, reason: str, message: str) -> tuple[int, dict[str, Any]]:
    status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    return code, status | {"reason": reason, "message": message, "code": code}


def _handler(server: ApiServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            code, content = server.answer(self.command, self.path, body)
            answer = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_DELETE = _serve

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: tests ask for `requests`."""

    return Handler
