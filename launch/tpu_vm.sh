#!/usr/bin/env bash
# Trains on a Cloud TPU slice: creates it, installs, runs on all workers with
# the log streamed, fetches the results and deletes the slice. A spot slice that
# is preempted is created again, and the same command resumes.
#
#   launch/tpu_vm.sh --name=atat --zone=us-east5-a --type=v5p-16 --spot \
#     -- --config=configs/cifar10.py:atat,modern --workdir=gs://bucket/run
#
# What comes after -- goes to main.py. --dry_run prints every command instead.
# The working directory must be one that all workers see: a bucket, or a disk
# that is mounted everywhere. Needs the gcloud command, logged in.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: launch/tpu_vm.sh [options] -- ARGUMENTS OF main.py
  --name=NAME         name of the slice (atat)
  --zone=ZONE         zone (required)
  --type=TYPE         accelerator type (v5p-8)
  --version=VERSION   software of the VMs (v2-alpha-tpuv5)
  --spot              a spot slice, cheaper, which may be preempted
  --max_restarts=N    most slices created after a preemption (20)
  --fetch=DIRECTORY   local copy of the working directory (runs/NAME)
  --keep              do not delete the slice in the end
  --dry_run           print the commands, run none
EOF
}

die() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

name=atat zone='' type=v5p-8 version=v2-alpha-tpuv5 fetch=''
spot=() max_restarts=20 keep='' dry_run=''
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --spot) spot=(--spot) ;;
    --max_restarts=*) max_restarts=${1#*=} ;;
    --fetch=*) fetch=${1#*=} ;;
    --keep) keep=yes ;;
    --dry_run) dry_run=yes ;;
    --help) usage; exit 0 ;;
    --) shift; break ;;
    *) usage >&2; die "unknown option $1" ;;
  esac
  shift
done
[[ $zone ]] || die 'zone: missing; allowed: --zone=ZONE'
[[ $name =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
  die "name: $name; allowed: small letters, digits and -"
[[ $max_restarts =~ ^[0-9]+$ ]] ||
  die "max_restarts: $max_restarts; allowed: 0, 1, 2, ..."
(($#)) || die 'arguments of main.py are missing; they come after --'
workdir='' extras=tpu
for argument in "$@"; do
  [[ $argument == --workdir=* ]] && workdir=${argument#*=}
  # What reaches a bucket: of the run, its teacher or its data.
  [[ $argument == *=gs://* && $extras != *gcs* ]] && extras+=,gcs
  [[ $argument == *=s3://* && $extras != *s3* ]] && extras+=,s3
done
[[ $workdir ]] || die 'workdir: missing; allowed: --workdir=gs://... after --'
fetch=${fetch:-runs/$name}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tpu=(gcloud compute tpus tpu-vm)

# Runs a command, or prints it.
run() {
  if [[ $dry_run ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# Runs a command line, written on several, on all workers; streams its output.
on_workers() {
  run "${tpu[@]}" ssh "$name" --zone="$zone" --worker=all \
    --command="${1//$'\n'/}"
}

create() {
  run "${tpu[@]}" create "$name" --zone="$zone" --accelerator-type="$type" \
    --version="$version" "${spot[@]}"
}

delete() {
  run "${tpu[@]}" delete "$name" --zone="$zone" --quiet
}

install() {
  local archive=atat_jax.tar.gz
  run tar -czf "$root/$archive" -C "$root" --exclude=.git --exclude=runs \
    atat_jax configs launch main.py pyproject.toml setup.py README.md LICENSE
  run "${tpu[@]}" scp "$root/$archive" "$name:$archive" --zone="$zone" \
    --worker=all
  on_workers "mkdir -p atat_jax && tar -xzf $archive -C atat_jax &&
 python3 -m venv venv && venv/bin/pip install -q './atat_jax[$extras]'"
}

# Compiled programs stay on each worker's disk. The all-reduce of the gradient
# overlaps with the backward pass.
train() {
  local words
  words=$(printf '%q ' "$@")
  on_workers "cd atat_jax &&
 JAX_COMPILATION_CACHE_DIR=\$HOME/.cache/atat_jax/compiled
 LIBTPU_INIT_ARGS='--xla_tpu_enable_data_parallel_all_reduce_opt=true
 --xla_tpu_data_parallel_opt_different_sized_ops=true'
 ../venv/bin/python -u main.py --distributed --wait_seconds=300 ${words% }"
}

state() {
  "${tpu[@]}" describe "$name" --zone="$zone" --format='value(state)' \
    2>/dev/null || echo GONE
}

collect() {
  run mkdir -p "$fetch"
  if [[ $workdir == *://* ]]; then
    run gcloud storage cp --recursive "${workdir%/}/*" "$fetch"
  else
    run "${tpu[@]}" scp --recurse "$name:$workdir/*" "$fetch" --zone="$zone" \
      --worker=0
  fi
}

created=''
finish() {
  if [[ $created && ! $keep ]]; then delete; fi
}
trap finish EXIT

for ((attempt = 0; ; attempt++)); do
  create
  created=yes
  install
  status=0
  train "$@" || status=$?
  if ((status == 0)) || [[ $dry_run ]]; then break; fi
  now=$(state)
  printf 'tpu_vm: status %d, the slice is %s\n' "$status" "$now" >&2
  if [[ $now == READY ]] || ((attempt == max_restarts)); then exit "$status"; fi
  delete || true
  created=''
done
collect
