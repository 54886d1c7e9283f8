"""--mode=evaluate: samples, ablations and files, of a policy that is known."""

import collections
import concurrent.futures
import dataclasses
import json
import pathlib
import threading
import types

import jax
import numpy as np
import pytest
from absl import logging

from data_pipelines import validation
from grpo_tpu.config import schema as run_config
from grpo_tpu.distributed import collectives
from grpo_tpu.evaluation import evaluate
from grpo_tpu.evaluation import scores as figures
from grpo_tpu.rollout import sampling
from tests.grpo_tpu import scripted
from tests.grpo_tpu.scripted import (
  ASKED,
  EVERY,
  RIGHT,
  SCRIPT,
  TOO_LONG,
  UNREADABLE,
  Source,
  batches_of,
)

NUM_SAMPLES = 6
KINDS = ("removed", "shuffled")
SETTINGS = {
  "num_samples": NUM_SAMPLES,
  "temperature": 0.7,
  "ks": (1, 2, 6),
  "ablations": KINDS,
  "num_examples": 3,
}


class Dicing(scripted.ScriptedSampler):
  """Greedily as the script says; a sample is right as the key's die falls."""

  def sample(self, params, prompts, key, *, num_completions, temperature, **_):
    replies = {f"p{i}": [reply] for i, (*_, reply) in enumerate(SCRIPT)}
    if temperature:
      assert temperature == SETTINGS["temperature"]
      keys = sampling.row_keys(key, prompts.prompt_index, num_completions)
      dice = jax.vmap(jax.vmap(lambda key: jax.random.randint(key, (), 0, 3)))(
        keys
      )
      replies = {
        problem.pid: [
          f"<answer>{(problem.answer, 'red', '99')[face]}</answer>"
          for face in row
        ]
        for problem, row in zip(prompts.problems, dice.tolist(), strict=True)
      }
    self.completions = replies
    return super().sample(params, prompts, key, num_completions=num_completions)


class Seeing(scripted.ScriptedSampler):
  """Right where the picture is the problem's own, by its shade of red."""

  def sample(self, params, prompts, key, **settings):
    shades = prompts.images[:, 0, 0, 0, 0].tolist()
    self.completions = {
      problem.pid: [f"<answer>{problem.answer}</answer>"]
      for problem, shade in zip(prompts.problems, shades, strict=True)
      if problem.pid == f"p{shade / 20:g}"
    }
    return super().sample(params, prompts, key, **settings)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return scripted.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def run_of(kind, tokenizer, num_devices=1, seed=0, **settings):
  run = scripted.make_run(tokenizer, {}, num_devices=num_devices, sampler=kind)
  config = dataclasses.replace(
    run.config,
    seed=seed,
    eval=dataclasses.replace(run.config.eval, **(SETTINGS | settings)),
  )
  return dataclasses.replace(run, config=config)


def data_of(source):
  """As much of a data set as is looked at."""
  return types.SimpleNamespace(eval=source)


def found(run, batch_size=11, indices=EVERY):
  blind = evaluate._ablated_sources(run.config, data_of(Source(indices)))
  batches = batches_of(run.tokenizer, batch_size=batch_size, indices=indices)
  return evaluate.evaluate_all(run.sampler, {}, batches, blind, run.config)


@pytest.fixture(scope="module")
def everything(tokenizer):
  return found(run_of(Dicing, tokenizer))


def test_all_answers_are_those_of_all_problems_in_order(everything):
  for answers in (
    everything.greedy,
    *everything.samples,
    *everything.ablated.values(),
  ):
    assert [answer.index for answer in answers] == list(EVERY)
    assert [x.index for x in answers if x.asked] == list(ASKED)
  assert [x.index for x in everything.greedy if x.is_right] == list(RIGHT)
  assert len(everything.samples) == NUM_SAMPLES
  assert list(everything.ablated) == list(KINDS)


@pytest.mark.parametrize(
  ("batch_size", "num_devices"), [(3, 1), (16, 1), (8, 8)]
)
def test_neither_batch_size_nor_devices_change_an_answer(
  everything, tokenizer, batch_size, num_devices
):
  got = found(run_of(Dicing, tokenizer, num_devices), batch_size)
  assert got.greedy == everything.greedy
  assert got.samples == everything.samples
  assert got.ablated == everything.ablated


def test_a_draw_depends_on_seed_problem_and_number(everything, tokenizer):
  def faces(found):
    return [
      [draw[i].is_right for draw in found.samples] for i in (0, 1, 2, 5, 6, 9)
    ]

  table = faces(everything)
  assert len({tuple(row) for row in table}) > 3
  assert len(set(zip(*table, strict=True))) > 3
  other = run_of(Dicing, tokenizer, seed=1)
  assert faces(found(other)) != table


def test_what_is_sampled_is_counted(everything):
  scores = figures.compute(
    everything.greedy,
    samples=everything.samples,
    ks=SETTINGS["ks"],
    ablated={},
  )
  right = np.array(
    [[x.is_right for x in draw] for draw in everything.samples]
  )  # [draws, problems]
  sampled = scores["sampled"]
  assert sampled["accuracy"]["share"] == pytest.approx(right.mean())
  assert sampled["pass_at_k"]["1"]["share"] == pytest.approx(right.mean())
  assert sampled["maj_at_k"]["1"]["share"] == pytest.approx(right.mean())
  assert sampled["pass_at_k"]["6"]["share"] == right.any(0).mean()
  wins = 0
  for row in zip(*everything.samples, strict=True):
    votes = [x.record["extraction"] for x in row]
    counts = collections.Counter(x for x in votes if x is not None)
    if counts:
      most = max(counts.values())
      winner = next(x for x in votes if counts.get(x) == most)
      wins += row[votes.index(winner)].is_right
  assert sampled["maj_at_k"]["6"]["share"] == pytest.approx(wins / len(EVERY))


def test_who_looks_loses_by_another_picture_and_who_does_not_does_not(
  tokenizer,
):
  for kind, kept in ((Dicing, RIGHT), (Seeing, ())):
    got = found(run_of(kind, tokenizer, num_samples=0))
    real = RIGHT if kind is Dicing else ASKED
    assert [x.index for x in got.greedy if x.is_right] == list(real)
    for answers in got.ablated.values():
      assert [x.index for x in answers if x.is_right] == list(kept)


def test_nothing_is_sampled_or_taken_away_unless_asked(tokenizer):
  run = run_of(Dicing, tokenizer, num_samples=0, ablations=())
  got = found(run)
  assert (got.samples, got.ablated) == ([], {})


def test_pictures_are_not_taken_from_what_sees_none(tokenizer, monkeypatch):
  config = run_of(Dicing, tokenizer).config
  blind = dataclasses.replace(config.model_config, vision=None)
  monkeypatch.setattr(run_config.Config, "model_config", blind)
  assert evaluate._ablated_sources(config, data_of(Source(EVERY))) == {}


def test_pictures_that_cannot_be_shuffled_are_a_bad_request(tokenizer):
  config = run_of(Dicing, tokenizer).config
  with pytest.raises(validation.SettingError, match="eval.ablations"):
    evaluate.run(config, "nowhere", data_of(Source([0, UNREADABLE])))


class Unanswered(Source):
  """The problems of a split whose answers are not public."""

  def __getitem__(self, index, /):
    return dataclasses.replace(super().__getitem__(index), answer="")


def test_there_is_no_ablation_without_answers(tokenizer):
  config = run_of(Dicing, tokenizer).config
  assert evaluate._ablated_sources(config, data_of(Unanswered(EVERY))) == {}


def test_answers_come_from_all_hosts(everything, monkeypatch):
  """Two threads for two hosts, each with the answers of its own rows."""
  host, sent, barrier = threading.local(), {}, threading.Barrier(2)

  def gather(data):
    sent[host.index] = data
    barrier.wait()
    both = [sent[0], sent[1]]
    barrier.wait()
    return both

  def answers_on(index):
    host.index = index
    # Rows of several batches, and as unlike in length as hosts can be.
    kept = [x for x in everything.greedy if (x.index in (0, 1, 8)) != index]
    return evaluate._of_all_hosts(kept)

  monkeypatch.setattr(collectives, "gather_bytes", gather)
  with concurrent.futures.ThreadPoolExecutor(2) as hosts:
    for answers in hosts.map(answers_on, range(2)):
      assert answers == everything.greedy


def read(path: pathlib.Path):
  text = path.read_text("utf-8")
  return json.loads(text, parse_constant=pytest.fail)


def test_what_is_written_reads_back(everything, tokenizer, tmp_path):
  run = run_of(Dicing, tokenizer)
  evaluate.write(everything, str(tmp_path), run.config, Source(EVERY))
  folder = tmp_path / "eval"
  assert sorted(str(x.relative_to(folder)) for x in folder.rglob("*.*")) == [
    "output_eval.json",
    "output_eval_removed.json",
    "output_eval_shuffled.json",
    "report.html",
    "report.md",
    *(f"samples/output_eval_00{i}.json" for i in range(NUM_SAMPLES)),
    "scores.json",
  ]
  for name, answers in (
    ("output_eval.json", everything.greedy),
    ("output_eval_shuffled.json", everything.ablated["shuffled"]),
    ("samples/output_eval_004.json", everything.samples[4]),
  ):
    results = read(folder / name)
    assert list(results.values()) == [x.record for x in answers]
    assert list(results) == [x.record["pid"] for x in answers]
  assert "π" in (folder / "output_eval.json").read_text("utf-8")
  scores = read(folder / "scores.json")
  assert (scores["weights"], scores["split_size"]) == ("random:0", len(SCRIPT))
  assert (scores["split"], scores["temperature"]) == ("eval", 0.7)
  assert scores["scalars"] == pytest.approx(everything.scalars)
  assert scores["accuracy"]["share"] == scores["scalars"]["eval/accuracy"]
  page = (folder / "report.html").read_text("utf-8")
  # Of four failures that were asked, three are shown.
  assert page.count("<article") == page.count("data:image/png") == 3
  assert "output" not in page


def test_a_split_without_answers_is_exported_and_says_so(tokenizer, tmp_path):
  run = run_of(Dicing, tokenizer, num_samples=1, ks=(1,))
  source = Unanswered(EVERY)
  everything = found(run)
  hidden = [
    dataclasses.replace(
      x,
      record=x.record
      | {"answer": "", "true_false": None if x.index != UNREADABLE else False},
    )
    for x in everything.greedy
  ]
  unknown = evaluate.Evaluation({"eval/format": 1.0}, hidden, [hidden], {})
  evaluate.write(unknown, str(tmp_path), run.config, source)
  scores = read(tmp_path / "eval" / "scores.json")
  assert scores["accuracy"] is None and scores["graded"] == 0
  assert scores["note"] == figures.NO_ANSWERS
  assert "slices" not in scores and "sampled" not in scores
  results = read(tmp_path / "eval" / "output_eval.json")
  assert results["p0"]["prediction"] == "3"
  assert results["p0"]["true_false"] is None
  for name in ("report.md", "report.html"):
    text = (tmp_path / "eval" / name).read_text("utf-8")
    assert figures.NO_ANSWERS in text
    assert "%" not in text.split("<body>")[-1]


def test_a_damaged_image_is_only_missing_from_the_report(everything):
  answer = everything.greedy[UNREADABLE]
  example = evaluate._example(answer, everything.samples, Source(EVERY))
  assert (example.image, example.num_samples) == ("", NUM_SAMPLES)
  whole = evaluate._example(everything.greedy[1], [], Source(EVERY))
  assert whole.image.startswith("data:image/")
  assert everything.greedy[TOO_LONG].outcome == "not asked"


def test_problems_that_are_left_out_are_mentioned(
  everything, tokenizer, tmp_path, caplog
):
  config = run_of(Dicing, tokenizer, num_problems=11).config
  logging.set_verbosity(logging.WARNING)
  evaluate.write(everything, str(tmp_path), config, Source(EVERY))
  assert not caplog.messages
  more = Source([*EVERY, 0, 1])
  evaluate.write(everything, str(tmp_path), config, more)
  assert caplog.messages == [
    "eval.num_problems (11) leaves out 2 problems of eval."
  ]
