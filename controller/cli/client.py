"""Talks to the admin API. Shares with it only the names of JSON fields, so that the CLI starts without the server."""

import ipaddress
import json
import os
import ssl
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

DEFAULT_ADDRESS: Final = "http://127.0.0.1:9480"
DEFAULT_SOCKET: Final = Path("/run/hivewire/api.sock")
"""Where a controller that speaks TLS to others is found in its own container."""
DEFAULT_TOKEN_FILES: Final = (Path("/run/secrets/admin_token"), Path("/var/lib/hivewire/admin_token"))

NO, USAGE, UNREACHABLE, UNAUTHENTICATED, TIMED_OUT = 1, 2, 3, 4, 5
"""Exit codes: the answer is no, wrong use, no API, no access, waited too long."""

SWARM_MANAGER: Final = "swarm-manager"
"""A name in the certificate of every manager of a Swarm, and of nobody else."""

_TIMEOUT_S: Final = 10.0
_PAGE: Final = 1000
_SWARM_CA: Final = "swarm-ca"
"""What a Swarm's own CA calls itself (swarmkit ca/certificates.go)."""
_WRONG_NAME: Final = (62, 64)
"""OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH."""


class Failure(Exception):
    """Ends the command: one line for a person, and the exit code."""

    def __init__(self, code: int, message: str, request: str = "") -> None:
        """``request``: the id under which the controller's log has the reason."""
        super().__init__(message)
        self.code = code
        self.request = request


class Client:
    """The API at one address. ``address`` None: the socket in this container, else the default one."""

    def __init__(
        self,
        address: str | None,
        token_file: Path | None = None,
        *,
        ca: Path | None = None,
        server_name: str | None = None,
    ) -> None:
        """``token_file`` None: the first default that exists. ``ca``: PEM, instead of what this machine trusts.

        ``server_name`` is what the certificate must say, if not the address: a Swarm's certificates name no addresses.
        """
        if address is None:
            address = f"unix://{DEFAULT_SOCKET}" if DEFAULT_SOCKET.is_socket() else DEFAULT_ADDRESS
        self._address = _checked(address)
        self._token_file = token_file
        self._token: str | None = None
        self._ca = ca
        self._server_name = server_name

    def get(self, *path: str, **query: str | int | None) -> dict[str, Any]:
        """One document below /api/v1. The parts of the path are escaped."""
        return self._ask("GET", path, query)

    def post(self, *path: str, body: Mapping[str, str]) -> dict[str, Any]:
        """Make something; the answer is what was made."""
        return self._ask("POST", path, {}, json.dumps(body).encode())

    def delete(self, *path: str, **query: str | int | None) -> None:
        """Take something away."""
        self._ask("DELETE", path, query)

    def _ask(
        self, method: str, path: Iterable[str], query: Mapping[str, str | int | None], body: bytes | None = None
    ) -> dict[str, Any]:
        if self._token is None:
            self._token = _read_token(self._token_file)
        url = "/".join(("/api/v1", *(quote(part, safe="") for part in path)))
        asked = {name: str(value) for name, value in query.items() if value is not None}
        headers = {"Authorization": f"Bearer {self._token}"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        status, content = self._fetch(url, asked, headers, _TIMEOUT_S, method, body)
        answer = _parse(content)
        if status == 204:
            return {}
        if status in (200, 201) and answer is not None:
            return answer
        raise self._failure(status, answer or {})

    def list(self, *path: str, **query: str | int | None) -> dict[str, Any]:
        """All pages of a list as one."""
        whole = self.get(*path, limit=_PAGE, **query)
        while whole["next_cursor"]:
            page = self.get(*path, limit=_PAGE, cursor=whole["next_cursor"], **query)
            whole = {**page, "items": whole["items"] + page["items"]}
        return whole

    def readiness(self) -> tuple[bool, str]:
        """Whether the controller is ready, and a line that says so. Needs no token."""
        try:
            status, body = self._fetch("/readyz", {}, {}, 3.0)
        except Failure as failure:
            return False, str(failure)
        detail = (_parse(body) or {}).get("detail", f"/readyz answers {status}")
        return status == 200, "ok" if status == 200 else str(detail)

    def _fetch(
        self,
        path: str,
        query: Mapping[str, str],
        headers: Mapping[str, str],
        timeout: float,
        method: str = "GET",
        body: bytes | None = None,
    ) -> tuple[int, bytes]:
        import httpx2  # as late as this: it takes longer than all the rest of the program

        is_secure = self._address.startswith("https")
        options: dict[str, Any] = {"timeout": timeout, "trust_env": is_secure, "follow_redirects": False}
        extensions: dict[str, Any] = {}
        base = self._address
        if base.startswith("unix:"):
            options["transport"] = httpx2.HTTPTransport(uds=base.removeprefix("unix://"))
            base = "http://localhost"
        if is_secure and self._ca is not None:
            context, is_swarm = _trusting(self._ca)
            options["verify"] = context
            if is_swarm and self._server_name is None:
                extensions["sni_hostname"] = SWARM_MANAGER
        if is_secure and self._server_name is not None:
            extensions["sni_hostname"] = self._server_name
        try:
            # No proxy from the environment for plain HTTP: it would be handed the token.
            with httpx2.Client(**options) as session:
                answer = session.request(
                    method,
                    base + path,
                    params=dict(query),
                    headers=dict(headers),
                    content=body,
                    extensions=extensions,
                )
                return answer.status_code, answer.content
        except httpx2.TimeoutException as error:
            raise Failure(UNREACHABLE, f"the API at {self._address} takes more than {timeout:.0f} s") from error
        except (httpx2.TransportError, httpx2.InvalidURL, OSError) as error:
            raise Failure(UNREACHABLE, self._why(error)) from error

    def _why(self, error: BaseException) -> str:
        """What to do about an API that cannot be reached."""
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ssl.SSLError):
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, ssl.SSLCertVerificationError):
            if cause.verify_code in _WRONG_NAME:
                advice = "use an address that the certificate names, or give the name with --server-name"
            else:
                advice = "give the CA that issued it with --ca or HIVEWIRE_API_CA (of a Swarm: swarm-root-ca.crt)"
            return f"the certificate of the API at {self._address} is not trusted ({cause.verify_message}); {advice}"
        if isinstance(cause, ssl.SSLError):
            return f"what answers at {self._address} does not speak TLS as the API does ({cause.reason})"
        return (
            f"cannot reach the API at {self._address} ({error}); "
            "run this in the controller's container, or set --addr or HIVEWIRE_ADDR"
        )

    def _failure(self, status: int, problem: Mapping[str, Any]) -> Failure:
        detail = problem.get("detail", f"{self._address} answers {status} and is perhaps not the API")
        request = str(problem.get("request_id", "")) if status == 500 else ""
        code = {401: UNAUTHENTICATED, 403: UNAUTHENTICATED, 429: UNAUTHENTICATED, 404: NO, 400: USAGE}
        advice = "; look at --token-file or HIVEWIRE_TOKEN_FILE" if status in (401, 403) else ""
        if status == 404 and "code" not in problem:
            return Failure(UNREACHABLE, detail)
        return Failure(code.get(status, UNREACHABLE), f"{detail}{advice}", request)


def _checked(address: str) -> str:
    wanted = "write http://127.0.0.1:9480, https://HOST:9480 or unix:///PATH"
    parts = urlsplit(address)
    if parts.scheme == "unix" and parts.path and not parts.netloc:
        return f"unix://{parts.path}"
    try:
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if parts.scheme not in ("http", "https") or not host or parts.path.strip("/") or parts.query or parts.username:
        raise Failure(USAGE, f"--addr {address!r} is no address; {wanted}")
    if parts.scheme == "http" and not _is_loopback(host):
        raise Failure(USAGE, f"--addr {address!r} would send the token in clear; use https, or http on this machine")
    return address.rstrip("/")


def _trusting(ca: Path) -> tuple[ssl.SSLContext, bool]:
    """TLS that trusts this CA alone, and whether it is a Swarm's own."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError as error:
        raise Failure(USAGE, f"--ca {ca} holds no certificate in PEM") from error
    except OSError as error:
        raise Failure(USAGE, f"--ca {ca} cannot be read: {error.strerror}") from error
    found: list[Any] = context.get_ca_certs()
    names = [value for it in found for part in it["subject"] for name, value in part if name == "commonName"]
    return context, bool(names) and set(names) == {_SWARM_CA}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read_token(path: Path | None) -> str:
    if path is None:
        path = next((each for each in DEFAULT_TOKEN_FILES if os.access(each, os.F_OK)), None)
    if path is None:
        known = " nor ".join(str(each) for each in DEFAULT_TOKEN_FILES)
        raise Failure(UNAUTHENTICATED, f"no token: there is neither {known}; set --token-file or HIVEWIRE_TOKEN_FILE")
    try:
        lines = path.read_text("ascii").split()
    except OSError as error:
        raise Failure(UNAUTHENTICATED, f"the token file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        lines = []
    if not lines:
        raise Failure(UNAUTHENTICATED, f"the token file {path} holds no token")
    return lines[0].rpartition(":")[2]


def _parse(body: bytes) -> dict[str, Any] | None:
    try:
        answer = json.loads(body)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None
