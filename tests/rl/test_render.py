"""Films of a policy: the evaluation's own episode, with first and last state, and a reason where there is none."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from PIL import Image

from natgrad import rl
from natgrad.errors import ArgumentError, UnsupportedError
from natgrad.rl.render import MOVIE_FRAMES, film, save_animation, save_strip


class Counter(gym.Env):
    """An episode of ``length`` steps whose picture is the number of the step."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, length: int = 7, render_mode: str | None = "rgb_array") -> None:
        self.length, self.render_mode = length, render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.taken = 0
        return self.np_random.uniform(-1, 1, 1).astype(np.float32), {}

    def step(self, action):
        self.taken += 1
        return np.zeros(1, np.float32), 1.0, self.taken == self.length, False, {}

    def render(self):
        return np.full((40, 60, 3), self.taken % 256, np.uint8)


def policy_for(environment) -> rl.Policy:
    vector = rl.make(environment)
    made, _ = rl.build(vector.single_observation_space.shape[0], rl.head_for(vector.single_action_space))  # type: ignore
    vector.close()
    return made


@pytest.mark.parametrize(("every", "times"), [(1, [0, 1, 2, 3, 4, 5, 6, 7]), (3, [0, 3, 6, 7])])
def test_frames_are_of_the_steps_they_are_said_to_be_of(every, times):
    found = film(policy_for(Counter), Counter, every=every)
    assert list(found.times) == times == [int(frame[0, 0, 0]) for frame in found.frames]
    assert found.steps == 7 and found.episode_return == 7 and found.ended and found.rate == 10
    cut = film(policy_for(Counter), Counter, every=every, limit=5)
    assert cut.times[-1] == 5 and not cut.ended


def test_the_film_is_of_the_first_episode_of_the_evaluation():
    policy = policy_for("CartPole-v1")
    expected = rl.evaluate(policy, "CartPole-v1", episodes=1, seed=3)
    found = film(policy, "CartPole-v1", seed=3)
    assert (found.episode_return,) == expected.returns and (found.steps,) == expected.lengths


def test_long_episodes_need_no_more_memory():
    found = film(policy_for(Counter), lambda: Counter(5000), limit=3000)
    assert len(found.frames) <= 2 * MOVIE_FRAMES + 1
    assert found.times[0] == 0 and found.times[-1] == 3000 and list(found.times) == sorted(found.times)
    assert [t % 256 for t in found.times] == [int(frame[0, 0, 0]) for frame in found.frames]


@pytest.mark.parametrize("ending", ["webp", "gif"])
def test_files(tmp_path, ending):
    found = film(policy_for("CartPole-v1"), "CartPole-v1")
    with Image.open(save_strip(found, tmp_path / "strip.png")) as strip:
        assert strip.width == 6 * 240 + 5 * 6 and strip.height == 160
    with Image.open(save_animation(found, tmp_path / f"film.{ending}")) as movie:
        assert movie.n_frames > 2 and movie.width == 320  # type: ignore[attr-defined]
    with pytest.raises(ArgumentError, match="webp"):
        save_animation(found, tmp_path / "film.mp4")


def test_environments_without_pictures_say_why(monkeypatch):
    policy = policy_for(Counter)
    with pytest.raises(UnsupportedError, match="render_mode is None"):
        film(policy, lambda: Counter(render_mode=None))
    monkeypatch.setattr(Counter, "render", lambda self: "a drawing")
    with pytest.raises(UnsupportedError, match="not a picture"):
        film(policy, Counter)

    def broken(self):
        raise RuntimeError("no OpenGL here\nand a second line")

    monkeypatch.setattr(Counter, "render", broken)
    with pytest.raises(UnsupportedError, match=r"RuntimeError: no OpenGL here\).*MUJOCO_GL"):
        film(policy, Counter)
    with pytest.raises(UnsupportedError, match="VectorEnv"):
        film(policy, rl.make(Counter))
