"""The table of docs/plan.md, from what --mode=plan wrote.

python benchmarks/plan_table.py DIR/*/plan.json
"""

import json
import pathlib
import sys

_GIB = 2**30


def main(paths: list[str]) -> None:
  """Prints a line for each plan, in the order given.

  Plans that differ in the size of pictures alone share one.
  """
  pictures: dict[tuple[str, ...], list[str]] = {}
  for path in paths:
    made = json.loads(pathlib.Path(path).read_text())
    peak = max(made["programs"], key=lambda x: x["resident_bytes"])
    settings = made["config"]["model"]
    rank, size = settings["lora"]["rank"], settings["image_size"]
    cells = (
      made["model"],
      f"{made['topology']} ({made['slice']})",
      f"LoRA of rank {rank}" if rank else "all",
      f"{peak['resident_bytes'] / _GIB:.2f}",
      f"{made['hbm_limit_bytes'] / _GIB:.2f}",
      f"{made['room']:.1%}",
      peak["name"],
    )
    shown = f"{size} px" if size else "the tower's own"
    pictures.setdefault(cells, []).append(shown)
  print(
    "| model | slice | trained | pictures | most at once, GiB of a device "
    "| limit | free | by |"
  )
  print("|---|---|---|---|---|---|---|---|")
  for cells, sizes in pictures.items():
    row = (*cells[:3], ", ".join(sizes), *cells[3:])
    print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
  main(sys.argv[1:])
