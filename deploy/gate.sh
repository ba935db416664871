#!/bin/sh
# Puts the gate on this node, which shuts strict networks while an engine starts (docs/security.md). Once for every node:
#
#   deploy/gate.sh registry.example/hivewire:0.1.0
#
# It is a container of no service, because those are what an engine starts before Swarm's tasks. To end it, or before
# another version takes its place: docker rm -f hivewire-gate
set -eu
exec docker run --detach --name hivewire-gate --restart always --network host --read-only \
    --cap-drop ALL --cap-add NET_ADMIN --cap-add SYS_ADMIN \
    --volume /var/run/docker/netns:/var/run/docker/netns:ro,rslave \
    "${1:?which image? as in: $0 registry.example/hivewire:0.1.0}" hivewire-gate
