"""Who may use the API: bearer tokens from a file, kept as hashes only.

The file holds one token per line, ``token`` or ``role:token``; two lines let an operator change tokens without a gap.
No text of the file ever reaches an error, a log line or a ``repr``.
"""

import enum
import hashlib
import hmac
import ipaddress
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from controller.api.access import READS, Role, Rule, find
from controller.api.audit import Journal
from controller.api.metrics import METRICS_PATH, Meters
from controller.api.problems import ApiError, request_id, respond
from hivewire import logs
from hivewire.errors import InvalidSettings

MIN_LENGTH: Final = 32
MAX_FAILURES: Final = 5
FAILURE_WINDOW_S: Final = 60.0

LOCAL: Final = "local"
"""The address of a client at the unix socket."""

_MAX_CLIENTS: Final = 1024

_log = logs.get(part="api")


class MetricsAuth(enum.Enum):
    """Whether ``/metrics`` takes a token."""

    AUTO = "auto"
    """From other machines."""
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Subject:
    """Who asks: the role of the token, and a short word that tells tokens apart and nothing about them."""

    role: Role
    token: str


_Stamp = tuple[int, int, int]


class TokenSet:
    """The tokens of a file, read again when the file changes."""

    def __init__(self, path: Path, roles: dict[bytes, Role], stamp: _Stamp) -> None:
        self._path = path
        self._roles = roles
        self._stamp = stamp
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"TokenSet({str(self._path)!r}, {len(self._roles)} tokens)"

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file. Raises InvalidSettings, which names the line but never its text."""
        try:
            stamp = _stamp(path)
            text = path.read_bytes()
        except OSError as error:
            raise InvalidSettings(f"the token file {path} cannot be read: {error.strerror}") from error
        return cls(path, _parse(path, text), stamp)

    @classmethod
    def none(cls) -> Self:
        """No tokens: nobody gets in."""
        return cls(Path(os.devnull), {}, _stamp(Path(os.devnull)))

    def role(self, token: bytes) -> Role | None:
        """The role of this token, or None. Takes the same time for every wrong token."""
        self._refresh()
        digest = hashlib.sha256(token).digest()
        found = None
        for known, role in self._roles.items():
            if hmac.compare_digest(known, digest):
                found = role
        return found

    def _refresh(self) -> None:
        with self._lock:
            try:
                if _stamp(self._path) == self._stamp:
                    return
                fresh = self.load(self._path)
            except (OSError, InvalidSettings) as error:
                # Better the old tokens than nobody: a file that is being replaced is absent for a moment.
                if self._stamp != (0, 0, 0):
                    reason = error.strerror if isinstance(error, OSError) else str(error)
                    _log.warning("auth.tokens_kept", path=str(self._path), error=reason)
                    self._stamp = (0, 0, 0)
                return
            self._roles, self._stamp = fresh._roles, fresh._stamp
        _log.info("auth.tokens_read", path=str(self._path), tokens=len(self._roles))


def ensure_token(path: Path) -> bool:
    """Make a file with a fresh token where there is none, readable by its owner only; whether it was made.

    The file appears whole or not at all, and never replaces one that is there.
    """
    if path.exists():
        return False
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_urlsafe(32) + "\n")
                file.flush()
                os.fsync(file.fileno())
            return _link(temporary, path)
        finally:
            temporary.unlink()
    except OSError as error:
        raise InvalidSettings(f"no token can be made at {path}: {error.strerror}; give a token file") from error


def _link(temporary: Path, path: Path) -> bool:
    try:
        os.link(temporary, path)
    except FileExistsError:  # another process was faster; its token is as good
        return False
    return True


def _stamp(path: Path) -> _Stamp:
    found = path.stat()
    return (found.st_mtime_ns, found.st_size, found.st_ino)


def _parse(path: Path, text: bytes) -> dict[bytes, Role]:
    roles: dict[bytes, Role] = {}
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line:
            continue
        name, colon, token = line.rpartition(b":")
        try:
            role = Role(name.decode("ascii")) if colon else Role.ADMIN
        except ValueError:
            known = ", ".join(role.value for role in Role)
            raise InvalidSettings(f"{path}, line {number}: before the colon stands no role ({known})") from None
        if len(token) < MIN_LENGTH:
            raise InvalidSettings(
                f"{path}, line {number}: the token has {len(token)} characters, at least {MIN_LENGTH} are needed; "
                "make one with: openssl rand -hex 32"
            )
        if not all(33 <= byte <= 126 for byte in token):
            raise InvalidSettings(f"{path}, line {number}: a token is of printable ASCII characters without spaces")
        roles[hashlib.sha256(token).digest()] = role
    if not roles:
        raise InvalidSettings(f"{path} holds no token; make one with: openssl rand -hex 32")
    return roles


class Failures:
    """Counts wrong tokens per client; one with too many has to wait, whatever it sends next."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._times: OrderedDict[str, list[float]] = OrderedDict()

    def wait_s(self, client: str) -> int:
        """Seconds until this client may try again; 0: now."""
        with self._lock:
            times = self._times.get(client, [])
            if len(times) < MAX_FAILURES:
                return 0
            left = times[-MAX_FAILURES] + FAILURE_WINDOW_S - self._now()
            return max(0, -int(-left // 1))

    def add(self, client: str) -> None:
        with self._lock:
            times = self._times.pop(client, [])
            self._times[client] = [*times[1 - MAX_FAILURES :], self._now()]
            while len(self._times) > _MAX_CLIENTS:
                self._times.popitem(last=False)


def is_local(address: str) -> bool:
    """Whether a client is on this machine: at the unix socket, or over loopback."""
    try:
        return address == LOCAL or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def counted_as(address: str) -> str:
    """What wrong tokens are counted by: one who has an IPv6 network has all of its addresses."""
    try:
        known = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(known, ipaddress.IPv6Address):
        return str(known.ipv4_mapped or ipaddress.ip_network((known, 64), strict=False))
    return str(known)


class Gate:
    """Middleware: lets requests through that a token of the needed role comes with, and notes every one.

    What is needed stands at the routes (see ``access``). It is known before anything of a request is parsed.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        rules: Sequence[Rule],
        tokens: TokenSet,
        failures: Failures,
        journal: Journal,
        meters: Meters,
        metrics_auth: MetricsAuth,
    ) -> None:
        self._app = app
        self._rules = rules
        self._tokens = tokens
        self._failures = failures
        self._journal = journal
        self._meters = meters
        self._metrics_auth = metrics_auth

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = [
            (b"x-request-id", request_id(scope).encode()),
            (b"cache-control", b"no-store"),
            (b"x-content-type-options", b"nosniff"),
        ]
        status, begun = 500, time.perf_counter()  # what a bug is answered with, further out

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        rule = find(self._rules, scope["method"], scope["path"])
        address = str((scope.get("client") or (LOCAL,))[0])
        try:
            self._admit(scope, rule, address)
            await self._app(scope, receive, send_with_headers)
        except ApiError as error:
            await respond(scope, error)(scope, receive, send_with_headers)
        finally:
            self._meters.answered(scope["method"], rule.path if rule else "", status, time.perf_counter() - begun)
            self._audit(scope, rule, address, status)

    def _admit(self, scope: Scope, rule: Rule | None, address: str) -> None:
        """Raises ApiError."""
        needed = self._needed(scope, rule, address)
        if needed is None:
            return
        subject = scope["state"]["subject"] = self._authenticate(scope, address)
        if not subject.role.suffices(needed):
            self._meters.refused("forbidden")
            enough = " or ".join(role.value for role in Role if role.suffices(needed))
            detail = f"a token with role {enough} is needed, this one is {subject.role.value}"
            raise ApiError(403, "forbidden", detail)

    def _needed(self, scope: Scope, rule: Rule | None, address: str) -> Role | None:
        """None: nothing."""
        if rule is None:
            if scope["path"] != "/api" and not scope["path"].startswith("/api/"):
                return None  # there is nothing, and nothing to hide
            return Role.VIEWER if scope["method"] in READS else Role.ADMIN
        if rule.path == METRICS_PATH:
            is_open = self._metrics_auth is MetricsAuth.NEVER
            if is_open or (self._metrics_auth is MetricsAuth.AUTO and is_local(address)):
                return None
        return rule.role

    def _authenticate(self, scope: Scope, address: str) -> Subject:
        client = counted_as(address)
        wait_s = self._failures.wait_s(client)
        if wait_s and not is_local(address):
            raise self._too_many(wait_s)
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if not given:
            detail = "a token is needed: send the header Authorization: Bearer TOKEN"
            raise ApiError(401, "unauthenticated", detail, {"WWW-Authenticate": 'Bearer realm="hivewire"'})
        scheme, _, token = given[0].partition(b" ")
        role = self._tokens.role(token.strip()) if len(given) == 1 and scheme.lower() == b"bearer" else None
        if role is not None:
            # Not the hash that tokens are compared by, nor the beginning of it.
            return Subject(role, hashlib.sha256(b"hivewire audit\0" + token.strip()).hexdigest()[:8])
        if wait_s:  # on this machine a good token always counts, or any of its processes could lock out the others
            raise self._too_many(wait_s)
        self._failures.add(client)
        self._meters.refused("invalid_token")
        _log.warning("auth.failed", client=address, request_id=request_id(scope))
        challenge = 'Bearer realm="hivewire", error="invalid_token"'
        raise ApiError(401, "unauthenticated", "this token is not valid", {"WWW-Authenticate": challenge})

    def _too_many(self, wait_s: int) -> ApiError:
        self._meters.refused("rate_limited")
        detail = f"too many wrong tokens; try again in {wait_s} s"
        return ApiError(429, "rate_limited", detail, {"Retry-After": str(wait_s)})

    def _audit(self, scope: Scope, rule: Rule | None, address: str, status: int) -> None:
        subject: Subject | None = scope["state"].get("subject")
        if subject is None or scope["method"] in READS:
            return
        self._journal.note(
            role=subject.role.value,
            token=subject.token,
            address=address,
            action=rule.name if rule else "",
            path=scope["path"],
            status=status,
            request_id=request_id(scope),
            about=scope["state"].get("about", {}),
        )
