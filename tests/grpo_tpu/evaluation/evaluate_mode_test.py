"""--mode=evaluate: samples, ablations and files of a scripted policy."""

import collections
import concurrent.futures
import dataclasses
import itertools
import json
import pathlib
import threading
import types

import jax
import numpy as np
import pytest
from absl import logging

from data_pipelines import validation
from data_pipelines.scoring import pages
from grpo_tpu.config import schema as run_config
from grpo_tpu.distributed import collectives
from grpo_tpu.evaluation import evaluate, outputs, scores
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
  """Completes greedily by the script; the key decides if a sample is right."""

  def sample(self, params, prompts, key, *, num_completions, temperature, **_):
    completions = {f"p{i}": [text] for i, (*_, text) in enumerate(SCRIPT)}
    if temperature:
      assert temperature == SETTINGS["temperature"]
      keys = sampling.row_keys(key, prompts.prompt_index, num_completions)
      dice = jax.vmap(jax.vmap(lambda key: jax.random.randint(key, (), 0, 3)))(
        keys
      )
      completions = {
        problem.pid: [
          f"<answer>{(problem.answer, 'red', '99')[face]}</answer>"
          for face in row
        ]
        for problem, row in zip(prompts.problems, dice.tolist(), strict=True)
      }
    self.completions = completions
    return super().sample(params, prompts, key, num_completions=num_completions)


class Seeing(scripted.ScriptedSampler):
  """Answers right if the image is the problem's own, by its shade of red."""

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


def evaluate_all(run, batch_size=11, indices=EVERY):
  sources = evaluate.make_ablated_sources(run.config, Source(indices))
  batches = batches_of(run.tokenizer, batch_size=batch_size, indices=indices)
  return evaluate.evaluate_set(
    run.sampler, {}, batches, run.config, ablated_sources=sources
  )


@pytest.fixture(scope="module")
def everything(tokenizer):
  return evaluate_all(run_of(Dicing, tokenizer))


def test_every_problem_has_its_completions_in_order(everything):
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


def test_evaluate_gives_the_figures_of_all_completions(everything, tokenizer):
  """A data set as `open_dataset` gives it has the source and its batches."""
  run = run_of(Dicing, tokenizer)
  asked = {}

  def eval_batches(**options):
    asked.update(options)
    return batches_of(run.tokenizer, batch_size=options["batch_size"])

  data = types.SimpleNamespace(
    eval=Source(EVERY), eval_batches=eval_batches, settings=run.config.data
  )
  figures = evaluate.evaluate(run.sampler, {}, data, run.config)
  assert figures == everything.figures(SETTINGS["ks"])
  assert figures["accuracy"]["share"] == len(RIGHT) / len(EVERY)
  assert asked["num_problems"] == run.config.eval.num_problems
  assert (asked["shards"], asked["shard_count"]) == ((0,), 1)


@pytest.mark.parametrize(
  ("batch_size", "num_devices"), [(3, 1), (16, 1), (8, 8)]
)
def test_neither_batch_size_nor_devices_change_an_answer(
  everything, tokenizer, batch_size, num_devices
):
  got = evaluate_all(run_of(Dicing, tokenizer, num_devices), batch_size)
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
  assert faces(evaluate_all(other)) != table


def test_every_sample_counts(everything):
  figures = scores.compute(
    everything.greedy,
    samples=everything.samples,
    ks=SETTINGS["ks"],
    ablated={},
  )
  right = np.array(
    [[x.is_right for x in draw] for draw in everything.samples]
  )  # [draws, problems]
  sampled = figures["sampled"]
  assert sampled["accuracy"]["share"] == pytest.approx(right.mean())
  assert sampled["pass_at_k"]["1"]["share"] == pytest.approx(right.mean())
  assert sampled["maj_at_k"]["1"]["share"] == pytest.approx(right.mean())
  assert sampled["pass_at_k"]["6"]["share"] == right.any(0).mean()
  wins = 0
  for row in zip(*everything.samples, strict=True):
    votes = [x.record["strict_answer"] for x in row]
    counts = collections.Counter(x for x in votes if x is not None)
    if counts:
      most = max(counts.values())
      winner = next(x for x in votes if counts.get(x) == most)
      wins += row[votes.index(winner)].is_right
  assert sampled["maj_at_k"]["6"]["share"] == pytest.approx(wins / len(EVERY))


def test_the_metrics_of_samples_are_the_figures_and_those_of_brute_force(
  everything,
):
  """pass@2 is the share of right ones among all pairs of draws."""
  sampled = everything.figures(SETTINGS["ks"])["sampled"]
  scalars = everything.scalars
  assert scalars["eval/mean_at_6"] == pytest.approx(
    sampled["accuracy"]["share"]
  )
  for k in SETTINGS["ks"]:
    wanted = np.mean(
      [
        any(x.is_right for x in chosen)
        for row in zip(*everything.samples, strict=True)
        for chosen in itertools.combinations(row, k)
      ]
    )
    assert scalars[f"eval/pass_at_{k}"] == pytest.approx(wanted)
    assert sampled["pass_at_k"][str(k)]["share"] == pytest.approx(wanted)


def test_samples_without_public_answers_have_no_metrics(everything):
  def hidden(answer):
    graded = False if answer.index == UNREADABLE else None
    record = answer.record | {"answer": "", "strict_true_false": graded}
    return dataclasses.replace(answer, record=record)

  draws = [[hidden(x) for x in draw] for draw in everything.samples]
  assert scores.sample_metrics(everything.samples, ks=(1,))
  assert scores.sample_metrics(draws, ks=(1,)) == {}
  assert scores.sample_metrics([], ks=(1,)) == {}


def test_each_set_has_samples_of_its_own(tokenizer):
  run = run_of(Dicing, tokenizer)
  batches = batches_of(run.tokenizer, batch_size=11)
  found = [
    evaluate.evaluate_set(run.sampler, {}, batches, run.config, name=name)
    for name in ("", "geo", "geo")
  ]
  assert found[1].samples == found[2].samples != found[0].samples
  assert found[1].greedy == found[0].greedy
  # Training folds the numbers of its batches, from 1 on, into the run's key.
  training = jax.random.fold_in(jax.random.key(0), 1)
  for name in ("", "geo"):
    key = jax.random.key_data(evaluate.sampling_key(0, name))
    assert (key != jax.random.key_data(training)).any()


def test_ablations_cost_only_a_policy_that_uses_the_image(
  tokenizer,
):
  for kind, kept in ((Dicing, RIGHT), (Seeing, ())):
    got = evaluate_all(run_of(kind, tokenizer, num_samples=0))
    real = RIGHT if kind is Dicing else ASKED
    assert [x.index for x in got.greedy if x.is_right] == list(real)
    for answers in got.ablated.values():
      assert [x.index for x in answers if x.is_right] == list(kept)


def test_samples_and_ablations_are_optional(tokenizer):
  run = run_of(Dicing, tokenizer, num_samples=0, ablations=())
  got = evaluate_all(run)
  assert (got.samples, got.ablated) == ([], {})


def test_a_text_model_has_no_ablations(tokenizer, monkeypatch):
  config = run_of(Dicing, tokenizer).config
  blind = dataclasses.replace(config.model_config, vision=None)
  monkeypatch.setattr(run_config.Config, "model_config", blind)
  assert evaluate.make_ablated_sources(config, Source(EVERY)) == {}


def test_images_that_cannot_be_shuffled_are_a_user_error(tokenizer):
  config = run_of(Dicing, tokenizer).config
  with pytest.raises(validation.SettingError, match="eval.ablations"):
    data = types.SimpleNamespace(eval=Source([0, UNREADABLE]))
    evaluate.run(config, "nowhere", data)


class Unanswered(Source):
  """The problems of a split whose answers are not public."""

  def __getitem__(self, index, /):
    return dataclasses.replace(super().__getitem__(index), answer="")


def test_there_is_no_ablation_without_answers(tokenizer):
  config = run_of(Dicing, tokenizer).config
  assert evaluate.make_ablated_sources(config, Unanswered(EVERY)) == {}


class Texts(Source):
  """The problems of a split without their images."""

  def __getitem__(self, index, /):
    return dataclasses.replace(super().__getitem__(index), images=())


def test_there_is_no_ablation_without_images(tokenizer):
  config = run_of(Dicing, tokenizer).config
  assert evaluate.make_ablated_sources(config, Texts(EVERY)) == {}


def test_completions_come_from_all_hosts(everything, monkeypatch):
  """Two threads stand for two hosts, each with its own rows."""
  host, sent, barrier = threading.local(), {}, threading.Barrier(2)

  def gather(data):
    sent[host.index] = data
    barrier.wait()
    both = [sent[0], sent[1]]
    barrier.wait()
    return both

  def answers_on(index):
    host.index = index
    # Rows of several batches, of very different numbers.
    kept = [x for x in everything.greedy if (x.index in (0, 1, 8)) != index]
    return evaluate._gather(kept)

  monkeypatch.setattr(collectives, "gather_bytes", gather)
  with concurrent.futures.ThreadPoolExecutor(2) as hosts:
    for answers in hosts.map(answers_on, range(2)):
      assert answers == everything.greedy


def write(evaluation, workdir, config, source, parts=()):
  facts = {
    "set": "",
    "split": config.data.eval_split,
    "split_size": len(source),
    "parts": parts,
    "model": config.model.name,
    "weights": config.model.weights,
    "seed": config.seed,
  }
  outputs.write(evaluation, workdir / "eval", source, config.eval, facts)


def read(path: pathlib.Path):
  text = path.read_text("utf-8")
  return json.loads(text, parse_constant=pytest.fail)


def test_written_files_hold_everything(everything, tokenizer, tmp_path):
  run = run_of(Dicing, tokenizer)
  write(everything, tmp_path, run.config, Source(EVERY))
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
  figures = read(folder / "scores.json")
  assert (figures["weights"], figures["split_size"]) == (
    "random:0",
    len(SCRIPT),
  )
  assert (figures["split"], figures["temperature"]) == ("eval", 0.7)
  assert figures["scalars"] == pytest.approx(everything.scalars)
  assert figures["accuracy"]["share"] == figures["scalars"]["eval/accuracy"]
  page = (folder / "report.html").read_text("utf-8")
  # Three of the four wrong answers are shown.
  assert page.count("<article") == page.count("data:image/png") == 3
  assert "output" not in page


def test_a_split_without_answers_is_written_with_a_note(tokenizer, tmp_path):
  run = run_of(Dicing, tokenizer, num_samples=1, ks=(1,))
  source = Unanswered(EVERY)
  everything = evaluate_all(run)
  hidden = [
    dataclasses.replace(
      x,
      record=x.record
      | {
        "answer": "",
        "strict_true_false": None if x.index != UNREADABLE else False,
      },
    )
    for x in everything.greedy
  ]
  unknown = outputs.Evaluation({"eval/format": 1.0}, [], hidden, [hidden], {})
  write(unknown, tmp_path, run.config, source)
  figures = read(tmp_path / "eval" / "scores.json")
  assert figures["accuracy"] is None and figures["graded"] == 0
  assert figures["note"] == scores.NO_ANSWERS
  assert "slices" not in figures and "sampled" not in figures
  results = read(tmp_path / "eval" / "output_eval.json")
  assert results["p0"]["strict_answer"] == "3"
  assert results["p0"]["strict_true_false"] is None
  for name in ("report.md", "report.html"):
    text = (tmp_path / "eval" / name).read_text("utf-8")
    assert scores.NO_ANSWERS in text
    assert "%" not in text.split("<body>")[-1]


def test_a_damaged_image_is_only_missing_from_the_report(everything):
  answer = everything.greedy[UNREADABLE]
  example = outputs.make_example(answer, everything.samples, Source(EVERY))
  assert not any(map(pages.image_uri, example.images))
  assert example.num_samples == NUM_SAMPLES
  whole = outputs.make_example(everything.greedy[1], [], Source(EVERY))
  (image,) = whole.images
  assert pages.image_uri(image).startswith("data:image/")
  assert everything.greedy[TOO_LONG].outcome == "not asked"


def test_a_warning_gives_the_number_of_problems_left_out(
  everything, tokenizer, tmp_path, caplog
):
  config = run_of(Dicing, tokenizer, num_problems=11).config
  logging.set_verbosity(logging.WARNING)
  write(everything, tmp_path, config, Source(EVERY))
  assert not caplog.messages
  more = Source([*EVERY, 0, 1])
  write(everything, tmp_path, config, more)
  assert caplog.messages == [
    "eval.num_problems (11) leaves out 2 problems of eval."
  ]


def test_a_part_of_a_source_is_named_in_log_and_report(
  everything, tokenizer, tmp_path, caplog
):
  logging.set_verbosity(logging.WARNING)
  config = run_of(Dicing, tokenizer).config
  part = "geo: eval is 13 of 20 problems of testmini; the rest is in train."
  write(everything, tmp_path, config, Source(EVERY), (part,))
  assert caplog.messages == [part]
  for name in ("report.md", "report.html"):
    assert part in (tmp_path / "eval" / name).read_text("utf-8")
