"""Hypothesis strategies for clusters and labels: mostly sensible, sometimes wrong in the ways that people are."""

from collections.abc import Iterable
from ipaddress import IPv4Network

from hypothesis import strategies as st

from controller.policy.labels import LABELS
from controller.swarm.snapshot import Network, Service, SwarmSnapshot
from tests.builders import network_id, service, snapshot

STACKS = ("shop", "billing", "")
SHORT_NAMES = ("web", "api", "db", "cache")
FULL_NAMES = tuple(f"{stack}_{name}" if stack else name for stack in STACKS for name in SHORT_NAMES)
NETWORKS = ("shop_app", "shop_back", "common")

junk = st.text(max_size=40) | st.text(alphabet=" ,:/-*_.0123456789abtcpud\u00a0\u0430\n", max_size=40)

ports = st.integers(1, 65535).map(str) | st.tuples(st.integers(1, 300), st.integers(0, 300)).map(
    lambda pair: f"{pair[0]}-{pair[0] + pair[1]}"
)
protocols = st.sampled_from(["", "/tcp", "/udp"])
offers = st.builds("{}{}".format, ports, protocols)
targets = st.sampled_from(
    [*SHORT_NAMES, *FULL_NAMES, *(f"{s}/{n}" for s in STACKS if s for n in SHORT_NAMES), "nobody"]
)
links = st.builds("{}{}".format, targets, protocols) | st.builds("{}:{}".format, targets, offers)
consents = st.sampled_from(["shop/*", "billing/*", "shop/web", "billing/api", "web", "shop_api", "db"])


def lists(items: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Some of the items as one label, in one of the ways to separate them."""
    return st.builds(str.join, st.sampled_from([",", " ", ",\n"]), st.lists(items, max_size=4))


GOOD_VALUES: dict[str, st.SearchStrategy[str]] = {
    "hivewire.links": lists(links),
    "hivewire.ports": lists(offers),
    "hivewire.allow": lists(consents),
    "hivewire.enable": st.sampled_from(["true", "", "false", "no"]),
    "hivewire.mode": st.sampled_from(["enforce", "observe", "off"]),
    "hivewire.network": st.sampled_from(["app", "back", "shop_app", "common", "elsewhere"]),
    "hivewire.rotate": st.sampled_from(["1h", "12h", "90m"]),
    "hivewire.keepalive": st.sampled_from(["off", "25s", "1m"]),
    "hivewire.mtu": st.sampled_from(["1280", "1420"]),
}
assert set(GOOD_VALUES) == set(LABELS)

good_labels = st.fixed_dictionaries({}, optional=GOOD_VALUES)
stray_labels = st.dictionaries(
    st.sampled_from(["hivewire.link", "Hivewire.Mode", "traefik.enable", *LABELS]), junk, max_size=2
)
labels: st.SearchStrategy[dict[str, str]] = st.one_of(
    st.just({}), good_labels, good_labels, st.builds(lambda a, b: a | b, good_labels, stray_labels)
)

networks = st.builds(
    lambda flags: [
        Network(
            id=network_id(name),
            name=name,
            subnets=(IPv4Network(f"10.{index}.0.0/24"),),
            is_dsr=index in flags[0],
            is_encrypted=index in flags[1],
        )
        for index, name in enumerate(NETWORKS)
    ],
    st.tuples(st.sets(st.integers(0, 9), max_size=1), st.sets(st.integers(0, 2), max_size=1)),
)


@st.composite
def services(draw: st.DrawFn, name: str) -> Service:
    """A service of this name with any labels, on any of the networks."""
    attached = draw(st.lists(st.sampled_from(NETWORKS), unique=True, max_size=3))
    has_vip = draw(st.booleans())
    return service(
        name,
        draw(labels),
        networks=attached,
        container_labels=draw(st.one_of(st.just({}), st.just({}), stray_labels)),
        vips={n: f"10.{NETWORKS.index(n)}.0.{FULL_NAMES.index(name) + 2}" for n in attached if has_vip},
        host_network=not attached and draw(st.booleans()),
        can_change_network=draw(st.booleans()),
    )


@st.composite
def snapshots(draw: st.DrawFn, names: Iterable[str] = FULL_NAMES) -> SwarmSnapshot:
    """A cluster with some of these services."""
    chosen = draw(st.lists(st.sampled_from(sorted(names)), unique=True, max_size=6))
    return snapshot(*[draw(services(name)) for name in chosen], networks=draw(networks))
