"""The words of an answer to "why"."""

import enum


class Verdict(enum.Enum):
    ALLOWED = "allowed"
    DENIED = "denied"
    BROKEN = "broken"
    """It is not as declared: what should work does not, or what should be closed is not."""


class StepName(enum.Enum):
    """The steps in their order. Names are API."""

    MESH = "mesh"
    QUARANTINE = "quarantine"
    LINK = "link"
    CONSENT = "consent"
    MODE = "mode"
    ADMISSION = "admission"
    INTERFACES = "interfaces"
    PEERS = "peers"
    RULES = "rules"
    TUNNEL = "tunnel"
