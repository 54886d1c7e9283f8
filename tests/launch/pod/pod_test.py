"""The launcher needs nothing but Python on the laptop."""

import ast
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[3]


def test_the_launcher_imports_the_standard_library_and_two_files():
  shared = ("grpo_tpu.distributed.hardware", "data_pipelines.validation")
  files = [
    *(ROOT / f"{name.replace('.', '/')}.py" for name in shared),
    *(ROOT / "launch/pod").glob("*.py"),
  ]
  assert len(files) > 9
  for path in files:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
      else:
        continue
      for name in names:
        ours = name.startswith(("launch.pod.", *shared))
        assert ours or name.split(".")[0] in sys.stdlib_module_names, name
