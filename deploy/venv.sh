#!/bin/sh
# Makes the virtual environment for development: the pinned dependencies, and this checkout in editable form.
set -eu
cd "$(dirname "$0")/.."
venv=${1:-.venv}

find_python() {
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
}

python=$(find_python)
if [ -z "$python" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "venv.sh: installing python3-venv" >&2
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3 python3-venv >/dev/null
    python=$(find_python)
fi
if [ -z "$python" ]; then
    echo "venv.sh: Python 3.11 or newer with venv is needed, as in Debian's package python3-venv" >&2
    exit 1
fi
echo "venv.sh: installing pinned dependencies into $venv" >&2
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check --upgrade 'pip>=25.1' -c constraints.txt
"$venv/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt --group dev -e .
