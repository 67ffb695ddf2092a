# /// script
# requires-python = ">=3.10,<3.12"
# dependencies = [
#   "torch==2.13.0", "numpy==1.26.4", "gymnasium==0.28.1", "h5py==3.16.0", "tqdm==4.70.1",
#   "dsrl==0.1.0", "bullet-safety-gym==1.4.0", "safety-gymnasium==0.4.0", "pybullet==3.2.7",
#   "mujoco==2.3.3", "joblib==1.6.0", "filelock", "matplotlib==3.10.9", "tensorboard==2.21.0",
# ]
# [tool.uv]  # dsrl's and safety-gymnasium's own pins have no wheels for 3.11; gym is not needed
# override-dependencies = ["pygame==2.6.1", "mujoco==2.3.3", "gym; sys_platform == 'never'"]
# ///
"""PREFINE: make a reward-trained policy safe from a handful of labelled trajectories.

    python prefine.py --env OfflineCarButton1                      # DSRL's data, downloaded
    python prefine.py --env OfflineBallCircle --dataset scripted   # data made here

A policy pi_ref is trained for reward alone; a few trajectories are called preferred (safe), a few
dispreferred. In a state s of a preferred trajectory, a is the action that was taken; its
counterfactual c ~ pi(.|s) is what the policy that is being trained would do, held fixed in the
update. With the log-ratio h(s, a) = log pi(a|s) - log pi_ref(a|s), fine-tuning descends

    E[ -log sigmoid(beta (h(s, a) - h(s, c))) / beta ]

over steps of the preferred trajectories of high return. Its gradient, with c a constant, is
-E[ sigmoid(-beta (h(s, a) - h(s, c))) (grad log pi(a|s) - grad log pi(c|s)) ]. Its two halves:

    -E[ h(s, a) - h(s, c) ] / 2                              imitates: E_c grad log pi(c|s) = 0
    E[ log(2 cosh(beta (h(s, a) - h(s, c)) / 2)) ] / beta    retains: least at pi = pi_ref

Small beta leads to the preferred behaviour, large beta keeps the reference policy. Dispreferred
trajectories choose which of the preferred count, see choose_preferred(); by default no step of
theirs enters the loss. The method is the loop in finetune(); run() is the program.
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import pickle
import re
import signal
import sys
from multiprocessing import resource_tracker
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import gymnasium
import h5py
import joblib
import mujoco
import numpy as np
import torch
from filelock import FileLock
from torch import nn
from tqdm import tqdm


class UserError(Exception):
    """Bad input: main() prints its one sentence and exits with 2. A bug keeps its traceback."""


def require(condition, sentence):
    """Raise UserError(sentence) unless the condition holds."""
    if not condition:
        raise UserError(sentence)


def brief(thing):
    """A value or an error as a part of a sentence: one line, and not a long one."""
    return " ".join(str(thing).split())[:200]


# What torch, h5py, NumPy and Python raise of damaged files and unsuitable values.
DAMAGE = (OSError, EOFError, LookupError, RuntimeError, TypeError, ValueError, AttributeError)
DAMAGE += (MemoryError, pickle.UnpicklingError, UserError)


# ------------------------------------------------------------------------------------------ flags
METHODS = {  # corners of one flag space: same network, data, labels, updates and evaluation
    "prefine": {},
    "weighted-imitation": {"beta": 0.0},
    "imitation": {"beta": 0.0, "leave_out": 0.0, "finetune_top": 1.0},
    "dpo": {"loser": "dispreferred", "leave_out": 0.0, "finetune_top": 1.0},
}
LOSERS = ["policy", "reference", "dispreferred"]


def parse_args(argv=None):
    """Flags to a namespace; ``parse_args(["--beta", 0.5])`` has the defaults of all others."""
    parser = argparse.ArgumentParser("prefine.py", allow_abbrev=False)
    parser.description = "Makes a policy safe: %(prog)s --env OfflineBallCircle --dataset scripted"
    parser.error = lambda sentence: require(False, f"{sentence}; --help describes each flag.")

    def add(flag, default, text, type=None, **options):
        text += "" if default is None else " (%(default)s)"
        type = type or (str if default is None else default.__class__)
        parser.add_argument(flag, default=default, help=text, type=type, **options)

    add("--env", None, "DSRL's name of a task, or an id of Gymnasium, such as package:Env-v0")
    add("--method", "prefine", "preset of the flags of fine-tuning", choices=METHODS)
    add("--seed", 0, "seed of labels, training and evaluation")
    add("--device", "cpu", "torch device to train on: cpu, cuda, cuda:1")
    add("--workers", len(os.sched_getaffinity(0)), "parallel simulators")
    add("--run-dir", None, "folder of the results; else in runs/, by flags")
    add("--summary", None, "print one table of all runs in this folder, and end")
    add("--dataset", "dsrl", "dsrl, scripted, or a file in DSRL's format")
    add("--scripted-episodes", 300, "episodes of the scripted data")
    add("--cost-limit", None, "highest safe cost of an episode; DSRL's tasks have one", float)
    add("--preferred", 40, "safe episodes to call preferred")
    add("--dispreferred", 40, "unsafe episodes to call dispreferred")
    add("--preferences", None, "labels instead, a CSV file; then costs of the data are not read")
    add("--policy", None, "checkpoint of a trained policy to start from")
    add("--hidden", [256, 256], "sizes of hidden layers", int, nargs="+")
    add("--batch-size", 256, "steps per update")
    add("--pretrain-updates", 2500, "updates of the pre-training")
    add("--pretrain-top", 0.2, "share of episodes, by return, to imitate")
    add("--pretrain-lr", 2e-3, "Adam's learning rate; cosine decay to 0")
    add("--finetune-updates", 2500, "updates of the fine-tuning")
    add("--finetune-lr", 2e-3, "Adam's learning rate; cosine decay to 0")
    add("--beta", 0.1, "0 imitates what is preferred; larger keeps more of the reference")
    add("--loser", "policy", "what is contrasted with a preferred step", choices=LOSERS)
    add("--leave-out", 0.1, "share of the preferred that look most dispreferred")
    add("--finetune-top", 0.1, "share of the preferred, the best by return, to learn from")
    add("--eval-episodes", 20, "simulated episodes of each policy")

    argv = None if argv is None else [str(argument) for argument in argv]
    parser.set_defaults(**METHODS[parser.parse_args(argv).method])
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        require(value != "", f"{flag}: an empty name; is a variable of the shell not set?")
        highest = 1 if name in ("pretrain_top", "leave_out", "finetune_top") else 1e9
        for number in value if isinstance(value, list) else [value]:
            lowest = 1 if isinstance(number, int) and name != "seed" else 0
            is_right = isinstance(number, str | None) or lowest <= number <= highest  # not NaN
            require(is_right, f"{flag}: needs {lowest} to {highest:g}; found {number}.")
    return args


# ----------------------------------------------------------------------------------------- policy
def gaussian_log_prob(mean, std, actions, low, high):
    """Log-probability [...] of actions [..., A] under a Gaussian clipped to [low, high], each [A].
    Between the bounds: the normal log-density. On a bound, where many actions are: the log of the
    mass that is clipped to it. Actions beyond are clipped too. Infinite bounds leave a Gaussian."""
    z = (actions.clamp(low, high) - mean) / std
    log_density = -0.5 * z**2 - std.log() - 0.5 * math.log(2 * math.pi)
    tail = torch.where(actions >= high, -z, z)  # the mass is Phi(tail)
    log_mass = torch.special.log_ndtr(tail.double())  # in float32 its gradient is wrong
    is_inside = (actions > low) & (actions < high)
    return torch.where(is_inside, log_density, log_mass.float()).sum(-1)


class GaussianPolicy(nn.Module):
    """An MLP from observations to a diagonal Gaussian over actions, clipped to [low, high].

    low, high: bounds of the actions, [A]. mean, std: what normalises observations, [O]."""

    def __init__(self, low, high, mean, std, hidden=(256, 256)):
        super().__init__()
        layers, size = [], len(mean)
        for width in hidden:
            layers += [nn.Linear(size, width), nn.ReLU()]
            size = width
        self.net = nn.Sequential(*layers, nn.Linear(size, 2 * len(low)))
        for name, values in {"low": low, "high": high, "mean": mean, "std": std}.items():
            self.register_buffer(name, torch.as_tensor(values, dtype=torch.float32))

    def forward(self, observations):
        """Mean and standard deviation [..., A], before clipping, from observations [..., O]."""
        normalised = (observations - self.mean) / self.std
        raw_mean, raw_std = self.net(normalised).chunk(2, -1)
        middle = (self.high + self.low) / 2
        half_range = (self.high - self.low) / 2
        mean = middle + half_range * torch.tanh(raw_mean)
        # log(std / half_range) is in (-1.5, 0.5): with a smaller std single steps decide the loss.
        log_std = -1.5 + 2 * torch.sigmoid(raw_std)
        return mean, half_range * log_std.exp()


def save_policy(path, env_id, policy):
    """Write a checkpoint of a GaussianPolicy: the task's name and all that the policy needs."""
    is_right = isinstance(policy, GaussianPolicy)
    require(is_right, "save_policy() is for a GaussianPolicy; torch.save() keeps any state_dict().")
    with written(path) as part:
        torch.save({"env": env_id, "state": policy.state_dict()}, part)


def load_policy(path, env_id=None, advice="pass another file"):
    """The GaussianPolicy of a checkpoint of save_policy(); tensors are read, never code."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        require(env_id in (None, content["env"]), f"one of {content['env']}")
        state = content["state"]
        hidden = [len(value) for name, value in state.items() if name.endswith("bias")][:-1]
        policy = GaussianPolicy(state["low"], state["high"], state["mean"], state["std"], hidden)
        policy.load_state_dict(state)
        return policy
    except DAMAGE as error:
        needs = f"{path}: needs a checkpoint of save_policy() of {env_id or 'any task'}"
        raise UserError(f"{needs}; found {brief(error)}; {advice}.") from None


def checked_copy(policy, dataset):
    """A copy in evaluation mode, where dropout is off and batch statistics stand still. UserError
    unless it keeps the contract of finetune() on steps of the dataset."""
    try:
        with torch.no_grad():  # or the tensors of TorchScript's copy could not be trained
            policy = copy.deepcopy(policy).eval()
        mean, std = output = policy(dataset.observations[:8].to(policy.low.device))
        is_right = isinstance(output, tuple) and mean.dtype == std.dtype == torch.float32
        is_right &= mean.shape == std.shape == dataset.actions[:8].shape and mean.requires_grad
        is_right &= policy.low.shape == policy.high.shape == mean[0].shape
        is_right &= bool((mean + std).isfinite().all() and std.min() > 0)
        require(is_right, f"it returned {brief(output)}")
        return policy
    except DAMAGE as error:
        needs = "policy needs buffers low and high [A], the actions' bounds, and to return a tuple"
        needs += " (mean, std) [B, A] of observations [B, O]: float32, finite, std > 0, trainable"
        found = f"with these data A is {dataset.actions.shape[1]}; found: {brief(error)}"
        advice = "; save it and load it first" if "deepcopy" in str(error) else ""
        raise UserError(f"{needs}; {found}{advice}.") from None


# ----------------------------------------------------------------------------------- pre-training
def pretrain(dataset, space, args, writer=None):
    """Reward-only pre-training: imitate the best episodes by return, the "%BC" of Chen et al.,
    Decision Transformer, 2021. Costs are never read. space: the actions' bounded Box. args: of
    parse_args(). writer: TensorBoard's, if any. Returns a GaussianPolicy."""
    check_box("actions", space, dataset.actions)
    episodes = np.arange(len(dataset.ends))
    best = best_by_return(dataset, episodes, args.pretrain_top * len(episodes))
    observations, actions = dataset.steps(best, args.device)

    centre = dataset.observations.mean(0)
    scale = dataset.observations.std(0, correction=0)
    scale[scale < 1e-6] = 1  # a constant observation tells nothing
    torch.manual_seed(args.seed)
    policy = GaussianPolicy(space.low, space.high, centre, scale, args.hidden)
    policy.to(args.device)
    optimizer = torch.optim.Adam(policy.parameters(), args.pretrain_lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.pretrain_updates)
    for update in tqdm(range(args.pretrain_updates), "pre-training", disable=None):
        batch = torch.randint(len(actions), (args.batch_size,), device=args.device)
        mean, std = policy(observations[batch])
        log_prob = gaussian_log_prob(mean, std, actions[batch], policy.low, policy.high)
        loss = -log_prob.mean()
        require(loss.isfinite(), "the loss is not finite; try a lower learning rate.")

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if writer and update % 100 == 99:
            writer.add_scalar("losses/pretraining", loss, update)
    return policy


# ------------------------------------------------------------------------------------ preferences
def draw_preferences(costs, limit, preferred, dispreferred, seed):
    """Label trajectories by their cost returns [E] alone: indices {"preferred": [P],
    "dispreferred": [D]}, drawn at random from those at or under ``limit`` and from the others."""
    rng = np.random.default_rng(seed)
    safe = rng.permutation(np.flatnonzero(costs <= limit))
    unsafe = rng.permutation(np.flatnonzero(costs > limit))
    is_right = preferred <= len(safe) and dispreferred <= len(unsafe)
    found = f"{len(safe)} of {len(costs)} episodes cost at most {limit:g}, see --cost-limit"
    require(is_right, f"--preferred {preferred}, --dispreferred {dispreferred}: {found}.")
    preferences = {"preferred": safe[:preferred], "dispreferred": unsafe[:dispreferred]}
    return check_preferences(preferences, len(costs))


def read_preferences(path, episodes):
    """Labels as of draw_preferences(), from a CSV file with the columns ``episode`` and ``label``.
    Rows without a label are skipped, and counted. UserError names the line and the mistake."""
    preferences, skipped = {"preferred": [], "dispreferred": []}, 0
    text = Path(path).read_text("utf-8-sig", errors="replace").lower()
    reader = csv.DictReader(re.sub("[ \t]", "", text).splitlines(), restval="")
    is_right = {"episode", "label"} <= set(reader.fieldnames or [])
    require(is_right, f"{path}: needs the columns episode and label; found {reader.fieldnames}.")
    for row in reader:
        episode, label = row["episode"], row["label"]
        if not label:
            skipped += 1
            continue
        is_right = episode.isdecimal() and int(episode) < episodes and label in preferences
        is_right = is_right and int(episode) not in sum(preferences.values(), [])
        found = f"{path}, line {reader.line_num}: found '{episode}', '{label}'"
        needs = f"0 to {episodes - 1}, each once, and the label preferred or dispreferred"
        require(is_right, f"{found}; needs an episode from {needs}.")
        preferences[label].append(int(episode))
    if skipped:
        print(f"{path}: rows without a label, skipped: {skipped}")
    return check_preferences(preferences, episodes)


def check_preferences(preferences, episodes):
    """Labels as arrays {"preferred": [P], "dispreferred": [D]}. UserError unless they are different
    indices of the episodes, some of each."""
    require(isinstance(preferences, dict), 'labels need {"preferred": [], "dispreferred": []}.')
    checked = {}
    for label in ("preferred", "dispreferred"):
        indices = np.asarray(preferences.get(label, []))
        require(indices.size, f"no trajectory is {label}; both labels are needed.")
        is_right = indices.dtype.kind in "iu" and np.isin(indices, range(episodes)).all()
        needs = f"'{label}' needs indices from 0 to {episodes - 1}, as np.flatnonzero() makes"
        require(is_right and indices.ndim == 1, f"{needs}; found {brief(indices)}.")
        checked[label] = indices.astype(np.int64)
    labelled = np.concatenate(list(checked.values()))
    require(len(np.unique(labelled)) == len(labelled), "an episode is labelled twice.")
    return checked


def dispreferred_shares(dataset, preferred, dispreferred):
    """The share [P] of each preferred trajectory's steps that lie nearest to a dispreferred one, as
    many do where a label is wrong, or was luck (editing by nearest neighbours: Wilson 1972). Some
    4000 standardised states and actions of each label are compared, none with its own episode."""
    good = torch.cat(dataset.steps(preferred, points=4000), 1)
    bad = torch.cat(dataset.steps(dispreferred, points=4000), 1)
    both = torch.cat([good, bad])
    both = (both - both.mean(0)) / (both.std(0) + 1e-6)  # centred, as distances are in float32
    shares = []
    for own in torch.arange(len(good)).chunk(len(preferred)):  # the rows of one trajectory
        distances = torch.cdist(both[own], both)
        distances[:, own] = torch.inf
        is_dispreferred = distances.argmin(1) >= len(good)
        shares.append(is_dispreferred.double().mean().item())
    return np.array(shares)


def choose_preferred(dataset, preferences, leave_out):
    """The preferred trajectories that count; prints which are left out. First look: a share
    ``leave_out`` of them, those with most steps nearest to a dispreferred one. Second look: with
    these counted as dispreferred, those with over 40 % of such steps, at most half of the rest.
    Wrong ones lie close together, so that the first look misses some."""
    preferred, dispreferred = preferences["preferred"], preferences["dispreferred"]
    shares = dispreferred_shares(dataset, preferred, dispreferred)
    if np.median(shares) > 0.4:
        found = f"{np.median(shares):.0%} of a preferred episode's steps look dispreferred"
        print(f"warning: {found}, of 50% by chance: more labels, or clearer ones, may help")
    number = min(round(leave_out * len(preferred)), len(preferred) - 1)
    if number == 0:
        return preferred
    by_share = preferred[np.argsort(shares, kind="stable")]
    chosen, left_out = by_share[:-number], by_share[-number:]
    shares = dispreferred_shares(dataset, chosen, np.append(dispreferred, left_out))
    chosen = np.sort(chosen[shares <= max(0.4, np.median(shares))])
    left_out = np.setdiff1d(preferred, chosen)
    print(f"left out, as they look dispreferred, episodes: {', '.join(map(str, left_out))}")
    return chosen


def best_by_return(dataset, episodes, number):
    """So many of the episodes, those of highest return; one at least."""
    returns = dataset.sums(dataset.rewards)[episodes]
    best_first = np.argsort(-returns, kind="stable")
    return episodes[best_first[: max(1, round(number))]]


# --------------------------------------- fine-tuning: counterfactuals, log-ratios, loss, the loop
def sample_actions(mean, std, low, high):
    """Actions [..., A] sampled from a clipped Gaussian. No gradient flows through a sample."""
    return torch.normal(mean, std).clamp(low, high).detach()


def log_ratio(gaussian, reference_gaussian, actions, low, high):
    """h(s, a) = log pi(a|s) - log pi_ref(a|s), in nats [...], of actions [..., A] in the states s
    where pi and pi_ref are Gaussians (mean, std), each [..., A]."""
    log_prob = gaussian_log_prob(*gaussian, actions, low, high)
    reference_log_prob = gaussian_log_prob(*reference_gaussian, actions, low, high)
    return log_prob - reference_log_prob


def preference_loss(h_winner, h_loser, beta):
    """DPO's loss of "the winner is preferred" (Rafailov et al. 2023, eq. 7), divided by beta, of
    two log-ratios; for beta 0 its limit, but for a constant. The slope is -1/2 at a tie, whatever
    beta, and fades once the winner leads by a few times 1 / beta nats."""
    lead = h_winner - h_loser
    if beta == 0:
        return -lead / 2
    return -nn.functional.logsigmoid(beta * lead) / beta


def finetune(policy, dataset, preferences, args, writer=None):
    """Align a reward-trained policy with labelled trajectories. Costs are never read.

    policy: any module from observations [B, O] to the tuple (mean, std), each [B, A], of a
    Gaussian, with buffers ``low`` and ``high`` [A] that bound the actions (infinite: a plain
    Gaussian). Parameters that need no gradient stay as they are. dataset: a Dataset, with the
    observations as the policy takes them; a GaussianPolicy takes them raw. preferences: episode
    indices {"preferred": [P], "dispreferred": [D]}. args: leave_out, finetune_top, seed,
    batch_size, finetune_lr, finetune_updates, loser, beta, as parse_args() has them. Returns the
    aligned copy, in evaluation mode. torch.set_num_threads(1) is fastest."""
    preferences = check_preferences(preferences, len(dataset.ends))
    policy = checked_copy(policy, dataset)
    low, high, device = policy.low, policy.high, policy.low.device

    # The steps to learn from, and pi_ref there, copied, as a policy may return views of weights.
    preferred = choose_preferred(dataset, preferences, args.leave_out)
    number = args.finetune_top * len(preferences["preferred"])
    episodes = best_by_return(dataset, preferred, number)
    lengths = dataset.ends - dataset.starts
    preferred_steps = lengths[episodes].sum().item()
    if args.loser == "dispreferred":
        episodes = [*episodes, *preferences["dispreferred"]]
    observations, actions = dataset.steps(episodes, device)
    with torch.no_grad():
        reference = torch.stack(policy(observations))

    torch.manual_seed(args.seed)
    options = {"size": (args.batch_size,), "device": device}
    optimizer = torch.optim.Adam(policy.parameters(), args.finetune_lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.finetune_updates)
    for update in tqdm(range(args.finetune_updates), "fine-tuning", disable=None):
        batch = torch.randint(preferred_steps, **options)
        if args.loser == "dispreferred":  # what was done in other states
            batch = torch.cat([batch, torch.randint(preferred_steps, len(actions), **options)])
        gaussian = policy(observations[batch])
        reference_gaussian = reference[:, batch]
        winners_losers = actions[batch]
        if args.loser != "dispreferred":  # counterfactuals, in the same states
            source = {"policy": gaussian, "reference": reference_gaussian}[args.loser]
            counterfactuals = sample_actions(*source, low, high)
            winners_losers = torch.stack([winners_losers, counterfactuals])
        h = log_ratio(gaussian, reference_gaussian, winners_losers, low, high)
        h_winner, h_loser = h.view(2, -1)
        loss = preference_loss(h_winner, h_loser, args.beta).mean()
        require(loss.isfinite(), "the loss is not finite; try a lower learning rate.")

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if writer and update % 100 == 99:
            writer.add_scalar("losses/finetuning", loss, update)
    return policy


# ------------------------------------------------------------------------------------- evaluation
def evaluate(policy, env, episodes=20, seed=0, cost_limit=None, workers=1, title="evaluation"):
    """Simulate a policy that acts by its mean. Returns metrics, {"return_mean": ...}.

    policy: any module from an observation [1, O] to the mean [1, A], or to a tuple that starts with
    it; it is put in evaluation mode. env: DSRL's name of a task, an id of Gymnasium, or a function
    that makes an environment, as one with wrappers: a policy that was trained on normalised
    observations has to see them. The cost is info["cost"]. cost_limit: None is DSRL's."""
    is_right = isinstance(policy, nn.Module) and episodes >= 1 and workers >= 1
    require(is_right, "evaluate() needs a torch Module, and an episode and a worker at least.")
    simulator = make_env(env)
    limit = find_cost_limit(simulator, cost_limit)
    shape = (1, *simulator.action_space.shape)
    policy.eval()
    parameter = next(policy.parameters(), torch.empty(0))  # of the policy's device and type

    @torch.inference_mode()
    def act(observation):
        output = policy(torch.as_tensor(observation).to(parameter)[None])
        mean = output[0] if isinstance(output, tuple) else output
        is_right = torch.is_tensor(mean) and mean.shape == shape and mean.isfinite().all()
        require(is_right, f"policy needs to return a finite mean {shape}; found {brief(output)}.")
        return mean[0].float().cpu().numpy()

    maker = env if callable(env) else simulator.spec  # a worker need not know the id
    first = 1000 * (seed + 1000)  # collect() has lower ones
    seeds = [(first + i) % 2**32 for i in range(episodes)]
    runs = run_episodes(maker, lambda simulator, seed: act, seeds, workers, title)
    returns = np.array([run["rewards"].sum(dtype=float) for run in runs])
    costs = np.array([run["costs"].sum(dtype=float) for run in runs])
    metrics = {
        "return_mean": returns.mean(),
        "cost_mean": costs.mean(),
        "violation_rate": (costs > limit).mean(),
        "failure_rate": np.mean([run["terminals"].any() for run in runs]),
        "returns": returns.tolist(),
        "costs": costs.tolist(),
    }
    if hasattr(simulator.unwrapped, "get_normalized_score"):  # DSRL's
        simulator.unwrapped.set_target_cost(limit)
        scores = simulator.unwrapped.get_normalized_score(returns.mean(), costs.mean())
        metrics["normalized_return"], metrics["normalized_cost"] = scores
    return metrics


KEYS = ["observations", "actions", "rewards", "costs", "terminals", "timeouts", "next_observations"]


def run_episode(env, make_controller, seed):
    """Simulate one episode: float32 arrays [T, ...] by the names of DSRL's files.
    make_controller(env, seed) returns a function from an observation to an action."""
    np.random.seed(seed)  # Bullet tasks draw their start state from NumPy's global generator
    env = make_env(env)
    space = env.action_space
    act = make_controller(env, seed)
    steps, terminal, timeout = [], False, False
    with without_textures():
        observation, _ = env.reset(seed=seed)
        while not (terminal or timeout):
            action = np.clip(act(observation), space.low, space.high).astype(space.dtype)
            following, reward, terminal, timeout, info = env.step(action)
            require("cost" in info, "the environment gives no cost: step() must set info['cost'].")
            cost, is_terminal = info["cost"], terminal and not timeout
            steps.append((observation, action, reward, cost, is_terminal, timeout, following))
            observation = following
    env.close()
    columns = [np.asarray(column, np.float32) for column in zip(*steps)]
    return dict(zip(KEYS, columns))


def run_episodes(env, make_controller, seeds, workers, title):
    """``run_episode`` for each seed, in parallel; one worker is this process."""
    jobs = [joblib.delayed(run_episode)(env, make_controller, seed) for seed in seeds]
    options = {"initializer": end_with_parent, "initargs": (os.getpid(),)}
    try:
        with joblib.parallel_config("loky", inner_max_num_threads=1, **options):
            parallel = joblib.Parallel(min(workers, len(jobs)), return_as="generator")
            # Workers inherit that Ctrl-C is blocked: it ends this process, and that ends them.
            # The trackers' start would unblock it, so that comes first.
            joblib.externals.loky.backend.resource_tracker.ensure_running()
            resource_tracker.ensure_running()
            signals = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                results = parallel(jobs)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, signals)
            return list(tqdm(results, title, len(jobs), disable=None))
    except joblib.externals.loky.BrokenProcessPool as error:
        why = str(error.__cause__ or error).strip(' "\n').splitlines()[-1]  # of its traceback
        advice = "--workers 1 does all in this process"
        raise UserError(f"{title}: a worker failed: {brief(why)}; {advice}.") from None


def end_with_parent(parent):
    """In a worker: end when the process that started it does, however that ends (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it ended before that
        os._exit(1)


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
        of some ``points``, as many of each, evenly spaced from its first step to its last."""
        rows = []
        for episode in episodes:
            first, end = self.starts[episode].item(), self.ends[episode].item()
            size = math.ceil(points / len(episodes)) if points else end - first
            rows.append(torch.linspace(first, end - 1, size, dtype=torch.float64).long())
        rows = torch.cat(rows)
        return self.observations[rows].to(device), self.actions[rows].to(device)


def make_dataset(observations, actions, rewards, terminals, timeouts, costs=None):
    """A Dataset from arrays as in DSRL's files: [N, O], [N, A], and [N] or [N, 1]. An episode ends
    where a terminal or a timeout is set; rows after the last end are dropped."""
    arrays = {name: values for name, values in locals().items() if values is not None}
    rows = len(observations)
    for name, values in arrays.items():
        values = np.asarray(values)
        dimensions = 2 if name in ("observations", "actions") else 1
        if values.shape == (rows, 1) and dimensions == 1:
            values = values[:, 0]
        is_right = values.dtype.kind in "fiub" and values.ndim == dimensions
        is_right = is_right and len(values) == rows > 0
        found = f"found {values.dtype} {values.shape}, of {rows} observations"
        require(is_right, f"'{name}' must be numbers, a row a step; {found}.")
        lowest = 0 if name == "costs" else -1e9
        is_right = lowest <= values.min() and values.max() <= 1e9  # false for NaN
        require(is_right, f"'{name}' has values that are no finite number from {lowest} to 1e9.")
        arrays[name] = values.astype(np.float32, copy=False)

    is_end = (arrays.pop("terminals") > 0) | (arrays.pop("timeouts") > 0)
    ends = np.flatnonzero(is_end) + 1
    require(len(ends), "no terminal and no timeout is set, so no episode has an end.")
    end = ends[-1]
    if end < rows:
        print(f"rows without an end of their episode, dropped: {rows - end}")
    tensors = {name: torch.as_tensor(values[:end]) for name, values in arrays.items()}
    starts = torch.from_numpy(np.append(0, ends[:-1]))
    return Dataset(**tensors, starts=starts, ends=torch.from_numpy(ends))


def load_dataset(path, env, with_costs=True):
    """Read what is needed of a file in DSRL's format; never next_observations."""
    arrays = {}
    names = [name for name in KEYS[:-1] if with_costs or name != "costs"]
    try:
        with h5py.File(path) as file:
            for name in names:
                advice = "README has the format; without costs, pass --preferences"
                require(isinstance(file.get(name), h5py.Dataset), f"no array '{name}'; {advice}")
                settings = file[name].id.get_create_plist()
                for i in range(settings.get_nfilters()):
                    needed = settings.get_filter(i)
                    is_here = h5py.h5z.filter_avail(needed[0])
                    require(is_here, f"'{name}' needs the filter {needed}, see hdf5plugin on PyPI")
                arrays[name] = file[name][()]
        dataset = make_dataset(**arrays)
        check_box("observations", env.observation_space, dataset.observations)
        check_box("actions", env.action_space, dataset.actions)
    except DAMAGE as error:
        advice = "a file that was downloaded or collected is made again once it is deleted"
        raise UserError(f"--dataset {path}: not usable: {brief(error)}; {advice}.") from None
    low, high = torch.Tensor(env.action_space.low), torch.Tensor(env.action_space.high)
    clipped = dataset.actions.clip(low, high)
    beyond = (clipped != dataset.actions).any(1).sum().item()
    if beyond:
        print(f"actions beyond the action space, clipped: in {beyond} of {len(clipped)} steps")
    return dataset._replace(actions=clipped)


def find_dataset(args, env):
    """The path of the file that ``--dataset`` means, downloaded or collected first if need be."""
    from dsrl.offline_env import DATASET_PATH

    path, url = Path(args.dataset), getattr(env.unwrapped, "dataset_url", "")
    if args.dataset == "scripted":
        known = ", ".join(CONTROLLERS)
        require(args.env in CONTROLLERS, f"--dataset scripted: {args.env} has none; {known} have.")
        path = Path(DATASET_PATH, f"{args.env}-scripted-{args.scripted_episodes}.hdf5")
    elif args.dataset == "dsrl":
        require(url, f"--dataset is missing: DSRL has no data of {args.env}; pass --dataset FILE.")
        path = Path(DATASET_PATH, Path(url).name)
    else:
        require(path.exists(), f"--dataset {path}: no such file; dsrl and scripted need none.")
        return path
    with FileLock(f"{path}.lock"):  # of two processes, one makes the file
        if not path.exists() and args.dataset == "scripted":
            collect(args.env, args.scripted_episodes, args.workers, path)
        elif not path.exists():
            print(f"downloading {url}", flush=True)
            try:
                torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
            except (OSError, ValueError) as error:
                advice = "pass a file with --dataset FILE, or use --dataset scripted"
                raise UserError(f"{url}: not downloaded: {brief(error)}; {advice}.") from None
    return path


# --------------------------------------------------------------------- simulators, scripted data
def import_simulators():
    """Register DSRL's tasks with Gymnasium, quietly, on Python 3.10 and 3.11."""
    os.environ.setdefault("DSRL_SUPPRESS_IMPORT_ERROR", "1")  # of its MetaDrive part, not used
    gymnasium.logger.set_level(gymnasium.logger.ERROR)
    plain_field = dataclasses.field

    def field(**options):
        if isinstance(options.get("default"), np.ndarray):  # since 3.11 it can't be an array
            options["default_factory"] = options.pop("default").copy
        return plain_field(**options)

    with mock.patch("dataclasses.field", field):
        import dsrl.offline_bullet_safety_gym
        import dsrl.offline_safety_gymnasium.gym_envs


def make_env(env):
    """A new environment of an id of Gymnasium, where ``package:Env-v0`` imports the package first
    and DSRL's ids may lack their end, of a specification, or of a function that makes one."""
    is_right = not isinstance(env, gymnasium.Env)
    require(is_right, "env must be an id or a function that makes an environment, not an object.")
    # Bullet redirects Python's own streams, which notebooks replace.
    with mock.patch.multiple(sys, stdout=sys.__stdout__, stderr=sys.__stderr__):
        import_simulators()
        for end in ("Gymnasium-v0", "Gymnasium-v1", "-v0"):
            if isinstance(env, str) and env + end in gymnasium.registry:
                env += end
        made = env() if callable(env) else gymnasium.make(env)
    check_box("observations", made.observation_space)
    check_box("actions", made.action_space)
    return made


def check_box(name, space, values=None):
    """UserError unless a space is a flat Box, bounded for actions, and as wide as values [N, W]."""
    is_right = isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1
    if is_right and name == "actions":
        is_right = space.is_bounded() and (space.low < space.high).all()
    needs = "need a flat Box, of actions with finite bounds, low < high"
    require(is_right, f"{name} {needs}; found {brief(space)}; Gymnasium has wrappers.")
    wide = space.shape[0]
    found = wide if values is None else values.shape[1]
    require(found == wide, f"{name} are {found} wide in the data, {wide} here.")


def find_cost_limit(env, given=None):
    """The given cost limit, or the tightest of DSRL's for its task. UserError: there is neither."""
    if given is not None:
        return given
    is_dsrl = hasattr(env.unwrapped, "set_target_cost")
    require(is_dsrl, f"--cost-limit (cost_limit=) is missing: {env} is no task of DSRL's.")
    return 20.0 if "Gymnasium" in env.spec.id else 10.0


def without_textures():
    """In this context MuJoCo loads no pictures of sky and floor, which take seconds at a reset."""
    load = mujoco.MjModel.from_xml_string

    def load_plain(xml, *args, **options):
        return load(re.sub(r'(?s)<texture.*?</texture>| texture=".*?"', "", xml), *args, **options)

    return mock.patch.object(mujoco.MjModel, "from_xml_string", load_plain)


def collect(env_id, episodes, workers, path):
    """Write episodes of the task's controller to ``path`` in DSRL's format."""
    print(f"collecting {episodes} scripted episodes, once, into {path}", flush=True)
    runs = run_episodes(env_id, CONTROLLERS[env_id], range(episodes), workers, "collecting")
    with written(path) as part, h5py.File(part, "w") as file:
        for name in KEYS:
            values = np.concatenate([run[name] for run in runs])
            file.create_dataset(name, data=values, compression="gzip")
        file.attrs["source"] = "scripted controllers of prefine.py: not DSRL data"


# Who changes a controller deletes the file that it made: its name does not show the change.
def bullet_controller(env, seed):
    """Follow a circle whose |x| is clipped at a wall, or a lane, as drawn anew for each episode."""
    rng = np.random.default_rng(seed)
    is_circle = "Circle" in env.spec.id
    noise = rng.uniform(0.05, 0.4)
    speed = rng.uniform(1.5, 9) if is_circle else 0.5 + 8.5 * rng.uniform() ** 2
    radius = rng.uniform(5.5, 8.5)
    wall = rng.uniform(4, 9)
    lane = rng.uniform(-3, 3)

    def act(observation):
        position = 10 * observation[:2]
        velocity = 5 * observation[2:4]
        wanted = np.array([speed, lane - position[1]])
        if is_circle:
            angle = np.arctan2(position[1], position[0]) - 0.6  # aim ahead, clockwise
            target = radius * np.array([np.cos(angle), np.sin(angle)])
            target[0] = np.clip(target[0], -wall, wall)
            heading = target - position
            wanted = speed * heading / (np.linalg.norm(heading) + 1e-6)
        action = wanted - velocity  # a ball is pushed
        if "Car" in env.spec.id:  # it steers, and drives backwards, as it starts
            facing = complex(observation[5], observation[4])
            turn = np.angle(-complex(*wanted) / facing)
            action = np.array([-speed / 9, -2 * turn])
        return np.clip(action, -1, 1) + rng.normal(0, noise, 2)

    return act


def car_button_controller(env, seed):
    """Face the goal; turn from what lies ahead, and brake (Braitenberg, Vehicles, 1984). Half of
    the drivers are reckless and mind no danger but other buttons."""
    rng = np.random.default_rng(seed)
    caution = rng.uniform(1, 2)
    speed = rng.uniform(0.7, 0.9)
    noise = rng.uniform(0.3, 0.7)
    if rng.uniform() < 0.5:
        caution, speed = 0, 1
    angles = (np.arange(16) + 0.5) * np.pi / 8 + np.pi / 2  # the car drives along its -y axis
    bins = np.stack([np.cos(angles), np.sin(angles)], 1)  # of the lidars: [16, (ahead, left)]
    ahead = np.clip(bins[:, 0], 0, 1) ** 2
    side = ahead * np.sign(bins[:, 1])
    clearance = {"hazards": 0.35, "gremlins": 0.7, "buttons": 0.35}  # in metres
    parts = env.unwrapped.obs_space_dict

    def act(observation):
        seen = gymnasium.spaces.unflatten(parts, observation)
        goal = seen["goal_lidar"] @ bins
        drive, turn = goal / (np.linalg.norm(goal) + 1e-6)
        drive += 0.3 * seen["velocimeter"][1]
        for name, metres in clearance.items():
            lidar = seen[f"{name}_lidar"]  # 1 at the object, 0 from 3 m on
            weight = caution
            if name == "buttons":  # one of them is the goal
                weight = 1.2 * np.clip(20 * (lidar - seen["goal_lidar"]), 0, 1)
            distance = np.maximum(3 * (1 - lidar) - metres, 0)
            danger = weight * np.exp(-distance / 0.3)
            drive -= danger @ ahead
            turn -= danger @ side
        forward = 1.5 * speed * drive
        steer = np.clip(3 * turn, -1, 1)
        return [forward + steer, forward - steer] + rng.normal(0, noise, 2)

    return act


BULLET = ["OfflineBallCircle-v0", "OfflineBallRun-v0", "OfflineCarCircle-v0", "OfflineCarRun-v0"]
CONTROLLERS = dict.fromkeys(BULLET, bullet_controller)
CONTROLLERS["OfflineCarButton1Gymnasium-v0"] = car_button_controller


# ------------------------------------------------------------------------------ table and picture
def print_table(folder):
    """Print all runs in a folder as a Markdown table: a row for each task, data, method and changed
    flags, with means and standard deviations over the seeds."""
    rows = {}  # (task and data, method and flags) -> {seed: metrics}
    for path in sorted(Path(folder).rglob("metrics.json")):
        try:
            config = json.loads(path.with_name("config.json").read_text())
            metrics = json.loads(path.read_text())
            title = f"{metrics['title']}, data {config['dataset'][:4]}"
            method, preset = config["method"], vars(parse_args(["--method", config["method"]]))
        except DAMAGE as error:  # emptied by a power cut, or of another version
            print(f"left out: {path} or its config.json is damaged: {error}", file=sys.stderr)
            continue
        for flag in sorted(preset.keys() - {"env", "seed", "dataset", "cost_limit"}):
            if flag in config and config[flag] != preset[flag]:
                method += f" --{flag.replace('_', '-')} {config[flag]}"
        rows.setdefault((title, method), {})[config["seed"]] = metrics
    require(rows, f"{folder}: no metrics.json that can be read; each finished run has one.")
    print("\n| task, data | method | seeds | return, before → after | cost |", end=" ")
    print("over the limit | ended early |\n|---|---|---:|---:|---:|---:|---:|")
    for (title, method), seeds in sorted(rows.items()):
        line = f"| {title} | {method} | {len(seeds)} |"
        for name in ("return_mean", "cost_mean", "violation_rate", "failure_rate"):
            form = ".0%" if name.endswith("rate") else ".4g"
            for policy, end in {"pretrained": "→", "finetuned": "|"}.items():
                values = [metrics[policy][name] for metrics in seeds.values()]
                line += f" {np.mean(values):{form}} ± {np.std(values):{form}} {end}"
        print(line if len(seeds) > 1 else re.sub(" ± [^ ]*", "", line))


def draw_report(path, title, limit, points):
    """Draw ``points``, {name: (costs, returns)} of trajectories and policies, in one plane."""
    from matplotlib.figure import Figure  # not before it is needed: it takes a second

    figure = Figure(figsize=(9, 5), layout="constrained")
    panel = figure.subplots()
    styles = {"preferred": "C0.", "dispreferred": "C3."}  # colour and marker
    styles |= {"pre-trained policy": "C1x", "fine-tuned policy": "C2x"}
    for name, (costs, returns) in points.items():
        panel.plot(costs, returns, styles[name], label=name)
    panel.axvline(limit, color="k", ls="--", label="cost limit")
    panel.set(xlabel="cost of an episode", ylabel="return of an episode")
    panel.set_title(title, fontsize=10, parse_math=False)
    panel.legend(fontsize=8)
    with written(path) as part:
        figure.savefig(part, format="png", dpi=80)


# ------------------------------------------------------------------------------------------- main
@contextlib.contextmanager
def written(path):
    """Write a file whole or not at all: into a part, which then gets the name."""
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    except (OSError, RuntimeError) as error:  # of torch too
        raise UserError(f"{path}: not written: {brief(error)}.") from None
    finally:
        part.unlink(missing_ok=True)


def find_folder(args, files):
    """A run's folder, by its flags and the contents of its files, whatever their names are."""
    others = ("run_dir", "workers", "summary")
    config = {name: value for name, value in vars(args).items() if name not in others}
    for flag, file in files.items():
        if file:
            config[flag] = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    text = json.dumps(config, indent=2)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    folder = Path(args.run_dir or f"runs/{args.env}__{args.method}__{args.seed}__{digest}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    is_right = not path.exists() or path.read_text() == text
    require(is_right, f"--run-dir {folder}: holds a run of other flags or files, see {path}.")
    with written(path) as part:
        part.write_text(text)
    return folder


def stage(path, args, make):
    """The policy that a stage of the method ends with: of its file, if it is done, else made."""
    if path.exists():
        print(f"{path}: done already")
    else:
        save_policy(path, args.env, make())
    return load_policy(path, args.env, "delete it, and it is made again")


def run(args):
    """The method as a whole: data, preferences, pre-training, fine-tuning, evaluation."""
    require(args.env, "--env is missing: it names a task, such as OfflineBallCircle.")
    is_right = args.device == "cpu" or torch.cuda.is_available()
    require(is_right, f"--device {args.device}: not usable here; cpu is.")
    torch.set_num_threads(1)  # more are slower for such small networks
    env = make_env(args.env)
    args.env = env.spec.id
    args.cost_limit = find_cost_limit(env, args.cost_limit)
    given = load_policy(args.policy, args.env) if args.policy else None
    data = find_dataset(args, env)
    dataset = load_dataset(data, env, with_costs=not args.preferences)
    returns = dataset.sums(dataset.rewards)
    points = {}  # of the picture
    if args.preferences:
        preferences = read_preferences(args.preferences, len(returns))
    else:
        costs = dataset.sums(dataset.costs)
        numbers = args.preferred, args.dispreferred, args.seed
        preferences = draw_preferences(costs, args.cost_limit, *numbers)
        points = {label: (costs[i], returns[i]) for label, i in preferences.items()}
    dataset = dataset._replace(costs=None)  # from here on no training can read a cost

    files = {"dataset": data, "preferences": args.preferences, "policy": args.policy}
    folder = find_folder(args, files)
    if (folder / "metrics.json").exists():
        print(f"{folder} is complete; delete it to run again")
        return print_table(folder)
    limit_text = f"cost limit {args.cost_limit:g}"
    labels = ", ".join(f"{len(indices)} {label}" for label, indices in preferences.items())
    print(f"{labels} of {len(returns)} episodes, {limit_text}")

    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder)
    path = folder / "pretrained.pt"
    policy = stage(path, args, lambda: given or pretrain(dataset, env.action_space, args, writer))
    policy.to(args.device)
    path = folder / "finetuned.pt"
    aligned = stage(path, args, lambda: finetune(policy, dataset, preferences, args, writer))

    options = args.env, args.eval_episodes, args.seed, args.cost_limit, args.workers
    before = evaluate(policy.cpu(), *options, "evaluating pre-trained")
    after = evaluate(aligned, *options, "evaluating fine-tuned")
    for stage_number, metrics in enumerate([before, after]):
        writer.add_scalar("evaluation/return_mean", metrics["return_mean"], stage_number)
        writer.add_scalar("evaluation/cost_mean", metrics["cost_mean"], stage_number)
    writer.close()
    source = "scripted" if args.dataset == "scripted" else data.name
    title = f"{args.env}, {source}, {limit_text}"
    points["pre-trained policy"] = before["costs"], before["returns"]
    points["fine-tuned policy"] = after["costs"], after["returns"]
    draw_report(folder / "report.png", f"{title}, seed {args.seed}", args.cost_limit, points)
    metrics = {"title": title, "pretrained": before, "finetuned": after}
    with written(folder / "metrics.json") as part:  # the last: now the run is complete
        part.write_text(json.dumps(metrics, indent=2))
    print_table(folder)
    change = f"cost {before['cost_mean']:.4g} → {after['cost_mean']:.4g}, {limit_text}"
    change += f"; return {before['return_mean']:.4g} → {after['return_mean']:.4g}"
    print(f"\n{change}; picture: {folder / 'report.png'}")


def main(argv=None):
    """Run the command line. The exit code is 2 for bad input, 130 when interrupted."""
    try:
        args = parse_args(argv)
        print_table(args.summary) if args.summary else run(args)
    except (UserError, OSError, csv.Error, gymnasium.error.Error, ModuleNotFoundError) as error:
        print(f"prefine.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prefine.py: interrupted; the same command goes on at this stage", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
