"""Rewards that networks compute on the mesh: reward models and judges."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Array, Bool, Int

from data_pipelines import pipeline


class Completed(NamedTuple):
  """Completions of a batch of prompts, `C` for each."""

  ids: Int[Array, "B C T"]  # On the mesh, padded on the right.
  # On the mesh, True on tokens, the stop token included.
  mask: Bool[Array, "B C T"]
  texts: Sequence[Sequence[str]]  # Those of this process's prompts.


# The scores of this process's completions by component, float32 [rows, C]; NaN
# where a completion has none.
type Values = Mapping[str, np.ndarray]


class NetworkReward(Protocol):
  """Networks that score completions; names are those of the components."""

  names: Sequence[str]

  def start(
    self, prompts: pipeline.Batch, completed: Completed
  ) -> Callable[[], Values]:
    """Starts the devices; the result waits for them. All processes call it."""
    ...
