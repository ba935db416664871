"""TLS off loopback, on real sockets: which certificate is shown, that it is followed, and what the CLI makes of it."""

import http.client
import socket
import ssl
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_view_states import FakeSource
from typer.testing import CliRunner, Result

from controller.api.app import create_app
from controller.api.auth import TokenSet
from controller.api.server import ApiServer
from controller.api.tls import Contexts, NodePair, StoredPair
from controller.cli import client, main
from controller.settings import ControllerSettings
from controller.wiring import _pairs, _servers
from hivewire.errors import InvalidSettings
from hivewire.identity import MANAGER, WORKER, IdentityFiles, IdentitySource
from tests.unit.hivewire.swarm_pki import SwarmCa, write

TOKEN = "correct-horse-battery-staple-0123456789"
ANYWHERE = "0.0.0.0"


@pytest.fixture(scope="module")
def ca() -> SwarmCa:
    return SwarmCa()


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "admin_token"
    path.write_text(TOKEN)
    return path


def issue(folder: Path, ca: SwarmCa, role: str = MANAGER, node: str = "node1") -> IdentityFiles:
    issued = ca.issue(node, role)
    return write(folder, issued.certificate, issued.key_pem(), ca.pem)


@contextmanager
def serving(host: str, token_file: Path, contexts: Contexts | None = None) -> Iterator[ApiServer]:
    server = ApiServer(create_app(FakeSource(), TokenSet.load(token_file), "0.1.0"), host, 0, contexts)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def shown(server: ApiServer, ca: SwarmCa, name: str | None = "swarm-manager") -> bytes:
    """The certificate of a handshake, with a server name or without."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=ca.pem.decode())
    context.check_hostname = name is not None
    with (
        socket.create_connection(("127.0.0.1", server.port), 5) as plain,
        context.wrap_socket(plain, server_hostname=name) as secure,
    ):
        return secure.getpeercert(binary_form=True) or b""


def hivewire(*args: str, **environment: str) -> Result:
    return CliRunner().invoke(main.app, [*args], env=environment)


def der(files: IdentityFiles) -> bytes:
    return ssl.PEM_cert_to_DER_cert(files.certificate.read_text())


def test_off_loopback_it_speaks_tls_and_nothing_else(tmp_path: Path, ca: SwarmCa, token_file: Path) -> None:
    """The node's own certificate is shown, and a request in clear gets no answer."""
    files = issue(tmp_path / "node", ca)
    with serving(ANYWHERE, token_file, Contexts(NodePair(IdentitySource(files)))) as server:
        assert shown(server, ca) == shown(server, ca, None) == der(files)
        plain = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
        plain.request("GET", "/livez")
        with pytest.raises((http.client.HTTPException, OSError)):
            plain.getresponse()
        plain.close()


def test_a_renewed_certificate_is_shown_at_once(tmp_path: Path, ca: SwarmCa, token_file: Path) -> None:
    """The next handshake has the new one; a pair that does not fit yet leaves the old one in use."""
    files = issue(tmp_path / "node", ca)
    first = der(files)
    with serving(ANYWHERE, token_file, Contexts(NodePair(IdentitySource(files)))) as server:
        assert shown(server, ca) == first
        key = files.key.read_bytes()
        files.key.write_bytes(ca.issue("node1", MANAGER).key_pem())
        assert shown(server, ca) == first
        files.key.write_bytes(key)
        issue(tmp_path / "node", ca)
        assert shown(server, ca, None) == der(files) != first


def test_a_stored_pair_is_followed_too(tmp_path: Path, ca: SwarmCa, token_file: Path) -> None:
    """Files of settings behave as the node's own."""
    files = issue(tmp_path / "own", ca)
    with serving(ANYWHERE, token_file, Contexts(StoredPair(files.certificate, files.key))) as server:
        first = shown(server, ca)
        issue(tmp_path / "own", ca)
        assert shown(server, ca) == der(files) != first


def test_the_cli_with_the_ca_of_the_swarm(tmp_path: Path, ca: SwarmCa, token_file: Path) -> None:
    """With the Swarm's root CA any address will do: the certificate must be a manager's."""
    files = issue(tmp_path / "node", ca)
    with serving(ANYWHERE, token_file, Contexts(NodePair(IdentitySource(files)))) as server:
        url, token = f"https://127.0.0.1:{server.port}", ("--token-file", str(token_file))
        good = hivewire("status", "--url", url, *token, HIVEWIRE_API_CA=str(files.roots))
        assert (good.exit_code, good.stderr) == (0, "")
        named = hivewire("status", "--url", url, *token, "--ca", str(files.roots), "--server-name", "node1")
        assert named.exit_code == 0
        wrong = hivewire("status", "--url", url, *token, "--ca", str(files.roots), "--server-name", "node2")
        assert (wrong.exit_code, "--server-name" in wrong.stderr) == (3, True)
        other = tmp_path / "other.pem"
        other.write_bytes(SwarmCa().pem)
        stranger = hivewire("status", "--url", url, *token, "--ca", str(other))
        assert (stranger.exit_code, "is not trusted" in stranger.stderr, "--ca" in stranger.stderr) == (3, True, True)
        assert TOKEN not in stranger.output + wrong.output


def test_a_worker_is_no_controller(tmp_path: Path, ca: SwarmCa, token_file: Path) -> None:
    """Another node of the Swarm does not get the token, although its certificate is genuine."""
    files = issue(tmp_path / "worker", ca, WORKER, "node2")
    with serving(ANYWHERE, token_file, Contexts(NodePair(IdentitySource(files)))) as server:
        args = ("--url", f"https://127.0.0.1:{server.port}", "--token-file", str(token_file), "--ca", str(files.roots))
        refused = hivewire("status", *args)
    assert (refused.exit_code, "not trusted" in refused.stderr) == (3, True)


@pytest.mark.parametrize(("content", "says"), [(None, "cannot be read"), ("x", "holds no certificate")])
def test_a_ca_that_is_none(tmp_path: Path, token_file: Path, content: str | None, says: str) -> None:
    """It is wrong use, told before anything is sent."""
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    args = ("--url", "https://127.0.0.1:1", "--ca", str(path), "--token-file", str(token_file))
    result = hivewire("status", *args)
    assert (result.exit_code, says in result.stderr) == (2, True)


def test_https_to_plain_http_is_told_as_such(token_file: Path) -> None:
    """The wrong scheme is named."""
    with serving("127.0.0.1", token_file) as server:
        args = ("--url", f"https://127.0.0.1:{server.port}", "--token-file", str(token_file))
        result = hivewire("status", *args)
    assert (result.exit_code, "does not speak TLS" in result.stderr) == (3, True)


def test_the_socket_is_for_its_owner_and_found_by_the_cli(
    tmp_path: Path, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands in the container need no address; a file that a dead controller left is replaced."""
    path = tmp_path / "run" / "api.sock"
    monkeypatch.setattr(client, "DEFAULT_SOCKET", path)
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with serving(str(path), token_file):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert hivewire("healthcheck").stdout == "ok\n"
        assert hivewire("status", "--token-file", str(token_file)).exit_code == 0
        assert hivewire("healthcheck", "--url", f"unix://{path}").exit_code == 0
    assert not path.exists()


@pytest.mark.parametrize("host", [ANYWHERE, "192.0.2.1", "::", "node-1"])
def test_no_settings_make_a_plain_listener_for_others(tmp_path: Path, ca: SwarmCa, token_file: Path, host: str) -> None:
    """Off loopback there is TLS, and a socket for the commands beside it; without a certificate there is no start."""
    app = create_app(FakeSource(), TokenSet.load(token_file), "0.1.0")
    identity = IdentitySource(issue(tmp_path / "node", ca))
    settings = ControllerSettings(api_host=host, api_socket=tmp_path / "api.sock")
    pairs = _pairs(settings, identity)
    assert isinstance(pairs, NodePair)
    assert [server._is_plain for server in _servers(settings, app, pairs)] == [False, True]
    with pytest.raises(InvalidSettings, match="loopback addresses only"):
        _servers(settings, app, None)
    with pytest.raises(InvalidSettings, match="go together"):
        _pairs(ControllerSettings(api_host=host, api_cert=tmp_path / "x"), identity)
    assert _pairs(ControllerSettings(api_host="127.0.0.1"), identity) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda files: files.certificate.unlink(), "cannot read"),
        (lambda files: files.certificate.write_text("x"), "HIVEWIRE_API_CERT: .* holds no certificate"),
        (lambda files: files.key.write_text("x"), "HIVEWIRE_API_KEY: .* is no private key"),
        (lambda files: files.key.write_bytes(SwarmCa().issue("n", MANAGER).key_pem()), "does not fit"),
    ],
)
def test_a_certificate_that_cannot_be_used_ends_the_start(tmp_path: Path, ca: SwarmCa, change, says: str) -> None:  # type: ignore[no-untyped-def]
    """The error names the setting and what is wrong."""
    files = issue(tmp_path / "own", ca)
    change(files)
    with pytest.raises(InvalidSettings, match=says):
        Contexts(StoredPair(files.certificate, files.key))


def test_a_pair_does_not_show_its_key(tmp_path: Path, ca: SwarmCa) -> None:
    """Neither of the two kinds does."""
    files = issue(tmp_path / "node", ca)
    for pairs in (NodePair(IdentitySource(files)), StoredPair(files.certificate, files.key)):
        assert "PRIVATE" not in repr(pairs.current())
        assert pairs.current() is pairs.current()
