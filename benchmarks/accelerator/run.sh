#!/usr/bin/env bash
# Runs one entry of QUEUE.md within its minutes, offline.
#
#   bash benchmarks/accelerator/run.sh a            # or b to g
#   bash benchmarks/accelerator/run.sh a --smoke    # dry run, tiny, also on CPU
#   bash benchmarks/accelerator/run.sh keep         # only unpacks what came
#   bash benchmarks/accelerator/run.sh bring d 0    # checkpoints out, 60 MiB a call
#   bash benchmarks/accelerator/run.sh take d       # ... and in again
#
# OUT: folder of the results. SECONDS_IN_ALL: of this call, 560 by default.
# CARRY, SCRATCH: folders of what was carried here, and of what stays between
# calls. REFERENCE: the original AutoAttack. PYTHON: the interpreter.
# ATAT_JAX_COMMIT: of a tree without .git.
set -euo pipefail
began=$(date +%s)
cd "$(dirname "$0")/../.."

here=benchmarks/accelerator
python=${PYTHON:-python3}
carry=${CARRY:-$here/carry}
wheels=$carry/wheels
reference=${REFERENCE:-$carry/auto-attack}
scratch=${SCRATCH:-runs/accelerator}
seconds=${SECONDS_IN_ALL:-560}
part=15000000 # bytes; a file may have 16 MiB, a call 64
usage="usage: run.sh a|b|c|d|e|f|g [--smoke], keep, bring ENTRY FIRST, take ENTRY"

fail() {
  echo "error: $2" >&2
  exit "$1"
}

entry=${1:-}
smoke=""
case "$entry" in
  [a-g])
    [[ "${2:-}" == "" || "${2:-}" == --smoke ]] || fail 2 "$2; $usage"
    [[ "${2:-}" == --smoke ]] && smoke=1
    ;;
  keep) ;;
  bring | take) [[ "${2:-}" == [a-g] ]] || fail 2 "entry: '${2:-}'; $usage" ;;
  *) fail 2 "entry: '$entry'; $usage" ;;
esac
[[ -n "$smoke" ]] && scratch=$scratch-smoke && carry=$scratch/carry
out=${OUT:-$scratch/out}
mkdir -p "$scratch" "$out"

if [[ "$entry" == bring ]]; then
  first=${3:-0}
  tar -C "$scratch" -cf - "$2" | tail -c +$((first * part + 1)) |
    head -c $((4 * part)) |
    split -b $part -a 3 --numeric-suffixes="$first" - "$out/$2.tar." || true
  ls -l "$out"
  exit
fi
if [[ "$entry" == take ]]; then
  # Each trip's parts lie in a folder of their own; sorted by their numbers.
  find "$carry" -name "$2.tar.[0-9]*" -printf '%f %p\n' | sort | cut -d' ' -f2- |
    xargs cat | tar -C "$scratch" -xf -
  exit
fi

# Packages: those that were carried, then a look at all that are needed.
stays=$(cd "$scratch" && pwd)
site=$stays/site
if compgen -G "$wheels/*.whl" >/dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile \
    --no-cache-dir --upgrade --target "$site" "$wheels"/*.whl
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}:$site
export PYTHONUNBUFFERED=1
missing=$("$python" - <<'PYTHON'
from importlib.util import find_spec

NEEDED = (
  "absl chex flax jax matplotlib ml_collections numpy optax orbax PIL sklearn"
  " tensorboardX tqdm"
)
print(*[name for name in NEEDED.split() if find_spec(name) is None])
PYTHON
)
[[ -z "$missing" ]] || fail 3 "packages: no $missing; carry them as wheels, see \
$here/prepare.sh"

# Data: unpacked once for a machine; a part that has come stays beside it.
if [[ -n "$smoke" ]]; then
  for name in cifar10 cifar100; do
    [[ -e "$carry/$name-1" ]] ||
      "$python" -m benchmarks.accelerator.pack_data pack "$name" --toy \
        --out="$carry"
  done
fi
mkdir -p "$scratch/parts"
for folder in "$carry"/cifar*-[0-9]; do
  [[ -d "$folder" ]] || continue
  rm -rf "$scratch/parts/$(basename "$folder")"
  cp -r "$folder" "$scratch/parts/"
done
for name in cifar10 cifar100; do
  parts=("$scratch/parts/$name"-[0-9])
  [[ -d "${parts[0]}" && ! -e "$scratch/$name.npz" ]] || continue
  if [[ ${#parts[@]} -lt $(sed -n 's/.*"parts": *\([0-9]*\).*/\1/p' \
    "${parts[0]}/manifest.json" | head -1) ]]; then
    echo "$name: ${#parts[@]} part so far"
    continue
  fi
  "$python" -m benchmarks.accelerator.pack_data unpack "$name" \
    --carry="$scratch/parts" --out="$scratch/$name.npz" |
    tee "$scratch/$name.sha256" || fail 4 "data: $name is damaged"
done
[[ "$entry" == keep ]] && exit

data=$("$python" -c "
from benchmarks.accelerator.entries import ENTRIES
print(ENTRIES['$entry'].data)")
flags=()
if [[ -n "$data" ]]; then
  [[ -e "$scratch/$data.npz" ]] ||
    fail 4 "data: no $scratch/$data.npz; carry all parts of $data"
  flags+=("--data=$scratch/$data.npz")
  flags+=("--data_sha256=$(sed 's/.* //' "$scratch/$data.sha256")")
fi
flags+=("--reference=$reference")
[[ -n "$smoke" ]] && flags+=(--dry) || true
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$stays/cache}

# The steps' time: what is left, less what saving and collecting may take.
left=$((seconds - ($(date +%s) - began) - 45))
exec "$python" -m benchmarks.accelerator.drive "$entry" --scratch="$scratch" \
  --out="$out" --seconds="$left" "${flags[@]}"
