"""Floating-point operations of a program, from its jaxpr.

Counted after dead code is gone and with every loop's trips, which the
compiler's own analysis leaves out. Matrix products and convolutions count two
for each multiply-add, and everything else nothing, as peaks are stated.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval

# Products of two tiles that one step of splash attention's grid computes:
# scores and values; scores, d weights and dQ; scores, dV, d weights and dK.
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


def count(fun: Callable, *args: Any, **kwargs: Any) -> float:
  """Operations of one call, over all devices.

  Args:
    fun: Of arrays, or of trees of them; may be jitted.
    *args: Arrays or shapes.
    **kwargs: The same.

  Raises:
    NotImplementedError: A loop whose trips are unknown, or a kernel that has no
      formula here.
  """
  return count_jaxpr(jax.make_jaxpr(fun)(*args, **kwargs))


def count_jaxpr(closed: Any, while_trips: tuple[int, ...] = ()) -> float:
  """Operations of a traced program, over all devices.

  Args:
    closed: As `jax.make_jaxpr` or `jitted.trace(...).jaxpr` gives it.
    while_trips: Of loops whose trips depend on values, from the outermost to
      the innermost; there must be no deeper ones.
  """
  return _count(_live(closed.jaxpr), while_trips)


def _live(jaxpr: core.Jaxpr) -> core.Jaxpr:
  used = [True] * len(jaxpr.outvars)
  return partial_eval.dce_jaxpr(jaxpr, used)[0]


def _count(jaxpr: core.Jaxpr, trips: tuple[int, ...]) -> float:
  return sum(_of_equation(equation, trips) for equation in jaxpr.eqns)


def _of_equation(equation, trips: tuple[int, ...]) -> float:
  params = equation.params
  match equation.primitive.name:
    case "dot_general":
      return _of_product(equation)
    case "conv_general_dilated":
      return _of_convolution(equation)
    case "scan":
      return params["length"] * _count(_inner(params["jaxpr"]), trips)
    case "while":
      if not trips:
        raise NotImplementedError("a loop whose trips depend on values")
      return trips[0] * (
        _count(_inner(params["body_jaxpr"]), trips[1:])
        + _count(_inner(params["cond_jaxpr"]), trips[1:])
      )
    case "cond":
      # The dearest branch, for a bound that holds whichever runs.
      return max(_count(_inner(b), trips) for b in params["branches"])
    case "shard_map":
      # Written for one shard of the axes that are cut by hand.
      mesh = params["mesh"]
      shards = math.prod(
        mesh.shape[name] for name in params["newly_manual_axes"]
      )
      return shards * _count(_inner(params["jaxpr"]), trips)
    case "pallas_call":
      return _of_kernel(equation)
  inner = core.jaxprs_in_params(params)
  return sum(_count(_inner(jaxpr), trips) for jaxpr in inner)


def _inner(jaxpr: Any) -> core.Jaxpr:
  """The program itself, closed over its constants or not."""
  return getattr(jaxpr, "jaxpr", jaxpr)


def _of_product(equation) -> float:
  (left, _), _ = equation.params["dimension_numbers"]
  summed = math.prod(equation.invars[0].aval.shape[i] for i in left)
  return 2.0 * math.prod(equation.outvars[0].aval.shape) * summed


def _of_convolution(equation) -> float:
  kernel = equation.invars[1].aval.shape
  out_axis = equation.params["dimension_numbers"].rhs_spec[0]
  per_output = math.prod(kernel) // kernel[out_axis]
  return 2.0 * math.prod(equation.outvars[0].aval.shape) * per_output


def _of_kernel(equation) -> float:
  """Of splash attention: every tile of its grid, those that it skips too."""
  name, grid = equation.params["name"], equation.params["grid_mapping"]
  kind = next((k for k in _SPLASH_PRODUCTS if k in name.split("_")), None)
  if "splash" not in name or kind is None:
    raise NotImplementedError(f"the kernel {name} has no formula in flops.py")
  q, k = equation.invars[grid.num_index_operands :][:2]
  block_q, block_kv = (
    block.block_shape[-2].block_size for block in grid.block_mappings[:2]
  )
  assert q.aval.shape[-1] == k.aval.shape[-1]
  tile = 2.0 * block_q * block_kv * q.aval.shape[-1]
  return math.prod(grid.grid) * _SPLASH_PRODUCTS[kind] * tile
