"""Texts of a user's own: prepared by one command, trained, resumed, scored."""

import json
import pathlib
import random
from collections.abc import Callable

import pytest

from data_pipelines.preferences import label_results
from data_pipelines.sources import stored
from data_pipelines.verifier import verify
from tests.e2e.conftest import TINY, Program, Run
from tests.e2e.resume_test import assert_same

pytestmark = pytest.mark.e2e

SETTINGS = (
  "--config=configs/smoke.py",
  *TINY,
  "--config.data.prompt_buckets=(128,)",
  "--config.eval.num_problems=8",
  "--config.eval.batch_size=8",
  "--config.eval.every_steps=0",
)


def word_problem(rng: random.Random) -> tuple[str, str, int]:
  """A question, its solution with GSM8K's marks, and the answer."""
  a, b = rng.randint(2, 9), rng.randint(2, 9)
  c = rng.randint(1, a * b - 1)
  thing = rng.choice(["pens", "apples", "stamps", "cards"])
  return (
    f"Mia has {a} boxes of {b} {thing} and gives {c} {thing} away. How many "
    "are left?",
    f"She starts with {a} * {b} = <<{a}*{b}={a * b}>>{a * b} {thing}.\nThen "
    f"{a * b} - {c} = <<{a * b}-{c}={a * b - c}>>{a * b - c} are left.\n"
    f"#### {a * b - c}",
    a * b - c,
  )


def solved(rng: random.Random) -> dict:
  question, solution, _ = word_problem(rng)
  return {"question": question, "answer": solution}


def preferred(rng: random.Random) -> dict:
  question, _, answer = word_problem(rng)
  chosen, rejected = f"It is {answer}.", f"It is {answer + 1}."
  return {"prompt": question, "chosen": chosen, "rejected": rejected}


def told(rng: random.Random) -> dict:
  question, _, answer = word_problem(rng)
  turns = [("human", question), ("gpt", f"That leaves {answer}.")]
  return {"conversations": [{"from": x, "value": y} for x, y in turns]}


def symbolic(rng: random.Random) -> dict:
  a, b = rng.randint(2, 9), rng.choice([2, 3, 5, 7])
  question, answer = rng.choice(
    [
      (f"What is ${a}/{10 * b + 1}$ as a fraction?", rf"\frac{{{a}}}{{{b}1}}"),
      (rf"Simplify $\sqrt{{{a * a * b}}}$.", rf"{a}\sqrt{{{b}}}"),
      (f"Solve $x^2 = {a * a}$.", rf"\{{-{a}, {a}\}}"),
      (f"Expand $(x+{a})(x+{b})$.", f"x^2+{a + b}x+{a * b}"),
    ]
  )
  return {"problem": question, "solution": rf"One finds \boxed{{{answer}}}."}


def prepare(
  program: Program,
  folder: pathlib.Path,
  make: Callable[[random.Random], dict],
  *flags: str,
) -> pathlib.Path:
  """A data dir of 160 such records."""
  rng = random.Random(0)
  rows = [json.dumps(make(rng)) + "\n" for _ in range(160)]
  (folder / "mine.jsonl").write_text("".join(rows))
  out = folder / "data"
  source = f"--source={folder / 'mine.jsonl'}"
  program.run("data_pipelines.prepare", source, f"--data_dir={out}", *flags)
  return out


def counts(data: pathlib.Path) -> dict:
  manifest = json.loads((data / "manifest.json").read_text())
  assert manifest["rejects"] == {}
  return manifest["counts"]


@pytest.fixture
def words(program, tmp_path) -> pathlib.Path:
  return prepare(program, tmp_path, solved)


def test_word_problems_train_and_a_killed_run_resumes(program, words, tmp_path):
  assert sum(counts(words).values()) == 160
  problem = stored.source(words, "train")[0]
  assert problem.answer_type == "integer" and problem.images == ()
  assert problem.solution.endswith(f"#### {problem.answer}")
  given = (
    *SETTINGS,
    f"--config.data.dir={words}",
    "--config.train.num_steps=5",
  )
  unbroken = Run(program, tmp_path / "unbroken", *given).start()
  assert len(set(unbroken.column("train/grad_norm"))) == 5
  assert unbroken.column("data/skipped") == [0] * 5
  killed = unbroken.without_checkpoints_after(2)
  assert_same(killed.start(), unbroken)


@pytest.fixture
def puzzles(program, tmp_path) -> pathlib.Path:
  pytest.importorskip("reasoning_gym", reason="set-up could not build it here")
  program.run(
    *("data_pipelines.prepare", "--source=reasoning_gym:gcd,spell_backward"),
    *(f"--data_dir={tmp_path / 'data'}", "--num_problems=160"),
  )
  return tmp_path / "data"


def test_answers_to_drawn_puzzles_are_judged_by_their_scorer(puzzles):
  assert sum(counts(puzzles).values()) == 160
  problems = [stored.source(puzzles, "train")[i] for i in range(8)]
  right = [f"I find <answer>{each.answer}</answer>" for each in problems]
  # The scorer itself pays a part for these.
  padded = [text.replace("<answer>", "<answer>It is ") for text in right]
  verdicts = verify.verify_all(right + padded, problems * 2)
  assert [each.correct for each in verdicts] == [True] * 8 + [False] * 8


@pytest.mark.nightly
def test_drawn_puzzles_train(program, puzzles, tmp_path):
  run = Run(
    *(program, tmp_path / "run", *SETTINGS, f"--config.data.dir={puzzles}"),
    *("--config.train.num_steps=2", "--config.data.prompt_buckets=(256,)"),
  ).start()
  assert run.column("data/skipped") == [0] * 2
  assert len(run.column("reward/accuracy_mean")) == 2


@pytest.mark.nightly
def test_chosen_and_rejected_texts_train_preferences(program, tmp_path):
  data = prepare(program, tmp_path, preferred)
  run = Run(
    *(program, tmp_path / "run", *SETTINGS, f"--config.data.dir={data}"),
    *("--config.data.kind=preference", "--config.train.num_steps=2"),
    *("--config.data.preference_rewards=labels",),
    "--config.rollout.max_new_tokens=16",
  ).start()
  assert run.column("train/preference_accuracy") == [1.0] * 2
  assert run.column("data/skipped") == [0] * 2


@pytest.mark.nightly
def test_conversations_train_demonstrations(program, tmp_path):
  data = prepare(program, tmp_path, told)
  run = Run(
    *(program, tmp_path / "run", *SETTINGS, f"--config.data.dir={data}"),
    *("--config.data.kind=demonstrations", "--config.train.num_steps=4"),
    *("--config.rollout.max_new_tokens=16",),
    "--config.optimizer.learning_rate=3e-3",
  ).start()
  first, *_, last = run.column("train/nll")
  assert last < first


@pytest.mark.nightly
def test_expressions_train_are_evaluated_scored_and_paired(program, tmp_path):
  data = prepare(program, tmp_path, symbolic)
  given = (*SETTINGS, f"--config.data.dir={data}", "--config.train.num_steps=2")
  run = Run(program, tmp_path / "run", *given).start()
  evaluation = Run(
    *(program, tmp_path / "evaluation", "--mode=evaluate", *given),
    f"--config.model.weights=run:{run.workdir}",
  ).start()
  results = evaluation.workdir / "eval" / "output_eval.json"
  rows = json.loads(results.read_text())
  assert len(rows) == 8
  golds = {
    x.pid: x.answer for x in (stored.source(data, "eval")[i] for i in range(8))
  }
  for pid, row in rows.items():
    row["response"] = rf"So it is $\boxed{{{golds[pid]}}}$."
  right = tmp_path / "right.json"
  right.write_text(json.dumps(rows))
  scored = tmp_path / "scored"
  program.run("data_pipelines.score", str(right), f"--out={scored}")
  pairs = tmp_path / "pairs.jsonl"
  found = label_results.label_results([results, right], pairs)
  assert found["groups"] + found["without_wrong"] == 8


@pytest.mark.nightly
def test_the_sizes_of_gemma_3_270m_train_on_texts(
  program, words, tmp_path, monkeypatch
):
  """Takes 8 GiB of memory and 80 seconds of a CPU."""
  monkeypatch.setitem(program.environment, "XLA_FLAGS", "")
  run = Run(
    *(program, tmp_path / "run", *SETTINGS, f"--config.data.dir={words}"),
    *("--config.model.name=gemma3_270m", "--config.model.train_vision=False"),
    *("--config.train.num_steps=5", "--config.train.microbatch_bundles=1"),
    *("--config.data.prompts_per_step=2", "--config.rollout.num_generations=2"),
    "--config.checkpoint.every_steps=100",
  ).start()
  assert run.column("data/skipped") == [0] * 5
  assert [row["step"] for row in run.rows()] == list(range(6))
