"""From a reading of the cluster and its policies to the guards of its overlay networks: ``compile_guards``. Pure.

A guard sits on every node outside of the tasks' own namespaces, where no task can change it. On a strict network it
passes only what is known to be exempt. So a service is exempt when its labels say so or when it has none; one that asks
to be in the mesh and cannot be is left out, and with that closed.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Final

from controller.policy.findings import finding, in_order
from controller.policy.labels import parse_labels
from controller.swarm.snapshot import VXLAN_PORT, Network, Service, SwarmSnapshot
from hivewire.ids import NetworkId, ServiceId
from hivewire.records import Finding, GuardRecord, Mode, PolicyRecord

#: A label of the network, not of a service.
GUARD: Final = "hivewire.guard"
_STRICT: Final = "strict"
_DEFAULT: Final = "default"


@dataclass(frozen=True, slots=True)
class Guards:
    """The guard of every network that needs one, and what is wrong with their labels."""

    records: Mapping[NetworkId, GuardRecord] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()


def compile_guards(
    snapshot: SwarmSnapshot,
    policies: Mapping[ServiceId, PolicyRecord],
    mode: Mode = Mode.ENFORCE,
    shut_out: Set[ServiceId] = frozenset(),
) -> Guards:
    """``policies`` are those of the same snapshot, ``mode`` is the mesh's, ``shut_out`` are services in quarantine,
    which the guard takes for enforced. Without an enforced service only a strict network has a guard, and not where the
    mesh is off: that is the way to be rid of it.
    """
    records: dict[NetworkId, GuardRecord] = {}
    findings: list[Finding] = []
    for network in sorted(snapshot.networks.values(), key=lambda n: n.id):
        if not network.can_carry_links:
            continue
        value = network.labels.get(GUARD, _DEFAULT).strip()
        if value not in (_STRICT, _DEFAULT):
            findings.append(_unreadable(network, value))
        on_it = sorted(
            (s for s in snapshot.services.values() if network.id in s.networks), key=lambda service: service.id
        )
        enforced = shut_out | {s for s, policy in policies.items() if policy.mode is Mode.ENFORCE}
        record = _guard(network, value != _DEFAULT, on_it, policies, enforced, snapshot.vxlan_port)
        if record.enforced or (record.strict and mode is not Mode.OFF):
            records[network.id] = record
    return Guards(records, in_order(findings))


def _guard(
    network: Network,
    strict: bool,
    services: list[Service],
    policies: Mapping[ServiceId, PolicyRecord],
    closed: Set[ServiceId],
    vxlan_port: int,
) -> GuardRecord:
    enforced = [s for s in services if s.id in closed]
    exempt = [s for s in services if s not in enforced and _is_exempt(s, policies)] if strict else []
    return GuardRecord(
        network=network.id,
        name=network.name,
        strict=strict,
        enforced=tuple(s.id for s in enforced),
        exempt=tuple(s.id for s in exempt),
        exempt_vips=tuple(sorted(s.vips[network.id] for s in exempt if network.id in s.vips)),
        vnis=network.vnis if strict else (),
        vxlan_port=vxlan_port if strict else VXLAN_PORT,
    )


def _is_exempt(service: Service, policies: Mapping[ServiceId, PolicyRecord]) -> bool:
    if service.id in policies:
        return policies[service.id].mode is not Mode.ENFORCE
    labels = parse_labels(service)
    return not labels.is_present or labels.is_switched_off or labels.mode is Mode.OBSERVE


def _unreadable(network: Network, value: str) -> Finding:
    return finding(
        "HW307",
        network.name,
        f'{GUARD} of the network is "{value}", which is neither strict nor default; it counts as strict',
        "labels of a network cannot be changed: create it again with one of the two",
        label=GUARD,
    )
