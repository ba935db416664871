#!/bin/sh
# Make a virtual environment with what pyproject.toml asks for, at the versions of constraints.txt.
# Does nothing for what is there already.
#   install-dependencies.sh ENVIRONMENT FOLDER
# FOLDER holds pyproject.toml, constraints.txt and perhaps wheels: with wheels no index is asked.
set -eu
environment=$1
folder=$2

[ -x "$environment/bin/pip" ] || python3 -m venv "$environment"
# setuptools too: the project is then built without an index or an environment of its own.
python3 - "$folder/pyproject.toml" >"$folder/requirements.txt" <<'PROGRAM'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)
print(*project["build-system"]["requires"], *project["project"]["dependencies"], sep="\n")
PROGRAM
if ls "$folder"/*.whl >/dev/null 2>&1; then
    set -- --no-index --find-links "$folder"
else
    set --
fi
"$environment/bin/pip" install --no-cache-dir --disable-pip-version-check "$@" \
    -c "$folder/constraints.txt" -r "$folder/requirements.txt"
rm -rf "$folder"
