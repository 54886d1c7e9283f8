"""Compiled programs: kept on disk, counted, and compiled ahead of time."""

import os
from collections.abc import Callable
from typing import Any

import jax
from absl import logging
from jax.sharding import NamedSharding

from data_pipelines.storage import objects, paths
from grpo_tpu.distributed import activity

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def enable_persistent_cache(folder: str) -> None:
  """Has JAX keep compiled programs in a folder, unless it is "".

  The environment variable JAX_COMPILATION_CACHE_DIR takes precedence. A bucket
  that does not answer costs the run its cache, and no more.

  Raises:
    SettingError: The bucket does not exist, or may not be read.
  """
  if not folder or "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  path = str(paths.to_path("compilation_cache_dir", folder))
  if paths.is_remote(path):
    try:  # JAX would try for many minutes.
      objects.list_objects(path, what="compilation_cache_dir")
    except OSError as error:
      logging.warning("No compilation cache: %s", error)
      return
  else:  # On a disk a small program is read faster than it is compiled.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  logging.info("Compilation cache: %s", path)
  jax.config.update("jax_compilation_cache_dir", path)


def on_compile(callback: Callable[[float], None]) -> None:
  """Calls back after each compilation of this process, with its seconds."""

  def listen(event: str, duration_secs: float, **_: str | int) -> None:
    if event == _COMPILE_EVENT:
      callback(duration_secs)

  jax.monitoring.register_event_duration_secs_listener(listen)


def describe_folder() -> str:
  """Where compiled programs are kept, for a log."""
  folder = jax.config.jax_compilation_cache_dir
  return f"kept in {folder}" if folder else "not kept for the next start"


class CompileCounter:
  """Counts the compilations of this process from now on."""

  def __init__(self):
    self._seconds: list[float] = []
    on_compile(self._seconds.append)

  def scalars(self) -> dict[str, float]:
    """Metrics of the compilations since the last call."""
    seconds = self._seconds.copy()
    del self._seconds[: len(seconds)]
    return {
      "perf/compilations": len(seconds),
      "perf/compile_seconds": sum(seconds, 0.0),
    }


class AotJit:
  """A jitted function that can be compiled ahead of its first call.

  A call with other shapes or shardings compiles as usual.
  """

  def __init__(self, jitted: Any):
    """Wraps the result of `jax.jit`; calls take positional arguments only."""
    self._jitted, self._compiled = jitted, {}
    self._is_called = False

  def trace(self, *args: Any) -> Any:
    """Traces the function for these arguments, without compiling it."""
    return self._jitted.trace(*args)

  def prepare(self, *args: Any) -> Any:
    """Compiles the function for arguments of these shapes and shardings.

    Args:
      *args: Trees of `jax.ShapeDtypeStruct`; a leaf without sharding stands
        for an array that is not committed to any device.

    Returns:
      The result, as a tree of `jax.ShapeDtypeStruct`.
    """
    key = _signature(args)
    if key not in self._compiled:
      self._compiled[key] = self._jitted.lower(*args).compile()
    activity.advance()
    compiled = self._compiled[key]
    return jax.tree.map(
      lambda x, out: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=out),
      compiled.out_info,
      compiled.output_shardings,
    )

  def __call__(self, *args: Any) -> Any:
    """Calls the function."""
    compiled = self._compiled.get(_signature(args)) if self._compiled else None
    if compiled or self._is_called:
      return (compiled or self._jitted)(*args)
    self._is_called = True
    with activity.doing(f"compiling {self._jitted.__name__}"):
      return self._jitted(*args)


def _signature(args: Any) -> Any:
  """A hashable key for the program that a call with these arguments needs."""
  leaves, structure = jax.tree.flatten(args)
  return structure, tuple((x.shape, x.dtype, _sharding_key(x)) for x in leaves)


def _sharding_key(x: Any) -> Any:
  """The sharding in one canonical form; None for an uncommitted array."""
  if isinstance(x, jax.Array) and not x.committed:
    return None
  sharding = x.sharding
  if not isinstance(sharding, NamedSharding):
    return sharding
  # JAX writes an axis that is not split, or split by 1, in several ways.
  spec = []
  for axes in sharding.spec:
    names = axes if isinstance(axes, tuple) else (axes,)
    spec.append(tuple(x for x in names if x and sharding.mesh.shape[x] > 1))
  while spec and not spec[-1]:
    spec.pop()
  return sharding.mesh, tuple(spec), sharding.memory_kind
