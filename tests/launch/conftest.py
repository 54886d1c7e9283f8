"""A checkout with fake Pythons and a fake pip, so that set-up takes no time."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

# The commands that `launch/` needs. The machine's own Pythons stay hidden.
COMMANDS = ("bash", "cat", "dirname", "flock", "mkdir", "mv", "rm", "setpriv")


class Checkout:
  """A copy of `launch/` in its own folder, on a fake machine."""

  def __init__(self, folder: pathlib.Path):
    self.root = folder / "a checkout"
    self.path = folder / "on path"
    self.home = folder / "home"
    self.calls = folder / "calls"
    self.environment: dict[str, str] = {}
    tools = folder / "tools"
    for made in (self.root, self.path, self.home, tools):
      made.mkdir()
    shutil.copytree(ROOT / "launch", self.root / "launch")
    (self.root / "setup.py").write_text("setup")
    (self.root / "locks").mkdir()
    for name in ("base", "build", "check", "dev", "reasoning", "tpu"):
      (self.root / "locks" / f"{name}.txt").write_text("a==1")
    self.calls.touch()
    for command in COMMANDS:
      if found := shutil.which(command):
        (tools / command).symlink_to(found)
    self.tools = tools

  def add(self, path: pathlib.Path, script: str) -> pathlib.Path:
    """Writes an executable file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    path.chmod(0o755)
    return path

  def add_python(
    self,
    path: pathlib.Path,
    version: str = "3.12",
    lacks: tuple[str, ...] = (),
  ) -> pathlib.Path:
    """Adds a fake Python of this version, without these modules."""
    pretend = ROOT / "tests" / "launch" / "pretend_python.py"
    words = (sys.executable, "-IS", pretend, path, version)
    line = " ".join(f"'{word}'" for word in (*words, ",".join(lacks)))
    return self.add(path, f'#!/bin/bash\nexec {line} "$@"\n')

  def variables(self) -> dict[str, str]:
    """The environment of a program on this machine."""
    return {
      "PATH": f"{self.path}{os.pathsep}{self.tools}",
      "HOME": str(self.home),
      "CALLS": str(self.calls),
      "EXITS": "",
      **self.environment,
    }

  def start(self, script: str, *arguments: str) -> subprocess.Popen[str]:
    """Starts a line of bash that sees only the tools of this machine."""
    return subprocess.Popen(
      ["bash", "-c", script, "bash", *arguments],
      cwd=self.home,
      env=self.variables(),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def run(
    self, script: str, *arguments: str
  ) -> subprocess.CompletedProcess[str]:
    """Runs a line of bash."""
    process = self.start(script, *arguments)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(
      process.args, process.returncode, out, err
    )

  def called(self) -> list[list[str]]:
    """The arguments of each call of a fake Python since the last time."""
    lines = self.calls.read_text().splitlines()
    self.calls.write_text("")
    return [json.loads(line) for line in lines]


@pytest.fixture
def checkout(tmp_path: pathlib.Path) -> Checkout:
  return Checkout(tmp_path)
