#!/usr/bin/env bash
# Everything about PREFINE that is more than one command.
#
#   bash run_all.sh setup              make .venv (PYTHON=3.10 or PYTHON=/path/to/python picks one)
#   bash run_all.sh demo [FLAG ...]    the whole method on BallCircle; flags go to prefine.py
#   bash run_all.sh test [FLAG ...]    the tests; flags go to pytest
#   bash run_all.sh bench [FLAG]       the speed figures; --quick, or --osrl: beside OSRL
#   bash run_all.sh [-j N]             every experiment of the README's tables, N at a time
#   bash run_all.sh --slurm [FLAG ...] the same as one Slurm job array; flags go to sbatch
#   bash run_all.sh summary [FOLDER]   those tables, from FOLDER/*/metrics.json (default: runs)
#   bash run_all.sh picture RUN PNG    the README's picture, of a run folder of BallCircle
#
# Every verb sets up on first use. What is done already is not done again. TASKS="OfflineBallRun"
# SEEDS="0 1" METHODS="prefine dpo" before a command choose some of the experiments.

set -euo pipefail
folder=$(dirname -- "${BASH_SOURCE[0]}")
if [ -e "$folder/prefine.py" ]; then # Slurm runs a copy of this file, in the folder of submission
  CDPATH='' cd -- "$folder"
fi

read -ra TASKS <<<"${TASKS:-OfflineBallCircle OfflineBallRun OfflineHalfCheetahVelocity OfflineCarButton1 OfflinePointGoal1}"
read -ra METHODS <<<"${METHODS:-prefine bc-safe dpo cpl no-preferred no-dispreferred no-imitation no-return-weight}"
read -ra SEEDS <<<"${SEEDS:-0 1 2 3 4}"
export HALFCHEETAH=${HALFCHEETAH:-../shared/data/halfcheetah_velocity_sac.hdf5}

say() { echo "run_all.sh: $*" >&2; }
fail() { say "$*" && exit 2; }
unknown() {
  fail "no verb or option '$1'; there are setup, demo, test, bench, summary, picture, and -j N or --slurm with no verb."
}

# ------------------------------------------------------------------------------------------- setup

# The one list of dependencies is the inline metadata (PEP 723) at the top of prefine.py.
metadata() { sed -n '/^# \/\/\/ script$/,/^# \/\/\/$/p' prefine.py; }

# The stamp is written last, so a half-made .venv has none and is made anew.
is_set_up() {
  local crc size python
  [ -f .venv/stamp ] && .venv/bin/python -c '' 2>/dev/null || return 1
  read -r crc size python <.venv/stamp || return 1
  [ "$crc $size" = "$(metadata | cksum)" ] && [ "${PYTHON:-$python}" = "$python" ]
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
  local tools log
  find_uv
  find_python
  # Where pip is told of a folder of wheels, uv must know it too, or it takes torch's CUDA build.
  if [ -n "${PIP_FIND_LINKS:-}" ]; then
    export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS// /,}}" # uv separates them by commas
  fi
  mapfile -t tools < <(metadata | sed -nE 's/^# (extras|develop) = \[(.*)\].*/\2/p' |
    grep -oE '[^", ]+')
  say "making .venv with $FOUND; packages that uv has not cached are downloaded"
  rm -rf .venv
  "$UV" venv -q --python "$FOUND" .venv || fail "uv could not make .venv, see above."
  "$UV" pip install --python .venv/bin/python -r prefine.py "${tools[@]}" ||
    fail "$("$UV" --version) could not install the packages, see above; run it again to go on."
  log=$(.venv/bin/python - 2>&1 <<'PYTHON'
from prefine import import_simulators

for name in ("OfflineBallCircle-v0", "OfflineCarButton1Gymnasium-v0"):
    env = import_simulators().make(name)
    env.reset(seed=0)
    env.step(env.action_space.sample())
PYTHON
  ) || fail "the simulators do not run, so .venv is not ready: $log"
  echo "$(metadata | cksum) $REQUEST" >.venv/stamp
  say "set up with $(.venv/bin/python --version); both simulators step"
}

setup() {
  [ -n "$(metadata)" ] || fail "prefine.py has no '# /// script' block, which lists its packages."
  is_set_up || (
    # Two setups at a time would delete each other's work. macOS has no flock.
    if command -v flock >/dev/null; then
      flock -n 9 || { say "waiting for another setup to end" && flock 9; }
    fi
    is_set_up || make_venv
  ) 9>.setup.lock
}

# ------------------------------------------------------------------------------------- experiments

# One experiment: TASK METHOD SEED.
experiment() {
  local name="$1__$2__$3" dataset=scripted
  if [ "$1" = OfflineHalfCheetahVelocity ]; then dataset=$HALFCHEETAH; fi
  echo "$name"
  OMP_NUM_THREADS=1 .venv/bin/python prefine.py --env "$1" --method "$2" --seed "$3" \
    --dataset "$dataset" --workers "$WORKERS" --run-dir "runs/$name" >"runs/logs/$name.log" 2>&1
}

# Prints TASK METHOD SEED for each experiment that has no result yet.
missing() {
  local task seed method
  for seed in "${SEEDS[@]}"; do
    for task in "${TASKS[@]}"; do
      for method in "${METHODS[@]}"; do
        [ -e "runs/${task}__${method}__$seed/metrics.json" ] || echo "$task $method $seed"
      done
    done
  done
}

check_jobs() {
  [[ $1 =~ ^[1-9][0-9]*$ ]] || fail "-j takes a number of processes, as in -j 4; found '$1'."
}

experiments() {
  local jobs=1 failed
  while [ $# -gt 0 ]; do
    case $1 in
      --slurm) jobs=0 && shift && break ;; # what follows is for sbatch
      -j) jobs=${2:-} && shift $(($# > 1 ? 2 : 1)) && check_jobs "$jobs" ;;
      -j*) jobs=${1#-j} && shift && check_jobs "$jobs" ;;
      *) unknown "$1" ;;
    esac
  done
  setup
  if [[ ! -e $HALFCHEETAH && " ${TASKS[*]} " = *" OfflineHalfCheetahVelocity "* ]]; then
    say "OfflineHalfCheetahVelocity is skipped: no file $HALFCHEETAH (HALFCHEETAH=FILE names one)"
    read -ra TASKS <<<"${TASKS[*]/OfflineHalfCheetahVelocity/}"
  fi
  mkdir -p runs/logs
  if [ "$jobs" = 0 ]; then
    submit "$@"
    return
  fi
  export WORKERS=$((($(getconf _NPROCESSORS_ONLN) + jobs - 1) / jobs)) # -j N share the processors
  export -f experiment
  # shellcheck disable=SC2016  # the inner bash expands $@; one that fails does not stop the others
  missing | xargs -r -P "$jobs" -n 3 bash -c 'experiment "$@" || echo "$* failed"' experiment
  failed=$(missing | sed -E 's|(.*) (.*) (.*)|  runs/logs/\1__\2__\3.log|')
  if [ -n "$failed" ]; then
    say "these experiments failed; the same command tries them again. Their logs:"
    echo "$failed" >&2
    exit 1
  fi
  summary runs
}

# One job array, a task per experiment that has no result yet, and a job after it for the summary.
submit() {
  local tasks array
  command -v sbatch >/dev/null || fail "--slurm needs sbatch in PATH; -j N runs here, without it."
  tasks=$(mktemp runs/logs/tasks.XXXXXX)
  missing >"$tasks"
  if [ ! -s "$tasks" ]; then
    rm "$tasks"
    say "every experiment has its result; bash run_all.sh summary prints the tables."
    return
  fi
  array=$(sbatch --parsable --job-name=prefine --array="1-$(wc -l <"$tasks")" --cpus-per-task=2 \
    --output=runs/logs/slurm-%A_%a.log "$@" run_all.sh task "$tasks") ||
    fail "sbatch refused the job array, see above; flags after --slurm go to sbatch."
  sbatch --parsable --job-name=prefine-summary --dependency="afterany:$array" \
    --output=runs/summary.md "$@" run_all.sh summary >/dev/null ||
    fail "sbatch refused the summary, see above; the array $array has been submitted."
  say "job array $array has $(wc -l <"$tasks") tasks; logs in runs/logs, tables in runs/summary.md." \
    "When it has ended, the same command submits again what is missing."
}

# What a task of the array does: the experiment of its line in the file.
task() {
  local experiment
  read -ra experiment < <(sed -n "${SLURM_ARRAY_TASK_ID:?set by Slurm}p" "$1")
  WORKERS=${SLURM_CPUS_PER_TASK:-2} experiment "${experiment[@]}"
}

summary() {
  .venv/bin/python - "$@" <<'PYTHON'
import csv
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import stats

FIELDS = ["normalized_return", "normalized_cost"]  # with intervals and tests
MEANS = ["return_mean", "cost_mean", "violation_rate", "failure_rate"]


def interval(values):
    """95 % bootstrap interval of the mean over seeds; one seed has none."""
    if len(values) < 2:
        return np.nan, np.nan
    test = stats.bootstrap((values,), np.mean, method="percentile", random_state=0)
    return test.confidence_interval


def paired_test(differences):
    """Mean, and exact two-sided permutation p: each sign could as well have been the other."""
    if not len(differences):
        return np.nan, np.nan
    if len(differences) == 1:
        return differences[0], 1.0
    test = stats.permutation_test((differences,), np.mean, permutation_type="samples")
    return test.statistic, test.pvalue


folder = Path(sys.argv[1])
rows = defaultdict(dict)  # (task, method) -> {seed: scores}
for path in sorted(folder.glob("*/metrics.json"), key=lambda p: (p.parent.name.count("__"), p)):
    try:
        run = json.loads(path.read_text())
        task = run["env"].split("-")[0].removesuffix("Gymnasium")
        task += f" ({Path(run['dataset']).name}, limit {run['cost_limit']:g})"
        parts = {run["method"]: run["finetuned"]}
        if run["method"] == "prefine":
            parts["pretrained"] = run["pretrained"]
        for method, part in parts.items():
            scores = np.array([part[field] for field in FIELDS + MEANS], float)
            if rows[task, method].setdefault(int(run["seed"]), scores) is not scores:
                print(f"{path} is left out: {method} has this seed already", file=sys.stderr)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"run_all.sh: {path} is no result of prefine.py: {error!r}", file=sys.stderr)
        sys.exit(2)
if not rows:
    print(f"run_all.sh: no {folder}/*/metrics.json; bash run_all.sh makes them", file=sys.stderr)
    sys.exit(2)

print(
    "| task | method | seeds | normalized return | normalized cost | return | cost | violations "
    "| failures | PREFINE minus it: return | cost |"
)
print("| --- | --- " + "| ---: " * 9 + "|")
table = []
first = ["prefine", "pretrained"]
for task, method in sorted(rows, key=lambda row: (row[0], row[1] not in first, row[1])):
    seeds = rows[task, method]
    values = np.array(list(seeds.values()))
    row = dict(task=task, method=method, seeds=len(seeds))
    row.update(zip(FIELDS + MEANS, values.mean(0)))
    ours = rows.get((task, "prefine"), {}) if method != "prefine" else {}
    paired = [ours[seed] - seeds[seed] for seed in seeds if seed in ours]
    paired = np.reshape(paired, (-1, len(FIELDS + MEANS)))
    for i, field in enumerate(FIELDS):
        row[field + "_low"], row[field + "_high"] = interval(values[:, i])
        row[field + "_difference"], row[field + "_p"] = paired_test(paired[:, i])
    cells = "| {task} | {method} | {seeds} "
    for field in FIELDS:
        cells += f"| {{{field}:.2f}} [{{{field}_low:.2f}}, {{{field}_high:.2f}}] "
    cells += "| {return_mean:.1f} | {cost_mean:.1f} | {violation_rate:.0%} | {failure_rate:.0%} "
    for field in FIELDS:
        cells += f"| {{{field}_difference:+.2f}} (p = {{{field}_p:.3f}}) "
    print(cells.format(**row).replace(" [nan, nan]", "").replace("+nan (p = nan)", "–") + "|")
    table.append(row)
print(
    "\nMean over seeds [95 % bootstrap interval]. p: exact two-sided paired sign-flip test\n"
    "on the common seeds; n seeds cannot give a p under 2 / 2^n."
)

with open(folder / "summary.csv", "w", newline="") as file:
    writer = csv.DictWriter(file, table[0])
    writer.writeheader()
    writer.writerows(table)
PYTHON
}

picture() {
  .venv/bin/python - "$@" <<'PYTHON'
import functools
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import prefine

run, out = Path(sys.argv[1]), sys.argv[2]
config = json.loads((run / "config.json").read_text())
args = prefine.parse_args(["--env", config["env"], "--dataset", config["dataset"]])
args.scripted_episodes, limit = config["scripted_episodes"], config["cost_limit"]
env = prefine.import_simulators().make(args.env)
data = prefine.load_dataset(prefine.find_dataset(args, env), env)
chosen = prefine.draw_preferences(
    data.sums(data.costs), limit, config["preferred"], config["dispreferred"], config["seed"]
)
figure, (plane, paths) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
costs, returns = data.sums(data.costs), data.sums(data.rewards)
plane.scatter(costs, returns, s=8, c="0.75", label="data set")
plane.scatter(*(x[chosen["dispreferred"]] for x in (costs, returns)), s=14, c="#D55E00", marker="x",
              label="dispreferred")
plane.scatter(*(x[chosen["preferred"]] for x in (costs, returns)), s=14, c="#0072B2", label="preferred")
for name, title, colour in (("pretrained", "before", "#D55E00"), ("finetuned", "after", "#0072B2")):
    actor = functools.partial(prefine.policy_actor, prefine.load_policy(run / f"{name}.pt"), False)
    for i in range(4):
        episode = prefine.run_episode(args.env, actor, 10**6 + i)
        x, y = 10 * episode["observations"][:, 0], 10 * episode["observations"][:, 1]
        paths.plot(x, y, c=colour, lw=1, label=f"{title} fine-tuning" if i == 0 else None)
        plane.scatter(episode["costs"].sum(), episode["rewards"].sum(), s=70, c=colour, marker="*",
                      edgecolors="k", lw=0.6, zorder=3,
                      label=f"{title} fine-tuning" if i == 0 else None)
plane.axvline(limit, c="k", ls="--", lw=1)
plane.text(limit + 1, plane.get_ylim()[0] + 15, f"cost limit {limit:g}", fontsize=8)
plane.set(xlabel="cost return", ylabel="return", title="Episodes")
for low, high in ((-12, -6), (6, 12)):
    paths.axvspan(low, high, color="0.9", lw=0)
paths.text(-11.5, 8.3, "unsafe", fontsize=8)
paths.set(xlabel="x (m)", ylabel="y (m)", xlim=(-12, 12), ylim=(-9, 9), aspect="equal",
          title="Paths of the deterministic policy, from above")
plane.legend(fontsize=8)
paths.legend(fontsize=8, loc="lower right")
figure.suptitle(f"{config['env']}, {config['dataset']} data, seed {config['seed']}", fontsize=10)
figure.savefig(out, dpi=130)
PYTHON
}

# -------------------------------------------------------------------------------------------- verbs

case ${1:-} in
  setup) setup ;;
  demo)
    setup
    exec .venv/bin/python prefine.py --env OfflineBallCircle --dataset scripted "${@:2}"
    ;;
  test) setup; exec .venv/bin/python -m pytest -q test_prefine.py "${@:2}" ;;
  bench)
    setup
    if [ "${2:-}" = --osrl ] && [ ! -d .osrl ]; then
      find_uv
      "$UV" pip install -q --no-deps --python .venv/bin/python --target .osrl osrl-lib==0.1.0 ||
        fail "uv could not install osrl-lib 0.1.0 into .osrl, see above."
    fi
    exec .venv/bin/python test_prefine.py bench "${@:2}"
    ;;
  summary) setup; summary "${2:-runs}" ;;
  task) task "$2" ;; # for --slurm
  picture)
    [ $# -eq 3 ] || fail "picture takes a run folder of BallCircle and the name of a PNG file."
    setup; picture "$2" "$3"
    ;;
  -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' run_all.sh ;;
  '' | -*) experiments "$@" ;;
  *) unknown "$1" ;;
esac
