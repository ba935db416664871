"""Open one new TCP connection and tell how that went: what every hop of the demo reports."""

import socket
import time
from typing import TypedDict

TIMEOUT_S = 3.0


class Report(TypedDict, total=False):
    """What is known of one attempt; absent fields were not reached."""

    target: str  # as asked for, name:port
    outcome: str  # reached, refused, timeout, unreachable, unresolved, reset, error
    detail: str  # the reason in words, when not reached
    resolved: list[str]  # addresses that the name stands for: the VIP of a service
    address: str  # the peer of the connection, as this side sees it
    source: str  # our own address in the connection
    resolve_ms: float
    connect_ms: float


class Unreached(Exception):
    """The connection did not come about, or broke; `report` tells why."""

    def __init__(self, report: Report) -> None:
        super().__init__(f"{report['target']}: {report['outcome']} ({report.get('detail', '')})")
        self.report = report


def dial(host: str, port: int, timeout_s: float = TIMEOUT_S) -> tuple[socket.socket, Report]:
    """Resolve and connect anew; raises Unreached."""
    report: Report = {"target": f"{host}:{port}"}
    start = time.perf_counter()
    try:
        found = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)
        report["resolve_ms"] = _ms_since(start)
        report["resolved"] = sorted({str(entry[4][0]) for entry in found})
        start = time.perf_counter()
        channel = socket.create_connection((str(found[0][4][0]), port), timeout=timeout_s)
    except OSError as error:
        raise explain(error, report) from error
    report["connect_ms"] = _ms_since(start)
    report["address"] = str(channel.getpeername()[0])
    report["source"] = str(channel.getsockname()[0])
    report["outcome"] = "reached"
    return channel, report


def explain(error: OSError, report: Report) -> Unreached:
    """Name the outcome of a failed attempt; also for connections that break later."""
    if isinstance(error, socket.gaierror):
        outcome = "unresolved"
    elif isinstance(error, ConnectionRefusedError):
        outcome = "refused"
    elif isinstance(error, TimeoutError):
        outcome = "timeout"
    elif isinstance(error, ConnectionError):
        outcome = "reset"
    else:
        outcome = "unreachable" if error.errno in (101, 113) else "error"  # ENETUNREACH, EHOSTUNREACH
    return Unreached({**report, "outcome": outcome, "detail": error.strerror or str(error)})


def _ms_since(start: float) -> float:
    return round((time.perf_counter() - start) * 1000, 2)
