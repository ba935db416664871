"""Lists in pages: the cursor is the key of the last item, so that pages fit together while the list changes."""

import base64
import json
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from controller.api.problems import ApiError
from controller.api.shapes import Page

DEFAULT_LIMIT: Final = 100
MAX_LIMIT: Final = 1000

T = TypeVar("T")
Key = tuple[str, ...]


def page(items: Sequence[T], key: Callable[[T], Key], limit: int, cursor: str | None, revision: int) -> Page[T]:
    """The items after the cursor. They must be in the order of their keys, and the keys must differ."""
    after = _read(cursor) if cursor else None
    rest = [item for item in items if after is None or key(item) > after]
    shown = rest[:limit]
    return Page(items=shown, next_cursor=_write(key(shown[-1])) if len(rest) > limit else None, revision=revision)


def _write(key: Key) -> str:
    return base64.urlsafe_b64encode(json.dumps(key, separators=(",", ":")).encode()).decode().rstrip("=")


def _read(cursor: str) -> Key:
    try:
        parts = json.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True))
    except ValueError:
        parts = None
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise ApiError(400, "invalid_cursor", "this cursor is not one of next_cursor; start again without it")
    return tuple(parts)
