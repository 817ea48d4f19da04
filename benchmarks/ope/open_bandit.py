"""The Open Bandit data (Saito et al., 2021) as shipped in the wheel of `obp` 0.4.1: our estimators beside that package's own.

The package's imports are too old for today's libraries, so only the files with its estimators, its regression model and its policy are
loaded, from a temporary folder. Nothing of FinCoach depends on it.
"""

import importlib
import json
import sys
import tempfile
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
from sklearn.linear_model import LogisticRegression

from fincoach.recommend.ope import (
    Log,
    compare_policies,
    estimators,
    evaluate_policy,
    importance_weights,
    support,
    switch_threshold,
)

POSITIONS = 3


def package(folder):
    """Modules of the unpacked wheel, without running the packages' own __init__ files."""
    for name in ("obp", "obp.ope", "obp.policy"):
        module = types.ModuleType(name)
        module.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = module
    sys.modules["obp"].utils = importlib.import_module("obp.utils")
    return (importlib.import_module(f"obp.{m}") for m in ("ope.estimators", "ope.regression_model", "policy.contextfree"))


def logged(folder, policy, campaign):
    """Rows in time order: action, position, reward, propensity, user features as 0/1 columns."""
    rows = pl.read_csv(folder / f"obp/dataset/obd/{policy}/{campaign}/{campaign}.csv").sort("timestamp", maintain_order=True)
    features = rows.select(pl.col("^user_feature_.$")).to_dummies(drop_first=True).to_numpy().astype(float)
    return (rows["item_id"].to_numpy(), rows["position"].rank("dense").cast(pl.Int64).to_numpy() - 1, rows["click"].to_numpy().astype(float),
            rows["propensity_score"].to_numpy(), features)


def theirs(module, tau, reward, action, position, pscore, action_dist, model):
    """Their values by our names."""
    given = {"reward": reward, "action": action, "position": position, "pscore": pscore, "action_dist": action_dist}
    guess = {"estimated_rewards_by_reg_model": model}
    return {
        "ips": module.InverseProbabilityWeighting().estimate_policy_value(**given),
        "snips": module.SelfNormalizedInverseProbabilityWeighting().estimate_policy_value(**given),
        "direct_method": module.DirectMethod().estimate_policy_value(**given, **guess),
        "doubly_robust": module.DoublyRobust().estimate_policy_value(**given, **guess),
        "switch_dr": module.SwitchDoublyRobust(tau=tau).estimate_policy_value(**given, **guess),
    }


def compare(wheel: Path) -> dict:
    """Values side by side for random -> bts on all, and what becomes of bts -> random on women."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        zipfile.ZipFile(wheel).extractall(folder)
        sys.path.insert(0, str(folder))
        estimator, regression, policies = package(folder)
        action, position, reward, pscore, x = logged(folder, "random", "all")
        thompson = policies.BernoulliTS(n_actions=80, len_list=POSITIONS, is_zozotown_prior=True, campaign="all", random_state=12345)
        dist = thompson.compute_batch_action_dist(n_rounds=len(action), n_sim=100_000)
        fit = regression.RegressionModel(base_model=LogisticRegression(max_iter=1000, C=100), n_actions=80, len_list=POSITIONS)
        model = fit.fit_predict(context=x, action=action, reward=reward.astype(int), pscore=pscore, position=position, n_folds=3, random_state=12345)
        row = np.arange(len(action))
        policy, guess = dist[row, :, position], model[row, :, position]
        log = Log(action, reward, pscore, 80, predictions=guess)
        weights = importance_weights(action, pscore, policy)
        out = {"rows": len(action), "clicks": int(reward.sum()), "clicks_that_count": int((reward * (weights > 0)).sum())}
        for tau in (1.0, 5.0, 1e9):
            own = estimators(log, policy, switch_at=tau)
            peer = theirs(estimator, tau, reward, action, position, pscore, dist, model)
            out[f"switch at {tau:g}"] = {k: {"ours": own[k].value, "theirs": float(v), "relative": abs(own[k].value / float(v) - 1)} for k, v in peer.items()}
        out["threshold chosen"] = str(switch_threshold(weights, reward, action, policy, guess))
        s = support(log, policy)
        start = time.perf_counter()
        told = evaluate_policy(log, policy, "Thompson sampling on all")
        out["all, random to bts"] = {"effective": s.effective, "telling": s.telling, "largest_weight": s.largest_weight, "verdict": told.verdict, "says": repr(told), "seconds": round(time.perf_counter() - start, 2)}
        action, position, reward, pscore, _ = logged(folder, "bts", "women")
        n = int(action.max()) + 1
        even = np.full((len(action), n), 1 / n)
        told = evaluate_policy(Log(action, reward, pscore, n), even, "the random policy on women")
        out["women, bts to random"] = {"effective": told.support.effective, "largest_weight": told.support.largest_weight, "verdict": told.verdict, "says": repr(told),
                                       "ranked": compare_policies(Log(action, reward, pscore, n), {"random": even}).verdicts["random"]}
    print("open bandit", json.dumps(out, indent=1), flush=True)
    return out
