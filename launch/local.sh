#!/usr/bin/env bash
# Runs a study (python -m lab.main) as several processes of this machine, joined by JAX's own multi-process runtime.
#
#   launch/local.sh [--dry-run] PROCESSES [ARGUMENTS of python -m lab.main]
#   DEVICES=1 launch/local.sh 2 --config=configs/rope_ablation.py
#
# --dry-run prints the processes that it would start. They share the NVIDIA GPUs of this machine, unless JAX_PLATFORMS
# says cpu.
# DEVICES sets the CPU devices of each process (default: 2), PYTHON the interpreter (default: .venv/bin/python), PORT the
# coordinator's port. Ends with the exit code of the process that failed first; one that only tells of another (69, 134)
# gives way to the cause. The other processes are ended then.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/dry_run.sh"
if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  echo "launch/local.sh: the first argument is the number of processes, not '${1:-}'; usage: DEVICES=1 launch/local.sh 2 --config=configs/rope_ablation.py" >&2
  exit 2
fi
processes=$1
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
gpus=0
if [[ ${JAX_PLATFORMS:-cuda} =~ cuda|gpu ]]; then
  listed=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, || true)}
  gpus=$(tr -cd , <<<"${listed:+,$listed}" | wc -c)
fi
if ((gpus % processes)); then
  echo "launch/local.sh: $processes processes cannot share $gpus GPUs: give another number, or set JAX_PLATFORMS=cpu" >&2
  exit 2
fi
settings() { # of one process
  printf '%s\n' "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$1" "JAX_NUM_CPU_DEVICES=${DEVICES:-2}"
  ((!gpus)) || echo "JAX_LOCAL_DEVICE_IDS=$(seq -s, $((gpus * $1 / processes)) $((gpus * ($1 + 1) / processes - 1)))"
}
if [[ $dry ]]; then
  for ((process = 0; process < processes; process++)); do
    echo "JAX_COORDINATOR_ADDRESS=127.0.0.1:${PORT:-FREE_PORT} $(settings "$process" | paste -sd' ')$(printf ' %q' "$python" -m lab.main "$@") &"
  done
  exit
fi
command -v "$python" >/dev/null || { echo "launch/local.sh: there is no $python: run 'make setup' first, or set PYTHON" >&2; exit 2; }
port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}

LAB_PROGRESS=$(mktemp -d) # in which each process writes where it is, and its last words
export LAB_PROGRESS
killer=''
# shellcheck disable=SC2329 # at the end
cleared() {
  [[ -z $killer ]] || kill "$killer" 2>/dev/null || true
  rm -rf "$LAB_PROGRESS"
}
trap cleared EXIT
declare -A running=() # the number of each process by its pid
forward() { kill -TERM "${!running[@]}" 2>/dev/null || true; }
end_others() { # JAX keeps SIGTERM for itself, and a process that has lost another may wait for it in vain
  [[ -z $killer ]] || return 0
  forward
  (sleep "$1" && kill -KILL "${!running[@]}") >/dev/null 2>&1 &
  killer=$!
}
trap forward TERM INT
for ((process = 0; process < processes; process++)); do
  mapfile -t ours < <(settings "$process")
  env JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" "${ours[@]}" "$python" -m lab.main "$@" &
  running[$!]=$process
done

# The cause is the first that ended, but for those that tell of another: 69 says so, and 134 is the runtime's own abort.
code=0 cause='' since=0
while ((${#running[@]})); do
  status=0
  wait -n -p ended "${!running[@]}" || status=$?
  [[ -n ${ended:-} ]] || continue # a signal to this script interrupts wait
  process=${running[$ended]}
  unset "running[$ended]"
  ((status)) || continue
  if [[ -z $cause ]] || ((SECONDS - since < 4 && (code == 69 || code == 134) && status != 69 && status != 134)); then
    [[ $cause ]] || since=$SECONDS
    code=$status cause=$process
  fi
  if ((status == 75)); then end_others 120; else end_others 10; fi # 75: the others do so too, if they have all joined
done
if ((code != 0 && code != 75)); then
  said=$(cat "$LAB_PROGRESS/$cause" 2>/dev/null || true)
  ((code <= 128)) || said="killed by signal $((code - 128))${said:+; $said}"
  echo "launch/local.sh: process $cause ended with code $code${said:+: $said}" >&2
fi
exit "$code"
