"""Records shared by the whole package.

Letters in shapes: B environments, W beams, K expansions, T tokens, D tokens per transition, V bins.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import chex


def check_ranges(
    settings: Any, *, positive: Sequence[str] = (), not_negative: Sequence[str] = (), shares: Sequence[str] = ()
) -> None:
    """Raise ValueError, naming the field, unless the fields of a record are in range.

    Each element of a tuple must be; `shares` are in [0, 1].
    """
    for name in (*positive, *not_negative, *shares):
        value = getattr(settings, name)
        elements = value if isinstance(value, tuple) else (value,)
        if name in positive and min(elements, default=1) <= 0:
            raise ValueError(f"{name}={value} must be positive.")
        if name in not_negative and min(elements, default=0) < 0:
            raise ValueError(f"{name}={value} must not be negative.")
        if name in shares and not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must be in [0, 1].")


@dataclasses.dataclass(frozen=True)
class TransitionSpec:
    """Sizes of one tokenised transition: observation, action, reward and value, in this order.

    Tokens are integers in [0, num_bins); the token `num_bins` means "the episode is over".
    """

    observation_dim: int  # N
    action_dim: int  # A
    num_bins: int  # V

    @property
    def transition_dim(self) -> int:
        """D = N + A + 2, the number of tokens per transition."""
        return self.observation_dim + self.action_dim + 2

    @property
    def stop_token(self) -> int:
        """The token that stands for "the episode is over"."""
        return self.num_bins


@chex.dataclass(frozen=True)
class Batch:
    """Training windows: `targets` are `inputs` shifted by one token."""

    inputs: chex.Array  # [B, T] int32
    targets: chex.Array  # [B, T] int32
    weights: chex.Array  # [B, T] float32, 1 where the target counts
    goal: chex.Array | None = None  # [B, N] int32, the observation in which the episode ends; for models with goals


@chex.dataclass(frozen=True)
class Transitions:
    """Single steps of any episodes, in the environment's units; actions are within their bounds, +-1 by default."""

    observations: chex.Array  # [B, N] float32
    actions: chex.Array  # [B, A] float32
    rewards: chex.Array  # [B] float32
    not_terminal: chex.Array  # [B] float32, 0 after a real terminal; 1 also where the episode was cut short
    next_observations: chex.Array  # [B, N] float32


@chex.dataclass(frozen=True)
class Context:
    """The past of each environment: its last `length` transitions, oldest first, at the start of a fixed buffer."""

    tokens: chex.Array  # [B, C, D] int32, rows from `length` on are ignored
    length: chex.Array  # [B] int32, in [0, C]


@chex.dataclass(frozen=True)
class Proposal:
    """K candidate transitions for each beam, as a model predicts them."""

    observation: chex.Array  # [B, W, N] float32, the state from which the beam's candidates act
    action: chex.Array  # [B, W, K, A] float32
    reward: chex.Array  # [B, W, K] float32, predicted reward of this step
    value: chex.Array  # [B, W, K] float32, predicted discounted return after this step
    log_prob: chex.Array  # [B, W, K] float32, log-probability of the sampled action under the model
    terminal: chex.Array  # [B, W, K] bool, 1 where the episode ends with this transition
    tokens: chex.Array  # [B, W, K, D] int32


@chex.dataclass(frozen=True)
class PlanOutput:
    """The best plan of each environment."""

    action: chex.Array  # [B, A] float32, first action of the best plan, or the mean over the best plans
    actions: chex.Array  # [B, H, A] float32
    tokens: chex.Array  # [B, H, D] int32, of the best plan
    scores: chex.Array  # [B, W] float32, of the final beams, descending
    beams: chex.Array | None = None  # [B, W, H, D] int32, tokens of all final beams in this order, if asked for


Params = Any  # nested dict of arrays
