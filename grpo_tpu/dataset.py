"""A run's problems and tokenizer, opened and checked before any device.

Draws the synthetic set under the workdir where no data dir is named.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from data_pipelines import pipeline, prompt_rows
from data_pipelines.preferences import completions as preferences
from data_pipelines.sources import build, mathvista
from data_pipelines.text import chat_prompts
from data_pipelines.text import tokenizer as tokens
from grpo_tpu.config import schema as run_config


@dataclasses.dataclass(frozen=True)
class Dataset:
  """What a run reads.

  Attributes:
    tokenizer: What spells prompts and reads completions.
    train: Problems to train on; None where the run does not train.
    eval: Problems held out.
    replies: The labelled completions of kind "preference"; None for others.
    identity: What another run must share to go on from this one's checkpoints:
      fingerprints of the records, of the tokenizers, and of the file of
      labelled completions if there is one.
  """

  tokenizer: tokens.Tokenizer
  train: mathvista.Source | None
  eval: mathvista.Source
  replies: preferences.Source | None
  identity: dict[str, str]

  def train_batches(
    self,
    config: run_config.Config,
    *,
    shards: tuple[int, ...],
    shard_count: int,
    start_step: int,
  ) -> pipeline.TrainBatches:
    """This process's batches from a step on, without end."""
    assert self.train is not None, "opened for evaluation alone"
    builder = prompt_rows.RowBuilder(
      source=self.train,
      tokenizer=self.tokenizer,
      kind=config.data.kind,
      seed=config.seed,
      max_new_tokens=config.rollout.max_new_tokens,
      shards=shards,
      shard_count=shard_count,
      completion_source=self.replies,
      num_labelled=config.data.preference_completions,
      shuffle_options=config.data.shuffle_options,
      **_prompt_settings(config),
    )
    return pipeline.make_pipeline(
      builder,
      prompts_per_step=config.data.prompts_per_step,
      start_step=start_step,
      worker_processes=config.data.worker_processes,
    )

  def eval_batches(
    self,
    config: run_config.Config,
    *,
    shards: tuple[int, ...],
    shard_count: int,
  ) -> pipeline.EvalBatches:
    """This process's batches of held-out problems, in a fixed order."""
    return self._held_out(
      config,
      kind="online",
      max_new_tokens=0,
      shards=shards,
      shard_count=shard_count,
    )

  def preference_batches(
    self,
    config: run_config.Config,
    *,
    shards: tuple[int, ...],
    shard_count: int,
  ) -> pipeline.EvalBatches:
    """The same with labelled completions, which not every problem may have."""
    return self._held_out(
      config,
      kind="preference" if self.replies else "online",
      max_new_tokens=config.rollout.max_new_tokens,
      shards=shards,
      shard_count=shard_count,
      completion_source=self.replies,
      num_labelled=config.data.preference_completions,
    )

  def _held_out(
    self, config: run_config.Config, **settings: Any
  ) -> pipeline.EvalBatches:
    builder = prompt_rows.RowBuilder(
      source=self.eval,
      tokenizer=self.tokenizer,
      seed=0,
      **settings,
      **_prompt_settings(config),
    )
    return pipeline.make_eval_batches(
      builder,
      num_problems=config.eval.num_problems,
      batch_size=config.eval.batch_size,
    )


def _prompt_settings(config: run_config.Config) -> dict[str, Any]:
  vision = config.model_config.vision
  return {
    "prompt_buckets": config.data.prompt_buckets,
    "image_size": vision.shown_size if vision else 0,
    "soft_tokens": vision.soft_tokens if vision else 0,
    "num_images": int(vision is not None),
    "pan_and_scan": config.data.pan_and_scan,
    "template": chat_prompts.TEMPLATES[config.data.prompt_template],
  }


def open_dataset(
  config: run_config.Config, workdir: str, *, for_training: bool
) -> Dataset:
  """Opens the data dir of a run, making the synthetic one if none is named.

  Args:
    config: The run's settings.
    workdir: Of the run.
    for_training: Whether the train split will be learnt from; terms and
      missing answers do not stop an evaluation.

  Raises:
    ValueError: There is no such data, or it may not or cannot be used so.
  """
  # Before anything is drawn for a run that must be refused.
  replies, their_identity = _replies(config)
  folder = pathlib.Path(config.data.dir or pathlib.Path(workdir) / "data")
  given = _given_tokenizer(config)
  if config.data.dir:
    manifest = _manifest(folder)
  else:
    manifest = build.build_data_dir(synthetic_request(config, str(folder)))
  _check(config, manifest, for_training)
  if for_training:
    _check_training(config, manifest)
  return Dataset(
    tokenizer=given or tokens.Tokenizer(folder / "tokenizer.model"),
    train=mathvista.source(folder, config.data.train_split)
    if for_training
    else None,
    eval=mathvista.source(folder, config.data.eval_split),
    replies=replies,
    identity={
      "data.dir: its records": manifest["fingerprint"],
      "data.dir: its tokenizer": manifest["tokenizer"]["fingerprint"],
    }
    | ({"data.tokenizer: its contents": given.fingerprint} if given else {})
    | their_identity,
  )


def _replies(
  config: run_config.Config,
) -> tuple[preferences.Source | None, dict[str, str]]:
  """The labelled completions of a run, and what to know a file of them by."""
  if config.data.kind != "preference":
    return None, {}
  count, file = config.data.preference_completions, config.data.preference_file
  if not file:
    drawn = preferences.synthesize(
      count,
      kinds=config.data.preference_kinds,
      template=chat_prompts.TEMPLATES[config.data.prompt_template],
    )
    return drawn, {}
  replies = preferences.from_file(file, count)
  digest = hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest()
  return replies, {"data.preference_file: its contents": digest}


def synthetic_request(
  config: run_config.Config, data_dir: str
) -> build.Request:
  """What is drawn for a run that names no data dir."""
  return build.Request(
    source=config.data.synthetic,
    data_dir=data_dir,
    seed=config.data.synthetic.seed,
    eval_fraction=config.data.synthetic_eval_fraction,
    vocab_size=config.model_config.vocab_size,
    max_reject_fraction=0.0,
  )


def _given_tokenizer(config: run_config.Config) -> tokens.Tokenizer | None:
  """The model's own tokenizer, where one is named.

  Raises:
    ValueError: It is not the model's, or none is named for released weights.
  """
  name, size = config.data.tokenizer, config.model_config.vocab_size
  if name:
    try:
      tokenizer = tokens.Tokenizer(name)
    except ValueError as error:
      raise ValueError(
        f"data.tokenizer ({name!r}) must be the model's own: {error}"
      ) from error
    if tokenizer.vocab_size != size:
      raise ValueError(
        f"data.tokenizer ({name!r}) has {tokenizer.vocab_size} pieces, which "
        f"must be as many as model.name ({config.model.name!r}) has embeddings "
        f"({size}); name that of the model."
      )
    return tokenizer
  scheme = config.model.weights.partition(":")[0]
  if scheme not in ("random", "run") and size == tokens.GEMMA_VOCAB_SIZE:
    raise ValueError(
      "data.tokenizer ('') must name Gemma's tokenizer where model.weights "
      f"({config.model.weights!r}) are released ones, to which the ids of the "
      "data dir's small one mean other text; set data.tokenizer to a "
      "tokenizer.model, a tokenizer.json or a .gguf file, or to gemma."
    )
  return None


def _manifest(folder: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads((folder / "manifest.json").read_text())
  except (OSError, ValueError) as error:
    raise ValueError(
      f"data.dir ({str(folder)!r}) must be a folder that "
      f"data_pipelines.prepare has made: {error}; run python -m "
      f"data_pipelines.prepare --data_dir={folder} first."
    ) from error


def _check(
  config: run_config.Config, manifest: dict[str, Any], for_training: bool
) -> None:
  read = ["train_split", "eval_split"] if for_training else ["eval_split"]
  for setting in read:
    split = getattr(config.data, setting)
    if split not in manifest["counts"]:
      raise ValueError(
        f"data.{setting} ({split!r}) must be one of the splits of the data "
        f"dir, {', '.join(manifest['counts'])}; set data.{setting}."
      )
  size = manifest["tokenizer"]["vocab_size"]
  if not config.data.tokenizer and size > config.model_config.vocab_size:
    raise ValueError(
      f"model.name ({config.model.name!r}) has {config.model_config.vocab_size}"
      f" embeddings, which must hold the {size} pieces of the data dir's "
      "tokenizer; prepare the data with a smaller --vocab_size."
    )


def _check_training(
  config: run_config.Config, manifest: dict[str, Any]
) -> None:
  if config.data.train_split == "test":
    raise ValueError(
      "data.train_split ('test') must hold answers, and those of test are not "
      "public; set data.train_split=train."
    )
  if manifest["terms"] and not config.data.accept_mathvista_training_terms:
    raise ValueError(
      "data.accept_mathvista_training_terms (False) must be True to train on "
      "MathVista, whose licence prohibits using it as a training set; train "
      "on other data in its schema, or set it once you have read the licence."
    )
