#!/usr/bin/env bash
# Opens TensorBoard on a study, or on all of them: curves of every run and of cells over their seeds (groups/), HPARAMS,
# configs and the report's figures.
#
#   launch/tensorboard.sh [runs/<study>] [ARGUMENTS of tensorboard]
#
# PORT=6006 sets the port, PYTHON the interpreter (default: .venv/bin/python).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
directory=${1:-$root/runs}
[[ -d $directory ]] || { echo "launch/tensorboard.sh: there is no directory $directory; give a study's, such as runs/rope_ablation" >&2; exit 2; }
python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null || { echo "launch/tensorboard.sh: there is no $python: run 'make setup' first, or set PYTHON" >&2; exit 2; }
exec "$python" -m tensorboard.main --logdir "$directory" --port "${PORT:-6006}" "${@:2}"
