#!/usr/bin/env bash
# Runs a study on a slice of a Cloud TPU pod: gcloud makes the slice and starts the same command on all its workers.
#
#   launch/tpu_pod.sh [--dry-run] create NAME [FLAGS of gcloud compute tpus tpu-vm create]
#   launch/tpu_pod.sh [--dry-run] queue NAME [FLAGS of gcloud compute tpus queued-resources create, such as --spot]
#   launch/tpu_pod.sh [--dry-run] run NAME ARGUMENTS of python -m lab.main
#   launch/tpu_pod.sh [--dry-run] fetch NAME [STUDY]
#   launch/tpu_pod.sh [--dry-run] delete NAME
#   launch/tpu_pod.sh run slice --config=configs/architecture_ablation.py:gpu
#
# --dry-run prints the commands. ZONE names the zone, TYPE the slice (default: v5litepod-16), VERSION its software. What
# is committed here is copied to every worker. Workers of several hosts need one directory of results: SHARED=HOST:/PATH
# names an NFS share, which is mounted on runs/. A run that was cut off goes on by the same command.
set -euo pipefail
usage() {
  echo "launch/tpu_pod.sh: $1; usage: launch/tpu_pod.sh [--dry-run] create|queue|run|fetch|delete NAME ..." >&2
  exit 2
}
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/dry_run.sh"
do_or_say() {
  if [[ $dry ]]; then printf '%q ' "$@" && echo; else "$@"; fi
}
action=${1:-} name=${2:-}
[[ $action =~ ^(create|queue|run|fetch|delete)$ ]] || usage "there is no '$action'"
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || usage "'$name' is no name of a slice, such as slice-1"
[[ ${ZONE:-} ]] || usage "set ZONE, such as ZONE=us-west4-a"
shift 2
cd "$(dirname "$0")/.."
type=${TYPE:-v5litepod-16} version=${VERSION:-v2-alpha-tpuv5-lite}
vm=(gcloud compute tpus tpu-vm) queued=(gcloud compute tpus queued-resources)

case $action in
  create)
    do_or_say "${vm[@]}" create "$name" --zone="$ZONE" --accelerator-type="$type" --version="$version" "$@"
    ;;
  queue)
    do_or_say "${queued[@]}" create "$name" --node-id="$name" --zone="$ZONE" --accelerator-type="$type" \
      --runtime-version="$version" "$@"
    ;;
  run)
    (($#)) || usage "the study's arguments are missing"
    archive=lab-$name.tar.gz
    mount=
    if [[ ${SHARED:-} ]]; then
      # Lines of their own: behind && or || a command that fails would end nothing.
      mount="if ! mountpoint -q runs; then
sudo apt-get -qq install -y nfs-common
sudo mount -t nfs $(printf %q "$SHARED") runs
sudo chmod a+rwx runs
fi"
    fi
    do_or_say git archive --output="$archive" HEAD
    do_or_say "${vm[@]}" scp "$archive" "$name:" --zone="$ZONE" --worker=all
    do_or_say rm "$archive"
    # The images' own Python is too old for the lab.
    do_or_say "${vm[@]}" ssh "$name" --zone="$ZONE" --worker=all --command="set -e
mkdir -p lab/runs
tar -xzf $archive -C lab
cd lab
${mount:-:}
command -v python3.11 >/dev/null || sudo apt-get -qq install -y python3.11-venv
[[ -d .venv ]] || python3.11 -m venv .venv
.venv/bin/pip install -q -r requirements-tpu.txt
exec .venv/bin/python -m lab.main $(printf '%q ' "$@")"
    ;;
  fetch)
    do_or_say mkdir -p runs
    do_or_say "${vm[@]}" scp --recurse "$name:lab/runs/${1:-*}" runs --zone="$ZONE" --worker=0
    ;;
  delete)
    # Of a slice that was queued, the request goes with it.
    if [[ ! $dry ]] && "${queued[@]}" describe "$name" --zone="$ZONE" >/dev/null 2>&1; then
      "${queued[@]}" delete "$name" --zone="$ZONE" --force --quiet
    else
      do_or_say "${vm[@]}" delete "$name" --zone="$ZONE" --quiet
    fi
    ;;
esac
