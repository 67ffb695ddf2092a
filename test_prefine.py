"""Tests of prefine.py, claim by claim, and its speed figures.

    bash run_all.sh test                    # all of them, a few minutes on two cores
    bash run_all.sh test -m fast            # policy, loss and fine-tuning, in seconds
    bash run_all.sh bench [--quick]         # ratios; --quick: with a tenth of the data set
    bash run_all.sh bench --osrl            # beside OSRL's BC-Safe and CPQ, many minutes

Nothing that can be run is mocked. The dsrl cache of whoever runs this is never touched.
"""

import contextlib
import copy
import csv
import functools
import http.server
import importlib
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from torch.distributions import Normal, kl_divergence

import prefine

HERE = Path(__file__).parent
BALL, BALL_RUN_ID = "OfflineBallCircle-v0", "OfflineBallRun-v0"
ROWS, EPISODE = 60, 20  # of the small files made here
BOX = torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 1.0])
INFINITE = BOX[0] * math.inf, BOX[1] * math.inf
BOX_SPACE = Box(-1, 1, (2,))
fast = pytest.mark.fast
torch.set_num_threads(1)  # more are slower for such small networks


# ---------------------------------------------------------------------------------------- helpers
def flags(text=""):
    return prefine.parse_args(text.split())


def run(*texts):
    """``prefine.py`` with the flags of the texts, in this process; its exit code."""
    return prefine.main(" ".join(map(str, texts)).split())


def command(*line, **options):
    """Run Python as a user does: exit code, standard output and standard error."""
    line = [sys.executable, *map(str, line)]
    return subprocess.run(line, capture_output=True, text=True, **options)


def same(one, other):
    """If two policies agree bit for bit."""
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def toy_dataset(episodes=12, steps=10):
    """Observations [N, 3], actions [N, 2]; even episodes are safe, the return grows with e."""
    rng = np.random.default_rng(0)
    episode = np.repeat(np.arange(episodes), steps)
    side = np.where(episode % 2 == 0, 0.5, -0.5)  # safe episodes go right, unsafe ones left
    actions = np.clip(side[:, None] + 0.2 * rng.normal(size=(len(episode), 2)), -1, 1)
    last = np.arange(1, len(episode) + 1) % steps == 0
    rewards = episode / 10 + rng.uniform(size=len(episode))
    arrays = rng.normal(size=(len(episode), 3)), actions, rewards, np.zeros(len(episode)), last
    return prefine.make_dataset(*arrays, costs=episode % 2)


LABELS = {"preferred": [0, 2, 4, 6], "dispreferred": [1, 3, 5, 7]}


def toy_policy():
    torch.manual_seed(0)
    return prefine.GaussianPolicy(*BOX, np.zeros(3), np.ones(3), [16])


class Own(torch.nn.Module):
    """A policy that is none of ours: a linear mean, one std for all states; what it returns."""

    def __init__(self, observations=3, actions=2, output=lambda mean, std: (mean, std)):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(observations, actions)
        self.log_std = torch.nn.Parameter(torch.zeros(actions))
        self.register_buffer("low", torch.full((actions,), -math.inf))
        self.register_buffer("high", torch.full((actions,), math.inf))
        self.output = output

    def forward(self, observations):
        mean = self.layer(observations)
        return self.output(mean, self.log_std.exp().expand(mean.shape))


SMALL = "--hidden 16 --batch-size 32 --pretrain-top 0.5 "
TRAIN = SMALL + "--pretrain-updates 40 --finetune-updates 40 "


def small_arrays():
    """The arrays of a small, valid data set of BallCircle."""
    rng = np.random.default_rng(0)
    arrays = {
        "observations": rng.normal(size=(ROWS, 8)).astype(np.float32),
        "next_observations": rng.normal(size=(ROWS, 8)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (ROWS, 2)).astype(np.float32),
        "rewards": rng.normal(size=ROWS).astype(np.float32),
        "costs": rng.integers(0, 2, ROWS).astype(np.float32),
        "terminals": np.zeros(ROWS, bool),
    }
    return arrays | {"timeouts": np.arange(1, ROWS + 1) % EPISODE == 0}


def write_hdf5(path, arrays):
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file.create_dataset(key, data=value, compression="gzip")
    return path


def record(path, env, episodes):
    """Write a data set of random pushes; its path."""

    def controller(env, seed):
        rng = np.random.default_rng(seed)
        push = rng.uniform(-1, 1, 2)
        return lambda observation: push + 0.5 * rng.normal(size=2)

    runs = prefine.run_episodes(env, controller, range(episodes), 2, "test")
    return write_hdf5(path, {key: np.concatenate([e[key] for e in runs]) for key in prefine.KEYS})


WALK = '''
import gymnasium
import numpy as np


class Walk(gymnasium.Env):
    """A point in the plane: going right earns reward, and cost beyond 1."""

    observation_space = gymnasium.spaces.Box(-100, 100, (3,))
    action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.position = 0, np.append(0.1 * self.np_random.normal(size=2), 0)
        return self.position.astype(np.float32), {}

    def step(self, action):
        self.steps, self.position = self.steps + 1, self.position + 0.3 * np.append(action, 0)
        info = {"cost": float(self.position[0] > 1)}
        return self.position.astype(np.float32), float(action[0]), False, self.steps == 20, info


class Free(Walk):
    def step(self, action):
        return *super().step(action)[:4], {}
'''
REGISTER = """
for name in "Walk", "Free":
    gymnasium.register(f"{name}-v0", entry_point=f"walks:{name}")
"""


@pytest.fixture(scope="session")
def walks(tmp_path_factory):
    """The package of the texts above, and an empty dsrl cache, here and where processes start."""
    folder = tmp_path_factory.mktemp("session")
    (folder / "walks.py").write_text(WALK + REGISTER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.setenv("DSRL_DATASET_DIR", str(folder))
        patch.syspath_prepend(folder)
        yield importlib.import_module("walks")


@pytest.fixture(scope="session")
def ball(walks):
    return prefine.make_env(BALL)


# ----------------------------------------------------------------------------------------- policy
@fast
@pytest.mark.parametrize("action", [-1.5, -1.0, -0.999, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("std", [1.0, 0.1, 1e-2, 1e-3, 1e-4])
def test_log_prob_and_gradients_are_those_of_a_clipped_normal_in_float64(std, action):
    def exact(mean, std):
        inside = Normal(mean, std).log_prob(torch.tensor(action, dtype=torch.float64))
        bound = math.copysign(1, action)
        return inside if abs(action) < 1 else torch.special.log_ndtr((bound * mean - 1) / std)

    def ours(mean, std):
        return prefine.gaussian_log_prob(mean, std, torch.full((6, 1), action), -one, one)

    results, one = [], torch.ones(1)
    for dtype, log_prob in (torch.float64, exact), (torch.float32, ours):
        means = torch.tensor([-0.999, -0.5, 0.0, 0.5, 0.99, 0.9999], dtype=dtype)[:, None]
        inputs = [means.requires_grad_(True), torch.full_like(means, std, requires_grad=True)]
        values = log_prob(*inputs)
        results.append((values.flatten(), *torch.autograd.grad(values.sum(), inputs)))
    for expected, found in zip(*results):
        torch.testing.assert_close(found.double(), expected, rtol=0.01, atol=1e-5)


@fast
def test_a_checkpoint_is_self_contained(tmp_path):
    low, high = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 1.0])
    policy = prefine.GaussianPolicy(low, high, np.arange(3), np.full(3, 2.0), [8, 4])
    path = tmp_path / "policy.pt"
    prefine.save_policy(path, BALL, policy)
    assert same(policy, prefine.load_policy(path, BALL))
    with pytest.raises(prefine.UserError, match=f"{BALL_RUN_ID}; found one of {BALL}"):
        prefine.load_policy(path, BALL_RUN_ID)
    with pytest.raises(prefine.UserError, match="save_policy.. is for a GaussianPolicy"):
        prefine.save_policy(path, BALL, Own())
    with pytest.raises(prefine.UserError, match="none/policy.pt: not written: "):
        prefine.save_policy(tmp_path / "none" / "policy.pt", BALL, policy)


@fast
@pytest.mark.parametrize("content", ["code", "empty", "text", "pickle", "cut"])
def test_what_is_no_checkpoint_is_refused_never_run_and_never_to_be_deleted(tmp_path, content):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    path = tmp_path / "policy.pt"
    prefine.save_policy(path, BALL, toy_policy())
    if content == "code":
        torch.save({"env": BALL, "state": Harm()}, path)
    others = {"empty": b"", "text": b"no checkpoint", "pickle": b"\x80\x02}."}
    path.write_bytes(others.get(content, path.read_bytes()[: -500 if content == "cut" else None]))
    with pytest.raises(prefine.UserError, match="policy.pt: needs a checkpoint of") as caught:
        prefine.load_policy(path, BALL)
    assert "pass another file" in str(caught.value) and "delete" not in str(caught.value)
    assert not (tmp_path / "harm").exists()


# ----------------------------------------------------------- counterfactuals, log-ratios, the loss
@fast
def test_samples_are_those_of_the_clipped_gaussian_and_carry_no_gradient():
    mean = torch.tensor([0.9, -0.2]).expand(50_000, 2).clone().requires_grad_(True)
    std = torch.full((50_000, 2), 0.5)
    torch.manual_seed(0)
    samples = prefine.sample_actions(mean, std, *BOX)
    assert not samples.requires_grad and samples.abs().max() <= 1
    at_most_1 = Normal(0.9, 0.5).cdf(torch.tensor(1.0)).item()
    assert (samples[:, 0] == 1).float().mean().item() == pytest.approx(1 - at_most_1, abs=0.01)


@fast
def test_the_loss_is_the_sum_of_its_two_halves_and_tends_to_that_of_beta_0():
    winner, loser = torch.randn(2, 1000, dtype=torch.float64)
    lead = winner - loser
    for beta in 1e-6, 0.1, 1, 10:
        imitates, retains = -lead / 2, torch.log(2 * torch.cosh(beta * lead / 2)) / beta
        found = prefine.preference_loss(winner, loser, beta)
        torch.testing.assert_close(found, imitates + retains)
    small = prefine.preference_loss(winner, loser, 1e-6) - math.log(2) / 1e-6
    torch.testing.assert_close(prefine.preference_loss(winner, loser, 0), small, atol=1e-5, rtol=0)


@fast
def test_at_beta_0_the_expected_gradient_is_half_of_imitations():
    """As the policy's own samples, clipped ones too, have a score of mean 0."""
    shape = 400_000, 2
    mean = torch.tensor([0.8, -0.3], requires_grad=True)
    std = torch.tensor([0.5, 0.9], requires_grad=True)
    gaussian, reference = (mean.expand(shape), std.expand(shape)), torch.ones(2, *shape)
    torch.manual_seed(0)
    counterfactual = prefine.sample_actions(*gaussian, *BOX)
    actions = torch.tensor([1.0, 0.2]).expand(shape)
    h, h_own = (prefine.log_ratio(gaussian, reference, x, *BOX) for x in (actions, counterfactual))
    imitation = torch.autograd.grad(-h.mean(), [mean, std], retain_graph=True)
    found = torch.autograd.grad(prefine.preference_loss(h, h_own, 0).mean(), [mean, std])
    for one, other in zip(found, imitation):
        torch.testing.assert_close(one, other / 2, atol=0.01, rtol=0)


@functools.cache
def toy_optimum(text):
    """Mean and std that fine-tuning ends with, where the best is known: preferred actions are
    N(1, 0.5^2), the reference policy is N(0, 1)."""
    torch.manual_seed(0)
    quantiles = (torch.randperm(4000) + 0.5) / 4000
    actions = Normal(1.0, 0.5).icdf(quantiles.repeat(2))
    zeros, last = np.zeros(8000), np.arange(8000) % 4000 == 3999
    dataset = prefine.make_dataset(zeros[:, None], actions[:, None], zeros, zeros, last)
    policy = Own(1, 1)
    torch.nn.init.zeros_(policy.layer.bias)
    text += " --leave-out 0 --finetune-lr 0.05 --finetune-updates 300 --batch-size 512"
    labels = {"preferred": [0], "dispreferred": [1]}
    mean, std = prefine.finetune(policy, dataset, labels, flags(text))(torch.zeros(1, 1))
    return mean.item(), std.item()


@fast
def test_beta_0_reaches_the_preferred_distribution():
    assert toy_optimum("--beta 0") == pytest.approx((1.0, 0.5), abs=0.04)


@fast
def test_the_distance_to_the_reference_falls_as_beta_grows():
    """The numbers are another program's, of the same loss."""
    numbers = {0: (1, 0.5), 0.1: (0.975, 0.519), 1: (0.799, 0.634), 10: (0.284, 0.888)}
    distances = []
    for beta, expected in numbers.items():
        assert toy_optimum(f"--beta {beta}") == pytest.approx(expected, abs=0.04)
        policy = Normal(*toy_optimum(f"--beta {beta}"))
        distances.append(kl_divergence(policy, Normal(0.0, 1.0)).item())
    assert distances == sorted(distances, reverse=True) and distances[-1] < 0.1 * distances[0]


@fast
@pytest.mark.parametrize("beta", [1, 2])
def test_with_the_references_samples_the_optimum_is_the_tilted_reference(beta):
    """pi_ref (p / pi_ref)^(1 / beta): of Gaussians, precisions and their means are added."""
    precision = 1 + (1 / 0.25 - 1) / beta
    expected = 1 / 0.25 / beta / precision, precision**-0.5
    assert toy_optimum(f"--loser reference --beta {beta}") == pytest.approx(expected, abs=0.04)


# ------------------------------------------------------------------------------------ preferences
@fast
def test_preferences_are_drawn_by_cost_alone_and_on_the_right_side_of_the_limit():
    costs = np.random.default_rng(0).integers(0, 21, 100).astype(float)
    costs[:5] = 10.0  # exactly at the limit is safe
    preferences = prefine.draw_preferences(costs, 10, 20, 15, 0)
    for label, episodes in preferences.items():
        assert ((costs[episodes] > 10) == (label == "dispreferred")).all()
    assert [len(set(preferences[label])) for label in LABELS] == [20, 15]
    other = prefine.draw_preferences(costs, 10, 20, 15, 1)
    assert set(other["preferred"]) != set(preferences["preferred"])
    for preferred, dispreferred in (1000, 1), (1, 1000):
        sentence = f"--preferred {preferred}, --dispreferred {dispreferred}: .. of 100 .*--cost-lim"
        with pytest.raises(prefine.UserError, match=sentence):
            prefine.draw_preferences(costs, 10, preferred, dispreferred, 0)


def write_preferences(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("episode", "label"), *rows])
    return path


@fast
def test_labels_of_a_file_are_those_written_and_rows_without_one_are_counted(tmp_path, capsys):
    rows = [(3, "preferred"), (0, "dispreferred"), (7, "dispreferred"), (1, "preferred")]
    paths = [write_preferences(tmp_path / "labels.csv", rows), tmp_path / "sheet.csv"]
    # A spreadsheet begins its file with a mark of the encoding.
    text = "Episode, Label ,why\n 3 , Preferred,good\n\n0,DISPREFERRED ,\n7,dispreferred,\n"
    paths[1].write_text(text + "1,preferred,\n5,,\n6\n2, ,unsure\n", encoding="utf-8-sig")
    for path in paths:
        found = prefine.read_preferences(path, 8)
        assert [found[label].tolist() for label in LABELS] == [[3, 1], [0, 7]]
    assert capsys.readouterr().out == f"{paths[1]}: rows without a label, skipped: 3\n"


@fast
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("episode,label\n3,preferred\n\n,\n2,good\n", "line 5: found '2', 'good'; needs"),
        ("episode,label\n8,preferred\n", "line 2: .*'8'.*; needs an episode from 0 to 7"),
        ("episode,label\n1.5,preferred\n", "line 2: found '1.5'.*; needs an episode from"),
        ("episode,label\n3,preferred\n3,dispreferred\n", "line 3: found '3'.*each once"),
        ("id,label\n0,preferred\n", r"needs the columns episode and label.*\['id', 'label'\]"),
        ("", "needs the columns episode and label"),
        ("episode,label\n3,preferred\n", "no trajectory is dispreferred; both labels are needed"),
    ],
)
def test_a_mistake_in_a_label_file_is_named_with_its_line(tmp_path, text, sentence):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(prefine.UserError, match=sentence):
        prefine.read_preferences(path, 8)


@fast
@pytest.mark.parametrize("kind", [tuple, np.array, np.uint8, np.uint64, torch.tensor])
def test_labels_are_indices_of_any_library(kind):
    labels = {label: kind(episodes) for label, episodes in LABELS.items()}
    checked = prefine.check_preferences(labels, 12)
    assert {label: episodes.tolist() for label, episodes in checked.items()} == LABELS


PREFERRED_NEEDS = "'preferred' needs indices from 0 to 11, as np.flatnonzero"


@fast
@pytest.mark.parametrize(
    ("preferred", "dispreferred", "sentence"),
    [
        ([0], [], "no trajectory is dispreferred"),
        ([0, 12], [1], PREFERRED_NEEDS),
        ([0], [-1], "'dispreferred' needs indices from 0 to 11"),
        ([True] * 12, [1], PREFERRED_NEEDS),
        (torch.ones(12) > 0, [1], PREFERRED_NEEDS),
        ([0.0, 2.0], [1], PREFERRED_NEEDS),
        ([[0, 2], [4, 6]], [1], PREFERRED_NEEDS),
        ([0, 2], [2, 3], "an episode is labelled twice"),
        ([0, 0], [1, 3], "an episode is labelled twice"),
    ],
)
def test_labels_from_python_are_refused_in_words(preferred, dispreferred, sentence):
    labels = {"preferred": preferred, "dispreferred": dispreferred}
    with pytest.raises(prefine.UserError, match=sentence):
        prefine.finetune(toy_policy(), toy_dataset(), labels, flags(TRAIN))


@fast
@pytest.mark.parametrize("constant", [0.0, 9.81, 1e5])  # such as gravity, which simulators observe
def test_a_preferred_trajectory_that_looks_dispreferred_is_left_out_and_named(constant, capsys):
    dataset, right, wrong = toy_dataset(episodes=16, steps=30), [*range(2, 16, 2)], 1
    dataset.observations[:, 0] = constant  # must not drown the distances
    labels = {"preferred": np.array([*right, wrong]), "dispreferred": np.array([0, 3, 5, 7, 9, 11])}
    shares = prefine.dispreferred_shares(dataset, *labels.values())
    assert shares.shape == (8,) and shares[-1] > 0.6 and (shares[:-1] < 0.4).all()
    assert prefine.choose_preferred(dataset, labels, 0.15).tolist() == right
    output = capsys.readouterr().out
    assert re.search(r"left out.* dispreferred.*\b1\n", output) and "warning" not in output
    assert wrong in prefine.choose_preferred(dataset, labels, 0)
    assert capsys.readouterr().out == "" and len(prefine.choose_preferred(dataset, labels, 1)) == 1


def scattered_dataset(centres):
    """An episode of 50 steps around the points of each tuple in turn; observations are points."""
    rng = np.random.default_rng(0)
    points = np.concatenate([np.resize(row, (50, 1)) for row in centres])
    points = points + 0.1 * rng.normal(size=points.shape)
    last = np.arange(1, len(points) + 1) % 50 == 0
    zeros = np.zeros(len(points))
    return prefine.make_dataset(points, zeros[:, None], zeros, zeros, last)


@fast
def test_wrong_labels_that_vouch_for_one_another_pass_the_first_look_and_not_the_second():
    right, wrong, dispreferred = (0.0,), (5.0, 9.0, 9.0), (5.0,)  # at 9 are the wrong ones alone
    dataset = scattered_dataset([right] * 16 + [wrong] * 4 + [dispreferred] * 5)
    labels = {"preferred": np.arange(20), "dispreferred": np.arange(20, 25)}
    shares = prefine.dispreferred_shares(dataset, *labels.values())
    assert (shares[:16] == 0).all() and (shares[16:] > 0.2).all() and (shares[16:] < 0.5).all()
    # The first look leaves out a share by rank: 3 of the 20, one wrong one too few.
    assert prefine.choose_preferred(dataset, labels, 0.15).tolist() == [*range(16)]


@fast
def test_labels_that_say_little_are_warned_of_and_half_of_the_rest_stays(capsys):
    dataset = scattered_dataset([(0.0,)] * 40)
    labels = {"preferred": np.arange(20), "dispreferred": np.arange(20, 40)}
    chosen = prefine.choose_preferred(dataset, labels, 0.15)
    assert 8 <= len(chosen) <= 17 and set(chosen) < set(range(20))
    warning = re.search(r"^warning: (\d+)% .*look dispreferred, of 50%", capsys.readouterr().out)
    assert 40 < int(warning[1]) < 60


@fast
def test_the_best_by_return_are_so_many_and_one_at_least():
    dataset, episodes = toy_dataset(), np.array([2, 3, 5, 6, 7, 11])
    dataset.rewards[:] = torch.arange(12).repeat_interleave(10) % 7
    for number, best in (2.6, [6, 5, 11]), (0.1, [6]), (9, [6, 5, 11, 3, 2, 7]):
        assert prefine.best_by_return(dataset, episodes, number).tolist() == best


# --------------------------------------------------------------------- pre-training, fine-tuning
@fast
def test_pretraining_imitates_the_best_episodes_by_return():
    dataset = toy_dataset(episodes=10, steps=100)
    for episode in (2, 4):  # the others go left, or are worse
        dataset.rewards[dataset.starts[episode] : dataset.ends[episode]] = 9
    text = "--hidden 16 --pretrain-top 0.2 --pretrain-updates 300 --pretrain-lr 0.01"
    mean, std = prefine.pretrain(dataset, BOX_SPACE, flags(text))(dataset.steps([2, 4])[0])
    torch.testing.assert_close(mean.mean(0), torch.full((2,), 0.5), atol=0.08, rtol=0)
    torch.testing.assert_close(std.mean(0), torch.full((2,), 0.22), atol=0.05, rtol=0)


@fast
@pytest.mark.parametrize("loser", prefine.LOSERS)
def test_updates_are_steps_of_adam_on_the_loss_of_the_docstring(loser):
    dataset, policy = toy_dataset(), Own()
    text = f"--finetune-updates 3 --finetune-lr 0.05 --batch-size 64 --beta 2 --loser {loser}"
    text += " --leave-out 0 --finetune-top 0.5"
    aligned = prefine.finetune(policy, dataset, LABELS, flags(text))

    # Again, from the formulas; the best half by return of the preferred is episodes 6 and 4.
    states, actions = dataset.steps([6, 4])
    other_states, other_actions = dataset.steps(LABELS["dispreferred"])
    mine, reference = Own(), Own()
    optimizer = torch.optim.Adam(mine.parameters())
    torch.manual_seed(0)
    for update in range(3):
        batch = torch.randint(20, (64,))
        pi, pi_ref = Normal(*mine(states[batch])), Normal(*reference(states[batch]))
        h = pi.log_prob(actions[batch]) - pi_ref.log_prob(actions[batch])
        if loser == "dispreferred":
            other = torch.randint(40, (64,))
            pi, pi_ref = Normal(*mine(other_states[other])), Normal(*reference(other_states[other]))
            c = other_actions[other]
        else:
            source = pi if loser == "policy" else pi_ref
            c = source.mean + source.stddev * torch.randn(64, 2)
            c = c.detach()  # no gradient flows through the sample
        h_c = pi.log_prob(c) - pi_ref.log_prob(c)
        loss = (-torch.log(torch.sigmoid(2 * (h - h_c).sum(1))) / 2).mean()
        optimizer.param_groups[0]["lr"] = 0.025 * (1 + math.cos(math.pi * update / 3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for found, expected in zip(aligned.parameters(), mine.parameters()):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert same(policy, Own()) and all(x.grad is None for x in policy.parameters())


@fast
@pytest.mark.parametrize("method", prefine.METHODS)
def test_only_dpo_learns_from_a_dispreferred_step(method):
    """In the others dispreferred trajectories choose which of the preferred count, and no more."""
    policy, dataset = toy_policy(), toy_dataset()
    changed = dataset._replace(actions=dataset.actions.clone())
    for episode in LABELS["dispreferred"]:
        changed.actions[dataset.starts[episode] : dataset.ends[episode]] -= 0.1
    text = flags(f"{SMALL} --finetune-updates 20 --method {method} --leave-out 0")
    results = [prefine.finetune(policy, each, LABELS, text) for each in (dataset, changed)]
    assert same(*results) == (method != "dpo") and not same(results[0], policy)


@fast
def test_training_repeats_bit_for_bit_whatever_the_costs_and_depends_on_the_seed():
    dataset, policy = toy_dataset(), toy_policy()
    runs = []
    for costs, seed in (dataset.costs, 5), (dataset.costs * math.nan, 5), (None, 5), (None, 6):
        data, args = dataset._replace(costs=costs), flags(f"{TRAIN} --seed {seed}")
        pretrained = prefine.pretrain(data, BOX_SPACE, args)
        runs.append((pretrained, prefine.finetune(policy, data, LABELS, args)))
    for one, *again, other in zip(*runs):
        assert all(same(one, each) for each in again) and not same(one, other)


# ----------------------------------------------------------------------------- anybody's policies
@fast
def test_frozen_layers_stay_and_dropout_and_batch_statistics_rest():
    class Mine(Own):
        def __init__(self):
            super().__init__()
            self.frozen = torch.nn.Linear(3, 3).requires_grad_(False)
            self.noisy = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5))

        def forward(self, observations):
            return super().forward(self.noisy(self.frozen(observations)))

    policy, before = Mine(), Mine()
    one, other = (prefine.finetune(policy, toy_dataset(), LABELS, flags(TRAIN)) for _ in range(2))
    assert same(one, other) and same(one.frozen, policy.frozen) and not one.training
    assert torch.equal(one.noisy[0].running_mean, policy.noisy[0].running_mean)
    assert not same(one.layer, policy.layer) and same(policy, before) and policy.training


def own_with(**attributes):
    policy = Own()
    for name, value in attributes.items():
        if hasattr(policy, name):
            delattr(policy, name)
        setattr(policy, name, value)
    return policy


def returning(output):
    return lambda: Own(output=output)


POLICIES = {  # what a policy may be, and whether fine-tuning, and evaluation, can use it
    "a tuple": (Own, True, True),
    "compiled": (lambda: torch.compile(Own(), backend="eager"), True, True),
    "TorchScript": (lambda: torch.jit.trace(Own(), torch.zeros(2, 3)), False, True),
    "the mean alone": (returning(lambda mean, std: mean), False, True),
    "three values": (returning(lambda mean, std: (mean, std, std)), False, True),
    "a number for std": (returning(lambda mean, std: (mean, 0.5)), False, True),
    "(mean, log std)": (returning(lambda mean, std: (mean, -std)), False, True),
    "float64": (lambda: Own().double(), False, True),
    "half precision": (lambda: Own().half(), False, True),
    "no bounds": (lambda: own_with(high=None), False, True),
    "numbers as bounds": (lambda: own_with(low=-1.0, high=1.0), False, True),
    "arrays as bounds": (lambda: own_with(low=-np.ones(2), high=np.ones(2)), False, True),
    "a wrapper": (lambda: torch.nn.Sequential(Own()), False, True),
    "a result kept within": (lambda: own_with(last=Own().log_std.exp()), False, True),
    "a distribution": (returning(Normal), False, False),
    "a dictionary": (returning(lambda mean, std: {"mean": mean, "std": std}), False, False),
    "NaN": (returning(lambda mean, std: (mean * math.nan, std)), False, False),
    "one action for two": (lambda: Own(3, 1), False, False),
    "three actions for two": (lambda: Own(3, 3), False, False),
}


@fast
@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("kind", POLICIES)
def test_a_policy_works_or_one_sentence_says_what_is_needed(kind, walks):
    make, can_finetune, can_evaluate = POLICIES[kind]

    def finetune(policy):
        text = flags(SMALL + "--finetune-updates 20")
        return prefine.finetune(policy, toy_dataset(), LABELS, text)(torch.ones(1, 3))

    def evaluate(policy):
        return prefine.evaluate(policy, walks.Walk, episodes=2, cost_limit=5)["returns"]

    needs = r"policy needs buffers low and high.*tuple \(mean, std\).*; found: .*\.$"
    shape = r"policy needs to return a finite mean \(1, 2\); found .*\.$"
    for work, can, sentence in (finetune, can_finetune, needs), (evaluate, can_evaluate, shape):
        if can:
            for found, expected in zip(work(make()), work(Own())):
                torch.testing.assert_close(found, expected, atol=0.1, rtol=0)
        else:
            with pytest.raises(prefine.UserError, match=sentence) as caught:
                work(make())
            assert "\n" not in str(caught.value)
            is_kept = kind == "a result kept within" and work is finetune
            assert ("save it and load it" in str(caught.value)) == is_kept


class Constant(torch.nn.Module):
    """A policy that always pushes alike, in evaluation, and insists on a batch of observations."""

    def __init__(self, *action):
        super().__init__()
        self.action = torch.nn.Parameter(torch.tensor(action))

    def forward(self, observations):
        assert observations.ndim == 2 and not self.training
        return self.action.expand(len(observations), -1)


def test_an_evaluation_of_a_task_of_dsrl_has_its_limit_and_normalised_scores(ball):
    found = prefine.evaluate(Constant(1.0, 0.0), "OfflineBallRun", episodes=3, workers=2)
    env = prefine.make_env(BALL_RUN_ID).unwrapped
    env.set_target_cost(10)
    scores = env.get_normalized_score(np.mean(found["returns"]), np.mean(found["costs"]))
    assert (found["normalized_return"], found["normalized_cost"]) == pytest.approx(scores)
    assert found["violation_rate"] == np.mean(np.array(found["costs"]) > 10)
    assert found["return_mean"] == pytest.approx(np.mean(found["returns"]))


# ------------------------------------------------------------------------ anybody's environments
@fast
def test_any_environment_is_evaluated_with_its_own_cost_and_limit(walks):
    environments = "walks:Walk-v0", walks.Walk, lambda: gymnasium.make("Walk-v0")
    for action, score in (1.0, 20), (-1.0, -20):
        policy = Constant(action, 0.0)
        found = [prefine.evaluate(policy, env, 3, cost_limit=5) for env in environments]
        assert found[0] == found[1] == found[2] and found[0]["return_mean"] == score
        assert found[0]["violation_rate"] == (action == 1) and found[0]["failure_rate"] == 0
        assert "normalized_return" not in found[0]


def test_a_function_that_makes_the_wrapped_environment_normalises_what_a_policy_sees(walks):
    """A policy of normalised observations is there what one of raw ones is that normalises."""
    mean, std = np.float32([0.5, 0.2, 0]), np.float32([3, 0.1, 1])
    policy = prefine.GaussianPolicy(*BOX, mean, std, [16])
    inner = copy.deepcopy(policy)
    inner.mean, inner.std = torch.zeros(3), torch.ones(3)

    def wrapped():
        return gymnasium.wrappers.TransformObservation(walks.Walk(), lambda x: (x - mean) / std)

    expected = prefine.evaluate(policy, walks.Walk, cost_limit=5)["returns"]
    for env, is_right in (wrapped, True), (walks.Walk, False):
        found = prefine.evaluate(inner, env, cost_limit=5, workers=2)["returns"]
        assert (found == pytest.approx(expected, abs=1e-3)) == is_right


@fast
@pytest.mark.parametrize(
    ("name", "space", "sentence"),
    [
        ("action", Discrete(2), r"need a flat Box.*found Discrete\(2\)"),
        ("action", Box(-np.inf, np.inf, (2,)), "need a flat Box, of actions with finite bounds"),
        ("action", Box(0, np.inf, (2,)), "need a flat Box, of actions with finite bounds"),
        ("action", Box(np.float32([0, 0]), np.float32([0, 1])), "need .* low < high"),
        ("observation", Box(0, 1, (4, 4)), "need a flat Box"),
        ("observation", Dict(x=Box(0, 1, (4,))), "need a flat Box.*Gymnasium has wrappers"),
    ],
)
def test_a_space_that_is_no_flat_box_gets_a_sentence(name, space, sentence, walks):
    other = type("Other", (walks.Walk,), {f"{name}_space": space})
    with pytest.raises(prefine.UserError, match=f"{name}s {sentence}"):
        prefine.evaluate(Constant(1.0, 0.0), other, cost_limit=5)
    if name == "action":
        with pytest.raises(prefine.UserError, match=f"actions {sentence}"):
            prefine.pretrain(toy_dataset(), space, flags(TRAIN))


@fast
def test_other_wrong_calls_get_a_sentence(walks):
    policy = Constant(1.0, 0.0)
    with pytest.raises(prefine.UserError, match="preferred"):
        prefine.finetune(toy_policy(), toy_dataset(), [(0, 1), (2, 3)], flags(TRAIN))
    with pytest.raises(prefine.UserError, match="loss is not finite; try a lower learning rate"):
        prefine.finetune(Own(), toy_dataset(), LABELS, flags(TRAIN + "--finetune-lr 1e9"))
    with pytest.raises(prefine.UserError, match="actions are 2 wide in the data, 3 here"):
        prefine.pretrain(toy_dataset(), Box(-1, 1, (3,)), flags(TRAIN))
    with pytest.raises(prefine.UserError, match="a function that makes an env.*, not an object"):
        prefine.evaluate(policy, walks.Walk(), cost_limit=5)
    with pytest.raises(prefine.UserError, match="cost_limit=.* is missing"):
        prefine.evaluate(policy, walks.Walk)
    needs = "needs a torch Module, and an episode and a worker at least"
    for options in {"episodes": 0}, {"workers": 0}, {"policy": torch.square}:
        with pytest.raises(prefine.UserError, match=needs):
            prefine.evaluate(**{"policy": policy, "env": walks.Walk, "cost_limit": 5} | options)


def test_a_whole_run_in_an_environment_of_ones_own_package(walks, tmp_path, capfd):
    path = record(tmp_path / "walk.hdf5", "walks:Walk-v0", 40)
    line = f"--dataset {path} --cost-limit 5 --preferred 10 --dispreferred 10 --hidden 16"
    line += " --pretrain-updates 300 --finetune-updates 300 --eval-episodes 4 --workers 2"
    line = ["prefine.py", "--env", "walks:Walk-v0", *line.split(), "--run-dir"]
    done = command(*line, tmp_path / "run", cwd=HERE)
    assert done.returncode == 0, done.stderr
    content = metrics(tmp_path / "run")
    before, after = (content[name]["cost_mean"] for name in ("pretrained", "finetuned"))
    assert before > 5 > after and "cost limit 5" in done.stdout
    assert run(*line[1:], tmp_path / "other", "--env walks:Free-v0") == 2
    assert "the environment gives no cost: step() must set info['cost']" in capfd.readouterr().err


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
import torch, prefine

gymnasium.register("Walk-v0", entry_point=Walk)

class Mine(torch.nn.Linear):
    def forward(self, observations):
        return torch.tanh(super().forward(observations)), 1

print(prefine.evaluate(Mine(3, 2), "Walk-v0", episodes=2, cost_limit=5, workers=2)["failure_rate"])
"""


def test_classes_and_ids_of_a_script_without_a_main_guard_reach_the_workers(tmp_path):
    done = command("-", input=WALK + SCRIPT.format(here=str(HERE)), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "0.0\n"), done.stderr


# ------------------------------------------------------------------------------------------- data
def test_a_data_set_is_cut_into_whole_episodes_and_its_actions_into_their_space(
    tmp_path, ball, capfd
):
    arrays = small_arrays()
    arrays["terminals"][4] = True
    arrays["actions"][:12] = [1.5, -7]
    arrays["timeouts"][-1] = False
    dataset = prefine.load_dataset(write_hdf5(tmp_path / "data.hdf5", arrays), ball)
    assert dataset.starts.tolist() == [0, 5, 20] and dataset.ends.tolist() == [5, 20, 40]
    output = capfd.readouterr().out
    assert "rows without an end of their episode, dropped: 20" in output
    assert re.search("actions beyond the action space, clipped.* 12 of 40 steps", output)
    arrays["actions"][:12] = [1, -1]
    for key in "observations", "actions", "rewards", "costs":
        np.testing.assert_array_equal(getattr(dataset, key).numpy(), arrays[key][:40])
    sums = [arrays["costs"][a:b].sum() for a, b in ((0, 5), (5, 20), (20, 40))]
    np.testing.assert_allclose(dataset.sums(dataset.costs), sums)
    rows = [*range(20, 40), *range(5)]
    for values, key in zip(dataset.steps([2, 0]), ("observations", "actions")):
        np.testing.assert_array_equal(values, arrays[key][rows])
    spaced, _ = dataset.steps([2], points=3)
    np.testing.assert_array_equal(spaced, arrays["observations"][[20, 29, 39]])


def equal(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other))


def test_only_the_numbers_that_are_needed_count_whatever_their_shapes_and_types(tmp_path, ball):
    arrays = small_arrays()
    plain = prefine.load_dataset(write_hdf5(tmp_path / "plain.hdf5", arrays), ball)
    arrays["next_observations"] = np.array([b"not a number"])
    assert equal(prefine.load_dataset(write_hdf5(tmp_path / "text.hdf5", arrays), ball), plain)
    del arrays["next_observations"]
    columns = {k: v[:, None] if v.ndim == 1 else v for k, v in arrays.items()}
    doubles = {k: v.astype(np.float64) for k, v in arrays.items()}
    for name, other in ("columns", columns), ("doubles", doubles):
        assert equal(prefine.load_dataset(write_hdf5(tmp_path / name, other), ball), plain)
        assert equal(prefine.make_dataset(**other), plain)  # and so does Python
    del arrays["costs"]
    path = write_hdf5(tmp_path / "costless.hdf5", arrays)
    dataset = prefine.load_dataset(path, ball, with_costs=False)
    assert dataset.costs is None and equal(dataset[:5], plain[:5])


def write_blosc(path):
    """A data set whose costs are packed by Blosc, whose filter h5py has not, or so they say."""
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_chunk((ROWS,))
    settings.set_filter(32001, h5py.h5z.FLAG_OPTIONAL, ())
    with h5py.File(path, "a") as file:
        del file["costs"]
        space = h5py.h5s.create_simple((ROWS,))
        costs = h5py.h5d.create(file.id, b"costs", h5py.h5t.NATIVE_FLOAT, space, settings)
        costs.write_direct_chunk((0,), bytes(100))


WALK_5 = "--env walks:Walk-v0 --cost-limit 5 "
BAD = {  # what is wrong: the sentence, and other flags, or other arrays of the data set
    "Minari's": ("no array 'observations'.*README has the format", {"observations": None}),
    "no costs": ("no array 'costs'.*--preferences", {"costs": None}),
    "text": ("'rewards' must be numbers", {"rewards": [b"1.0"] * ROWS}),
    "NaN": ("'observations' has.*no finite", {"observations": np.full((ROWS, 8), math.nan)}),
    "unequal lengths": ("'costs' must.*59.*of 60 obs", {"costs": np.zeros(ROWS - 1)}),
    "negative costs": ("'costs' has.*from 0", {"costs": np.full(ROWS, -1)}),
    "no end": ("no episode has an end", {"timeouts": np.zeros(ROWS)}),
    "wide actions": ("are 4 wide in the data, 2 here", {"actions": np.zeros((ROWS, 4))}),
    "narrow states": ("are 7 wide in the data, 8 here", {"observations": np.zeros((ROWS, 7))}),
    "a filter": ("'costs' needs the filter.*32001.*hdf5plugin", write_blosc),
    "another task": ("found one of OfflineBallRun", "--policy {tmp}/policy.pt"),
    "no policy": ("none.pt.*No such file.*pass another", "--policy {tmp}/none.pt"),
    "no labels": ("labels.csv", "--preferences {tmp}/labels.csv"),
    "binary labels": ("data.hdf5: needs the columns", "--preferences {tmp}/data.hdf5"),
    "a typo for scripted": ("no such file; .*scripted", "--dataset scriptd"),
    "a run folder in a file": ("data.hdf5", "--run-dir {tmp}/data.hdf5/run"),
    "an empty variable": ("--policy: an empty name", "--policy="),
    "a mistyped task": ("Did you mean.*OfflineBallCircle", "--env OfflineBalCircle-v0"),
    "no such device": ("--device nonsense: not usable", "--device nonsense"),
    "no controller": ("scripted: Walk-v0 has none; Offline", WALK_5 + "--dataset scripted"),
    "no data of DSRL's": ("--dataset is missing: DSRL has no.*Walk-v0", WALK_5 + "--dataset dsrl"),
    "no limit": ("--cost-limit .*is missing: .*Walk", "--env walks:Walk-v0"),
    "0 preferred": ("--preferred: needs 1 to", "--preferred 0"),
    "a negative limit": ("--cost-limit: needs 0 to", "--cost-limit=-1"),
    "a NaN limit": ("--cost-limit: needs 0 to", "--cost-limit nan"),
    "no workers": ("--workers: needs 1 to 1e.09; found 0", "--workers 0"),
    "no hidden unit": ("--hidden: needs 1 to 1e.09; found 0", "--hidden 8 0"),
    "a share of 5": ("--finetune-top: needs 0 to 1; f", "--finetune-top 5"),
    "a mistyped flag": ("unrecognized arguments: --bta 1; --help", "--bta 1"),
}


@pytest.mark.filterwarnings("error")  # a warning would be a line more
@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_one_sentence_and_leaves_nothing(name, tmp_path, capfd, ball, walks):
    sentence, change = BAD[name]
    prefine.save_policy(tmp_path / "policy.pt", BALL_RUN_ID, toy_policy())
    arrays = small_arrays() | (change if isinstance(change, dict) else {})
    arrays = {key: values for key, values in arrays.items() if values is not None}
    path = write_hdf5(tmp_path / "data.hdf5", arrays)
    if callable(change):
        change(path)
    line = f"--env {BALL} --dataset {path} --run-dir {tmp_path / 'run'} --preferred 1"
    text = change.format(tmp=tmp_path) if isinstance(change, str) else ""
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert run(line, "--dispreferred 1", text) == 2
    output, error = capfd.readouterr()
    assert error.count("\n") == 1 and "Traceback" not in output
    assert re.search(sentence, error), error
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert not (tmp_path / "run").exists()


def test_200_files_with_damaged_bytes_load_or_give_one_sentence(tmp_path, ball):
    path = write_hdf5(tmp_path / "data.hdf5", small_arrays())
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(200):
        damaged = bytearray(whole)
        for position in rng.integers(0, len(whole), rng.integers(1, 9)):
            damaged[position] = rng.integers(256)
        length = rng.choice([len(whole), rng.integers(len(whole))], p=[0.9, 0.1])
        path.write_bytes(bytes(damaged[:length]))
        try:
            prefine.load_dataset(path, ball)
        except prefine.UserError as error:  # any other exception is a bug
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert 20 < refused < 200


# --------------------------------------------------------------------------------------- download
@pytest.fixture
def find(ball, tmp_path, monkeypatch):
    """Finds DSRL's data at an address, or in a folder that a web server serves."""
    for folder in "cache", "served":
        (tmp_path / folder).mkdir()
    monkeypatch.setattr("dsrl.offline_env.DATASET_PATH", str(tmp_path / "cache"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "served")
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()

    def find(url):
        url = f"http://127.0.0.1:{web.server_port}{url}" if url.startswith("/") else url
        monkeypatch.setattr(ball.unwrapped, "dataset_url", url)
        return prefine.find_dataset(flags(f"--env {BALL}"), ball)

    yield find
    web.shutdown()
    web.server_close()


def test_dsrl_data_is_downloaded_once_and_what_is_no_data_may_be_deleted(find, ball, tmp_path):
    served = write_hdf5(tmp_path / "served" / "data.hdf5", small_arrays())
    path, content = find("/data.hdf5"), served.read_bytes()
    assert path == tmp_path / "cache" / "data.hdf5" and path.read_bytes() == content
    served.unlink()
    assert find("/data.hdf5") == path
    for wrong in b"<html>Please sign in</html>", content[: len(content) // 2]:
        path.unlink()
        served.write_bytes(wrong)
        with pytest.raises(prefine.UserError, match="data.hdf5: not usable.*once it is deleted"):
            prefine.load_dataset(find("/data.hdf5"), ball)


@pytest.mark.parametrize("url", ["/missing.hdf5", "http://127.0.0.1:9/data.hdf5"])
def test_a_failed_download_leaves_nothing_and_names_the_ways_on(url, find, tmp_path):
    sentence = f"{url}: not downloaded: .*--dataset FILE.*--dataset scripted"
    with pytest.raises(prefine.UserError, match=sentence) as caught:
        find(url)
    assert "\n" not in str(caught.value)
    assert all(path.suffix == ".lock" for path in (tmp_path / "cache").iterdir())


# -------------------------------------------------------------------------------------- simulators
def test_episodes_depend_on_their_seed_and_not_on_the_number_of_workers(ball):
    seeds, controller = [7, 8, 9, 10], prefine.CONTROLLERS[BALL]
    one, two = (prefine.run_episodes(BALL, controller, seeds, n, "test") for n in (1, 2))
    alone = [prefine.run_episode(BALL, controller, seed) for seed in seeds[::-1]][::-1]
    for episode, *others in zip(one, two, alone):
        assert all(equal(episode.values(), other.values()) for other in others)
    assert not np.array_equal(one[0]["rewards"], one[1]["rewards"])
    for episode in one:
        following, timeouts = episode["next_observations"], episode["timeouts"]
        assert equal(episode["observations"][1:], following[:-1]) and timeouts[-1] == timeouts.sum()


def test_a_car_button_episode_repeats_itself(ball):
    env_id = "OfflineCarButton1Gymnasium-v0"
    controller = prefine.CONTROLLERS[env_id]
    first, second = (prefine.run_episode(env_id, controller, 7) for _ in range(2))
    assert equal(first.values(), second.values()) and len(first["rewards"]) == 1000
    assert first["costs"].sum() > 0 and not first["terminals"].any()
    assert first["rewards"].sum() > 5  # it drives, and finds its goals


@pytest.mark.parametrize("env_id", prefine.BULLET)
def test_scripted_bullet_episodes_are_safe_and_unsafe_slow_and_fast(env_id, ball):
    episodes = prefine.run_episodes(env_id, prefine.CONTROLLERS[env_id], range(16), 2, "test")
    returns, costs = ([e[key].sum() for e in episodes] for key in ("rewards", "costs"))
    assert min(costs) == 0 and sum(cost > 10 for cost in costs) >= 3
    assert max(returns) > 1.5 * statistics.median(returns) > 100


# ---------------------------------------------------------------------------------- whole runs
BALL_RUN = """--env OfflineBallCircle --dataset scripted --scripted-episodes 24 --preferred 4
--dispreferred 3 --hidden 32 --pretrain-updates 300 --finetune-updates 300 --eval-episodes 2
--pretrain-top 0.3 --leave-out 0.3 --seed 1"""


@pytest.fixture(scope="session")
def ball_run(tmp_path_factory, ball):
    """A whole run by a copy of the one file in an empty folder: its folder, what it printed."""
    folder = tmp_path_factory.mktemp("empty")
    shutil.copy(HERE / "prefine.py", folder)
    done = command("prefine.py", *BALL_RUN.split(), "--workers", 2, cwd=folder)
    assert done.returncode == 0, done.stderr
    (found,) = (folder / "runs").iterdir()
    return found, done.stdout


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def check_metrics(folder, episodes):
    """The two parts of metrics.json, after a look at their names and numbers."""
    content = metrics(folder)
    assert list(content) == ["title", "pretrained", "finetuned"]
    names = "return_mean cost_mean violation_rate failure_rate returns costs normalized_return "
    for part in content["pretrained"], content["finetuned"]:
        assert list(part) == (names + "normalized_cost").split()
        assert len(part["returns"]) == len(part["costs"]) == episodes
    return content["pretrained"], content["finetuned"]


def table(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [dict(zip(rows[0], row)) for row in rows[2:]]


def test_a_whole_run_says_what_it_learns_from_and_what_it_found(ball_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, output = ball_run
    before, after = check_metrics(folder, episodes=2)
    files = {"config.json", "finetuned.pt", "metrics.json", "pretrained.pt", "report.png"}
    names = {name for name in os.listdir(folder) if not name.startswith("events.out.tfevents")}
    assert names == files and (folder / "report.png").read_bytes().startswith(b"\x89PNG")

    first = output.index("4 preferred, 3 dispreferred of 24 episodes, cost limit 10")
    assert output.index("collecting 24 scripted episodes") < first < output.index("left out")
    assert re.search(r"^left out.*\d", output, re.MULTILINE)
    (row,) = table(output)
    assert row["task, data"].startswith(f"{BALL}, ") and row["method"].startswith("prefine")
    last = output.splitlines()[-1]
    for name in "return_mean", "cost_mean":
        assert f"{before[name]:.4g} → {after[name]:.4g}" in last
    assert last.endswith("report.png")

    events = EventAccumulator(str(folder)).Reload()
    for name in "losses/pretraining", "losses/finetuning":
        assert [event.step for event in events.Scalars(name)] == [99, 199, 299]
    for name in "return_mean", "cost_mean":
        values = [event.value for event in events.Scalars(f"evaluation/{name}")]
        assert values == pytest.approx([before[name], after[name]], rel=1e-5)


def same_run(one, other):
    """If two run folders hold the same numbers, bit for bit."""
    assert metrics(one) == metrics(other)
    for name in "pretrained.pt", "finetuned.pt":
        assert same(*(prefine.load_policy(folder / name) for folder in (one, other)))


@pytest.fixture
def start():
    """Starts ``prefine.py`` in the background, in a process group of its own, open to Ctrl-C."""
    started = []

    def start(*line, **variables):
        line = [sys.executable, str(HERE / "prefine.py"), *map(str, line)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        options |= {"env": os.environ | variables, "start_new_session": True}
        options["preexec_fn"] = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        started.append(subprocess.Popen(line, **options))
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_until(condition):
    end = time.monotonic() + 600  # a test that hangs says so; a slow machine is none of its claims
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def interrupted_run(start, folder, data, seed):
    """A run interrupted in each stage, and how many files that end a stage each signal found."""
    rng, hit, signals = np.random.default_rng(seed), [], ["SIGKILL", "SIGTERM", "SIGINT"]
    line = [*BALL_RUN.split(), "--workers", 1, "--run-dir", folder]
    stage = lambda: len([*data.glob("*.hdf5"), *folder.glob("*.pt")])  # noqa: E731
    for wanted, longest in (0, 3), (0, 5), (1, 1), (2, 1), (3, 1):  # stages differ in length
        process = start(*line, DSRL_DATASET_DIR=str(data))
        wait_until(lambda p=process, n=wanted: stage() >= n or p.poll() is not None)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, longest))
        hit += [stage()] * (process.poll() is None)
        process.send_signal(getattr(signal, rng.choice(signals)))
        process.communicate()
    process = start(*line, DSRL_DATASET_DIR=str(data))
    output, error = process.communicate()
    assert process.returncode == 0 and re.search("done already|is complete", output), error
    return hit


def test_10_interruptions_at_random_moments_change_no_number(ball_run, start, tmp_path):
    """In collection, pre-training, fine-tuning and evaluation, by three signals."""
    jobs = [(start, tmp_path / f"run{i}", tmp_path / f"data{i}", i) for i in range(2)]
    with ThreadPoolExecutor(2) as pool:
        hit = sum(pool.map(interrupted_run, *zip(*jobs)), [])
    for _, folder, data, _ in jobs:
        same_run(folder, ball_run[0])
        assert len(list(data.glob("*.hdf5"))) == 1
    assert 0 in hit and max(hit) > 1 and len(hit) > 6  # a few may come just after the end


def processes(leader, text=b""):
    """The processes of the group of this number that run, with a text in their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            is_running = int(fields[2]) == leader and fields[0] != "Z"
            if is_running and text in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return found


MOMENTS = [("worker", 3), ("main", 0), ("main", 1), ("Ctrl-C", 0.5), ("Ctrl-C", 3)]


@pytest.mark.parametrize(("victim", "pause"), MOMENTS)
def test_a_killed_process_is_reported_and_leaves_no_other(victim, pause, start, ball_run, tmp_path):
    """Also where a worker has only just been started, so many seconds ago."""
    line = [*BALL_RUN.split(), "--workers", 2, "--eval-episodes", 400, "--finetune-updates", 100]
    process = start(*line, "--run-dir", tmp_path / "run")
    wait_until(lambda: processes(process.pid, b"LokyProcess"))
    time.sleep(pause)
    if victim == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    else:
        worker = processes(process.pid, b"LokyProcess")[0]
        os.kill(worker if victim == "worker" else process.pid, signal.SIGKILL)
    error = process.communicate(timeout=600)[1]
    if victim == "worker":
        assert process.returncode == 2
        assert "a worker failed" in error.splitlines()[-1] and "--workers 1" in error
    if victim == "Ctrl-C":
        assert process.returncode == 130 and "Traceback" not in error
        assert "interrupted; the same command goes on" in error
    wait_until(lambda: not processes(process.pid))
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_two_runs_at_once_collect_once_and_give_the_same_numbers(ball_run, start, tmp_path):
    """In one folder, and by another number of workers than the first run's."""
    line = [*BALL_RUN.split(), "--workers", 1, "--run-dir", tmp_path / "run"]
    both = [start(*line, DSRL_DATASET_DIR=str(tmp_path / "data")) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("collecting" in output for output in outputs) == 1
    same_run(tmp_path / "run", ball_run[0])


@pytest.fixture
def files(ball_run, tmp_path):
    """A data set, labels and a policy of ball's, and the flags of a short run of them."""
    found = {name: tmp_path / name for name in ("dataset", "policy", "preferences")}
    write_hdf5(found["dataset"], small_arrays())
    shutil.copy(ball_run[0] / "pretrained.pt", found["policy"])
    write_preferences(found["preferences"], [(0, "preferred"), (1, "dispreferred")])
    line = f"--env {BALL} --eval-episodes 1 --finetune-updates 5 --workers 1 "
    return found, line + " ".join(f"--{name} {path}" for name, path in found.items())


def test_a_run_knows_its_flags_and_the_contents_of_its_files(files, ball_run, tmp_path, capfd):
    """The same folder, but another flag, or the same name of another file: never the old result."""
    files, line = files
    line += f" --run-dir {tmp_path / 'run'}"
    assert run(line) == 0
    before = {file: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    trained = files["policy"], tmp_path / "run" / "pretrained.pt"  # taken as it is
    assert same(*(prefine.load_policy(path) for path in trained))
    labels = write_preferences(tmp_path / "labels.csv", [(2, "preferred"), (1, "dispreferred")])
    data = write_hdf5(tmp_path / "data.hdf5", small_arrays() | {"rewards": np.ones(ROWS)})
    others = {"dataset": data, "preferences": labels, "policy": ball_run[0] / "finetuned.pt"}
    for name in [*others, "beta"]:
        content = files.get(name, data).read_bytes()
        shutil.copy(others.get(name, labels), files.get(name, tmp_path / "unused"))
        capfd.readouterr()
        assert run(line, "--beta 0.2" * (name == "beta")) == 2
        sentence = "holds a run of other flags or files, see .*config.json"
        assert re.search(sentence, capfd.readouterr().err)
        assert {file: file.read_bytes() for file in (tmp_path / "run").iterdir()} == before
        files.get(name, tmp_path / "unused").write_bytes(content)


def test_one_file_by_any_name_is_one_run_and_what_a_power_cut_empties_is_named(
    files, tmp_path, monkeypatch, capfd
):
    files, line = files
    monkeypatch.chdir(tmp_path)
    shutil.copy(files["dataset"], "x.hdf5")
    shutil.copy("x.hdf5", "renamed.hdf5")
    assert run(line, "--dataset x.hdf5") == 0
    (folder,), expected = Path("runs").iterdir(), table(capfd.readouterr().out)
    times = [path.stat().st_mtime_ns for path in folder.glob("*.pt")]
    for name in "./x.hdf5", tmp_path / "x.hdf5", "renamed.hdf5":
        assert run(line, "--dataset", name) == 0
        output = capfd.readouterr().out
        assert "is complete" in output and table(output) == expected
    assert [path.stat().st_mtime_ns for path in folder.glob("*.pt")] == times
    shutil.copytree(folder, "runs/other")
    for name in "metrics.json", "config.json":
        content = (folder / name).read_text()
        (folder / name).write_text("")
        assert run("--summary runs") == 0  # of the other
        output, error = capfd.readouterr()
        assert len(table(output)) == 1 and str(folder) in error and error.count("\n") == 1
        assert run(line, "--dataset x.hdf5") == 2
        assert str(folder / name) in capfd.readouterr().err
        (folder / name).write_text(content)


def test_a_run_in_safety_gymnasium_by_labels_of_a_person_needs_no_costs(tmp_path, capfd, ball):
    path = record(tmp_path / "swimmer.hdf5", "OfflineSwimmerVelocityGymnasium-v1", 6)
    with h5py.File(path, "a") as file:
        del file["costs"]
    rows = [(episode, ["preferred", "dispreferred"][episode % 2]) for episode in range(6)]
    labels = write_preferences(tmp_path / "labels.csv", rows)
    line = f"--env OfflineSwimmerVelocity --dataset {path} --preferences {labels} --hidden 32"
    line += " --pretrain-updates 200 --finetune-updates 200 --eval-episodes 2 --workers 2"
    assert run(line, "--run-dir", tmp_path / "run") == 0
    assert "3 preferred, 3 dispreferred of 6 episodes" in capfd.readouterr().out
    assert (tmp_path / "run" / "report.png").exists() and check_metrics(tmp_path / "run", 2)


# ---------------------------------------------------------------------- the command line, the table
@fast
def test_a_method_is_a_set_of_flags_and_flags_override_it():
    assert flags("--method prefine") == flags()
    assert flags("--method dpo").loser == "dispreferred" and flags("--method dpo").leave_out == 0
    assert flags("--method dpo --loser reference").loser == "reference"
    weighted, imitation = flags("--method weighted-imitation"), flags("--method imitation")
    assert weighted.beta == imitation.beta == 0 and weighted.leave_out == flags().leave_out
    assert imitation.leave_out == 0 and imitation.finetune_top == 1
    values = ["--beta", 0.5, "--hidden", 8, 4, "--seed", np.int64(3)]
    assert prefine.parse_args(values) == flags("--beta 0.5 --hidden 8 4 --seed 3")


def fake_run(folder, config, before, after):
    """A run folder with these (return, cost), as if measured."""
    folder.mkdir(parents=True)
    preset = vars(flags(f"--method {config.get('method', 'prefine')}"))
    config = preset | {"env": BALL, "cost_limit": 10.0, "dataset": "ab12" * 16} | config
    (folder / "config.json").write_text(json.dumps(config))
    content = {"title": f"{config['env']}, data, cost limit 10"}
    for name, (score, cost) in {"pretrained": before, "finetuned": after}.items():
        rates = {"violation_rate": float(cost > 10), "failure_rate": 0.25}
        content[name] = {"return_mean": score, "cost_mean": cost} | rates
    (folder / "metrics.json").write_text(json.dumps(content))


def test_a_table_has_a_row_for_each_task_data_method_and_set_of_changed_flags(tmp_path, capfd):
    names = {"default": {}, "beta": {"beta": 5.0}, "dpo": {"method": "dpo"}}
    names |= {"other data": {"dataset": "cd34" * 16}, "other task": {"env": BALL_RUN_ID}}
    names |= {"labels": {"preferences": "ef56" * 16}, "many": {"beta": 2.0, "hidden": [8]}}
    for i, (name, config) in enumerate(names.items()):
        for seed in range(3 if name == "default" else 1):
            numbers = (200 + seed, 50), (100 + 10 * i + 2 * seed, 1 + i)
            fake_run(tmp_path / f"{name}{seed}", {"seed": seed} | config, *numbers)
    fake_run(tmp_path / "older", {}, (1, 1), (1, 1))
    (tmp_path / "older" / "config.json").write_text('{"method": "older", "dataset": "ab"}')
    (tmp_path / "unfinished").mkdir()
    assert run("--summary", tmp_path / "unfinished") == 2
    assert "no metrics.json" in capfd.readouterr().err
    assert run("--summary", tmp_path) == 0
    output, error = capfd.readouterr()
    assert re.fullmatch("left out: .*older.metrics.json or .*\n", error)
    rows = [list(row.values()) for row in table(output)]
    title = f"{BALL}, data, cost limit 10, data ab12"
    found = {method: numbers for task, method, *numbers in rows if task == title}
    (labels,) = (name for name in found if name.startswith("prefine --preferences ef56"))
    methods = {"prefine", "prefine --beta 5.0", "prefine --beta 2.0 --hidden [8]", "dpo", labels}
    assert set(found) == methods and len(rows) == len(names)
    expected = ["3", "201 ± 0.8165 → 102 ± 1.633", "50 ± 0 → 1 ± 0"]
    assert found["prefine"] == [*expected, "100% ± 0% → 0% ± 0%", "25% ± 0% → 25% ± 0%"]
    assert found["prefine --beta 5.0"] == ["1", "200 → 110", "50 → 2", "100% → 0%", "25% → 25%"]


# ------------------------------------------------------------------------- run_all.sh and README
def test_run_all_works_in_a_folder_with_a_space_and_a_quote_in_its_name(ball_run, tmp_path):
    here = tmp_path / "it's a folder"
    (here / ".venv" / "bin").mkdir(parents=True)
    for name in "prefine.py", "run_all.sh":
        shutil.copy(HERE / name, here)
    python = here / ".venv" / "bin" / "python"  # set-up is taken as done, with this Python
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    functions = "eval \"$(grep -E '^(metadata|TOOLS|checksum)' run_all.sh)\" && "
    stamp = functions + 'echo "$(checksum) 3.11" > .venv/stamp && '
    small = BALL_RUN.replace("\n", " ")

    def run_all(*arguments, **variables):
        line = ["bash", "-c", f'{stamp} bash run_all.sh "$@"', "run_all", *arguments]
        env = os.environ | variables
        return subprocess.run(line, capture_output=True, text=True, cwd=here, env=env)

    done = run_all("demo", *small.split(), "--run-dir", "runs/one")
    assert done.returncode == 0, done.stderr
    same_run(here / "runs" / "one", ball_run[0])
    done = run_all("summary")
    assert done.returncode == 0 and "--scripted-episodes 24" in done.stdout
    # An experiment of the list, made small by replacing the list's flags.
    script, flags_of_it = (here / "run_all.sh").read_text(), small.replace("--seed 1", "")
    of_the_list = '"--env OfflineBallCircle --dataset scripted"'
    assert of_the_list in script
    (here / "run_all.sh").write_text(script.replace(of_the_list, f'"{flags_of_it}"'))
    done = run_all("-j", "2", ONLY="OfflineBallCircle.*--seed 1 --method prefine", SEEDS="1")
    assert done.returncode == 0, done.stderr
    (made,) = (here / "runs").glob("OfflineBallCircle-v0__prefine__1__*")
    same_run(made, ball_run[0])
    failures = {"OfflineBallCircle.*--method prefine": "failed, see", "no such": "no experiment's"}
    for only, sentence in failures.items():
        done = run_all("-j", "2", ONLY=only, SEEDS="-1")
        assert done.returncode == 2 and sentence in done.stderr
    done = run_all("-j", "2", ONLY="halfcheetah.*--method prefine")  # its file is not here
    assert done.returncode == 0 and "skipped: the experiments on files of" in done.stderr
    for arguments in (["-j", "x"], ["nonsense"]):
        done = run_all(*arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == ""


def readme_section(title):
    """The text under a heading of the README, and its blocks of code, [(language, code)]."""
    section = (HERE / "README.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    return section, re.findall(r"^```(\w*)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def test_every_flag_that_the_readme_names_exists():
    known = {"--osrl", "--slurm", "--quick"}
    known |= set(re.findall(r"--[a-z][a-z-]*", command(HERE / "prefine.py", "--help").stdout))
    for line in (HERE / "README.md").read_text().splitlines():
        if not re.search(r"\b(pip|uv|git|pytest|docker|sbatch)\b", line):
            assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", line)) <= known, line


def test_the_readmes_python_example_ends_in_its_printed_result(tmp_path, ball):
    """From a folder beside the clone, as a script on standard input."""
    (clone := tmp_path / "prefine").mkdir()
    (beside := tmp_path / "project").mkdir()
    shutil.copy(HERE / "prefine.py", clone)
    blocks = readme_section("From Python")[1]
    code = "\n".join(code for language, code in blocks if language == "python")
    assert "torch.set_num_threads(1)" in code  # more are ten times slower on a busy machine
    done = command("-", input=code, cwd=beside)
    assert done.returncode == 0, done.stderr
    for name in "before", "after":
        assert re.search(rf"^{name}: return -?\d+, cost \d+$", done.stdout, re.MULTILINE)


def test_the_readmes_own_environment_makes_its_data_and_is_made_safe(tmp_path, ball):
    """Its Python is saved by the name that the text says and run; then come its commands."""
    shutil.copy(HERE / "prefine.py", tmp_path)
    text, blocks = readme_section("Your own environment")
    (code,) = (code for language, code in blocks if language == "python")
    (name,) = re.findall(r"Save this as `(\w+\.py)`", text)
    (tmp_path / name).write_text(code)
    lines = f"python {name}\n" + "".join(code for language, code in blocks if language != "python")
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    options = {"capture_output": True, "text": True, "cwd": tmp_path, "env": env}
    done = subprocess.run(["bash", "-ec", lines], **options)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    before, after = (
        metrics(folder)[name]["violation_rate"] for name in ("pretrained", "finetuned")
    )
    assert after < before


# -------------------------------------------------------------------------------- the speed figures
def seconds(work, *arguments):
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def bare_updates(count=2500):
    """A bare forward, backward and fused-Adam step of the default policy, so many times."""
    policy = prefine.GaussianPolicy([-1] * 2, [1] * 2, *np.ones((2, 88)))
    optimizer = torch.optim.Adam(policy.parameters(), fused=True)
    states = torch.randn(256, 88)
    for _ in range(count):
        optimizer.zero_grad()
        mean, std = policy(states)
        (mean + std).square().mean().backward()
        optimizer.step()


def car_button_arrays(episodes):
    """CarButton1's shapes: 88 observations, half of them 0 as lidars are, 2 actions."""
    rng, rows = np.random.default_rng(0), 1000 * episodes
    observations = rng.integers(-500, 500, (rows, 88), np.int16).astype(np.float32) / 1000
    arrays = {"observations": np.maximum(observations, 0, out=observations)}
    arrays["actions"] = rng.uniform(-1, 1, (rows, 2)).astype(np.float32)
    arrays["rewards"] = rng.normal(size=rows).astype(np.float32)
    arrays |= {"costs": np.zeros(rows, np.float32), "terminals": np.zeros(rows, bool)}
    return arrays | {"timeouts": np.arange(1, rows + 1) % 1000 == 0}


def bench(episodes):
    """Print the speed figures: ratios of two things measured in turn, medians of several."""
    car, arrays = "OfflineCarButton1Gymnasium-v0", car_button_arrays(episodes)

    def show(name, first, second, repeats=3):
        ratios = [seconds(first) / seconds(second) for _ in range(repeats)]
        print(f"| {name} | {statistics.median(ratios):.2f} |", flush=True)

    def read(path):
        with h5py.File(path) as file:
            return [file[name][()] for name in arrays]

    print("| ratio | measured |\n|---|---:|")
    with tempfile.TemporaryDirectory() as folder:
        path, env = write_hdf5(Path(folder) / "data.hdf5", arrays), prefine.make_env(car)
        load = functools.partial(prefine.load_dataset, path, env)
        show("loading to h5py's reading", load, lambda: read(path))
    data = prefine.make_dataset(**{name: values[:80_000] for name, values in arrays.items()})
    policy = prefine.GaussianPolicy(*BOX, np.zeros(88), np.ones(88))
    pairs = {"preferred": list(range(40)), "dispreferred": list(range(40, 80))}
    args = flags("")
    pretrain = functools.partial(prefine.pretrain, data, BOX_SPACE, args)
    show("a pre-training update to a bare one", pretrain, bare_updates, repeats=7)
    finetune = functools.partial(prefine.finetune, policy, data, pairs, args)
    show("a fine-tuning update to a bare one", finetune, bare_updates, repeats=7)
    if len(os.sched_getaffinity(0)) > 1:

        def evaluate(workers):
            prefine.evaluate(policy, car, episodes=12, workers=workers)

        evaluate(2)  # starts the workers
        show("evaluation by one process to by two", lambda: evaluate(1), lambda: evaluate(2))


def import_osrl():
    """OSRL's algorithms, from the folder .osrl, without the logger that it imports."""
    sys.path.insert(0, str(HERE / ".osrl"))  # run_all.sh has put it there
    quiet = type("DummyLogger", (), {"store": lambda self, **values: None})
    for name in "fsrl", "fsrl.utils":
        sys.modules[name] = types.ModuleType(name)
    vars(sys.modules["fsrl.utils"]).update(DummyLogger=quiet, WandbLogger=quiet)
    from osrl import algorithms

    return algorithms


def osrl(task="OfflineBallCircle", bc_updates=20_000, cpq_updates=2_000):
    """PREFINE's fine-tuning beside OSRL's BC-Safe and CPQ: seconds, return, cost. One thread.

    The settings are those of OSRL's examples/configs. Batches are drawn in one indexing, which is
    faster than its own loader; its evaluations while training are left out."""
    algorithms, updates = import_osrl(), 100_000  # updates: OSRL's default
    args = flags("--dataset scripted")
    env = prefine.make_env(task)
    args.env, limit = env.spec.id, prefine.find_cost_limit(env)
    torch.manual_seed(0)
    data = prefine.load_dataset(prefine.find_dataset(args, env), env)
    costs = data.sums(data.costs)
    size = (env.observation_space.shape[0], env.action_space.shape[0], 1.0)
    steps = int((data.ends - data.starts).max())

    def play(name, spent, act):
        """One line of the table, with the results of 20 simulated episodes."""
        seeds = range(1_000_000, 1_000_020)
        runs = prefine.run_episodes(args.env, lambda env, seed: act, seeds, 1, name)
        score, cost = (np.mean([run[key].sum() for run in runs]) for key in ("rewards", "costs"))
        print(f"| {name} | {spent} | {score:.0f} | {cost:.1f} |", flush=True)

    def act_by(policy):
        return lambda observation: policy(torch.as_tensor(observation).float())[0].detach().numpy()

    print("| method | seconds of training | return | cost |\n|---|---|---|---|")
    results = []
    spent = seconds(lambda: results.append(prefine.pretrain(data, env.action_space, args)))
    play("pre-training", f"{spent:.0f}", act_by(results[0]))
    chosen = prefine.draw_preferences(costs, limit, 40, 40, 0)
    spent = seconds(lambda: results.append(prefine.finetune(results[0], data, chosen, args)))
    play("PREFINE's fine-tuning", f"{spent:.0f}", act_by(results[1]))

    def train(name, step, rows, slice_updates, act):
        def work():
            for _ in range(slice_updates):
                step(rows[torch.randint(len(rows), (512,))])

        spent = seconds(work)
        whole = f"{spent * updates / slice_updates:.0f}"
        if slice_updates < updates:
            name += f" (results after {slice_updates} updates)"
            whole += f", extrapolated from {spent:.0f}"
        play(name, whole, act)

    model = algorithms.BC(*size, [256, 256], steps)
    trainer = algorithms.BCTrainer(model, env, actor_lr=1e-3)
    is_safe = torch.from_numpy(costs <= limit).repeat_interleave(data.ends - data.starts)
    rows = is_safe.nonzero()[:, 0]

    def imitate(i):
        trainer.train_one_step(data.observations[i], data.actions[i])

    train("OSRL BC-Safe", imitate, rows, bc_updates, model.act)
    shape = {"a_hidden_sizes": [256, 256], "c_hidden_sizes": [256, 256], "vae_hidden_sizes": 400}
    shape |= {"sample_action_num": 10, "beta": 0.5, "num_q": 2, "num_qc": 2, "episode_len": steps}
    model = algorithms.CPQ(*size, **shape)
    rates = {"actor_lr": 1e-4, "critic_lr": 1e-3, "alpha_lr": 1e-4, "vae_lr": 1e-3}
    trainer = algorithms.CPQTrainer(model, env, reward_scale=0.1, **rates)
    following = torch.cat([data.observations[1:], data.observations[-1:]])
    is_inner = torch.ones(len(data.rewards), dtype=torch.bool)
    is_inner[data.ends - 1] = False  # the last row of an episode has no next observation here

    def step(i):
        batch = data.actions[i], 0.1 * data.rewards[i], data.costs[i], torch.zeros(len(i))
        trainer.train_one_step(data.observations[i], following[i], *batch)

    rows = is_inner.nonzero()[:, 0]
    train("OSRL CPQ", step, rows, cpq_updates, lambda state: model.act(state, True, True)[0])


if __name__ == "__main__" and sys.argv[1:2] == ["bench"]:
    osrl() if "--osrl" in sys.argv else bench(266 if "--quick" in sys.argv else 2656)
