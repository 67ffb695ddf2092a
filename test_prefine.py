"""Tests of prefine.py, claim by claim, and its speed figures.

    bash run_all.sh test                    # all of them, a few minutes on two cores
    bash run_all.sh test -m fast            # policy, loss and fine-tuning, in seconds
    bash run_all.sh bench [--quick]         # ratios; --quick: with a tenth of the data set
    bash run_all.sh bench --osrl            # beside OSRL's BC-Safe and CPQ, many minutes

Nothing that can be run is mocked: simulators, HDF5 files and HTTP servers are real. The dsrl cache
of whoever runs this is never touched.
"""

import contextlib
import csv
import functools
import http.server
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

import h5py
import numpy as np
import pytest
import torch

import prefine

HERE = Path(__file__).parent
BALL = "OfflineBallCircle-v0"
ROWS, EPISODE = 60, 20  # of the small files made here
INFINITE = torch.tensor([-math.inf, -math.inf]), torch.tensor([math.inf, math.inf])
BOX = torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 1.0])
BOX_SPACE = types.SimpleNamespace(low=BOX[0], high=BOX[1])
fast = pytest.mark.fast
torch.set_num_threads(1)  # more are slower for such small networks


# ---------------------------------------------------------------------------------------- helpers
def flags(text=""):
    return prefine.parse_args(text.split())


def command(*arguments, **options):
    """Run prefine.py as a user does: exit code, standard output and standard error."""
    line = [sys.executable, str(HERE / "prefine.py"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, **options)


def same(one, other):
    """If two policies, or dictionaries of tensors, agree bit for bit."""
    one, other = (x.state_dict() if isinstance(x, torch.nn.Module) else x for x in (one, other))
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


def toy_preferences():
    sets = {"preferred": [0, 2, 4, 6], "dispreferred": [1, 3, 5, 7]}
    return sets | {"heldout_preferred": [8, 10], "heldout_dispreferred": [9, 11]}


def toy_policy(seed=0, low=BOX[0], high=BOX[1]):
    torch.manual_seed(seed)
    return prefine.GaussianPolicy(low, high, np.zeros(3), np.ones(3), [16])


SMALL = "--hidden 16 --batch-size 32 --pretrain-top 0.5 "


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


def run(*texts):
    """``prefine.py`` with the flags of the texts, in this process; its exit code."""
    return prefine.main(" ".join(texts).split())


# ----------------------------------------------------------------------------------------- policy
def censored_normal(mean, std, action, low, high):
    """The log-probability of one action of one dimension, from the error function."""
    if action <= low:
        return math.log(0.5 * math.erfc((mean - low) / std / math.sqrt(2)))
    if action >= high:
        return math.log(0.5 * math.erfc((high - mean) / std / math.sqrt(2)))
    return torch.distributions.Normal(mean, std).log_prob(torch.tensor(action)).item()


@fast
@pytest.mark.parametrize("action", [-1.5, -1.0, -0.999, 0.0, 0.4, 1.0, 3.0])
@pytest.mark.parametrize("mean", [-0.9, 0.2, 0.9])
def test_log_prob_is_that_of_a_clipped_normal(action, mean):
    stds = torch.tensor([0.3, 1.1])
    found = prefine.gaussian_log_prob(
        torch.full((2,), mean), stds, torch.full((2,), action), *BOX
    ).item()
    expected = sum(censored_normal(mean, std, action, -1, 1) for std in stds.tolist())
    assert found == pytest.approx(expected, rel=1e-4)


@fast
def test_infinite_bounds_are_a_plain_gaussian():
    mean, std, actions = torch.randn(5, 2), torch.rand(5, 2) + 0.1, 3 * torch.randn(5, 2)
    found = prefine.gaussian_log_prob(mean, std, actions, *INFINITE)
    expected = torch.distributions.Normal(mean, std).log_prob(actions).sum(-1)
    torch.testing.assert_close(found, expected)


@fast
def test_log_prob_and_its_gradient_are_finite_even_far_in_the_tails():
    mean = torch.tensor([[0.999, -0.999]], requires_grad=True)
    log_std = torch.tensor([[-6.0, -6.0]], requires_grad=True)
    for action in (-1.0, -0.5, 0.5, 1.0):
        value = prefine.gaussian_log_prob(mean, log_std.exp(), torch.full((1, 2), action), *BOX)
        gradients = torch.autograd.grad(value.sum(), [mean, log_std])
        assert value.isfinite().all() and all(g.isfinite().all() for g in gradients)


@fast
def test_mean_lies_in_the_space_and_std_within_its_bounds():
    low, high = np.array([-2.0, 0.0]), np.array([2.0, 1.0])
    policy = prefine.GaussianPolicy(low, high, np.zeros(3), np.ones(3), [16], (-1.5, 0.5))
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


def test_a_checkpoint_is_self_contained(tmp_path):
    low, high = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 1.0])
    policy = prefine.GaussianPolicy(low, high, np.arange(3), np.full(3, 2.0), [8, 4], (-2, 1))
    path, curve = tmp_path / "policy.pt", [{"update": 1, "losses/contrast": 0.5}]
    prefine.save_policy(path, BALL, policy, curve)
    assert torch.load(path, weights_only=True)["env"] == BALL
    loaded, again = prefine.load_policy(path, BALL)
    assert same(policy, loaded) and again == curve
    observations = torch.randn(5, 3)
    assert all(torch.equal(a, b) for a, b in zip(policy(observations), loaded(observations)))
    with pytest.raises(prefine.UserError, match="OfflineBallRun"):
        prefine.load_policy(path, "OfflineBallRun-v0")


@pytest.mark.parametrize("content", ["missing", "empty", "text", "pickle", "cut", "other size"])
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    path, policy = tmp_path / "policy.pt", toy_policy()
    if content == "other size":
        policy.mean = torch.zeros(4)
    prefine.save_policy(path, BALL, policy, [])
    others = {"empty": b"", "text": b"no checkpoint", "pickle": b"\x80\x02}."}
    path.write_bytes(others.get(content, path.read_bytes()[: -500 if content == "cut" else None]))
    if content == "missing":
        path.unlink()
    with pytest.raises(prefine.UserError, match="policy.pt: needs a checkpoint of prefine.py"):
        prefine.load_policy(path)


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"format": 1, "env": BALL, "state": Harm()}, tmp_path / "policy.pt")
    with pytest.raises(prefine.UserError, match="policy.pt"):
        prefine.load_policy(tmp_path / "policy.pt", BALL)
    assert not (tmp_path / "harm").exists()


# ------------------------------------------------------------- counterfactuals and the joint loss
@fast
def test_preference_loss_of_a_case_computed_by_hand():
    # margin = beta * 2 ln 3 = ln 3, sigmoid(ln 3) = 3/4, -log(3/4) / beta = 2 ln(4/3)
    winner, loser = torch.tensor([1 + 2 * math.log(3)]), torch.tensor([1.0])
    assert prefine.preference_loss(winner, loser, 0.5).item() == pytest.approx(0.57536414)


@fast
@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 10.0])
def test_slope_at_equality_is_one_half_whatever_beta(beta):
    winner = torch.tensor(0.7, requires_grad=True)
    loser = torch.tensor(0.7, requires_grad=True)
    slopes = torch.autograd.grad(prefine.preference_loss(winner, loser, beta), [winner, loser])
    assert [slope.item() for slope in slopes] == pytest.approx([-0.5, 0.5])


def gaussians(seed=0):
    """(mean, std) [6, 2] of a policy and of a reference, and actions [6, 2] in the same states."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.rand((2, 6, 2), generator=generator) - 0.5
    stds = torch.rand((2, 6, 2), generator=generator) + 0.2
    actions = (torch.rand((6, 2), generator=generator) * 2 - 1).clamp(-1, 1)
    return (means[0], stds[0]), (means[1], stds[1]), actions


@fast
def test_the_log_ratio_is_the_difference_of_log_probs_and_0_for_the_reference():
    policy, reference, actions = gaussians()
    expected = sum(
        torch.distributions.Normal(*policy).log_prob(actions)
        - torch.distributions.Normal(*reference).log_prob(actions)
    ).sum()
    found = prefine.log_ratio(policy, reference, actions, *INFINITE)
    assert found.shape == (6,) and found.sum().item() == pytest.approx(expected.item(), rel=1e-5)
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
@pytest.mark.parametrize(("share", "cap"), [(0.15, False), (0.5, False), (0.05, True)])
def test_return_weights_leave_the_effective_sample_size_or_stop_at_three(share, cap):
    returns = np.random.default_rng(0).normal(100, 20, 40)
    weights = prefine.return_weights(returns, share)
    size = 1 / weights.square().sum().item()
    assert weights.sum().item() == pytest.approx(1)
    assert (np.argsort(weights.numpy()) == np.argsort(returns)).all()
    if cap:  # the exponent of the softmax is 3 returns in standard deviations at most
        expected = np.exp(3 * (returns - returns.max()) / returns.std())
        np.testing.assert_allclose(weights.numpy(), expected / expected.sum(), rtol=1e-6)
        assert size > share * 40
    else:
        assert size == pytest.approx(share * 40, rel=1e-6)


@fast
def test_return_weights_are_equal_for_a_share_of_1_one_trajectory_or_equal_returns():
    for returns, share in (np.arange(5.0), 1.0), (np.ones(1), 0.15), (np.full(7, 3.0), 0.15):
        weights = prefine.return_weights(returns, share).numpy()
        np.testing.assert_allclose(weights, 1 / len(returns), rtol=1e-6)


@fast
@pytest.mark.parametrize("constant", [0.0, 9.81])  # such as gravity, which simulators observe
def test_a_preferred_trajectory_that_looks_dispreferred_is_left_out_if_others_stay(
    constant, capsys
):
    dataset, wrong = toy_dataset(episodes=16, steps=30), 1
    dataset.observations[:, 0] = constant
    labels = {"preferred": [*range(2, 16, 2), wrong], "dispreferred": [0, *range(3, 16, 2)]}
    shares = prefine.dispreferred_shares(dataset, labels)
    assert shares.shape == (8,) and shares[-1] > 0.6 and (shares[:-1] < 0.4).all()
    prefine.finetune(toy_policy(), dataset, labels, flags(FINETUNE))
    assert "left out 1 preferred" in capsys.readouterr().out
    labels["preferred"] = [wrong]
    aligned, _ = prefine.finetune(toy_policy(), dataset, labels, flags(FINETUNE))
    assert not same(aligned, toy_policy()) and "left out" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------ preferences
def test_preferences_are_drawn_by_cost_alone_and_on_the_right_side_of_the_limit():
    costs = np.random.default_rng(0).integers(0, 21, 100).astype(float)
    costs[:5] = 10.0  # exactly at the limit is safe
    sets = prefine.draw_preferences(costs, 10, 20, 15, 0)
    for name, episodes in sets.items():
        assert ((costs[episodes] > 10) == ("dispreferred" in name)).all()
    assert (len(sets["preferred"]), len(sets["dispreferred"])) == (20, 15)
    assert len(sets["heldout_preferred"]) > 0 and len(sets["heldout_dispreferred"]) > 0
    every = np.concatenate(list(sets.values()))
    assert len(np.unique(every)) == len(every)  # held out means held out


@pytest.mark.parametrize(("flag", "counts"), [("preferred", (4, 1)), ("dispreferred", (1, 8))])
def test_too_few_trajectories_are_an_error_with_the_flag_and_the_counts(flag, counts):
    costs = np.array([0, 5, 10] + 7 * [11.0])
    have = {"preferred": "found 3 .*of 10", "dispreferred": "found 7 .*of 10"}[flag]
    with pytest.raises(prefine.UserError, match=f"--{flag} {max(counts)}.*{have}.*--cost-limit"):
        prefine.draw_preferences(costs, 10, *counts, 0)


def write_preferences(path, rows, header=("episode", "label")):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_a_share_of_wrong_labels_is_on_the_other_side():
    costs = np.repeat([0.0, 50.0], 100)
    sets = prefine.draw_preferences(costs, 10, 40, 20, 0, wrong=0.1)
    assert (costs[sets["preferred"]] > 10).sum() == 2  # those that should be dispreferred
    assert (costs[sets["dispreferred"]] <= 10).sum() == 4
    assert (len(sets["preferred"]), len(sets["dispreferred"])) == (38, 22)
    for label, side in ("preferred", costs <= 10), ("dispreferred", costs > 10):
        assert side[sets[f"heldout_{label}"]].all()


def test_preferences_read_from_a_file_are_those_written(tmp_path):
    rows = [(3, "preferred"), (0, "dispreferred"), (7, "dispreferred"), (1, "preferred")]
    path, expected = tmp_path / "labels.csv", {"preferred": [3, 1], "dispreferred": [0, 7]}
    assert prefine.read_preferences(write_preferences(path, rows), 8) == expected
    text = "Episode, Label ,why\n 3 , Preferred,good\n\n0,DISPREFERRED ,\n7,dispreferred,\n"
    # A spreadsheet begins its file with a mark of the encoding.
    path.write_text(text + "1,preferred,", encoding="utf-8-sig")
    assert prefine.read_preferences(path, 8) == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "episode,label\n3,preferred\n\n,\n2,good\n",
            "line 5: found episode '2', label 'good'; needs the label",
        ),
        ("episode,label\n8,preferred\n", "line 2: .*'8'.*; needs an episode from 0 to 7"),
        ("episode,label\n1.5,preferred\n", "line 2: found episode '1.5'.*; needs an episode"),
        (
            "episode,label\n3,preferred\n3,dispreferred\n",
            "line 3: found episode '3'.*; the .* has a label already",
        ),
        ("episode,label\n0\n", "line 2: .*'0', label ''; needs the label .* delete the line"),
        (
            "id,label\n0,preferred\n",
            r"needs the columns episode and label, .* found \['id', 'label'\]",
        ),
        ("", r"needs the columns episode and label.*found \[\]"),
        ("episode,label\n3,preferred\n", "no trajectory is dispreferred; both labels are needed"),
    ],
)
def test_a_mistake_in_a_label_file_is_named_with_its_line(tmp_path, text, sentence):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(prefine.UserError, match=f"labels.csv.*{sentence}"):
        prefine.read_preferences(path, 8)


# --------------------------------------------------------------------- pre-training, fine-tuning
PRETRAIN = SMALL + "--pretrain-updates 250"
FINETUNE = SMALL + "--finetune-updates 250 --pair 0.5"


@fast
@pytest.mark.parametrize("change", [lambda x: x.flip(0), lambda x: x * math.nan, lambda x: None])
def test_training_never_reads_a_cost(change):
    dataset, policy = toy_dataset(), toy_policy()
    both = dataset, dataset._replace(costs=change(dataset.costs))
    assert same(*(prefine.pretrain(each, BOX_SPACE, flags(PRETRAIN))[0] for each in both))
    settings = toy_preferences(), flags(FINETUNE)
    results = [prefine.finetune(policy, each, *settings) for each in both]
    assert same(results[0][0], results[1][0]) and results[0][1] == results[1][1]


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
    policy, curve = prefine.pretrain(dataset, BOX_SPACE, flags(text))
    mean, std = policy(dataset.steps([2, 5])[0])
    torch.testing.assert_close(mean.mean(0), torch.full((2,), 0.5), atol=0.08, rtol=0)
    torch.testing.assert_close(std.mean(0), torch.full((2,), 0.3), atol=0.08, rtol=0)
    assert [row["update"] for row in curve] == list(range(100, 801, 100))


@fast
def test_one_update_is_a_step_of_adam_on_the_loss_of_the_docstring():
    dataset, policy, labels = toy_dataset(), toy_policy(), toy_preferences()
    text = "--finetune-updates 1 --finetune-lr 0.01 --batch-size 64 --beta 2 --imitation 0.7"
    aligned, curve = prefine.finetune(policy, dataset, labels, flags(text))
    # Again, from the formulas: batch, counterfactuals, loss, gradient, the first step of Adam.
    generator = torch.Generator().manual_seed(0)
    states, actions = dataset.steps(labels["preferred"])
    returns = dataset.sums(dataset.rewards)[labels["preferred"]]
    weights = prefine.return_weights(returns, 0.15).repeat_interleave(10).float()
    batch = torch.multinomial(weights, 64, True, generator=generator)
    mean, std = (x.detach() for x in policy(states[batch]))
    c = (mean + std * torch.randn(mean.shape, generator=generator)).clamp(-1, 1)
    mine = toy_policy()

    def h(a):
        now = prefine.gaussian_log_prob(*mine(states[batch]), a, *BOX)
        return now - prefine.gaussian_log_prob(mean, std, a, *BOX)

    margin = 2 * (h(actions[batch]) - h(c))
    loss = (torch.log1p(torch.exp(-margin)) / 2 - 0.7 * h(actions[batch])).mean()
    parameters = list(mine.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    for before, gradient, after in zip(parameters, gradients, aligned.parameters()):
        step = before - 0.01 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(after, step, atol=1e-4, rtol=0)
    assert curve[0]["losses/contrast"] == pytest.approx(math.log(2) / 2, rel=1e-5)
    assert curve[0]["losses/imitation"] == pytest.approx(0, abs=1e-6)


@fast
@pytest.mark.parametrize("term", ["contrast", "imitation", "pair"])
def test_each_term_alone_raises_the_preferred_actions_above_what_it_is_compared_with(term):
    weights = {"contrast": 0, "imitation": 0, "pair": 0} | {term: 1}
    text = SMALL + "--finetune-updates 100 " + " ".join(f"--{k} {v}" for k, v in weights.items())
    dataset, policy, labels = toy_dataset(), toy_policy(), toy_preferences()
    aligned, _ = prefine.finetune(policy, dataset, labels, flags(text))
    accuracies = prefine.preference_metrics(aligned, policy, dataset, labels)
    other = {"pair": "dispreferred"}.get(term, "counterfactual")
    assert accuracies[f"accuracy/heldout/preferred_{other}"] == 1


@fast
def test_finetuning_moves_a_copy_to_the_preferred_actions_and_ranks_what_was_held_out():
    dataset, policy = toy_dataset(), toy_policy()
    aligned, curve = prefine.finetune(policy, dataset, toy_preferences(), flags(FINETUNE))
    assert same(policy, toy_policy()) and all(x.grad is None for x in policy.parameters())
    moved = (aligned(dataset.observations)[0] - policy(dataset.observations)[0]).mean(0)
    assert (moved > 0.05).all()  # preferred episodes go right, dispreferred ones left
    assert [row["update"] for row in curve] == [100, 200, 250]
    for split in "train", "heldout":
        for pair in "preferred_counterfactual", "preferred_dispreferred":
            assert curve[-1][f"accuracy/{split}/{pair}"] > 0.9


@fast
@pytest.mark.parametrize("text", ["--finetune-updates 0", "--contrast 0 --imitation 0"])
def test_no_update_and_no_weight_leave_the_policy_as_it_is(text):
    policy, arguments = toy_policy(), flags(SMALL + "--finetune-updates 20 " + text)
    aligned, _ = prefine.finetune(policy, toy_dataset(), toy_preferences(), arguments)
    assert same(policy, aligned)


@fast
def test_the_learning_rate_decays_in_every_update(monkeypatch):
    rates, step = [], torch.optim.Adam.step

    def recorded(self, *arguments):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", recorded)
    text = flags(SMALL + "--finetune-updates 50 --finetune-lr 0.01")
    prefine.finetune(toy_policy(), toy_dataset(), toy_preferences(), text)
    expected = [0.005 * (1 + math.cos(math.pi * update / 50)) for update in range(50)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


@fast
def test_training_is_deterministic_bit_for_bit_and_depends_on_the_seed():
    dataset, policy = toy_dataset(), toy_policy()
    runs = []
    for seed in 5, 5, 6:
        first, _ = prefine.pretrain(dataset, BOX_SPACE, flags(f"{PRETRAIN} --seed {seed}"))
        text = f"{FINETUNE} --seed {seed}"
        second, _ = prefine.finetune(policy, dataset, toy_preferences(), flags(text))
        runs.append((first, second))
    for one, again, other in zip(*runs):
        assert same(one, again) and not same(one, other)


@fast
@pytest.mark.parametrize(
    "text", ["--counterfactual current", *(f"--method {name}" for name in prefine.METHODS)]
)
def test_every_variant_of_the_method_trains(text):
    dataset, policy = toy_dataset(), toy_policy()
    arguments = flags(SMALL + "--finetune-updates 20 " + text)
    aligned, curve = prefine.finetune(policy, dataset, toy_preferences(), arguments)
    assert not same(policy, aligned) and curve[-1]["update"] == 20
    assert all(math.isfinite(value) for value in curve[-1].values())


@fast
def test_a_policy_that_is_no_policy_of_ours_can_be_finetuned():
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)
            self.register_buffer("low", INFINITE[0])
            self.register_buffer("high", INFINITE[1])

        def forward(self, observations):
            mean = self.layer(observations)
            return mean, torch.full_like(mean, 0.5)

    aligned, _ = prefine.finetune(Plain(), toy_dataset(), toy_preferences(), flags(FINETUNE))
    assert all(parameter.isfinite().all() for parameter in aligned.parameters())


@fast
@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ({"preferred": [0], "dispreferred": []}, "no trajectory is dispreferred"),
        ({"preferred": [0, 12], "dispreferred": [1]}, ": preferred must be indices of the 12"),
        ({"preferred": [0], "dispreferred": [-1]}, ": dispreferred must be indices of the 12"),
        (toy_preferences() | {"heldout_preferred": [99]}, ": heldout_preferred must be"),
        ({"preferred": [True] * 12, "dispreferred": [1]}, ": preferred must be indices of the 12"),
        ({"preferred": [0, 2], "dispreferred": [2, 3]}, r"episodes \[2\] are called preferred and"),
    ],
)
def test_labels_from_python_are_refused_in_words(labels, sentence):
    with pytest.raises(prefine.UserError, match=sentence):
        prefine.finetune(toy_policy(), toy_dataset(), labels, flags(FINETUNE))


@fast
def test_a_loss_that_is_not_finite_is_an_error_that_names_it():
    policy = toy_policy()
    torch.nn.init.constant_(policy.net[0].weight, math.nan)
    with pytest.raises(prefine.UserError, match="update 20: losses/contrast.*not finite"):
        text = flags(SMALL + "--finetune-updates 20")
        prefine.finetune(policy, toy_dataset(), toy_preferences(), text)


# ------------------------------------------------------------------------------------------- data
def test_a_data_set_is_cut_into_episodes_at_terminals_and_timeouts(tmp_path, ball, capfd):
    arrays = small_arrays()
    arrays["terminals"][4] = True
    arrays["timeouts"][-1] = False
    dataset = prefine.load_dataset(write_hdf5(tmp_path / "data.hdf5", arrays), ball)
    assert dataset.starts.tolist() == [0, 5, 20] and dataset.ends.tolist() == [5, 20, 40]
    assert "dropped the last 20 rows" in capfd.readouterr().out
    for key in "observations", "actions", "rewards", "costs":
        np.testing.assert_array_equal(getattr(dataset, key).numpy(), arrays[key][:40])
    sums = [arrays["costs"][a:b].sum() for a, b in ((0, 5), (5, 20), (20, 40))]
    np.testing.assert_allclose(dataset.sums(dataset.costs), sums)
    states, actions = dataset.steps([2, 0])
    rows = [*range(20, 40), *range(5)]
    np.testing.assert_array_equal(states, arrays["observations"][rows])
    np.testing.assert_array_equal(actions, arrays["actions"][rows])


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
    with pytest.raises(prefine.UserError, match=r"'rewards' must.*\(N,\).*\(60, 2\)"):
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


def edit(change):
    """A defect made by ``change(an open HDF5 file)``; its costs are deleted first."""

    def make(path):
        write_hdf5(path, small_arrays())
        write_hdf5(path.with_name("other.hdf5"), small_arrays())
        with h5py.File(path, "a") as file:
            del file["costs"]
            change(file)

    return make


def virtual(file):
    layout = h5py.VirtualLayout((ROWS,), np.float32)
    layout[:] = h5py.VirtualSource("other.hdf5", "costs", (ROWS,))
    file.create_virtual_dataset("costs", layout)


def truncated(path):
    write_hdf5(path, small_arrays())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_task(path):
    prefine.save_policy(path.with_name("policy.pt"), "OfflineBallRun-v0", toy_policy(), [])
    write_hdf5(path, small_arrays())


OWN = "needs an array 'costs' of its own.*--preferences"
BAD = {  # what is wrong: the sentence, the file that has it (else a good one), the flags
    "truncated": ("data.hdf5.*truncated", truncated),
    "a typo for scripted": ("no such file; .*scripted", None, "--dataset scriptd"),
    "Minari's": (
        "needs an array 'observations'.*converts Minari's",
        lambda path: write_hdf5(path, {"episode_0/observations": np.zeros((5, 8))}),
    ),
    "external link": (
        OWN,
        edit(lambda file: file.__setitem__("costs", h5py.ExternalLink("other.hdf5", "/costs"))),
    ),
    "virtual": (OWN, edit(virtual)),
    "declared, not stored": (
        "more than the file can hold",
        edit(lambda file: file.create_dataset("costs", (10**10,), np.float32, chunks=True)),
    ),
    "text": (
        "'rewards' must be numbers.* N > 0",
        replace("rewards", lambda x: np.array([b"1.0"] * len(x))),
    ),
    "NaN": ("'observations' has.*not finite", replace("observations", put(math.nan))),
    "unequal lengths": ("'costs' has 59 rows, 'obs.* 60", replace("costs", lambda x: x[:-1])),
    "negative costs": ("'costs' has negative", replace("costs", put(-1.0))),
    "no end": ("no episode has an end", replace("timeouts", np.zeros_like)),
    "wide actions": ("must be 2 wide; found 4", replace("actions", lambda x: np.hstack([x, x]))),
    "far actions": ("'actions' lie far outside", replace("actions", put(50.0))),
    "few safe": ("--preferred 4: found . with a cost of at most 10 of 3", None, "--preferred 4"),
    "another task": ("policy.pt.*found format 1 of Off", other_task, "--policy {tmp}/policy.pt"),
    "no policy": ("policy.pt.*No such file", None, "--policy {tmp}/policy.pt"),
    "no labels": ("labels.csv", None, "--preferences {tmp}/labels.csv"),
    "binary labels": ("data.hdf5: needs the columns", None, "--preferences {tmp}/data.hdf5"),
    "a run folder in a file": ("data.hdf5", None, "--run-dir {tmp}/data.hdf5/run"),
    "an empty variable": ("an empty name", None, "--policy="),
    "no task": ("--env is missing", None, "--env="),
    "MetaDrive": ("MetaDrive tasks are not supported", None, "--env OfflineMetadrive-easymean-v0"),
    "no such device": ("--device nonsense: not usable", None, "--device nonsense"),
    "no scripted data": (
        "--dataset scripted: .*Ant.* has none; Off",
        None,
        "--env OfflineAntVelocity --dataset scripted",
    ),
    "0 preferred": ("--preferred: needs a positive.*found 0", None, "--preferred 0"),
    "a negative limit": ("--cost-limit: needs a non-negative.*-1", None, "--cost-limit=-1"),
    "a share of 5": ("--ess: needs.*at most 1; found 5", None, "--ess 5"),
    "no layer": ("--hidden: needs", None, "--hidden 8 0"),
    "a mistyped flag": ("unrecognized arguments: --bta 1; --help", None, "--bta 1"),
    "a method": ("--method: .*'none'", None, "--method none"),
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


def test_1000_files_with_damaged_bytes_load_or_give_one_sentence(tmp_path, ball):
    """In no time, and in little memory."""
    path = write_hdf5(tmp_path / "data.hdf5", small_arrays())
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused, longest = 0, 0.0
    for _ in range(1000):
        damaged = bytearray(whole)
        for position in rng.integers(0, len(whole), rng.integers(1, 9)):
            damaged[position] = rng.integers(256)
        path.write_bytes(
            bytes(damaged[: rng.choice([len(whole), rng.integers(len(whole))], p=[0.9, 0.1])])
        )
        begun = time.monotonic()
        try:
            prefine.load_dataset(path, ball)
        except prefine.UserError as error:  # any other exception is a bug
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        longest = max(longest, time.monotonic() - begun)
    assert 100 < refused < 1000 and longest < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


# --------------------------------------------------------------------------------------- download
@pytest.fixture
def server():
    """A web server on this machine. ``serve(name=(status, body, declared length))`` gives a url."""
    pages, closing = {}, threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, body, length = pages.get(self.path[1:], (404, b"nothing here", 12))
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)
            if length > len(body) and status == 299:  # not cut, but silent from here on
                self.wfile.flush()
                closing.wait(30)

        def log_message(self, *_):
            pass

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()

    def serve(**more):
        pages.update(more)
        return f"http://127.0.0.1:{web.server_port}"

    yield serve
    closing.set()
    web.shutdown()
    web.server_close()


@pytest.fixture
def hdf5_bytes(tmp_path):
    return write_hdf5(tmp_path / "served.hdf5", small_arrays()).read_bytes()


def fetch(ball, target, *urls, **options):
    target.parent.mkdir()
    return prefine.download(urls, target, ball, **options)


def test_the_mirror_is_tried_where_the_first_address_fails(server, hdf5_bytes, ball, tmp_path):
    url = server(good=(200, hdf5_bytes, len(hdf5_bytes)))
    target = tmp_path / "cache" / "data.hdf5"
    fetch(ball, target, f"{url}/missing", f"{url}/good")
    assert target.read_bytes() == hdf5_bytes


@pytest.mark.parametrize("failure", ["cut", "silent", "html", "refused"])
def test_a_failed_download_leaves_nothing_and_names_the_ways_on(
    failure, server, hdf5_bytes, ball, tmp_path
):
    half, html = hdf5_bytes[: len(hdf5_bytes) // 2], b"<html>Sign in first</html>"
    url = server(
        cut=(200, half, len(hdf5_bytes)),  # the connection closes half-way
        silent=(299, half, len(hdf5_bytes)),
        html=(200, html, len(html)),
    )
    url = "http://127.0.0.1:9" if failure == "refused" else url
    target = tmp_path / "cache" / "data.hdf5"
    with pytest.raises(prefine.UserError) as caught:
        fetch(ball, target, f"{url}/{failure}", f"{url}/other", timeout=0.5)
    sentence = str(caught.value)
    for part in f"{url}/{failure}", f"{url}/other", "--dataset FILE", "--dataset scripted":
        assert part in sentence
    assert "\n" not in sentence and os.listdir(target.parent) == []


def test_dsrl_data_is_downloaded_once_into_its_cache(
    server, hdf5_bytes, ball, tmp_path, monkeypatch
):
    monkeypatch.setattr("dsrl.offline_env.DATASET_PATH", str(tmp_path / "cache"))
    url = server(**{"small.hdf5": (200, hdf5_bytes, len(hdf5_bytes))})
    monkeypatch.setattr(ball.unwrapped, "dataset_url", f"{url}/small.hdf5")
    arguments = flags(f"--env {BALL}")
    path = prefine.find_dataset(arguments, ball)
    assert path == tmp_path / "cache" / "small.hdf5" and path.read_bytes() == hdf5_bytes
    server(**{"small.hdf5": (404, b"", 0)})
    assert prefine.find_dataset(arguments, ball) == path
    path.write_bytes(hdf5_bytes[: len(hdf5_bytes) // 2])  # as dsrl's own downloader may leave it
    with pytest.raises(prefine.UserError, match="small.hdf5.*delete it"):
        prefine.load_dataset(path, ball)


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
    env_id, _ = prefine.resolve_env("OfflineCarButton1")
    first, second = (prefine.run_episode(env_id, prefine.lidar_controller, 7) for _ in range(2))
    assert same_episodes([first], [second]) and len(first["rewards"]) == 1000
    assert first["costs"].sum() > 0 and not first["terminals"].any()
    assert first["rewards"].sum() > 5  # it drives, and finds its goals


@pytest.mark.parametrize("env_id", prefine.BULLET)
def test_scripted_bullet_episodes_are_safe_and_unsafe_slow_and_fast(env_id):
    episodes = prefine.run_episodes(env_id, prefine.CONTROLLERS[env_id], range(16), 2, "test")
    returns, costs = ([e[key].sum() for e in episodes] for key in ("rewards", "costs"))
    assert min(costs) == 0 and sum(cost > 10 for cost in costs) >= 3
    assert max(returns) > 1.5 * statistics.median(returns) > 100


class Constant(torch.nn.Module):
    """A policy that always pushes alike, in evaluation, and insists on a batch of observations."""

    def __init__(self, action):
        super().__init__()
        self.action = torch.nn.Parameter(torch.tensor([action]))

    def forward(self, observations):
        assert observations.ndim == 2 and not self.training
        return self.action.expand(len(observations), -1)


def test_any_policy_is_evaluated_and_the_numbers_are_those_of_its_episodes(cache):
    metrics, runs = prefine.evaluate(Constant([1.0, 0.0]), "OfflineBallRun", episodes=3, workers=2)
    returns, costs = ([run[key].sum() for run in runs] for key in ("rewards", "costs"))
    assert metrics["return_mean"] == pytest.approx(np.mean(returns)) and len(runs) == 3
    assert metrics["cost_mean"] == pytest.approx(np.mean(costs))
    assert metrics["cost_max"] == max(costs)
    assert all((run["actions"] == [1, 0]).all() for run in runs)
    assert metrics["violation_rate"] == np.mean(np.array(costs) > 10)
    low, high = metrics["return_ci95"]
    assert min(returns) - 1e-3 <= low <= metrics["return_mean"] <= high <= max(returns) + 1e-3
    env = prefine.make_env("OfflineBallRun-v0").unwrapped
    env.set_target_cost(10)
    score, cost = env.get_normalized_score(np.mean(returns), np.mean(costs))
    assert metrics["normalized_return"] == pytest.approx(score)
    assert metrics["normalized_cost"] == pytest.approx(cost)


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


MEASURED = """return_mean return_ci95 cost_mean cost_ci95 cost_max normalized_return
normalized_cost violation_rate failure_rate episodes"""


def check_metrics(folder, episodes):
    content = metrics(folder)
    assert list(content) == ["pretrained", "finetuned"]
    for part in content.values():
        assert " ".join(part) == MEASURED.replace("\n", " ") and part["episodes"] == episodes
        assert all(np.isfinite(value).all() for value in part.values())
    return content


def test_a_whole_run_in_bullet_safety_gym(ball_run, cache):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, done = ball_run
    check_metrics(folder, episodes=2)
    files = {"config.json", "finetuned.pt", "metrics.json", "pretrained.pt", "report.png"}
    found = {name for name in os.listdir(folder) if name[0] != "."}
    assert found - files == {name for name in found if name.startswith("events.out.tfevents")}
    assert files < found and (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    table = done.stdout.index("| pre-trained ")
    assert table < done.stdout.index("| prefine ") < done.stdout.index("results in")
    assert any("scripted" in name and name.endswith(".hdf5") for name in os.listdir(cache))
    config = json.loads((folder / "config.json").read_text())
    assert config["preferred"] == 4 and config["cost_limit"] == 10 and config["env"] == BALL
    _, curve = prefine.load_policy(folder / "finetuned.pt")
    assert [row["update"] for row in curve] == [100, 200, 300]
    is_weak = curve[-1]["accuracy/heldout/preferred_dispreferred"] < 0.7
    assert ("warning: " in done.stdout) == is_weak
    events = EventAccumulator(str(folder)).Reload()
    for name, last in curve[-1].items():
        if name != "update":
            assert events.Scalars(name)[-1].value == pytest.approx(last, rel=1e-5)


def test_a_complete_run_is_shown_and_not_repeated(ball_run, capfd):
    folder, done = ball_run
    files = [folder / "metrics.json", *folder.glob("*.pt")]
    before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    assert run(BALL_RUN, f"--run-dir {folder}") == 0
    again = capfd.readouterr().out
    assert "complete" in again and again.splitlines()[-1] in done.stdout  # the same table
    assert [(file.read_bytes(), file.stat().st_mtime_ns) for file in files] == before


def same_run(one, other):
    """If two run folders hold the same numbers, bit for bit."""
    assert metrics(one) == metrics(other)
    for name in "pretrained.pt", "finetuned.pt":
        (policy, curve), (again, same_curve) = (prefine.load_policy(x / name) for x in (one, other))
        assert same(policy, again) and curve == same_curve


def test_another_folder_and_number_of_workers_give_the_same_numbers(ball_run, tmp_path):
    assert run(BALL_RUN, f"--workers 1 --run-dir {tmp_path / 'b'}") == 0
    same_run(tmp_path / "b", ball_run[0])


def start(*arguments, **variables):
    """``prefine.py`` in the background, in a process group of its own."""
    line = [sys.executable, str(HERE / "prefine.py"), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, env=os.environ | variables, start_new_session=True, **pipes)


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


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
    error = process.communicate()[1]
    assert process.returncode == 0, error
    return hit


def test_20_interruptions_at_random_moments_change_no_number(ball_run, tmp_path):
    """In collection, pre-training, fine-tuning and evaluation, by three signals."""
    jobs = [(tmp_path / f"run{i}", tmp_path / f"data{i}", i) for i in range(4)]
    with ThreadPoolExecutor(2) as pool:
        hit = sum(pool.map(interrupted_run, *zip(*jobs)), [])
    for folder, data, _ in jobs:
        same_run(folder, ball_run[0])
        assert not list(folder.glob("*.tmp")) and len(list(data.glob("*.hdf5"))) == 1
    assert {0, 3} < set(hit) and len(hit) > 12  # a few may come just after the end


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
    lines = {pid: Path(f"/proc/{pid}/cmdline") for pid in group(leader)}
    return [pid for pid, path in lines.items() if b"LokyProcess" in path.read_bytes()]


@pytest.mark.parametrize("victim", ["worker", "main", "Ctrl-C"])
def test_a_killed_process_is_reported_and_leaves_no_other(victim, ball_run, tmp_path):
    folder = tmp_path / "run"
    process = start(*BALL_RUN.split(), "--run-dir", folder, "--eval-episodes", 400)
    wait_until(lambda: len(worker_processes(process.pid)) == 2)
    time.sleep(2)
    if victim == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    else:
        pid = worker_processes(process.pid)[0] if victim == "worker" else process.pid
        os.kill(pid, signal.SIGKILL)
    error = process.communicate(timeout=60)[1]
    if victim == "worker":
        assert process.returncode == 2
        assert "a worker process failed" in error.splitlines()[-1] and "--workers" in error
    if victim == "Ctrl-C":
        assert process.returncode == 130 and "Traceback" not in error
        assert "interrupted; the same command goes on" in error
    wait_until(lambda: not group(process.pid), 30)
    assert not (folder / "metrics.json").exists()


def test_two_runs_at_once_in_one_folder_end_in_the_same_numbers(ball_run, tmp_path):
    line = [*BALL_RUN.split(), "--workers", 1, "--run-dir", tmp_path / "run"]
    both = [start(*line), start(*line)]
    for process in both:
        process.communicate()
        assert process.returncode == 0
    same_run(tmp_path / "run", ball_run[0])


def test_a_full_disk_gives_one_sentence_and_loses_nothing(ball_run, tmp_path):
    """A limit on the size of files stands in for the disk: writes beyond it fail as there."""
    folder = tmp_path / "run"
    line = [sys.executable, str(HERE / "prefine.py"), *BALL_RUN.split(), "--run-dir", str(folder)]

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))

    done = subprocess.run(line, capture_output=True, text=True, preexec_fn=limited)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        f"prefine.py: {folder}/pretrained.pt: not written"
    )
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.part"))
    assert run(" ".join(line[2:])) == 0
    same_run(folder, ball_run[0])


def test_other_flags_in_the_same_folder_are_refused_and_named(ball_run, capfd):
    content = (ball_run[0] / "metrics.json").read_bytes()
    line = f"{BALL_RUN} --run-dir {ball_run[0]} --beta 0.2 --preferred 3"
    assert run(line) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "another preferred, beta;" in error
    assert "choose another folder" in error
    assert (ball_run[0] / "metrics.json").read_bytes() == content


@pytest.mark.parametrize("state", ["complete", "interrupted"])
def test_a_run_knows_its_files_by_their_content(state, ball_run, tmp_path, capfd):
    """The same command and the same name, but another file: never the old result."""
    files = {name: tmp_path / name for name in ("dataset", "policy", "preferences")}
    write_hdf5(files["dataset"], small_arrays())
    shutil.copy(ball_run[0] / "pretrained.pt", files["policy"])
    write_preferences(files["preferences"], [(0, "preferred"), (1, "dispreferred")])
    line = f"--env {BALL} --run-dir {tmp_path / 'run'} --eval-episodes 1 --finetune-updates 5 "
    line += "--workers 1 " + " ".join(f"--{name} {path}" for name, path in files.items())
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
        assert f"has another {name}_sha256;" in capfd.readouterr().err
        assert {file: file.read_bytes() for file in (tmp_path / "run").iterdir()} == before
        path.write_bytes(content)


def test_data_of_changed_controllers_are_not_taken_for_those_of_today(ball, cache, monkeypatch):
    arguments = flags(f"--env {BALL} --dataset scripted --scripted-episodes 2 --workers 1")
    path = prefine.find_dataset(arguments, ball)
    assert prefine.find_dataset(arguments, ball) == path and path.exists()

    def controller(env, seed):
        return lambda observation: np.ones(2)

    monkeypatch.setitem(prefine.CONTROLLERS, BALL, controller)
    other = prefine.find_dataset(arguments, ball)
    assert other != path
    actions = [prefine.load_dataset(each, ball).actions for each in (path, other)]
    assert not torch.equal(*actions) and (actions[1] == 1).all()


def test_a_trained_policy_is_taken_instead_of_pretraining(ball_run, tmp_path, capfd):
    policy = ball_run[0] / "pretrained.pt"
    line = f"{BALL_RUN} --policy {policy} --run-dir {tmp_path / 'e'}"
    assert run(line) == 0
    assert metrics(tmp_path / "e") == metrics(ball_run[0])
    # And where fine-tuning changes nothing, no pair is ranked right: the labels said nothing.
    line = f"{BALL_RUN} --policy {policy} --run-dir {tmp_path / 'f'} --contrast 0 --imitation 0"
    assert run(line) == 0 and "warning: 0% of held-out pairs" in capfd.readouterr().out
    assert metrics(tmp_path / "f")["finetuned"] == metrics(ball_run[0])["pretrained"]


@pytest.fixture(scope="module")
def swimmer(tmp_path_factory):
    """A data set of random actions, recorded in a Safety-Gymnasium task; its path and arrays."""

    def controller(env, seed):
        rng = np.random.default_rng(seed)
        push = rng.uniform(-1, 1, 2)
        return lambda observation: push + 0.5 * rng.normal(size=2)

    env_id = "OfflineSwimmerVelocityGymnasium-v1"
    runs = prefine.run_episodes(env_id, controller, range(12), 1, "test")
    arrays = {name: np.concatenate([run[name] for run in runs]) for name in prefine.KEYS}
    path = tmp_path_factory.mktemp("swimmer") / "swimmer.hdf5"
    return write_hdf5(path, arrays), arrays


SWIMMER_RUN = """--env OfflineSwimmerVelocity --preferred 3 --dispreferred 3 --hidden 32
--pretrain-updates 200 --finetune-updates 200 --eval-episodes 2 --workers 2"""


def test_a_whole_run_in_safety_gymnasium(swimmer, tmp_path):
    path, arrays = swimmer
    limit = np.median(arrays["costs"].reshape(12, 1000).sum(1))
    line = f"--dataset {path} --cost-limit {limit} --run-dir {tmp_path / 'h'}"
    assert run(SWIMMER_RUN, line) == 0
    check_metrics(tmp_path / "h", episodes=2)


def test_labels_from_a_person_from_export_to_table(swimmer, tmp_path, capfd):
    arrays = {key: value for key, value in swimmer[1].items() if key != "costs"}
    path = write_hdf5(tmp_path / "no_costs.hdf5", arrays)
    line = f"--dataset {path} --run-dir {tmp_path / 'i'}"
    assert run(SWIMMER_RUN, line, "--export-episodes 8") == 0
    labels = tmp_path / "i" / "labels.csv"
    rows = list(csv.DictReader(labels.read_text().splitlines()))
    assert len(rows) == 8 and len({row["episode"] for row in rows}) == 8
    row = rows[3]
    returns = arrays["rewards"].reshape(12, 1000).sum(1)[int(row["episode"])]
    assert float(row["return"]) == pytest.approx(returns, rel=1e-3)
    assert int(row["last_row"]) - int(row["first_row"]) == 999
    line = f"--dataset {path} --preferences {labels} --run-dir {tmp_path / 'j'}"
    assert run(SWIMMER_RUN, line) == 2
    assert re.search(
        "labels.csv, line 2: .* label ''; needs the label .* delete the line",
        capfd.readouterr().err,
    )
    assert run(SWIMMER_RUN, f"--dataset {path} --run-dir {tmp_path / 'i'} --export-episodes 8") == 2
    assert "may hold somebody's work" in capfd.readouterr().err
    filled = [(r["episode"], ["preferred", "dispreferred"][i % 2]) for i, r in enumerate(rows)]
    write_preferences(labels, filled)
    assert run(SWIMMER_RUN, line) == 0
    check_metrics(tmp_path / "j", episodes=2)


# ------------------------------------------------------------------------------- the command line
@fast
def test_a_method_is_a_set_of_flags_and_flags_override_it():
    assert flags("--method dpo").pair == 1 and flags("--method dpo").contrast == 0
    assert flags("--method dpo --contrast 0.7").contrast == 0.7
    assert flags("--beta 0.1").beta == 0.1 and flags("--beta 0.1").pair == 0


def test_a_home_that_cannot_be_written_names_the_variable(tmp_path):
    data = write_hdf5(tmp_path / "data.hdf5", small_arrays())
    variables = {k: v for k, v in os.environ.items() if k != "DSRL_DATASET_DIR"}
    line = ["--env", BALL, "--dataset", data, "--run-dir", tmp_path / "run"]
    done = command(*line, env=variables | {"HOME": "/proc/nowhere"})
    assert done.returncode == 2 and "set DSRL_DATASET_DIR" in done.stderr
    assert done.stderr.count("\n") == 1


WITHOUT = """
import sys
for name in sys.argv[1].split():
    sys.modules[name] = None  # importing it fails as if it were not installed
import prefine
sys.exit(prefine.main(sys.argv[2:]))
"""


def test_a_copy_of_the_one_file_does_everything_also_without_what_draws(ball_run, tmp_path, cache):
    shutil.copy(HERE / "prefine.py", tmp_path)
    (tmp_path / "without.py").write_text(WITHOUT)
    missing = "matplotlib tensorboard torch.utils.tensorboard"
    line = [sys.executable, "without.py", missing, *BALL_RUN.split()]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in "matplotlib", "tensorboard":
        assert done.stdout.count(f"{name} is missing; pip install {name}") == 1
    assert done.stdout.index("| prefine ") < done.stdout.index("matplotlib is missing")
    (folder,) = (tmp_path / "runs").iterdir()
    same_run(folder, ball_run[0])
    assert not list(folder.glob("*.png")) and not list(folder.glob("events*"))


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
import torch, prefine

class Mine(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(7, 2)
    def forward(self, observations):
        return torch.tanh(self.layer(observations)), 1

metrics, _ = prefine.evaluate(Mine(), "OfflineBallRun", episodes=2, workers=2)
print(metrics["episodes"])
"""


@pytest.mark.parametrize("how", ["file", "standard input"])
def test_a_class_of_a_script_without_a_main_guard_is_evaluated(how, tmp_path, cache):
    script = SCRIPT.format(here=str(HERE))
    (tmp_path / "script.py").write_text(script)
    line = [sys.executable, "script.py" if how == "file" else "-"]
    done = subprocess.run(
        line, input=script, capture_output=True, text=True, cwd=tmp_path, timeout=100
    )
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


# -------------------------------------------------------------------------------------- summary
def fake_run(folder, config, before, after):
    """A run folder with these (return, cost), as if measured."""
    folder.mkdir(parents=True)
    preset = vars(flags(f"--method {config.get('method', 'prefine')}"))
    files = {"dataset_sha256": "ab12" * 16}
    config = preset | {"env": BALL, "cost_limit": 10.0, "dataset": "scripted"} | files | config
    (folder / "config.json").write_text(json.dumps(config))
    content = {}
    for name, (score, cost) in {"pretrained": before, "finetuned": after}.items():
        part = {"return_mean": score, "cost_mean": cost, "violation_rate": float(cost > 10)}
        part |= {"return_ci95": [score, score], "cost_ci95": [cost, cost], "failure_rate": 0.0}
        content[name] = part
    (folder / "metrics.json").write_text(json.dumps(content))


def table(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [dict(zip(rows[0], row)) for row in rows[2:]]


def test_a_summary_has_a_row_for_each_set_of_flags_and_tests_it_against_the_default(
    tmp_path, capfd
):
    for seed in range(5):
        names = {"default": {}, "beta": {"beta": 5.0}, "dpo": {"method": "dpo"}}
        names["other data"] = {"dataset_sha256": "cd34" * 16}
        names["labels"] = {"preferences": "x/labels.csv", "preferences_sha256": "ef56" * 16}
        for i, (name, config) in enumerate(names.items()):
            after = (100.0 + seed + 10 * i, 1.0 + i)
            fake_run(
                tmp_path / f"{name}{seed}", {"seed": seed} | config, (200.0 + seed, 50.0), after
            )
    assert run("--summary", str(tmp_path)) == 0
    rows = {(row["data"], row["method"]): row for row in table(capfd.readouterr().out)}
    data, other = "BallCircle, scripted ab12, limit 10", "BallCircle, scripted cd34, limit 10"
    methods = {"prefine", "prefine --beta 5.0", "dpo", "pre-trained"}
    methods.add("prefine --preferences x/labels.csv ef56")
    assert set(rows) == {(data, m) for m in methods} | {(other, "prefine"), (other, "pre-trained")}
    default, beta = rows[data, "prefine"], rows[data, "prefine --beta 5.0"]
    assert default["return"].startswith("102 [100.8, 103.") and default["seeds"] == "5"
    assert beta["p return, cost"] == "0.062, 0.062"  # 2 / 2^5: every one of five seeds agrees
    assert rows[data, "pre-trained"]["violations"] == "100%"
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "summary.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)


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


def readme_code(title):
    text = (HERE / "README.md").read_text().split(f"## {title}")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_readmes_python_example_ends_in_its_printed_result(ball_run, tmp_path, cache):
    """From a folder beside the clone, as a script on standard input."""
    (clone := tmp_path / "prefine").mkdir()
    (beside := tmp_path / "project").mkdir()
    shutil.copy(HERE / "prefine.py", clone)
    code = "\n".join(readme_code("From Python"))
    line = [sys.executable, "-"]
    done = subprocess.run(line, input=code, capture_output=True, text=True, cwd=beside)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^before: return -?\d+, cost \d+$", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^after: return -?\d+, cost \d+$", done.stdout, re.MULTILINE), done.stdout


def test_the_readmes_example_by_hand_is_right():
    (code,) = readme_code("The method")
    done = subprocess.run(
        [sys.executable, "-"], input=code, capture_output=True, text=True, cwd=HERE
    )
    expected = re.findall(r"# prints (.*)", code)
    assert expected and done.stdout.splitlines() == expected, done.stderr


def test_every_flag_that_the_readme_names_exists():
    known = {"--osrl", "--slurm", "--quick"}
    known |= set(re.findall(r"--[a-z][a-z-]*", command("--help").stdout))
    for line in (HERE / "README.md").read_text().splitlines():
        if not re.search(r"\b(pip|uv|git|pytest|docker|sbatch)\b", line):
            assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", line)) <= known, line


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
    args.env, limit = prefine.resolve_env(task)
    torch.manual_seed(0)
    env = prefine.make_env(args.env)
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
    spent = seconds(lambda: results.append(prefine.pretrain(data, env.action_space, args)[0]))
    play("pre-training", f"{spent:.0f}", act_by(results[0]))
    chosen = prefine.draw_preferences(costs, limit, 40, 40, 0)
    spent = seconds(lambda: results.append(prefine.finetune(results[0], data, chosen, args)[0]))
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
