"""What happens to the store and its mirror when a real etcd dies, hangs, is wiped, or refuses us."""

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hivewire.errors import InvalidSettings, NoPermission, StoreUnavailable
from hivewire.store.api import Put, TlsCredentials
from hivewire.store.etcd import EtcdSettings, EtcdStore, grpc_target
from hivewire.store.mirror import Mirror, MirrorSettings
from tests.contract.etcd_certificates import Authority, Leaf
from tests.contract.etcd_server import ABSENT, EtcdServer, free_ports, wait_until

pytestmark = pytest.mark.skipif(ABSENT is not None, reason=ABSENT or "")

_PREFIX = "/hivewire/v1/peers/"

MakeServer = Callable[..., EtcdServer]
MakeStore = Callable[..., EtcdStore]


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[MakeServer]:
    """Start servers that are gone after the test."""
    servers: list[EtcdServer] = []

    def make(*tls: str) -> EtcdServer:
        folder = tmp_path / f"etcd{len(servers)}"
        folder.mkdir()
        servers.append(EtcdServer(folder, tls))
        servers[-1].start()
        return servers[-1]

    yield make
    for server in servers:
        server.kill()


@pytest.fixture
def make_store() -> Iterator[MakeStore]:
    """Open stores that are closed after the test; deadlines are short, so that outages are."""
    stores: list[EtcdStore] = []

    def make(*endpoints: str, credentials: Callable[[], TlsCredentials] | None = None) -> EtcdStore:
        stores.append(EtcdStore(EtcdSettings(endpoints, credentials, call_timeout_s=2.0, read_deadline_s=5.0)))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


class Follower:
    """A running mirror of one prefix that remembers what it was told."""

    def __init__(self, store: EtcdStore) -> None:
        self.told: list[tuple[frozenset[str], bool]] = []
        settings = MirrorSettings(idle_s=1.0, grace_s=1.0, longest_retry_s=0.5)
        self.mirror = Mirror(store, lambda _, keys, complete: self.told.append((keys, complete)), settings=settings)
        self.mirror.follow(_PREFIX)
        self.mirror.start()
        wait_until(lambda: self.mirror.synced(_PREFIX), "the first list")

    def values(self) -> dict[str, bytes]:
        return {key.removeprefix(_PREFIX): item.value for key, item in self.mirror.items(_PREFIX).items()}


@pytest.fixture
def follow() -> Iterator[Callable[[EtcdStore], Follower]]:
    followers: list[Follower] = []

    def make(store: EtcdStore) -> Follower:
        followers.append(Follower(store))
        return followers[-1]

    yield make
    for follower in followers:
        follower.mirror.stop()


def test_kill_and_restart_under_a_mirror(
    make_server: MakeServer, make_store: MakeStore, follow: Callable[[EtcdStore], Follower]
) -> None:
    """Items stay while etcd is dead, and what changed around its restart arrives."""
    server = make_server()
    store = make_store(server.endpoint)
    store.txn((), [Put(_PREFIX + "a", b"1"), Put(_PREFIX + "b", b"1")])
    follower = follow(store)
    assert follower.mirror.healthy
    server.kill()
    wait_until(lambda: not follower.mirror.healthy, "the mirror to notice")
    assert follower.mirror.stale_since is not None
    assert follower.mirror.synced(_PREFIX)
    assert follower.values() == {"a": b"1", "b": b"1"}
    server.start()
    wait_until(lambda: follower.mirror.healthy, "the mirror to come back")
    store.delete(_PREFIX + "a")
    store.put(_PREFIX + "c", b"2")
    wait_until(lambda: follower.values() == {"b": b"1", "c": b"2"}, "the changes after the restart")
    assert follower.mirror.reset_count == 0
    assert not any(keys for keys, complete in follower.told[1:] if complete)


def test_deletions_during_an_outage_of_the_watch(
    make_server: MakeServer, make_store: MakeStore, follow: Callable[[EtcdStore], Follower]
) -> None:
    """What was deleted and compacted while the mirror could not see it is found by comparing lists."""
    server = make_server()
    store, other = make_store(server.endpoint), make_store(server.endpoint)
    store.txn((), [Put(_PREFIX + "a", b"1"), Put(_PREFIX + "b", b"1")])
    follower = follow(store)
    store.close()
    wait_until(lambda: not follower.mirror.healthy, "the mirror to lose its connection")
    other.delete(_PREFIX + "a")
    server.compact(other.put(_PREFIX + "c", b"2"))
    follower.mirror._store = make_store(server.endpoint)
    wait_until(lambda: follower.values() == {"b": b"1", "c": b"2"}, "the difference")
    assert (frozenset({_PREFIX + "a", _PREFIX + "c"}), True) in follower.told


def test_a_wiped_store_is_flagged(
    make_server: MakeServer, make_store: MakeStore, follow: Callable[[EtcdStore], Follower]
) -> None:
    """An etcd that lost its data and started again is listed anew, flagged, and its content taken as it is."""
    server = make_server()
    store = make_store(server.endpoint)
    for n in range(10):
        store.put(_PREFIX + "a", b"%d" % n)
    follower = follow(store)
    server.kill()
    wait_until(lambda: not follower.mirror.healthy, "the mirror to notice")
    server.wipe()
    server.start()
    wait_until(lambda: follower.mirror.healthy, "the mirror to come back")
    assert follower.mirror.reset_count == 1
    assert follower.values() == {}
    assert follower.told[-1] == (frozenset({_PREFIX + "a"}), True)
    store.put(_PREFIX + "b", b"new")
    wait_until(lambda: follower.values() == {"b": b"new"}, "a change of the new store")
    assert follower.mirror.reset_count == 1


def test_a_frozen_store_is_noticed(
    make_server: MakeServer, make_store: MakeStore, follow: Callable[[EtcdStore], Follower]
) -> None:
    """An etcd that keeps its connections and says nothing is noticed by the watchdog, not waited for."""
    server = make_server()
    store = make_store(server.endpoint)
    store.put(_PREFIX + "a", b"1")
    follower = follow(store)
    server.freeze()
    wait_until(lambda: not follower.mirror.healthy, "the watchdog")
    assert follower.values() == {"a": b"1"}
    with pytest.raises(StoreUnavailable, match="deadline_exceeded"):
        store.put(_PREFIX + "b", b"1")
    server.thaw()
    wait_until(lambda: follower.mirror.healthy, "the mirror to come back")
    store.put(_PREFIX + "c", b"1")
    wait_until(lambda: "c" in follower.values(), "a change after the thaw")


def test_many_kills_under_writes(
    make_server: MakeServer, make_store: MakeStore, follow: Callable[[EtcdStore], Follower]
) -> None:
    """Whatever kills and restarts happen between and during writes, the mirror ends equal to a list."""
    server = make_server()
    store = make_store(server.endpoint)
    follower = follow(store)
    stop = threading.Event()

    def write() -> None:
        for n in range(1_000_000):
            if stop.is_set():
                return
            try:
                store.put(f"{_PREFIX}{n % 50}", b"%d" % n)
                store.delete(f"{_PREFIX}{(n + 25) % 50}")
            except StoreUnavailable:
                stop.wait(0.01)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(4):
            seen = follower.mirror.events_applied
            wait_until(lambda seen=seen: follower.mirror.events_applied > seen + 50, "events")  # type: ignore[misc]
            server.kill()
            server.start()
    finally:
        stop.set()
        writer.join()
    final = store.list(_PREFIX).items
    wait_until(
        lambda: sorted(follower.mirror.items(_PREFIX).values(), key=lambda item: item.key) == list(final),
        "the mirror to equal the list",
    )
    assert follower.mirror.reset_count == 0


def test_a_dead_endpoint_is_a_clear_error(make_store: MakeStore) -> None:
    """With nobody listening, every call says which endpoint does not answer, and a watch too."""
    endpoint = f"127.0.0.1:{free_ports(1)[0]}"
    store = make_store(endpoint)
    for call in (lambda: store.get("a"), lambda: store.put("a", b""), lambda: store.grant_lease(5)):
        with pytest.raises(StoreUnavailable, match=endpoint):
            call()
    watch = store.open_watch()
    watch.add("a", 1)
    with pytest.raises(StoreUnavailable, match=endpoint):
        watch.next(30)
    watch.close()


def test_an_endpoint_that_never_answers(make_store: MakeStore) -> None:
    """A peer that takes the connection and stays silent costs no more than the deadline."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        store = make_store(f"127.0.0.1:{mute.getsockname()[1]}")
        with pytest.raises(StoreUnavailable):
            store.get("a")


def test_the_second_endpoint_is_used(make_server: MakeServer, make_store: MakeStore) -> None:
    """One endpoint that is alive is enough, wherever it stands in the list."""
    dead, live = f"127.0.0.1:{free_ports(1)[0]}", make_server().endpoint
    for endpoints in ((dead, live), (live, dead)):
        store = make_store(*endpoints)
        store.put("a", b"1")
        assert store.get("a") is not None


def test_a_mirror_moves_to_the_other_endpoint(
    make_server: MakeServer, make_store: MakeStore, follow: Callable[[EtcdStore], Follower]
) -> None:
    """When the endpoint in use hangs the mirror goes on with the other; here that is another store, so flagged."""
    one, two = make_server(), make_server()
    for server, name in ((one, "one"), (two, "two")):
        make_store(server.endpoint).put(_PREFIX + name, b"1")
    follower = follow(make_store(one.endpoint, two.endpoint))
    used = one if "one" in follower.values() else two
    used.freeze()
    other = {"two": b"1"} if used is one else {"one": b"1"}
    try:
        wait_until(lambda: follower.values() == other, "the other endpoint")
        assert follower.mirror.reset_count == 1
    finally:
        used.thaw()


@pytest.mark.parametrize("endpoint", ["", "host", "host:", ":1", "host:port", "http://host:2379", "host:70000"])
def test_endpoints_that_make_no_sense(endpoint: str) -> None:
    """A mistake in an endpoint is an error of the settings, before anything connects."""
    with pytest.raises(InvalidSettings, match="host:port"):
        EtcdSettings((endpoint,))


def test_grpc_targets() -> None:
    """One name is left to gRPC; lists are of one family, names in them looked up."""
    assert grpc_target(["etcd:2379"]) == "dns:///etcd:2379"
    assert grpc_target(["10.0.0.1:2379", "10.0.0.2:2380"]) == "ipv4:10.0.0.1:2379,10.0.0.2:2380"
    assert grpc_target(["[fd00::1]:2379", "10.0.0.2:2380"]) == "ipv6:[fd00::1]:2379,[::ffff:10.0.0.2]:2380"
    with pytest.raises(StoreUnavailable):
        grpc_target(["one.invalid:1", "two.invalid:1"])


class SwarmTls:
    """An etcd that shows and asks for certificates as Swarm's CA issues them."""

    def __init__(self, make_server: MakeServer, folder: Path) -> None:
        self.authority = Authority()
        manager = self.authority.issue("node1", "swarm-manager")
        files = {"ca": self.authority.pem, "cert": manager.cert_pem, "key": manager.key_pem}
        for name, pem in files.items():
            (folder / f"{name}.pem").write_bytes(pem)
        self._flags = (f"--cacert={folder}/ca.pem", f"--cert={folder}/cert.pem", f"--key={folder}/key.pem")
        self.server = make_server(
            f"--cert-file={folder}/cert.pem",
            f"--key-file={folder}/key.pem",
            f"--trusted-ca-file={folder}/ca.pem",
            "--client-cert-auth",
        )

    def credentials(self, leaf: Leaf, ca_pem: bytes | None = None) -> TlsCredentials:
        return TlsCredentials(ca_pem or self.authority.pem, leaf.cert_pem, leaf.key_pem)

    def ctl(self, *words: str) -> None:
        # etcdctl cannot be told which server name to expect.
        self.server.ctl(
            f"--endpoints=https://{self.server.endpoint}", "--insecure-skip-tls-verify", *self._flags, *words
        )


@pytest.fixture
def swarm_tls(make_server: MakeServer, tmp_path: Path) -> SwarmTls:
    return SwarmTls(make_server, tmp_path)


def test_mutual_tls(swarm_tls: SwarmTls, make_store: MakeStore) -> None:
    """A node certificate opens an etcd whose own certificate names nothing but swarm-manager."""
    leaf = swarm_tls.authority.issue("node2", "swarm-worker")
    store = make_store(swarm_tls.server.endpoint, credentials=lambda: swarm_tls.credentials(leaf))
    revision = store.put("a", b"1")
    watch = store.open_watch()
    watch.add("a", revision)
    wait_until(lambda: getattr(watch.next(1), "revision", 0) >= revision, "the watch")
    watch.close()


def test_certificates_of_another_authority(swarm_tls: SwarmTls, make_store: MakeStore) -> None:
    """A client certificate that etcd does not trust, and an etcd that we do not trust, are clear errors."""
    stranger = Authority("stranger")
    mine, theirs = swarm_tls.authority.issue("node2", "swarm-worker"), stranger.issue("node2", "swarm-worker")
    endpoint = swarm_tls.server.endpoint
    for given in (swarm_tls.credentials(theirs), swarm_tls.credentials(mine, stranger.pem)):
        store = make_store(endpoint, credentials=lambda given=given: given)
        with pytest.raises(StoreUnavailable, match=endpoint) as caught:
            store.get("a")
        assert "certificate" in str(caught.value)


def test_renewed_certificates_are_picked_up(swarm_tls: SwarmTls, make_store: MakeStore) -> None:
    """After a refusal the credentials are asked for again, so a renewal needs no restart."""
    stranger = Authority("stranger").issue("node2", "swarm-worker")
    given = [swarm_tls.credentials(stranger)]
    store = make_store(swarm_tls.server.endpoint, credentials=lambda: given[0])
    with pytest.raises(StoreUnavailable):
        store.get("a")
    given[0] = swarm_tls.credentials(swarm_tls.authority.issue("node2", "swarm-worker"))
    assert store.get("a") is None


def test_credentials_that_are_no_pem(swarm_tls: SwarmTls, make_store: MakeStore) -> None:
    """Broken credentials fail as an unusable store, and no byte of a key shows in the error."""
    broken = TlsCredentials(swarm_tls.authority.pem, b"no certificate", b"secret-key-bytes")
    store = make_store(swarm_tls.server.endpoint, credentials=lambda: broken)
    with pytest.raises(StoreUnavailable) as caught:
        store.get("a")
    assert "secret" not in str(caught.value)
    assert "secret" not in repr(broken) + repr(store)


def test_what_a_user_may_not_do(swarm_tls: SwarmTls, make_store: MakeStore) -> None:
    """etcd takes the user from the certificate's name; what its role does not allow is NoPermission, in watches too."""
    swarm_tls.ctl("user", "add", "root", "--no-password")
    swarm_tls.ctl("user", "add", "node1", "--no-password")
    swarm_tls.ctl("user", "grant-role", "node1", "root")
    swarm_tls.ctl("user", "grant-role", "root", "root")
    swarm_tls.ctl("role", "add", "node")
    swarm_tls.ctl("role", "grant-permission", "node", "--prefix=true", "readwrite", "mine/")
    swarm_tls.ctl("user", "add", "node2", "--no-password")
    swarm_tls.ctl("user", "grant-role", "node2", "node")
    swarm_tls.ctl("auth", "enable")
    leaf = swarm_tls.authority.issue("node2", "swarm-worker")
    store = make_store(swarm_tls.server.endpoint, credentials=lambda: swarm_tls.credentials(leaf))
    store.put("mine/a", b"1")
    assert len(store.list("mine/").items) == 1
    with pytest.raises(NoPermission):
        store.put("theirs/a", b"1")
    with pytest.raises(NoPermission):
        store.list("theirs/")
    watch = store.open_watch()
    watch.add("theirs/", 1)
    with pytest.raises(NoPermission):
        wait_until(lambda: watch.next(1) is ..., "the refusal")
    watch.close()
    nobody = swarm_tls.authority.issue("node3", "swarm-worker")
    stranger = make_store(swarm_tls.server.endpoint, credentials=lambda: swarm_tls.credentials(nobody))
    with pytest.raises(NoPermission):
        stranger.get("mine/a")
