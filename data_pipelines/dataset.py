"""The problems and the tokenizer of a run, checked before devices start.

Draws the synthetic set under the workdir if the settings name no data dir.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any, NoReturn

from etils import epath

from data_pipelines import pipeline, prompt_rows, record_index, records
from data_pipelines.preferences import completions as preferences
from data_pipelines.settings import DataConfig, ModelInputs
from data_pipelines.sources import build, stored
from data_pipelines.text import (
  chat_prompts,
  own_tokenizer,
  run_prompts,
  untrusted,
)
from data_pipelines.text import tokenizer as tokens
from data_pipelines.text.chat_format import GEMMA3
from data_pipelines.validation import printable, require

_MANIFEST_FIELDS = {
  "fingerprint": str,
  "terms": str,
  "counts": dict,
  "tokenizer": dict,
  "files": dict,
}


@dataclasses.dataclass(frozen=True)
class Dataset:
  """The data that a run reads.

  Attributes:
    settings: The settings of the data.
    model: The inputs of the model.
    tokenizer: Encodes prompts and decodes completions.
    train: Problems to train on; None for a run that does not train.
    eval: Problems to evaluate on.
    completions: Labelled completions for kind "preference"; None for
      others.
    identity: Fingerprints of the records, the tokenizers, the files of labelled
      completions and of the template, if any, and of the records that training
      leaves out. A run resumes only with equal ones.
    template: How prompts ask for completions.
    train_index: Sizes of the records to train on; None measures them later.
  """

  settings: DataConfig
  model: ModelInputs
  tokenizer: tokens.Tokenizer
  train: stored.Source | None
  eval: records.Source
  completions: preferences.Source | None
  identity: dict[str, str]
  template: chat_prompts.Template = chat_prompts.TAGGED
  train_index: record_index.RecordIndex | None = None

  def train_batches(
    self,
    *,
    seed: int,
    max_new_tokens: int,
    shards: tuple[int, ...],
    shard_count: int,
    start_step: int,
  ) -> pipeline.TrainBatches:
    """The endless training batches of this process, after `start_step`."""
    assert self.train is not None, "opened for evaluation alone"
    builder = self._train_builder(
      seed=seed,
      max_new_tokens=max_new_tokens,
      shards=shards,
      shard_count=shard_count,
    )
    return pipeline.make_pipeline(
      builder,
      index=self.train_index,
      prompts_per_step=self.settings.prompts_per_step,
      start_step=start_step,
      worker_processes=self.settings.worker_processes,
    )

  def eval_batches(
    self,
    *,
    num_problems: int,
    batch_size: int,
    kind: str = "online",
    max_new_tokens: int = 0,
    split: str | None = None,
    **shards: Any,
  ) -> pipeline.EvalBatches:
    """The eval split in order, for a process's `shards` and `shard_count`.

    The log names it as `split`, or as the settings do.
    """
    builder = self._builder(
      source=self.eval,
      split=self.settings.eval_split if split is None else split,
      kind=kind,
      seed=0,
      max_new_tokens=max_new_tokens,
      **shards,
    )
    return pipeline.make_eval_batches(
      builder, num_problems=num_problems, batch_size=batch_size
    )

  def preference_batches(self, **options: Any) -> pipeline.EvalBatches:
    """The batches of `eval_batches` with labelled completions, if any."""
    kind = "preference" if self.completions else "online"
    split = f"{self.settings.eval_split}, with labelled completions"
    return self.eval_batches(kind=kind, split=split, **options)

  def make_prompts(
    self, problems: Sequence[records.Problem], *, batch_size: int
  ) -> pipeline.Batch:
    """Prompts of at most `batch_size` problems, for a sampler on one process.

    Padding rows fill the batch.
    """
    batches = dataclasses.replace(self, eval=problems).eval_batches(
      num_problems=batch_size,
      batch_size=batch_size,
      split="",
      shards=(0,),
      shard_count=1,
    )
    return batches[0]

  def measure_train_records(self) -> "Dataset":
    """This with its `train_index`; `identity` has the records left out.

    Raises:
      ValueError: No record can be used for training.
    """
    assert self.train is not None, "opened for evaluation alone"
    builder = self._train_builder(
      seed=0,
      max_new_tokens=self.model.max_new_tokens,
      shards=(0,),
      shard_count=1,
    )
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

  def _builder(self, **arguments: Any) -> prompt_rows.RowBuilder:
    settings = self.settings
    return prompt_rows.RowBuilder(
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

  Raises:
    ValueError: The data do not exist, do not fit the model, or may not be
      trained on.
  """
  # Everything that needs no data is checked before data are drawn.
  template = chat_prompts.open_template(settings.prompt_template)
  completions, file_identity = _open_completions(settings, template)
  if template.file:
    file_identity[chat_prompts.OF_TEMPLATE] = template.fingerprint
  folder = pathlib.Path(settings.dir or pathlib.Path(workdir) / "data")
  own = own_tokenizer.find(model.weights)
  tokenizer = _open_tokenizer(settings, model, own)
  if settings.dir:
    manifest = _read_manifest(folder)
  else:
    request = synthetic_request(settings, model.vocab_size, str(folder))
    _refuse_prepared(folder)
    if (pathlib.Path(workdir) / "run.json").exists():
      _refuse_other_draw(request, workdir)
    manifest = build.build_data_dir(request, overwrite=True)
  _check_manifest(settings, manifest, for_training)
  of_data = manifest["tokenizer"]["fingerprint"]
  identity = {
    "data.dir: its records": manifest["fingerprint"],
    own_tokenizer.OF_DATA_DIR: of_data,
  }
  if tokenizer and (settings.tokenizer or tokenizer.fingerprint != of_data):
    identity[own_tokenizer.OF_TOKENIZER] = tokenizer.fingerprint
  tokenizer = tokenizer or _open_small_tokenizer(model, folder, manifest)
  if not settings.tokenizer:
    _check_recorded(model, own, tokenizer)
  train, evaluated = None, stored.source(folder, settings.eval_split)
  if for_training or settings.few_shot:
    train = stored.source(folder, settings.train_split)
  template = run_prompts.complete(
    template,
    system=settings.system_prompt,
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
    completions=completions,
    identity=identity | file_identity,
    template=template,
  )
  return data.measure_train_records() if for_training else data


def _refuse_prepared(folder: pathlib.Path) -> None:
  """Refuses to draw problems where a user has prepared others."""
  manifest = build.read_manifest(folder)
  if manifest and manifest["source"] != build.SYNTHETIC:
    source = untrusted.shorten(manifest["source"])
    raise ValueError(
      f"data.dir ('') must be set, because {str(folder)!r} holds data that "
      f"were prepared from {source}; set data.dir={folder} to use them, or "
      "choose another --workdir."
    )


def _refuse_other_draw(request: build.Request, workdir: str) -> None:
  """Refuses to replace the drawn data of a run by others."""
  if changes := build.find_changes(request):
    raise ValueError(
      f"data.synthetic must be what the run in --workdir ({workdir!r}) has "
      f"drawn, but {'; '.join(changes[:3])}. Set it back, name the data in "
      "data.dir, or choose another --workdir."
    )


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
    kinds = settings.preference_kinds
    return preferences.synthesize(count, kinds=kinds, template=template), {}
  completions = preferences.from_file(file, count)
  digest = hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest()
  return completions, {"data.preference_file: its contents": digest}


def _open_tokenizer(
  settings: DataConfig, model: ModelInputs, own: own_tokenizer.Found
) -> tokens.Tokenizer | None:
  """Opens the tokenizer of the settings, or else that of the weights, if any.

  Raises:
    ValueError: The tokenizer is another model's, or released weights have none.
  """
  size, name = model.vocab_size, settings.tokenizer
  setting, is_exact = f"data.tokenizer ({name!r})", True
  path = epath.Path(own.path).expanduser()
  if not name and (own.path == tokens.GEMMA or (own.path and path.exists())):
    name = own.path
    setting = f"the tokenizer of model.weights ({model.weights!r})"
    is_exact = size == GEMMA3.vocab_size  # A small one may have fewer pieces.
  if name:
    try:
      tokenizer = tokens.Tokenizer(name)
    except ValueError as error:
      raise ValueError(f"{setting} must be the model's own: {error}") from error
    if tokenizer.vocab_size > size or (
      is_exact and tokenizer.vocab_size < size
    ):
      raise ValueError(
        f"{setting} has {tokenizer.vocab_size} pieces, but model.name "
        f"({model.name!r}) has {size} embeddings; set data.tokenizer to the "
        "tokenizer of the model."
      )
    return tokenizer
  # Random weights of a released size know no tokens, so any ids will do.
  scheme, _, folder = model.weights.partition(":")
  if scheme != "random" and size == GEMMA3.vocab_size:
    folder = folder if scheme == "hf" else "DIR"
    raise ValueError(
      "data.tokenizer ('') must name Gemma's tokenizer, because model.weights "
      f"({model.weights!r}) have none beside them, and do not know the ids of "
      "the data dir's small tokenizer. Get it, as by\n"
      f"    hf download {model.hub_name} tokenizer.model --local-dir {folder}\n"
      f"  and set data.tokenizer={folder}/tokenizer.model. A tokenizer.json, a "
      ".gguf file, or gemma for that of the gemma library, will do too."
    )
  return None


def _open_small_tokenizer(
  model: ModelInputs, folder: pathlib.Path, manifest: dict[str, Any]
) -> tokens.Tokenizer:
  """Opens the tokenizer of a data dir, which the model must have ids for."""
  size = manifest["tokenizer"]["vocab_size"]
  if size > model.vocab_size:
    raise ValueError(
      f"model.name ({model.name!r}) has {model.vocab_size} embeddings, fewer "
      f"than the {size} pieces of the data dir's tokenizer; prepare the data "
      "with a smaller --vocab_size."
    )
  tokenizer = tokens.Tokenizer(folder / "tokenizer.model")
  if tokenizer.fingerprint != manifest["tokenizer"]["fingerprint"]:
    _refuse_changed(folder, "tokenizer.model holds another tokenizer")
  return tokenizer


def _check_recorded(
  model: ModelInputs, own: own_tokenizer.Found, tokenizer: tokens.Tokenizer
) -> None:
  """Refuses a tokenizer that is not the one that a run was trained with."""
  if own.fingerprint not in ("", tokenizer.fingerprint):
    raise ValueError(
      f"model.weights ({model.weights!r}) was trained with another tokenizer, "
      f"which is no longer in {own.path!r}; set data.dir to the data of that "
      "run, or data.tokenizer to its tokenizer."
    )


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
  """The manifest of a data dir whose files are those that it lists.

  Raises:
    ValueError: The folder is no data dir, or a file has another size.
  """
  source = str(folder / "manifest.json")
  try:
    manifest = untrusted.read_json(source)
    for name, kind in _MANIFEST_FIELDS.items():
      untrusted.get_field(manifest, name, kind, source)
    for name, kind in (("vocab_size", int), ("fingerprint", str)):
      untrusted.get_field(manifest["tokenizer"], name, kind, source)
    untrusted.check_items(manifest["files"].values(), int, source)
  except (OSError, ValueError) as error:
    raise ValueError(
      f"data.dir ({str(folder)!r}) must be a folder that "
      f"data_pipelines.prepare has made: {error}; run python -m "
      f"data_pipelines.prepare --data_dir={folder} first."
    ) from error
  for name, size in manifest["files"].items():
    path = folder / name
    found = path.stat().st_size if path.is_file() else "no"
    if found != size:
      _refuse_changed(folder, f"{name} had {size} bytes and has {found}")
  return manifest


def _refuse_changed(folder: pathlib.Path, change: str) -> NoReturn:
  raise ValueError(
    f"data.dir ({str(folder)!r}) must be as data_pipelines.prepare made it, "
    f"but {printable(change)}; prepare the data again, in another folder."
  )


def _check_manifest(
  settings: DataConfig,
  manifest: dict[str, Any],
  for_training: bool,
) -> None:
  """Refuses a data dir that lacks a split, or that the run may not use."""
  splits = manifest["counts"]
  names = ["train_split", "eval_split"] if for_training else ["eval_split"]
  for name in names:
    split = getattr(settings, name)
    rule = f"be one of the splits of the data dir, {', '.join(splits)}"
    require(split in splits, f"data.{name}", split, rule, f"set data.{name}")
  if not for_training:
    return
  require(
    settings.train_split != "test",
    "data.train_split",
    "test",
    "hold answers, and those of test are not public",
    "set data.train_split=train",
  )
  accepts = settings.accept_mathvista_training_terms
  require(
    accepts or not manifest["terms"],
    "data.accept_mathvista_training_terms",
    accepts,
    "be True to train on MathVista, whose licence prohibits using it as a "
    "training set",
    "train on other data, or set it once you have read the licence",
  )
