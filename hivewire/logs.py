"""Logging: one line per outcome, with a constant event name and fields; JSON, or text on a terminal."""

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any, Final

import structlog

from hivewire.errors import InvalidSettings

# A WireGuard key in base64 has 44 characters and ends in "=". Public keys are logged by their first eight
# characters only, so whatever looks like a whole key has no business in a log.
_KEY: Final = re.compile(r"(?<![A-Za-z0-9+/])[A-Za-z0-9+/]{43}=")

_LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_STYLES: Final = ("auto", "json", "console")


def redact(text: str) -> str:
    """The text with everything that looks like a WireGuard key blotted out."""
    return _KEY.sub("(key)", text)


def _redact_fields(_: Any, __: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name, value in fields.items():
        if isinstance(value, str):
            fields[name] = redact(value)
        elif not isinstance(value, int | float | bool | None):
            fields[name] = redact(str(value))
    return fields


def setup(component: str, *, level: str = "info", style: str = "auto") -> None:
    """Configure structlog for this process. ``style``: auto, json or console. Raises InvalidSettings."""
    if level.upper() not in _LEVELS:
        raise InvalidSettings(f"HIVEWIRE_LOG_LEVEL: {level!r} is none of {', '.join(map(str.lower, _LEVELS))}")
    if style not in _STYLES:
        raise InvalidSettings(f"HIVEWIRE_LOG_FORMAT: {style!r} is none of {', '.join(_STYLES)}")
    console = style == "console" or (style == "auto" and sys.stderr.isatty())
    renderer: Any = structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer()

    def name_component(_: Any, __: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        fields.setdefault("component", component)
        return fields

    structlog.configure(
        processors=[
            name_component,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
            structlog.processors.format_exc_info,
            _redact_fields,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def get(**fields: Any) -> Any:
    """A logger with these fields bound."""
    return structlog.get_logger(**fields)
