#!/bin/sh
# Installs the Debian packages that the tests and the lab need on this machine; does nothing where they are there.
set -eu
wanted="etcd-server etcd-client wireguard-go wireguard-tools nftables iproute2 iputils-ping iperf3"

missing=
for package in $wanted; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "packages.sh: not installed:$missing. Install them, or run this as root on Debian; tests that need them are skipped." >&2
    exit 0
fi
echo "packages.sh: installing$missing" >&2
apt-get update -qq
# A package's service must not start here: the tests run their own.
guard=/usr/sbin/policy-rc.d
if [ ! -e "$guard" ]; then
    printf '#!/bin/sh\nexit 101\n' > "$guard"
    chmod 755 "$guard"
    trap 'rm -f "$guard"' EXIT
fi
# shellcheck disable=SC2086  one word per package
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
