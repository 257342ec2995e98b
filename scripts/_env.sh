# Sourced by the other scripts: a virtual environment with everything the constraints pin.
# VENV chooses where it lives (default .venv); PYTHON the interpreter that makes it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} PIP_DISABLE_PIP_VERSION_CHECK=1 MPLBACKEND=Agg
# What commands keep between runs stays in the checkout, not in the home of whoever runs the tests.
export FEATSTORE_CACHE=${FEATSTORE_CACHE:-$PWD/.cache/featstore}
# What is installed outside the environment must not leak in.
unset PYTHONPATH PYTHONHOME

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.11 or newer with the venv module is needed; install it, or name it: PYTHON=/path/to/python $0" >&2
    return 2
}

# Keep a torch that is already in the environment and recent enough: a GPU build is not replaced by the pinned one.
constraints() {
    if "$VENV/bin/python" - <<'PY' 2>/dev/null; then
import sys
from importlib.metadata import version
installed = tuple(int(part) for part in version("torch").split("+")[0].split(".")[:2])
sys.exit(installed < (2, 6))
PY
        grep -vE '^(torch|triton)==' constraints.txt >"$VENV/constraints.txt"
    else
        cp constraints.txt "$VENV/constraints.txt"
    fi
}

install() {
    local wanted
    wanted=$(cat pyproject.toml constraints.txt | sha256sum)
    if [ ! -x "$VENV/bin/python" ]; then
        local python
        python=$(find_python) || exit 2
        echo "creating $VENV" >&2
        "$python" -m venv "$VENV"
    fi
    if [ "$(cat "$VENV/.installed" 2>/dev/null)" != "$wanted" ]; then
        echo "installing into $VENV (a few minutes the first time)" >&2
        constraints
        # The build backend is pinned as well, so that a new release cannot change the build.
        PIP_CONSTRAINT="$VENV/constraints.txt" "$VENV/bin/python" -m pip install -qq -c "$VENV/constraints.txt" -e '.[dev]'
        echo "$wanted" >"$VENV/.installed"
    fi
    PATH=$(cd "$VENV/bin" && pwd):$PATH
    export PATH
}

# What formatting, lint, types and walls need, without torch and its company: seconds instead of minutes. The whole
# environment is used where it is there and current.
install_for_checks() {
    local wanted light base pip
    wanted=$(cat pyproject.toml constraints.txt | sha256sum)
    if [ "$(cat "$VENV/.installed" 2>/dev/null)" = "$wanted" ]; then
        install
        return
    fi
    light=$VENV-check
    base=$(find_python)
    pip=("$light/bin/python" -m pip)
    # An environment's own pip takes seconds to unpack; where the interpreter has one, that installs into it.
    if "$base" -m pip --version >/dev/null 2>&1; then
        pip=("$base" -m pip --python "$light/bin/python")
        [ -x "$light/bin/python" ] || "$base" -m venv --without-pip "$light"
    elif [ ! -x "$light/bin/python" ]; then
        "$base" -m venv "$light"
    fi
    if [ "$(cat "$light/.installed" 2>/dev/null)" != "$wanted" ]; then
        echo "installing what the checks need into $light" >&2
        "${pip[@]}" install -qq --no-compile -c constraints.txt ruff mypy codespell types-PyYAML pytest pytest-timeout hypothesis \
            numpy array-api-compat blake3 pydantic zarr numcodecs google-crc32c typer rich pyyaml regex safetensors threadpoolctl jinja2
        echo "$wanted" >"$light/.installed"
    fi
    PATH=$(cd "$light/bin" && pwd):$PATH
    export PATH
}
