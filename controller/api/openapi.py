"""The OpenAPI document. Run as a module it prints the document that ``docs/openapi.json`` holds."""

import json
import sys
from typing import Any, Final

import msgspec
from fastapi import FastAPI, Response
from fastapi.openapi.utils import get_openapi

from controller.api import problems, shapes
from controller.api.access import ROLE_KEY, Role

ANSWERS: Final = (
    shapes.Version,
    shapes.Status,
    shapes.CheckReport,
    shapes.ServiceDetail,
    shapes.LinkDetail,
    shapes.NodeDetail,
    shapes.SuggestionView,
    shapes.Page[shapes.DenialView],
    shapes.Page[shapes.ServiceView],
    shapes.Page[shapes.LinkView],
    shapes.Page[shapes.NodeView],
    shapes.Page[shapes.FindingView],
    shapes.Page[shapes.QuarantineView],
    shapes.Page[shapes.ClaimView],
    shapes.Page[shapes.AuditView],
    shapes.DecisionView,
)
_REFERENCE: Final = "#/components/schemas/{name}"


def _schemas(*kinds: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    references, components = msgspec.json.schema_components(kinds, ref_template=_REFERENCE)
    return list(references), components


def _problem(description: str) -> dict[str, Any]:
    (reference,), _ = _schemas(problems.Problem)
    return {"description": description, "content": {problems.MEDIA_TYPE: {"schema": reference}}}


def says(kind: Any, status: int = 200, *, role: Role = Role.VIEWER) -> dict[str, Any]:
    """Arguments of a route that answers with this kind of value, or with a problem, to tokens of at least this role."""
    (reference,), _ = _schemas(kind)
    answer = {"description": "OK", "content": {"application/json": {"schema": reference}}}
    return _arguments(status, answer, role)


def says_nothing(*, role: Role) -> dict[str, Any]:
    """Arguments of a route that answers with a status alone."""
    return _arguments(204, {"description": "Done"}, role)


def says_text(description: str, *, role: Role | None) -> dict[str, Any]:
    """Arguments of a route that answers with plain text; ``role`` None: to everybody."""
    answer = {"description": "OK", "content": {"text/plain": {"schema": {"type": "string"}}}}
    return {**_arguments(200, answer, role), "description": description}


def _arguments(status: int, answer: dict[str, Any], role: Role | None) -> dict[str, Any]:
    return {
        "response_class": Response,
        "response_model": None,
        "responses": {status: answer, "default": _problem("A problem, as of RFC 9457.")},
        "openapi_extra": {ROLE_KEY: role.value if role else "none"},
    }


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the app."""
    made = get_openapi(title=app.title, version=app.version, routes=app.routes, summary="State of a Hivewire mesh.")
    components = made.setdefault("components", {})
    _, schemas = _schemas(problems.Problem, *ANSWERS)
    components["schemas"] = dict(sorted({**components.get("schemas", {}), **schemas}.items()))
    components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for operations in made["paths"].values():
        for operation in operations.values():
            if operation[ROLE_KEY] != "none":
                operation["security"] = [{"token": []}]
    return made


def text(app: FastAPI) -> str:
    """The document as the file holds it. The version of the program is left out: it is no part of the contract."""
    made = document(app)
    made["info"]["version"] = "v1"
    return json.dumps(made, indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    from controller.api.app import create_app
    from controller.api.auth import TokenSet

    class NoSource:
        def state(self) -> Any:
            raise NotImplementedError

        def interfaces(self) -> Any:
            raise NotImplementedError

        def denials(self) -> Any:
            raise NotImplementedError

        def ask(self, nodes: Any) -> Any:
            raise NotImplementedError

        def quarantine(self, record: Any) -> None:
            raise NotImplementedError

        def release(self, kind: Any, id_: str) -> None:
            raise NotImplementedError

    sys.stdout.write(text(create_app(NoSource(), TokenSet.none(), "0")))


if __name__ == "__main__":
    main()
