"""The Dockerfile is clean and pinned; its image builds and trains."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
BUILD = ROOT / "tests" / "launch" / "build_image.sh"


def instructions(name: str) -> list[str]:
  """The arguments of each instruction of this name."""
  joined = DOCKERFILE.replace("\\\n", " ")
  return re.findall(rf"^{name}\s+(.*)$", joined, re.MULTILINE)


def test_hadolint_finds_nothing():
  here = pathlib.Path(sys.executable).with_name("hadolint")
  hadolint = str(here) if here.exists() else shutil.which("hadolint")
  if hadolint is None:
    pytest.skip("no hadolint here; the dev extra has it")
  found = subprocess.run(
    [hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True
  )
  assert found.returncode == 0, found.stdout


def test_every_copied_path_exists_and_passes_the_ignore_file():
  ignored = (ROOT / ".dockerignore").read_text().splitlines()
  assert ignored[1] == "*"
  for line in instructions("COPY"):
    *sources, _ = line.split()
    for source in sources:
      assert (ROOT / source).exists()
      assert f"!{source}" in ignored


def test_the_ignore_file_passes_nothing_else():
  """Settings with a project's name, weights and runs stay outside."""
  ignored = (ROOT / ".dockerignore").read_text().splitlines()
  copied = {s for line in instructions("COPY") for s in line.split()[:-1]}
  assert {line[1:] for line in ignored if line.startswith("!")} == copied


def test_it_does_not_run_as_root():
  (user,) = instructions("USER")
  assert int(user) > 0
  assert DOCKERFILE.index("USER") > DOCKERFILE.rindex("RUN")


def test_the_base_can_be_replaced_and_has_a_fixed_version():
  (base,) = re.findall(r"^ARG BASE_IMAGE=(.*)$", DOCKERFILE, re.MULTILINE)
  assert instructions("FROM") == ["${BASE_IMAGE}"]
  tag = r"python:(3\.1[23]\.\d+)-slim-[a-z]+@sha256:[0-9a-f]{64}"
  found = re.fullmatch(tag, base)
  assert found, base
  # The workers of a slice have the same Python.
  worker = (ROOT / "launch" / "pod" / "worker.sh").read_text()
  assert f"uv python install {found[1]}\n" in worker


def test_every_installation_requires_checksums():
  commands = [x for line in instructions("RUN") for x in line.split("&&")]
  commands = [command for command in commands if "pip install" in command]
  assert len(commands) == 2
  for command in commands:
    assert "--require-hashes" in command and "--only-binary :all:" in command
    for lock in re.findall(r"--requirement (\S+)", command)[:1]:
      assert (ROOT / lock).exists()


@pytest.mark.nightly
def test_it_builds_and_trains_inside(tmp_path):
  """With its user and its entrypoint, on a local base: no registry."""
  done = subprocess.run(
    ["bash", str(BUILD), str(tmp_path)], capture_output=True, text=True
  )
  if done.returncode == 77:
    pytest.skip(done.stderr.strip().splitlines()[-1])
  assert done.returncode == 0, done.stderr
  assert "user 10001" in done.stdout
  assert "steps inside the image: [0, 1, 2]" in done.stdout
