"""The folder `quarantine/`, into which damaged checkpoints are moved."""

from etils import epath

from grpo_tpu.checkpoint import manifest


def move(path: epath.Path, damage: str) -> str:
  """Moves a checkpoint and its manifest aside; returns an error or "".

  The new name is the old one, the kind of damage and, if taken, a number.
  """
  label = damage.partition(":")[0].replace(" ", "-")
  target = free = path.parent / "quarantine" / f"{path.name}-{label}"
  number = 1
  try:
    while free.exists() or manifest.path_for(free).exists():
      number += 1
      free = target.with_name(f"{target.name}-{number}")
    free.parent.mkdir(exist_ok=True)
    for source, destination in (
      (manifest.path_for(path), manifest.path_for(free)),
      (path, free),
    ):
      if source.exists():
        source.rename(destination)
  except OSError as error:
    return f"{path} is damaged, and cannot be moved aside: {error}"
  return ""


def lost_steps(directory: epath.Path) -> list[str]:
  """Names in quarantine without step 0, with which every run starts anyway."""
  folder = directory / "quarantine"
  names = [path.name for path in folder.iterdir()] if folder.exists() else []
  return sorted(n for n in names if not n.startswith(f"{0:08}-"))
