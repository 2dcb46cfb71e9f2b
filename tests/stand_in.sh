#!/bin/bash
# Stands in for the programs of docs/launch.md, under the name by which it is called: it records its arguments for
# tests/test_launch.py, and runs here what the program would run elsewhere. BOX is the test's folder, PYTHON a real Python.
name=${0##*/}
{ printf '%s\0' "$name" "$@"; printf '\1\0'; } >> "$BOX/calls"
last=${!#}

case $name in
  gcloud)
    for arg; do
      case $arg in
        --worker=all) workers="0 1" ;;
        --worker=*) workers=${arg#*=} ;;
        --command=*) command=${arg#*=} ;;
      esac
    done
    [[ -v command ]] || exit 0
    for worker in $workers; do
      (cd "$BOX/worker$worker" && HOME=$PWD bash -c "$command") || exit
    done
    ;;
  ssh)
    [[ $1 = -N ]] || (cd ~ && bash -c "$last")
    ;;
  tmux)
    if [[ -v DETACH ]]; then
      sh -c "$last" < /dev/null &> /dev/null &
    else
      sh -c "$last"
    fi
    ;;
  git) # clone URL FOLDER
    mkdir "$last" && ln -s "$HOME"/../home/mutransformer/* "$last"
    ;;
  sbatch)
    while [[ $1 = --* ]]; do
      [[ $1 = --export=ALL,* ]] && export "${1#--export=ALL,}"
      shift
    done
    SLURM_JOB_ID=77 bash "$@"
    ;;
  srun) # two tasks, or none with a given exit code; the step ends with the larger exit code
    [[ -v SRUN_CODE ]] && exit "$SRUN_CODE"
    while [[ $1 = --* ]]; do shift; done
    code=0
    for task in 0 1; do
      SLURM_PROCID=$task "$@" || code=$?
    done
    exit "$code"
    ;;
  xpk)
    for arg; do
      [[ $arg != --command=* ]] || bash -c "${arg#*=}"
    done
    ;;
  kubectl)
    [[ $1 != apply ]] || cat > "$BOX/applied.yaml"
    ;;
  mountpoint) exit 1 ;;
  mutransformer) ;; # test_commands_resolve reads its command lines
  python*)
    case "$1 $2" in
      "-m venv")
        mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && touch "$3/bin/activate"
        ;;
      "-m pip") ;;
      "-c "*) exec "$PYTHON" "$@" ;;
      --version*) exec "$PYTHON" --version ;;
      "- "*) # the check of tpu_vm_setup.sh
        if [[ -v CHECK ]]; then exec "$PYTHON" "$@"; else cat > /dev/null; fi
        ;;
      *scripts/train.py*)
        if [[ -v MORE ]]; then # a real run, with the test's settings
          readarray -t more < "$MORE"
          exec "$PYTHON" "$@" "${more[@]}"
        fi
        "$PYTHON" "$@" --print-config > "$BOX/printed.$$" && mv "$BOX/printed.$$" "$BOX/config.$$"
        ;;
      *) echo "stand-in: python $*" >&2; exit 9 ;;
    esac
    ;;
esac
