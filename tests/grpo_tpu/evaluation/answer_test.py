"""--mode=answer: what it writes, what it asks, and what it refuses."""

import dataclasses
import io
import itertools
import json
import sys

import jax
import numpy as np
import PIL.Image
import pytest

from configs import smoke
from data_pipelines import dataset
from data_pipelines.text import chat_prompts
from data_pipelines.text import tokenizer as tokens
from data_pipelines.validation import SettingError
from grpo_tpu.checkpoint import load
from grpo_tpu.config.schema import Config
from grpo_tpu.distributed import sharding
from grpo_tpu.evaluation import answer
from grpo_tpu.rollout.sampler import Sampler
from tests.grpo_tpu import conftest, scripted

QUESTION = "What color is the square?"


def png(color=(40, 80, 220)):
  file = io.BytesIO()
  PIL.Image.new("RGB", (20, 10), color).save(file, "PNG")
  return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The workdir of a run with its tokenizer, a picture, and files of none."""
  folder = tmp_path_factory.mktemp("files")
  scripted.make_tokenizer(folder)
  config = smoke.get_config().to_dict()
  config["data"]["dir"] = str(folder)
  record = {"config": config, "weights": "random:0", "data": {}}
  (folder / "run.json").write_text(json.dumps(record))
  (folder / "blue.png").write_bytes(png())
  (folder / "noise.png").write_bytes(np.random.default_rng(0).bytes(3000))
  (folder / "cut.png").write_bytes(png()[:-30])
  return folder


def config_of(folder, **sections):
  values = smoke.get_config().to_dict()
  values["data"]["prompt_buckets"] = (128,)
  values["model"]["weights"] = f"run:{folder}"
  values["rollout"]["max_new_tokens"] = 12
  for name, section in sections.items():
    values[name] |= section
  return Config.from_config_dict(values)


@pytest.mark.parametrize(
  "temperature", [1.5, pytest.param(0.0, marks=pytest.mark.nightly)]
)
@pytest.mark.usefixtures("quick_compile")
def test_the_text_is_that_of_a_rollout(
  folder, temperature, capsys, monkeypatch
):
  """Of the same key, token for token.

  With the same chunks, so that the programs are compiled once; those of any
  size give the same tokens, see `generate_test`.
  """
  config = config_of(folder)
  data = dataset.open_prompts(config.data, config.model_inputs)
  config = config_of(folder, model={"weights": "random:0"})
  problem = data.make_question(QUESTION, [])
  mesh = conftest.mesh_of()
  monkeypatch.setattr(sharding, "make_mesh", lambda **_: mesh)
  answer.run(config, data, [problem], temperature, 3)
  text = capsys.readouterr().out
  settings = {"chunk_tokens": 1, "pictures_per_shard": 1}
  settings = dataclasses.replace(config.rollout, **settings)
  sampler = Sampler(config.model, settings, mesh, data.tokenizer)
  with jax.set_mesh(mesh):
    completions = sampler.sample(
      load.load_params(config.model, mesh),
      data.make_prompts([problem], batch_size=1),
      jax.random.key(config.seed),
      num_completions=3,
      temperature=temperature,
    ).completions
  texts = sampler.texts(completions)[0]
  assert all(texts) and len(set(texts)) == (3 if temperature else 1)
  assert text == "".join(f"[{i}] {x}\n" for i, x in enumerate(texts, start=1))


def test_no_call_shows_what_a_later_token_changes(folder):
  """Among whole characters, parts of some, and bytes that are none."""
  tokenizer = tokens.Tokenizer(folder / "tokenizer.model")
  rng = np.random.default_rng(0)
  whole = tokenizer.encode("π€ 😀é \N{REPLACEMENT CHARACTER}x")
  rows = []
  for length in (30, 1, 45, 60):
    noise = rng.choice([*whole, *rng.integers(110, 512, 20)], length)
    rows.append([*noise.tolist(), *whole, *noise[: length // 3].tolist()])
  before, shown, lags = [[]] * len(rows), "", set()
  for t in itertools.count(1):
    now = [row[:t] for row in rows]
    text = answer.text_so_far(tokenizer.decode, now, before)
    assert text.startswith(shown)
    number = text.count("\n") - "".join(map(tokenizer.decode, rows)).count("\n")
    if now == before:
      break
    last = text.rpartition(f"[{number + 1}] ")[2]
    lags.add(len(tokenizer.decode(now[number])) - len(last))
    before, shown = now, text
  assert lags == {0, 1, 2, 3}
  whole_texts = enumerate(map(tokenizer.decode, rows), start=1)
  assert text == "".join(f"[{i}] {each}\n" for i, each in whole_texts)
  assert not answer.text_so_far(tokenizer.decode, [[]], [[]]).strip()


def test_a_question_is_asked_as_in_training(folder):
  """The same prompt and pixels as of a problem, with the system's text."""
  config = config_of(folder, data={"system_prompt": "Be brief."})
  data = dataset.open_prompts(config.data, config.model_inputs)
  problem = scripted.make_problem(0)
  asked = data.make_question(problem.query, problem.images)
  ours = data.make_prompts([asked], batch_size=1)
  theirs = data.make_prompts([problem], batch_size=1)
  np.testing.assert_array_equal(ours.prompt_ids, theirs.prompt_ids)
  np.testing.assert_array_equal(ours.images, theirs.images)
  text = data.tokenizer.decode([x for x in ours.prompt_ids[0] if x > 107])
  for part in ("Be brief.", problem.query, chat_prompts.TAGGED.instruction):
    assert part in text


@pytest.mark.parametrize(
  ("question", "files", "words"),
  [
    ("", [], r"--question \(''\) .*empty"),
    (" \n", ["blue.png"], r"--question .*empty"),
    ("a\udcffb", [], "--question .*surrogate"),
    ("Is it <image> or <image>?", ["blue.png"], "2 marks <image> for 1 pict"),
    ("Is it <image>?", [], "1 marks <image> for 0 pictures"),
    ("Is it <image>?", ["blue.png"] * 2, "1 marks <image> for 2 pictures"),
    (QUESTION, ["blue.png"] * 17, "17 pictures; at most 16"),
    ("7" * 300, [], r"has 3\d\d tokens, more than .*prompt_buckets \(128\)"),
    (QUESTION, ["noise.png"], r"--image \('.*noise.png'\) .*none of PNG"),
    (QUESTION, ["cut.png"], r"--image \('.*cut.png'\) .*truncated"),
    (QUESTION, ["none.png"], r"--image \('.*none.png'\) .*No such file"),
    (QUESTION, ["."], r"--image .* must be a regular file"),
  ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(
  folder, question, files, words
):
  """Without weights: there are none to load."""
  config = config_of(folder)
  files = [str(folder / name) for name in files]
  with pytest.raises(ValueError, match=words) as caught:
    answer.open_answers(config, question, files, 0.0, 1)
  assert "\n" not in str(caught.value)


def test_a_text_model_sees_no_picture(folder):
  config = config_of(folder)
  inputs = dataclasses.replace(config.model_inputs, image_size=0, name="text")
  data = dataset.open_prompts(config.data, inputs)
  assert data.make_question(QUESTION, []).question == QUESTION
  with pytest.raises(ValueError, match=r"pictures, which model.name \('text'"):
    data.make_question(QUESTION, [png()])


@pytest.mark.parametrize("temperature", [float("nan"), float("inf")])
def test_a_temperature_is_finite(folder, temperature):
  with pytest.raises(ValueError, match="^--temperature .* finite"):
    answer.open_answers(config_of(folder), QUESTION, [], temperature, 1)


def test_a_tokenizer_is_named_or_stands_in_the_data(folder):
  config = config_of(folder, model={"weights": "random:0"})
  with pytest.raises(ValueError, match=r"^data.dir \(''\) .*tokenizer"):
    answer.open_answers(config, QUESTION, [], 0.0, 1)


def typed(monkeypatch, text):
  lines = io.TextIOWrapper(io.BytesIO(text.encode(errors="surrogateescape")))
  monkeypatch.setattr(sys, "stdin", lines)


def test_typed_questions_show_the_pictures_named_before_them(
  folder, monkeypatch
):
  config = config_of(folder)
  data = dataset.open_prompts(config.data, config.model_inputs)
  red, blue = png((220, 40, 40)), png()
  (folder / "red one.png").write_bytes(red)
  lines = ["One?", f"/image {folder}/blue.png", "Two?", "Three?"]
  lines += [f"/image {folder}/red one.png", "Four?", "/image", "Five?"]
  lines += [f"/image {folder}/blue.png", f"/image {folder}/red one.png"]
  typed(monkeypatch, "\n".join([*lines, "Six?", "", "Never."]))
  asked = [(x.question, x.images) for x in answer._read_questions(data, [red])]
  assert asked == [
    *(("One?", (red,)), ("Two?", (blue,)), ("Three?", (blue,))),
    *(("Four?", (red,)), ("Five?", ()), ("Six?", (blue, red))),
  ]


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("", "--question .*standard input"),
    ("\nWhat?\n", "--question .*standard input"),
    ("7" * 300, "has 3.. tokens"),
    ("/image noise.png\nWhat?", "--image"),
    ("\udcff?", "can't decode"),
  ],
)
def test_bad_lines_of_a_pipe_are_refused(folder, monkeypatch, text, words):
  typed(monkeypatch, text.replace("noise", f"{folder}/noise"))
  with pytest.raises(ValueError, match=words):
    answer.open_answers(config_of(folder), None, [], 0.0, 1)


@pytest.mark.parametrize("line", ["7" * 300, "/image none.png", "\udcff"])
def test_a_bad_line_after_the_first_is_a_user_error(folder, monkeypatch, line):
  # More than the buffer, so that the bad line is decoded later.
  typed(monkeypatch, f"What?\n/image{' ' * 9000}\n{line}")
  run = answer.open_answers(config_of(folder), None, [], 0.0, 1)
  _, _, problems, *_ = run.args
  assert next(problems).question == "What?"
  with pytest.raises(SettingError):
    next(problems)
