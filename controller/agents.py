"""Asks the agents what the kernel says: handshakes, counters, denials, over mTLS, at most every other second."""

import http.client
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final, TypeVar

import msgspec

from hivewire import logs
from hivewire.identity import IdentitySource, client_context
from hivewire.ids import NodeId, TaskId
from hivewire.records import NodeRecord
from hivewire.reports import (
    AGENT_REPORTS,
    DENIAL_REPORTS,
    DENIALS_PATH,
    INTERFACES_PATH,
    AgentReport,
    DenialReport,
    InterfaceReport,
    TaskDenials,
)

_TIMEOUT_S: Final = 2.0
_KEPT_S: Final = 2.0
_AT_ONCE: Final = 64
#: For all together: who has not answered by then misses this time.
_LONGEST_S: Final = 5.0
_LARGEST_BYTES: Final = 16 * 1024 * 1024

R = TypeVar("R", AgentReport, DenialReport)


class AgentQuestions:
    """Thread-safe. An agent that does not answer misses in the result: nothing is made up for it."""

    def __init__(self, identity: IdentitySource, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._identity = identity
        self._monotonic = monotonic
        self._log = logs.get()
        self._lock = threading.Lock()
        self._kept: tuple[float, Mapping[TaskId, InterfaceReport]] = (float("-inf"), {})
        self._kept_denials: tuple[float, tuple[TaskDenials, ...]] = (float("-inf"), ())
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="ask")
        # One question of a kind per node at a time, so that a slow one holds no more than that many threads.
        self._asked: dict[tuple[NodeId, str], Future[AgentReport | None] | Future[DenialReport | None]] = {}

    def interfaces(self, nodes: Iterable[NodeRecord]) -> Mapping[TaskId, InterfaceReport]:
        """All interfaces of these nodes, by task. Raises InvalidIdentity."""
        with self._lock:  # those who ask meanwhile share the answer
            asked_at, answer = self._kept
            if self._monotonic() - asked_at >= _KEPT_S:
                context = client_context(self._identity.current())
                reports = self._ask_all(nodes, context, INTERFACES_PATH, AGENT_REPORTS)
                answer = {i.task: i for report in reports for i in report.interfaces}
                self._kept = (self._monotonic(), answer)
            return answer

    def ask(self, nodes: Iterable[NodeRecord]) -> Mapping[NodeId, AgentReport]:
        """What these agents answer now, for one who waits for something to come true. Raises InvalidIdentity."""
        with self._lock:
            context = client_context(self._identity.current())
            reports = self._ask_all(nodes, context, INTERFACES_PATH, AGENT_REPORTS)
        return {report.node: report for report in reports}

    def denials(self, nodes: Iterable[NodeRecord]) -> tuple[TaskDenials, ...]:
        """What the tasks of these nodes noted. Raises InvalidIdentity."""
        with self._lock:
            asked_at, answer = self._kept_denials
            if self._monotonic() - asked_at >= _KEPT_S:
                context = client_context(self._identity.current())
                reports = self._ask_all(nodes, context, DENIALS_PATH, DENIAL_REPORTS)
                answer = tuple(task for report in reports for task in report.tasks)
                self._kept_denials = (self._monotonic(), answer)
            return answer

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _ask_all(
        self, nodes: Iterable[NodeRecord], context: ssl.SSLContext, path: str, decoder: msgspec.json.Decoder[R]
    ) -> list[R]:
        self._asked = {asked: question for asked, question in self._asked.items() if not question.done()}
        questions: list[Future[R | None]] = []
        for node in nodes:
            if node.report_port and (node.node, path) not in self._asked:
                question: Future[R | None] = self._pool.submit(self._ask, node, context, path, decoder)
                self._asked[node.node, path] = question
                questions.append(question)
        answered, silent = wait(questions, _LONGEST_S)
        for question in silent:
            question.cancel()
        reports = [question.result() for question in questions if question in answered]
        return [report for report in reports if report is not None]

    def _ask(self, node: NodeRecord, context: ssl.SSLContext, path: str, decoder: msgspec.json.Decoder[R]) -> R | None:
        address = (str(node.underlay_address), node.report_port)
        connection = http.client.HTTPConnection(*address, timeout=_TIMEOUT_S)
        try:
            if not re.fullmatch(r"[A-Za-z0-9]{1,63}", node.node):
                raise ValueError(f"{node.node!r} is no id of a node")
            # The certificate must be that node's own, whatever address it answers at.
            plain = socket.create_connection(address, timeout=_TIMEOUT_S)
            connection.sock = context.wrap_socket(plain, server_hostname=node.node)
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read(_LARGEST_BYTES)
            if answer.status != http.HTTPStatus.OK:
                raise OSError(f"status {answer.status}")
            report = decoder.decode(body)
            if report.node != node.node:
                raise OSError(f"it answers for node {report.node}")
        except (OSError, ValueError, RecursionError, http.client.HTTPException, msgspec.DecodeError) as error:
            self._log.debug("agent.silent", node=node.node, error=str(error))
            return None
        else:
            return report
        finally:
            connection.close()
