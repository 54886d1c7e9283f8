"""Floating-point operations of a program, counted from its jaxpr.

Dead code is removed first, and every loop counts with all of its trips, which
the compiler's own analysis leaves out. A multiply-add in a matrix product or a
convolution counts as two, as in the peaks of chips; nothing else counts.
"""

import math
from typing import Any

from jax.extend import core
from jax.interpreters import partial_eval

# Tile products in one step of splash attention's grid: scores and values;
# scores, d weights and dQ; scores, dV, d weights and dK.
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


def count_jaxpr(closed: Any, while_trips: tuple[int, ...] = ()) -> float:
  """Operations of a traced program, over all devices.

  `while_trips` are those of the loops that depend on values, one number for
  each level of nesting, the outermost first.

  Raises:
    NotImplementedError: The program has a loop with unknown trips, or a kernel
      without a formula here.
  """
  used = [True] * len(closed.jaxpr.outvars)
  live, _ = partial_eval.dce_jaxpr(closed.jaxpr, used)
  return _count(live, while_trips)


def _count(jaxpr: Any, trips: tuple[int, ...]) -> float:
  """Operations of a jaxpr, closed or not."""
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  return sum(_count_equation(equation, trips) for equation in jaxpr.eqns)


def _count_equation(equation, trips: tuple[int, ...]) -> float:
  params = equation.params
  match equation.primitive.name:
    case "dot_general":
      return _count_product(equation)
    case "conv_general_dilated":
      return _count_convolution(equation)
    case "scan":
      return params["length"] * _count(params["jaxpr"], trips)
    case "while":
      if not trips:
        raise NotImplementedError("a loop whose trips depend on values")
      return trips[0] * (
        _count(params["body_jaxpr"], trips[1:])
        + _count(params["cond_jaxpr"], trips[1:])
      )
    case "cond":
      # The costliest branch, so that the bound holds for each.
      return max(_count(branch, trips) for branch in params["branches"])
    case "shard_map":
      # The jaxpr is that of one shard of the manual axes.
      mesh = params["mesh"]
      shards = math.prod(
        mesh.shape[name] for name in params["newly_manual_axes"]
      )
      return shards * _count(params["jaxpr"], trips)
    case "pallas_call":
      return _count_splash(equation)
  return sum(_count(x, trips) for x in core.jaxprs_in_params(params))


def _count_product(equation) -> float:
  (left, _), _ = equation.params["dimension_numbers"]
  summed = math.prod(equation.invars[0].aval.shape[i] for i in left)
  return 2.0 * math.prod(equation.outvars[0].aval.shape) * summed


def _count_convolution(equation) -> float:
  kernel = equation.invars[1].aval.shape
  out_axis = equation.params["dimension_numbers"].rhs_spec[0]
  per_output = math.prod(kernel) // kernel[out_axis]
  return 2.0 * math.prod(equation.outvars[0].aval.shape) * per_output


def _count_splash(equation) -> float:
  """Operations of a splash attention kernel; skipped tiles count too."""
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
