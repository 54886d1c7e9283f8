"""The problems and the tokenizer of a run, checked before devices start.

Draws the synthetic set under the workdir if the settings name no data dir; for
a workdir in a bucket on this machine's disk.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import logging

from data_pipelines import pipeline, prompt_rows, record_index, records
from data_pipelines.preferences import completions as preferences
from data_pipelines.settings import DataConfig, ModelInputs
from data_pipelines.sources import build, data_dirs, mixtures, stored
from data_pipelines.storage import host_copy, objects, paths
from data_pipelines.text import (
  chat_prompts,
  own_tokenizer,
  run_prompts,
  untrusted,
)
from data_pipelines.text import tokenizer as tokens
from data_pipelines.validation import require


@dataclasses.dataclass(frozen=True)
class Dataset:
  """The data that a run reads.

  Attributes:
    settings: The settings of the data.
    model: The inputs of the model.
    tokenizer: Encodes prompts and decodes completions.
    train: Problems to train on; None for a run that does not train.
    eval: Problems to evaluate on.
    eval_parts: A sentence for each source of which `eval` has only a part.
    drawn: The synthetic set that was drawn for the run, if any.
    shares: The share of each data set in the prompts, as whole numbers.
    completions: Labelled completions; None unless for kind "preference".
    identity: Fingerprints of records, tokenizers, files of completions and of a
      template, and of what training leaves out. A run resumes with equal ones.
    template: How prompts ask for completions.
    train_index: Sizes of the records to train on; None measures them later.
  """

  settings: DataConfig
  model: ModelInputs
  tokenizer: tokens.Tokenizer
  train: records.Source | None
  eval: records.Source
  shares: tuple[int, ...]
  completions: preferences.Source | None
  identity: dict[str, str]
  template: chat_prompts.Template = chat_prompts.TAGGED
  train_index: record_index.RecordIndex | None = None
  eval_parts: tuple[str, ...] = ()
  drawn: data_dirs.DataDir | None = None

  def train_batches(
    self, *, start_step: int, **builder: Any
  ) -> pipeline.TrainBatches:
    """The endless training batches of this process, after `start_step`.

    `builder` holds `seed`, `max_new_tokens`, `shards` and `shard_count`.
    """
    return pipeline.TrainBatches(
      self._train_builder(**builder),
      index=self.train_index,
      prompts_per_step=self.settings.prompts_per_step,
      shares=self.shares,
      start_step=start_step,
      worker_processes=self.settings.worker_processes,
    )

  def eval_batches(
    self, *, num_problems: int, batch_size: int, **builder: Any
  ) -> pipeline.EvalBatches:
    """The eval split in order.

    `builder` may hold `kind`, `max_new_tokens`, `shards` and `shard_count`, and
    `split`, the name in the log.
    """
    builder = {"split": self.settings.eval_split} | builder
    source = mixtures.first(self.eval, num_problems)
    return pipeline.EvalBatches(
      self._builder(source, **builder),
      num_problems=num_problems,
      batch_size=batch_size,
    )

  def preference_batches(
    self, *, split: str = "", **options: Any
  ) -> pipeline.EvalBatches:
    """The batches of `eval_batches` with labelled completions, if any."""
    kind = "preference" if self.completions else "online"
    split = f"{split or self.settings.eval_split}, with labelled completions"
    return self.eval_batches(kind=kind, split=split, **options)

  def make_prompts(
    self, problems: Sequence[records.Problem], *, batch_size: int
  ) -> pipeline.Batch:
    """Prompts of at most `batch_size` problems, for a sampler on one process.

    Padding rows fill the batch.
    """
    batches = dataclasses.replace(self, eval=problems).eval_batches(
      num_problems=batch_size, batch_size=batch_size, split=""
    )
    return batches[0]

  def make_question(
    self, text: str, images: Sequence[bytes]
  ) -> records.Problem:
    """A person's question; raises a ValueError if it cannot be asked."""
    problem = records.make_question(text, images)
    try:
      records.validate(problem)
      self._builder([problem]).measure(problem)
    except records.BadRecord as error:
      rule = f"be one that the model can be asked: {error.detail}"
      shown = untrusted.shorten(text)
      raise ValueError(f"--question ({shown}) must {rule}.") from error
    return problem

  def publish(self) -> None:
    """Puts a set drawn for a workdir in a bucket there, unless it is there.

    One process calls it, for those who read the run later.
    """
    if not self.drawn or not self.drawn.bucket:
      return
    if build.read_manifest(self.drawn.bucket) != self.drawn.manifest:
      parts = self.drawn.folder, self.drawn.bucket
      objects.replace_folder(*parts, last=stored.MANIFEST, what="--workdir")

  def measure_train_records(self) -> "Dataset":
    """This with its `train_index`; `identity` has the records left out."""
    assert self.train is not None, "opened for evaluation alone"
    builder = self._train_builder(max_new_tokens=self.model.max_new_tokens)
    index = record_index.scan(builder, len(self.train), for_training=True)
    identity = self.identity
    # Always named, it would part a run from its older checkpoints.
    if left_out := index.left_out:
      identity = identity | {"data.dir: its records left out": left_out}
    return dataclasses.replace(self, train_index=index, identity=identity)

  def _train_builder(self, **arguments: Any) -> prompt_rows.RowBuilder:
    return self._builder(
      source=self.train,
      split=self.settings.train_split,
      kind=self.settings.kind,
      shuffle_options=self.settings.shuffle_options,
      **arguments,
    )

  def _builder(
    self, source: records.Source | None, **arguments: Any
  ) -> prompt_rows.RowBuilder:
    assert source is not None
    settings = self.settings
    return prompt_rows.RowBuilder(
      source=source,
      sets=source.sets if isinstance(source, mixtures.Mixture) else {},
      rewards_unchecked=self.model.rewards_unchecked,
      tokenizer=self.tokenizer,
      completion_source=self.completions,
      num_labelled=settings.preference_completions,
      prompt_buckets=settings.prompt_buckets,
      image_size=self.model.image_size,
      soft_tokens=self.model.soft_tokens,
      model_name=self.model.name,
      pan_and_scan=settings.pan_and_scan,
      template=self.template,
      **arguments,
    )


def open_dataset(
  settings: DataConfig,
  model: ModelInputs,
  workdir: str,
  *,
  for_training: bool,
  seed: int = 0,
) -> Dataset:
  """Opens the data dir of a run, or makes the synthetic one in its workdir.

  An evaluation opens the eval split alone, and neither terms of use nor missing
  answers stop it. The seed draws the solved examples of `data.few_shot`.
  """
  # Everything that needs no data is checked before data are drawn.
  template = chat_prompts.open_template(
    settings.prompt_template, settings.system_prompt
  )
  completions, file_identity = _open_completions(settings, template)
  if template.file:
    file_identity[chat_prompts.OF_TEMPLATE] = template.fingerprint
  own = own_tokenizer.find(model.weights)
  tokenizer = own_tokenizer.open_own(settings, model, own)
  if settings.weighted_dirs:
    dirs = data_dirs.open_all(settings)
  else:
    dirs = [_draw(settings, model, workdir)]
  data_dirs.check(settings, dirs, for_training=for_training)
  of_data = dirs[0].manifest["tokenizer"]["fingerprint"]
  identity = data_dirs.identity(dirs) | {own_tokenizer.OF_DATA_DIR: of_data}
  if tokenizer and (settings.tokenizer or tokenizer.fingerprint != of_data):
    identity[own_tokenizer.OF_TOKENIZER] = tokenizer.fingerprint
  if not tokenizer:
    tokenizer = own_tokenizer.open_small(model, own, dirs[0])
    if len(dirs) > 1:
      logging.info("Takes the tokenizer of %s.", dirs[0].place)
  train, evaluated = None, data_dirs.open_split(dirs, settings.eval_split)
  if for_training or settings.few_shot:
    train = data_dirs.open_split(dirs, settings.train_split)
  template = run_prompts.complete(
    template,
    few_shot=settings.few_shot,
    seed=seed,
    train=[train] if train else [],
    asked=[x for x in (train, evaluated) if x],
  )
  data = Dataset(
    settings=settings,
    model=model,
    tokenizer=tokenizer,
    train=train if for_training else None,
    eval=evaluated,
    shares=tuple(each.share for each in dirs),
    completions=completions,
    identity=identity | file_identity,
    template=template,
    eval_parts=data_dirs.parts(dirs, settings.eval_split),
    drawn=None if settings.weighted_dirs else dirs[0],
  )
  return data.measure_train_records() if for_training else data


def open_prompts(
  settings: DataConfig, model: ModelInputs, *, seed: int = 0
) -> Dataset:
  """Opens what writes the prompts of a person's questions.

  Only solved examples, and a tokenizer that stands nowhere else, need data.

  Raises:
    ValueError: There are none, or they do not fit the model.
  """
  own = own_tokenizer.find(model.weights)
  tokenizer = own_tokenizer.open_own(settings, model, own)
  if settings.few_shot or not tokenizer:
    rule = "name data, for the tokenizer in it or for data.few_shot"
    named = bool(settings.weighted_dirs)
    require(named, "data.dir", settings.dir, rule, "or set data.tokenizer")
    return open_dataset(settings, model, "", for_training=False, seed=seed)
  template = chat_prompts.open_template(
    settings.prompt_template, settings.system_prompt
  )
  parts = settings, model, tokenizer
  return Dataset(*parts, None, [], (1,), None, {}, template)


def _draw(
  settings: DataConfig, model: ModelInputs, workdir: str
) -> data_dirs.DataDir:
  """The synthetic set of a run, drawn unless it is there; see `publish`."""
  folder = paths.to_path("--workdir", workdir) / "data"
  request = synthetic_request(settings, model.vocab_size, str(folder))
  is_started = objects.exists(folder.parent / "run.json", what="--workdir")
  manifest = build.read_manifest(folder)
  if manifest and manifest["source"] != build.SYNTHETIC:
    source = untrusted.shorten(manifest["source"])
    raise ValueError(
      f"data.dir ('') must be set, because {str(folder)!r} holds data that "
      f"were prepared from {source}; set data.dir={folder} to use them, or "
      "choose another --workdir."
    )
  place, bucket = pathlib.Path(folder), ""
  if paths.is_remote(folder):
    bucket = str(build.find_data_dir(request))  # Where `publish` puts it.
    key = repr((build.FORMAT, dataclasses.replace(request, data_dir="data")))
    place = host_copy.cache_folder("drawn") / host_copy.digest(key)
  if changes := build.find_changes(request) if is_started else []:
    raise ValueError(
      f"data.synthetic must be what the run in --workdir ({str(workdir)!r}) "
      f"has drawn, but {'; '.join(changes[:3])}. Set it back, name the data in "
      "data.dir, or choose another --workdir."
    )
  request = dataclasses.replace(request, data_dir=str(place))
  manifest = build.build_data_dir(request, overwrite=True)
  return data_dirs.DataDir("data.dir", "data", place, 1, manifest, bucket)


def synthetic_request(
  settings: DataConfig, vocab_size: int, data_dir: str
) -> build.Request:
  """The request for the synthetic set of a run that names no data dir."""
  return build.Request(
    source=settings.synthetic,
    data_dir=data_dir,
    seed=settings.synthetic.seed,
    eval_fraction=settings.synthetic_eval_fraction,
    vocab_size=vocab_size,
    max_reject_fraction=0.0,
  )


def _open_completions(
  settings: DataConfig, template: chat_prompts.Template
) -> tuple[preferences.Source | None, dict[str, str]]:
  """Opens the labelled completions of a run, and hashes their file, if any."""
  if settings.kind != "preference":
    return None, {}
  count, file = settings.preference_completions, settings.preference_file
  if not file:
    source = preferences.synthesize(
      count,
      kinds=settings.preference_kinds,
      template=template,
      has_reasoning=settings.preference_reasoning,
    )
    return source, {}
  completions = preferences.from_file(file, count)
  content = untrusted.read_bytes(file, untrusted.MAX_JSON_BYTES)
  digest = hashlib.sha256(content).hexdigest()
  return completions, {"data.preference_file: its contents": digest}
