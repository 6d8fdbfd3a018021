# shellcheck shell=bash
# Sourced by the scripts here: takes --dry-run out of the arguments, wherever it stands among them, and sets `dry` then.
dry=''
for argument; do
  shift
  # shellcheck disable=SC2034 # the script that sources this reads it
  if [[ $argument == --dry-run ]]; then dry=1; else set -- "$@" "$argument"; fi
done
