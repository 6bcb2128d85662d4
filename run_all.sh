#!/usr/bin/env bash
# One command for everything: set up what is needed, run all notebooks, make the report.
# Needs bash and Python 3.11 or 3.12; see --help.
set -euo pipefail

# What belongs to the caller (its Python's settings, a cluster's modules, the folder that one stands in)
# reaches neither the private environment nor the question which project is meant.
for name in $(compgen -e PYTHON) $(compgen -e JUPYTER) $(compgen -e IPYTHON) CDPATH MPLBACKEND \
    MATPLOTLIBRC PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT UV_TARGET UV_PREFIX UV_PYTHON UV_PROJECT; do
    case "$name" in PYTHON | PYTHONPYCACHEPREFIX) ;; *) unset "$name" ;; esac
done
export PYTHONSAFEPATH=1 PYTHONNOUSERSITE=1

script="${BASH_SOURCE[0]}"
while [ -L "$script" ]; do
    target="$(readlink "$script")"
    case "$target" in /*) script="$target" ;; *) script="$(dirname "$script")/$target" ;; esac
done
here="$(cd "$(dirname "$script")" && pwd -P)"
venv="$here/.venv"
python="$venv/bin/python"
stamp="$venv/set-up-complete"
begun="$venv/set-up-begun"
# What `setup --cpu` leaves out of the lock. While this file is there, every later set-up leaves it out too.
left_out="$venv/left-out"

usage() {
    cat <<'TEXT'
usage: ./run_all.sh [profile] [-p name value]... [--name run] [--only NN] [--fresh] [--appendix]
       ./run_all.sh setup [--cpu] | test | site | profiles | report RUN_DIR [--open] | --help

Sets up a virtual environment in .venv (once), runs the notebooks of a profile in order, and makes
runs/<name>/index.html. Without a profile: quick.

  -p name value   set a parameter in every notebook that has one of that name; names and types are
                  checked before anything runs. Relative paths are taken from where you are.
                  Lists in quotes: -p test_folds "[1, 2]"
  --name run      folder under runs/ (default: the profile's name)
  --only NN       run this one notebook, on what the others left in the same run folder
  --fresh         run everything again
  --appendix      also the appendix's notebooks (notebooks/appendix) and the solutions

  setup           only install (9 GB); with --cpu without the libraries of CUDA (3 GB): every later
                  command keeps to that, until .venv is removed
  test            lint, unit tests, and the notebooks
  site            the website, into site/, from what is committed (a minute; runs no notebook)
  profiles        the profiles with their time, memory, disk and needs
  report DIR      make the report of a run again; --open shows it in the browser

Resuming: give the same command again. Notebooks whose code, parameters and inputs are unchanged
are skipped. The report opens from disk, without a server: runs/<name>/index.html
To open the notebooks: .venv/bin/jupyter lab notebooks

Profiles (files in notebooks/profiles; add your own there):
TEXT
    local file
    for file in "$here"/notebooks/profiles/*.yaml; do
        printf '  %-10s %s\n' "$(basename "$file" .yaml)" "$(sed -n 's/^description: *//p' "$file")"
    done
}

fail() {
    printf 'run_all.sh: %s\n' "$*" >&2
    exit 1
}

# Prints the real path of the first Python that fits. A name on the PATH is not enough: version
# managers leave commands there that only print an error.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3 python; do
        "$candidate" -c '
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 12): sys.exit(1)
import ensurepip, venv
print(sys.executable)' 2>/dev/null && return 0
    done
    fail "no Python 3.11 or 3.12 found (with its venv module). Looked at: ${PYTHON:+$PYTHON, }\
python3.11, python3.12, python3 ($(python3 --version 2>&1 | head -n 1)), python.
Install one (Debian and Ubuntu: apt install python3.11 python3.11-venv; macOS: brew install \
python@3.11; conda: see environment.yml; anywhere: uv python install 3.11) or name it: \
PYTHON=/path/to/python3.11 ./run_all.sh"
}

# The lines of the lock that are wanted here.
lock() {
    if [ -e "$left_out" ]; then
        grep -vxFf "$left_out" "$here/requirements.txt"
    else
        cat "$here/requirements.txt"
    fi
}

# Every installed version against the lock: the one place that says whether the set-up is what was asked for.
# A local version (torch 2.10.0+cpu) is the same release.
check_lock() {
    lock | "$python" -c '
import sys
from importlib.metadata import PackageNotFoundError, version
from packaging.requirements import Requirement

wrong = []
for line in sys.stdin:
    if not line.strip() or line.startswith("#"):
        continue
    wanted = Requirement(line.strip())
    if wanted.marker and not wanted.marker.evaluate():
        continue
    try:
        there = version(wanted.name)
    except PackageNotFoundError:
        there = "nothing"
    if there == "nothing" or there not in wanted.specifier:
        wrong.append(f"{wanted.name}: the lock says {wanted.specifier}, installed is {there}")
print("\n".join(wrong))
sys.exit(bool(wrong))'
}

# What an environment must agree with to be used as it is: lock, package, place, Python.
fingerprint() {
    "$python" - "$here" <<'CODE'
import hashlib, pathlib, sys
here = pathlib.Path(sys.argv[1])
parts = [(here / name).read_bytes() for name in ("requirements.txt", "pyproject.toml")]
print(hashlib.sha256(b"\0".join(parts + [str(here).encode(), sys.version.encode()])).hexdigest())
CODE
}

is_set_up() {
    [ -x "$python" ] && [ -f "$stamp" ] && [ ! -e "$begun" ] &&
        [ "$(fingerprint 2>/dev/null)" = "$(cat "$stamp")" ]
}

find_uv() {
    local known=(pip install --torch-backend cpu --help) # by no uv that is too old
    if uv "${known[@]}" >/dev/null 2>&1; then
        uv=(uv)
    else
        "$python" -m uv "${known[@]}" >/dev/null 2>&1 ||
            "$python" -m pip install --quiet --disable-pip-version-check --upgrade uv >"$venv/pip.log" 2>&1 ||
            fail "could not install uv with pip: is the network there? ($venv/pip.log says more)"
        uv=("$python" -m uv)
    fi
}

set_up() {
    # The mark of a set-up that was begun and never ended, or a Python that is gone: start over.
    if [ -e "$begun" ] || ! "$python" -c 'import pip' >/dev/null 2>&1; then
        local base
        base="$(find_python)" || exit 1
        echo "Making $venv with $base"
        { mkdir -p "$venv" && touch "$begun" &&
            find "$venv/" -mindepth 1 -maxdepth 1 ! -name "${begun##*/}" ! -name "${left_out##*/}" \
                -exec rm -rf {} + && "$base" -m venv "$venv"; } 2>/dev/null ||
            fail "could not make $venv: may this folder be written, and is there room?"
    fi
    touch "$begun"
    rm -f "$stamp"
    find_uv
    local size="9 GB" backend=()
    if [ -e "$left_out" ]; then
        size="3 GB, without CUDA" backend=(--torch-backend cpu)
        grep -E '^(cuda-|nvidia-|triton==|xformers==)' "$here/requirements.txt" >"$left_out"
    fi
    echo "Installing the locked packages (about $size; minutes the first time)"
    # Started outside the project: uv lets the settings of a project that it is started in override a lock.
    if ! (cd "$venv" && lock | "${uv[@]}" pip install --no-config --python "$python" --compile-bytecode --no-deps \
        ${backend[@]+"${backend[@]}"} -r -); then
        rm -f "$begun" # uv stopped in good order: what is there can be kept
        fail "the installation stopped (network? disk?); give the same command again to go on"
    fi
    # setuptools comes with the lock: building the package itself fetches nothing.
    (cd "$venv" && "${uv[@]}" pip install --no-config --quiet --python "$python" --no-deps --no-build-isolation -e "$here") ||
        fail "could not install the package from $here"
    local differs
    differs="$(check_lock)" || fail "what is installed differs from requirements.txt (give the same command
again; if it stays so, remove $venv):
$differs"
    fingerprint >"$stamp"
    rm -f "$begun"
    echo "Set up in $venv"
}

run_tests() {
    cd "$here"
    # What is tested needs no network, and must not quietly begin to.
    export HF_HUB_OFFLINE=1 MPLBACKEND=Agg
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    [ $# -eq 0 ] || exec "$python" -m pytest "$@"
    # Notebooks beside units, each with one thread, as threads that compete for cores are slower than one.
    OMP_NUM_THREADS=1 exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
        tests/notebooks tests/test_*.py
}

# The generator is installed when it is asked for, not with the rest; Sphinx imports nothing of the project.
make_site() {
    find_uv
    (cd "$venv" && "${uv[@]}" pip install --no-config --quiet --python "$python" --no-deps \
        -r "$here/requirements.site.txt") || fail "could not install the website's generator: is the network there?"
    exec "$python" "$here/docs/website/build.py"
}

case "${1:-}" in
-h | --help | help)
    usage
    exit 0
    ;;
setup)
    [ $# -eq 1 ] || [ "$*" = "setup --cpu" ] || fail "setup takes no argument but --cpu"
    # an environment that was made with CUDA is made anew
    if [ $# -eq 2 ] && [ ! -e "$left_out" ]; then
        { mkdir -p "$venv" && touch "$begun" "$left_out"; } 2>/dev/null || fail "could not write in $venv"
    fi
    ;;
esac

is_set_up || set_up
export JUPYTER_PREFER_ENV_PATH=1 HF_HUB_DISABLE_TELEMETRY=1
case "${1:-}" in
setup) ;;
test)
    shift
    run_tests "$@"
    ;;
site)
    [ $# -eq 1 ] || fail "site takes no argument"
    make_site
    ;;
profiles | report | publish | train-mini) exec "$python" -m soundscapes_utils "$@" ;;
*) exec "$python" -m soundscapes_utils run "$@" ;;
esac
