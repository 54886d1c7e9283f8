"""Compiled programs: how many, how long it took, ahead of time, and kept."""

import os
import pathlib
from typing import Any

import jax
from absl import logging
from jax.sharding import NamedSharding

_EVENT = "/jax/core/compile/backend_compile_duration"


def enable_persistent_cache(folder: str) -> None:
  """Has compiled programs outlive the process, as the settings want it.

  Args:
    folder: "" for nowhere. `$JAX_COMPILATION_CACHE_DIR` has the last word.
  """
  if not folder or "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  path = str(pathlib.Path(folder).expanduser())
  logging.info("Compiled programs are kept in %s", path)
  jax.config.update("jax_compilation_cache_dir", path)


class CompileCounter:
  """Counts this process's compilations from its making on."""

  def __init__(self):
    self._count, self._seconds = 0, 0.0
    jax.monitoring.register_event_duration_secs_listener(self._listen)

  def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
    if event == _EVENT:
      self._count += 1
      self._seconds += duration_secs

  def scalars(self) -> dict[str, float]:
    """By the names of `metrics`, since the last call."""
    scalars = {
      "perf/compilations": self._count,
      "perf/compile_seconds": self._seconds,
    }
    self._count, self._seconds = 0, 0.0
    return scalars


class AotJit:
  """A jitted function whose programs may be made before they are called for.

  What was not prepared is compiled when it is first called, as ever.
  """

  def __init__(self, jitted: Any):
    """Wraps the result of `jax.jit`, to be called by position alone."""
    self._jitted, self._compiled = jitted, {}

  def trace(self, *args: Any) -> Any:
    """The program of such arguments, not yet compiled."""
    return self._jitted.trace(*args)

  def prepare(self, *args: Any) -> Any:
    """Compiles for arguments given as shapes with their places.

    Args:
      *args: Trees of `jax.ShapeDtypeStruct`; a leaf without sharding stands
        for an array that nobody has placed.

    Returns:
      The result, as such shapes.
    """
    key = _signature(args)
    if key not in self._compiled:
      self._compiled[key] = self._jitted.lower(*args).compile()
    compiled = self._compiled[key]
    return jax.tree.map(
      lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
      compiled.out_info,
      compiled.output_shardings,
    )

  def __call__(self, *args: Any) -> Any:
    """The function's result."""
    compiled = self._compiled.get(_signature(args)) if self._compiled else None
    return (compiled or self._jitted)(*args)


def _signature(args: Any) -> Any:
  """What decides which program a call runs."""
  leaves, structure = jax.tree.flatten(args)
  return structure, tuple((x.shape, x.dtype, _place(x)) for x in leaves)


def _place(x: Any) -> Any:
  """Where an array lies, in one form; None where nobody has placed it."""
  if isinstance(x, jax.Array) and not x.committed:
    return None
  place = x.sharding
  if not isinstance(place, NamedSharding):
    return place
  # JAX writes axes that are not cut, or cut by one, now so, now so.
  spec = []
  for axes in place.spec:
    names = axes if isinstance(axes, tuple) else (axes,)
    spec.append(tuple(x for x in names if x and place.mesh.shape[x] > 1))
  while spec and not spec[-1]:
    spec.pop()
  return place.mesh, tuple(spec), place.memory_kind
