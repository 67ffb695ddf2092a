"""Tests of prefine.py, claim by claim, and its speed figures.

    bash run_all.sh test                    # pytest, a few minutes on two cores
    bash run_all.sh bench [--quick]         # ratios; --quick: with a tenth of the data set
    bash run_all.sh bench --osrl            # beside OSRL's BC-Safe and CPQ, many minutes

Nothing that can be run is mocked: simulators, HDF5 files and HTTP servers are real. The dsrl cache
of whoever runs this is never touched.
"""

import contextlib
import csv
import fcntl
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


def recorded(monkeypatch, name):
    """The calls of a function of prefine.py from now on, each (inputs, output)."""
    calls, function = [], getattr(prefine, name)

    def record(*inputs):
        calls.append((inputs, function(*inputs)))
        return calls[-1][1]

    monkeypatch.setattr(prefine, name, record)
    return calls


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
    import h5py

    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file.create_dataset(key, data=value, compression="gzip")
    return path


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """An empty dsrl cache for this session, here and in every process it starts."""
    folder = tmp_path_factory.mktemp("dsrl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSRL_DATASET_DIR", str(folder))
        with real_streams():
            prefine.import_simulators().make(BALL)
        patch.setattr("dsrl.offline_env.DATASET_PATH", str(folder))
        torch.set_num_threads(1)
        yield folder


@pytest.fixture(scope="session")
def ball():
    with real_streams():
        return prefine.import_simulators().make(BALL)


@contextlib.contextmanager
def real_streams():
    """Bullet redirects file descriptors by the streams' names, which pytest's streams lack."""
    with (
        contextlib.redirect_stdout(sys.__stdout__),
        contextlib.redirect_stderr(sys.__stderr__),
    ):
        yield
        sys.stdout.flush()


def run(*texts):
    """``prefine.py`` with the flags of the texts, in this process; its exit code."""
    with real_streams():
        return prefine.main(" ".join(texts).split())


# ----------------------------------------------------------------------------------------- policy
def censored_normal(mean, std, action, low, high):
    """The log-probability of one action of one dimension, from the error function."""
    if action <= low:
        return math.log(0.5 * math.erfc((mean - low) / std / math.sqrt(2)))
    if action >= high:
        return math.log(0.5 * math.erfc((high - mean) / std / math.sqrt(2)))
    return torch.distributions.Normal(mean, std).log_prob(torch.tensor(action)).item()


@pytest.mark.parametrize("action", [-1.0, -0.999, 0.0, 0.4, 1.0])
@pytest.mark.parametrize("mean", [-0.9, 0.2, 0.9])
def test_log_prob_is_that_of_a_clipped_normal(action, mean):
    stds = torch.tensor([0.3, 1.1])
    found = prefine.gaussian_log_prob(
        torch.full((2,), mean), stds, torch.full((2,), action), *BOX
    ).item()
    expected = sum(censored_normal(mean, std, action, -1, 1) for std in stds.tolist())
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("mean", "std"), [(0.3, 0.8), (-0.95, 0.2), (0.0, 2.0)])
def test_density_and_masses_on_the_bounds_add_up_to_1(mean, std):
    grid = torch.linspace(-1, 1, 20_001, dtype=torch.float64)[:, None]
    mean, std = torch.tensor([mean]).double(), torch.tensor([std]).double()
    low, high = torch.tensor([-1.0]).double(), torch.tensor([1.0]).double()
    probability = prefine.gaussian_log_prob(mean, std, grid, low, high).exp()
    density = probability[1:-1].sum() * (grid[1] - grid[0]).item()
    assert (density + probability[0] + probability[-1]).item() == pytest.approx(1, abs=2e-4)


def test_log_prob_agrees_with_the_frequencies_of_clipped_samples():
    generator = torch.Generator().manual_seed(0)
    samples = (0.4 + 0.7 * torch.randn(200_000, generator=generator)).clamp(-1, 1)
    low, high, mean, std = (torch.tensor([x]) for x in (-1.0, 1.0, 0.4, 0.7))
    for bound in low, high:
        mass = prefine.gaussian_log_prob(mean, std, bound, low, high).exp().item()
        assert (samples == bound).float().mean().item() == pytest.approx(mass, abs=0.004)


def test_infinite_bounds_are_a_plain_gaussian():
    mean, std, actions = torch.randn(5, 2), torch.rand(5, 2) + 0.1, 3 * torch.randn(5, 2)
    found = prefine.gaussian_log_prob(mean, std, actions, *INFINITE)
    expected = torch.distributions.Normal(mean, std).log_prob(actions).sum(-1)
    torch.testing.assert_close(found, expected)


def test_log_prob_and_its_gradient_are_finite_even_far_in_the_tails():
    mean = torch.tensor([[0.999, -0.999]], requires_grad=True)
    log_std = torch.tensor([[-6.0, -6.0]], requires_grad=True)
    for action in (-1.0, -0.5, 0.5, 1.0):
        value = prefine.gaussian_log_prob(mean, log_std.exp(), torch.full((1, 2), action), *BOX)
        gradients = torch.autograd.grad(value.sum(), [mean, log_std])
        assert value.isfinite().all() and all(g.isfinite().all() for g in gradients)


def test_mean_lies_in_the_space_and_std_within_its_bounds():
    low, high = np.array([-2.0, 0.0]), np.array([2.0, 1.0])
    policy = prefine.GaussianPolicy(low, high, np.zeros(3), np.ones(3), [16], (-1.5, 0.5))
    mean, std = policy(1e3 * torch.randn(500, 3))
    half = torch.tensor(high - low).float() / 2
    assert (mean >= policy.low).all() and (mean <= policy.high).all()
    assert (std >= half * math.exp(-1.5) * 0.9999).all()
    assert (std <= half * math.exp(0.5) * 1.0001).all()


def test_policy_normalises_observations_itself():
    shifted = prefine.GaussianPolicy(*BOX, np.full(3, 5.0), np.full(3, 2.0), [16])
    plain = toy_policy()
    shifted.net.load_state_dict(plain.net.state_dict())
    observations = torch.randn(7, 3)
    torch.testing.assert_close(shifted(5 + 2 * observations), plain(observations))


def test_a_checkpoint_is_self_contained(tmp_path):
    low, high = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 1.0])
    policy = prefine.GaussianPolicy(low, high, np.arange(3), np.full(3, 2.0), [8, 4], (-2, 1))
    path = tmp_path / "policy.pt"
    torch.save({"format": 1, "env": BALL, "state": policy.state_dict()}, path)
    assert torch.load(path, weights_only=True)["env"] == BALL
    loaded = prefine.load_policy(path, BALL)
    assert same(policy, loaded)
    observations = torch.randn(5, 3)
    assert all(torch.equal(a, b) for a, b in zip(policy(observations), loaded(observations)))
    with pytest.raises(prefine.UserError, match="OfflineBallRun"):
        prefine.load_policy(path, "OfflineBallRun-v0")


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"\x80\x02}.", None])
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "policy.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(prefine.UserError, match="policy.pt"):
        prefine.load_policy(path)


@pytest.mark.parametrize("content", [{}, {"format": 2}, [1], {"format": 1, "env": BALL}])
def test_a_checkpoint_of_another_program_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "policy.pt")
    with pytest.raises(prefine.UserError, match="policy.pt"):
        prefine.load_policy(tmp_path / "policy.pt", BALL)


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"format": 1, "env": BALL, "state": Harm()}, tmp_path / "policy.pt")
    with pytest.raises(prefine.UserError, match="policy.pt"):
        prefine.load_policy(tmp_path / "policy.pt", BALL)
    assert not (tmp_path / "harm").exists()


def test_the_deterministic_actor_gives_the_mean_and_the_sampling_one_repeats_itself():
    policy, observation = toy_policy(), np.array([0.1, -0.2, 0.3])
    mean, std = policy(torch.tensor(observation).float())
    act = prefine.policy_actor(policy, False, None, 0)
    np.testing.assert_array_equal(act(observation), mean.detach().numpy())
    draws = [
        np.array([act(observation) for _ in range(2000)])
        for act in (prefine.policy_actor(policy, True, None, seed) for seed in (3, 3, 4))
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])
    np.testing.assert_allclose(draws[0].std(0), std.detach().numpy(), rtol=0.1)


# ------------------------------------------------------------- counterfactuals and the joint loss
def test_preference_loss_of_a_case_computed_by_hand():
    # margin = beta * 2 ln 3 = ln 3, sigmoid(ln 3) = 3/4, -log(3/4) / beta = 2 ln(4/3)
    winner, loser = torch.tensor([1 + 2 * math.log(3)]), torch.tensor([1.0])
    assert prefine.preference_loss(winner, loser, 0.5).item() == pytest.approx(0.57536414)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 10.0])
def test_preference_loss_is_the_softplus_of_the_negative_margin(beta):
    winner, loser = np.random.default_rng(0).normal(size=(2, 50))
    expected = np.log1p(np.exp(-beta * (winner - loser))) / beta
    found = prefine.preference_loss(torch.tensor(winner), torch.tensor(loser), beta)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 10.0])
def test_slope_at_equality_is_one_half_whatever_beta(beta):
    winner = torch.tensor(0.7, requires_grad=True)
    loser = torch.tensor(0.7, requires_grad=True)
    slopes = torch.autograd.grad(prefine.preference_loss(winner, loser, beta), [winner, loser])
    assert [slope.item() for slope in slopes] == pytest.approx([-0.5, 0.5])


def test_a_loss_and_its_opposite_differ_by_the_margin():
    winner, loser = torch.randn(2, 20)
    right = prefine.preference_loss(winner, loser, 0.3)
    wrong = prefine.preference_loss(loser, winner, 0.3)
    torch.testing.assert_close(wrong - right, winner - loser)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3, 0.5])
def test_label_smoothing_mixes_the_loss_with_its_opposite(smoothing):
    winner, loser = torch.randn(2, 20)
    right, wrong = (prefine.preference_loss(*x, 0.3) for x in ((winner, loser), (loser, winner)))
    found = prefine.preference_loss(winner, loser, 0.3, smoothing)
    torch.testing.assert_close(found, (1 - smoothing) * right + smoothing * wrong)


def distributions(seed=0):
    """Mean and std [6, 2] of a policy and of a reference, and actions [6, 2] in the same states."""
    generator = torch.Generator().manual_seed(seed)
    means, actions = 0.5 * torch.randn(2, 6, 2, generator=generator), torch.rand(6, 2)
    stds = 0.2 + torch.rand(2, 6, 2, generator=generator)
    return (means[0], stds[0]), (means[1], stds[1]), actions


def test_log_ratios_are_0_where_the_policy_is_its_reference():
    now, _, actions = distributions()
    h, c = prefine.log_ratios(now, now, actions, *BOX, torch.randn(3, 6, 2))
    assert (h == 0).all() and (c == 0).all()


def test_log_ratio_of_the_taken_action_is_the_difference_of_log_probs():
    now, before, actions = distributions()
    h, _ = prefine.log_ratios(now, before, actions, *BOX, torch.randn(1, 6, 2))
    normal = torch.distributions.Normal
    expected = normal(*now).log_prob(actions) - normal(*before).log_prob(actions)
    torch.testing.assert_close(h, expected.sum(-1))


def test_counterfactuals_depend_on_the_states_alone_and_not_on_the_actions_taken():
    now, before, actions = distributions()
    noise = torch.randn(2, 6, 2)
    h, c = prefine.log_ratios(now, before, actions, *BOX, noise)
    other_h, other_c = prefine.log_ratios(now, before, -actions, *BOX, noise)
    assert torch.equal(c, other_c) and not torch.equal(h, other_h)
    # A permutation of the states permutes the counterfactuals: each belongs to its own state.
    order = torch.tensor([3, 1, 4, 0, 5, 2])
    now, before = ([part[order] for part in pair] for pair in (now, before))
    _, permuted = prefine.log_ratios(now, before, actions, *BOX, noise[:, order])
    assert torch.equal(permuted, c[order])


@pytest.mark.parametrize("source", ("current", "reference"))
def test_counterfactuals_are_sampled_from_the_policy_asked_for(source):
    now, before, actions = distributions()
    noise = torch.randn(1, 6, 2)
    _, c = prefine.log_ratios(now, before, actions, *BOX, noise, source)
    mean, std = now if source == "current" else before
    sample = (mean + std * noise[0]).clamp(-1, 1)
    expected, _ = prefine.log_ratios(now, before, sample, *BOX, noise)
    torch.testing.assert_close(c, expected)


def test_several_counterfactuals_are_averaged():
    now, before, actions = distributions()
    noise = torch.randn(4, 6, 2)
    _, c = prefine.log_ratios(now, before, actions, *BOX, noise)
    each = [prefine.log_ratios(now, before, actions, *BOX, noise[k : k + 1])[1] for k in range(4)]
    torch.testing.assert_close(c, torch.stack(each).mean(0))


def test_no_gradient_flows_through_a_sample():
    (mean, std), before, actions = distributions()
    mean.requires_grad_()
    noise = torch.randn(1, 6, 2)
    _, c = prefine.log_ratios((mean, std), before, actions, *INFINITE, noise)
    (found,) = torch.autograd.grad(c.sum(), mean)
    # d log N(x; m, s) / dm = (x - m) / s^2 = noise / s; through the sample it would cancel out.
    torch.testing.assert_close(found, noise[0] / std)


def loss_inputs(segments=5, steps=3):
    generator = torch.Generator().manual_seed(1)
    good, good_c, bad, bad_c = torch.randn(4, segments, generator=generator)
    numbers = torch.rand(2, 2, 2 * segments, steps, 2, generator=generator) + 0.1
    w = torch.rand(segments, generator=generator)
    v = torch.arange(segments) % 2.0
    return (good, good_c), (bad, bad_c), [(mean, std) for mean, std in numbers], (w, v)


def expected_terms(inputs, beta):
    """The terms of the joint loss, from their formulas, in numpy."""
    parts = ([x.numpy() for x in part] for part in (*inputs[:2], *inputs[2], inputs[3]))
    (good, good_c), (bad, bad_c), (mean, std), (other_mean, other_std), (w, v) = parts
    ratio = std**2 / other_std**2
    kl = ((mean - other_mean) ** 2 / other_std**2 + ratio - 1 - np.log(ratio)).sum(-1) / 2

    def loss(margin):
        return np.log1p(np.exp(-beta * margin)) / beta

    return {
        "contrast_preferred": (w * loss(good - good_c)).mean(),
        "contrast_dispreferred": (v * loss(bad_c - bad)).mean(),
        "contrast_pair": loss(good - bad).mean(),
        "imitation": (-w * good).mean(),
        "kl": kl.mean(),
    }


NO_TERM = "--contrast-preferred 0 --contrast-dispreferred 0 --imitation 0 "
NAMES = ["contrast_preferred", "contrast_dispreferred", "contrast_pair", "imitation", "kl"]
ALONE = {name: f"{NO_TERM} --{name.replace('_', '-')} 1" for name in NAMES}


@pytest.mark.parametrize("name", ALONE)
def test_each_term_of_the_joint_loss_agrees_with_its_formula(name):
    inputs = loss_inputs()
    terms = prefine.joint_loss(*inputs, flags(f"{ALONE[name]} --beta 0.3"))
    assert list(terms) == [name]  # those of weight 0 are left out
    assert terms[name].item() == pytest.approx(expected_terms(inputs, 0.3)[name], rel=1e-5)


def test_the_kl_of_a_policy_to_itself_is_0():
    sums, weights = loss_inputs()[:2], loss_inputs()[3]
    mean, std, _ = torch.rand(3, 10, 3, 2) + 0.1
    terms = prefine.joint_loss(*sums, [(mean, std)] * 2, weights, flags(ALONE["kl"]))
    assert abs(terms["kl"].item()) < 1e-6


def test_the_bias_of_cpl_scales_the_loser_of_a_pair_and_no_counterfactual():
    inputs = loss_inputs()
    (good, _), (bad, bad_c) = inputs[:2]
    text = "--method cpl --bias 0.25 --beta 0.3 --contrast-dispreferred 1"
    terms = prefine.joint_loss(*inputs, flags(text))
    expected = prefine.preference_loss(good, 0.25 * bad, 0.3).mean()
    torch.testing.assert_close(terms["contrast_pair"], expected)
    expected = (inputs[3][1] * prefine.preference_loss(bad_c, bad, 0.3)).mean()
    torch.testing.assert_close(terms["contrast_dispreferred"], expected)


def test_the_joint_loss_is_the_weighted_sum_of_its_terms():
    inputs = loss_inputs()
    weights = dict(zip(ALONE, (2.0, 0.5, 0.25, 3.0, 0.1)))
    text = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in weights.items())
    expected = expected_terms(inputs, 0.3)
    total = sum(prefine.joint_loss(*inputs, flags(f"{text} --beta 0.3")).values()).item()
    assert total == pytest.approx(sum(weights[k] * expected[k] for k in weights), rel=1e-5)


@pytest.mark.parametrize("discount", [1.0, 0.9, 0.0])
def test_a_segment_is_contrasted_by_the_discounted_sum_of_its_steps(monkeypatch, discount):
    ratios, sums = (recorded(monkeypatch, name) for name in ("log_ratios", "joint_loss"))
    text = SMALL + f"--finetune-updates 2 --segment 5 --discount {discount}"
    prefine.finetune(toy_policy(), toy_dataset(), toy_preferences(), flags(text))
    (_, (h, c)), (((good, good_c), (bad, bad_c), *_), _) = ratios[1], sums[1]
    assert h.shape == c.shape == (32, 5) and h.abs().max() > 0
    for found, steps in (torch.cat([good, bad]), h), (torch.cat([good_c, bad_c]), c):
        torch.testing.assert_close(found, sum(discount**t * steps[:, t] for t in range(5)))


@pytest.mark.parametrize("preferred", [2, 3, 4])
def test_v_is_the_weight_of_the_nearest_other_episode_in_standard_deviations(preferred):
    rng = np.random.default_rng(0)
    lengths, w = [30, 40, 25, 50, 35], [0.5, 1.5, 0.8, 1.2][:preferred]
    episodes = [rng.normal(e % 3, 1, (n, 4)) * [1, 100, 0, 1e-3] for e, n in enumerate(lengths)]
    states = [torch.as_tensor(x + [0, 1e4, 9.81, 0], dtype=torch.float32) for x in episodes]
    scale, expected = np.concatenate(episodes).std(0) + [0, 0, 1, 0], []
    counts = preferred, 5 - preferred
    balance = {2: 1, 3: 2 / 3, 4: 1 / 4}[preferred]  # D / P, where fewer are dispreferred
    for i in range(preferred, 5):
        points, weights = [], []
        for j in [j for j in range(5) if j != i]:
            n = math.ceil(20 / counts[j >= preferred])  # 20 of each label
            points.append(episodes[j][np.linspace(0, lengths[j] - 1, n).astype(int)])
            weights += [balance * w[j] if j < preferred else 0.0] * n
        distances = (episodes[i][:, None] - np.concatenate(points)) / scale
        expected += [weights[j] for j in (distances**2).sum(-1).argmin(1)]
    found = prefine.nearest_weights(states, torch.tensor(w), n=20).tolist()
    close = np.isclose(found, expected, rtol=1e-6)
    assert close.mean() > 0.98  # but for ties within rounding
    possible = {round(balance * x, 5) for x in w} | ({0.0} if preferred < 4 else set())
    assert {round(x, 5) for x in found} == possible


@pytest.mark.parametrize("flag", ["", "--all-dispreferred"])
def test_states_weigh_w_and_v_in_the_joint_loss(monkeypatch, flag):
    dataset, preferences = toy_dataset(), toy_preferences()
    ratios, terms = (recorded(monkeypatch, name) for name in ("log_ratios", "joint_loss"))
    text = SMALL + f"--finetune-updates 20 --segment 2 {flag}"
    prefine.finetune(toy_policy(), dataset, preferences, flags(text))
    taken = torch.cat([inputs[2] for inputs, _ in ratios[:20]])  # then come those of the curve
    weights = torch.cat([torch.cat(inputs[3]) for inputs, _ in terms])
    episodes = preferences["preferred"] + preferences["dispreferred"]
    rows = dataset.rows(episodes)
    # No two actions are the same, so an action tells its row.
    index = torch.cdist(taken, dataset.actions[rows]).argmin(-1)
    returns = torch.from_numpy(dataset.sums(dataset.rewards))[episodes[:4]]
    w = 4 * torch.softmax(3 * returns / returns.std(correction=0), 0).float()
    v = prefine.nearest_weights(dataset.observations[rows].split(10), w)
    assert len(set(v.tolist())) == 5  # each preferred episode is the nearest somewhere, or none is
    expected = torch.cat([w.repeat_interleave(10), torch.ones(40) if flag else v])
    torch.testing.assert_close(weights, expected[index].mean(1))


def test_dispreferred_actions_are_unlearnt_only_where_preferred_trajectories_go():
    dataset = toy_dataset()
    dataset.observations[dataset.rows([1, 3, 5, 7])] += 20  # all that is dispreferred
    text = SMALL + "--finetune-updates 20 --contrast-preferred 0 --imitation 0 "
    for flag in "", "--all-dispreferred":
        before = toy_policy()
        after, _ = prefine.finetune(before, dataset, toy_preferences(), flags(text + flag))
        assert same(before, after) == (flag == "")


@pytest.mark.parametrize(
    ("term", "sign"), [("contrast_preferred", 1), ("contrast_dispreferred", -1)]
)
def test_the_gradient_raises_preferred_and_lowers_dispreferred_actions(term, sign):
    policy = toy_policy()
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(64, 1, 3, generator=generator)
    actions = torch.rand(64, 1, 2, generator=generator) - 0.5
    noise = torch.randn(64, 64, 1, 2, generator=generator)
    now = policy(states)
    known = [x.detach() for x in now]
    pair = prefine.log_ratios(now, known, actions, *BOX, noise)
    before = prefine.gaussian_log_prob(*now, actions, *BOX)
    ones = torch.ones(64, 1)
    terms = prefine.joint_loss(pair, pair, (now, known), (ones, ones), flags(ALONE[term]))
    terms[term].backward()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter -= 0.01 * parameter.grad
        after = prefine.gaussian_log_prob(*policy(states), actions, *BOX)
    assert sign * (after.mean() - before.mean()).item() > 1e-4


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


def test_the_draw_depends_on_the_seed_and_is_random_within_a_side():
    costs = np.repeat([0.0, 50.0], 500)
    draws = [prefine.draw_preferences(costs, 10, 100, 99, seed)["preferred"] for seed in (0, 0, 1)]
    assert np.array_equal(draws[0], draws[1]) and not np.array_equal(draws[0], draws[2])
    assert abs(draws[0].mean() - 249.5) < 60  # neither the first nor the last ones


@pytest.mark.parametrize(("flag", "counts"), [("preferred", (4, 1)), ("dispreferred", (1, 8))])
def test_too_few_trajectories_are_an_error_with_the_flag_and_the_counts(flag, counts):
    costs = np.array([0, 5, 10] + 7 * [11.0])
    have = {"preferred": "3 of 10", "dispreferred": "7 of 10"}[flag]
    with pytest.raises(prefine.UserError, match=f"--{flag} {max(counts)}.*{have}.*--cost-limit"):
        prefine.draw_preferences(costs, 10, *counts, 0)


def write_preferences(path, rows, header=("episode", "label")):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_preferences_read_from_a_file_are_those_written(tmp_path):
    rows = [(3, "preferred"), (0, "dispreferred"), (7, "dispreferred"), (1, "preferred")]
    sets = prefine.read_preferences(write_preferences(tmp_path / "labels.csv", rows), 8)
    assert sets == {"preferred": [3, 1], "dispreferred": [0, 7]}
    path = tmp_path / "labels.csv"  # a spreadsheet begins its file with a mark of the encoding
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert prefine.read_preferences(path, 8) == sets


@pytest.mark.parametrize(
    "row",
    [
        ("2", "good"),
        ("8", "preferred"),
        ("-1", "preferred"),
        ("x", "preferred"),
        ("3",),
        ("3", "dispreferred"),
        ("1.5", "preferred"),
        ("", "preferred"),
        ("2", ""),
    ],
)
def test_a_bad_line_of_preferences_is_named_by_its_number(tmp_path, row):
    rows = [(3, "preferred"), (0, "dispreferred"), row]
    with pytest.raises(prefine.UserError, match=r"labels.csv, line 4"):
        prefine.read_preferences(write_preferences(tmp_path / "labels.csv", rows), 8)


def test_preferences_need_both_columns_and_both_labels(tmp_path):
    path = tmp_path / "labels.csv"
    with pytest.raises(prefine.UserError, match="line 2"):
        prefine.read_preferences(write_preferences(path, [(3, "preferred")], ["id", "label"]), 8)
    with pytest.raises(prefine.UserError, match="both labels"):
        prefine.read_preferences(write_preferences(path, [(3, "preferred")]), 8)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00episode\n1,2\n", b"x" * 200_000, None])
def test_a_file_that_is_no_csv_gives_one_sentence_that_names_it(content, swimmer, tmp_path, capfd):
    path = tmp_path / "labels.csv"
    if content is not None:
        path.write_bytes(content)
    line = f"--dataset {swimmer[0]} --preferences {path} --run-dir {tmp_path / 'run'}"
    assert run(SWIMMER_RUN, line) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and str(path) in error


# --------------------------------------------------------------------- pre-training, fine-tuning
PRETRAIN = SMALL + "--pretrain-updates 250"
FINETUNE = SMALL + "--finetune-updates 250 --kl 0.1 --contrast-pair 0.5"


def without(dataset, costs):
    """The data set with permuted, broken or no costs."""
    order = np.random.default_rng(0).permutation(len(dataset.rewards))
    changed = {"permuted": dataset.costs[order], "nan": dataset.costs * math.nan, "none": None}
    return dataset._replace(costs=changed[costs])


@pytest.mark.parametrize("costs", ["permuted", "nan", "none"])
def test_training_never_reads_a_cost(costs):
    dataset, policy = toy_dataset(), toy_policy()
    both = dataset, without(dataset, costs)
    assert same(*(prefine.pretrain(each, BOX_SPACE, flags(PRETRAIN))[0] for each in both))
    settings = toy_preferences(), flags(FINETUNE)
    results = [prefine.finetune(policy, each, *settings) for each in both]
    assert same(results[0][0], results[1][0]) and results[0][1] == results[1][1]


def test_pretraining_imitates_the_best_episodes_by_return():
    dataset = toy_dataset(episodes=10, steps=100)
    best = dataset.rows([2, 5])
    dataset.rewards[:], dataset.actions[:] = 0, -0.4
    dataset.rewards[best] = 1
    generator = torch.Generator().manual_seed(0)
    dataset.actions[best] = 0.5 + 0.3 * torch.randn(200, 2, generator=generator)
    dataset.actions.clamp_(-1, 1)
    text = "--hidden 16 --pretrain-top 0.2 --pretrain-updates 800 --pretrain-lr 0.01"
    policy, curve = prefine.pretrain(dataset, BOX_SPACE, flags(text))
    mean, std = policy(dataset.observations[best])
    torch.testing.assert_close(mean.mean(0), torch.full((2,), 0.5), atol=0.08, rtol=0)
    torch.testing.assert_close(std.mean(0), torch.full((2,), 0.3), atol=0.08, rtol=0)
    assert curve[-1]["losses/imitation"] < curve[0]["losses/imitation"]


def test_a_constant_observation_does_not_divide_by_zero():
    dataset = toy_dataset()
    dataset.observations[:, 1] = 7.0
    policy, _ = prefine.pretrain(dataset, BOX_SPACE, flags(PRETRAIN))
    assert all(value.isfinite().all() for value in policy.state_dict().values())
    assert policy(torch.tensor([0.0, 7.5, 0.0]))[0].isfinite().all()
    dataset.observations[:] = 7.0  # all of them
    aligned, _ = prefine.finetune(policy, dataset, toy_preferences(), flags(FINETUNE))
    assert all(value.isfinite().all() for value in aligned.state_dict().values())


def test_finetuning_moves_towards_preferred_and_away_from_dispreferred_actions():
    dataset, policy = toy_dataset(), toy_policy()
    aligned, curve = prefine.finetune(policy, dataset, toy_preferences(), flags(FINETUNE))
    moved = (aligned(dataset.observations)[0] - policy(dataset.observations)[0]).mean(0)
    assert (moved > 0.05).all()  # preferred episodes go right, dispreferred ones left
    for split in "train", "heldout":
        for pair in "preferred_counterfactual", "preferred_dispreferred":
            assert curve[-1][f"margin/{split}/{pair}"] > 0
            assert curve[-1][f"accuracy/{split}/{pair}"] > 0.9
        assert curve[-1][f"kl/{split}"] > 0


def test_the_reference_is_frozen():
    policy = toy_policy()
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    aligned, _ = prefine.finetune(policy, toy_dataset(), toy_preferences(), flags(FINETUNE))
    assert same(before, policy) and not same(before, aligned)
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_no_update_leaves_the_policy_as_it_is():
    policy, text = toy_policy(), SMALL + "--finetune-updates 0"
    aligned, curve = prefine.finetune(policy, toy_dataset(), toy_preferences(), flags(text))
    assert same(policy, aligned) and curve == []


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


@pytest.mark.parametrize(
    "text",
    [
        "--segment 5",
        "--counterfactual reference",
        "--counterfactuals 3",
        *(f"--method {name}" for name in prefine.METHODS if name != "cpl"),
        "--method cpl --segment 5",
    ],
)
def test_every_variant_of_the_method_trains(text):
    dataset, policy = toy_dataset(), toy_policy()
    arguments = flags(SMALL + "--finetune-updates 20 " + text)
    aligned, curve = prefine.finetune(policy, dataset, toy_preferences(), arguments)
    assert not same(policy, aligned) and curve[-1]["update"] == 20
    assert all(math.isfinite(value) for key, value in curve[-1].items() if "losses" in key)


def test_a_segment_longer_than_an_episode_is_refused():
    with pytest.raises(prefine.UserError, match="--segment 11.* 10 steps"):
        prefine.finetune(toy_policy(), toy_dataset(), toy_preferences(), flags("--segment 11"))


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


def test_a_loss_that_is_not_finite_is_an_error_that_names_it_and_the_last_good_state(tmp_path):
    policy, path = torch.nn.Linear(1, 1), tmp_path / "state.pt"

    def sample(n, options):
        return [torch.randint(0, 2, (n,), **options), torch.arange(n)]

    def losses(_, step):
        broken = step == 50 and path.exists()  # in the second chunk
        return {"broken": policy.weight.sum() * (math.nan if broken else 1.0)}

    sentence = f"finetune: losses/broken.* not finite in updates 100 to 200.*{path}"
    with pytest.raises(prefine.UserError, match=sentence):
        prefine.optimise("finetune", policy, sample, losses, flags(), path)
    weights = torch.load(path, weights_only=True)[0]
    assert all(value.isfinite().all() for value in weights.values())


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
    assert dataset.rows([2, 0]).tolist() == [*range(20, 40), *range(5)]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other))


def test_other_shapes_and_types_of_the_same_numbers_load_the_same(tmp_path, ball):
    arrays = small_arrays()
    plain = prefine.load_dataset(write_hdf5(tmp_path / "plain.hdf5", arrays), ball)
    columns = {k: v[:, None] if v.ndim == 1 else v for k, v in arrays.items()}
    doubles = {k: v.astype(np.float64) for k, v in arrays.items()}
    for name, other in ("columns", columns), ("doubles", doubles):
        assert equal(prefine.load_dataset(write_hdf5(tmp_path / name, other), ball), plain)


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


def test_actions_just_outside_the_space_are_clipped_to_it(tmp_path, ball):
    arrays = small_arrays()
    arrays["actions"][0] = [1.5, -1.5]
    dataset = prefine.load_dataset(write_hdf5(tmp_path / "data.hdf5", arrays), ball)
    assert dataset.actions[0].tolist() == [1.0, -1.0]


def replace(key, change):
    """A defect: the array ``key`` is another one, or left out."""

    def make(path):
        arrays = small_arrays()
        arrays[key] = change(arrays[key])
        write_hdf5(path, {k: v for k, v in arrays.items() if v is not None})

    return make


def put(value):
    def change(array):
        array = array.astype(np.float64)
        array.reshape(-1)[7] = value
        return array

    return change


def edit(change):
    """A defect made by ``change(an open HDF5 file)``; its costs are deleted first."""

    def make(path):
        import h5py

        write_hdf5(path, small_arrays())
        write_hdf5(path.with_name("other.hdf5"), small_arrays())
        with h5py.File(path, "a") as file:
            del file["costs"]
            change(file, h5py)

    return make


def truncated(path):
    write_hdf5(path, small_arrays())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty_arrays(path):
    write_hdf5(path, {key: value[:0] for key, value in small_arrays().items()})


def declared_only(path):
    import h5py

    with h5py.File(path, "w") as file:
        for key, value in small_arrays().items():
            file.create_dataset(key, (10**10, *value.shape[1:]), np.float32, chunks=True)


def virtual(file, h5py):
    layout = h5py.VirtualLayout((ROWS,), np.float32)
    layout[:] = h5py.VirtualSource("other.hdf5", "costs", (ROWS,))
    file.create_virtual_dataset("costs", layout)


def set_link(link):
    return edit(lambda file, h5py: file.__setitem__("costs", link(h5py)))


def episode_count(episodes):
    """Not a defect of the file: it has only so many episodes, the last rows belong to none."""

    def make(path):
        arrays = small_arrays()
        arrays["timeouts"][episodes * EPISODE :] = False
        write_hdf5(path, arrays)

    return make


def checkpoint(**changes):
    """A --policy file: one of ours with these changes of its content."""

    def make(path):
        policy = prefine.GaussianPolicy(*BOX, np.zeros(8), np.ones(8), [4])
        content = {"format": 1, "env": BALL, "state": policy.state_dict()} | changes
        torch.save(content, path.with_name("policy.pt"))
        write_hdf5(path, small_arrays())

    return make


def other_size(path):
    wide = prefine.GaussianPolicy(*BOX, np.zeros(9), np.ones(9), [4]).state_dict()
    checkpoint(state=wide | {"mean": torch.zeros(8)})(path)


def cut_checkpoint(path):
    checkpoint()(path)
    policy = path.with_name("policy.pt")
    policy.write_bytes(policy.read_bytes()[:-500])


def labels(text):
    """A --preferences file with this text."""

    def make(path):
        write_hdf5(path, small_arrays())
        path.with_name("labels.csv").write_text(text)

    return make


POLICY, LABELS = "--policy {tmp}/policy.pt", "--preferences {tmp}/labels.csv"
BAD = {  # what is wrong: the sentence, the file that has it (else a good one), the flags
    "not HDF5": ("data.hdf5.*not a usable HDF5", lambda path: path.write_bytes(b"not HDF5" * 999)),
    "an empty file": ("data.hdf5.*not a usable HDF5", lambda path: path.write_bytes(b"")),
    "a folder": ("data.hdf5.*directory", lambda path: path.mkdir()),
    "no file": ("nothing.hdf5.*No such file", None, "--dataset {tmp}/nothing.hdf5"),
    "truncated": ("data.hdf5.*truncated", truncated),
    **{
        f"no {key}": (f"needs an array '{key}'.*and has", replace(key, lambda x: None))
        for key in small_arrays()
        if "next" not in key
    },
    "wide observations": (
        r"shape \('N', 8\).*\(60, 7\)",
        replace("observations", lambda x: x[:, 1:]),
    ),
    "wide actions": (r"shape \('N', 2\)", replace("actions", lambda x: np.hstack([x, x]))),
    "flat observations": (r"shape \('N', 8\)", replace("observations", lambda x: x.reshape(-1))),
    "wide rewards": (
        r"'rewards' must.*\(60, 2\)",
        replace("rewards", lambda x: np.stack([x, x], 1)),
    ),
    "text": (
        "'rewards' must be numbers",
        replace("rewards", lambda x: np.array([b"1.0"] * len(x))),
    ),
    "complex": ("'rewards' must be numbers", replace("rewards", lambda x: x.astype(complex))),
    "unequal lengths": (r"'costs' must.*\(59,\)", replace("costs", lambda x: x[:-1])),
    "empty": ("N > 0", empty_arrays),
    "no end": ("no episode has an end", replace("timeouts", np.zeros_like)),
    "far actions": ("'actions' lie far outside", replace("actions", put(50.0))),
    "negative costs": ("'costs' has negative", replace("costs", put(-1.0))),
    "NaN in observations": (
        "'observations' has.*not finite",
        replace("observations", put(math.nan)),
    ),
    "NaN in actions": ("'actions' has.*not finite", replace("actions", put(math.nan))),
    "NaN in rewards": ("'rewards' has.*not finite", replace("rewards", put(math.nan))),
    "NaN in costs": ("'costs' has.*not finite", replace("costs", put(math.nan))),
    "NaN in terminals": ("'terminals' has.*not finite", replace("terminals", put(math.nan))),
    "infinite observations": ("not finite", replace("observations", put(math.inf))),
    "infinite rewards": ("not finite", replace("rewards", put(-math.inf))),
    "huge rewards": ("'rewards' has.*beyond 1e9", replace("rewards", put(1e30))),
    "huge costs": ("'costs' has.*beyond 1e9", replace("costs", put(1e300))),
    "external link": (
        "an array 'costs' of its own",
        set_link(lambda h5py: h5py.ExternalLink("other.hdf5", "/costs")),
    ),
    "soft link": ("an array 'costs' of its own", set_link(lambda h5py: h5py.SoftLink("/rewards"))),
    "dangling link": (
        "an array 'costs' of its own",
        set_link(lambda h5py: h5py.SoftLink("/nowhere")),
    ),
    "group": ("an array 'costs' of its own", edit(lambda file, h5py: file.create_group("costs"))),
    "objects": (
        "'costs' must be numbers",
        edit(
            lambda file, h5py: file.create_dataset("costs", (ROWS,), h5py.special_dtype(vlen=str))
        ),
    ),
    "scalar": ("'costs' must be", edit(lambda file, h5py: file.create_dataset("costs", data=1.0))),
    "virtual": ("an array 'costs' of its own", edit(virtual)),
    "declared, not stored": ("stores next to nothing", declared_only),
    "one episode": ("--dispreferred 1: only 0 of 1|--preferred 1: only 0 of 1", episode_count(1)),
    "few safe": ("--preferred 4: only . of 3", None, "--preferred 4"),
    "few unsafe": ("--dispreferred 4: only . of 3", None, "--dispreferred 4"),
    "no unsafe": ("--dispreferred 1: only 0 of 3", None, "--cost-limit 99"),
    "long segment": ("--segment 21: .* 20 steps", None, "--segment 21"),
    "another task": ("policy.pt.*found format 1 of Other", checkpoint(env="Other"), POLICY),
    "a newer version": (f"policy.pt.*found format 2 of {BALL}", checkpoint(format=2), POLICY),
    "another size": ("policy.pt.*size mismatch", other_size, POLICY),
    "a cut policy": ("policy.pt.*not a checkpoint", cut_checkpoint, POLICY),
    "no state": ("policy.pt.*not a checkpoint", checkpoint(state=None), POLICY),
    "no policy file": ("test_prefine.py.*not a checkpoint", None, f"--policy {__file__}"),
    "no policy": ("policy.pt.*No such file", None, POLICY),
    "no labels": ("labels.csv", None, LABELS),
    "a bad label": ("labels.csv, line 3", labels("episode,label\n0,preferred\n1,good\n"), LABELS),
    "a far episode": (
        "labels.csv, line 2.*below 3",
        labels("episode,label\n3,preferred\n"),
        LABELS,
    ),
    "one label": ("labels.csv: needs.*both labels", labels("episode,label\n0,preferred\n"), LABELS),
    "no columns": ("labels.csv, line 2", labels("0,preferred\n1,dispreferred\n"), LABELS),
    "a run folder in a file": ("data.hdf5", None, "--run-dir {tmp}/data.hdf5/run"),
    "a run folder that cannot be": ("null", None, "--run-dir /dev/null"),
    "no task": ("--env : no such DSRL task", None, "--env="),
    "a typo": ("--env OfflineBallCirle:.*OfflineBallCircle", None, "--env OfflineBallCirle"),
    "a task without cost": ("--env CartPole-v1: no such DSRL task", None, "--env CartPole-v1"),
    "no such device": ("--device nonsense: not usable", None, "--device nonsense"),
    "no scripted data": (
        "--dataset scripted: .*Ant.* has none; Off",
        None,
        "--env OfflineAntVelocity --dataset scripted",
    ),
    "0 preferred": (r"--preferred: needs.*\[1, .*found 0", None, "--preferred 0"),
    "0 dispreferred": (r"--dispreferred: needs.*\[1, ", None, "--dispreferred 0"),
    "a negative limit": (r"--cost-limit: needs.*\[0, .*-1", None, "--cost-limit=-1"),
    "no limit": (r"--cost-limit: needs.*\[0, .*nan", None, "--cost-limit nan"),
    "an infinite limit": ("--cost-limit: needs.*inf", None, "--cost-limit inf"),
    "an unknown flag": ("--nonsense", None, "--nonsense 1"),
    "a short flag": ("--be", None, "--be 1"),
    "beta 0": ("--beta: needs", None, "--beta 0"),
    "beta NaN": ("--beta: needs", None, "--beta nan"),
    "beta text": ("--beta: .*x", None, "--beta x"),
    "a negative seed": ("--seed: needs", None, "--seed=-1"),
    "a method": ("--method: .*'none'", None, "--method none"),
    "0 workers": ("--workers: needs", None, "--workers 0"),
    "0 episodes": ("--eval-episodes: needs", None, "--eval-episodes 0"),
    "half an update": ("--pretrain-updates: .*1.5", None, "--pretrain-updates 1.5"),
    "a batch of 1": (r"--batch-size: needs.*\[2, ", None, "--batch-size 1"),
    "no number": ("--seed: needs int.*found abc", None, "--seed abc"),
    "a share of 5": (r"--smoothing: needs float.*\[0, 1\], found 5", None, "--smoothing 5"),
    "a negative rate": ("--finetune-lr: needs", None, "--finetune-lr=-1"),
}


@pytest.mark.filterwarnings("error")  # a warning would be a line more
@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_one_sentence_and_leaves_nothing_half_written(name, tmp_path, capfd):
    sentence, make, text = (*BAD[name], "")[:3]
    path = tmp_path / "data.hdf5"
    make(path) if make else write_hdf5(path, small_arrays())
    line = f"--env {BALL} --dataset {path} --run-dir {tmp_path / 'run'} --preferred 1"
    line += f" --dispreferred 1 --cost-limit 10 {text.format(tmp=tmp_path)}"
    before = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    assert run(line) == 2
    output, error = capfd.readouterr()
    assert error.count("\n") == 1 and "Traceback" not in output
    assert re.search(sentence, error), error
    assert {file: file.read_bytes() for file in before} == before
    left = {file.name for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert left <= {".lock", "config.json", "pretrained.pt", "pretrain.jsonl", "pretrain.pt"}


def test_3000_files_with_damaged_bytes_load_or_give_one_sentence(tmp_path, ball):
    """In no time, and in little memory."""
    path = write_hdf5(tmp_path / "data.hdf5", small_arrays())
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused, longest = 0, 0.0
    for _ in range(3000):
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
    assert 300 < refused < 3000 and longest < 10
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
    def check(file):
        prefine.load_dataset(file, ball)

    target.parent.mkdir()
    return prefine.download(urls, target, check, **options)


def test_a_good_download_is_whole(server, hdf5_bytes, ball, tmp_path):
    url = server(good=(200, hdf5_bytes, len(hdf5_bytes)))
    target = tmp_path / "cache" / "data.hdf5"
    fetch(ball, target, f"{url}/good")
    assert target.read_bytes() == hdf5_bytes and os.listdir(target.parent) == ["data.hdf5"]


def test_the_mirror_is_tried_where_the_first_address_fails(server, hdf5_bytes, ball, tmp_path):
    url = server(good=(200, hdf5_bytes, len(hdf5_bytes)))
    target = tmp_path / "cache" / "data.hdf5"
    fetch(ball, target, f"{url}/missing", f"{url}/good")
    assert target.read_bytes() == hdf5_bytes


@pytest.mark.parametrize("failure", ["cut", "short", "html", "silent", "error", "refused", "task"])
def test_a_failed_download_leaves_nothing_and_names_the_ways_on(
    failure, server, hdf5_bytes, ball, tmp_path
):
    half, html = hdf5_bytes[: len(hdf5_bytes) // 2], b"<html>Sign in first</html>"
    arrays = small_arrays()
    arrays["observations"] = arrays["observations"][:, :7]
    task = write_hdf5(tmp_path / "other.hdf5", arrays).read_bytes()
    url = server(
        task=(200, task, len(task)),
        cut=(200, half, len(hdf5_bytes)),  # the connection closes half-way
        short=(200, half, len(half)),
        html=(200, html, len(html)),
        silent=(299, half, len(hdf5_bytes)),
        error=(500, b"", 0),
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


def test_the_name_of_a_download_cannot_leave_the_cache(
    server, hdf5_bytes, ball, tmp_path, monkeypatch
):
    monkeypatch.setattr("dsrl.offline_env.DATASET_PATH", str(tmp_path / "cache"))
    url = server(**{"../../evil.hdf5": (200, hdf5_bytes, len(hdf5_bytes))})
    monkeypatch.setattr(ball.unwrapped, "dataset_url", f"{url}/../../evil.hdf5")
    path = prefine.find_dataset(flags(f"--env {BALL}"), ball)
    assert path == tmp_path / "cache" / "evil.hdf5" and not (tmp_path / "evil.hdf5").exists()


# -------------------------------------------------------------------------------------- simulators
def test_short_names_resolve_to_registered_ids():
    for name, expected in {
        "OfflineCarButton1": "OfflineCarButton1Gymnasium-v0",
        "OfflineBallCircle": BALL,
        "OfflineAntVelocity": "OfflineAntVelocityGymnasium-v1",
        "OfflineCarButton1Gymnasium-v0": "OfflineCarButton1Gymnasium-v0",
        BALL: BALL,
    }.items():
        assert prefine.resolve_env(name) == expected


@pytest.mark.parametrize(
    ("typo", "meant"), [("OfflineBallCirlce", "OfflineBallCircle"), ("carbutton1", "CarButton1")]
)
def test_a_typo_gets_the_nearest_names(typo, meant):
    with pytest.raises(prefine.UserError, match=f"--env {typo}.*{meant}"):
        prefine.resolve_env(typo)


@pytest.mark.parametrize("name", ["OfflineBallCircle", "OfflineCarButton1", "OfflineAntVelocity"])
def test_both_families_of_simulators_step(name):
    with real_streams():
        env = prefine.import_simulators().make(prefine.resolve_env(name))
    observation, _ = env.reset(seed=0)
    stepped, reward, _, _, info = env.step(env.action_space.sample())
    assert env.observation_space.shape == observation.shape == stepped.shape
    assert math.isfinite(reward) and "cost" in info


def same_episodes(one, other):
    return all(np.array_equal(a[key], b[key]) for a, b in zip(one, other) for key in a)


def test_episodes_depend_on_their_seed_and_not_on_the_number_of_workers():
    jobs = [(prefine.CONTROLLERS[BALL], seed) for seed in (7, 8, 9, 10)]
    one, two = (prefine.run_episodes(BALL, jobs, workers, "test") for workers in (1, 2))
    with real_streams():
        alone = [prefine.run_episode(BALL, *job) for job in jobs[::-1]][::-1]
    assert same_episodes(one, two) and same_episodes(one, alone)
    assert not np.array_equal(one[0]["rewards"], one[1]["rewards"])
    for episode in one:
        steps = len(episode["rewards"])
        assert episode["observations"].shape == (steps, 8)
        assert episode["actions"].shape == (steps, 2)
        then = episode["next_observations"]
        np.testing.assert_array_equal(episode["observations"][1:], then[:-1])
        assert episode["timeouts"].nonzero()[0].tolist() == [steps - 1]
        assert not episode["terminals"].any()


def test_a_car_button_episode_repeats_itself():
    env_id = prefine.resolve_env("OfflineCarButton1")
    first, second = (prefine.run_episode(env_id, prefine.lidar_controller, 7) for _ in range(2))
    assert same_episodes([first], [second]) and len(first["rewards"]) == 1000
    assert first["costs"].sum() > 0 and not first["terminals"].any()
    assert first["rewards"].sum() > 5  # it drives, and finds its goals


@pytest.mark.parametrize("env_id", prefine.BULLET)
def test_scripted_bullet_episodes_are_safe_and_unsafe_slow_and_fast(env_id):
    jobs = [(prefine.CONTROLLERS[env_id], seed) for seed in range(16)]
    episodes = prefine.run_episodes(env_id, jobs, 2, "test")
    returns, costs = ([e[key].sum() for e in episodes] for key in ("rewards", "costs"))
    assert min(costs) == 0 and sum(cost > 10 for cost in costs) >= 3
    assert max(returns) > 1.5 * statistics.median(returns) > 100


def driver(seed, env, _):
    return prefine.lidar_controller(env, seed)


@pytest.mark.parametrize("name", ["OfflineCarGoal1", "OfflinePointButton1"])
def test_a_reckless_driver_costs_more_than_a_careful_one_on_the_same_layouts(name):
    reckless, careful = (functools.partial(driver, seed) for seed in (0, 1))
    jobs = [(make, layout) for make in (reckless, careful) for layout in range(6)]
    episodes = prefine.run_episodes(prefine.resolve_env(name), jobs, 2, "test")
    returns, costs = ([float(e[key].sum()) for e in episodes] for key in ("rewards", "costs"))
    assert sum(costs[:6]) > 1.3 * sum(costs[6:])
    assert sum(returns[:6]) > 60 and sum(returns[6:]) > 10  # both find goals


# -------------------------------------------------------------------------------------- evaluation
def test_the_evaluation_agrees_with_its_episodes(ball, monkeypatch):
    calls = recorded(monkeypatch, "run_episodes")
    torch.manual_seed(0)
    first, second = (prefine.GaussianPolicy(*BOX, np.zeros(8), np.ones(8), [8]) for _ in range(2))
    limit, arguments = 3.0, flags(f"--env {BALL} --eval-episodes 3 --cost-limit 3 --workers 2")
    found = prefine.evaluate({"a": first, "b": second, "again": first}, ball, arguments)
    ((_, episodes),) = calls
    assert found["a"] == found["again"] and len(episodes) == 9
    starts = np.array([episode["observations"][0] for episode in episodes])
    np.testing.assert_array_equal(starts[:3], starts[3:6])  # the same start states for both
    assert not np.array_equal(starts[0], starts[1])
    low, high = ball.unwrapped.min_episode_reward, ball.unwrapped.max_episode_reward
    for name, part in ("a", episodes[:3]), ("b", episodes[3:6]):
        returns = [math.fsum(episode["rewards"]) for episode in part]
        costs = [math.fsum(episode["costs"]) for episode in part]
        expected = {
            "return_mean": sum(returns) / 3,
            "cost_mean": sum(costs) / 3,
            "cost_max": max(costs),
            "violation_rate": sum(cost > limit for cost in costs) / 3,
            "failure_rate": sum(bool(episode["terminals"].any()) for episode in part) / 3,
            "normalized_return": (sum(returns) / 3 - low) / (high - low),
            "normalized_cost": sum(costs) / 3 / limit,
            "episodes": 3,
        }
        assert {key: found[name][key] for key in expected} == pytest.approx(expected, rel=1e-5)
        for key, mean in ("return", "return_mean"), ("cost", "cost_mean"):
            low_end, high_end = found[name][f"{key}_ci95"]
            values = returns if key == "return" else costs
            assert min(values) - 1e-4 <= low_end <= found[name][mean] <= high_end
            assert high_end <= max(values) + 1e-4 and (low_end < high_end or len(set(values)) == 1)
        for key in "violation_rate", "failure_rate":
            for bound in found[name][f"{key}_ci95"]:  # Wilson: |p - k/n| = z sqrt(p (1 - p) / n)
                gap = (found[name][key] - bound) ** 2 - 1.959964**2 * bound * (1 - bound) / 3
                assert gap == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------------- end to end
MEASURED = """return_mean return_ci95 cost_mean cost_ci95 normalized_return normalized_cost
violation_rate violation_rate_ci95 failure_rate failure_rate_ci95 cost_max episodes"""
BALL_RUN = """--env OfflineBallCircle --dataset scripted --scripted-episodes 24 --preferred 4
--dispreferred 3 --hidden 32 --pretrain-updates 300 --finetune-updates 300 --eval-episodes 2
--pretrain-top 0.3 --seed 1 --no-report"""


@pytest.fixture(scope="module")
def ball_run(tmp_path_factory):
    """A whole run, as a user types it; its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    done = command(*BALL_RUN.split(), "--workers", 2, "--run-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def metrics(folder):
    """The content of metrics.json; seconds are the only thing that may differ between runs."""
    content = json.loads((folder / "metrics.json").read_text())
    assert all(value >= 0 for value in content.pop("seconds").values())
    return content


def check_metrics(folder, episodes):
    content = json.loads((folder / "metrics.json").read_text())
    parts = "env dataset method seed cost_limit pretrained finetuned data seconds"
    assert " ".join(content) == parts
    assert list(content["seconds"]) == ["load", "pretrain", "finetune", "evaluate"]
    for name in "pretrained", "finetuned":
        assert sorted(content[name]) == sorted(MEASURED.split())
        for key, value in content[name].items():
            values = value if "ci95" in key else [value]
            assert len(values) == (2 if "ci95" in key else 1) and np.isfinite(values).all()
        assert content[name]["episodes"] == episodes
    return content


def test_a_whole_run_in_bullet_safety_gym(ball_run, cache):
    folder, output = ball_run
    content = check_metrics(folder, episodes=2)
    assert content["env"] == BALL and content["cost_limit"] == 10 and content["seed"] == 1
    assert content["data"]["episodes"] == 24
    files = ["config.json", "finetune.jsonl", "finetuned.pt", "metrics.json", "pretrain.jsonl"]
    assert sorted(x for x in os.listdir(folder) if x[0] != ".") == [*files, "pretrained.pt"]
    assert "pre-trained" in output and "fine-tuned" in output and "cost" in output
    assert any("scripted" in name and name.endswith(".hdf5") for name in os.listdir(cache))
    config = json.loads((folder / "config.json").read_text())
    assert config["preferred"] == 4 and config["pretrain_updates"] == 300
    lines = (folder / "finetune.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["update"] for row in rows] == [100, 200, 300]
    for split in "train", "heldout":
        pairs = "preferred_counterfactual", "counterfactual_dispreferred", "preferred_dispreferred"
        names = [f"{kind}/{split}/{pair}" for kind in ("margin", "accuracy") for pair in pairs]
        assert {*names, f"kl/{split}"} <= rows[0].keys()


def test_the_result_is_a_policy_that_needs_no_data_and_runs_no_code(ball_run):
    content = torch.load(ball_run[0] / "finetuned.pt", weights_only=True)
    assert content["env"] == BALL
    policy = prefine.load_policy(ball_run[0] / "finetuned.pt", BALL)
    assert not same(policy, prefine.load_policy(ball_run[0] / "pretrained.pt", BALL))
    assert policy(torch.zeros(8))[0].shape == (2,)


def test_a_complete_run_is_shown_and_not_repeated(ball_run, capfd):
    folder, output = ball_run
    files = [folder / "metrics.json", *folder.glob("*.pt"), *folder.glob("*.jsonl")]
    before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    assert run(BALL_RUN, f"--run-dir {folder}") == 0
    again = capfd.readouterr().out
    assert "complete" in again and again.splitlines()[-1] in output  # the same table
    assert [(file.read_bytes(), file.stat().st_mtime_ns) for file in files] == before


def test_another_folder_and_number_of_workers_give_the_same_numbers(ball_run, tmp_path):
    assert run(BALL_RUN, f"--workers 1 --run-dir {tmp_path / 'b'}") == 0
    assert metrics(tmp_path / "b") == metrics(ball_run[0])
    for name in "pretrained.pt", "finetuned.pt":
        assert same(*(prefine.load_policy(x / name) for x in (tmp_path / "b", ball_run[0])))
    for name in "pretrain.jsonl", "finetune.jsonl":
        assert (tmp_path / "b" / name).read_bytes() == (ball_run[0] / name).read_bytes()


def is_held(path):
    """If a running process holds the lock file."""
    if not path.exists():
        return False
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def start(*arguments, **variables):
    """``prefine.py`` in the background, in a process group of its own."""
    line = [sys.executable, str(HERE / "prefine.py"), *map(str, arguments)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(line, env=os.environ | variables, start_new_session=True, **pipes)


def group(leader):
    """The processes of the group of this number, each with its parent."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[2]) == leader and fields[0] != "Z":
                found[int(path.parent.name)] = int(fields[1])
    return found


def workers(main):
    """The processes that simulate for this one: the fork server is its child and their parent."""
    found = group(os.getpgid(main))
    return [child for child, parent in found.items() if found.get(parent) == main]


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def begun(process, folder):
    """Wait until the process works in the run folder, or has ended."""
    wait_until(lambda: process.poll() is not None or is_held(folder / ".lock"))


def interrupted_run(folder, data, seed):
    """A run interrupted in each stage, and how many files that end a stage each signal found."""
    rng, hit, signals = np.random.default_rng(seed), [], ["SIGKILL", "SIGTERM", "SIGINT"]
    line = [*BALL_RUN.split(), "--workers", 1, "--run-dir", folder]

    def stage():
        return len([*data.glob("*.hdf5"), *folder.glob("*.pt")])

    for wanted, longest in (0, 1), (0, 3), (1, 0.3), (2, 0.3), (3, 1):  # stages differ in length
        process = start(*line, DSRL_DATASET_DIR=str(data))
        begun(process, folder)
        wait_until(lambda p=process, n=wanted: stage() >= n or p.poll() is not None)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, longest))
        kind, running = getattr(signal, rng.choice(signals)), process.poll() is None
        hit += [stage()] * running
        process.send_signal(kind)
        error = process.communicate()[1]
        if running and kind == signal.SIGINT and not (folder / "metrics.json").exists():
            assert process.returncode == 130, (process.returncode, error)
            assert "interrupted; the same command goes on" in error, error
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
        assert metrics(folder) == metrics(ball_run[0])
        for name in "pretrain.jsonl", "finetune.jsonl":
            assert (folder / name).read_bytes() == (ball_run[0] / name).read_bytes()
        for name in "pretrained.pt", "finetuned.pt":
            assert same(*(prefine.load_policy(x / name) for x in (folder, ball_run[0])))
        assert not (folder / "resume").exists() and not list(data.glob("*.episodes"))
    # While collecting, while evaluating, and in between; a few may come just after the end.
    assert {0, 3} < set(hit) and len(hit) > 12


def test_a_collection_goes_on_with_the_episodes_that_it_has(tmp_path):
    jobs = [(prefine.CONTROLLERS[BALL], seed) for seed in range(4)]
    first = prefine.run_episodes(BALL, jobs[:3], 2, "test", tmp_path / "kept")
    files = sorted((tmp_path / "kept").iterdir())
    times = [file.stat().st_mtime_ns for file in files]
    again = prefine.run_episodes(BALL, jobs, 2, "test", tmp_path / "kept")
    assert same_episodes(first, again) and len(again) == 4
    assert [file.stat().st_mtime_ns for file in files] == times and len(files) == 3


def test_training_goes_on_from_its_last_state_to_the_same_bits(tmp_path):
    dataset, policy, text = toy_dataset(), toy_policy(), SMALL + "--finetune-updates "
    whole = prefine.finetune(policy, dataset, toy_preferences(), flags(text + "300"))

    class Interrupted(Exception):
        pass

    def interrupted(path, save):
        write(path, save)
        raise Interrupted

    write, states = prefine.write, tmp_path / "state.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefine, "write", interrupted)
        for _ in range(2):
            with pytest.raises(Interrupted):
                arguments = flags(text + "300")
                prefine.finetune(policy, dataset, toy_preferences(), arguments, states)
    resumed = prefine.finetune(policy, dataset, toy_preferences(), flags(text + "300"), states)
    assert same(whole[0], resumed[0]) and whole[1] == resumed[1]


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_goes_on(ball_run, tmp_path):
    folder = tmp_path / "run"
    line = [*BALL_RUN.split(), "--workers", 1, "--run-dir", folder, "--eval-episodes", 3]
    first = start(*line)
    begun(first, folder)
    first.send_signal(signal.SIGSTOP)  # it holds its lock for as long as the second one takes
    second = command(*line)
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 2 and second.stderr.count("\n") == 1
    assert f"--run-dir {folder}" in second.stderr and "another process" in second.stderr
    assert first.communicate()[1] == "" and first.returncode == 0
    check_metrics(folder, episodes=3)


def test_of_two_that_want_the_same_data_one_collects_and_the_other_waits(ball_run, tmp_path):
    variables = dict(DSRL_DATASET_DIR=str(tmp_path / "data"))
    line = [*BALL_RUN.split(), "--workers", 1, "--run-dir"]
    pair = [start(*line, tmp_path / name, **variables) for name in "ab"]
    outputs = [process.communicate() for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    collecting = [output.count("collecting 24 scripted episodes") for output, _ in outputs]
    waiting = [output.count("waiting for the process") for output, _ in outputs]
    assert sorted(collecting) == [0, 1] and sorted(waiting) == [0, 1]
    for name in "ab":
        assert metrics(tmp_path / name) == metrics(ball_run[0])


@pytest.mark.parametrize("victim", ["worker", "main"])
def test_a_killed_process_is_reported_and_leaves_no_other(victim, ball_run, tmp_path):
    folder = tmp_path / "run"
    process = start(*BALL_RUN.split(), "--run-dir", folder, "--eval-episodes", 200)
    # Not while the pool starts its workers: Python 3.11's own pool can then wait for ever.
    wait_until(lambda: len(list(folder.rglob("evaluate-*.npz"))) > 20)
    number = workers(process.pid)[0] if victim == "worker" else process.pid
    os.kill(number, signal.SIGKILL)
    error = process.communicate(timeout=60)[1]
    if victim == "worker":
        assert process.returncode == 2 and "prefine.py" not in error.rpartition("prefine.py: ")[0]
        assert "a worker was killed" in error.splitlines()[-1] and "--workers" in error
    wait_until(lambda: not group(process.pid), 20)
    assert not (folder / "metrics.json").exists()


def test_a_full_disk_gives_one_sentence_and_loses_nothing(ball_run, tmp_path):
    """A limit on the size of files stands in for the disk: writes beyond it fail as there."""
    folder = tmp_path / "run"
    line = [sys.executable, str(HERE / "prefine.py"), *BALL_RUN.split(), "--run-dir", str(folder)]

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    done = subprocess.run(line, capture_output=True, text=True, preexec_fn=limited)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.part"))
    assert run(" ".join(line[2:])) == 0 and metrics(folder) == metrics(ball_run[0])


def test_200_parallel_episodes_leak_neither_processes_nor_memory():
    task, jobs = "OfflineBallRun-v0", [(memory_actor, i) for i in range(200)]
    prefine.run_episodes(task, jobs[:2], 2, "test")  # starts the fork server, which stays
    time.sleep(1)
    before = set(group(os.getpgrp()))
    sizes = prefine.run_episodes(task, jobs, 2, "test")
    grown = [episode["actions"][0, 0] for episode in sizes]  # the worker's size in GiB
    assert max(grown[100:]) - max(grown[20:50]) < 0.02 and len(sizes) == 200
    wait_until(lambda: set(group(os.getpgrp())) <= before)


def memory_actor(env, seed):
    """Takes the size of its process, in GiB, as its action."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    size = pages * os.sysconf("SC_PAGE_SIZE") / 2**30
    return lambda observation: np.array([size, 0.0])


def test_other_flags_in_the_same_folder_are_refused_and_named(ball_run, capfd):
    content = (ball_run[0] / "metrics.json").read_bytes()
    line = f"{BALL_RUN} --run-dir {ball_run[0]} --beta 0.2 --preferred 3"
    assert run(line) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "--beta" in error and "--preferred" in error
    assert "--no-resume" in error and "--seed" not in error
    assert (ball_run[0] / "metrics.json").read_bytes() == content


def test_no_resume_starts_over(ball_run, tmp_path):
    folder = shutil.copytree(ball_run[0], tmp_path / "d")
    line = f"{BALL_RUN} --run-dir {folder} --finetune-updates 0 --no-resume"
    assert run(line) == 0
    content = metrics(folder)
    assert content["finetuned"] == content["pretrained"] == metrics(ball_run[0])["pretrained"]
    assert json.loads((folder / "config.json").read_text())["finetune_updates"] == 0


def test_a_trained_policy_is_taken_instead_of_pretraining(ball_run, tmp_path):
    policy = ball_run[0] / "pretrained.pt"
    line = f"{BALL_RUN} --policy {policy} --run-dir {tmp_path / 'e'}"
    assert run(line) == 0
    content, first = metrics(tmp_path / "e"), metrics(ball_run[0])
    assert content["pretrained"] == first["pretrained"]
    assert content["finetuned"] == first["finetuned"]


def test_pretraining_reaches_the_mean_return_of_the_best_30_percent(tmp_path, cache):
    text = "--env OfflineBallCircle --dataset scripted --scripted-episodes 100 --workers 2 "
    text += "--preferred 5 --dispreferred 5 --pretrain-updates 2000 --finetune-updates 0 "
    import h5py

    assert run(text, f"--no-report --eval-episodes 10 --run-dir {tmp_path / 'f'}") == 0

    with h5py.File(cache / f"{BALL}-scripted-100.hdf5") as file:
        returns = np.sort(file["rewards"][:].reshape(100, 200).sum(1))
    assert metrics(tmp_path / "f")["pretrained"]["return_mean"] >= returns[-30:].mean()


def test_scripted_data_loads_through_dsrl_itself_with_equal_content(ball_run, cache, ball):
    path = cache / f"{BALL}-scripted-24.hdf5"
    theirs, ours = ball.unwrapped.get_dataset(h5path=str(path)), prefine.load_dataset(path, ball)
    for key in "observations", "actions", "rewards", "costs":
        np.testing.assert_array_equal(theirs[key], getattr(ours, key).numpy())
    done = (theirs["terminals"] + theirs["timeouts"]) > 0
    np.testing.assert_array_equal(np.flatnonzero(done) + 1, ours.ends.numpy())
    inner = ~done[:-1]
    np.testing.assert_array_equal(
        theirs["next_observations"][:-1][inner], theirs["observations"][1:][inner]
    )
    costs, returns = ours.sums(ours.costs), ours.sums(ours.rewards)
    assert (costs <= 10).sum() >= 4 and (costs > 10).sum() >= 4  # safe and unsafe episodes both
    assert returns.max() > 2 * np.median(returns[returns > 0]) or np.ptp(returns) > 200


def test_scripted_data_of_another_task_is_refused_with_those_that_have_it(tmp_path, capfd):
    line = f"--env OfflineAntVelocity --dataset scripted --run-dir {tmp_path / 'g'}"
    assert run(line) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "OfflineBallCircle" in error and "OfflineCarButton1" in error


@pytest.fixture(scope="module")
def swimmer(tmp_path_factory):
    """A data set of random actions, recorded in a Safety-Gymnasium task; its path and arrays."""
    env = prefine.import_simulators().make("OfflineSwimmerVelocityGymnasium-v1")
    rng, rows = np.random.default_rng(0), []
    for seed in range(12):
        observation, _ = env.reset(seed=seed)
        push, ended, timeout = rng.uniform(-1, 1, 2), False, False
        while not (ended or timeout):
            action = np.clip(push + 0.5 * rng.normal(size=2), -1, 1)
            following, reward, ended, timeout, info = env.step(action)
            rows.append((observation, action, reward, info["cost"], ended, timeout))
            observation = following
    names = ("observations", "actions", "rewards", "costs", "terminals", "timeouts")
    arrays = {name: np.array(column) for name, column in zip(names, zip(*rows))}
    path = tmp_path_factory.mktemp("swimmer") / "swimmer.hdf5"
    return write_hdf5(path, arrays), arrays


SWIMMER_RUN = """--env OfflineSwimmerVelocity --preferred 3 --dispreferred 3 --hidden 32
--pretrain-updates 200 --finetune-updates 200 --eval-episodes 2 --workers 2 --no-report"""


def test_a_whole_run_in_safety_gymnasium(swimmer, tmp_path):
    path, arrays = swimmer
    limit = np.median(arrays["costs"].reshape(12, 1000).sum(1))
    line = f"--dataset {path} --cost-limit {limit} --run-dir {tmp_path / 'h'}"
    assert run(SWIMMER_RUN, line) == 0
    content = check_metrics(tmp_path / "h", episodes=2)
    assert content["cost_limit"] == limit


def test_labels_from_a_file_need_no_cost_at_all(swimmer, tmp_path, capfd):
    arrays = {key: value for key, value in swimmer[1].items() if key != "costs"}
    path = write_hdf5(tmp_path / "no_costs.hdf5", arrays)
    labels = [(e, "preferred" if e % 2 else "dispreferred") for e in range(8)]
    labels = write_preferences(tmp_path / "labels.csv", labels)
    line = f"--dataset {path} --preferences {labels} --run-dir {tmp_path / 'i'}"
    assert run(SWIMMER_RUN, line) == 0
    data = check_metrics(tmp_path / "i", episodes=2)["data"]
    assert (data["preferred"], data["dispreferred"]) == (4, 4) and "cost_mean" not in data
    labels.unlink()  # the run knows them, also for its report
    assert run_all("report", tmp_path / "i").returncode == 0
    assert metrics(tmp_path / "i")["data"]["divergence_bits"] is None  # of costs, which are unknown
    write_preferences(labels, [(0, "preferred"), (1, "dispreferred")])
    assert run(SWIMMER_RUN, line) == 2
    assert "has another --preferences" in capfd.readouterr().err


# ------------------------------------------------------------------------------- the command line
def help_text(capfd):
    with pytest.raises(SystemExit) as caught:
        prefine.main(["--help"])
    assert caught.value.code == 0
    return capfd.readouterr().out


def test_a_command_without_a_task_gets_one_sentence(tmp_path, monkeypatch, capfd, cache):
    monkeypatch.chdir(tmp_path)
    assert run("") == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "--env" in error and "OfflineBallCircle" in error


def test_every_flag_has_its_line_of_help(capfd):
    lines = help_text(capfd)
    for name in vars(flags()):
        assert f"--{name.replace('_', '-')}" in lines


def test_a_method_is_a_set_of_flags_and_flags_override_it():
    assert flags("--method dpo").contrast_pair == 1 and flags("--method dpo").kl == 0
    assert flags("--method dpo").contrast_preferred == 0
    assert flags("--method dpo --contrast-preferred 0.7").contrast_preferred == 0.7


def test_the_module_and_a_policy_of_ones_own_need_only_torch_and_numpy():
    code = """
import sys
for name in ["h5py", "tqdm", "scipy", "dsrl", "gymnasium", "matplotlib", "gym", "safety_gymnasium",
             "bullet_safety_gym", "pybullet", "mujoco"]:
    sys.modules[name] = None  # importing it fails as if it were not installed
import prefine
assert prefine.parse_args([]).beta > 0
"""
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, cwd=HERE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    # So does aligning a policy of one's own, as the README shows it, and its example by hand.
    text = (HERE / "README.md").read_text().split("## Your own policy")[1]
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code += (
        "\n".join(blocks)
        + """
rng, last = np.random.default_rng(0), np.arange(1, 401) % 50 == 0  # 8 episodes of 50 steps
arrays = rng.normal(size=(400, 5)), rng.normal(size=(400, 2)), rng.normal(size=400), last, 0 * last
agent, labels = Agent(5, 2), ([0, 2, 4], [1, 3])
other = align(agent, arrays, *labels)
assert type(other) is Agent and not torch.equal(other.actor_logstd, agent.actor_logstd)
assert torch.equal(other.critic[0].weight, agent.critic[0].weight)
"""
    )
    done = subprocess.run([*line[:2], code], capture_output=True, text=True, cwd=HERE)
    assert (done.returncode, done.stdout) == (0, "0.375 -0.125 13.61\n"), done.stderr


def test_run_all_works_in_a_folder_with_a_space_and_a_quote_in_its_name(ball_run, tmp_path):
    here = tmp_path / "it's a folder"
    (here / ".venv" / "bin").mkdir(parents=True)
    for name in "prefine.py", "run_all.sh":
        shutil.copy(HERE / name, here)
    python = here / ".venv" / "bin" / "python"  # set-up is taken as done, with this Python
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    checksum = "sed -n '/^# \\/\\/\\/ script$/,/^# \\/\\/\\/$/p' prefine.py | cksum"
    line = f'echo "$({checksum}) 3.11" > .venv/stamp && bash run_all.sh '
    flags = BALL_RUN.replace("--no-report", "--run-dir runs/one")
    for verb in f"demo {flags}", "summary":
        command = ["bash", "-c", line + verb.replace("\n", " ")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=here)
        assert done.returncode == 0, done.stderr
    found, expected = metrics(here / "runs" / "one"), metrics(ball_run[0])
    assert (here / "runs" / "one" / "report.png").exists()  # drawing it adds to "data"
    found["data"] = {key: found["data"][key] for key in expected["data"]}
    assert found == expected
    assert "OfflineBallCircle (scripted, limit 10) | prefine | 1" in done.stdout
    assert (here / "runs" / "summary.csv").exists()
    # Without a verb: what has its result is not run again, and what fails is named.
    (here / "runs" / "one").rename(here / "runs" / "OfflineBallCircle__prefine__1")
    for task, code in ("OfflineBallCircle", 0), ("OfflineNothing", 1):
        variables = os.environ | dict(TASKS=task, METHODS="prefine", SEEDS="1")
        command = ["bash", "-c", line + "-j 2"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=here, env=variables)
        assert done.returncode == code, done.stderr
        assert ("scripted, limit 10) | prefine | 1" in done.stdout) == (code == 0)
        assert ("runs/logs/OfflineNothing__prefine__1.log" in done.stderr) == (code == 1)
    assert "no such DSRL task" in (here / "runs/logs/OfflineNothing__prefine__1.log").read_text()


def run_all(*arguments):
    line = ["bash", str(HERE / "run_all.sh"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True)


def read_png(path):
    from matplotlib.image import imread

    return imread(path)


@pytest.fixture(scope="module")
def reported(ball_run, tmp_path_factory):
    """A complete run, asked for what is drawn of it."""
    folder = tmp_path_factory.mktemp("reported") / "run"
    shutil.copytree(ball_run[0], folder)
    flags = BALL_RUN.replace("--no-report", "--capture-video").split()
    done = command(*flags, "--run-dir", folder, cwd=folder.parent)
    assert done.returncode == 0 and "complete" in done.stdout, done.stderr
    return folder


def test_the_report_measures_how_far_the_two_sets_are_apart(reported, ball_run, cache, ball):
    data, before = metrics(reported)["data"], metrics(ball_run[0])
    assert {key: data[key] for key in before["data"]} == before["data"]
    histograms = data["cost_histograms"]
    assert sum(histograms["preferred"]) == 4 and sum(histograms["dispreferred"]) == 3
    shares = [np.array(histograms[label]) / sum(histograms[label]) for label in prefine.LABELS]
    middle = np.mean(shares, axis=0)
    divergence = 0.0
    for share in shares:  # Jensen and Shannon: the mean of KL(share | middle), in bits
        some = share > 0
        divergence += 0.5 * np.sum(share[some] * np.log2(share[some] / middle[some]))
    assert data["divergence_bits"] == pytest.approx(divergence)
    dataset = prefine.load_dataset(cache / f"{BALL}-scripted-24.hdf5", ball)
    sets = prefine.draw_preferences(dataset.sums(dataset.costs), 10, 4, 3, seed=1)
    episodes = [*sets["preferred"], *sets["dispreferred"]]
    labelled = dataset.observations[dataset.rows(episodes)]
    states = ((dataset.observations - labelled.mean(0)) / (labelled.std(0) + 1e-6)).double()
    near = []
    for own in sets["dispreferred"]:
        distances = [
            torch.cdist(states[dataset.rows([own])], states[dataset.rows([e])]).min(1).values
            for e in episodes
            if e != own
        ]
        near += [*(torch.stack(distances).argmin(0) < 4)]
    assert data["near_share"] == pytest.approx(np.mean(near), abs=0.005)


def test_the_report_has_the_margins_before_and_after(reported):
    percentiles = metrics(reported)["data"]["margin_percentiles"]
    assert percentiles["percents"] == [5, 25, 50, 75, 95]
    assert {f"train/{pair}" for pair in prefine.PAIRS} <= set(percentiles["after"])
    for name, values in percentiles["after"].items():
        assert values == sorted(values) and percentiles["before"][name] == [0.0] * 5
    # The contrasts that the loss has are what training raises.
    assert percentiles["after"]["train/counterfactual_dispreferred"][2] > 0


def test_the_report_is_drawn_and_tensorboard_reads_its_events(reported):
    picture = read_png(reported / "report.png")
    assert picture.shape[0] > 500 and len(np.unique(picture.reshape(-1, 4), axis=0)) > 50
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(reported))
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert {"losses/pretrain/imitation", "losses/finetune/contrast_preferred"} <= names
    costs = [event.value for event in events.Scalars("eval/cost_mean")]
    content = metrics(reported)
    expected = [content[name]["cost_mean"] for name in ("pretrained", "finetuned")]
    assert costs == pytest.approx(expected)


def test_a_report_twice_gives_the_same(reported, tmp_path):
    shutil.copytree(reported, tmp_path / "again")
    assert run_all("report", tmp_path / "again").returncode == 0
    assert metrics(tmp_path / "again") == metrics(reported)
    assert len(list((tmp_path / "again").glob("events.out.*"))) == 1


def test_a_run_that_is_replaced_is_drawn_anew(reported, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(reported, folder)
    before = (folder / "report.png").read_bytes()
    flags = BALL_RUN.replace("--no-report", "--no-resume --finetune-updates 0")
    done = command(*flags.split(), "--run-dir", folder)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (folder / "report.png").read_bytes() != before
    assert not list(folder.glob("*.gif")) and "warning" not in done.stdout
    assert len(list(folder.glob("events.out.*"))) == 1
    assert metrics(folder)["data"]["divergence_bits"] is not None


def test_a_copy_without_run_all_names_it_and_the_way_on(ball_run, tmp_path):
    shutil.copy(HERE / "prefine.py", tmp_path / "alone.py")
    shutil.copytree(ball_run[0], tmp_path / "run")
    line = [sys.executable, str(tmp_path / "alone.py"), "--run-dir", str(tmp_path / "run")]
    for flags, code in (BALL_RUN, 0), (BALL_RUN.replace("--no-report", ""), 2):
        done = subprocess.run([*line, *flags.split()], capture_output=True, text=True)
        assert done.returncode == code
        assert ("run_all.sh" in done.stderr and "--no-report" in done.stderr) == (code == 2)


def test_a_video_of_the_policy_before_and_after(reported):
    from PIL import Image

    for name in "before", "after":
        with Image.open(reported / f"{name}.gif") as video:
            assert video.n_frames > 10 and video.size[0] > 100


def test_without_the_packages_that_draw_there_is_a_sentence_for_each(ball_run, tmp_path):
    folder, missing = tmp_path / "run", tmp_path / "missing"
    shutil.copytree(ball_run[0], folder)
    for name in "matplotlib", "tensorboard", "wandb":
        (missing / name).mkdir(parents=True)
        (missing / name / "__init__.py").write_text(f"raise ImportError('no {name}')")
    flags = BALL_RUN.replace("--no-report", "--track").split()
    path = os.environ | {"PYTHONPATH": str(missing)}
    done = command(*flags, "--run-dir", folder, env=path)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "fine-tuned" in done.stdout  # the run itself has ended well
    for name in "matplotlib", "tensorboard", "wandb":
        assert f"pip install {name}" in done.stdout + done.stderr
    assert not (folder / "report.png").exists() and not list(folder.glob("events.*"))
    assert "divergence_bits" in metrics(folder)["data"]  # what is measured needs no picture


def test_what_a_person_needs_to_label_episodes_is_written_once(ball_run, tmp_path):
    line = "--env OfflineBallCircle --dataset scripted --scripted-episodes 24 --run-dir label"
    done = command(*line.split(), "--export-episodes", 6, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "label"
    lines = (folder / "labels.csv").read_text().splitlines()
    assert lines[0] == "episode,label,length,return" and len(lines) == 7
    assert read_png(folder / "episodes.png").shape[0] > 200
    for number, reason in (6, "exists"), (25, "have 24 episodes"):
        again = command(*line.split(), "--export-episodes", number, cwd=tmp_path)
        assert again.returncode == 2 and reason in again.stderr and again.stderr.count("\n") == 1
        line = line.replace("label", "other")
    filled = [lines[0]]
    for i, row in enumerate(lines[1:]):
        filled.append(row.replace(",,", f",{prefine.LABELS[i % 2]},"))
    (folder / "labels.csv").write_text("\n".join(filled))
    found = prefine.read_preferences(folder / "labels.csv", 24)
    assert len(found["preferred"]) == len(found["dispreferred"]) == 3


def two_behaviours(path, episodes=24, steps=20):
    """Data of BallCircle's shapes: even episodes go right, odd ones left."""
    rng, n = np.random.default_rng(0), episodes * steps
    side = np.where(np.arange(n) // steps % 2 == 0, 0.3, -0.3)[:, None]
    arrays = {
        "observations": rng.normal(side, size=(n, 8)),
        "actions": rng.uniform(-0.6, 0.6, (n, 2)),
    }
    arrays["observations"][:, 3] = 1  # says nothing
    arrays["actions"] += side
    arrays |= {"rewards": rng.normal(size=n), "terminals": np.zeros(n)}
    return write_hdf5(path, arrays | {"timeouts": np.arange(1, n + 1) % steps == 0}), arrays


def checked(path, labels, data):
    """Episodes that ``run_all.sh check`` names, and what it says of each; the labels it leaves."""
    write_preferences(path, labels)
    done = run_all("check", path, "--env", BALL, "--dataset", data)
    assert done.returncode == 0, done.stderr
    named = {int(line.split()[1][:-1]): line for line in done.stdout.splitlines()[:-1]}
    left = prefine.read_preferences(path.with_suffix(".checked.csv"), 1000)
    return named, left


def test_labels_that_the_others_contradict_are_named_and_left_out(tmp_path):
    data, _ = two_behaviours(tmp_path / "data.hdf5")
    truth = {e: prefine.LABELS[e % 2] for e in range(24)}
    for wrong in [], [3, 4, 10, 17]:
        given = truth | {e: prefine.LABELS[1 - e % 2] for e in wrong}
        named, left = checked(tmp_path / "labels.csv", given.items(), data)
        assert sorted(named) == wrong
        for e in wrong:
            assert f"episode {e}: {given[e]}, and the other labels say {truth[e]}" in named[e]
        kept = {e: label for label, episodes in left.items() for e in episodes}
        assert kept == {e: label for e, label in given.items() if e not in wrong}


def test_few_labels_and_many_of_one_side_can_be_checked(tmp_path):
    data, _ = two_behaviours(tmp_path / "data.hdf5")
    for episodes in [0, 1], [1, 3, *range(0, 24, 2)]:
        labels = [(e, prefine.LABELS[e % 2]) for e in episodes]
        named, left = checked(tmp_path / "labels.csv", labels, data)
        assert not named and sorted(sum(left.values(), [])) == sorted(episodes)


def test_how_far_a_label_is_contradicted_is_what_a_fit_without_it_predicts(tmp_path):
    from scipy.stats import rankdata

    data, arrays = two_behaviours(tmp_path / "data.hdf5")
    labels = [(e, prefine.LABELS[e % 2 if e != 4 else 1]) for e in [2, 4, 1, 6, 7, 9, 0, 11, 13]]
    (line,) = checked(tmp_path / "labels.csv", labels, data)[0].values()
    sides = np.array([1 if label == "preferred" else -1 for _, label in labels])
    steps = np.concatenate([arrays["observations"], arrays["actions"]], 1, dtype=float)
    steps = steps.reshape(24, -1, steps.shape[1])[[e for e, _ in labels]]
    moments = np.concatenate([steps.std(1), steps.mean(1)], 1)
    n, (i,) = len(labels), [i for i, (e, _) in enumerate(labels) if e == 4]
    features = np.sqrt(3) * (2 * rankdata(moments, axis=0) - n - 1) / n  # of variance about 1
    features = np.c_[np.ones(n), features / np.sqrt(features.shape[1])]
    # Ridge regression in its primal form, on all but one; each side has the same total weight.
    others, weights = np.arange(n) != i, 1 / (1 + sides * sides.mean())
    x, w = features[others], weights[others, None]
    fit = np.linalg.solve(x.T @ (w * x) + np.eye(x.shape[1]), x.T @ (w[:, 0] * sides[others]))
    assert line.endswith(f"by {-sides[i] * (features[i] @ fit):.2f}")


def test_a_picture_of_what_is_no_run_gets_one_sentence(tmp_path):
    done = run_all("report", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert str(tmp_path) in done.stderr


def test_an_unknown_verb_of_run_all_gets_one_sentence():
    line = ["bash", str(HERE / "run_all.sh"), "nonsense"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "nonsense" in done.stderr and "demo" in done.stderr and done.stdout == ""


@pytest.mark.skipif(not (HERE / "README.md").exists(), reason="there is no README yet")
def test_every_flag_that_the_readme_names_exists(capfd):
    known = set(re.findall(r"--[a-z][a-z-]*", help_text(capfd))) | {"--osrl"}  # of the benchmark
    for line in (HERE / "README.md").read_text().splitlines():
        if not re.search(r"\b(pip|uv|git|pytest|docker|sbatch)\b", line):
            assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", line)) <= known, line


# -------------------------------------------------------------------------------- the speed figures
def seconds(work, *arguments):
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def median_ratio(first, second, repeats):
    """Median of the ratios of two durations (or per-update times), measured in turn."""
    return statistics.median(first() / second() for _ in range(repeats))


def bare_update(observations, outputs, batch, updates=300, compiled=False):
    """Seconds of a bare forward, backward and fused-Adam step of the default policy."""
    policy = prefine.GaussianPolicy([-1] * outputs, [1] * outputs, *np.ones((2, observations)))
    optimizer = torch.optim.Adam(policy.parameters(), fused=True)
    states = torch.randn(batch, observations)
    forward = torch.compile(policy) if compiled else policy

    def work(count):
        for _ in range(count):
            optimizer.zero_grad()
            mean, std = forward(states)
            (mean + std).square().mean().backward()
            optimizer.step()

    work(1)  # compiles
    return seconds(work, updates) / updates


def update_seconds(train, stage, updates=300):
    """Seconds of one update: what is prepared once, as by a run of no update, is taken off."""
    long, short = (flags(f"--{stage}-updates {n}") for n in (updates, 0))
    return (seconds(train, long) - seconds(train, short)) / updates


def benchmark_arrays(episodes):
    """CarButton1's shapes: 88 observations, half of them 0 as lidars are, 2 actions."""
    rng, rows = np.random.default_rng(0), 1000 * episodes
    observations = rng.integers(-500, 500, (rows, 88), np.int16).astype(np.float32) / 1000
    arrays = {"observations": np.maximum(observations, 0, out=observations)}
    arrays["actions"] = rng.uniform(-1, 1, (rows, 2)).astype(np.float32)
    arrays["rewards"] = rng.normal(size=rows).astype(np.float32)
    costs = np.repeat(np.arange(episodes) % 2, 1000) * (rng.uniform(size=rows) < 0.1)
    arrays |= {"costs": costs.astype(np.float32), "terminals": np.zeros(rows, bool)}
    return arrays | {"timeouts": np.arange(1, rows + 1) % 1000 == 0}


LOAD = """
import sys, time, h5py, numpy as np, prefine
env = prefine.import_simulators().make("OfflineCarButton1Gymnasium-v0")
keys = "observations actions rewards costs terminals timeouts".split()
def memory(key):
    return 1024 * int(open("/proc/self/status").read().split(key + ":")[1].split()[0])
def bare():
    with h5py.File(sys.argv[1]) as file:
        return {key: file[key][:] for key in keys}
def timed(work):
    start = time.perf_counter(); work(); return time.perf_counter() - start
open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
start = memory("VmRSS"); prefine.load_dataset(sys.argv[1], env); peak = memory("VmHWM") - start
size = sum(array.nbytes for array in bare().values())
ratios = [timed(lambda: prefine.load_dataset(sys.argv[1], env)) / timed(bare) for _ in range(3)]
print(np.median(ratios), peak / size)
"""


def bench(full=True):
    """Print the speed figures, ratios of two things measured in turn, each with its bar."""

    def show(name, value, bar=None):
        print(f"{name}: {value:.3f}" + (f" ({bar})" if bar else ""), flush=True)

    torch.set_num_threads(1)
    sizes, car = (266, 2656) if full else (266,), "OfflineCarButton1Gymnasium-v0"
    for episodes in sizes:
        tag = "" if episodes == sizes[-1] and full else "_at_10_percent"
        with tempfile.TemporaryDirectory() as folder:
            path = write_hdf5(Path(folder) / "data.hdf5", benchmark_arrays(episodes))
            line = [sys.executable, "-c", LOAD, str(path)]
            done = subprocess.run(line, capture_output=True, text=True, cwd=HERE, check=True)
        for name, value, bar in zip(("time", "memory"), done.stdout.split(), ("1.2", "1.3")):
            show(f"load_{name}_ratio{tag}", float(value), bar)
    arrays = benchmark_arrays(sizes[-1])
    large = prefine.make_dataset(**arrays)
    small = prefine.make_dataset(**{key: value[:10_000] for key, value in arrays.items()})
    policy = prefine.GaussianPolicy(*BOX, np.zeros(88), np.ones(88))
    pairs = {"preferred": [0, 1], "dispreferred": [2, 3]}

    def finetune_seconds(dataset):
        return update_seconds(lambda a: prefine.finetune(policy, dataset, pairs, a), "finetune")

    def pretrain_seconds():
        return update_seconds(lambda a: prefine.pretrain(small, BOX_SPACE, a), "pretrain")

    for name, work, bar in (
        ("pretrain", pretrain_seconds, "1.15"),
        ("finetune", lambda: finetune_seconds(small), "1.4"),
    ):
        show(f"{name}_update_ratio", median_ratio(work, lambda: bare_update(88, 2, 512), 9), bar)
    growth = median_ratio(lambda: finetune_seconds(large), lambda: finetune_seconds(small), 9)
    show("update_time_growth", growth, "1.1")
    speedups = []
    for _ in range(5):
        one = finetune_seconds(small)
        torch.set_num_threads(2)
        speedups.append(one / finetune_seconds(small))
        torch.set_num_threads(1)
    show("speedup_by_a_second_thread", statistics.median(speedups))
    try:
        compiled = functools.partial(bare_update, 88, 2, 512, compiled=True)
        show("speedup_by_torch_compile", median_ratio(lambda: bare_update(88, 2, 512), compiled, 5))
    except Exception as error:  # it needs a C++ compiler
        print(f"speedup_by_torch_compile: not measured ({type(error).__name__})", flush=True)

    actor = functools.partial(prefine.policy_actor, policy, False)
    for name, make_actor in ("evaluation", actor), ("collection", prefine.lidar_controller):
        jobs = [(make_actor, seed) for seed in range(24)]  # the start of the workers counts little

        def work(workers, jobs=jobs, name=name):
            return seconds(prefine.run_episodes, car, jobs, workers, name)

        ratios = [work(1) / work(2) for _ in range(3)]
        show(f"{name}_speedup", statistics.median(ratios), "1.8")
    act = actor(None, 0)
    state, shares = np.zeros(88, np.float32), []
    for seed in range(3):
        alone = seconds(lambda: [act(state) for _ in range(1000)])
        shares.append(alone / seconds(prefine.run_episode, car, actor, seed))
    show("policy_share_of_evaluation", statistics.median(shares), "0.1")
    with tempfile.TemporaryDirectory() as folder:
        line = f"--env {BALL} --dataset scripted --run-dir {folder}/run"
        where = os.environ | {"DSRL_DATASET_DIR": folder}
        done = command(*line.split(), env=where, check=True)
        spent = json.loads((Path(folder) / "run" / "metrics.json").read_text())["seconds"]
    show("demo_training_share", (spent["pretrain"] + spent["finetune"]) / sum(spent.values()))


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


def osrl(task=BALL, bc_updates=100_000, cpq_updates=2_000):
    """PREFINE's fine-tuning beside OSRL's BC-Safe and CPQ: seconds, return, cost. One thread.

    The settings are those of OSRL's examples/configs. Batches are drawn in one indexing, which is
    faster than its own loader; its evaluations while training are left out.
    """
    algorithms, updates = import_osrl(), 100_000  # updates: OSRL's default
    args = flags(f"--env {task} --dataset scripted")
    args.cost_limit = 10.0
    torch.set_num_threads(1)
    torch.manual_seed(0)
    env = prefine.import_simulators().make(args.env)
    data = prefine.load_dataset(prefine.find_dataset(args, env), env)
    costs = data.sums(data.costs)
    size = (env.observation_space.shape[0], env.action_space.shape[0], 1.0)
    steps = int((data.ends - data.starts).max())

    def play(name, spent, act):
        """One line of the table, with the results of 20 simulated episodes."""
        jobs = [(lambda env, seed: act, seed) for seed in range(1_000_000, 1_000_020)]
        runs = [prefine.run_episode(task, *job) for job in jobs]
        score, cost = (np.mean([run[key].sum() for run in runs]) for key in ("rewards", "costs"))
        print(f"| {name} | {spent} | {score:.0f} | {cost:.1f} |", flush=True)

    print("| method | seconds of training | return | cost |\n|---|---|---|---|")
    results = []
    spent = seconds(lambda: results.append(prefine.pretrain(data, BOX_SPACE, args)[0]))
    play("pre-training", f"{spent:.0f}", prefine.policy_actor(results[0], False, env, 0))
    chosen = prefine.draw_preferences(costs, 10, 40, 40, 0)
    spent = seconds(lambda: results.append(prefine.finetune(results[0], data, chosen, args)[0]))
    play("PREFINE's fine-tuning", f"{spent:.0f}", prefine.policy_actor(results[1], False, env, 0))

    arrays = dict(zip(("observations", "actions", "rewards", "costs"), data))
    done = torch.zeros(len(data.rewards))  # these tasks never terminate
    following = torch.cat([arrays["observations"][1:], arrays["observations"][-1:]])
    inner = torch.ones(len(done), dtype=torch.bool)
    inner[data.ends - 1] = False  # the last row of an episode has no next observation here
    inner = inner.nonzero()[:, 0]

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
    train(
        "OSRL BC-Safe",
        lambda i: trainer.train_one_step(arrays["observations"][i], arrays["actions"][i]),
        data.rows(np.flatnonzero(costs <= 10)),
        bc_updates,
        model.act,
    )
    shape = dict(a_hidden_sizes=[256, 256], c_hidden_sizes=[256, 256], vae_hidden_sizes=400)
    shape |= dict(sample_action_num=10, beta=0.5, num_q=2, num_qc=2, episode_len=steps)
    model = algorithms.CPQ(*size, **shape)
    rates = dict(actor_lr=1e-4, critic_lr=1e-3, alpha_lr=1e-4, vae_lr=1e-3)
    trainer = algorithms.CPQTrainer(model, env, reward_scale=0.1, **rates)

    def step(i):
        batch = [arrays[key][i] for key in ("actions", "rewards", "costs")]
        batch[1] = 0.1 * batch[1]
        trainer.train_one_step(arrays["observations"][i], following[i], *batch, done[i])

    train("OSRL CPQ", step, inner, cpq_updates, lambda state: model.act(state, True, True)[0])


if __name__ == "__main__" and sys.argv[1:2] == ["bench"]:
    osrl() if "--osrl" in sys.argv else bench(full="--quick" not in sys.argv)
