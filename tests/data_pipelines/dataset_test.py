"""A run's data: drawn once where none is named, refused where it may not be."""

import dataclasses
import hashlib
import json
import pathlib
import shutil

import numpy as np
import pytest

from configs import base
from data_pipelines import dataset, pipeline, prompt_rows
from data_pipelines.sources import mixtures
from data_pipelines.text import tokenizer as tokens
from grpo_tpu.config import schema as run_config
from tests.gcs import folders


def settings(**data):
  values = base.get_config()
  values.data.synthetic.num_problems = 40
  values.data.synthetic.image_size = 32
  values.data.synthetic.kinds = ("color", "count")
  values.data.synthetic_eval_fraction = 0.3
  values.data.prompts_per_step = 8
  values.eval.num_problems = 5
  values.eval.batch_size = 4
  values.data.update(data)
  return run_config.Config.from_config_dict(values)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  opened(settings(), folder)
  return folder


@pytest.fixture
def data_dir(workdir, tmp_path):
  """A copy of the data dir to do harm to, and its manifest."""
  shutil.copytree(workdir / "data", tmp_path / "data")
  return tmp_path / "data"


@pytest.mark.parametrize("enabled", [False, True])
def test_pan_and_scan_reaches_training_and_evaluation(workdir, enabled):
  """Drawn images are square, so a ratio of 1 is what cuts them in two."""
  numbers = dict(min_crop_size=8, max_num_crops=2, min_ratio_to_activate=1.0)
  config = settings(pan_and_scan=dict(enabled=enabled, **numbers))
  data = opened(config, workdir)
  training = next(train_batches(data, config))
  held_out = eval_batches(data, config)[0]
  for batch in (training, held_out):
    assert batch.images.shape[1] == (3 if enabled else 1)
    assert batch.valid.all()


def edit_manifest(data_dir: pathlib.Path, **changes) -> None:
  path = data_dir / "manifest.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def opened(config, workdir="/no/such/workdir", for_training=True):
  return dataset.open_dataset(
    config.data, config.model_inputs, str(workdir), for_training=for_training
  )


SHARD = {"shards": (0,), "shard_count": 1}


def train_batches(data, config, start_step=0, **shards):
  return data.train_batches(
    seed=config.seed,
    max_new_tokens=config.rollout.max_new_tokens,
    start_step=start_step,
    **SHARD | shards,
  )


def eval_batches(data, config, **shards):
  return data.eval_batches(
    num_problems=config.eval.num_problems,
    batch_size=config.eval.batch_size,
    **SHARD | shards,
  )


def preference_batches(data, config):
  return data.preference_batches(
    num_problems=config.eval.num_problems,
    batch_size=config.eval.batch_size,
    max_new_tokens=config.rollout.max_new_tokens,
    **SHARD,
  )


def test_a_set_is_drawn_under_the_workdir_once(workdir):
  manifest = workdir / "data" / "manifest.json"
  before = manifest.stat()
  data = opened(settings(), workdir)
  assert manifest.stat().st_mtime_ns == before.st_mtime_ns
  assert manifest.stat().st_ino == before.st_ino
  assert len(data.train) + len(data.eval) == 40
  assert len(data.eval) > 0


def test_the_drawn_set_of_a_run_is_not_drawn_anew(workdir, tmp_path):
  """An evaluation with other settings would leave a run without its data."""
  shutil.copytree(workdir / "data", tmp_path / "data")
  (tmp_path / "run.json").write_text("{}")
  before = opened(settings(), tmp_path).identity
  other = settings(synthetic_eval_fraction=0.4)
  with pytest.raises(
    ValueError,
    match=r"^data.synthetic must be .*eval_fraction was 0\.3 and is 0\.4\. Set",
  ):
    opened(other, tmp_path, for_training=False)
  assert opened(settings(), tmp_path).identity == before
  # Before there is a run, the settings decide.
  (tmp_path / "run.json").unlink()
  assert opened(other, tmp_path).identity != before


def test_data_in_a_bucket_are_those_on_a_disk(
  workdir, tmp_path, monkeypatch, bucket_here
):
  monkeypatch.setenv("HOME", str(tmp_path))
  folders.upload(bucket_here, workdir / "data", "data")
  folders.upload(bucket_here, workdir / "data", "sets/data")
  local, there = str(workdir / "data"), "gs://bucket/data"
  data, config = opened(settings(dir=there)), settings(dir=local)
  assert data.identity == opened(config).identity
  batches = [next(train_batches(x, config)) for x in (data, opened(config))]
  np.testing.assert_array_equal(*[x.prompt_ids for x in batches])
  np.testing.assert_array_equal(*[x.images for x in batches])
  first = data.train[0]
  assert mixtures.problems_by_pid(there, [first.pid]) == {first.pid: first}
  mixed = settings(dirs=((there, 0.5), ("gs://bucket/sets/data", 0.5)))
  assert len(opened(mixed).train) == 2 * len(data.train)
  edited = workdir / "data" / "manifest.json"
  manifest = json.loads(edited.read_text())
  manifest["files"]["tokenizer.model"] += 1
  put = bucket_here.store.put
  put("bucket", "data/manifest.json", json.dumps(manifest).encode(), "", {})
  with pytest.raises(
    ValueError, match=r"^data.dir \('gs://bucket/data'\) must"
  ):
    opened(settings(dir=there))


@pytest.mark.parametrize("place", ["gs://bucket/none", "gs://bucket/x"])
def test_what_is_no_data_dir_in_a_bucket_is_refused(bucket_here, place):
  bucket_here.store.put("bucket", "x/manifest.json", b"{", "", {})
  with pytest.raises(ValueError, match="prepare has made: .*manifest.json"):
    opened(settings(dir=place))


def test_a_set_of_a_workdir_in_a_bucket_is_drawn_on_each_host(
  workdir, tmp_path, monkeypatch, bucket_here
):
  """It is put into the workdir by one, and never over what is there."""
  monkeypatch.setenv("HOME", str(tmp_path))
  data = opened(settings(), "gs://bucket/run")
  assert data.identity == opened(settings(), workdir).identity
  assert not bucket_here.store.objects
  data.publish()
  names = {
    x.relative_to(workdir).as_posix() for x in workdir.rglob("data/**/*")
  }
  published = {name for _, name in bucket_here.store.objects}
  assert published == {f"run/{x}" for x in names if (workdir / x).is_file()}
  generations = [x.generation for x in bucket_here.store.objects.values()]
  opened(settings(), "gs://bucket/run").publish()
  blobs = bucket_here.store.objects.values()
  assert generations == [blob.generation for blob in blobs]
  bucket_here.store.put("bucket", "run/run.json", b"{}", "", {})
  with pytest.raises(ValueError, match="^data.synthetic must be"):
    opened(settings(synthetic_eval_fraction=0.4), "gs://bucket/run")
  bucket_here.store.put("bucket", "2/data/thesis.tex", b"dear", "", {})
  with pytest.raises(ValueError, match="thesis.tex"):
    opened(settings(), "gs://bucket/2")


def test_data_that_a_user_prepared_are_never_drawn_over(data_dir):
  edit_manifest(data_dir, source="/data/mine")
  before = (data_dir / "manifest.json").read_bytes()
  with pytest.raises(
    ValueError,
    match=rf"^data.dir \(''\) must be set, .*/data/mine.*data.dir={data_dir}",
  ):
    opened(settings(), data_dir.parent)
  assert (data_dir / "manifest.json").read_bytes() == before
  assert opened(settings(dir=str(data_dir))).identity


def test_prompts_of_any_problems_equal_those_of_the_eval_split(workdir):
  """Row by row, with padding after them."""
  data = opened(settings(), workdir)
  problems = [data.eval[2], data.eval[0]]
  prompts = data.make_prompts(problems, batch_size=4)
  split = data.eval_batches(num_problems=3, batch_size=3, **SHARD)[0]
  np.testing.assert_array_equal(prompts.images[:2], split.images[[2, 0]])
  np.testing.assert_array_equal(
    prompts.prompt_ids[:2], split.prompt_ids[[2, 0]]
  )
  np.testing.assert_array_equal(prompts.valid, [True, True, False, False])


def test_a_data_dir_that_is_named_needs_no_workdir(workdir):
  data = opened(settings(dir=str(workdir / "data")))
  assert data.identity == opened(settings(), workdir).identity


def test_identity_is_that_of_records_and_tokenizer(workdir, data_dir):
  data = opened(settings(dir=str(data_dir)))
  assert data.identity["data.dir: its tokenizer"] == data.tokenizer.fingerprint
  edit_manifest(data_dir, fingerprint="others")
  others = opened(settings(dir=str(data_dir)))
  assert others.identity == data.identity | {"data.dir: its records": "others"}


def test_the_models_own_tokenizer_stands_in_for_the_data_dirs(workdir, own):
  """Gemma's own, were the model one of the released sizes."""
  path = str(own / "tokenizer.model")
  own = tokens.Tokenizer(path)
  assert own.vocab_size == 1024
  without = opened(settings(), workdir)
  data = opened(settings(tokenizer=path), workdir)
  assert data.tokenizer.fingerprint == own.fingerprint
  assert data.identity == without.identity | {
    "data.tokenizer: its contents": own.fingerprint
  }


def test_a_tokenizer_of_another_model_is_refused(workdir, tmp_path):
  tokens.train(["one two three"] * 9, tmp_path / "own.model", vocab_size=512)
  pattern = r"data.tokenizer \('.*own.model'\) has \d+ pieces.*1024 embed"
  with pytest.raises(ValueError, match=pattern):
    opened(settings(tokenizer=str(tmp_path / "own.model")), workdir)
  with pytest.raises(ValueError, match="data.tokenizer .* must be the model's"):
    opened(settings(tokenizer=str(tmp_path / "none.model")), workdir)


def opened_with(weights, workdir, name="tiny", **data):
  """The data set of a model with other weights, which are not looked at."""
  model = settings(**data).model
  config = dataclasses.replace(
    settings(**data), model=dataclasses.replace(model, name=name)
  )
  return dataset.open_dataset(
    config.data,
    dataclasses.replace(config.model_inputs, weights=weights),
    str(workdir),
    for_training=False,
  )


@pytest.fixture(scope="module")
def own(tmp_path_factory):
  """A folder with a tokenizer, as weights have one beside them."""
  folder = tmp_path_factory.mktemp("own")
  texts = [f"{i:x} of {i * 7919:x} is {i * 104729:b}" for i in range(3000)]
  tokens.train(texts, folder / "tokenizer.model", vocab_size=1024)
  return folder


def test_the_tokenizer_beside_weights_is_the_default(workdir, own):
  fingerprint = tokens.Tokenizer(own / "tokenizer.model").fingerprint
  data = opened_with(f"hf:{own}", workdir)
  assert data.tokenizer.fingerprint == fingerprint
  assert data.identity["data.tokenizer: its contents"] == fingerprint
  # One that is named comes first.
  named = str(workdir / "data" / "tokenizer.model")
  data = opened_with(f"hf:{own}", workdir, tokenizer=named)
  assert data.tokenizer.fingerprint != fingerprint


@pytest.mark.parametrize("beside", [False, True])
def test_released_weights_want_their_own_tokenizer(
  workdir, own, tmp_path, beside
):
  """Not one of another size, nor the small one of the data."""
  folder = own if beside else tmp_path
  with pytest.raises(ValueError) as caught:
    opened_with(f"hf:{folder}", workdir, name="gemma3_4b")
  if beside:
    assert f"model.weights ('hf:{folder}') has 1024 pieces" in str(caught.value)
  else:
    assert str(caught.value).startswith("data.tokenizer ('') must name Gemma's")
    assert (
      f"hf download google/gemma-3-4b-it tokenizer.model --local-dir {folder}"
      in str(caught.value)
    )


def test_random_weights_of_a_released_size_read_the_small_tokenizer(workdir):
  folder = str(workdir / "data")
  data = opened_with("random:0", workdir, name="gemma3_4b", dir=folder)
  assert data.identity == opened(settings(), workdir).identity


def write_record(folder, data, identity, weights="random:0"):
  folder.mkdir()
  config = {"data": {"tokenizer": "", "dir": ""} | data}
  record = {"config": config, "data": identity, "weights": weights}
  (folder / "run.json").write_text(json.dumps(record))
  return f"run:{folder}"


def test_a_run_hands_on_the_tokenizer_that_it_was_trained_with(
  workdir, own, tmp_path
):
  small = opened(settings(), workdir).identity
  small_print = small["data.dir: its tokenizer"]
  beside = tokens.Tokenizer(own / "tokenizer.model").fingerprint
  first = write_record(
    tmp_path / "first",
    {"tokenizer": str(own / "tokenizer.model")},
    {"data.tokenizer: its contents": beside},
  )
  data = opened_with(first, workdir)
  assert data.tokenizer.fingerprint == beside
  # That of its own weights, and so of the run before it.
  second = write_record(
    tmp_path / "second",
    {},
    {"data.tokenizer: its contents": beside},
    weights=f"{first}@7",
  )
  assert opened_with(f"{second}@9", workdir).tokenizer.fingerprint == beside
  # That of its data, which is that of these data: nothing else is recorded.
  third = write_record(
    tmp_path / "third",
    {"dir": str(workdir / "data")},
    {"data.dir: its tokenizer": small_print},
  )
  assert opened_with(third, workdir).identity == small


def test_a_run_whose_tokenizer_is_gone_or_changed_is_refused(
  workdir, own, tmp_path
):
  """Its model knows other ids than those of these data."""
  for number, folder in enumerate(("/no/such", str(workdir / "data"))):
    weights = write_record(
      tmp_path / f"{number}",
      {"dir": folder},
      {"data.dir: its tokenizer": "other"},
    )
    with pytest.raises(
      ValueError, match=rf"^model.weights .*trained with another.*{folder}"
    ):
      opened_with(weights, workdir)
    with pytest.raises(ValueError, match="must have a field 'config'"):
      (tmp_path / f"{number}" / "run.json").write_text('{"data": {}}')
      opened_with(weights, workdir)


def test_a_run_that_starts_from_itself_is_refused(workdir, tmp_path):
  weights = write_record(
    tmp_path / "run",
    {},
    {"data.tokenizer: its contents": "x"},
    weights=f"run:{tmp_path}/run",
  )
  with pytest.raises(ValueError, match="must not start from itself"):
    opened_with(weights, workdir)


def test_files_that_are_not_those_of_the_manifest_are_noticed(
  workdir, own, data_dir
):
  """A record file of another length; a tokenizer of the same length."""
  model = data_dir / "tokenizer.model"
  shutil.copy(own / "tokenizer.model", model)
  files = json.loads((data_dir / "manifest.json").read_text())["files"]
  files["tokenizer.model"] = model.stat().st_size
  edit_manifest(data_dir, files=files)
  with pytest.raises(ValueError, match="holds another tokenizer; prepare the"):
    opened(settings(dir=str(data_dir)))
  (data_dir / "problems" / "1.0.0" / "features.json").unlink()
  with pytest.raises(
    ValueError, match=r"^data.dir .*features.json had \d+ bytes and has no"
  ):
    opened(settings(dir=str(data_dir)))


def write_replies(path, pids, rejected="no"):
  """A file in which every problem has the same three replies."""
  completions = [
    {"text": text, "label": label}
    for text, label in (("yes", 2), (rejected, -1), ("maybe", 1))
  ]
  path.write_text(
    "".join(
      json.dumps({"pid": pid, "completions": completions}) + "\n"
      for pid in pids
    )
  )


@pytest.mark.parametrize("kind", prompt_rows.KINDS)
def test_replies_come_to_a_run_on_preferences_alone(workdir, kind):
  config = settings(kind=kind, preference_completions=3)
  data = opened(config, workdir)
  assert (data.completions is None) == (kind != "preference")
  for batch in (
    next(train_batches(data, config)),
    preference_batches(data, config)[0],
  ):
    if kind == "preference":
      assert batch.labels is not None
      assert (np.nansum(batch.labels, axis=1) == batch.valid).all()
      assert np.isfinite(batch.labels[:, 2]).any()
    else:
      assert batch.labels is None
  # Nothing but a file of replies is read besides the records.
  assert data.identity == opened(settings(), workdir).identity


def test_a_file_of_replies_is_what_batches_bring(workdir, tmp_path):
  path = tmp_path / "replies.jsonl"
  config = settings(kind="preference", preference_file=str(path))
  asked = opened(settings(), workdir)
  write_replies(
    path, [row.pid for rows in (asked.train, asked.eval) for row in rows]
  )
  data = opened(config, workdir)
  for batch in (
    next(train_batches(data, config)),
    preference_batches(data, config)[0],
  ):
    assert batch.valid.all() and batch.completion_ids is not None
    assert (batch.labels == [2, -1]).all()
    for ids in batch.completion_ids:
      assert [data.tokenizer.decode(x) for x in ids] == ["yes", "no"]


def test_problems_are_asked_whether_or_not_a_file_has_replies(
  workdir, tmp_path
):
  path = tmp_path / "replies.jsonl"
  write_replies(path, ["no such pid"])
  config = settings(kind="preference", preference_file=str(path))
  data = opened(config, workdir, for_training=False)
  batch = eval_batches(data, config)[0]
  assert batch.valid.all() and batch.labels is None
  assert not preference_batches(data, config)[0].valid.any()
  with pytest.raises(ValueError, match="^none of the .* can be used"):
    opened(config, workdir)


def test_nothing_is_drawn_for_a_run_whose_file_of_replies_is_bad(tmp_path):
  config = settings(kind="preference", preference_file=str(tmp_path / "none"))
  with pytest.raises(ValueError, match="^data.preference_file"):
    opened(config, tmp_path / "new")
  assert not (tmp_path / "new").exists()


def test_identity_has_the_hash_of_a_file_of_replies(workdir, tmp_path):
  path = tmp_path / "replies.jsonl"
  config = settings(kind="preference", preference_file=str(path))
  hashes = []
  for rejected in ("no", "no", "perhaps"):
    write_replies(path, ["1"], rejected)
    identity = opened(config, workdir, for_training=False).identity
    hashes.append(identity["data.preference_file: its contents"])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert identity == opened(settings(), workdir).identity | {
      "data.preference_file: its contents": digest
    }
  assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("written", [None, "{"])
def test_a_bad_file_of_replies_is_refused_when_the_data_is_opened(
  workdir, tmp_path, written
):
  path = tmp_path / "replies.jsonl"
  if written is not None:
    path.write_text(written)
  config = settings(kind="preference", preference_file=str(path))
  with pytest.raises(ValueError, match="^data.preference_file .*replies.jsonl"):
    opened(config, workdir)
  # Of the other kinds, none reads it.
  opened(settings(preference_file=str(path)), workdir)


def test_the_settings_reach_prompts_and_replies(workdir):
  """A template in both splits; shuffling in training; the kinds drawn."""

  def first_batches(**changes):
    config = settings(kind="preference", **changes)
    data = opened(config, workdir)
    train = next(train_batches(data, config))
    texts = [
      data.tokenizer.decode(ids)
      for batch in (train, eval_batches(data, config)[0])
      for ids in batch.prompt_ids
    ]
    wrong = [data.tokenizer.decode(ids[1]) for ids in train.completion_ids]
    return train, texts, [text for text in wrong if text]

  plain, texts, wrong = first_batches()
  assert all("<answer>...</answer>" in text for text in texts[:8])
  boxed, texts, _ = first_batches(prompt_template="boxed")
  assert sum(r"\boxed{...}" in text for text in texts) >= 8 + 4
  assert not any("<answer>" in text for text in texts[:8])
  mixed, _, _ = first_batches(shuffle_options=True)
  for other in (boxed, mixed):
    assert [p.pid for p in other.problems] == [p.pid for p in plain.problems]
  assert boxed.problems == plain.problems != mixed.problems
  _, _, refusals = first_batches(preference_kinds=("refusal",))
  assert len(refusals) == 8 and not set(refusals) & set(wrong)


def test_a_template_file_reaches_prompts_and_the_identity(workdir, tmp_path):
  path = tmp_path / "mine.jinja"
  config = settings(prompt_template=str(path), system_prompt="Be brief.")
  plain, seen = opened(settings(), workdir).identity, set()
  for mark in ("!", "?"):
    path.write_text(f"{{{{ question }}}}\nPut it in <answer>{mark}")
    data = opened(config, workdir)
    problem = data.eval[0]
    prompt = data.make_prompts([problem], batch_size=1).prompt_ids[0]
    prompt = [token for token in prompt.tolist() if token > 107]
    asked = f"{problem.question}\nPut it in <answer>{mark}"
    for text in ("Be brief.\n\n", asked):
      ids = [x for x in data.tokenizer.encode(text) if x > 107]
      assert any(prompt[i : i + len(ids)] == ids for i in range(len(prompt))), (
        text
      )
    ((name, fingerprint),) = data.identity.items() - plain.items()
    assert name == "data.prompt_template: its text"
    seen.add(fingerprint)
  assert len(seen) == 2
  path.write_text("{{ question }}<answer>\n{{ metadata.topic }}")
  with pytest.raises(ValueError, match="mine.jinja.*line 2.*'topic'"):
    opened(config, workdir)
  # Pictures are in every drawn problem, so none is an example.
  with pytest.raises(
    ValueError, match=r"^data.few_shot \(1\) must be at most 0"
  ):
    opened(settings(few_shot=1), workdir)


def test_a_missing_template_is_refused_before_data_are_drawn(tmp_path):
  config = settings(prompt_template=str(tmp_path / "none.jinja"))
  with pytest.raises(
    ValueError, match="^data.prompt_template .*cannot be read"
  ):
    opened(config, tmp_path / "new")
  assert not (tmp_path / "new").exists()


def test_training_on_mathvista_needs_its_terms_accepted(data_dir):
  edit_manifest(data_dir, terms="mathvista")
  config = settings(dir=str(data_dir))
  with pytest.raises(
    ValueError, match=r"^data.accept_mathvista_training_terms \(False\).*licen"
  ):
    opened(config)
  accepted = dataclasses.replace(
    config.data, accept_mathvista_training_terms=True
  )
  opened(dataclasses.replace(config, data=accepted))
  # The licence allows what only evaluates.
  opened(config, for_training=False)


def test_a_tokenizer_larger_than_the_models_is_refused(data_dir):
  edit_manifest(data_dir, tokenizer={"vocab_size": 1025, "fingerprint": "x"})
  with pytest.raises(
    ValueError, match=r"^model.name \('tiny'\) has 1024 .*1025"
  ):
    opened(settings(dir=str(data_dir)))


@pytest.mark.parametrize("name", ["train_split", "eval_split"])
def test_a_split_that_is_not_there_is_refused(data_dir, name):
  with pytest.raises(
    ValueError, match=rf"^data.{name} \('tset'\).*train, eval"
  ):
    opened(settings(dir=str(data_dir), **{name: "tset"}))


LEFT_OUT = "data.dir: its records left out"


def test_identity_names_the_records_that_training_leaves_out(workdir):
  """What the buckets, the tokenizer or the template leave out of the order."""
  whole = opened(settings(), workdir)
  assert LEFT_OUT not in whole.identity
  lengths = sorted(whole.train_index.lengths.tolist())
  middle, longest = lengths[len(lengths) // 2], lengths[-1]
  assert middle < longest, "prompts differ in length"
  named = []
  for bucket in (middle, longest - 1):
    data = opened(settings(prompt_buckets=(bucket,)), workdir)
    named.append(data.identity.pop(LEFT_OUT))
    assert data.identity == whole.identity
    count = sum(length > bucket for length in lengths)
    assert named[-1].startswith(f"{count} of {len(lengths)}, sha256 ")
  assert named[0] != named[1]
  bucketed = opened(settings(prompt_buckets=(longest,)), workdir)
  assert bucketed.identity == whole.identity


def test_an_evaluation_needs_no_split_to_train_on(data_dir):
  """As `prepare --eval_fraction=1` makes it, for all of testmini."""
  edit_manifest(data_dir, counts={"eval": 1}, files={})
  for path in (data_dir / "problems" / "1.0.0").glob("*-train.*"):
    path.unlink()
  config = settings(dir=str(data_dir))
  data = opened(config, for_training=False)
  assert data.train is None and len(data.eval) > 0
  with pytest.raises(ValueError, match=r"^data.train_split \('train'\)"):
    opened(config)


def test_worker_processes_are_those_of_the_settings(workdir, monkeypatch):
  seen = []
  monkeypatch.setattr(
    pipeline, "TrainBatches", lambda *_, **given: seen.append(given)
  )
  config = settings(worker_processes=3)
  train_batches(opened(config, workdir), config)
  assert [given["worker_processes"] for given in seen] == [3]


@pytest.mark.parametrize("manifest", [None, "", "{"])
def test_a_folder_that_prepare_has_not_finished_is_refused(tmp_path, manifest):
  if manifest is not None:
    (tmp_path / "manifest.json").write_text(manifest)
  with pytest.raises(ValueError, match="^data.dir .*data_pipelines.prepare"):
    opened(settings(dir=str(tmp_path)))


def test_shards_share_the_rows_of_a_step_and_of_an_evaluation(workdir):
  config = settings()
  data = opened(config, workdir)

  def pids(shard_count):
    rows = []
    for shard in range(shard_count):
      place = {"shards": (shard,), "shard_count": shard_count}
      train = next(train_batches(data, config, start_step=1, **place))
      rows += train.problems
    evaluated = [
      row
      for batches in zip(
        *(
          eval_batches(data, config, shards=(shard,), shard_count=shard_count)
          for shard in range(shard_count)
        ),
        strict=True,
      )
      for batch in batches
      for row in batch.problems
    ]
    return [row.pid for row in rows], [row.pid for row in evaluated]

  assert pids(1) == pids(2)
  train, evaluated = pids(1)
  assert len(set(train)) == 8
  # Five problems fill two batches of four, with three rows of padding.
  assert len(evaluated) == 8 and evaluated.count("") == 3
