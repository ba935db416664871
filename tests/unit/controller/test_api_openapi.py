"""The OpenAPI document in docs is the one that the program makes, and no promise of it is broken."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_view_states import FakeSource

from controller.api.app import create_app
from controller.api.auth import TokenSet
from controller.api.openapi import text

COMMITTED = Path(__file__).parents[3] / "docs" / "openapi.json"
RENEW = "renew it: python -m controller.api.openapi > docs/openapi.json"

Document = dict[str, Any]


def made() -> str:
    return text(create_app(FakeSource(), TokenSet.none(), "0.1.0"))


def breaking_changes(old: Document, new: Document) -> Iterator[str]:
    """What a client of the old document could miss in the new one."""
    for path, operations in old["paths"].items():
        for method, before in operations.items():
            after = new["paths"].get(path, {}).get(method)
            if after is None:
                yield f"{method} {path} is gone"
                continue
            known = {it["name"]: it for it in after.get("parameters", [])}
            for parameter in before.get("parameters", []):
                if parameter["name"] not in known:
                    yield f"{method} {path} no longer takes {parameter['name']}"
            given = {it["name"] for it in before.get("parameters", [])}
            for name, parameter in known.items():
                if parameter["required"] and name not in given:
                    yield f"{method} {path} now needs {name}"
            for code, answer in before["responses"].items():
                if answer.get("content") != after["responses"].get(code, {}).get("content"):
                    yield f"{method} {path} answers {code} in another form"
    for name, before in old["components"]["schemas"].items():
        after = new["components"]["schemas"].get(name, {})
        for field, kind in before.get("properties", {}).items():
            if after.get("properties", {}).get(field) != kind:
                yield f"{name}.{field} is gone or has another type"
        yield from (f"{name} no longer has {value!r}" for value in before.get("enum", []) if value not in after["enum"])


def test_document_in_docs_is_up_to_date() -> None:
    """docs/openapi.json equals what the program makes."""
    assert COMMITTED.read_text() == made(), f"docs/openapi.json is out of date; {RENEW}"


def test_nothing_that_was_promised_is_gone() -> None:
    """Within v1 the API only grows."""
    assert list(breaking_changes(json.loads(COMMITTED.read_text()), json.loads(made()))) == []


def test_every_reference_leads_somewhere() -> None:
    """No schema names another one that is not there."""
    document = json.loads(made())
    schemas = document["components"]["schemas"]
    for part in made().split('"$ref": "')[1:]:
        assert part.partition('"')[0].removeprefix("#/components/schemas/") in schemas


def test_only_the_probes_are_open() -> None:
    """The document asks for a token for everything below /api."""
    document = json.loads(made())
    without = {path for path, methods in document["paths"].items() for it in methods.values() if "security" not in it}
    assert without == {"/livez", "/readyz"}


def _without_path(document: Document) -> None:
    del document["paths"]["/api/v1/links"]


def _without_parameter(document: Document) -> None:
    document["paths"]["/api/v1/links"]["get"]["parameters"].pop()


def _with_needed_parameter(document: Document) -> None:
    document["paths"]["/api/v1/nodes"]["get"]["parameters"].append({"name": "color", "required": True})


def _without_field(document: Document) -> None:
    del document["components"]["schemas"]["LinkView"]["properties"]["state"]


def _without_value(document: Document) -> None:
    document["components"]["schemas"]["LinkState"]["enum"].remove("idle")


@pytest.mark.parametrize(
    "change", [_without_path, _without_parameter, _with_needed_parameter, _without_field, _without_value]
)
def test_breaking_change_is_seen(change: Any) -> None:
    """The comparison finds each kind of break."""
    old = json.loads(made())
    new = copy.deepcopy(old)
    change(new)
    assert len(list(breaking_changes(old, new))) == 1
