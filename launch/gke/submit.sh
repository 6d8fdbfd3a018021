#!/usr/bin/env bash
# Runs a study on Kubernetes Engine as a JobSet (jobset.sigs.k8s.io): tpu.yaml or gpu.yaml, filled in.
#
#   launch/gke/submit.sh [--dry-run] tpu|gpu NAME ARGUMENTS of python -m lab.main
#   launch/gke/submit.sh gpu norms --config=configs/architecture_ablation.py:gpu
#
# --dry-run prints the manifest. IMAGE names the container: docker build -f launch/gke/Dockerfile . for GPUs, for TPUs
# with --build-arg REQUIREMENTS=requirements-tpu.txt besides. CLAIM names a volume claim that all hosts write
# (ReadWriteMany, such as Filestore), which becomes runs/. ACCELERATOR names the chip, HOSTS the
# number of hosts (for TPUs of each slice), CHIPS the chips of a host; for TPUs TOPOLOGY is that of a slice, and SLICES
# their number. A pod that is moved saves, ends with code 75, and all start again where they were.
set -euo pipefail
usage() {
  echo "launch/gke/submit.sh: $1; usage: IMAGE=... CLAIM=... launch/gke/submit.sh [--dry-run] tpu|gpu NAME --config=..." >&2
  exit 2
}
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/../dry_run.sh"
kind=${1:-}
NAME=${2:-}
case $kind in
  tpu) ACCELERATOR=${ACCELERATOR:-tpu-v5-lite-podslice} HOSTS=${HOSTS:-4} CHIPS=${CHIPS:-4} ;;
  gpu) ACCELERATOR=${ACCELERATOR:-nvidia-h100-80gb} HOSTS=${HOSTS:-2} CHIPS=${CHIPS:-8} ;;
  *) usage "'$kind' is neither tpu nor gpu" ;;
esac
[[ $NAME =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || usage "'$NAME' is no name of a JobSet, such as rope"
[[ ${IMAGE:-} && ${CLAIM:-} ]] || usage "set IMAGE and CLAIM"
(($# > 2)) || usage "the study's arguments are missing"
shift 2
TOPOLOGY=${TOPOLOGY:-4x4} SLICES=${SLICES:-1} ARGUMENTS=
for argument in "$@"; do
  argument=${argument//\\/\\\\}
  ARGUMENTS+=", \"${argument//\"/\\\"}\""
done
ARGUMENTS=${ARGUMENTS#, }

manifest=$(<"$(dirname "$0")/$kind.yaml")
for field in NAME IMAGE CLAIM ACCELERATOR HOSTS CHIPS TOPOLOGY SLICES ARGUMENTS; do
  manifest=${manifest//"<$field>"/"${!field}"}
done
if [[ $dry ]]; then
  printf '%s\n' "$manifest"
else
  kubectl apply -f - <<<"$manifest"
fi
