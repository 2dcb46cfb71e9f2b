#!/usr/bin/env bash
# Sets up a worker of a TPU VM: see --help.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$repo/.venv
extras=tpu
python=
platform=tpu
timeout=900
tmux=no
check=yes

usage() {
  cat <<'EOF'
usage: scripts/tpu_vm_setup.sh [options]

Creates a virtual environment, installs this checkout into it, and checks that JAX sees the devices. It keeps an existing environment, so
it can be run again. On a slice of several hosts run it on all workers at the same time: the check waits for all of them.

  --venv DIR        the virtual environment (.venv in this checkout)
  --extras LIST     extras of the package to install (tpu); use tpu,gcs for a cache at gs://
  --python PATH     a Python, 3.11 or newer (the first found of python3.12, python3.11, python3.13, python3; else apt-get's python3.11)
  --tmux            also install tmux, if it is missing
  --no-check        do not start JAX
  --platform NAME   the platform that the check expects (tpu)
  --timeout S       seconds that the check may take (900)
EOF
}

die() {
  echo "error: $*" >&2
  exit 2
}

while (($#)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --tmux) tmux=yes; shift ;;
    --no-check) check=no; shift ;;
    --venv | --extras | --python | --platform | --timeout)
      (($# > 1)) || die "$1: needs a value"
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    *) die "$1: no such option; see --help" ;;
  esac
done
[[ $timeout =~ ^[1-9][0-9]*$ ]] || die "--timeout $timeout: must be a number of seconds"

install() { # by apt-get, which may be busy in the first minutes of a new VM
  command -v apt-get > /dev/null || die "$* not found, and no apt-get to install it"
  sudo apt-get -o DPkg::Lock::Timeout=300 update -q
  sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -q -y "$@"
}

fits() { # new enough, and able to create virtual environments (venv is a separate package on Debian and Ubuntu)
  "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2> /dev/null
}

if [[ $tmux = yes ]] && ! command -v tmux > /dev/null; then
  install tmux
fi

if [[ -x $venv/bin/python ]]; then
  fits "$venv/bin/python" || die "$venv: contains a Python that is broken or older than 3.11; remove it or choose another --venv"
else
  [[ ! -e $venv ]] || die "$venv: exists and is not a virtual environment; remove it or choose another --venv"
  if [[ -n $python ]]; then
    fits "$python" || die "--python $python: must be Python 3.11 or newer, with the modules venv and ensurepip"
  else
    for candidate in python3.12 python3.11 python3.13 python3; do
      if fits "$candidate"; then
        python=$candidate
        break
      fi
    done
    if [[ -z $python ]]; then
      install python3.11 python3.11-venv
      python=python3.11
      fits "$python" || die "$python was installed, but cannot create virtual environments; choose another with --python"
    fi
  fi
  "$python" -m venv "$venv"
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$repo[$extras]"
echo "installed: $("$venv/bin/python" --version), mutransformer[$extras] in $venv"

if [[ $check = yes ]]; then
  code=0
  timeout $((timeout + 60)) "$venv/bin/python" - "$platform" "$timeout" << 'EOF' || code=$?
import sys

from mutransformer.cli import run_cli
from mutransformer.config.run import DistributedConfig
from mutransformer.errors import ConfigError
from mutransformer.sharding.processes import join_processes


def check() -> int:
    platform, timeout = sys.argv[1:]
    join_processes(DistributedConfig(enabled=True, timeout=int(timeout)))
    import jax

    found = jax.devices()[0].platform
    if found != platform:
        raise ConfigError(f"JAX sees {jax.device_count()} devices of {found}, none of {platform}")
    here, all_ = jax.local_device_count(), jax.device_count()
    print(f"process {jax.process_index()} of {jax.process_count()}: {here} of {all_} devices, {jax.devices()[0].device_kind}")
    return 0


sys.exit(run_cli(check))
EOF
  [[ $code -ne 124 ]] || die "the check took more than $timeout s; on a slice all workers must run it at the same time"
  exit "$code"
fi
