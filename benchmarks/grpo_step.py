"""Compares one GRPO step of ours with Tunix's and TRL's at the same sizes.

  python benchmarks/grpo_step.py --prompt_length=64 --completion_length=64
  python benchmarks/grpo_step.py --preset=270m --steps=3 --warmup=1

A step is rollout, rewards, advantages, reference and update, in float32 with
AdamW, one update per step, and a KL term. No id stops a completion, so all have
full length. Each trainer is a child process with its own Python. They take
turns step by step, so that other work on the machine disturbs all alike. The
script compares CPU-seconds of all threads of a child, because wall time depends
on other programs. It prints a table and a line of JSON. Peers come from
`benchmarks/setup_peers.sh --benchmarks`; the table names missing ones.
"""

import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile

import step_workload as workload

ROOT = pathlib.Path(__file__).resolve().parents[1]
# The environment variables select another Python.
RUNNERS = {
  "ours": ("step_ours.py", sys.executable),
  "tunix": (
    "step_tunix.py",
    os.environ.get(
      "GRPO_TPU_TUNIX_PYTHON", str(ROOT / ".venv-tunix" / "bin" / "python")
    ),
  ),
  "trl": (
    "step_trl.py",
    os.environ.get(
      "GRPO_TPU_PEERS_PYTHON", str(ROOT / ".venv-peers" / "bin" / "python")
    ),
  ),
}


class Child:
  """A trainer in a process of its own."""

  def __init__(self, name: str, flags: list[str], log: pathlib.Path):
    script, python = RUNNERS[name]
    self.name, self.steps, self._log = name, [], log
    self._process = subprocess.Popen(
      [python, str(ROOT / "benchmarks" / script), *flags],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=log.open("w"),
      text=True,
      # Keeps jax on the CPU, and torch's waiting threads from spinning.
      env=os.environ | {"JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "PASSIVE"},
    )

  def step(self) -> dict:
    """Runs one step of the child; returns its report."""
    assert self._process.stdin is not None
    try:
      self._process.stdin.write("\n")
      self._process.stdin.flush()
    except BrokenPipeError:
      pass  # The error is in the log.
    return self._answer()

  def end(self) -> float:
    """Ends the child; returns its peak memory in GiB."""
    assert self._process.stdin is not None
    self._process.stdin.close()
    peak = self._answer()["peak_gib"]
    self._process.wait()
    return peak

  def kill(self) -> None:
    """Kills the child."""
    self._process.kill()
    self._process.wait()

  def _answer(self) -> dict:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      tail = "\n".join(self._log.read_text().splitlines()[-15:])
      raise SystemExit(f"{self.name} failed:\n{tail}")
    return json.loads(line)


def main() -> None:
  """Runs the children in turns, and prints their costs."""
  flags = workload.parser(__doc__)
  flags.add_argument("--only", help="comma-separated subset of ours,tunix,trl")
  args = workload.parse(flags)
  wanted = args.only.split(",") if args.only else list(RUNNERS)
  passed = [
    f"--{name}={value}" for name, value in vars(args).items() if name != "only"
  ]
  missing = [
    name for name in wanted if not pathlib.Path(RUNNERS[name][1]).is_file()
  ]
  load = os.getloadavg()[0]
  with tempfile.TemporaryDirectory() as logs:
    children = [
      Child(name, passed, pathlib.Path(logs) / f"{name}.log")
      for name in wanted
      if name not in missing
    ]
    try:
      for number in range(args.warmup + args.steps):
        for child in children:
          report = child.step()
          expected = args.prompts * args.num_generations
          expected *= args.completion_length
          if report["tokens"] != expected:
            raise SystemExit(
              f"{child.name} wrote {report['tokens']} tokens, not {expected}."
            )
          if number >= args.warmup:
            child.steps.append(report)
          print(
            f"step {number}: {child.name} {report['cpu']:.2f} CPU s",
            file=sys.stderr,
          )
      peaks = {child.name: child.end() for child in children}
    finally:
      for child in children:
        child.kill()
  print_table(args, children, peaks, missing, load)


def print_table(
  args, children: list[Child], peaks: dict, missing: list[str], load: float
) -> None:
  """Prints the table and the line of JSON."""
  print(
    f"{args.layers} layers, width {args.width}, vocabulary {args.vocab}; "
    f"{args.prompts} prompts x {args.num_generations}, "
    f"{args.prompt_length} + {args.completion_length} tokens; float32, "
    f"beta {args.beta}\n"
    f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}, "
    f"load {load:.1f} before and {os.getloadavg()[0]:.1f} after; torch with "
    f"{args.torch_threads} thread(s), the others with all\n"
    f"medians of {args.steps} steps in turns, after {args.warmup} of warm-up\n"
  )
  columns = ("CPU s", "min-max", "wall s", "rollout", "reference", "update")
  print(f"{'':8}" + "".join(f"{c:>13}" for c in columns) + f"{'peak GiB':>10}")
  facts: dict[str, float | None] = {}
  for name in RUNNERS:
    facts[f"{name}_cpu_s"] = facts[f"{name}_peak_gib"] = None
  for child in children:
    cpu = [step["cpu"] for step in child.steps]
    phases = {
      phase: statistics.median(
        step["phases"].get(phase, 0.0) for step in child.steps
      )
      for phase in ("rollout", "reference", "update")
    }
    values = [
      f"{statistics.median(cpu):.2f}",
      f"{min(cpu):.2f}-{max(cpu):.2f}",
      f"{statistics.median(step['wall'] for step in child.steps):.2f}",
      *(f"{value:.2f}" for value in phases.values()),
    ]
    print(
      f"{child.name:8}"
      + "".join(f"{value:>13}" for value in values)
      + f"{peaks[child.name]:>10.2f}"
    )
    facts[f"{child.name}_cpu_s"] = round(statistics.median(cpu), 4)
    facts[f"{child.name}_peak_gib"] = round(peaks[child.name], 3)
    facts |= {
      f"{child.name}_{phase}_cpu_s": round(value, 4)
      for phase, value in phases.items()
    }
  for name in missing:
    print(
      f"{name:8} missing: no {RUNNERS[name][1]}; run "
      "bash benchmarks/setup_peers.sh --benchmarks"
    )
  for peer in ("tunix", "trl"):
    facts[f"ratio_{peer}"] = _ratio(facts, peer, "cpu_s")
    facts[f"memory_ratio_{peer}"] = _ratio(facts, peer, "peak_gib")
  print(json.dumps(facts))


def _ratio(facts: dict, peer: str, what: str) -> float | None:
  ours, theirs = facts[f"ours_{what}"], facts[f"{peer}_{what}"]
  return round(ours / theirs, 4) if ours and theirs else None


if __name__ == "__main__":
  main()
