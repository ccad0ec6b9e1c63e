#!/usr/bin/env bash
# Fills benchmarks/accelerator/carry (git-ignored), which travels in parts, and
# prints the calls. With a network; on the machine that has the data.
#
#   bash benchmarks/accelerator/prepare.sh DATA_DIR [AUTO_ATTACK]
#
# DATA_DIR: with cifar10 and cifar100 as config.data.dir has them. AUTO_ATTACK: a
# clone of github.com/fra31/auto-attack. PYTHON: with this package; the wheels are
# for Python 3.12 on x86-64, and only those that the other machine has not.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
carry=${CARRY:-benchmarks/accelerator/carry}
data=${1:?usage: prepare.sh DATA_DIR [AUTO_ATTACK]}
mkdir -p "$carry/wheels"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

if ! compgen -G "$carry/wheels/*.whl" >/dev/null; then
  "$python" -m pip download -q --no-deps --only-binary=:all: \
    --python-version 3.12 --implementation cp --platform manylinux2014_x86_64 \
    -d "$carry/wheels" ml_collections tensorboardX
fi
for name in cifar10 cifar100; do
  [[ -d "$carry/$name-1" ]] || "$python" -m benchmarks.accelerator.pack_data \
    pack "$name" --data_dir="$data" --out="$carry"
done
if [[ -n "${2:-}" ]]; then
  mkdir -p "$carry/auto-attack"
  cp -r "$2/autoattack" "$2/LICENSE" "$carry/auto-attack/"
fi
du -sh "$carry"/*
commit=$(git describe --always --dirty --abbrev=12)
echo "command: ATAT_JAX_COMMIT=$commit bash benchmarks/accelerator/run.sh ENTRY"
echo "carry, first trip: $carry/wheels $carry/auto-attack $carry/cifar10-1"
echo "carry, second trip: $carry/cifar10-2"
