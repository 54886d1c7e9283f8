"""The public names: `import grpo_tpu` shows them, and costs nothing."""

import ast
import pathlib
import subprocess
import sys

import pytest

import grpo_tpu

NAMES = (
  *("Config", "Sampler", "Trainer", "__version__", "default_config"),
  *("evaluate", "group_advantages", "load_params", "make_mesh"),
  *("policy_loss", "verify"),
)


def test_the_public_names_are_listed():
  assert dir(grpo_tpu) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_the_one_thing_that_its_home_defines(name):
  if name != "__version__":
    module, _, attribute = grpo_tpu._HOMES[name].rpartition(".")
    found = getattr(grpo_tpu, name)
    assert (found.__module__, found.__name__) == (module, attribute)


def test_type_checkers_see_the_same_names():
  tree = ast.parse(pathlib.Path(grpo_tpu.__file__).read_text())
  (block,) = (node for node in tree.body if isinstance(node, ast.If))
  seen = {
    alias.asname: f"{node.module}.{alias.name}"
    for node in block.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
    if alias.asname
  }
  (assigned,) = (node for node in block.body if isinstance(node, ast.Assign))
  assert ast.unparse(assigned) == "default_config = defaults.get_config"
  seen["default_config"] = "grpo_tpu.config.defaults.get_config"
  assert seen == grpo_tpu._HOMES


def test_a_name_that_does_not_exist_is_an_attribute_error():
  with pytest.raises(AttributeError, match="no attribute 'trainer_of'"):
    _ = grpo_tpu.trainer_of


def test_jax_is_imported_with_the_first_name_that_needs_it():
  code = (
    "import sys, grpo_tpu\n"
    "dir(grpo_tpu), grpo_tpu.__version__, grpo_tpu.default_config()\n"
    "grpo_tpu.Config, grpo_tpu.verify\n"
    "assert 'jax' not in sys.modules\n"
    "grpo_tpu.make_mesh\n"
    "assert 'jax' in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
