"""Which role each route takes at least: read from the routes themselves, so that there is one place that decides.

A route says so by ``openapi.says(..., role=...)``; one that does not keeps the app from being made.
"""

import enum
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from starlette.routing import compile_path

ROLE_KEY: Final = "x-hivewire-role"
"""Where a route, and the OpenAPI document, say the role; ``none``: everybody, without a token."""
READS: Final = frozenset({"GET", "HEAD", "OPTIONS"})


class Role(enum.Enum):
    """From the least to the most."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"

    def suffices(self, needed: "Role") -> bool:
        order = list(Role)
        return order.index(self) >= order.index(needed)


@dataclass(frozen=True, slots=True)
class Rule:
    """Who may use one method of one route. ``role`` None: everybody."""

    method: str
    path: str
    """The template, with names in braces."""
    name: str
    role: Role | None
    pattern: re.Pattern[str]


def rules(app: FastAPI) -> tuple[Rule, ...]:
    """The rules of all routes, in the order in which they are looked at. Raises TypeError for one that says no role."""
    return tuple(_rules(app))


def _rules(app: FastAPI) -> Iterator[Rule]:
    for route in iter_route_contexts(app.routes):
        said = (getattr(route.route, "openapi_extra", None) or {}).get(ROLE_KEY)
        if said is None or route.path is None or not route.methods:
            raise TypeError(f"the route {route.path} does not say which role it takes: use openapi.says(..., role=...)")
        role = None if said == "none" else Role(said)
        for method in sorted(route.methods):
            yield Rule(method, route.path, route.name or "", role, compile_path(route.path)[0])


def find(rules: Iterable[Rule], method: str, path: str) -> Rule | None:
    """The rule for a request; None: there is no such route, or it does not take this method."""
    return next((rule for rule in rules if rule.method == method and rule.pattern.match(path)), None)
