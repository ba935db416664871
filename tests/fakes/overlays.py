"""The node's overlay namespaces and its own, for tests of what is put there: each keeps the text of its table."""

import contextlib
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field

from agent.guard import edge
from agent.guard.render import Count
from agent.kernel.overlay import ObservedOverlay, Space
from hivewire.errors import NamespaceGone


@dataclass
class FakeSpace:
    """A namespace that keeps the text that it was given last."""

    text: str = ""
    counts: dict[str, Count] = field(default_factory=dict)
    applied: list[str] = field(default_factory=list)
    macs: frozenset[str] = frozenset()
    vnis: frozenset[int] = frozenset()
    behind: dict[str, frozenset[int]] = field(default_factory=dict)

    def ports(self, sandboxes: Set[str]) -> Mapping[str, frozenset[int]]:
        return {path: ports for path, ports in self.behind.items() if path in sandboxes}

    def observe(self) -> ObservedOverlay:
        digest = self.text.split('"')[1] if self.text else ""
        return ObservedOverlay(digest, self.counts, self.vnis, self.macs)

    def apply(self, text: str, counts: Mapping[str, Count]) -> None:
        self.text, self.counts = text, dict(counts)
        self.applied.append(text)

    def create(self, text: str) -> bool:
        if self.text:
            return False
        self.apply(text, {})
        return True

    def remove(self) -> None:
        self.text = ""
        self.applied.append("")


class FakeOverlays:
    def __init__(self) -> None:
        self.spaces: dict[str, FakeSpace] = {}
        self.unmounted: set[str] = set()

    def list(self) -> frozenset[str]:
        return frozenset(self.spaces)

    @contextlib.contextmanager
    def open(self, file: str) -> Iterator[Space]:
        if file in self.unmounted or file not in self.spaces:
            raise NamespaceGone(f"{file} is no network namespace")
        yield self.spaces[file]


class FakeEdges:
    """The node's own namespace: texts by the name of their table."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def read(self) -> dict[str, edge.Edge]:
        return {name: edge.Edge.parse(text.split('"')[1]) for name, text in self.texts.items()}

    def apply(self, name: str, text: str) -> None:
        assert text.startswith(f"table inet {name} {{")
        self.texts[name] = text

    def remove(self, name: str) -> None:
        self.texts.pop(name, None)
