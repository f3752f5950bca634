"""The loopback Hub's responses to writes.

Imitated from huggingface_hub's source: `HfApi.whoami` (GET /api/whoami-v2), `HfApi.create_repo` (POST
/api/repos/create: 409 exists, 403 if the namespace is not the user's), `HfApi.auth_check` (GET …/auth-check[/write]),
`HfApi._validate_yaml` (POST /api/validate-yaml: errors and warnings), `_commit_api._fetch_upload_modes` (POST
…/preupload/REV), `lfs.post_lfs_batch_info`, `lfs._upload_single_part`, `_upload_multi_part` and
`_get_completion_payload` (by number, with ETags), `_commit_api._prepare_commit_payload` (ndjson: header, file, lfsFile,
deletedFile, deletedFolder), `HfApi.create_tag` and `delete_tag`, `HfApi.create_branch`. The rules for metadata follow
the Hub's documentation of model cards.
"""

import base64
import hashlib
import json
import re
import urllib.parse
from typing import TYPE_CHECKING, Any

import yaml

from support.loopback_repository import Repository, is_lfs

if TYPE_CHECKING:
    from support.loopback_hub import _Handler

_WRITE = re.compile(
    r"/api/(?P<kind>model|dataset|space)s/(?P<repo>[^/]+/[^/]+)/"
    r"(?P<action>auth-check|preupload|commit|tag|branch)(?:/(?P<rest>[^/]+))?"
)
_BATCH = re.compile(r"/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
_LFS = re.compile(r"/lfs/(?P<action>upload|complete|verify)/(?P<oid>[0-9a-f]{64})(?:/(?P<part>\d+))?")
_LICENSES = {"mit", "apache-2.0", "odc-by", "cc-by-4.0", "openrail", "other", "unknown"}
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def serve_writing(handler: "_Handler", path: str, body: bytes) -> bool:
    """Respond to a write; return False for any other request."""
    if path == "/api/whoami-v2":
        _whoami(handler)
    elif path == "/api/repos/create":
        _create(handler, json.loads(body))
    elif path == "/api/validate-yaml":
        errors = metadata_errors(json.loads(body))
        response = {"errors": [{"message": error} for error in errors], "warnings": []}
        handler.json(response, 400 if errors else 200)
    elif lfs := _LFS.fullmatch(path):
        _store(handler, lfs, body)
    elif batch := _BATCH.fullmatch(path):
        if _writable_repository(handler, "dataset" if batch["kind"] else "model", batch["repo"]):
            _batch(handler, json.loads(body))
    elif write := _WRITE.fullmatch(path):
        wants_to_write = write["action"] != "auth-check" or write["rest"] == "write"
        if not wants_to_write or (repository := _writable_repository(handler, write["kind"], write["repo"])) is None:
            return True
        with handler.server.lock:
            name = ("" if write["kind"] == "model" else write["kind"] + "s/") + write["repo"]
            _write(handler, repository, write["action"], urllib.parse.unquote(write["rest"] or ""), name, body)
    else:
        return False
    return True


def _whoami(handler: "_Handler") -> None:
    if handler.names is None:
        handler.json({"error": "Invalid username or password."}, 401)
    else:
        orgs = [{"name": name} for name in handler.names[1:]]
        handler.json({"type": "user", "name": handler.names[0], "orgs": orgs})


def _create(handler: "_Handler", request: dict[str, Any]) -> None:
    if handler.names is None:
        handler.json({"error": "Invalid username or password."}, 401)
        return
    name = f"{request['organization'] or handler.names[0]}/{request['name']}"
    key = (request.get("type") or "model", name)
    if name.split("/")[0] not in handler.names:
        handler.json({"error": f'You don\'t have the rights to create a model under the namespace "{name}"'}, 403)
    elif key in handler.server.repositories:
        handler.json({"error": "You already created this repo", "url": f"{handler.server.endpoint}/{name}"}, 409)
    else:
        handler.server.repositories[key] = Repository(private=request.get("visibility") == "private")
        handler.json({"url": f"{handler.server.endpoint}/{name}"})


def _writable_repository(handler: "_Handler", kind: str, name: str) -> Repository | None:
    """Return the repository, or respond with an error and return None."""
    repository = handler.readable(kind, name)
    if handler.names is None:
        handler.respond(401, b'{"error":"Invalid username or password."}')
    elif repository is None:
        handler.respond(404, X_Error_Code="RepoNotFound")
    elif name.split("/")[0] not in handler.names:
        handler.respond(403, X_Error_Message="you do not have write access")
    else:
        return repository
    return None


def _write(handler: "_Handler", repository: Repository, action: str, rest: str, name: str, body: bytes) -> None:
    if action == "auth-check":
        handler.json({})
    elif action == "preupload":
        files = repository.files(rest)
        handler.json({"files": [_upload_mode(files, entry) for entry in json.loads(body)["files"]]})
    elif action == "commit":
        _commit(handler, repository, rest, name, [json.loads(line) for line in body.splitlines()])
    elif action == "branch":
        start = json.loads(body).get("startingPoint", "main")
        if rest in repository.branches:
            handler.respond(409)
        else:
            repository.branches[rest] = repository.resolve(start) or ""
            handler.respond(200)
    elif handler.command == "DELETE":
        repository.tags.pop(rest)
        handler.respond(200)
    else:
        tag, commit = json.loads(body)["tag"], repository.resolve(rest)
        if tag in repository.tags:
            handler.respond(409)
        elif commit is None:
            handler.respond(404, X_Error_Code="RevisionNotFound")
        else:
            repository.tags[tag] = commit
            handler.respond(200)


def _upload_mode(files: dict[str, bytes], entry: dict[str, Any]) -> dict[str, Any]:
    path = entry["path"]
    existing, large = files.get(path), is_lfs(path, entry["size"])
    oid = None
    if existing is not None:
        oid = (
            Repository.sha256(existing) if large else hashlib.sha1(b"blob %d\0" % len(existing) + existing).hexdigest()
        )
    return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}


def _batch(handler: "_Handler", request: dict[str, Any]) -> None:
    hub = handler.server
    objects = []
    for entry in request["objects"]:
        oid, size = entry["oid"], entry["size"]
        response: dict[str, Any] = {"oid": oid, "size": size}
        if oid not in hub.large_files:
            upload: dict[str, Any] = {"href": f"{hub.endpoint}/lfs/upload/{oid}"}
            if size > hub.part_bytes:
                numbers = range(1, -(-size // hub.part_bytes) + 1)
                urls = {f"{n:05d}": f"{hub.endpoint}/lfs/upload/{oid}/{n}" for n in numbers}
                upload = {
                    "href": f"{hub.endpoint}/lfs/complete/{oid}",
                    "header": {"chunk_size": str(hub.part_bytes), **urls},
                }
            response["actions"] = {"upload": upload, "verify": {"href": f"{hub.endpoint}/lfs/verify/{oid}"}}
        objects.append(response)
    handler.json({"transfer": "basic", "objects": objects})


def _store(handler: "_Handler", lfs: "re.Match[str]", body: bytes) -> None:
    hub, oid = handler.server, lfs["oid"]
    if lfs["action"] == "upload" and lfs["part"]:
        hub.parts.setdefault(oid, {})[int(lfs["part"])] = body
        handler.respond(200, ETag=f'"{Repository.sha256(body)}"')
        return
    if lfs["action"] == "complete":
        parts = hub.parts[oid]
        reported = [(part["partNumber"], part["etag"]) for part in json.loads(body)["parts"]]
        if reported != [(number, f'"{Repository.sha256(parts[number])}"') for number in sorted(parts)]:
            handler.respond(400)
            return
        body = b"".join(parts[number] for number in sorted(parts))
    if lfs["action"] == "verify":
        handler.respond(200 if oid in hub.large_files else 404)
    elif Repository.sha256(body) != oid:
        handler.respond(400)
    else:
        hub.large_files[oid] = body
        handler.respond(200)


def _commit(handler: "_Handler", repository: Repository, branch: str, name: str, lines: list[dict[str, Any]]) -> None:
    """Apply all operations, or none."""
    files, summary = dict(repository.files(branch)), ""
    for line in lines:
        key, value = line["key"], line["value"]
        if key == "header":
            summary = value["summary"]
            if value.get("parentCommit") not in (None, repository.branches[branch]):
                handler.respond(412)
                return
        elif key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in handler.server.large_files:
                handler.json({"error": "LFS pointer pointed to a file that does not exist"}, 400)
                return
            files[value["path"]] = handler.server.large_files[value["oid"]]
        elif key == "deletedFile":
            del files[value["path"]]
        else:
            files = {path: content for path, content in files.items() if not path.startswith(value["path"] + "/")}
    oid = repository.commit(branch, files, summary)
    handler.json(
        {"commitUrl": f"{handler.server.endpoint}/{name}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None}
    )


def metadata_errors(request: dict[str, str]) -> list[str]:
    """Return the errors for which the Hub would reject a card's metadata."""
    match = re.match(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", request["content"], re.DOTALL)
    if match is None:
        return []
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"]
    if not isinstance(data, dict):
        return ["Metadata is not an object"]
    errors = []
    if data.get("license") not in (None, *_LICENSES):
        errors.append(f'"license" must be one of {sorted(_LICENSES)}')
    for key in ("datasets", "base_model"):
        values = data.get(key) or []
        for value in [values] if isinstance(values, str) else values:
            if not isinstance(value, str) or not _ID.fullmatch(value):
                errors.append(f'"{key}" with value {value!r} is not valid: use an id from https://hf.co')
    for key in ("tags", "datasets"):
        if not isinstance(data.get(key, []), list):
            errors.append(f'"{key}" must be an array')
    for index, model in enumerate(data.get("model-index") or []):
        where = f'"model-index[{index}]'
        if not isinstance(model.get("name"), str) or not model.get("results"):
            errors.append(f'{where}" needs a name and results')
        for result in model.get("results") or []:
            if not result.get("task", {}).get("type"):
                errors.append(f'{where}.results.task.type" is required')
            if not (result.get("dataset", {}).get("type") and result.get("dataset", {}).get("name")):
                errors.append(f'{where}.results.dataset" needs type and name')
            elif not re.fullmatch(r"[\w./-]+", result["dataset"]["type"]):
                errors.append(f'{where}.results.dataset.type" is not valid')
            for metric in result.get("metrics") or [{}]:
                if not metric.get("type") or "value" not in metric:
                    errors.append(f'{where}.results.metrics" need type and value')
    return errors
