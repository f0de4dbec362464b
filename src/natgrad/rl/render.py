"""Pictures of what a policy does: frames of one episode, a strip of some of them, and an animation."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import SyncVectorEnv

from natgrad.errors import ArgumentError, MissingExtraError, UnsupportedError
from natgrad.rl.environments import Environments
from natgrad.rl.evaluate import HELD_OUT
from natgrad.rl.fit import check_policy
from natgrad.rl.policy import Policy
from natgrad.rl.vector import EnvironmentLike, make

STRIP_FRAMES, STRIP_WIDTH = 6, 240
MOVIE_FRAMES, MOVIE_WIDTH = 150, 320
DRAWING = 20.0  # seconds; what would take longer by the time of one picture gets fewer pictures


@dataclass(frozen=True)
class Film:
    """Frames of one episode.

    Attributes:
        frames: [H, W, 3] of uint8 each; the first is of the state before any action, the last of the last state.
        times: the step of each frame, from 0.
        rate: steps per second at which the environment is meant to be seen.
        steps: of the episode, or the limit.
        episode_return: the sum of their rewards.
        ended: whether the episode ended within the limit.
    """

    frames: tuple[np.ndarray, ...]
    times: tuple[int, ...]
    rate: float
    steps: int
    episode_return: float
    ended: bool


@torch.no_grad()
def film(
    policy: Policy,
    environment: EnvironmentLike,
    *,
    seed: int = 0,
    limit: int = 1000,
    every: int = 1,
    import_code: bool = False,
) -> Film:
    """One episode of the deterministic policy: the first of :func:`natgrad.rl.evaluate` with the same seed.

    Args:
        policy: not changed.
        environment: an id, or a function that makes an environment with ``render_mode="rgb_array"``.
        seed: of the episode.
        limit: steps after which the film ends.
        every: steps between pictures, at least; slow renderers get fewer.
        import_code: see :func:`natgrad.rl.make`.

    Raises:
        UnsupportedError: the environment gives no pictures here; the message says why.
    """
    if not isinstance(environment, str) and not callable(environment):
        raise UnsupportedError("A VectorEnv gives no pictures; give an id, or a function that makes one environment.")
    options: dict[str, Any] = {}
    if isinstance(environment, str):
        _check_modes(environment, import_code)
        options["render_mode"] = "rgb_array"
    try:
        vector = make(environment, 1, import_code=import_code, **options)
        assert isinstance(vector, SyncVectorEnv)
        camera = _Camera(vector.envs[0], limit, every)
        vector.envs[0] = camera
        environments = Environments(vector, seed, HELD_OUT)
        check_policy(policy, environments)
    except _Blind as blind:
        raise _unsupported(blind) from blind
    except (ArgumentError, UnsupportedError):
        raise
    except Exception as error:  # whatever a renderer raises where it has no screen
        raise _unsupported(error.__cause__ or error) from error
    try:
        return _run(policy, environments, camera, limit)
    finally:
        environments.close()


def _run(policy: Policy, environments: Environments, camera: _Camera, limit: int) -> Film:
    device = next(policy.parameters()).device
    memory, total, steps = policy.start(1), 0.0, 0
    while steps < limit and not environments.finished:
        mask = environments.mask
        actions, _, memory = policy.act(
            torch.from_numpy(environments.observations).to(device),
            None if mask is None else torch.from_numpy(mask).to(device),
            memory=memory,
            starts=torch.from_numpy(environments.starts).to(device),
        )
        total += float(environments.step(policy.head.to_environment(actions)).rewards[0])
        steps += 1
    rate = float(camera.metadata.get("render_fps") or 30)
    return Film(tuple(camera.frames), tuple(camera.times), rate, steps, total, bool(environments.finished))


def _check_modes(environment: str, import_code: bool) -> None:
    """Raises UnsupportedError where the environment says itself that it draws no arrays."""
    vector = make(environment, 1, import_code=import_code)
    modes = vector.metadata.get("render_modes") or []
    vector.close()
    if "rgb_array" not in modes:
        raise _unsupported(_Blind(f"it renders to {', '.join(map(str, modes)) or 'nothing'}, not to rgb_array"))


class _Blind(Exception):
    """The environment rendered nothing that is a picture."""


class _Camera(gym.Wrapper):
    """Takes pictures in the first episode: of its first state, of every ``every``-th, and of its last.

    ``every`` doubles when there are many, so that long episodes need no more memory than short ones.
    """

    def __init__(self, env: gym.Env, limit: int, every: int) -> None:
        if env.render_mode != "rgb_array":
            raise _Blind(f"its render_mode is {env.render_mode!r}, not 'rgb_array'")
        super().__init__(env)
        self.frames: list[np.ndarray] = []
        self.times: list[int] = []
        self.taken, self.limit, self.every, self.done = 0, limit, every, False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        result = super().reset(seed=seed, options=options)
        if not self.frames:
            self._keep()
        return result

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        result = super().step(action)
        if not self.done:
            self.taken += 1
            self.done = result[2] or result[3] or self.taken == self.limit
            if self.done or self.taken % self.every == 0:
                self._keep()
        return result

    def _keep(self) -> None:
        start = time.perf_counter()
        self.frames.append(self._shot())
        self.times.append(self.taken)
        if len(self.frames) == 2:  # the first also sets the renderer up
            self.every = max(self.every, math.ceil(self.limit * (time.perf_counter() - start) / DRAWING))
        if len(self.frames) > 2 * MOVIE_FRAMES and not self.done:
            self.frames, self.times, self.every = self.frames[::2], self.times[::2], 2 * self.every

    def _shot(self) -> np.ndarray:
        frame: Any = self.env.render()
        picture = np.asarray(frame)
        if picture.ndim != 3 or picture.shape[-1] not in (3, 4) or not np.issubdtype(picture.dtype, np.number):
            raise _Blind(f"it rendered a {type(frame).__name__} of shape {picture.shape}, not a picture")
        return np.array(picture[..., :3], dtype=np.uint8)


def _unsupported(error: BaseException) -> UnsupportedError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = lines[0] if isinstance(error, _Blind) else f"{type(error).__name__}: {lines[0]}"
    remedy = ""
    if "opengl" in str(error).lower() or "mujoco" in type(error).__module__:
        remedy = " Without a screen MuJoCo needs another OpenGL: try MUJOCO_GL=egl or MUJOCO_GL=osmesa."
    return UnsupportedError(f"The environment gives no pictures here ({reason}).{remedy}")


def save_strip(film: Film, path: str | os.PathLike[str]) -> Path:
    """Write frames from first to last, side by side, each with its step, as a PNG; returns the path."""
    image, draw, font = _pillow()
    chosen = np.unique(np.linspace(0, len(film.frames) - 1, STRIP_FRAMES).round().astype(int))
    pictures = [_scaled(image.fromarray(film.frames[k]), STRIP_WIDTH) for k in chosen]
    gap, (width, height) = 6, pictures[0].size
    strip = image.new("RGBA", (len(pictures) * (width + gap) - gap, height), (0, 0, 0, 0))
    size = max(14, height // 10)
    face = font.load_default(size)
    for place, (k, picture) in enumerate(zip(chosen, pictures, strict=True)):
        brush, words = draw.Draw(picture), f"step {film.times[k]}"
        left, top, right, bottom = brush.textbbox((0, 0), words, font=face)
        # White on a dark plate: to be read on any picture, on a light page and on a dark one.
        brush.rectangle((0, 0, right - left + size, bottom - top + size * 0.8), fill=(20, 24, 30))
        brush.text((size / 2 - left, size * 0.4 - top), words, fill=(255, 255, 255), font=face)
        brush.rectangle((0, 0, width - 1, height - 1), outline=(128, 134, 142))  # frames are often white, as pages are
        strip.paste(picture, (place * (width + gap), 0))
    target = Path(path)
    strip.save(target, format="PNG", optimize=True)
    return target


def save_animation(film: Film, path: str | os.PathLike[str]) -> Path:
    """Write the frames as an animation that repeats, WebP or GIF by the path's ending; returns the path.

    At most about 150 frames are shown, in the time that the episode is meant to take.
    """
    image, _, _ = _pillow()
    target = Path(path)
    if target.suffix.lower() not in (".webp", ".gif"):
        raise ArgumentError(f"An animation is a .webp or a .gif, but the path is {str(path)!r}.")
    stride = max(1, -(-len(film.frames) // MOVIE_FRAMES))
    chosen = sorted({*range(0, len(film.frames), stride), len(film.frames) - 1})
    pictures = [_scaled(image.fromarray(film.frames[k]), MOVIE_WIDTH) for k in chosen]
    shown = np.diff([film.times[k] for k in chosen]) * 1000 / film.rate
    durations = [*(max(20, round(float(d))) for d in shown), 1000]  # players slow down what is under 20 ms
    first, rest = pictures[0], pictures[1:]
    options: dict[str, Any] = {"quality": 70, "method": 3} if target.suffix.lower() == ".webp" else {"optimize": True}
    first.save(target, save_all=True, append_images=rest, duration=durations[: len(pictures)], loop=0, **options)
    return target


def _scaled(picture: Any, width: int) -> Any:
    if picture.width <= width:
        return picture
    return picture.resize((width, round(picture.height * width / picture.width)), 1)  # Lanczos


def _pillow() -> tuple[Any, Any, Any]:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise MissingExtraError("Pictures need Pillow. Install the extra: pip install 'natgrad[report]'.") from error
    return Image, ImageDraw, ImageFont
