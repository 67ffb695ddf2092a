"""Tests of prefine.py, claim by claim, and its speed figures.

    bash run_all.sh test                    # all of them, a few minutes on two cores
    bash run_all.sh test -m fast            # policy, loss and fine-tuning, in seconds
    bash run_all.sh bench [--quick]         # ratios; --quick: with a tenth of the data set
    bash run_all.sh bench --osrl            # beside OSRL's BC-Safe and CPQ, many minutes

Nothing that can be run is mocked: simulators, HDF5 files and HTTP servers are real. The dsrl cache
of whoever runs this is never touched.
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
import resource
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
from gymnasium.spaces import Box
from torch.distributions import Normal, kl_divergence

import prefine

HERE = Path(__file__).parent
BALL = "OfflineBallCircle-v0"
ROWS, EPISODE = 60, 20  # of the small files made here
BOX = torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 1.0])
BOX_SPACE = Box(-1, 1, (2,))
INFINITE = torch.tensor([-math.inf, -math.inf]), torch.tensor([math.inf, math.inf])
fast = pytest.mark.fast
torch.set_num_threads(1)  # more are slower for such small networks


# ---------------------------------------------------------------------------------------- helpers
def flags(text=""):
    return prefine.parse_args(text.split())


def run(*texts):
    """``prefine.py`` with the flags of the texts, in this process; its exit code."""
    return prefine.main(" ".join(map(str, texts)).split())


def command(*arguments, **options):
    """Run prefine.py as a user does: exit code, standard output and standard error."""
    line = [sys.executable, str(HERE / "prefine.py"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, **options)


def run_script(code, folder, **options):
    """Run Python code from standard input, in a folder; what it printed."""
    line = [sys.executable, "-"]
    done = subprocess.run(line, input=code, capture_output=True, text=True, cwd=folder, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def same(one, other):
    """If two policies agree bit for bit."""
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def toy_dataset(episodes=12, steps=10, seed=0):
    """Observations [N, 3], actions [N, 2]; even episodes are safe, the return grows with e."""
    rng = np.random.default_rng(seed)
    episode = np.repeat(np.arange(episodes), steps)
    side = np.where(episode % 2 == 0, 0.5, -0.5)  # safe episodes go right, unsafe ones left
    actions = np.clip(side[:, None] + 0.2 * rng.normal(size=(len(episode), 2)), -1, 1)
    last = np.arange(1, len(episode) + 1) % steps == 0
    observations = rng.normal(size=(len(episode), 3))
    costs = (episode % 2).astype(np.float32)
    arrays = (observations, actions, episode / 10 + rng.uniform(size=len(episode)))
    return prefine.make_dataset(*arrays, np.zeros(len(episode)), last, costs)


LABELS = {"preferred": [0, 2, 4, 6], "dispreferred": [1, 3, 5, 7]}


def toy_policy(seed=0):
    torch.manual_seed(seed)
    return prefine.GaussianPolicy(*BOX, np.zeros(3), np.ones(3), [16])


class Own(torch.nn.Module):
    """A policy that is none of ours: a linear mean, one std for all states, what is returned."""

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
PRETRAIN = SMALL + "--pretrain-updates 250"
FINETUNE = SMALL + "--finetune-updates 250"


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


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """An empty dsrl cache for this session, here and in every process it starts."""
    folder = tmp_path_factory.mktemp("dsrl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSRL_DATASET_DIR", str(folder))
        prefine.make_env(BALL)
        patch.setattr("dsrl.offline_env.DATASET_PATH", str(folder))
        yield folder


@pytest.fixture(scope="session")
def ball(cache):
    return prefine.make_env(BALL)


WALK = '''
import gymnasium
import numpy as np


class Walk(gymnasium.Env):
    """A point in the plane: going right earns reward, and cost beyond 1."""

    observation_space = gymnasium.spaces.Box(-100, 100, (2,))
    action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.position = 0, 0.1 * self.np_random.normal(size=2)
        return self.position.astype(np.float32), {}

    def step(self, action):
        self.steps, self.position = self.steps + 1, self.position + 0.3 * action
        info = {"cost": float(self.position[0] > 1)}
        return self.position.astype(np.float32), action[0], False, self.steps == 20, info


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
    """The package of the text above, to be imported here and in every process that is started."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "walks.py").write_text(WALK + REGISTER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.syspath_prepend(folder)
        yield importlib.import_module("walks")


# ----------------------------------------------------------------------------------------- policy
def censored_normal(mean, std, action, low, high):
    """The log-probability of one action of one dimension, from the error function."""
    if action <= low:
        return math.log(0.5 * math.erfc((mean - low) / std / math.sqrt(2)))
    if action >= high:
        return math.log(0.5 * math.erfc((high - mean) / std / math.sqrt(2)))
    return Normal(mean, std).log_prob(torch.tensor(action)).item()


@fast
@pytest.mark.parametrize("action", [-1.5, -1.0, -0.999, 0.0, 0.4, 1.0, 3.0])
@pytest.mark.parametrize("mean", [-0.9, 0.2, 0.9])
def test_log_prob_is_that_of_a_clipped_normal(action, mean):
    means, stds, actions = torch.full((2,), mean), torch.tensor([0.3, 1.1]), torch.tensor([action])
    found = prefine.gaussian_log_prob(means, stds, actions.expand(2), *BOX).item()
    expected = sum(censored_normal(mean, std, action, -1, 1) for std in stds.tolist())
    assert found == pytest.approx(expected, rel=1e-4)


@fast
def test_infinite_bounds_are_a_plain_gaussian():
    mean, std, actions = torch.randn(5, 2), torch.rand(5, 2) + 0.1, 3 * torch.randn(5, 2)
    found = prefine.gaussian_log_prob(mean, std, actions, *INFINITE)
    torch.testing.assert_close(found, Normal(mean, std).log_prob(actions).sum(-1))


@fast
@pytest.mark.parametrize("std", [1.0, 0.1, 1e-2, 1e-3, 1e-4])
def test_gradients_of_the_mass_at_a_bound_are_those_of_float64(std):
    def gradients(dtype, log_mass):
        mean = torch.tensor([[-0.999, -0.5, 0.0, 0.5, 0.99, 0.9999]], dtype=dtype).mT
        mean.requires_grad_(True)
        stds = torch.full_like(mean, std, requires_grad=True)
        return torch.autograd.grad(log_mass(mean, stds).sum(), [mean, stds])

    for bound in -1, 1:
        expected = gradients(
            torch.float64, lambda m, s, b=bound: torch.special.log_ndtr((b * m - 1) / s)
        )
        actions, one = torch.full((6, 1), float(bound)), torch.ones(1)
        found = gradients(
            torch.float32, lambda m, s, a=actions: prefine.gaussian_log_prob(m, s, a, -one, one)
        )
        for right, value in zip(expected, found):
            torch.testing.assert_close(value.double(), right, rtol=0.01, atol=1e-6)
    inside = gradients(
        torch.float32, lambda m, s: prefine.gaussian_log_prob(m, s, 0.3 * one, -one, one)
    )
    assert all(gradient.isfinite().all() for gradient in inside)


@fast
def test_mean_lies_in_the_space_and_std_within_its_bounds():
    low, high = np.array([-2.0, 0.0]), np.array([2.0, 1.0])
    policy = prefine.GaussianPolicy(low, high, np.zeros(3), np.ones(3), [16])
    mean, std = policy(1e3 * torch.randn(500, 3))
    half = torch.tensor(high - low).float() / 2
    assert (mean >= policy.low).all() and (mean <= policy.high).all()
    assert (std >= half * math.exp(-1.5) * 0.9999).all()
    assert (std <= half * math.exp(0.5) * 1.0001).all()


@fast
def test_policy_normalises_observations_itself():
    shifted = prefine.GaussianPolicy(*BOX, np.full(3, 5.0), np.full(3, 2.0), [16])
    plain = toy_policy()
    shifted.net.load_state_dict(plain.net.state_dict())
    observations = torch.randn(7, 3)
    torch.testing.assert_close(shifted(5 + 2 * observations), plain(observations))


@fast
def test_a_checkpoint_is_self_contained(tmp_path):
    low, high = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 1.0])
    policy = prefine.GaussianPolicy(low, high, np.arange(3), np.full(3, 2.0), [8, 4])
    path = tmp_path / "policy.pt"
    prefine.save_policy(path, BALL, policy)
    assert torch.load(path, weights_only=True)["env"] == BALL
    loaded, observations = prefine.load_policy(path, BALL), torch.randn(5, 3)
    assert same(policy, loaded)
    assert all(torch.equal(a, b) for a, b in zip(policy(observations), loaded(observations)))
    with pytest.raises(prefine.UserError, match=f"OfflineBallRun-v0; found one of {BALL}"):
        prefine.load_policy(path, "OfflineBallRun-v0")
    with pytest.raises(prefine.UserError, match="save_policy.. is for a GaussianPolicy"):
        prefine.save_policy(path, BALL, Own())


@fast
@pytest.mark.parametrize("content", ["missing", "empty", "text", "pickle", "cut", "other size"])
def test_what_is_no_checkpoint_is_refused_and_never_to_be_deleted(tmp_path, content):
    path, policy = tmp_path / "policy.pt", toy_policy()
    if content == "other size":
        policy.mean = torch.zeros(4)
    prefine.save_policy(path, BALL, policy)
    others = {"empty": b"", "text": b"no checkpoint", "pickle": b"\x80\x02}."}
    path.write_bytes(others.get(content, path.read_bytes()[: -500 if content == "cut" else None]))
    if content == "missing":
        path.unlink()
    with pytest.raises(prefine.UserError, match="policy.pt: needs a checkpoint of") as caught:
        prefine.load_policy(path)
    assert "pass another file" in str(caught.value) and "delete" not in str(caught.value)


@fast
def test_a_checkpoint_cannot_run_code(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"env": BALL, "state": Harm()}, tmp_path / "policy.pt")
    with pytest.raises(prefine.UserError, match="policy.pt"):
        prefine.load_policy(tmp_path / "policy.pt", BALL)
    assert not (tmp_path / "harm").exists()


# ----------------------------------------------------------- counterfactuals, log-ratios, the loss
def gaussians():
    """(mean, std) [6, 2] of a policy and of a reference, and actions [6, 2] in the same states."""
    generator = torch.Generator().manual_seed(0)
    means = torch.rand((2, 6, 2), generator=generator) - 0.5
    stds = torch.rand((2, 6, 2), generator=generator) + 0.2
    actions = torch.rand((6, 2), generator=generator) * 2 - 1
    return (means[0], stds[0]), (means[1], stds[1]), actions


@fast
def test_the_log_ratio_is_the_difference_of_log_probs_and_0_for_the_reference():
    policy, reference, actions = gaussians()
    found = prefine.log_ratio(policy, reference, actions, *INFINITE)
    expected = Normal(*policy).log_prob(actions) - Normal(*reference).log_prob(actions)
    torch.testing.assert_close(found, expected.sum(-1))
    assert (prefine.log_ratio(reference, reference, actions, *BOX) == 0).all()


@fast
def test_samples_are_those_of_the_clipped_gaussian_and_carry_no_gradient():
    mean = torch.tensor([0.9, -0.2]).expand(50_000, 2).clone().requires_grad_(True)
    std = torch.full((50_000, 2), 0.5)
    samples = prefine.sample_actions(mean, std, *BOX, torch.Generator().manual_seed(0))
    assert not samples.requires_grad and samples.abs().max() <= 1
    mass = prefine.gaussian_log_prob(mean[0, :1], std[0, :1], BOX[1][:1], *(x[:1] for x in BOX))
    assert (samples[:, 0] == 1).float().mean().item() == pytest.approx(mass.exp().item(), abs=0.01)
    again = prefine.sample_actions(mean, std, *BOX, torch.Generator().manual_seed(0))
    assert torch.equal(samples, again)


@fast
def test_preference_loss_of_a_case_computed_by_hand():
    # margin = beta * 2 ln 3 = ln 3, sigmoid(ln 3) = 3/4, -log(3/4) / beta = 2 ln(4/3)
    winner, loser = torch.tensor([1 + 2 * math.log(3)]), torch.tensor([1.0])
    assert prefine.preference_loss(winner, loser, 0.5).item() == pytest.approx(0.57536414)


@fast
@pytest.mark.parametrize("beta", [0.0, 0.01, 0.1, 1.0, 10.0])
def test_slope_at_a_tie_is_one_half_whatever_beta(beta):
    winner = torch.tensor(0.7, requires_grad=True)
    loser = torch.tensor(0.7, requires_grad=True)
    slopes = torch.autograd.grad(prefine.preference_loss(winner, loser, beta), [winner, loser])
    assert [slope.item() for slope in slopes] == pytest.approx([-0.5, 0.5])


@fast
@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_the_loss_is_the_sum_of_its_two_halves(beta):
    winner, loser = torch.randn(2, 1000, dtype=torch.float64)
    lead = winner - loser
    imitates, retains = -lead / 2, torch.log(2 * torch.cosh(beta * lead / 2)) / beta
    found = prefine.preference_loss(winner, loser, beta)
    torch.testing.assert_close(found, imitates + retains)


@fast
def test_the_loss_of_beta_0_is_the_limit_of_small_beta_but_for_a_constant():
    winner, loser = torch.randn(2, 1000, dtype=torch.float64)
    small = prefine.preference_loss(winner, loser, 1e-6) - math.log(2) / 1e-6
    found = prefine.preference_loss(winner, loser, 0)
    torch.testing.assert_close(found, small, atol=1e-5, rtol=0)


@fast
def test_at_beta_0_the_expected_gradient_is_half_of_imitations():
    """As the policy's own samples, clipped ones too, have a score of mean 0."""
    shape = (400_000, 2)
    mean = torch.tensor([0.8, -0.3], requires_grad=True)
    std = torch.tensor([0.5, 0.9], requires_grad=True)
    gaussian, reference = (mean.expand(shape), std.expand(shape)), torch.ones(2, *shape)
    counterfactual = prefine.sample_actions(*gaussian, *BOX, torch.Generator().manual_seed(0))
    actions = torch.tensor([1.0, 0.2]).expand(shape)
    h, h_own = (prefine.log_ratio(gaussian, reference, x, *BOX) for x in (actions, counterfactual))
    imitation = torch.autograd.grad(-h.mean(), [mean, std], retain_graph=True)
    found = torch.autograd.grad(prefine.preference_loss(h, h_own, 0).mean(), [mean, std])
    for one, other in zip(found, imitation):
        torch.testing.assert_close(one, other / 2, atol=0.01, rtol=0)


# A toy whose optimum is known: preferred actions are N(1, 0.5^2), the reference policy is N(0, 1).
@functools.cache
def fine_tuned_toy(text):
    """The mean and the standard deviation that fine-tuning ends with."""
    quantiles = (torch.arange(4000) + 0.5) / 4000
    actions = Normal(1.0, 0.5).icdf(torch.cat([quantiles[torch.randperm(4000)], quantiles[:9]]))
    last = np.isin(np.arange(4009), [3999, 4008])
    zeros = np.zeros(4009)
    dataset = prefine.make_dataset(zeros[:, None], actions[:, None], zeros, zeros, last)
    policy = Own(1, 1)
    torch.nn.init.zeros_(policy.layer.bias)
    text += " --leave-out 0 --finetune-lr 0.02 --finetune-updates 1000 --batch-size 512"
    aligned = prefine.finetune(
        policy, dataset, {"preferred": [0], "dispreferred": [1]}, flags(text)
    )
    mean, std = aligned(torch.zeros(1, 1))
    return mean.item(), std.item()


@fast
def test_beta_0_reaches_the_preferred_distribution():
    assert fine_tuned_toy("--beta 0") == pytest.approx((1.0, 0.5), abs=0.03)


@fast
def test_the_distance_to_the_reference_falls_as_beta_grows():
    reference = Normal(0.0, 1.0)
    distances = [
        kl_divergence(Normal(*fine_tuned_toy(f"--beta {beta}")), reference).item()
        for beta in (0, 0.1, 1, 10)
    ]
    assert distances == sorted(distances, reverse=True) and distances[-1] < 0.1 * distances[0]


@fast
@pytest.mark.parametrize(
    ("beta", "mean", "std"), [(0.1, 0.975, 0.519), (1, 0.799, 0.634), (10, 0.284, 0.888)]
)
def test_beta_is_a_dial_from_the_preferred_behaviour_to_the_reference(beta, mean, std):
    """The numbers are of another program, which follows the gradient of the same loss."""
    assert fine_tuned_toy(f"--beta {beta}") == pytest.approx((mean, std), abs=0.03)


@fast
@pytest.mark.parametrize("beta", [1, 2])
def test_with_the_references_samples_the_optimum_is_the_tilted_reference(beta):
    """pi_ref (p / pi_ref)^(1 / beta): of Gaussians precisions and their means are added."""
    precision = 1 + (1 / 0.25 - 1) / beta
    mean = (1 / 0.25) / beta / precision
    found = fine_tuned_toy(f"--loser reference --beta {beta}")
    assert found == pytest.approx((mean, precision**-0.5), abs=0.03)


# ------------------------------------------------------------------------------------ preferences
@fast
def test_preferences_are_drawn_by_cost_alone_and_on_the_right_side_of_the_limit():
    costs = np.random.default_rng(0).integers(0, 21, 100).astype(float)
    costs[:5] = 10.0  # exactly at the limit is safe
    preferences = prefine.draw_preferences(costs, 10, 20, 15, 0)
    for label, episodes in preferences.items():
        assert ((costs[episodes] > 10) == (label == "dispreferred")).all()
    assert [len(preferences[label]) for label in ("preferred", "dispreferred")] == [20, 15]
    labelled = np.concatenate(list(preferences.values()))
    assert len(np.unique(labelled)) == 35
    other = prefine.draw_preferences(costs, 10, 20, 15, 1)
    assert set(other["preferred"]) != set(preferences["preferred"])


@fast
@pytest.mark.parametrize(("preferred", "dispreferred"), [(4, 1), (1, 8)])
def test_too_few_trajectories_are_an_error_with_the_flags_and_the_counts(preferred, dispreferred):
    costs = np.array([0, 5, 10] + 7 * [11.0])
    sentence = f"--preferred {preferred}, --dispreferred {dispreferred}: 3 of 10.*--cost-limit"
    with pytest.raises(prefine.UserError, match=sentence):
        prefine.draw_preferences(costs, 10, preferred, dispreferred, 0)


def write_preferences(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("episode", "label"), *rows])
    return path


@fast
def test_labels_read_from_a_file_are_those_written_and_rows_without_one_are_counted(
    tmp_path, capsys
):
    rows = [(3, "preferred"), (0, "dispreferred"), (7, "dispreferred"), (1, "preferred")]
    path = write_preferences(tmp_path / "labels.csv", rows)
    # A spreadsheet begins its file with a mark of the encoding.
    other = tmp_path / "other.csv"
    text = "Episode, Label ,why\n 3 , Preferred,good\n\n0,DISPREFERRED ,\n7,dispreferred,\n"
    other.write_text(text + "1,preferred,\n5,,\n6\n2, ,unsure\n", encoding="utf-8-sig")
    for each in path, other:
        found = prefine.read_preferences(each, 8)
        assert {label: list(episodes) for label, episodes in found.items()} == {
            "preferred": [3, 1],
            "dispreferred": [0, 7],
        }
    assert capsys.readouterr().out == f"{other}: rows without a label, skipped: 3\n"


@fast
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("episode,label\n3,preferred\n\n,\n2,good\n", "line 5: found '2', 'good'; needs the label"),
        ("episode,label\n8,preferred\n", "line 2: .*'8'.*; needs an episode from 0 to 7"),
        ("episode,label\n1.5,preferred\n", "line 2: found '1.5'.*; needs an episode from"),
        ("episode,label\n²,preferred\n", "line 2: found '²'.*; needs an episode from"),
        ("episode,label\n3,preferred\n3,dispreferred\n", "line 3: found '3'.*without a label"),
        ("id,label\n0,preferred\n", r"needs the columns episode and label.*\['id', 'label'\]"),
        ("", "needs the columns episode and label"),
        ("episode,label\n3,preferred\n", "no trajectory is dispreferred; both labels are needed"),
        ("episode,label\n3,\n", "no trajectory is preferred; both labels are needed"),
    ],
)
def test_a_mistake_in_a_label_file_is_named_with_its_line(tmp_path, text, sentence):
    path = tmp_path / "labels.csv"
    path.write_text(text, "utf-8")
    with pytest.raises(prefine.UserError, match=sentence):
        prefine.read_preferences(path, 8)


class Column:
    """As a column of pandas: no array, but it becomes one."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None):
        return np.array(self.values, dtype)


@fast
@pytest.mark.parametrize("kind", [list, tuple, np.array, np.uint8, np.uint64, torch.tensor, Column])
def test_labels_are_indices_of_any_library(kind):
    labels = {label: kind(episodes) for label, episodes in LABELS.items()}
    results = [
        prefine.finetune(toy_policy(), toy_dataset(), each, flags(SMALL + "--finetune-updates 5"))
        for each in (LABELS, labels)
    ]
    assert same(*results)


@fast
@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ({"preferred": [0], "dispreferred": []}, "no trajectory is dispreferred"),
        ({"preferred": [0]}, "no trajectory is dispreferred"),
        ({"preferred": [0, 12], "dispreferred": [1]}, "'preferred' needs indices from 0 to 11"),
        ({"preferred": [0], "dispreferred": [-1]}, "'dispreferred' needs indices from 0 to 11"),
        ({"preferred": [True] * 12, "dispreferred": [1]}, "'preferred' needs .*flatnonzero"),
        ({"preferred": torch.ones(12) > 0, "dispreferred": [1]}, "'preferred' needs .*flatnonzero"),
        ({"preferred": Column([0.0, 2.0]), "dispreferred": [1]}, "'preferred' needs indices"),
        ({"preferred": ["0", "2"], "dispreferred": [1]}, "'preferred' needs indices"),
        ({"preferred": [[0, 2], [4, 6]], "dispreferred": [1]}, "'preferred' needs indices"),
        ({"preferred": [[0, 2], [4]], "dispreferred": [1]}, "'preferred' needs indices"),
        ({"preferred": [0, 2], "dispreferred": [2, 3]}, "an episode is labelled twice"),
        ({"preferred": [0, 0], "dispreferred": [1, 3]}, "an episode is labelled twice"),
        ([(0, 1), (2, 3)], "preferred"),
    ],
)
def test_labels_from_python_are_refused_in_words(labels, sentence):
    with pytest.raises(prefine.UserError, match=sentence):
        prefine.finetune(toy_policy(), toy_dataset(), labels, flags(FINETUNE))


@fast
@pytest.mark.parametrize("constant", [0.0, 9.81, 1e5])  # such as gravity, which simulators observe
def test_a_preferred_trajectory_that_looks_dispreferred_is_left_out_and_named(constant, capsys):
    dataset, wrong = toy_dataset(episodes=16, steps=30), 1
    dataset.observations[:, 0] = constant  # must not drown the distances
    labels = {
        "preferred": np.array([*range(2, 16, 2), wrong]),
        "dispreferred": np.array([0, *range(3, 16, 2)]),
    }
    shares = prefine.dispreferred_shares(dataset, *labels.values())
    assert shares.shape == (8,) and shares[-1] > 0.6 and (shares[:-1] < 0.4).all()
    assert prefine.choose_preferred(dataset, labels, 0.15).tolist() == [*range(2, 16, 2)]
    output = capsys.readouterr().out
    assert re.search(r"left out.* dispreferred.*\b1\n", output) and "warning" not in output
    assert wrong in prefine.choose_preferred(dataset, labels, 0)
    assert capsys.readouterr().out == ""


def scattered_dataset(centres, steps=50):
    """An episode around the points of each tuple in turn; the observation is the point."""
    rng = np.random.default_rng(0)
    points = np.concatenate([np.resize(row, (steps, 1)) for row in centres])
    points = np.hstack([points, np.zeros_like(points)]) + 0.1 * rng.normal(size=(len(points), 2))
    last = np.arange(1, len(points) + 1) % steps == 0
    zeros = np.zeros(len(points))
    return prefine.make_dataset(points, zeros[:, None], zeros, zeros, last)


@fast
def test_wrong_labels_that_vouch_for_one_another_pass_the_first_look_and_not_the_second():
    right, wrong, dispreferred = (
        (0.0,),
        (5, 9, 9.0),
        (5.0,),
    )  # at 9 the wrong ones are by themselves
    dataset = scattered_dataset([right] * 16 + [wrong] * 4 + [dispreferred] * 5)
    preferred, others = np.arange(20), np.arange(20, 25)
    shares = prefine.dispreferred_shares(dataset, preferred, others)
    assert (shares[:16] == 0).all() and (0.2 < shares[16:]).all() and (shares[16:] < 0.5).all()
    labels = {"preferred": preferred, "dispreferred": others}
    assert round(0.15 * 20) == 3  # so many the first look leaves out
    assert prefine.choose_preferred(dataset, labels, 0.15).tolist() == [*range(16)]


@fast
def test_labels_that_say_little_are_warned_of_and_half_of_the_rest_stays(capsys):
    dataset = scattered_dataset([(0.0,)] * 40)
    labels = {"preferred": np.arange(20), "dispreferred": np.arange(20, 40)}
    chosen = prefine.choose_preferred(dataset, labels, 0.15)
    assert len(chosen) >= 8 and set(chosen) < set(range(20))
    warning = re.search(r"^warning: (\d+)% .*look dispreferred, of 50%", capsys.readouterr().out)
    assert 40 < int(warning[1]) < 60


@fast
def test_the_best_by_return_are_a_share_and_one_at_least():
    dataset = toy_dataset()
    dataset.rewards[:] = torch.arange(12).repeat_interleave(10) % 7
    episodes = np.array([2, 3, 5, 6, 7, 11])
    assert prefine.best_by_return(dataset, episodes, 0.5).tolist() == [6, 5, 11]
    assert prefine.best_by_return(dataset, episodes, 0.01).tolist() == [6]
    assert sorted(prefine.best_by_return(dataset, episodes, 1)) == sorted(episodes)


# --------------------------------------------------------------------- pre-training, fine-tuning
@fast
@pytest.mark.parametrize("change", [lambda x: x.flip(0), lambda x: x * math.nan, lambda x: None])
def test_training_never_reads_a_cost(change):
    dataset, policy = toy_dataset(), toy_policy()
    both = dataset, dataset._replace(costs=change(dataset.costs))
    assert same(*(prefine.pretrain(each, BOX_SPACE, flags(PRETRAIN)) for each in both))
    assert same(*(prefine.finetune(policy, each, LABELS, flags(FINETUNE)) for each in both))


@fast
def test_pretraining_imitates_the_best_episodes_by_return():
    dataset = toy_dataset(episodes=10, steps=100)
    dataset.rewards[:], dataset.actions[:] = 0, -0.4
    generator = torch.Generator().manual_seed(0)
    for episode in (2, 5):
        rows = slice(dataset.starts[episode], dataset.ends[episode])
        dataset.rewards[rows] = 1
        dataset.actions[rows] = 0.5 + 0.3 * torch.randn(100, 2, generator=generator)
    dataset.actions.clamp_(-1, 1)
    text = "--hidden 16 --pretrain-top 0.2 --pretrain-updates 800 --pretrain-lr 0.01"
    mean, std = prefine.pretrain(dataset, BOX_SPACE, flags(text))(dataset.steps([2, 5])[0])
    torch.testing.assert_close(mean.mean(0), torch.full((2,), 0.5), atol=0.08, rtol=0)
    torch.testing.assert_close(std.mean(0), torch.full((2,), 0.3), atol=0.08, rtol=0)


@fast
@pytest.mark.parametrize(
    "space", ["too wide", "infinite", "half", "Discrete", "low == high", "2-D"]
)
def test_pretraining_needs_a_bounded_box_of_the_actions_width(space):
    wrong = {"too wide": Box(-1, 1, (3,)), "infinite": Box(-np.inf, np.inf, (2,))}
    wrong |= {"half": Box(0, np.inf, (2,)), "Discrete": gymnasium.spaces.Discrete(2)}
    wrong |= {
        "low == high": Box(np.array([-1, 0.0]), np.array([1, 0.0])),
        "2-D": Box(-1, 1, (1, 2)),
    }
    sentence = "actions need a flat Box, of actions with finite bounds, low < high; found"
    sentence = "actions are 2 wide in the data, 3 here" if space == "too wide" else sentence
    with pytest.raises(prefine.UserError, match=sentence):
        prefine.pretrain(toy_dataset(), wrong[space], flags(PRETRAIN))


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
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(mine.parameters())
    for update in range(3):
        batch = torch.randint(20, (64,), generator=generator)
        pi, pi_ref = Normal(*mine(states[batch])), Normal(*reference(states[batch]))
        h = pi.log_prob(actions[batch]) - pi_ref.log_prob(actions[batch])
        if loser == "dispreferred":
            batch = torch.randint(40, (64,), generator=generator)
            pi, pi_ref = Normal(*mine(other_states[batch])), Normal(*reference(other_states[batch]))
            c = other_actions[batch]
        else:
            source = pi if loser == "policy" else pi_ref
            c = source.mean + source.stddev * torch.randn((64, 2), generator=generator)
            c = c.detach()  # no gradient flows through the sample
        h_c = pi.log_prob(c) - pi_ref.log_prob(c)
        loss = (-torch.log(torch.sigmoid(2 * (h - h_c).sum(1))) / 2).mean()
        optimizer.param_groups[0]["lr"] = 0.025 * (1 + math.cos(math.pi * update / 3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for found, expected in zip(aligned.parameters(), mine.parameters()):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert not same(aligned, policy)


@fast
@pytest.mark.parametrize("text", ["", "--beta 0", "--loser reference", "--method dpo"])
def test_finetuning_moves_a_copy_to_the_preferred_actions(text):
    dataset, policy = toy_dataset(), toy_policy()
    aligned = prefine.finetune(policy, dataset, LABELS, flags(FINETUNE + " " + text))
    assert same(policy, toy_policy()) and all(x.grad is None for x in policy.parameters())
    moved = (aligned(dataset.observations)[0] - policy(dataset.observations)[0]).mean(0)
    assert (moved > 0.05).all()  # preferred episodes go right, dispreferred ones left


@fast
def test_only_dpo_learns_from_a_dispreferred_step():
    """In the others dispreferred trajectories choose which of the preferred count, and no more."""
    policy, dataset = toy_policy(), toy_dataset()
    changed = dataset._replace(actions=dataset.actions.clone())
    for episode in LABELS["dispreferred"]:
        changed.actions[dataset.starts[episode] : dataset.ends[episode]] -= 0.1
    for method in prefine.METHODS:
        text = flags(f"{SMALL} --finetune-updates 20 --method {method} --leave-out 0")
        results = [prefine.finetune(policy, each, LABELS, text) for each in (dataset, changed)]
        assert same(*results) == (method != "dpo") and not same(results[0], policy)


@fast
def test_no_update_leaves_the_policy_as_it_is():
    policy, text = toy_policy(), flags(SMALL + "--finetune-updates 0")
    assert same(policy, prefine.finetune(policy, toy_dataset(), LABELS, text))


@fast
def test_training_is_deterministic_bit_for_bit_and_depends_on_the_seed():
    dataset, policy = toy_dataset(), toy_policy()
    runs = []
    for seed in 5, 5, 6:
        pretrained = prefine.pretrain(dataset, BOX_SPACE, flags(f"{PRETRAIN} --seed {seed}"))
        text = flags(f"{FINETUNE} --seed {seed}")
        runs.append((pretrained, prefine.finetune(policy, dataset, LABELS, text)))
    for one, again, other in zip(*runs):
        assert same(one, again) and not same(one, other)


@fast
def test_a_loss_that_is_not_finite_is_an_error_that_says_what_to_try():
    with pytest.raises(prefine.UserError, match="loss is not finite; try a lower learning rate"):
        prefine.finetune(Own(), toy_dataset(), LABELS, flags(FINETUNE + " --finetune-lr 1e9"))


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

    policy = Mine()
    before = copy.deepcopy(policy)
    one, other = (
        prefine.finetune(policy, toy_dataset(), LABELS, flags(FINETUNE)) for _ in range(2)
    )
    assert same(one, other) and same(one.frozen, policy.frozen) and not one.training
    assert torch.equal(one.noisy[0].running_mean, policy.noisy[0].running_mean)
    assert not same(one.layer, policy.layer) and same(policy, before) and policy.training


def without(name):
    policy = Own()
    delattr(policy, name)
    return policy


def with_bounds(value):
    policy = without("low")
    policy.low = value
    return policy


def holding_a_result():
    """As a policy fresh from its training, which may keep a tensor that has a history."""
    policy = Own()
    policy.last = policy.log_std.exp()
    return policy


class Wrapper(torch.nn.Module):
    """As DistributedDataParallel: the policy is its part."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, observations):
        return self.module(observations)


NOT_FINITE = Own(output=lambda mean, std: (mean * math.nan, std))
POLICIES = {  # what a policy may be, and whether fine-tuning, and evaluation, can use it
    "a tuple": (lambda: Own(), True, True),
    "TorchScript": (lambda: torch.jit.trace(Own(), torch.zeros(2, 3)), True, True),
    "compiled": (lambda: torch.compile(Own(), backend="eager"), True, True),
    "the mean alone": (lambda: Own(output=lambda mean, std: mean), False, True),
    "three values": (lambda: Own(output=lambda mean, std: (mean, std, std)), False, True),
    "a number for std": (lambda: Own(output=lambda mean, std: (mean, 0.5)), False, True),
    "(mean, log std)": (lambda: Own(output=lambda mean, std: (mean, -std)), False, True),
    "no gradient": (lambda: Own(output=lambda mean, std: (mean.detach(), std)), False, True),
    "float64": (lambda: Own().double(), False, True),
    "half precision": (lambda: Own().half(), False, True),
    "no bounds": (lambda: without("high"), False, True),
    "numbers as bounds": (lambda: with_bounds(-1.0), False, True),
    "arrays as bounds": (lambda: with_bounds(np.array([-1.0, -1.0])), False, True),
    "bounds of other width": (lambda: with_bounds(torch.zeros(3)), False, True),
    "a wrapper": (lambda: Wrapper(Own()), False, True),
    "a result within": (holding_a_result, False, True),
    "a distribution": (lambda: Own(output=Normal), False, False),
    "a dictionary": (
        lambda: Own(output=lambda mean, std: {"mean": mean, "std": std}),
        False,
        False,
    ),
    "a list": (lambda: Own(output=lambda mean, std: [mean, std]), False, False),
    "NaN": (lambda: NOT_FINITE, False, False),
    "one value for two": (lambda: Own(output=lambda m, s: (m[:, :1], s[:, :1])), False, False),
    "three actions for two": (lambda: Own(3, 3), False, False),
    "one action for two": (lambda: Own(3, 1), False, False),
    "no batch": (lambda: Own(output=lambda mean, std: (mean[0], std[0])), False, False),
}


@fast
@pytest.mark.parametrize("kind", POLICIES)
def test_a_policy_is_fine_tuned_or_one_sentence_says_what_is_needed(kind):
    policy, works = POLICIES[kind][0](), POLICIES[kind][1]
    arguments = toy_dataset(), LABELS, flags(SMALL + "--finetune-updates 20")
    if works:
        aligned = prefine.finetune(policy, *arguments)
        expected = prefine.finetune(Own(), *arguments)
        observations = torch.randn(5, 3)
        torch.testing.assert_close(aligned(observations), expected(observations))
    else:
        needs = r"policy needs buffers low and high.*tuple \(mean, std\).*; found, .*\.$"
        with pytest.raises(prefine.UserError, match=needs) as caught:
            prefine.finetune(policy, *arguments)
        assert "\n" not in str(caught.value)
        assert kind != "a result within" or "save it and load it first" in str(caught.value)


@pytest.fixture
def walk3(walks):
    """Makes the walk with its observations, and a third that is 0."""
    return lambda: gymnasium.wrappers.TransformObservation(
        type("Walk3", (walks.Walk,), {"observation_space": Box(-100, 100, (3,))})(),
        lambda observation: np.append(observation, np.float32(0)),
    )


@fast
@pytest.mark.parametrize("kind", POLICIES)
def test_a_policy_is_evaluated_or_one_sentence_says_what_is_needed(kind, walk3):
    policy, works = POLICIES[kind][0](), POLICIES[kind][2]
    if works:
        found = prefine.evaluate(policy, walk3, episodes=2, cost_limit=5)
        expected = prefine.evaluate(Own(), walk3, episodes=2, cost_limit=5)
        assert found["returns"] == pytest.approx(expected["returns"], abs=0.1)
    else:
        needs = r"policy needs to return a finite mean \(1, 2\); found .*\.$"
        with pytest.raises(prefine.UserError, match=needs) as caught:
            prefine.evaluate(policy, walk3, episodes=2, cost_limit=5)
        assert "\n" not in str(caught.value)


class Constant(torch.nn.Module):
    """A policy that always pushes alike, in evaluation, and insists on a batch of observations."""

    def __init__(self, *action):
        super().__init__()
        self.action = torch.nn.Parameter(torch.tensor(action))

    def forward(self, observations):
        assert observations.ndim == 2 and not self.training
        return self.action.expand(len(observations), -1)


def test_an_evaluation_has_the_numbers_of_its_episodes(cache):
    metrics = prefine.evaluate(Constant(1.0, 0.0), "OfflineBallRun", episodes=3, workers=2)
    act = lambda env, seed: lambda observation: np.array([1.0, 0.0])  # noqa: E731
    seeds = range(1_000_000, 1_000_003)  # of seed 0
    runs = prefine.run_episodes("OfflineBallRun-v0", act, seeds, 1, "test")
    returns, costs = ([run[key].sum() for run in runs] for key in ("rewards", "costs"))
    assert metrics["returns"] == pytest.approx(returns) and metrics["costs"] == costs
    assert metrics["return_mean"] == pytest.approx(np.mean(returns)) and len(set(returns)) == 3
    assert metrics["cost_mean"] == pytest.approx(np.mean(costs))
    assert metrics["violation_rate"] == np.mean(np.array(costs) > 10)
    assert metrics["failure_rate"] == np.mean([run["terminals"].any() for run in runs])
    env = prefine.make_env("OfflineBallRun-v0").unwrapped
    env.set_target_cost(10)
    score, cost = env.get_normalized_score(np.mean(returns), np.mean(costs))
    assert metrics["normalized_return"] == pytest.approx(score)
    assert metrics["normalized_cost"] == pytest.approx(cost)


# ------------------------------------------------------------------------ anybody's environments
@fast
def test_any_environment_is_evaluated_with_its_own_cost_and_limit(walks):
    found = [
        prefine.evaluate(Constant(action, 0.0), env, episodes=3, cost_limit=5)
        for action in (1.0, -1.0)
        for env in ("walks:Walk-v0", walks.Walk, lambda: gymnasium.make("Walk-v0"))
    ]
    assert found[0] == found[1] == found[2] and found[3] == found[4] == found[5]
    right, left = found[0], found[3]
    assert right["return_mean"] == 20 and left["return_mean"] == -20
    assert right["violation_rate"] == 1 and left["costs"] == [0, 0, 0]
    assert right["failure_rate"] == 0 and "normalized_return" not in right


@fast
def test_a_function_that_makes_the_wrapped_environment_normalises_what_a_policy_sees(walks):
    """A policy of normalised observations there is one of raw ones that normalises by itself."""
    policy = prefine.GaussianPolicy(*BOX, np.array([0.5, 0.2]), np.array([3.0, 0.1]), [16])
    inner = copy.deepcopy(policy)
    inner.mean, inner.std = torch.zeros(2), torch.ones(2)

    def wrapped():
        return gymnasium.wrappers.TransformObservation(
            walks.Walk(), lambda x: (x - np.float32([0.5, 0.2])) / np.float32([3.0, 0.1])
        )

    raw = prefine.evaluate(policy, walks.Walk, cost_limit=5)
    normalised = prefine.evaluate(inner, wrapped, cost_limit=5, workers=2)
    assert normalised["returns"] == pytest.approx(raw["returns"], abs=1e-3)
    other = prefine.evaluate(inner, walks.Walk, cost_limit=5)
    assert other["returns"] != pytest.approx(raw["returns"], abs=1e-3)


@fast
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"action_space": gymnasium.spaces.Discrete(2)}, r"actions need a flat Box.*Discrete\(2\)"),
        ({"action_space": Box(-np.inf, np.inf, (2,))}, "actions need a flat Box.*finite bounds"),
        ({"action_space": Box(0, np.inf, (2,))}, "actions need a flat Box.*finite bounds"),
        ({"action_space": Box(0, 0, (2,))}, "actions need a flat Box.*low < high"),
        ({"observation_space": Box(0, 1, (4, 4))}, "observations need a flat Box"),
        (
            {"observation_space": gymnasium.spaces.Dict(x=Box(0, 1, (4,)))},
            "observations need a flat Box.*Gymnasium has wrappers",
        ),
    ],
)
def test_a_space_that_is_no_flat_box_gets_a_sentence(changes, sentence, walks):
    with pytest.raises(prefine.UserError, match=sentence):
        prefine.evaluate(
            Constant(1.0, 0.0), type("Other", (walks.Walk,), changes), cost_limit=5, episodes=1
        )


@fast
def test_what_is_no_environment_no_episode_and_no_worker_gets_a_sentence(walks):
    policy = Constant(1.0, 0.0)
    with pytest.raises(prefine.UserError, match="a function that makes an env.*, not an object"):
        prefine.evaluate(policy, walks.Walk(), cost_limit=5)
    for options in {"episodes": 0}, {"workers": 0}, {"episodes": -1}:
        with pytest.raises(prefine.UserError, match="needs an episode and a worker at least"):
            prefine.evaluate(policy, walks.Walk, cost_limit=5, **options)
    with pytest.raises(prefine.UserError, match="--cost-limit .*is missing"):
        prefine.evaluate(policy, walks.Walk)
    for workers in 1, 2:
        with pytest.raises(prefine.UserError, match="gives no cost.*info.'cost'"):
            prefine.evaluate(policy, "walks:Free-v0", cost_limit=5, workers=workers)


@pytest.fixture(scope="session")
def walk_data(walks, tmp_path_factory):
    """A data set of the walk by random pushes; an episode's cost grows with its return."""

    def controller(env, seed):
        rng = np.random.default_rng(seed)
        push = rng.uniform(-1, 1, 2)
        return lambda observation: push + 0.3 * rng.normal(size=2)

    runs = prefine.run_episodes("walks:Walk-v0", controller, range(40), 1, "test")
    arrays = {name: np.concatenate([run[name] for run in runs]) for name in prefine.KEYS}
    return write_hdf5(tmp_path_factory.mktemp("walk") / "walk.hdf5", arrays)


WALK_RUN = """--env walks:Walk-v0 --hidden 16 --preferred 10 --dispreferred 10 --eval-episodes 4
--pretrain-updates 300 --finetune-updates 300"""


def test_a_whole_run_in_an_environment_of_ones_own_package(walk_data, tmp_path):
    line = [*WALK_RUN.split(), "--dataset", walk_data, "--cost-limit", 5]
    done = command(*line, "--workers", 2, "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    before, after = check_metrics(tmp_path / "run", 4, ["normalized_return", "normalized_cost"])
    assert before["cost_mean"] > 5 > after["cost_mean"] and "cost limit 5" in done.stdout


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "--cost-limit .*is missing"),
        ("--cost-limit 5 --env walks:Free-v0", "the environment gives no cost"),
        ("--cost-limit 5 --env walks:Wlak-v0", "Did you mean.*Walk"),
        ("--cost-limit 5 --env nowhere:Walk-v0", "nowhere"),
        ("--cost-limit 5 --dataset dsrl", "--dataset is missing: DSRL has no data of Walk-v0"),
        ("--cost-limit 5 --dataset scripted", "--dataset scripted: Walk-v0 has none"),
    ],
)
def test_what_an_environment_lacks_is_said_in_one_sentence(
    text, sentence, walk_data, tmp_path, capfd
):
    line = f"{WALK_RUN} --dataset {walk_data} --run-dir {tmp_path / 'run'} --workers 1 {text}"
    assert run(line) == 2
    (error,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("prefine.py: ")]
    assert re.search(sentence, error), error


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
import torch, prefine

gymnasium.register("Walk-v0", entry_point=Walk)

class Mine(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
    def forward(self, observations):
        return torch.tanh(self.layer(observations)), 1

print(prefine.evaluate(Mine(), "Walk-v0", episodes=2, cost_limit=5, workers=2)["failure_rate"])
"""


@pytest.mark.parametrize("how", ["file", "standard input"])
def test_classes_and_ids_of_a_script_without_a_main_guard_reach_the_workers(how, tmp_path):
    script = WALK + SCRIPT.format(here=str(HERE))
    (tmp_path / "script.py").write_text(script)
    line = [sys.executable, "script.py" if how == "file" else "-"]
    done = subprocess.run(
        line, input=script, capture_output=True, text=True, cwd=tmp_path, timeout=100
    )
    assert (done.returncode, done.stdout) == (0, "0.0\n"), done.stderr


# ------------------------------------------------------------------------------------------- data
def test_a_data_set_is_cut_into_episodes_at_terminals_and_timeouts(tmp_path, ball, capfd):
    arrays = small_arrays()
    arrays["terminals"][4] = True
    arrays["timeouts"][-1] = False
    dataset = prefine.load_dataset(write_hdf5(tmp_path / "data.hdf5", arrays), ball)
    assert dataset.starts.tolist() == [0, 5, 20] and dataset.ends.tolist() == [5, 20, 40]
    assert "rows without an end of their episode, dropped: 20" in capfd.readouterr().out
    for key in "observations", "actions", "rewards", "costs":
        np.testing.assert_array_equal(getattr(dataset, key).numpy(), arrays[key][:40])
    sums = [arrays["costs"][a:b].sum() for a, b in ((0, 5), (5, 20), (20, 40))]
    np.testing.assert_allclose(dataset.sums(dataset.costs), sums)
    states, actions = dataset.steps([2, 0])
    rows = [*range(20, 40), *range(5)]
    np.testing.assert_array_equal(states, arrays["observations"][rows])
    np.testing.assert_array_equal(actions, arrays["actions"][rows])
    spaced, _ = dataset.steps([2], points=3)
    np.testing.assert_array_equal(spaced, arrays["observations"][[20, 29, 39]])


def test_actions_beyond_the_action_space_are_clipped_and_their_steps_counted(tmp_path, ball, capfd):
    arrays = small_arrays()
    path = write_hdf5(tmp_path / "data.hdf5", arrays)
    prefine.load_dataset(path, ball)
    assert capfd.readouterr().out == ""
    arrays["actions"][:12] = [1.5, -7]
    dataset = prefine.load_dataset(write_hdf5(path, arrays), ball)
    assert (dataset.actions[:12] == torch.tensor([1, -1])).all()
    assert "beyond the action space, clipped: of 12 of 60 steps" in capfd.readouterr().out


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other))


def test_other_shapes_and_types_of_the_same_numbers_load_the_same(tmp_path, ball):
    arrays = small_arrays()
    plain = prefine.load_dataset(write_hdf5(tmp_path / "plain.hdf5", arrays), ball)
    columns = {k: v[:, None] if v.ndim == 1 else v for k, v in arrays.items()}
    doubles = {k: v.astype(np.float64) for k, v in arrays.items()}
    for name, other in ("columns", columns), ("doubles", doubles):
        assert equal(prefine.load_dataset(write_hdf5(tmp_path / name, other), ball), plain)
        del other["next_observations"]
        assert equal(prefine.make_dataset(**other)[2:], plain[2:])  # and so does Python
    with pytest.raises(prefine.UserError, match=r"'rewards' must be numbers.*\(60, 2\)"):
        prefine.make_dataset(**other | {"rewards": np.ones((ROWS, 2))})


def test_next_observations_and_costs_are_read_only_where_needed(tmp_path, ball):
    arrays = small_arrays()
    plain = prefine.load_dataset(write_hdf5(tmp_path / "plain.hdf5", arrays), ball)
    arrays["next_observations"] = np.array([b"not a number"])
    assert equal(prefine.load_dataset(write_hdf5(tmp_path / "text.hdf5", arrays), ball), plain)
    del arrays["next_observations"], arrays["costs"]
    path = write_hdf5(tmp_path / "neither.hdf5", arrays)
    dataset = prefine.load_dataset(path, ball, with_costs=False)
    assert dataset.costs is None and equal(dataset[:3], plain[:3])
    with pytest.raises(prefine.UserError, match="costs"):
        prefine.load_dataset(path, ball)


def replace(key, change):
    """A defect: the array ``key`` is another one."""
    arrays = small_arrays()
    return lambda path: write_hdf5(path, arrays | {key: change(arrays[key])})


def put(value):
    """A change of an array: its seventh number."""

    def change(array):
        array = array.astype(np.float64)
        array.reshape(-1)[7] = value
        return array

    return change


def without_costs(path):
    write_hdf5(path, {k: v for k, v in small_arrays().items() if k != "costs"})


def blosc(path):
    """Its costs are said to be packed by Blosc, whose filter h5py has not."""
    without_costs(path)
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_chunk((ROWS,))
    settings.set_filter(32001, h5py.h5z.FLAG_OPTIONAL, ())
    with h5py.File(path, "a") as file:
        space = h5py.h5s.create_simple((ROWS,))
        costs = h5py.h5d.create(file.id, b"costs", h5py.h5t.NATIVE_FLOAT, space, settings)
        costs.write_direct_chunk((0,), bytes(100))


def truncated(path):
    write_hdf5(path, small_arrays())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_task(path):
    prefine.save_policy(path.with_name("policy.pt"), "OfflineBallRun-v0", toy_policy())
    write_hdf5(path, small_arrays())


BAD = {  # what is wrong: the sentence, the file that has it (else a good one), the flags
    "truncated": ("data.hdf5: not usable.*truncated.*deleted", truncated),
    "a typo for scripted": ("no such file; .*scripted", None, "--dataset scriptd"),
    "Minari's": (
        "no array 'observations'.*converts Minari's",
        lambda path: write_hdf5(path, {"episode_0/observations": np.zeros((5, 8))}),
    ),
    "no costs": ("no array 'costs'.*--preferences", without_costs),
    "a filter": ("'costs' needs the filter.*32001.*hdf5plugin", blosc),
    "text": ("'rewards' must be num", replace("rewards", lambda x: np.array([b"1.0"] * len(x)))),
    "NaN": ("'observations' has.*no finite", replace("observations", put(math.nan))),
    "unequal lengths": ("'costs' must.*59.*of 60 obs", replace("costs", lambda x: x[:-1])),
    "negative costs": ("'costs' has.*from 0", replace("costs", put(-1.0))),
    "no end": ("no episode has an end", replace("timeouts", np.zeros_like)),
    "wide actions": (
        "actions are 4 wide in the data, 2 here",
        replace("actions", lambda x: np.hstack([x, x])),
    ),
    "narrow observations": ("are 7 wide in", replace("observations", lambda x: x[:, :-1])),
    "few safe": ("--preferred 4, --disp.* 1: . of 3 episodes cost at most", None, "--preferred 4"),
    "another task": ("found one of OfflineBallRun", other_task, "--policy {tmp}/policy.pt"),
    "no policy": ("policy.pt.*No such file.*another", None, "--policy {tmp}/policy.pt"),
    "no labels": ("labels.csv", None, "--preferences {tmp}/labels.csv"),
    "binary labels": ("data.hdf5", None, "--preferences {tmp}/data.hdf5"),
    "a run folder in a file": ("data.hdf5", None, "--run-dir {tmp}/data.hdf5/run"),
    "an empty variable": ("--policy: an empty name", None, "--policy="),
    "no task": ("--env: an empty name", None, "--env="),
    "a mistyped task": ("Did you mean.*OfflineBallCircle", None, "--env OfflineBalCircle-v0"),
    "MetaDrive": ("OfflineMetadrive-easymean", None, "--env OfflineMetadrive-easymean-v0"),
    "no package": ("nowhere", None, "--env nowhere:Task-v0"),
    "discrete actions": ("actions need a flat Box.*Discrete", None, "--env CartPole-v1"),
    "discrete states": ("observations need a flat Box.*Discrete", None, "--env FrozenLake-v1"),
    "no such device": ("--device nonsense: not usable", None, "--device nonsense"),
    "no scripted data": (
        "--dataset scripted: .*Ant.* has none; Off",
        None,
        "--env OfflineAntVelocity --dataset scripted",
    ),
    "0 preferred": ("no trajectory is preferred", None, "--preferred 0"),
    "a negative limit": ("--cost-limit: needs a number from 0", None, "--cost-limit=-1"),
    "a NaN limit": ("--cost-limit: needs a number from 0", None, "--cost-limit nan"),
    "a share of 5": ("--finetune-top: needs a number from 0 to 1; f", None, "--finetune-top 5"),
    "no episode": ("needs an episode and a worker", None, "--eval-episodes 0"),
    "no worker": ("needs an episode and a worker", None, "--workers 0"),
    "a word": ("--beta: invalid float value: 'small'", None, "--beta small"),
    "a mistyped flag": ("unrecognized arguments: --bta 1; --help", None, "--bta 1"),
    "a method": ("--method: .*'none'", None, "--method none"),
    "a loser": ("--loser: .*'none'", None, "--loser none"),
}


@pytest.mark.filterwarnings("error")  # a warning would be a line more
@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_one_sentence_and_leaves_nothing(name, tmp_path, capfd, cache):
    sentence, make, text = (*BAD[name], "")[:3]
    path = tmp_path / "data.hdf5"
    make(path) if make else write_hdf5(path, small_arrays())
    line = f"--env {BALL} --dataset {path} --run-dir {tmp_path / 'run'} --preferred 1"
    line += f" --dispreferred 1 --cost-limit 10 {text.format(tmp=tmp_path)}"
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert run(line) == 2
    output, error = capfd.readouterr()
    assert error.count("\n") == 1 and "Traceback" not in output
    assert re.search(sentence, error), error
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert not (tmp_path / "run").exists()


def test_200_files_with_damaged_bytes_load_or_give_one_sentence(tmp_path, ball):
    path = write_hdf5(tmp_path / "data.hdf5", small_arrays())
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
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
def server():
    """A web server on this machine. ``serve(name=(status, body, declared length))`` gives a url."""
    pages = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, body, length = pages.get(self.path[1:], (404, b"nothing here", 12))
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()

    def serve(**more):
        pages.update(more)
        return f"http://127.0.0.1:{web.server_port}"

    yield serve
    web.shutdown()
    web.server_close()


@pytest.fixture
def hdf5_bytes(tmp_path):
    return write_hdf5(tmp_path / "served.hdf5", small_arrays()).read_bytes()


@pytest.fixture
def own_cache(ball, tmp_path, monkeypatch):
    """An empty dsrl cache of one test."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr("dsrl.offline_env.DATASET_PATH", str(folder))
    return folder


def test_dsrl_data_is_downloaded_once_into_its_cache(
    server, hdf5_bytes, ball, own_cache, monkeypatch
):
    url = server(**{"small.hdf5": (200, hdf5_bytes, len(hdf5_bytes))})
    monkeypatch.setattr(ball.unwrapped, "dataset_url", f"{url}/small.hdf5")
    path = prefine.find_dataset(flags(f"--env {BALL}"), ball)
    assert path == own_cache / "small.hdf5" and path.read_bytes() == hdf5_bytes
    server(**{"small.hdf5": (404, b"", 0)})
    assert prefine.find_dataset(flags(f"--env {BALL}"), ball) == path


@pytest.mark.parametrize("failure", ["missing", "refused", "no address"])
def test_a_failed_download_leaves_nothing_and_names_the_ways_on(
    failure, server, ball, own_cache, monkeypatch
):
    url = {"missing": f"{server()}/data.hdf5", "refused": "http://127.0.0.1:9/data.hdf5"}
    url = url.get(failure, "no address/data.hdf5")
    monkeypatch.setattr(ball.unwrapped, "dataset_url", url)
    sentence = f"{url}: not downloaded: .*--dataset FILE.*--dataset scripted"
    with pytest.raises(prefine.UserError, match=sentence) as caught:
        prefine.find_dataset(flags(f"--env {BALL}"), ball)
    assert "\n" not in str(caught.value)
    assert not [name for name in os.listdir(own_cache) if not name.endswith(".lock")]


@pytest.mark.parametrize("failure", ["cut", "html"])
def test_a_download_of_something_else_is_named_and_may_be_deleted(
    failure, server, hdf5_bytes, ball, own_cache, monkeypatch
):
    half, html = hdf5_bytes[: len(hdf5_bytes) // 2], b"<html>Sign in first</html>"
    pages = {"cut": (200, half, len(hdf5_bytes)), "html": (200, html, len(html))}
    url = server(**{"data.hdf5": pages[failure]})
    monkeypatch.setattr(ball.unwrapped, "dataset_url", f"{url}/data.hdf5")
    with pytest.raises(prefine.UserError, match="data.hdf5.*(not downloaded|once it is deleted)"):
        prefine.load_dataset(prefine.find_dataset(flags(f"--env {BALL}"), ball), ball)


# -------------------------------------------------------------------------------------- simulators
def same_episodes(one, other):
    return all(np.array_equal(a[key], b[key]) for a, b in zip(one, other) for key in a)


def test_episodes_depend_on_their_seed_and_not_on_the_number_of_workers():
    seeds, controller = [7, 8, 9, 10], prefine.CONTROLLERS[BALL]
    one, two = (prefine.run_episodes(BALL, controller, seeds, n, "test") for n in (1, 2))
    alone = [prefine.run_episode(BALL, controller, seed) for seed in seeds[::-1]][::-1]
    assert same_episodes(one, two) and same_episodes(one, alone)
    assert not np.array_equal(one[0]["rewards"], one[1]["rewards"])
    for episode in one:
        steps = len(episode["rewards"])
        assert episode["observations"].shape == (steps, 8)
        assert episode["actions"].shape == (steps, 2)
        following = episode["next_observations"]
        np.testing.assert_array_equal(episode["observations"][1:], following[:-1])
        assert episode["timeouts"].nonzero()[0].tolist() == [steps - 1]
        assert not episode["terminals"].any()


def test_a_car_button_episode_repeats_itself():
    env_id = "OfflineCarButton1Gymnasium-v0"
    controller = prefine.CONTROLLERS[env_id]
    first, second = (prefine.run_episode(env_id, controller, 7) for _ in range(2))
    assert same_episodes([first], [second]) and len(first["rewards"]) == 1000
    assert first["costs"].sum() > 0 and not first["terminals"].any()
    assert first["rewards"].sum() > 5  # it drives, and finds its goals


@pytest.mark.parametrize("env_id", prefine.BULLET)
def test_scripted_bullet_episodes_are_safe_and_unsafe_slow_and_fast(env_id):
    episodes = prefine.run_episodes(env_id, prefine.CONTROLLERS[env_id], range(16), 2, "test")
    returns, costs = ([e[key].sum() for e in episodes] for key in ("rewards", "costs"))
    assert min(costs) == 0 and sum(cost > 10 for cost in costs) >= 3
    assert max(returns) > 1.5 * statistics.median(returns) > 100


# ---------------------------------------------------------------------------------- whole runs
BALL_RUN = """--env OfflineBallCircle --dataset scripted --scripted-episodes 24 --preferred 4
--dispreferred 3 --hidden 32 --pretrain-updates 300 --finetune-updates 300 --eval-episodes 2
--pretrain-top 0.3 --seed 1"""


@pytest.fixture(scope="module")
def ball_run(tmp_path_factory, cache):
    """A whole run, as a user types it; its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    done = command(*BALL_RUN.split(), "--workers", 2, "--run-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def check_metrics(folder, episodes, lacks=()):
    """The two parts of metrics.json, after a look at their names and numbers."""
    content = metrics(folder)
    assert list(content) == ["title", "pretrained", "finetuned"]
    names = "return_mean cost_mean violation_rate failure_rate returns costs normalized_return "
    names += "normalized_cost"
    for part in content["pretrained"], content["finetuned"]:
        assert list(part) == [name for name in names.split() if name not in lacks]
        assert len(part["returns"]) == len(part["costs"]) == episodes
        assert all(np.isfinite(value).all() for value in part.values())
        assert part["return_mean"] == pytest.approx(np.mean(part["returns"]))
    return content["pretrained"], content["finetuned"]


def test_a_whole_run_says_what_it_learns_from_and_what_it_found(ball_run, cache):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, done = ball_run
    before, after = check_metrics(folder, episodes=2)
    files = {"config.json", "finetuned.pt", "metrics.json", "pretrained.pt", "report.png"}
    found = set(os.listdir(folder))
    assert found - files == {name for name in found if name.startswith("events.out.tfevents")}
    assert files < found and (folder / "report.png").read_bytes().startswith(b"\x89PNG")

    output = done.stdout
    first = output.index("4 preferred, 3 dispreferred of 24 episodes, cost limit 10")
    assert output.index("collecting 24 scripted episodes") < first < output.index("left out")
    assert re.search(r"^left out.*\b\d+$", output, re.MULTILINE)
    (row,) = table(output)
    assert row["task, data"].startswith(f"{BALL}, ") and row["method"].startswith("prefine")
    last = output.splitlines()[-1]
    for name in "return_mean", "cost_mean":
        assert f"{before[name]:.4g} → {after[name]:.4g}" in last
    assert last.endswith(f"{folder / 'report.png'}")

    assert any("scripted" in name and name.endswith(".hdf5") for name in os.listdir(cache))
    config = json.loads((folder / "config.json").read_text())
    assert config["preferred"] == 4 and config["cost_limit"] == 10 and config["env"] == BALL
    events = EventAccumulator(str(folder)).Reload()
    for name in "losses/pretraining", "losses/finetuning":
        assert [event.step for event in events.Scalars(name)] == [99, 199, 299]
    for name in "return_mean", "cost_mean":
        values = [event.value for event in events.Scalars(f"evaluation/{name}")]
        assert values == pytest.approx([before[name], after[name]], rel=1e-5)


def test_a_complete_run_is_shown_and_not_repeated(ball_run, capfd):
    folder, done = ball_run
    files = [folder / "metrics.json", *folder.glob("*.pt")]
    before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    assert run(BALL_RUN, f"--run-dir {folder}") == 0
    again = capfd.readouterr().out
    assert "complete" in again and table(again) == table(done.stdout)
    assert [(file.read_bytes(), file.stat().st_mtime_ns) for file in files] == before


def same_run(one, other):
    """If two run folders hold the same numbers, bit for bit."""
    assert metrics(one) == metrics(other)
    for name in "pretrained.pt", "finetuned.pt":
        assert same(*(prefine.load_policy(folder / name) for folder in (one, other)))


def test_another_folder_and_number_of_workers_give_the_same_numbers(ball_run, tmp_path):
    assert run(BALL_RUN, f"--workers 1 --run-dir {tmp_path / 'b'}") == 0
    same_run(tmp_path / "b", ball_run[0])


def start(*arguments, **variables):
    """``prefine.py`` in the background, in a process group of its own."""
    line = [sys.executable, str(HERE / "prefine.py"), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, env=os.environ | variables, start_new_session=True, **pipes)


def wait_until(condition, seconds=60, pause=0.02):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(pause)


def interrupted_run(folder, data, seed):
    """A run interrupted in each stage, and how many files that end a stage each signal found."""
    rng, hit, signals = np.random.default_rng(seed), [], ["SIGKILL", "SIGTERM", "SIGINT"]
    line = [*BALL_RUN.split(), "--workers", 1, "--run-dir", folder]

    def stage():
        return len([*data.glob("*.hdf5"), *folder.glob("*.pt")])

    for wanted, longest in (0, 3), (0, 5), (1, 1), (2, 1), (3, 1):  # stages differ in length
        process = start(*line, DSRL_DATASET_DIR=str(data))
        wait_until(lambda p=process, n=wanted: stage() >= n or p.poll() is not None)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, longest))
        kind, running = getattr(signal, rng.choice(signals)), process.poll() is None
        hit += [stage()] * running
        process.send_signal(kind)
        process.communicate()
    process = start(*line, DSRL_DATASET_DIR=str(data))
    output, error = process.communicate()
    assert process.returncode == 0, error
    assert "done already" in output or "complete" in output
    return hit


def test_10_interruptions_at_random_moments_change_no_number(ball_run, tmp_path):
    """In collection, pre-training, fine-tuning and evaluation, by three signals."""
    jobs = [(tmp_path / f"run{i}", tmp_path / f"data{i}", i) for i in range(2)]
    with ThreadPoolExecutor(2) as pool:
        hit = sum(pool.map(interrupted_run, *zip(*jobs)), [])
    for folder, data, _ in jobs:
        same_run(folder, ball_run[0])
        assert len(list(data.glob("*.hdf5"))) == 1
    assert 0 in hit and max(hit) > 1 and len(hit) > 6  # a few may come just after the end


def group(leader):
    """The processes of the group of this number that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[2]) == leader and fields[0] != "Z":
                found.append(int(path.parent.name))
    return found


def worker_processes(leader):
    """Those that joblib has started, from their first moment on."""
    found = []
    for pid in group(leader):
        with contextlib.suppress(OSError):
            if b"LokyProcess" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


@pytest.mark.parametrize("pause", [0, 0.3, 3])
@pytest.mark.parametrize("victim", ["worker", "main", "Ctrl-C"])
def test_a_killed_process_is_reported_and_leaves_no_other(victim, pause, ball_run, tmp_path):
    """Also where a worker has only just been started, so many seconds ago."""
    line = [*BALL_RUN.split(), "--workers", 2, "--eval-episodes", 400, "--finetune-updates", 100]
    process = start(*line, "--run-dir", tmp_path / "run")
    wait_until(lambda: worker_processes(process.pid), pause=0.001)
    time.sleep(pause)
    if victim == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    else:
        pid = worker_processes(process.pid)[0] if victim == "worker" else process.pid
        os.kill(pid, signal.SIGKILL)
    error = process.communicate(timeout=60)[1]
    if victim == "worker":
        assert process.returncode == 2
        assert "a worker failed" in error.splitlines()[-1] and "--workers 1" in error
    if victim == "Ctrl-C":
        assert process.returncode == 130 and "Traceback" not in error
        assert "interrupted; the same command goes on" in error
    wait_until(lambda: not group(process.pid), 30)
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_two_runs_at_once_in_one_folder_make_one_file_and_the_same_numbers(ball_run, tmp_path):
    line = [*BALL_RUN.split(), "--workers", 1, "--run-dir", tmp_path / "run"]
    both = [start(*line, DSRL_DATASET_DIR=str(tmp_path / "data")) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("collecting" in output for output in outputs) == 1
    same_run(tmp_path / "run", ball_run[0])


def test_a_full_disk_gives_one_sentence_and_loses_nothing(ball_run, tmp_path):
    """A limit on the size of files stands in for the disk: writes beyond it fail as there."""
    folder = tmp_path / "run"

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))

    done = command(*BALL_RUN.split(), "--run-dir", folder, preexec_fn=limited)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    sentence = f"prefine.py: {folder}/pretrained.pt: not written"
    assert done.stderr.splitlines()[-1].startswith(sentence)
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.part"))
    assert run(BALL_RUN, "--run-dir", folder) == 0
    same_run(folder, ball_run[0])


def test_other_flags_in_the_same_folder_are_refused(ball_run, capfd):
    content = (ball_run[0] / "metrics.json").read_bytes()
    assert run(f"{BALL_RUN} --run-dir {ball_run[0]} --beta 0.2") == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert re.search("holds a run of other flags or files, see .*config.json", error)
    assert (ball_run[0] / "metrics.json").read_bytes() == content


@pytest.fixture
def files(ball_run, tmp_path):
    """A data set, labels and a policy of ball's, and the flags of a short run of them."""
    found = {name: tmp_path / name for name in ("dataset", "policy", "preferences")}
    write_hdf5(found["dataset"], small_arrays())
    shutil.copy(ball_run[0] / "pretrained.pt", found["policy"])
    write_preferences(found["preferences"], [(0, "preferred"), (1, "dispreferred")])
    line = f"--env {BALL} --eval-episodes 1 --finetune-updates 5 --workers 1 "
    return found, line + " ".join(f"--{name} {path}" for name, path in found.items())


@pytest.mark.parametrize("state", ["complete", "interrupted"])
def test_a_run_knows_its_files_by_their_content(state, files, ball_run, tmp_path, capfd):
    """The same command and the same name, but another file: never the old result."""
    files, line = files
    line += f" --run-dir {tmp_path / 'run'}"
    assert run(line) == 0
    if state == "interrupted":
        (tmp_path / "run" / "metrics.json").unlink()
    changes = {
        "dataset": replace("rewards", put(9)),
        "policy": lambda path: shutil.copy(ball_run[0] / "finetuned.pt", path),
        "preferences": lambda path: write_preferences(
            path, [(2, "preferred"), (1, "dispreferred")]
        ),
    }
    before = {file: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    for name, path in files.items():
        content = path.read_bytes()
        changes[name](path)
        capfd.readouterr()
        assert run(line) == 2
        assert "holds a run of other flags or files" in capfd.readouterr().err
        assert {file: file.read_bytes() for file in (tmp_path / "run").iterdir()} == before
        path.write_bytes(content)


def test_one_file_by_any_name_is_one_run(files, tmp_path, monkeypatch, capfd):
    """And a complete run or a table whose files a power cut has emptied names them."""
    files, line = files
    monkeypatch.chdir(tmp_path)
    shutil.copy(files["dataset"], "x.hdf5")
    shutil.copy("x.hdf5", "renamed.hdf5")
    for name in "x.hdf5", "./x.hdf5", tmp_path / "x.hdf5", "renamed.hdf5":
        assert run(line, "--dataset", name) == 0
    assert capfd.readouterr().out.count("complete") == 3
    (folder,) = Path("runs").iterdir()
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


def test_a_trained_policy_is_taken_instead_of_pretraining(ball_run, tmp_path):
    policy = ball_run[0] / "pretrained.pt"
    line = f"{BALL_RUN} --policy {policy} --run-dir {tmp_path / 'e'}"
    assert run(line) == 0
    assert metrics(tmp_path / "e") == metrics(ball_run[0])


@pytest.fixture(scope="module")
def swimmer(tmp_path_factory):
    """A data set of random actions, recorded in a Safety-Gymnasium task; its path and arrays."""

    def controller(env, seed):
        rng = np.random.default_rng(seed)
        push = rng.uniform(-1, 1, 2)
        return lambda observation: push + 0.5 * rng.normal(size=2)

    env_id = "OfflineSwimmerVelocityGymnasium-v1"
    runs = prefine.run_episodes(env_id, controller, range(12), 2, "test")
    arrays = {name: np.concatenate([run[name] for run in runs]) for name in prefine.KEYS}
    return write_hdf5(tmp_path_factory.mktemp("swimmer") / "swimmer.hdf5", arrays), arrays


SWIMMER_RUN = """--env OfflineSwimmerVelocity --preferred 3 --dispreferred 3 --hidden 32
--pretrain-updates 200 --finetune-updates 200 --eval-episodes 2 --workers 2"""


def test_a_whole_run_in_safety_gymnasium(swimmer, tmp_path):
    path, arrays = swimmer
    limit = np.median(arrays["costs"].reshape(12, 1000).sum(1))
    line = f"--dataset {path} --cost-limit {limit} --run-dir {tmp_path / 'h'}"
    assert run(SWIMMER_RUN, line) == 0
    check_metrics(tmp_path / "h", episodes=2)


def test_labels_by_hand_need_no_costs(swimmer, tmp_path, capfd):
    arrays = {key: value for key, value in swimmer[1].items() if key != "costs"}
    path = write_hdf5(tmp_path / "no_costs.hdf5", arrays)
    rows = [(episode, ["preferred", "dispreferred"][episode % 2]) for episode in range(6)]
    labels = write_preferences(tmp_path / "labels.csv", rows)
    line = f"--dataset {path} --preferences {labels} --run-dir {tmp_path / 'j'}"
    assert run(SWIMMER_RUN, line) == 0
    assert "3 preferred, 3 dispreferred of 12 episodes" in capfd.readouterr().out
    check_metrics(tmp_path / "j", episodes=2)
    assert (tmp_path / "j" / "report.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------- the command line
@fast
def test_a_method_is_a_set_of_flags_and_flags_override_it():
    assert vars(flags("--method prefine")) == vars(flags())
    assert flags("--method dpo").loser == "dispreferred" and flags("--method dpo").leave_out == 0
    assert flags("--method dpo --loser reference").loser == "reference"
    weighted, imitation = flags("--method weighted-imitation"), flags("--method imitation")
    assert weighted.beta == imitation.beta == 0 and weighted.leave_out == flags().leave_out
    assert imitation.leave_out == 0 and imitation.finetune_top == 1
    assert prefine.parse_args(["--beta", 0.5, "--hidden", 8, 4, "--seed", np.int64(3)]) == flags(
        "--beta 0.5 --hidden 8 4 --seed 3"
    )


def test_a_copy_of_the_one_file_in_an_empty_folder_does_everything(ball_run, tmp_path, cache):
    shutil.copy(HERE / "prefine.py", tmp_path)
    line = [sys.executable, "prefine.py", *BALL_RUN.split()]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    same_run(folder, ball_run[0])
    assert (folder / "report.png").exists() and list(folder.glob("events*"))


# ------------------------------------------------------------------------------------------ table
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


def table(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [dict(zip(rows[0], row)) for row in rows[2:]]


def test_a_table_has_a_row_for_each_task_data_method_and_set_of_changed_flags(tmp_path, capfd):
    names = {"default": {}, "beta": {"beta": 5.0}, "dpo": {"method": "dpo"}}
    names |= {"other data": {"dataset": "cd34" * 16}, "other task": {"env": "OfflineBallRun-v0"}}
    names |= {"labels": {"preferences": "ef56" * 16}, "many": {"beta": 2.0, "hidden": [8]}}
    for i, (name, config) in enumerate(names.items()):
        for seed in range(3 if name == "default" else 1):
            numbers = (200.0 + seed, 50.0), (100.0 + 10 * i + 2 * seed, 1.0 + i)
            fake_run(tmp_path / f"{name}{seed}", {"seed": seed} | config, *numbers)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text("{}")
    assert run(f"--summary {tmp_path}") == 0
    rows = table(capfd.readouterr().out)
    assert len(rows) == len(names) and len(rows[0]) == 7
    title = f"{BALL}, data, cost limit 10, data ab12"
    found = {row["method"]: row for row in rows if row["task, data"] == title}
    (labels,) = (name for name in found if name.startswith("prefine --preferences ef56"))
    methods = {"prefine", "prefine --beta 5.0", "dpo", labels}
    assert set(found) == methods | {"prefine --beta 2.0 --hidden [8]"}
    default, beta = found["prefine"], found["prefine --beta 5.0"]
    assert default["seeds"] == "3" and beta["seeds"] == "1"
    assert default["return, before → after"] == "201 ± 0.8165 → 102 ± 1.633"
    assert beta["return, before → after"] == "200 → 110"
    assert default["cost, before → after"] == "50 ± 0 → 1 ± 0"
    assert beta["over the limit"] == "100% → 0%" and beta["ended early"] == "25% → 25%"
    assert run(f"--summary {tmp_path / 'unfinished'}") == 2
    assert "no metrics.json" in capfd.readouterr().err


# ------------------------------------------------------------------------- run_all.sh and README
def test_run_all_works_in_a_folder_with_a_space_and_a_quote_in_its_name(ball_run, tmp_path, cache):
    here = tmp_path / "it's a folder"
    (here / ".venv" / "bin").mkdir(parents=True)
    for name in "prefine.py", "run_all.sh":
        shutil.copy(HERE / name, here)
    python = here / ".venv" / "bin" / "python"  # set-up is taken as done, with this Python
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    checksum = "sed -n '/^# \\/\\/\\/ script$/,/^# \\/\\/\\/$/p' prefine.py | cksum"
    stamp = f'echo "$({checksum}) 3.11" > .venv/stamp && '
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
    script = (here / "run_all.sh").read_text()
    assert '"--env OfflineBallCircle --dataset scripted"' in script
    small = small.replace("--seed 1", "")
    (here / "run_all.sh").write_text(
        script.replace('"--env OfflineBallCircle --dataset scripted"', f'"{small}"')
    )
    only = {"ONLY": "OfflineBallCircle.*--seed 1 --method prefine", "SEEDS": "1"}
    done = run_all("-j", "2", **only)
    assert done.returncode == 0, done.stderr
    (made,) = [path for path in (here / "runs").glob("OfflineBallCircle-v0__prefine__1__*")]
    same_run(made, ball_run[0])
    done = run_all("-j", "2", ONLY="OfflineBallCircle.*--method prefine", SEEDS="-1")
    assert done.returncode == 2 and "failed, see runs/logs" in done.stderr
    done = run_all("-j", "2", ONLY="no such flag")
    assert done.returncode == 2 and "no experiment's flags match" in done.stderr
    done = run_all("-j", "2", ONLY="halfcheetah.*--method prefine")  # its file is not here
    assert done.returncode == 0 and "skipped: the experiments on files of" in done.stderr
    for arguments in (["-j", "x"], ["nonsense"]):
        done = run_all(*arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == ""


def readme_code(title, language="python"):
    """The blocks of code under a heading of the README; none where there is no such heading."""
    parts = (HERE / "README.md").read_text().split(f"\n## {title}\n")[1:]
    return re.findall(rf"```{language}\n(.*?)```", "".join(parts).split("\n## ")[0], re.DOTALL)


def test_every_flag_that_the_readme_names_exists():
    known = {"--osrl", "--slurm", "--quick"}
    known |= set(re.findall(r"--[a-z][a-z-]*", command("--help").stdout))
    for line in (HERE / "README.md").read_text().splitlines():
        if not re.search(r"\b(pip|uv|git|pytest|docker|sbatch)\b", line):
            assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", line)) <= known, line


def test_the_readmes_python_example_ends_in_its_printed_result(ball_run, tmp_path, cache):
    """From a folder beside the clone, as a script on standard input."""
    (clone := tmp_path / "prefine").mkdir()
    (beside := tmp_path / "project").mkdir()
    shutil.copy(HERE / "prefine.py", clone)
    code = "\n".join(readme_code("From Python"))
    assert "torch.set_num_threads(1)" in code  # more are slower, ten times on a busy machine
    output = run_script(code, beside)
    assert re.search(r"^before: return -?\d+, cost \d+$", output, re.MULTILINE), output
    assert re.search(r"^after: return -?\d+, cost \d+$", output, re.MULTILINE), output


def test_the_readmes_example_by_hand_is_right():
    code = "\n".join(readme_code("The method"))
    expected = re.findall(r"# prints (.*)", code)
    assert expected and run_script(code, HERE).splitlines() == expected


def test_the_readmes_own_environment_makes_its_data_and_runs(tmp_path, cache):
    """Its blocks of Python are files where they begin with a name; then come its commands."""
    shutil.copy(HERE / "prefine.py", tmp_path)
    blocks = readme_code("Your own environment")
    assert blocks
    for code in blocks:
        if name := re.match(r"# (\w+\.py)", code):
            (tmp_path / name[1]).write_text(code)
        else:
            run_script(code, tmp_path)
    lines = "".join(readme_code("Your own environment", "bash")).replace("\\\n", " ").splitlines()
    lines = [line for line in lines if "python" in line]
    for line in lines:
        if "prefine.py" in line:
            line += " --pretrain-updates 200 --finetune-updates 200 --eval-episodes 4"
        line = re.sub(r"^\S*python", sys.executable, line)
        done = subprocess.run(line.split(), capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("runs/*/report.png"))


# -------------------------------------------------------------------------------- the speed figures
def seconds(work, *arguments):
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def bare_updates(count=1000):
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

    def show(name, first, second, repeats=5):
        ratios = [seconds(first) / seconds(second) for _ in range(repeats)]
        print(f"| {name} | {statistics.median(ratios):.2f} |", flush=True)

    def read(path):
        with h5py.File(path) as file:
            return [file[name][()] for name in arrays]

    print("| ratio | measured |\n|---|---:|")
    with tempfile.TemporaryDirectory() as folder:
        path, env = write_hdf5(Path(folder) / "data.hdf5", arrays), prefine.make_env(car)
        load = functools.partial(prefine.load_dataset, path, env)
        show("loading to h5py's reading", load, lambda: read(path), 3)
    data = prefine.make_dataset(**{name: values[:80_000] for name, values in arrays.items()})
    policy = prefine.GaussianPolicy(*BOX, np.zeros(88), np.ones(88))
    pairs = {"preferred": list(range(40)), "dispreferred": list(range(40, 80))}
    args = flags("--pretrain-updates 1000 --finetune-updates 1000")
    pretrain = functools.partial(prefine.pretrain, data, BOX_SPACE, args)
    show("a pre-training update to a bare one", pretrain, bare_updates)
    finetune = functools.partial(prefine.finetune, policy, data, pairs, args)
    show("a fine-tuning update to a bare one", finetune, bare_updates)
    if len(os.sched_getaffinity(0)) > 1:

        def evaluate(workers):
            prefine.evaluate(policy, car, episodes=12, workers=workers)

        evaluate(2)  # starts the workers
        show("evaluation by one process to by two", lambda: evaluate(1), lambda: evaluate(2), 3)


def import_osrl():
    """OSRL's algorithms, from the folder .osrl, without the logger that it imports."""
    sys.path.insert(0, str(HERE / ".osrl"))  # run_all.sh has put it there
    quiet = type("DummyLogger", (), {"store": lambda self, **values: None})
    for name, parts in {
        "fsrl": {},
        "fsrl.utils": {"DummyLogger": quiet, "WandbLogger": quiet},
    }.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(parts)
    from osrl import algorithms

    return algorithms


def osrl(task="OfflineBallCircle", bc_updates=100_000, cpq_updates=2_000):
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
        episodes = prefine.run_episodes(
            args.env, lambda env, seed: act, range(1_000_000, 1_000_020), 1, name
        )
        score, cost = (
            np.mean([run[key].sum() for run in episodes]) for key in ("rewards", "costs")
        )
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
    train(
        "OSRL BC-Safe",
        lambda i: trainer.train_one_step(data.observations[i], data.actions[i]),
        rows,
        bc_updates,
        model.act,
    )
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
