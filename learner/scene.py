"""The scene around a robot, as it was really seen and as the robot's own motion changes it (**ours**).

Goals and obstacles do not move. Where an observation tells where they are, imagination starts from there and
predicts only the robot: its sensors, and by how much it moves and turns in its own frame,

    (b', d, a) = f(b, action),    o' = R(a)^T (o - d)    for every object o.

f is deterministic and reads nothing but the robot's own sensors b, as the equations of motion do: errors grow
far more slowly than those of sampled latents. What a Goal task pays follows from the same positions:

    r = per_metre (|g| - |g'|) + bonus [|g'| <= radius].
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from common.config import WorldModelConfig
from common.types import VECTOR, Batch, EnvSpec, SceneSpec
from learner.codec import Obs
from learner.distributions import Bernoulli
from learner.geometry import distance, heading_of, opposite, rotate, within
from learner.layers import Head
from learner.layout import Layout, body_of, layout_of
from learner.rssm import Latent

_MOTION_UNIT = 0.1  # m and rad: what a robot moves and turns in an agent step, about
_LAYERS = 2
_MOST_ERROR = 10.0  # a collision is not in the sensors: larger errors pull no harder than this one


class Scene(NamedTuple):
    """What surrounds the robot, in its own frame (x ahead, y left; m)."""

    body: Float[Array, "*n b"]  # symlog of its own sensors
    goal: Float[Array, "*n 2"]
    obstacles: Float[Array, "*n objects 2"]  # whatever costs: hazards, then vases
    next_goal: Float[Array, "*n 2"]  # where the goal after this one will appear, as imagined
    reward: Float[Array, "*n"]  # for arriving here; 0 where imagination starts


def seen(layout: Layout, vector: Float[Array, "*n O"]) -> Scene:
    """The scene of an observation; the next goal is taken to lie straight ahead, see `imagine_next_goal`."""
    goal = layout.goal_of(vector)
    ahead = jnp.zeros_like(goal).at[..., 0].set(layout.task.extent)
    return Scene(
        body_of(layout, vector), goal, layout.obstacles_of(vector), ahead, jnp.zeros(goal.shape[:-1])
    )


def imagine_next_goal(scene: Scene, task: SceneSpec, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Scene:
    """Scenes of batch `shape` whose next goals lie all around, at 0.4 to 1.6 times half the arena's width."""
    key_angle, key_distance = jax.random.split(key)
    angle = jax.random.uniform(key_angle, shape, maxval=2 * jnp.pi)
    far = task.extent * jax.random.uniform(key_distance, shape, minval=0.4, maxval=1.6)
    return scene._replace(next_goal=far[..., None] * heading_of(angle))


class Body(eqx.Module):
    """f above, a residual network, and the motion of scenes."""

    net: Head
    layout: Layout = eqx.field(static=True)

    def __init__(self, key: PRNGKeyArray, spec: EnvSpec, cfg: WorldModelConfig):
        self.layout = layout_of(spec)
        sensors = sum(stop - start for start, stop in self.layout.sensors)
        # The constant beside the inputs keeps their size through the first LayerNorm.
        self.net = Head(key, sensors + spec.action_size + 1, cfg.body_units, _LAYERS, sensors + 3)

    def __call__(
        self, body: Float[Array, "*n b"], action: Float[Array, "*n A"]
    ) -> tuple[Float[Array, "*n b"], Float[Array, "*n 3"]]:
        """Next sensors (symlog), and motion: displacement (0.1 m, in the frame before) and turn (0.1 rad)."""
        # As the RSSM and the environment do, an action outside [-1, 1] is taken for the nearest inside.
        action = action / jnp.maximum(1.0, jnp.abs(jax.lax.stop_gradient(action)))
        out = self.net(jnp.concatenate([body, action, jnp.ones_like(body[..., :1])], -1))
        return body + out[..., :-3], out[..., -3:]

    def move(self, scene: Scene, action: Float[Array, "*n A"]) -> Scene:
        """The scene after one agent step; a goal that is reached makes way for the next one."""
        body, motion = self(scene.body, action)
        displacement, turn = _MOTION_UNIT * motion[..., :2], heading_of(_MOTION_UNIT * motion[..., 2])

        def moved(objects: Array, displacement: Array, turn: Array) -> Array:
            return rotate(objects - displacement, opposite(turn))

        task = self.layout.task
        goal = moved(scene.goal, displacement, turn)
        reached = within(goal, task.radius)
        reward = task.per_metre * (distance(scene.goal) - distance(goal)) + task.bonus * reached
        goal = jnp.where((jax.lax.stop_gradient(reached) > 0)[..., None], scene.next_goal, goal)
        obstacles = moved(scene.obstacles, displacement[..., None, :], turn[..., None, :])
        return Scene(body, goal, obstacles, scene.next_goal, reward)

    def loss(self, batch: Batch) -> Float[Array, "B T-1"]:
        """Squared errors of sensors and motion in windows [B, T], predicted from their first step on.

        Predictions start anew with every episode. Errors above 10 units pull no harder than 10 (Huber).
        """
        vector, first = batch[VECTOR], batch["is_first"]
        body = body_of(self.layout, vector)
        displacement, angle = self.layout.motion(vector)
        motion = jnp.concatenate([displacement, angle[..., None]], -1) / _MOTION_UNIT

        def step(predicted: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
            true, starts, action = inputs
            body, motion = self(jnp.where(starts[:, None], true, predicted), action)
            return body, (body, motion)

        inputs = (body[:, :-1], first[:, :-1], batch["action"][:, :-1])
        _, found = jax.lax.scan(step, body[:, 0], jax.tree.map(lambda x: x.swapaxes(0, 1), inputs))
        bodies, motions = (x.swapaxes(0, 1) for x in found)
        error = _huber(bodies - body[:, 1:]).sum(-1) + _huber(motions - motion).sum(-1)
        return jnp.where(first[:, 1:], 0.0, error)


class Observed(NamedTuple):
    """What filtering a batch gives where there is no latent."""

    latents: Latent  # [B, T, 0]


class SceneModel(eqx.Module):
    """A world model without a latent state: the scene is all it knows, and the robot's motion all it learns.

    The interface of `WorldModel`, as far as behaviour is concerned, with latents of size zero. Episodes end
    by their time limit alone, as in all tasks that observe a goal.
    """

    obs_keys: ClassVar = (VECTOR,)
    body: Body

    def __init__(self, key: PRNGKeyArray, spec: EnvSpec, cfg: WorldModelConfig):
        self.body = Body(key, spec, cfg)

    def initial(self, *batch: int) -> Latent:
        return Latent(jnp.zeros((*batch, 0)), jnp.zeros((*batch, 0, 0)))

    def noise(self, key: PRNGKeyArray, *batch: int) -> Float[Array, "*batch 0"]:
        return jnp.zeros((*batch, 0))

    def filter(
        self, latent: Latent, action: Array, is_first: Array, obs: Obs, uniform: Array | None
    ) -> Latent:
        return latent

    def imagine(self, latent: Latent, action: Array, uniform: Array | None) -> Latent:
        return latent

    def cont(self, latent: Latent) -> Bernoulli:
        """Certain to go on."""
        return Bernoulli(jnp.full(latent.deter.shape[:-1], jnp.inf))

    def loss(self, batch: Batch, key: PRNGKeyArray) -> tuple[Array, tuple[Observed, dict[str, Array]]]:
        """As `WorldModel.loss`: the mean error of the motion."""
        loss = self.body.loss(batch).mean()
        return loss, (Observed(self.initial(*batch["is_first"].shape)), {"loss/motion": loss})


def _huber(error: Array) -> Array:
    size = jnp.minimum(jnp.abs(error), _MOST_ERROR)
    return size * (2 * jnp.abs(error) - size)
