"""Whether a policy fits an environment: it takes the observations, and its actions are the environment's."""

from __future__ import annotations

import gymnasium as gym
import torch

from natgrad.errors import ArgumentError, UnsupportedError
from natgrad.rl.environments import Environments
from natgrad.rl.heads import Head, SquashedHead
from natgrad.rl.policy import Policy
from natgrad.rl.spaces import head_for


@torch.no_grad()
def check_policy(policy: Policy, environments: Environments) -> None:
    """Raises ArgumentError unless ``policy`` takes the environments' observations and decides between their actions."""
    space = environments.vector.single_action_space
    _check_head(policy.head, space, environments.name)
    parameter = next(policy.parameters())
    observations = torch.from_numpy(environments.observations).to(parameter)
    starts = torch.ones(environments.n, device=parameter.device)
    try:
        actions = policy.act(observations, memory=policy.start(environments.n), starts=starts)[0]
    except RuntimeError as error:
        raise does_not_fit("policy", environments, error) from error
    action = policy.head.to_environment(actions)[0]
    if bool(torch.isfinite(actions).all()) and not space.contains(action):
        raise _other_actions(policy.head, f" such as {action!r}", space, environments.name)


def does_not_fit(network: str, environments: Environments, error: RuntimeError) -> ArgumentError:
    """What to raise where a network does not take the observations."""
    return ArgumentError(
        f"The {network} does not take observations of {environments.name}, which have "
        f"{environments.observations.shape[1]} entries: {error}"
    )


def _check_head(head: Head, space: gym.Space, name: str) -> None:
    """A head of fewer or more choices may give actions that happen to be allowed."""
    try:
        expected = head_for(space, squashed=isinstance(head, SquashedHead))
    except UnsupportedError:
        return  # a head of the user's own for a space that natgrad has none for
    if type(head) is type(expected) and head.outputs != expected.outputs:
        raise _other_actions(head, "", space, name)


def _other_actions(head: Head, such: str, space: gym.Space, name: str) -> ArgumentError:
    return ArgumentError(
        f"{head} gives actions{such}, but those of {name} are {space}. Take the head that "
        "natgrad.rl.head_for(env.action_space) gives."
    )
