#!/bin/sh
# Makes the environment in .venv, or brings it up to date: uv, the packages of requirements.lock, and this project in
# editable mode. Does nothing where nothing has changed. PYTHON=... chooses the interpreter (3.11 to 3.14, not 3.13.0).
# `setup.sh ffcv` also builds FFCV, and installs the system packages that it is built against.
set -eu
cd "$(dirname "$0")/.."
# The environment itself, first in PATH under make or when it is active, must not be what makes it: it has no pip.
PATH=${PATH#"$PWD/.venv/bin:"}

say() { printf 'setup: %s\n' "$*"; }
fail() {
    say "$@" >&2
    exit 1
}

# Not 3.13.0: torch.compile warns there that its guards may be slow, and free-threaded builds lack wheels of DALI.
supported='import sys, sysconfig
version = sys.version_info
free_threaded = sysconfig.get_config_var("Py_GIL_DISABLED")
sys.exit(not (3, 11) <= version[:2] <= (3, 14) or version[:3] == (3, 13, 0) or bool(free_threaded))'

candidates='python3 python3.14 python3.13 python3.12 python3.11'

find_python() {
    for name in ${PYTHON:-$candidates}; do
        if "$name" -c "$supported" 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    tried=
    for name in ${PYTHON:-$candidates}; do
        tried="$tried, $name ($("$name" -V 2>/dev/null || echo not found))"
    done
    fail "no Python 3.11 to 3.14 found (3.13.0 and free-threaded builds will not do). Tried: ${tried#, }." \
        "Install one, or name it: make setup PYTHON=/path/to/python3"
}

# install_packages WHAT_IS_MISSING PACKAGE...: from Debian or Ubuntu, or says what to do.
install_packages() {
    missing=$1
    shift
    command -v apt-get >/dev/null || fail "$missing; install what your system calls $* and try again"
    if [ "$(id -u)" = 0 ]; then
        as_root=
    elif command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [ -t 0 ]; }; then
        as_root=sudo
    else
        fail "$missing; run as root: apt-get update && apt-get install -y --no-install-recommends $*"
    fi
    say "installing the system packages $*${as_root:+ with sudo}"
    $as_root apt-get update -qq
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# Debian and Ubuntu ship python3 without pip.
install_pip() {
    case $python in
        /usr/bin/* | /bin/*) install_packages "$python has no pip" python3-pip ;;
        *) fail "$python has no pip; run: $python -m ensurepip --upgrade" ;;
    esac
}

# uv from the package index: needs neither the venv module nor ensurepip, which Debian leaves out.
find_uv() {
    if command -v uv >/dev/null; then
        uv=uv
        return
    fi
    uv=.uv/bin/uv
    if [ ! -x "$uv" ]; then
        "$python" -m pip --version >/dev/null 2>&1 || install_pip
        say "getting uv"
        "$python" -m pip install --quiet --disable-pip-version-check --root-user-action ignore --target .uv 'uv>=0.9,<1'
    fi
}

# What the environment is made from; the folder counts because the commands in .venv/bin hold its path.
fingerprint() {
    {
        pwd
        .venv/bin/python -VV
        cat requirements.lock pyproject.toml deploy/setup.sh "$@"
    } | cksum
}

# is_current STAMP [FILE...]: whether nothing has changed since the stamp was written.
is_current() {
    stamp=$1
    shift
    [ -f "$stamp" ] && .venv/bin/python -c "$supported" 2>/dev/null && [ "$(fingerprint "$@")" = "$(cat "$stamp")" ]
}

has_headers='import os, sysconfig; raise SystemExit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'

# What make-shards transcodes with has wheels for older versions only.
builds_pyjpegio='import platform, sys; sys.exit(sys.version_info < (3, 14) or platform.machine() != "x86_64")'

warn_if_disk_is_small() {
    free_kib=$(df -Pk . | awk 'NR == 2 { print $4 }')
    if [ ! -d .venv ] && [ "$free_kib" -lt 8000000 ]; then
        say "only $((free_kib / 1000000)) GB are free here, and the environment takes about 7" >&2
    fi
}

# install_headers WHAT_IS_BUILT: those of the environment's Python.
install_headers() {
    .venv/bin/python -c "$has_headers" ||
        install_packages "$1 is built here, and $(.venv/bin/python -V) lacks its headers (Python.h)" python3-dev
}

make_environment() {
    warn_if_disk_is_small
    python=$(find_python)
    find_uv
    if ! .venv/bin/python -c "$supported" 2>/dev/null; then
        say "making .venv with $("$python" -V)"
        "$uv" venv $quiet --clear --no-python-downloads --python "$python" .venv
    fi
    if .venv/bin/python -c "$builds_pyjpegio"; then
        command -v g++ >/dev/null || install_packages "pyjpegio is built here, by a C++ compiler" g++
        install_headers pyjpegio
    fi
    say "installing the packages of requirements.lock: about 3 GB to download the first time, then about a minute"
    "$uv" pip install $quiet --python .venv --compile-bytecode --requirement requirements.lock
    # By path (compat): with setuptools' import hook, a folder shards/ where somebody works would hide the package.
    "$uv" pip install $quiet --python .venv --no-deps --no-build-isolation --config-settings editable_mode=compat --editable .
    fingerprint >.venv/.setup
    say "done; to use the commands by name: . .venv/bin/activate"
}

# FFCV has no wheel. Of OpenCV it uses two libraries, but its build names all of them: --as-needed leaves out the rest.
add_ffcv() {
    if ! pkg-config --exists opencv4 libturbojpeg 2>/dev/null || ! command -v g++ >/dev/null; then
        install_packages "FFCV is built here, against OpenCV and libjpeg-turbo" \
            libopencv-dev libturbojpeg0-dev pkg-config g++
    fi
    install_headers FFCV
    python=$(find_python)
    find_uv
    say "building FFCV"
    LDFLAGS="-Wl,--as-needed ${LDFLAGS:-}" \
        "$uv" pip install $quiet --python .venv --no-deps --requirement requirements-ffcv.lock
    fingerprint requirements-ffcv.lock >.venv/.setup-ffcv
}

case ${1:-} in
    '' | ffcv) ;;
    *) fail "there is no part $1: run deploy/setup.sh, or deploy/setup.sh ffcv" ;;
esac
quiet=--quiet # without a terminal, uv's progress is noise
[ -t 2 ] && quiet=
export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-300}"
is_current .venv/.setup || make_environment
[ "${1:-}" != ffcv ] || is_current .venv/.setup-ffcv requirements-ffcv.lock || add_ffcv
