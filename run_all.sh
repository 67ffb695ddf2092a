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
#   bash run_all.sh sensitivity [-j N] what one thing changed at a time does, on the Ball tasks
#   bash run_all.sh front PNG          reward-cost fronts of the methods, from runs/
#   bash run_all.sh report RUN         draws the run folder's report.png again
#   bash run_all.sh check CSV FLAG ... which labels the others contradict; FLAGs say --env and --dataset
#
# Every verb sets up on first use. What is done already is not done again. TASKS="OfflineBallRun"
# SEEDS="0 1" METHODS="prefine dpo" before a command choose some of the experiments.

set -euo pipefail
folder=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# Slurm runs a copy of this file, in the folder of submission; names of runs count from any.
if [ -e "$folder/prefine.py" ] && [[ ! ${1:-} =~ ^(draw|report|check)$ ]]; then cd -- "$folder"; fi

read -ra TASKS <<<"${TASKS:-OfflineBallCircle OfflineBallRun OfflineHalfCheetahVelocity OfflineCarButton1 OfflinePointGoal1}"
read -ra METHODS <<<"${METHODS:-prefine bc-safe dpo cpl no-preferred no-dispreferred no-imitation no-return-weight all-dispreferred}"
read -ra SEEDS <<<"${SEEDS:-0 1 2 3 4}"
export HALFCHEETAH=${HALFCHEETAH:-../shared/data/halfcheetah_velocity_sac.hdf5}

say() { echo "run_all.sh: $*" >&2; }
fail() { say "$*" && exit 2; }
unknown() {
  fail "no verb or option '$1'; there are setup, demo, test, bench, summary, sensitivity, front, report, check, and -j N or --slurm with no verb."
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

# ------------------------------------------------------------------------------------- sensitivity

# STUDY VALUE FLAGS: one thing changed at a time.
settings() {
  local share n
  echo "default -"
  for n in 5 10 20 80; do echo "labels $n --preferred $n --dispreferred $n"; done
  for share in 0.1 0.2 0.3; do
    echo "wrong $share --preferences labels.csv"
    echo "smoothed $share --preferences labels.csv --smoothing $share"
    echo "unweighted $share --preferences labels.csv --return-weight 0"
  done
  for share in 0 0.1 0.2 0.3; do echo "checked $share --preferences labels.checked.csv"; done
  for n in 0.01 0.2 1 5; do echo "beta $n --beta $n"; done
  for n in 0 1 2 4 6; do echo "retention $n --return-weight $n"; done
  echo "counterfactual 4-current --counterfactuals 4"
  echo "counterfactual 1-reference --counterfactual reference"
  echo "counterfactual 4-reference --counterfactual reference --counterfactuals 4"
}

# One setting: TASK SEED STUDY VALUE FLAGS. Pre-training is that of the same seed of the tables.
setting() {
  local task=$1 seed=$2 share=$4 run="runs/sensitivity/$1__$3__$4__$2" flags=("${@:5}")
  [ ! -e "$run/metrics.json" ] || return 0
  echo "$run"
  mkdir -p "$run"
  if [ "${flags[0]:-}" = --preferences ]; then
    draw .venv/bin/python labels "$task" "$seed" "$share" "$run/labels.csv" >/dev/null || return 1
    if [ "${flags[1]}" = labels.checked.csv ]; then
      draw .venv/bin/python check "$run/labels.csv" --env "$task" --dataset scripted >"$run/check.log" || return 1
    fi
    flags[1]=$run/${flags[1]}
  fi
  OMP_NUM_THREADS=1 .venv/bin/python prefine.py --env "$task" --dataset scripted --seed "$seed" \
    --policy "runs/${task}__prefine__$seed/pretrained.pt" --workers "$WORKERS" --run-dir "$run" \
    --no-report "${flags[@]}" >"$run/log" 2>&1
}

# Prints TASK SEED STUDY VALUE FLAGS of every setting, on three seeds.
sweep() {
  local task seed line
  for seed in "${SEEDS[@]:0:3}"; do
    for task in OfflineBallCircle OfflineBallRun; do
      while read -r line; do echo "$task $seed $line"; done < <(settings)
    done
  done
}

sensitivity() {
  local jobs task seed settings
  case "${1:-}${2:-}" in
    '') jobs=1 ;;
    -j*) jobs="${1#-j}${2:-}" && check_jobs "$jobs" ;;
    *) unknown "$1" ;;
  esac
  for seed in "${SEEDS[@]:0:3}"; do
    for task in OfflineBallCircle OfflineBallRun; do
      [ -e "runs/${task}__prefine__$seed/finetuned.pt" ] ||
        fail "no runs/${task}__prefine__$seed/finetuned.pt: bash run_all.sh makes it."
    done
  done
  export WORKERS=$((($(getconf _NPROCESSORS_ONLN) + jobs - 1) / jobs))
  export -f setting draw
  # shellcheck disable=SC2016  # the inner bash expands $1 and $line
  sweep | xargs -P "$jobs" -I{} bash -c \
    'read -ra line <<<"$1"; setting "${line[@]}" || echo "$1 failed"' setting {}
  settings=$(sweep | wc -l)
  [ "$(find runs/sensitivity -name metrics.json | wc -l)" -ge "$settings" ] ||
    fail "not all of the $settings settings ended, see runs/sensitivity/*/log; the same command goes on."
  draw .venv/bin/python sensitivity runs/sensitivity
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

# What is drawn or written for people, with the Python that is named first: "results RUN FLAGS" and
# "export FOLDER FLAGS" for prefine.py, FLAGS in JSON; "report RUN"; "labels TASK SEED SHARE CSV
# [DATA]"; "sensitivity FOLDER"; "front PNG"; "check CSV FLAGS".
draw() {
  # Not "python -", whose workers would look for a file of that name.
  "$1" -c 'import sys; sys.path[0] = sys.argv.pop(1); exec(sys.stdin.read())' "$folder" "${@:2}" <<'PYTHON'
import argparse
import functools
import itertools
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from scipy.spatial.distance import jensenshannon

import prefine

try:
    from matplotlib.figure import Figure
except ImportError:
    Figure = None
COLOURS = dict(preferred="#0072B2", dispreferred="#D55E00", before="#E69F00", after="#009E73")
POLICIES = dict(before="pretrained.pt", after="finetuned.pt")


def save(figure, path):
    prefine.write(path, functools.partial(figure.savefig, format="png", dpi=100))
    print(f"wrote {path}")


def write_lines(path, lines):
    prefine.write(path, lambda file: file.write("\n".join([*lines, ""]).encode()))


def stop(sentence):
    print(f"run_all.sh: {sentence}", file=sys.stderr)
    sys.exit(2)


def load(config):
    """The arguments of a run, its data set, with costs where it has any, and its preferences."""
    args = prefine.parse_args(["--env", config["env"]])
    vars(args).update(config)
    env = prefine.import_simulators().make(args.env)
    path = prefine.find_dataset(args, env)
    try:
        dataset = prefine.load_dataset(path, env)
    except prefine.UserError:
        dataset = prefine.load_dataset(path, env, with_costs=False)  # all that labels need
    if args.preferences:
        with tempfile.NamedTemporaryFile("w") as file:  # the flags hold what the file held
            file.write(args.preferences)
            file.flush()
            preferences = prefine.read_preferences(file.name, len(dataset.ends))
    else:
        counts = args.preferred, args.dispreferred, args.seed
        costs = dataset.sums(dataset.costs)
        preferences = prefine.draw_preferences(costs, args.cost_limit, *counts)
    return args, dataset, preferences


def contradicted(dataset, preferences, beyond=0.25):
    """Labels that the others contradict, {episode: how far}: they are wrong, or were luck.

    Ridge regression predicts a label, 1 or -1, from the other labels (leave-one-out: Hastie et al.,
    Elements of Statistical Learning, eq. 7.64) by the ranks, among the labelled trajectories, of the
    means and standard deviations of a trajectory's observations and actions. A label is contradicted
    where its prediction has the other sign and is larger than ``beyond``. Those that are left are
    judged again without it (Wilson 1972). Neither returns nor costs are looked at.
    """
    episodes = np.concatenate([preferences[label] for label in prefine.LABELS])
    signs = np.repeat([1.0, -1.0], [len(preferences[label]) for label in prefine.LABELS])
    steps = [torch.cat([x[dataset.rows([e])] for x in dataset[:2]], 1) for e in episodes]
    moments = torch.stack([torch.cat(torch.std_mean(x, 0, correction=0)) for x in steps], 1)
    ranks = np.stack([np.sign(m[:, None] - m).mean(1) for m in moments.numpy()])  # [2 (O + A), n]
    kernel, kept, found = 1 + 3 * ranks.T @ ranks / len(ranks), np.arange(len(signs)), {}
    while True:
        y = signs[kept]  # the noise 1 + y mean(y) weighs both sides alike, however many they are
        inverse = np.linalg.inv(kernel[np.ix_(kept, kept)] + np.diag(1 + y * y.mean()))
        agreement = y * (y - inverse @ y / np.diag(inverse))
        out = agreement < -beyond
        if not out.any() or len(set(signs[kept[~out]])) < 2:  # a contrast needs both sides
            return found
        found |= dict(zip(episodes[kept[out]].tolist(), -agreement[out]))
        kept = kept[~out]


@torch.no_grad()
def margins(policy, reference, dataset, preferences):
    """Implicit margins, mean log-ratio per step in nats, {"set/contrast": array [pairs]}."""
    found, generator = {}, torch.Generator().manual_seed(0)
    for name, prefix in ("train", ""), ("heldout", "heldout_"):
        sets = [list(preferences.get(prefix + label, [])) for label in prefine.LABELS]
        if not min(map(len, sets)):
            continue
        values = []
        for episodes in sets:
            for e in episodes:
                rows = dataset.rows([e])
                rows = rows[torch.linspace(0, len(rows) - 1, 64).long()]
                observations, actions = dataset.observations[rows], dataset.actions[rows]
                noise = torch.randn((1, *actions.shape), generator=generator)
                now, before = policy(observations), reference(observations)
                ratios = prefine.log_ratios(now, before, actions, policy.low, policy.high, noise)
                values.append([ratio.mean().item() for ratio in ratios])
        (good, good_c), (bad, bad_c) = (x.T for x in np.split(np.array(values), [len(sets[0])]))
        pairs = good - good_c, bad_c - bad, np.ravel(good[:, None] - bad)
        found |= {f"{name}/{pair}": x for pair, x in zip(prefine.PAIRS, pairs)}
    return found


def measure(dataset, preferences, values):
    """How far apart the two sets are, and what was learnt of it: goes to metrics.json."""
    episodes = np.concatenate([preferences[label] for label in prefine.LABELS])
    states = [dataset.observations[dataset.rows([e])] for e in episodes]
    ones = torch.ones(len(preferences[prefine.LABELS[0]]))
    near = prefine.nearest_weights(states, ones) > 0
    data = {"near_share": near.float().mean().item(), "divergence_bits": None}
    data["contradicted"] = sorted(contradicted(dataset, preferences))
    if dataset.costs is not None:
        costs = dataset.sums(dataset.costs)
        parts = {label: costs[preferences[label]] for label in prefine.LABELS}
        edges = np.linspace(0, max(part.max() for part in parts.values()) or 1, 21)
        counts = {label: np.histogram(part, edges)[0] for label, part in parts.items()}
        # Jensen and Shannon's divergence is finite without overlap: 1 bit.
        data["divergence_bits"] = float(jensenshannon(*counts.values(), base=2) ** 2)
        data["cost_histograms"] = {"edges": edges.tolist()}
        data["cost_histograms"] |= {label: n.tolist() for label, n in counts.items()}
    percents = [5, 25, 50, 75, 95]
    data["margin_percentiles"] = {
        "percents": percents,
        "before": {name: [0.0] * len(percents) for name in values},  # the policy is its reference
        "after": {name: np.percentile(x, percents).tolist() for name, x in values.items()},
    }
    return data


def warn(data, values):
    """In words, where the contrast looks too weak to learn from."""
    doubtful, labels = len(data["contradicted"]), sum(data[label] for label in prefine.LABELS)
    if doubtful >= 0.1 * labels:
        print(f"warning: {doubtful} of {labels} labels are contradicted by the others: they are wrong,")
        print("  or were luck (metrics.json, data, contradicted). Look at them again, if a person gave")
        print("  them: bash run_all.sh check LABELS.csv names them, and writes the file without.")
    if data["divergence_bits"] is not None and data["divergence_bits"] < 0.2:
        print("warning: the costs of the preferred and the dispreferred set hardly differ")
        print(f"  ({data['divergence_bits']:.2f} of 1 bit): do the labels say what is safe?")
    pairs = values.get("heldout/preferred_dispreferred", np.ones(1))
    if (pairs > 0).mean() < 0.4:  # about one half is normal where w counts a few trajectories only
        print("warning: on held-out trajectories the policy ranks preferred above dispreferred in")
        print(f"  {(pairs > 0).mean():.0%} of the pairs, less than by chance: the contrast is too weak")
        print("  to learn from. More labels, or clearer ones, may help.")


def draw_paths(axes, env_id, episodes):
    """Draw (observations [T, O], colour) from above; False where they hold no position."""
    if not (task := re.fullmatch(r"Offline\w+(Circle|Run)-v0", env_id)):
        return False
    for observations, colour in episodes:
        axes.plot(*10 * observations[:, :2].T, color=colour, lw=0.8)  # they begin with x/10, y/10
    shade, border = (axes.axvspan, 6) if task[1] == "Circle" else (axes.axhspan, 2)
    axes.margins(0.08)
    low, high, low_y, high_y = axes.axis()
    if task[1] == "Circle":
        view = [min(low, -7), max(high, 7), low_y, high_y]
    else:
        view = [low, high, min(low_y, -2.6), max(high_y, 2.6)]
    for sign in (-1, 1):
        shade(sign * border, sign * 1000, color="0.88", lw=0)
    axes.axis(view)
    axes.set(xlabel="x (m)", ylabel="y (m)")
    return True


def write_events(run, metrics):
    """TensorBoard's event files, from the curves and the evaluation."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return print("no event files: pip install tensorboard.")
    for old in run.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(run) as writer:
        for name, update, value in scalars(run, metrics):
            writer.add_scalar(name, value, update)


def read(run):
    """The flags and the metrics of a run that has ended."""
    if not (run / "metrics.json").exists():
        stop(f"{run} has no metrics.json: name the folder of a run that has ended.")
    return [json.loads((run / name).read_text()) for name in ("config.json", "metrics.json")]


def curves(run):
    """Each value of the training curves: (its name, update, value)."""
    for stage in "pretrain", "finetune":
        for line in (run / f"{stage}.jsonl").read_text().splitlines():
            row = json.loads(line)
            update = row.pop("update")
            for name, value in row.items():
                kind, _, rest = name.partition("/")
                yield f"losses/{stage}/{rest}" if kind == "losses" else f"charts/{name}", update, value


def scalars(run, metrics):
    """The curves, and each number of the evaluation, before and after fine-tuning."""
    points = list(curves(run))
    for step, part in (0, "pretrained"), (points[-1][1] if points else 0, "finetuned"):
        for name, value in metrics[part].items():
            if not isinstance(value, list):
                points.append((f"eval/{name}", step, value))
    return points


def results(run, flags):
    """What prefine.py has drawn of a run that has ended, by its flags."""
    flags, code = json.loads(flags), 0
    missing = not (Path(run) / "report.png").exists()
    for verb, wanted in (report, missing), (film, flags["capture_video"]), (track, flags["track"]):
        try:
            if wanted:
                verb(run)
        except SystemExit as error:  # with a sentence; what else is wanted is not lost
            code = error.code
    sys.exit(code)


def track(run):
    """The run in Weights & Biases, as the curves and the evaluation say."""
    try:
        import wandb
    except ImportError:
        stop("--track: wandb is missing; pip install wandb, then the same command logs the run.")
    run = Path(run)
    config, metrics = read(run)
    steps = {}
    for name, update, value in scalars(run, metrics):
        steps.setdefault(update, {})[name] = value
    try:
        with wandb.init(project="prefine", name=run.name, config=config, dir=run) as log:
            for update in sorted(steps):
                log.log(steps[update], step=update)
    except wandb.errors.Error as error:
        stop(f"--track: {error} WANDB_MODE=offline needs no account.")


def evaluation_seeds(seed, episodes):
    """The seeds of the episodes, as in prefine.evaluate()."""
    return [(1000 * (seed + 1000) + i) % 2**32 for i in range(episodes)]


def evaluation_episodes(run, args, policies):
    """The episodes of the evaluation, before and after: what the run still has, else again."""
    policies = [policies["before"], policies["after"]]
    seeds = evaluation_seeds(args.seed, args.eval_episodes)
    actors = [functools.partial(prefine.policy_actor, p, args.eval_sample) for p in policies]
    jobs = [(actor, seed) for actor in actors for seed in seeds]
    kept = [run / "resume" / f"evaluate-{i}.npz" for i in range(len(jobs))]
    if kept[-1].exists():
        found = [prefine.run_episode(args.env, *job, path) for job, path in zip(jobs, kept)]
    else:
        found = prefine.run_episodes(args.env, jobs, os.cpu_count(), "evaluate")
    return {"before": found[: len(seeds)], "after": found[len(seeds) :]}


def report(run):
    run = Path(run)
    config, metrics = read(run)
    args, dataset, preferences = load(config)
    policies = {name: prefine.load_policy(run / file) for name, file in POLICIES.items()}
    values = margins(policies["after"], policies["before"], dataset, preferences)
    metrics["data"] |= measure(dataset, preferences, values)
    prefine.write_json(run / "metrics.json", metrics, indent=2)
    write_events(run, metrics)
    if args.finetune_updates:
        warn(metrics["data"], values)
    if Figure is None:
        return print("no report.png: pip install matplotlib.")

    episodes = evaluation_episodes(run, args, policies)
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    panels = figure.subplot_mosaic([["plane", "paths", "costs"], ["plane", "curves", "margins"]])
    plane, returns = panels["plane"], dataset.sums(dataset.rewards)
    if dataset.costs is None:
        panels["costs"].set(title="The data have no costs")
    else:
        costs = dataset.sums(dataset.costs)
        plane.scatter(costs, returns, s=8, color="0.8", label="data set")
        histograms, bits = (metrics["data"][k] for k in ("cost_histograms", "divergence_bits"))
        for label, marker in zip(prefine.LABELS, "ox"):
            chosen, style = preferences[label], dict(color=COLOURS[label], label=label)
            plane.scatter(costs[chosen], returns[chosen], s=20, marker=marker, **style)
            counts, edges = histograms[label], histograms["edges"]
            panels["costs"].stairs(counts, edges, fill=True, alpha=0.6, **style)
        title = f"Labelled episodes: {bits:.2f} of 1 bit apart"
        panels["costs"].set(title=title, xlabel="cost return", ylabel="episodes")
    for (name, part), marker in zip(episodes.items(), "sD"):
        sums = [[e[key].sum() for e in part] for key in ("costs", "rewards")]
        style = dict(color=COLOURS[name], edgecolors="k", linewidths=0.7, zorder=3)
        plane.scatter(*sums, s=40, marker=marker, label=f"policy, {name} fine-tuning", **style)
    plane.axvline(args.cost_limit, color="k", ls="--", lw=1, label=f"limit {args.cost_limit:g}")
    plane.set(title="Episodes", xlabel="cost return", ylabel="return")

    shown = [(e, COLOURS[name]) for name, part in episodes.items() for e in part[:5]]
    paths = panels["paths"]
    if draw_paths(paths, args.env, [(e["observations"], colour) for e, colour in shown]):
        speed = ", and speed too" * ("Run" in args.env)
        paths.set(title=f"Paths from above; grey is unsafe{speed}")
    else:
        for episode, colour in shown:
            paths.plot(episode["costs"].cumsum(), color=colour, lw=1)
        paths.set(title="Cost in the course of an episode", xlabel="step", ylabel="cost so far")
    for name in episodes:
        paths.plot([], color=COLOURS[name], label=f"{name} fine-tuning")

    held = "heldout" if any(name.startswith("heldout") for name in values) else "train"
    which = "held-out" if held == "heldout" else held
    after = [x for name, x in values.items() if name.startswith(held)]
    bins = np.histogram_bin_edges(np.concatenate(after), 30)
    curve = [json.loads(line) for line in (run / "finetune.jsonl").read_text().splitlines()]
    lines, updates = panels["curves"], [row["update"] for row in curve]
    accuracy = lines.twinx()
    for i, pair in enumerate(prefine.PAIRS):
        label, colour = pair.replace("_", " > "), ("#56B4E9", "#CC79A7", "#8C6D31")[i]
        for axes, kind, line in (lines, "margin", "-"), (accuracy, "accuracy", ":"):
            values_now = [row[f"{kind}/{held}/{pair}"] for row in curve]
            axes.plot(updates, values_now, line, c=colour, marker=".", ms=3)
        lines.plot([], c=colour, label=label)
        x = values[f"{held}/{pair}"]
        style = dict(histtype="step", lw=1.8, color=colour, label=label)
        panels["margins"].hist(x, bins, weights=np.full(len(x), 1 / len(x)), **style)
    lines.plot(updates, [row[f"kl/{held}"] for row in curve], "k--", label="KL to the reference")
    lines.set(title=f"Fine-tuning, {which} labels", xlabel="update")
    lines.set(ylabel="margin, KL (nats per step)")
    accuracy.set(ylabel="preference accuracy (dotted)", ylim=(0, 1.05))
    panels["margins"].axvline(0, color="k", ls="--", lw=1, label="before: all 0")
    title = f"Implicit margins after, {which} labels"
    panels["margins"].set(title=title, xlabel="nats per step", ylabel="share")
    for axes in panels.values():
        if axes.get_legend_handles_labels()[0]:
            below = dict(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
            axes.legend(fontsize=7, framealpha=0.6, **(below if axes is lines else {}))
    task = args.env.split("-")[0].removesuffix("Gymnasium")
    data = Path(args.dataset).name
    figure.suptitle(f"{task}, {data} data, {args.method}, seed {args.seed}")
    save(figure, run / "report.png")


def contact_sheet(env_id, data, chosen, returns):
    """A panel per episode: its path, coloured by speed, or its observations over time."""
    rows = -(-len(chosen) // 5)
    figure = Figure(figsize=(14, 2.6 * rows), layout="constrained")
    panels, views = figure.subplots(rows, 5, squeeze=False).ravel(), []
    seen = [data.observations[data.rows([e])].numpy() for e in chosen]
    speeds = [np.hypot(*np.diff(10 * x[:, :2], axis=0, append=np.nan).T) for x in seen]
    scale, fastest = data.observations.std(0).numpy() + 1e-6, np.nanmax(np.concatenate(speeds))
    for axes, e, observations, speed in zip(panels, chosen, seen, speeds):
        if draw_paths(axes, env_id, [(observations, "0.6")]):
            style = dict(c=speed, s=5, cmap="viridis", vmin=0, vmax=fastest, zorder=3)
            views.append(axes.axis())
            drawn, label = axes.scatter(*10 * observations[:, :2].T, **style), "m per step"
        else:
            style = dict(aspect="auto", vmin=-2, vmax=2, cmap="cividis")
            drawn, label = axes.imshow((observations / scale).T, **style), "in standard deviations"
            axes.set(xlabel="step", ylabel="observation")
        axes.set_title(f"episode {e}, return {returns[e]:.4g}", fontsize=9)
    for axes in panels[: len(views)]:  # on one scale
        low, high = np.min(views, 0), np.max(views, 0)
        axes.axis([low[0], high[1], low[2], high[3]])
    for axes in panels[len(chosen) :]:
        axes.axis("off")
    figure.colorbar(drawn, ax=panels.tolist(), label=label)
    return figure


def export(folder, flags):
    """What a person needs to label episodes: labels.csv to fill in, and episodes.png."""
    folder, args = Path(folder), argparse.Namespace(**json.loads(flags))
    for name, why in ("labels.csv", "may hold somebody's work"), ("config.json", "is of a run"):
        if (folder / name).exists():
            stop(f"{folder}/{name} exists, and {why}: name another folder with --run-dir.")
    env = prefine.import_simulators().make(args.env)
    data = prefine.load_dataset(prefine.find_dataset(args, env), env, with_costs=False)
    if args.export_episodes > len(data.ends):
        stop(f"--export-episodes {args.export_episodes}: the data have {len(data.ends)} episodes.")
    chosen = np.random.default_rng(args.seed).permutation(len(data.ends))[: args.export_episodes]
    returns, lines = data.sums(data.rewards), ["episode,label,length,return"]
    for e in sorted(chosen):
        lines.append(f"{e},,{data.ends[e] - data.starts[e]},{returns[e]:.4g}")
    if Figure is None:
        print("no episodes.png: pip install matplotlib.")
    else:
        save(contact_sheet(args.env, data, sorted(chosen), returns), folder / "episodes.png")
    write_lines(folder / "labels.csv", lines)
    print(f"wrote {folder}/labels.csv: write preferred or dispreferred into its column 'label',")
    print("delete the lines that you leave open, and pass the file with --preferences.")


def check(path, *flags):
    """Prints the labels of a CSV file that the others contradict, and writes the file without."""
    args, path = prefine.parse_args([*flags, "--preferences", path]), Path(path)
    args.env = prefine.resolve_env(args.env)
    env = prefine.import_simulators().make(args.env)
    data = prefine.load_dataset(prefine.find_dataset(args, env), env, with_costs=False)
    preferences = prefine.read_preferences(path, len(data.ends))
    found, lines = contradicted(data, preferences), ["episode,label"]
    for label, other in zip(prefine.LABELS, prefine.LABELS[::-1]):
        lines += [f"{e},{label}" for e in preferences[label] if e not in found]
        for e in [e for e in preferences[label] if e in found]:
            print(f"episode {e}: {label}, and the other labels say {other}, by {found[e]:.2f}")
    checked = path.with_suffix(".checked.csv")
    write_lines(checked, lines)
    print(f"wrote {checked}, the {len(lines) - 1} labels that are not contradicted")


def film(run):
    """before.gif and after.gif."""
    os.environ.setdefault("MUJOCO_GL", "egl")  # rendering without a screen
    run = Path(run)
    config, _ = read(run)
    for name, file in POLICIES.items():
        try:
            save_film(prefine.load_policy(run / file), config, run / f"{name}.gif")
        except (AttributeError, ImportError, RuntimeError) as error:
            stop(f"no video: this machine cannot render without a screen ({error!r:.90}).")


def save_film(policy, config, path):
    """The first episode of the evaluation, every fourth step."""
    import imageio

    frames, simulators = [], []

    def make_actor(env, seed):
        act, inner = prefine.policy_actor(policy, config["eval_sample"], env, seed), env.unwrapped
        simulators.append(inner)
        steps, options = itertools.count(), {"mode": "rgb_array"}
        if hasattr(inner, "render_parameters"):  # of Safety-Gymnasium's goals and buttons
            inner.render_parameters.mode, options = "rgb_array", {}
            inner.render_parameters.camera_name = "fixedfar"
        elif "Gymnasium" in config["env"]:  # its velocity tasks
            inner.render_mode, options = "rgb_array", {}

        def act_on_camera(observation):
            if next(steps) % 4 == 0:
                frames.append(np.array(inner.render(**options), np.uint8))
            return act(observation)

        return act_on_camera

    prefine.run_episode(config["env"], make_actor, evaluation_seeds(config["seed"], 1)[0])
    if hasattr(simulators[0], "render_parameters"):
        simulators[0].task.viewer.free()  # it complains if it lives until Python ends
    style = dict(format="gif", duration=80, loop=0)
    prefine.write(path, functools.partial(imageio.mimsave, ims=frames, **style))
    print(f"wrote {path}, {len(frames)} frames")


def labels(task, seed, share, path, data="scripted"):
    """The labels that a run with this seed draws, a share of them on the wrong side."""
    config = vars(prefine.parse_args([])) | dict(env=prefine.resolve_env(task), dataset=data)
    limit = 20.0 if "Gymnasium" in config["env"] else 10.0
    _, _, drawn = load(config | dict(seed=int(seed), cost_limit=limit))
    rng, lines = np.random.default_rng(int(seed)), ["episode,label"]
    for label, other in zip(prefine.LABELS, prefine.LABELS[::-1]):
        episodes = drawn[label]
        wrong = set(rng.permutation(episodes)[: round(float(share) * len(episodes))])
        lines += [f"{e},{other if e in wrong else label}" for e in episodes]
    write_lines(Path(path), lines)


def boot(values):
    """Mean, and 95 % bootstrap interval over seeds."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    test = stats.bootstrap((values,), np.mean, method="percentile", random_state=0)
    return np.mean(values), *test.confidence_interval


STUDIES = {  # study: (axis, where the default stands)
    "labels": ("labels of each kind", "40"),
    "wrong": ("share of wrong labels", "0"),
    "beta": ("beta", "0.05"),
    "retention": ("return weight", "3"),
    "counterfactual": ("sampled actions per state, and their policy", "1-current"),
}


def sensitivity(folder):
    found = {}
    for path in sorted(Path(folder).glob("*/metrics.json")):
        task, study, value, _ = path.parent.name.split("__")
        part = json.loads(path.read_text())["finetuned"]
        scores = found.setdefault((task, study, value), {"return_mean": [], "cost_mean": []})
        for key, values in scores.items():
            values.append(part[key])
    tasks = sorted({task for task, _, _ in found})
    if not tasks or Figure is None:
        stop(f"{folder}/*/metrics.json and matplotlib are needed, one is missing.")
    for study, (axis, default) in STUDIES.items():
        names = {study: ("#0072B2", "o", "all else by default: mean and 95 % interval over seeds")}
        if study == "wrong":
            names["smoothed"] = "#D55E00", "s", "with label smoothing of that share"
            names["unweighted"] = "#009E73", "^", "with --return-weight 0"
            names["checked"] = "#CC79A7", "D", "without the labels that the others contradict"
        figure = Figure(figsize=(9, 5.5), layout="constrained")
        panels = figure.subplots(2, len(tasks), sharex=True, squeeze=False)
        for column, task in zip(panels.T, tasks):
            for axes, key in zip(column, ("return_mean", "cost_mean")):
                for shift, (name, (colour, marker, text)) in enumerate(names.items()):
                    rows = {v: s for (t, n, v), s in found.items() if (t, n) == (task, name)}
                    none = (task, "retention", "0") if name == "unweighted" else (task, "default", "-")
                    if default not in rows:
                        rows[default] = found[none]
                    order = sorted(rows, key=lambda v: (v.partition("-")[2], float(v.partition("-")[0])))
                    mean, low, high = np.array([boot(rows[v][key]) for v in order]).T
                    x = np.arange(len(order)) + 0.08 * shift
                    style = dict(fmt=f"{marker}-", color=colour, capsize=3, label=text)
                    axes.errorbar(x, mean, [mean - low, high - mean], **style)
                axes.set_xticks(np.arange(len(order)), order)
                axes.set_ylim(min(0, axes.get_ylim()[0]), None)
            column[0].set(title=task.removeprefix("Offline"), ylabel="return")
            column[1].axhline(10, color="k", ls="--", lw=1, label="limit")
            column[1].set(ylabel="cost return", xlabel=axis)
            column[1].set_ylim(None, max(12, column[1].get_ylim()[1]))
        handles, texts = panels[1, 0].get_legend_handles_labels()
        figure.legend(handles, texts, loc="outside lower center", ncols=2, fontsize=8)
        save(figure, Path(folder) / f"{study}.png")


MARKS = {  # method: marker, its size, colour; the last is drawn on top
    "pretrained": ("X", 9, "#E69F00"),
    "bc-safe": ("o", 8, "#009E73"),
    "dpo": ("s", 8, "#D55E00"),
    "cpl": ("D", 7, "#CC79A7"),
    "no-preferred": ("^", 8, "#999999"),
    "no-dispreferred": ("v", 8, "#999999"),
    "no-imitation": ("<", 8, "#999999"),
    "no-return-weight": (">", 8, "#F0E442"),
    "all-dispreferred": ("P", 8, "#56B4E9"),
    "prefine": ("*", 14, "#0072B2"),
}


def front(path):
    """Reward-cost fronts of the methods, normalised, a panel per task."""
    found = {}
    for file in sorted(Path("runs").glob("*__*__*/metrics.json")):
        run = json.loads(file.read_text())
        if not re.fullmatch(r"Offline[^_]*__[a-z-]+__\d+", file.parent.name):
            continue
        task = run["env"].split("-")[0].removesuffix("Gymnasium").removeprefix("Offline")
        parts = {run["method"]: run["finetuned"]}
        if run["method"] == "prefine":
            parts["pretrained"] = run["pretrained"]
        for method, part in parts.items():
            point = part["normalized_cost"], part["normalized_return"]
            found.setdefault(task, {}).setdefault(method, []).append(point)
    if not found or Figure is None:
        stop("runs/TASK__METHOD__SEED/metrics.json and matplotlib are needed, one is missing.")
    rows = -(-(len(found) + 1) // 3)  # the last place is the legend's
    figure = Figure(figsize=(11, 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, 3).ravel()
    for axes, (task, part) in zip(panels, found.items()):
        for method, (marker, size, colour) in MARKS.items():
            if method not in part:
                continue
            points = np.array(part[method])
            (x, left, right), (y, low, high) = boot(points[:, 0]), boot(points[:, 1])
            errors = dict(xerr=[[x - left], [right - x]], yerr=[[y - low], [high - y]])
            style = dict(marker=marker, ms=size, color=colour, lw=0, elinewidth=1, markeredgecolor="k")
            axes.errorbar([x], [y], **errors, **style)
        axes.axvline(1, color="k", ls="--", lw=1)
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(-0.3, max(12, 1.3 * axes.get_xlim()[1]))
        axes.set_xticks([0, 1, 10], ["0", "1", "10"])
        axes.set(title=task, xlabel="normalised cost (limit: 1)", ylabel="normalised return")
    for axes in panels[len(found) :]:
        axes.axis("off")
    marks = [
        panels[-1].plot([], [], marker, color=colour, markeredgecolor="k", ms=size, label=method)[0]
        for method, (marker, size, colour) in MARKS.items()
    ]
    panels[-1].legend(handles=marks, loc="center", title="mean, 95 % interval over seeds")
    save(figure, Path(path))


try:
    verbs = dict(results=results, report=report, export=export, labels=labels, front=front)
    verbs |= dict(sensitivity=sensitivity, check=check)
    verbs[sys.argv[1]](*sys.argv[2:])
except (prefine.UserError, OSError) as error:
    stop(f"{error}{'; is the path right?' * isinstance(error, FileNotFoundError)}")
except KeyboardInterrupt:
    sys.exit(130)
PYTHON
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
      "$UV" pip install -q --no-deps --python .venv/bin/python --target .osrl osrl-lib==0.1.0 ||
        fail "uv could not install osrl-lib 0.1.0 into .osrl, see above."
    fi
    exec .venv/bin/python test_prefine.py bench "${@:2}"
    ;;
  summary) setup; summary "${2:-runs}" ;;
  task) task "$2" ;; # for --slurm
  sensitivity) setup; sensitivity "${@:2}" ;;
  report | front)
    [ $# -eq 2 ] || fail "$1 takes one name: of the folder of a run that has ended, or for front, of a PNG file."
    (cd -- "$folder" && setup)
    draw "$folder/.venv/bin/python" "$1" "$2"
    ;;
  check)
    [ $# -ge 2 ] || fail "check takes a CSV file of labels, then --env, --dataset and what else the run is given."
    (cd -- "$folder" && setup)
    draw "$folder/.venv/bin/python" "$@"
    ;;
  draw) # for prefine.py
    if [[ $3 != results || ! -e $4/report.png || $5 =~ '"capture_video": true'|'"track": true' ]]; then
      draw "${@:2}"
    fi
    ;;
  -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' run_all.sh ;;
  '' | -*) experiments "$@" ;;
  *) unknown "$1" ;;
esac
