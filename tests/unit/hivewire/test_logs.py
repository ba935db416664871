"""What looks like a whole key stays out of the log, and settings of the log are checked."""

import json
from collections.abc import Iterator

import pytest
import structlog

from hivewire import logs
from hivewire.errors import InvalidSettings
from hivewire.keys import PrivateKey

KEY = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo="


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        (KEY, "(key)"),
        (f"key={KEY}", "key=(key)"),
        (f"{KEY} and {KEY}", "(key) and (key)"),
        (f'{{"private_key":"{KEY}"}}', '{"private_key":"(key)"}'),
        (f"line\n{KEY}\n", "line\n(key)\n"),
        (f"MIIB{KEY}", f"MIIB{KEY}"),
        (KEY[:8], KEY[:8]),
        (KEY[:-1], KEY[:-1]),
        ("sha256 " + "a" * 64, "sha256 " + "a" * 64),
        ("", ""),
    ],
)
def test_redact(text: str, redacted: str) -> None:
    """Every whole key is blotted out, and nothing else."""
    assert logs.redact(text) == redacted


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A line carries the component, the event, the level, the time and the fields."""
    logs.setup("agent", level="info", style="json")
    structlog.get_logger(node="n1").info("task.applied", ops=3)
    structlog.get_logger().debug("task.unchanged")
    (line,) = lines(capsys)
    assert line.pop("ts")
    assert line == {"component": "agent", "event": "task.applied", "level": "info", "node": "n1", "ops": 3}


def test_no_key_in_any_field(capsys: pytest.CaptureFixture[str]) -> None:
    """Keys are blotted out in text, in values that are no text, in the event and in tracebacks."""
    key = PrivateKey(bytes(range(32)))
    text = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
    logs.setup("agent", level="info", style="json")
    log, event = structlog.get_logger(), f"event {text}"
    log.info(event, field=f"a {text}", values=[text], error=ValueError(text), key=key, none=None)
    try:
        raise ValueError(text)
    except ValueError:
        log.exception("bug")
    shown = capsys.readouterr().err
    assert "(key)" in shown
    assert text not in shown
    assert bytes(range(32)).hex() not in shown


@pytest.mark.parametrize(
    ("level", "style", "named"), [("loud", "json", "HIVEWIRE_LOG_LEVEL"), ("info", "xml", "HIVEWIRE_LOG_FORMAT")]
)
def test_unknown_settings(level: str, style: str, named: str) -> None:
    """An unknown level or format is refused with the name of the setting and what it may be."""
    with pytest.raises(InvalidSettings, match=f"{named}.*none of"):
        logs.setup("agent", level=level, style=style)


@pytest.mark.parametrize("level", ["DEBUG", "debug", "Warning", "error", "critical"])
def test_known_levels(level: str) -> None:
    """Levels are known in any case."""
    logs.setup("agent", level=level, style="console")
