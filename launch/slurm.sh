#!/usr/bin/env bash
# Submits a study to Slurm: one program over all nodes of a job, or an array of N jobs that take every N-th cell each.
#
#   launch/slurm.sh [--dry-run] [OPTIONS of sbatch] -- ARGUMENTS of python -m lab.main
#   launch/slurm.sh --nodes=4 --gpus-per-node=8 --time=4:00:00 -- --config=configs/architecture_ablation.py:gpu
#   launch/slurm.sh --array=1-16 --gpus=1 --time=1:00:00 -- --config=configs/rope_ablation.py:gpu
#
# --dry-run prints what it would submit, PYTHON names the interpreter (default: .venv/bin/python). One task runs on each
# node and takes all its GPUs. Submit from nodes that share this directory, in which runs/ lies. A job that is preempted,
# or has two to three minutes left of its time, saves, ends with code 75 and is queued again, to go on where it was: so it
# needs --time=4 (minutes) or more, and one that has less is refused, here or, if its partition says so, where it starts.
set -euo pipefail
usage() {
  echo "launch/slurm.sh: $1; usage: launch/slurm.sh [--dry-run] --nodes=2 -- --config=configs/architecture_ablation.py:gpu" >&2
  exit 2
}
# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/dry_run.sh"
cells='' options=()
while (($#)) && [[ $1 != -- ]]; do
  case $1 in
    --config=*) usage "arguments of the study stand behind --, and $1 does not" ;;
    --array=*)
      [[ $1 =~ ^--array=1-([1-9][0-9]*)(%[0-9]+)?$ ]] || usage "cells are numbered from 1 on: --array=1-N or --array=1-N%AT_ONCE, not $1"
      # shellcheck disable=SC2016 # the job knows its number
      cells=' --cells=$SLURM_ARRAY_TASK_ID'"/${BASH_REMATCH[1]}"
      options+=("$1")
      ;;
    --time=*)
      [[ ! $1 =~ ^--time=(0+:)?0*[1-3](:0+)?$ ]] || usage "a job is stopped up to 3 minutes before its end: --time=4 or more, not $1"
      options+=("$1")
      ;;
    --array | --time | -t*) usage "write --array=1-N and --time=MINUTES, not $1" ;;
    -a | -a*) usage "write --array=1-N, not $1" ;;
    *) options+=("$1") ;;
  esac
  shift
done
(($# > 1)) || usage "the study's arguments are missing behind --"
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[[ $dry ]] || command -v "$python" >/dev/null || usage "there is no $python: run 'make setup' first, or set PYTHON"

# Tasks get SIGTERM before they are preempted or out of time; the shell waits for them. srun ends a step 60 s after the
# first task has ended, and not at once: where all stop together, one may still be writing the report. Of a job that
# failed, the words of each task come last, those of the one that was heard first for the last time at the end. Of a task
# that died, srun tells first, and of those that it ended then, later: the last line says which it was.
job=$(
  cat <<JOB
#!/usr/bin/env bash
#SBATCH --job-name=lab --ntasks-per-node=1 --requeue --open-mode=append --signal=TERM@120
trap : TERM
cd $(printf %q "$PWD")
limit=\$(squeue -h -o %l -j "\$SLURM_JOB_ID")
if [[ \$limit == [1-3]:?? ]]; then
  echo "lab: job \$SLURM_JOB_ID ended with code 2: it has \$limit minutes, and is stopped up to 3 before its end: --time=4 or more"
  exit 2
fi
[[ -z \${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=\$SLURM_CPUS_PER_TASK
export LAB_PROGRESS=\$PWD/runs/.job-\$SLURM_JOB_ID
mkdir -p "\$LAB_PROGRESS"
code=0 errors=\$(mktemp)
exec 3> >(trap '' TERM; exec tee "\$errors" >&2); tee=\$!
srun --kill-on-bad-exit=0 --wait=60 --gpu-bind=none$(printf ' %q' "$python" -m lab.main "$@")$cells 2>&3 || code=\$?
exec 3>&-; wait \$tee
died=\$(grep -m1 '^srun: error: .*: task' "\$errors"; rm "\$errors")
if ((code != 0 && code != 75)); then
  (cd "\$LAB_PROGRESS" && ls -t | while read -r task; do echo "lab: task \$task: \$(<"\$task")"; done)
fi
rm -rf "\$LAB_PROGRESS"
echo "lab: job \$SLURM_JOB_ID ended with code \$code\${died:+ (first: \${died#srun: error: })}"
if ((code == 75)); then scontrol requeue "\$SLURM_JOB_ID"; fi
exit \$code
JOB
)
if [[ $dry ]]; then
  printf '%s\n' "$(printf '%q ' sbatch "${options[@]}")<<'JOB'" "$job" JOB
else
  sbatch "${options[@]}" <<<"$job"
fi
