"""A Python is found or an error explains why not; a venv is complete."""

import itertools
import pathlib
import re
import runpy
import shutil
import subprocess

import pytest
import setuptools

ROOT = pathlib.Path(__file__).resolve().parents[2]

SOURCE = 'set -euo pipefail; source "../a checkout/launch/setup.sh"; '
FIND = SOURCE + "find_python"
ENSURE = SOURCE + 'ensure_venv; echo "ready: $venv"'

BROKEN_SHIM = "#!/bin/bash\necho 'pyenv: command not found' >&2\nexit 127\n"


def test_the_version_that_the_pins_were_made_on_is_preferred(checkout):
  checkout.add_python(checkout.path / "python3", "3.13")
  best = checkout.add_python(checkout.path / "python3.12", "3.12")
  assert checkout.run(FIND).stdout == f"{best}\n"


def test_a_python_that_the_user_names_is_the_only_candidate(checkout):
  checkout.add_python(checkout.path / "python3.12", "3.12")
  named = checkout.add_python(checkout.path / "python3.13", "3.13")
  checkout.environment["GRPO_TPU_BASE_PYTHON"] = "python3.13"
  assert checkout.run(FIND).stdout == f"{named}\n"
  checkout.environment["GRPO_TPU_BASE_PYTHON"] = "python3.14"
  assert checkout.run(FIND).returncode == 64


def test_a_shim_that_does_not_start_is_passed_over(checkout):
  checkout.add(checkout.path / "python3.12", BROKEN_SHIM)
  good = checkout.add_python(checkout.path / "python", "3.13")
  assert checkout.run(FIND).stdout == f"{good}\n"


def test_a_name_that_path_holds_twice_is_tried_twice(checkout):
  """A shim comes first on PATH, the Python of the system second."""
  checkout.add(checkout.path / "python3.12", BROKEN_SHIM)
  good = checkout.add_python(checkout.tools / "python3.12")
  assert checkout.run(FIND).stdout == f"{good}\n"


@pytest.mark.parametrize("variable", ["PYENV_ROOT", "HOME"])
def test_pyenv_is_searched_although_no_shim_is_on_path(checkout, variable):
  folder = checkout.home / (".pyenv" if variable == "HOME" else "other env")
  checkout.environment["PYENV_ROOT"] = str(checkout.home / "other env")
  checkout.add_python(folder / "versions" / "3.11.9" / "bin" / "python")
  good = checkout.add_python(folder / "versions/3.12.10/bin/python")
  assert checkout.run(FIND).stdout == f"{good}\n"


def test_a_python_of_uv_is_found(checkout):
  good = checkout.add_python(checkout.home / "kept" / "python", "3.13")
  checkout.add(
    checkout.path / "uv",
    f'#!/bin/bash\n[[ "$*" == "python find --no-project 3.13" ]] && '
    f'echo "{good}"\n',
  )
  assert checkout.run(FIND).stdout == f"{good}\n"


def test_every_rejected_python_is_named_with_the_reason(checkout):
  checkout.add_python(checkout.path / "python3", "3.11")
  checkout.add_python(checkout.path / "python", "3.14")
  checkout.add_python(checkout.path / "python3.12", lacks=("ensurepip",))
  checkout.add(checkout.path / "python3.13", BROKEN_SHIM)
  result = checkout.run(ENSURE)
  assert (result.returncode, result.stdout) == (64, "")
  for reason in (
    "python3 is Python 3.11\n",
    "python is Python 3.14\n",
    "python3.12 has no module ensurepip\n",
    "python3.13 does not start\n",
  ):
    assert f"  {checkout.path}/{reason}" in result.stderr


def test_a_machine_without_python_is_told_what_to_install(checkout):
  result = checkout.run(ENSURE)
  assert result.returncode == 64
  assert "needs Python 3.12 or 3.13" in result.stderr
  assert "no Python at all" in result.stderr
  assert "apt install python3.12-venv" in result.stderr


def test_the_first_run_installs_the_pinned_set_with_its_build_tools(checkout):
  checkout.add_python(checkout.path / "python3.12")
  result = checkout.run(ENSURE)
  assert result.returncode == 0, result.stderr
  assert result.stdout == f"ready: {checkout.root}/.venv\n"
  venv, tools, packages, project, optional = checkout.called()
  assert venv == ["-m", "venv", "--clear", f"{checkout.root}/.venv"]
  locked = ["--no-deps", "--require-hashes", "--only-binary", ":all:"]
  locked += ["--no-binary", "promise,cellpylib,pycosat,zss"]
  assert tools[-8:] == [*locked, "--requirement", "locks/build.txt"]
  assert packages[-9:] == [
    *(*locked, "--no-build-isolation"),
    *("--requirement=locks/base.txt", "--requirement=locks/dev.txt"),
  ]
  alone = ["--no-deps", "--no-build-isolation", "--editable", "."]
  assert project[-4:] == alone
  last = ["--no-build-isolation", "--requirement=locks/reasoning.txt"]
  assert optional[-8:] == [*locked, *last]


def test_a_machine_without_a_compiler_is_ready_too(checkout):
  checkout.add_python(checkout.path / "python3.12")
  checkout.environment["EXITS"] = "--requirement=locks/reasoning.txt=1"
  result = checkout.run(ENSURE)
  assert result.stdout == f"ready: {checkout.root}/.venv\n", result.stderr
  assert "Left out reasoning-gym, which needs a C compiler" in result.stderr
  assert "pip could not install" not in result.stderr
  checkout.called()
  assert not is_made_again(checkout)


def ready(checkout) -> None:
  """Sets up once and forgets the calls."""
  checkout.add_python(checkout.path / "python3.12")
  result = checkout.run(ENSURE)
  assert result.returncode == 0, result.stderr
  checkout.called()


def test_the_second_run_only_compares_the_stamp(checkout):
  ready(checkout)
  (checkout.path / "python3.12").unlink()
  result = checkout.run(ENSURE)
  assert (result.returncode, result.stderr) == (0, "")
  assert checkout.called() == []


def is_made_again(checkout) -> bool:
  result = checkout.run(ENSURE)
  assert result.returncode == 0, result.stderr
  asked = checkout.called()
  assert len(asked) in (0, 5)
  return len(asked) == 5


DAMAGE = {
  "killed before the stamp": "rm .venv/complete.stamp",
  "stamp cut short": "echo a1 >.venv/complete.stamp",
  "its Python vanished": "ln -sf /nowhere/python3.12 .venv/bin/python",
  "only a folder": "rm -r .venv; mkdir .venv",
  "a requirement added": "echo more >setup.py",
  "a pin moved": "echo a==2 >locks/base.txt",
  "an option moved": "echo a==2 >locks/reasoning.txt",
  "a tool moved": "echo a==2 >locks/dev.txt",
  "a builder moved": "echo a >locks/build.txt",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_an_incomplete_or_old_venv_is_made_again(checkout, damage):
  ready(checkout)
  subprocess.run(["bash", "-c", damage], cwd=checkout.root, check=True)
  assert is_made_again(checkout)
  assert not is_made_again(checkout)


def test_another_extra_makes_the_venv_again_and_is_installed(checkout):
  ready(checkout)
  checkout.environment["GRPO_TPU_EXTRA"] = "tpu"
  assert checkout.run(ENSURE).returncode == 0
  called = checkout.called()
  assert any("--requirement=locks/tpu.txt" in call for call in called)
  assert not any("--requirement=locks/dev.txt" in call for call in called)
  assert not is_made_again(checkout)


def test_another_python_in_its_place_makes_the_venv_again(checkout):
  ready(checkout)
  checkout.add_python(checkout.root / ".venv" / "bin" / "python", "3.13")
  assert is_made_again(checkout)


def test_a_checkout_that_moved_makes_its_venv_again(checkout):
  """A venv and an editable install both hold absolute paths."""
  ready(checkout)
  checkout.root.rename(checkout.root.with_name("moved"))
  checkout.run(ENSURE.replace("a checkout", "moved"))
  assert len(checkout.called()) == 5


def test_pip_that_fails_fails_the_script_and_the_next_run_repairs(checkout):
  checkout.add_python(checkout.path / "python3.12")
  checkout.environment["EXITS"] = "--requirement=locks/dev.txt=2"
  result = checkout.run(ENSURE)
  assert (result.returncode, result.stdout) == (1, "")
  assert "pip could not install" in result.stderr
  checkout.called()
  checkout.environment["EXITS"] = ""
  assert is_made_again(checkout)


def test_a_set_up_killed_inside_pip_is_repaired(checkout):
  checkout.add_python(checkout.path / "python3.12")
  checkout.environment["PIP"] = "kill"
  assert checkout.run(ENSURE).returncode == 137
  checkout.called()
  checkout.environment["PIP"] = ""
  assert is_made_again(checkout)


@pytest.mark.skipif(not shutil.which("flock"), reason="no flock here")
def test_two_first_runs_at_once_set_up_once(checkout):
  checkout.add_python(checkout.path / "python3.12")
  checkout.environment["PIP"] = "sleep"
  both = [checkout.start(ENSURE) for _ in range(2)]
  errors = [process.communicate(timeout=60)[1] for process in both]
  assert [process.returncode for process in both] == [0, 0]
  assert len(checkout.called()) == 5
  assert sum("Waiting for another set-up" in error for error in errors) == 1


def test_pip_obeys_the_user_but_installs_into_the_venv(checkout):
  checkout.add_python(checkout.path / "python3.12")
  checkout.environment |= {"PIP_INDEX_URL": "here", "PIP_TARGET": "/there"}
  checkout.environment["PIP"] = "tell"
  assert checkout.run(ENSURE).returncode == 0
  recorded = [c for c in checkout.called() if c[0] == "settings of pip"]
  assert len(recorded) == 4
  for settings in recorded:
    assert "PIP_INDEX_URL=here" in settings
    assert "PIP_TARGET=/there" not in settings


def canonical(name: str) -> str:
  return re.sub(r"[-_.]+", "-", name).lower()


def test_every_requirement_is_pinned(monkeypatch):
  given = {}
  monkeypatch.setattr(setuptools, "setup", given.update)
  runpy.run_path(str(ROOT / "setup.py"))
  lists = [given["install_requires"], *given["extras_require"].values()]
  required = {
    canonical(re.split(r"[^\w.-]", requirement)[0])
    for requirement in itertools.chain(*lists)
  }
  locked = {name for name, _ in versions("base", "dev", "tpu", "reasoning")}
  assert {"jax", "ruff", "gguf"} <= required <= locked


def versions(*locks: str) -> set[tuple[str, str]]:
  """Each name and version in these locks."""
  texts = [(ROOT / "locks" / f"{name}.txt").read_text() for name in locks]
  found = re.findall(r"^([\w.-]+)==([\w.]+)", "\n".join(texts), re.MULTILINE)
  return set(found)


LOCKS = ("base", "build", "check", "dev", "reasoning", "tpu", "uv")


def test_the_locks_hold_the_pinned_versions_and_no_others():
  """After a change of a pin, run launch/lock.sh."""
  pins = (ROOT / "constraints.txt").read_text()
  pinned = re.findall(r"^([\w.-]+)==([\w.]+)", pins, re.MULTILINE)
  assert versions(*LOCKS) == set(pinned)
  assert {name for name, _ in versions("build")} >= {"setuptools", "wheel"}


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_checksums_and_no_address(name):
  text = (ROOT / "locks" / f"{name}.txt").read_text()
  for part in re.split(r"\n(?=[a-z])", text.strip())[1:]:
    first, *hashes = part.split("\n")
    assert re.fullmatch(r"[a-z0-9-]+==\S+( ; [^/]+)? \\", first), first
    assert hashes
    for line in hashes:
      assert re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line), line


CHECK = ENSURE.replace("ensure_venv", "ensure_check_venv")


def test_a_laptop_that_only_starts_runs_gets_a_small_venv(checkout):
  checkout.add_python(checkout.path / "python3.12")
  result = checkout.run(CHECK)
  assert result.stdout == f"ready: {checkout.root}/.venv-check\n"
  *_, packages = called = checkout.called()
  assert packages[-1] == "--requirement=locks/check.txt"
  assert len(called) == 3  # The project is not installed.
  checkout.run(CHECK)
  assert checkout.called() == []


def test_a_complete_venv_also_checks(checkout):
  ready(checkout)
  result = checkout.run(CHECK)
  assert result.stdout == f"ready: {checkout.root}/.venv\n"
  assert checkout.called() == []


def test_a_venv_of_the_user_is_used_without_changes(checkout):
  """It is neither checked nor changed."""
  python = checkout.add_python(checkout.home / "my venv" / "bin" / "python")
  before = sorted(checkout.root.rglob("*")), python.read_bytes()
  for named in (checkout.home / "my venv", "my venv"):
    checkout.environment["GRPO_TPU_VENV"] = str(named)
    result = checkout.run(ENSURE)
    assert result.stdout == f"ready: {checkout.home}/my venv\n", result.stderr
  assert checkout.called() == []
  assert before == (sorted(checkout.root.rglob("*")), python.read_bytes())


def test_a_wrong_venv_of_the_user_is_refused(checkout):
  checkout.add_python(checkout.path / "python3.12")
  checkout.environment["GRPO_TPU_VENV"] = str(checkout.home)
  result = checkout.run(ENSURE)
  assert result.returncode == 64 and "GRPO_TPU_VENV" in result.stderr
  assert checkout.called() == []
