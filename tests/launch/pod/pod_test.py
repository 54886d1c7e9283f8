"""What the launcher stands on: a laptop has nothing but Python."""

import ast
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[3]


def test_only_pythons_own_library_and_the_table_of_chips_is_imported():
  files = [ROOT / "grpo_tpu" / "chips.py", *(ROOT / "launch/pod").glob("*.py")]
  assert len(files) > 8
  for path in files:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
      else:
        continue
      for name in names:
        ours = (
          name.startswith("launch.pod.")
          or name == "grpo_tpu.distributed.hardware"
        )
        assert ours or name.split(".")[0] in sys.stdlib_module_names, name
