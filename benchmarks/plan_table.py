"""Prints the table of docs/plan.md from the files of --mode=plan.

python benchmarks/plan_table.py DIR/*/plan.json
"""

import json
import pathlib
import sys

_GIB = 2**30


def main(paths: list[str]) -> None:
  """Prints one line for plans that differ at most in image size."""
  images: dict[tuple[str, ...], list[str]] = {}
  for path in paths:
    plan = json.loads(pathlib.Path(path).read_text())
    peak = max(plan["programs"], key=lambda x: x["resident_bytes"])
    settings = plan["config"]["model"]
    rank, size = settings["lora"]["rank"], settings["image_size"]
    cells = (
      plan["model"],
      f"{plan['topology']} ({plan['slice']})",
      f"LoRA of rank {rank}" if rank else "all",
      f"{peak['resident_bytes'] / _GIB:.2f}",
      f"{plan['hbm_limit_bytes'] / _GIB:.2f}",
      f"{plan['room']:.1%}",
      peak["name"],
    )
    shown = f"{size} px" if size else "the tower's own"
    images.setdefault(cells, []).append(shown)
  print(
    "| model | slice | trained | images | peak, GiB of a device "
    "| limit | free | by |"
  )
  print("|---|---|---|---|---|---|---|---|")
  for cells, sizes in images.items():
    row = (*cells[:3], ", ".join(sizes), *cells[3:])
    print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
  main(sys.argv[1:])
