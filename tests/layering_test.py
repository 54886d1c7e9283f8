"""The house keeps its shape: imports point down, and weigh what they must."""

import ast
import graphlib
import itertools
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("data_pipelines", "grpo_tpu")

# A file imports from its own room or from rooms on lower floors. A folder is
# one room: inside it the imports run one way, whatever the order.
FLOORS = {
  1: {"data_pipelines"},
  2: {"grpo_tpu.distributed"},
  3: {"grpo_tpu.models"},
  4: {"grpo_tpu.checkpoint"},
  5: {"grpo_tpu.observability", "grpo_tpu.rewards", "grpo_tpu.rollout"},
  6: {"grpo_tpu.rl"},
  7: {"grpo_tpu.config"},
  8: {"grpo_tpu.evaluation", "grpo_tpu.planning"},
  9: {"grpo_tpu.train"},
  10: {"grpo_tpu.modes"},
  11: {"grpo_tpu.main"},
  12: {"grpo_tpu.__main__"},
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}

# Each is, or imports, TensorFlow: ten seconds and more, wanted by few runs.
IMPORTED_WHERE_USED = {"clu", "gemma", "kauldron", "tensorflow"}
IMPORTED_WHERE_USED |= {"sympy", "latex2sympy2_extended", "math_verify"}


def module_name(path: pathlib.Path) -> str:
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
  module_name(path): path
  for package in PACKAGES
  for path in sorted((ROOT / package).rglob("*.py"))
}
MODULES = sorted(
  name for name, path in FILES.items() if path.name != "__init__.py"
)


def names(node: ast.AST) -> Iterator[str]:
  """What an import statement names: `from a import b` names `a.b`."""
  if isinstance(node, ast.Import):
    yield from (alias.name for alias in node.names)
  elif isinstance(node, ast.ImportFrom):
    if node.level:
      yield f"a relative import, line {node.lineno}"
    else:
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports(source: str) -> set[str]:
  """Everything imported, wherever in the file the import stands."""
  return {name for node in ast.walk(ast.parse(source)) for name in names(node)}


def imports_at_start(source: str) -> set[str]:
  """What importing the file itself imports: all that no function holds."""
  found = set()
  waiting: list[ast.AST] = [ast.parse(source)]
  while waiting:
    node = waiting.pop()
    found.update(names(node))
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      waiting.extend(ast.iter_child_nodes(node))
  return found


UNPICKLING = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}


@pytest.mark.parametrize("name", MODULES)
def test_no_module_unpickles(name):
  """What is unpickled may run as code, whoever has sent it."""
  roots = {x.partition(".")[0] for x in imports(FILES[name].read_text())}
  assert not roots & UNPICKLING
  assert "allow_pickle=True" not in FILES[name].read_text()


def room(name: str) -> str:
  """The entry of the table that a dotted name belongs to, itself if none."""
  prefixes = itertools.accumulate(name.split("."), lambda a, b: f"{a}.{b}")
  return next((p for p in prefixes if p in FLOOR_OF), name)


def module(name: str) -> str:
  """The module of ours that an imported name is, or is found in."""
  return name if name in FILES else name.rpartition(".")[0]


def ours(imported: set[str]) -> set[str]:
  return {name for name in imported if name.split(".")[0] in PACKAGES}


def faults(name: str, source: str) -> list[str]:
  """Each import of a module that the floors forbid, in words."""
  here = room(name)
  return [
    f"{name} (floor {FLOOR_OF[here]}) imports {there}"
    f" (floor {FLOOR_OF.get(there, 'unknown')})"
    for there in sorted({room(i) for i in ours(imports(source))})
    if there != here and not FLOOR_OF.get(there, 99) < FLOOR_OF[here]
  ]


def test_every_module_has_a_floor():
  assert [name for name in MODULES if room(name) not in FLOOR_OF] == []


def test_every_entry_of_the_table_exists():
  assert [name for name in FLOOR_OF if name not in FILES] == []


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
  assert faults(name, FILES[name].read_text()) == []


def test_an_import_that_points_up_or_sideways_is_named():
  """The check itself: from the lowest room up, and to a neighbour."""
  up = "def f():\n  from grpo_tpu.rl import train_step\n"
  assert faults("grpo_tpu.distributed.sharding", up) == [
    "grpo_tpu.distributed.sharding (floor 2) imports grpo_tpu.rl (floor 6)"
  ]
  sideways = "import grpo_tpu.observability.writer"
  assert len(faults("grpo_tpu.rollout.engine", sideways)) == 1
  inside = "from grpo_tpu.rl.objective import policy_loss"
  assert faults("grpo_tpu.rl.train_step", inside) == []
  down = "from grpo_tpu.models.gemma3 import text"
  assert faults("grpo_tpu.rl.train_step", down) == []


@pytest.mark.parametrize("folder", sorted(FLOOR_OF))
def test_imports_inside_a_folder_run_one_way(folder):
  inside = [name for name in MODULES if room(name) == folder]
  arrows = {
    name: {module(i) for i in ours(imports(FILES[name].read_text()))}
    & set(inside)
    for name in inside
  }
  graphlib.TopologicalSorter(arrows).prepare()  # Raises CycleError if not.


@pytest.mark.parametrize("name", MODULES)
def test_nothing_imports_the_checkout_or_by_relative_path(name):
  roots = {i.split(".")[0] for i in imports(FILES[name].read_text())}
  forbidden = {"configs", "launch", "tests", "benchmarks"}
  assert roots.isdisjoint(forbidden)
  assert not any(root.startswith("a relative import") for root in roots)


@pytest.mark.parametrize(
  "name", [name for name in MODULES if room(name) == "data_pipelines"]
)
def test_data_pipelines_know_neither_jax_nor_the_trainer(name):
  """Grain's workers and a laptop's `prepare` start without an accelerator."""
  roots = {i.split(".")[0] for i in imports(FILES[name].read_text())}
  assert roots.isdisjoint({"grpo_tpu", "jax", "jaxlib", "flax"})


@pytest.mark.parametrize("name", MODULES)
def test_slow_libraries_are_imported_where_they_are_used(name):
  roots = {i.split(".")[0] for i in imports_at_start(FILES[name].read_text())}
  # Only workers import the module that compares expressions.
  if name != "data_pipelines.verifier.expressions":
    assert roots.isdisjoint(IMPORTED_WHERE_USED)
  # Light by itself, but the trainer reads ArrayRecord and has no use for it.
  assert (
    "tensorflow_datasets" not in roots
    or name == "data_pipelines.sources.stored"
  )


def test_the_trainer_starts_without_tensorflow():
  """The law itself: other libraries' imports are not in our files."""
  code = (
    "import sys\n"
    "import data_pipelines.prepare\n"
    "import grpo_tpu.evaluation.evaluate, grpo_tpu.train.loop\n"
    f"assert {IMPORTED_WHERE_USED!r}.isdisjoint(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_an_import_inside_a_function_is_not_one_at_the_start():
  source = "import a\nclass C:\n  import b\ndef f():\n  import c\n"
  assert imports_at_start(source) == {"a", "b"}
  assert imports(source) == {"a", "b", "c"}


@pytest.mark.parametrize(
  "path",
  [
    path
    for name, path in FILES.items()
    if path.name == "__init__.py" and name != "grpo_tpu"
  ],
  ids=module_name,
)
def test_an_init_file_is_one_docstring(path):
  """No re-exports: a name has one home, and its import says where.

  `grpo_tpu` alone has public names; tests/grpo_tpu/face_test.py holds them.
  """
  tree = ast.parse(path.read_text())
  assert ast.get_docstring(tree) and len(tree.body) == 1


def test_no_module_is_a_drawer_of_odds_and_ends():
  drawers = {"common", "helpers", "lib", "misc", "tools", "util", "utils"}
  assert [n for n in MODULES if drawers & set(n.split("."))] == []
