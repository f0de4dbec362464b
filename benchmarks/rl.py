"""TRPO beside sb3-contrib's: time per environment step, where ours goes, and returns under one protocol.

python benchmarks/rl.py speed                         # ratio per environment, and the shares of our time
python benchmarks/rl.py returns --seeds 5             # the results table of docs/reinforcement-learning.md
python benchmarks/rl.py returns --only Hopper-v5      # one environment of it
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import Action, Plan, Row, measure, row_ratio
from natgrad import rl
from natgrad.rl.presets import settings_for

SPEED = ("CartPole-v1", "Acrobot-v1", "Pendulum-v1", "Hopper-v5")
ENVIRONMENTS, HORIZON, EVALUATION = 8, 256, 20
# Environment, steps, algorithms, and the target that the median over seeds must reach (None: sb3-contrib's TRPO).
CLASSIC = (
    ("CartPole-v1", 100_000, ("trpo", "npg", "ppo", "acktr"), 500.0),
    ("Acrobot-v1", 100_000, ("trpo", "npg", "ppo", "acktr"), -85.0),
    ("Pendulum-v1", 100_000, ("trpo", "npg"), -180.0),
    ("Pendulum-v1", 200_000, ("ppo",), -180.0),
    ("MountainCarContinuous-v0", 100_000, ("trpo", "npg"), 90.0),
)
MUJOCO = ("Swimmer-v5", "Hopper-v5", "HalfCheetah-v5", "Walker2d-v5")
MUJOCO_STEPS = 200_000
# Settings that rl-baselines3-zoo publishes for sb3-contrib's TRPO (hyperparams/trpo.yml), on MuJoCo.
ZOO: dict[str, Any] = {
    "n_steps": 1024,
    "batch_size": 128,
    "gae_lambda": 0.95,
    "cg_max_steps": 25,
    "cg_damping": 0.1,
    "n_critic_updates": 20,
    "learning_rate": 1e-3,
    "sub_sampling_factor": 1,
}


def speed(environments: list[str], blocks: int) -> list[dict[str, Any]]:
    """One update with its rollout of both, interleaved: sb3-contrib's default settings, equal batch and network."""
    from sb3_contrib import TRPO
    from stable_baselines3.common.env_util import make_vec_env

    rows, batch = [], ENVIRONMENTS * HORIZON
    for name in environments:
        setup = rl.Setup(environments=ENVIRONMENTS, horizon=HORIZON)
        ours = rl.Training(name, rl.TRPO(), steps=10**9, setup=setup)
        theirs = TRPO("MlpPolicy", make_vec_env(name, n_envs=ENVIRONMENTS, seed=0), n_steps=HORIZON, device="cpu")
        theirs.learn(batch)
        actions = [
            Action("natgrad", ours.update),
            Action("sb3-contrib", lambda model=theirs: model.learn(batch, reset_num_timesteps=False)),
        ]
        samples = measure(actions, Plan(blocks=blocks, seconds=1e9, turn=0.0, clock="cpu"), bases=["sb3-contrib"])
        ratio = row_ratio(samples, Row("natgrad", {"natgrad": 1.0}), "sb3-contrib")
        own, other = (1e6 * samples.median(a.name) / batch for a in actions)
        parts = shares(ours, 5)
        print(
            f"{name:14s} natgrad {own:6.0f} µs/step, sb3-contrib {other:6.0f} µs/step, ratio {ratio.value:.2f} "
            f"[{ratio.low:.2f}, {ratio.high:.2f}]   of ours: "
            + ", ".join(f"{part} {100 * share:.0f} %" for part, share in parts.items()),
            flush=True,
        )
        rows.append({"environment": name, "natgrad_us": own, "sb3_us": other, "ratio": vars(ratio), "shares": parts})
    return rows


def shares(training: rl.Training, updates: int) -> dict[str, float]:
    """Which part of the time of an update goes where."""
    spent: dict[str, float] = defaultdict(float)

    def timed(owner: Any, method: str, part: str) -> None:
        original: Callable[..., Any] = getattr(owner, method)

        def wrapper(*args: Any, **options: Any) -> Any:
            start = time.process_time()
            try:
                return original(*args, **options)
            finally:
                spent[part] += time.process_time() - start

        setattr(owner, method, wrapper)

    learner: Any = training.learner
    timed(training.environments.vector, "step", "environments")
    timed(training.policy, "act", "acting")
    timed(training.collector, "samples", "values and advantages")
    timed(learner.optimizer, "step", "policy step")
    timed(learner.critic, "update", "critic")
    start = time.process_time()
    for _ in range(updates):
        training.update()
    total = time.process_time() - start
    found = {part: seconds / total for part, seconds in spent.items()}
    return found | {"rest": 1 - sum(found.values())}


def ours(environment: str, algorithm: str, steps: int, seed: int) -> tuple[float, float]:
    """Mean deterministic return of 20 held-out episodes, and seconds."""
    settings, setup = settings_for(algorithm, environment)
    start = time.perf_counter()
    training = rl.Training(environment, settings, steps=steps, setup=setup, seed=seed).run()
    seconds = time.perf_counter() - start
    return rl.evaluate(training.policy, environment, episodes=EVALUATION, seed=seed).mean, seconds


def theirs(environment: str, steps: int, seed: int) -> tuple[float, float]:
    """The same of sb3-contrib's TRPO with its published settings."""
    from sb3_contrib import TRPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import VecNormalize

    gamma = 0.9999 if environment.startswith("Swimmer") else 0.99
    options = ZOO | ({"target_kl": 0.04} if environment.startswith("HalfCheetah") else {})
    envs = VecNormalize(make_vec_env(environment, n_envs=2, seed=seed), gamma=gamma)
    start = time.perf_counter()
    model = TRPO("MlpPolicy", envs, gamma=gamma, seed=seed, device="cpu", **options).learn(steps)
    seconds = time.perf_counter() - start
    envs.training, envs.norm_reward = False, False
    held_out = VecNormalize(make_vec_env(environment, n_envs=1, seed=10_000 + seed), training=False, norm_reward=False)
    held_out.obs_rms = envs.obs_rms
    found, _ = evaluate_policy(model, held_out, n_eval_episodes=EVALUATION, deterministic=True)
    return float(found), seconds  # pyright: ignore[reportArgumentType]


def returns(seeds: int, only: list[str] | None, steps: int, out: Path) -> None:
    """Every environment and algorithm, with the median over seeds and the target."""
    found: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []

    def run(environment: str, label: str, steps: int, target: float | None, once: Callable[[int], Any]) -> None:
        results = [once(seed) for seed in range(seeds)]
        values, seconds = [r for r, _ in results], [s for _, s in results]
        row = {"environment": environment, "algorithm": label, "steps": steps, "returns": values, "seconds": seconds}
        found[:] = [f for f in found if (f["environment"], f["algorithm"], f["steps"]) != (environment, label, steps)]
        found.append(row | {"target": target})
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1))
        verdict = "" if target is None else ("  reached" if statistics.median(values) >= target else "  MISSED")
        print(
            f"{environment:26s} {label:18s} {steps:8d} steps  median {statistics.median(values):8.1f}  "
            f"of {', '.join(f'{v:.0f}' for v in values)}  {np.mean(seconds):5.0f} s a run{verdict}",
            flush=True,
        )

    for environment, budget, algorithms, target in CLASSIC:
        if only and environment not in only:
            continue
        for name in algorithms:
            run(environment, name, budget, target, lambda s, e=environment, n=name, b=budget: ours(e, n, b, s))
    for environment in MUJOCO:
        if only and environment not in only:
            continue
        run(environment, "sb3-contrib trpo", steps, None, lambda s, e=environment: theirs(e, steps, s))
        bar = statistics.median(found[-1]["returns"])
        run(environment, "trpo", steps, bar, lambda s, e=environment: ours(e, "trpo", steps, s))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "returns"])
    parser.add_argument("--only", nargs="+", help="environments")
    parser.add_argument("--blocks", type=int, default=12, help="updates of each that are timed")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=MUJOCO_STEPS, help="of the MuJoCo environments")
    parser.add_argument("--out", type=Path, default=Path("runs/rl-returns.json"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if arguments.what == "speed":
        rows = speed(arguments.only or list(SPEED), arguments.blocks)
        Path("runs").mkdir(exist_ok=True)
        Path("runs/rl-speed.json").write_text(json.dumps(rows, indent=1))
    else:
        returns(arguments.seeds, arguments.only, arguments.steps, arguments.out)


if __name__ == "__main__":
    main()
