"""Settings of the data, and what the pipeline must know of the model."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipelines import images, prompt_rows
from data_pipelines.preferences import completions
from data_pipelines.sources.drawn import synthetic
from data_pipelines.storage.paths import absolute, expand_path, is_path
from data_pipelines.text import chat_prompts, template_files, untrusted
from data_pipelines.validation import (
  at_least,
  check_fields,
  interval,
  one_of,
  require_all,
  require_one_of,
)


def _expand_dirs(
  name: str, dirs: Sequence[tuple[str, float]]
) -> tuple[tuple[str, float], ...]:
  return tuple((expand_path(name, folder), weight) for folder, weight in dirs)


_DIRS = {
  "expand": _expand_dirs,
  "like": '(("/data/geo", 0.7), ("/data/gsm8k", 0.3))',
}


@dataclass(frozen=True)
class DataConfig:
  """Where problems come from, and how they reach the model.

  Attributes:
    kind: "online" samples completions; "preference" and "demonstrations" take
      completions from the data pipeline.
    dir: Folder that `data_pipelines.prepare` wrote, also on gs://; "" draws the
      synthetic set once, under the workdir.
    dirs: Several such folders instead, each with its weight, as in
      (("/data/geo", 0.7), ("/data/gsm8k", 0.3)). The weights are shares of the
      prompts; each set is shuffled by the seed and repeats.
    tokenizer: The model's own tokenizer: "gemma", or a tokenizer.model,
      tokenizer.json or .gguf file; "" takes the one beside `model.weights`, or
      that of their run. The tiny model takes the small one in the data dir.
    synthetic: The synthetic set.
    synthetic_eval_fraction: Share of the synthetic images in the eval split.
    train_split: Split to train on.
    eval_split: Split to evaluate on.
    worker_processes: Processes on each host that build training batches; 0
      uses threads, which suffice unless images are huge. The batches are equal.
    prompts_per_step: Prompts of a step, over all hosts (`B`).
    prompt_buckets: Ascending lengths, in tokens, that prompts are padded to.
    images_per_prompt: Images and crops of each prompt in a plan; a run takes
      those of its data.
    prompt_template: How prompts ask for a completion, and how completions made
      by the data pipeline state the answer: tagged, boxed, plain, reasoned,
      mathvista (the official query with its hint), or the path of a .jinja
      file, see docs/data.md.
    system_prompt: Text before the first user's turn, as Gemma 3's chat template
      has it; "" for none.
    few_shot: Solved examples in each prompt, for base models: problems without
      images of the train split, drawn by the seed; never the one asked.
    shuffle_options: Shuffle the options of each training prompt; evaluation
      never does.
    pan_and_scan: Crops of long images, shown after the whole image in training
      and evaluation; each costs the tokens of an image.
    preference_completions: Labelled completions of a prompt, for kind
      "preference". Of those that came with a problem these are the best, the
      worst, the second best, and so on.
    preference_file: JSON lines of labelled completions, see
      docs/data.md; "" draws one correct completion and wrong ones.
    preference_kinds: Kinds of the wrong completions that are drawn.
    preference_reasoning: True draws completions with the worked solution, if
      there is one; False the answers alone.
    preference_rewards: "functions" scores labelled completions with the reward
      functions; "labels" takes the labels as rewards.
    accept_mathvista_training_terms: MathVista's licence prohibits training on
      it; True says that you have read it and may.
  """

  kind: str = field(metadata=one_of(prompt_rows.KINDS))
  dir: str = field(metadata=is_path())
  dirs: tuple[tuple[str, float], ...] = field(metadata=_DIRS)
  tokenizer: str = field(metadata=is_path())
  synthetic: synthetic.Spec
  synthetic_eval_fraction: float = field(metadata=interval("(0, 1)", 0.1))
  train_split: str
  eval_split: str
  worker_processes: int = field(metadata=interval("[0, inf)", 0))
  prompts_per_step: int = field(metadata=at_least(1))
  prompt_buckets: tuple[int, ...]
  images_per_prompt: int = field(metadata=at_least(1))
  prompt_template: str = field(metadata=is_path())
  system_prompt: str
  few_shot: int = field(metadata=interval("[0, 64]", 4))
  shuffle_options: bool
  pan_and_scan: images.PanAndScan
  preference_completions: int = field(metadata=at_least(2))
  preference_file: str = field(metadata=is_path())
  preference_kinds: tuple[str, ...] = field(metadata=one_of(completions.KINDS))
  preference_reasoning: bool
  preference_rewards: str = field(metadata=one_of(("functions", "labels")))
  accept_mathvista_training_terms: bool

  @property
  def weighted_dirs(self) -> tuple[tuple[str, float], ...]:
    """The data dirs with their weights; () for the synthetic set."""
    return self.dirs or (((self.dir, 1.0),) if self.dir else ())

  def __post_init__(self):
    check_fields(self, "data")
    weights = [weight for _, weight in self.dirs]
    folders = {os.fspath(absolute(folder)) for folder, _ in self.dirs}
    name, known = self.prompt_template, (*chat_prompts.TEMPLATES, "PATH.jinja")
    if not name.endswith(template_files.SUFFIX):
      require_one_of("data.prompt_template", name, known)
    lengths = self.prompt_buckets
    ascend = list(lengths) == sorted({n for n in lengths if n > 0})
    require_all(
      self,
      "data",
      ("dir", not (self.dir and self.dirs), "be empty beside data.dirs", "''"),
      (
        "dirs",
        len(folders) == len(self.dirs) and all(x.strip() for x, _ in self.dirs),
        "name each folder once",
        _DIRS["like"],
      ),
      (
        "dirs",
        all(0 < weight < math.inf for weight in weights),
        "have finite weights above 0",
        _DIRS["like"],
      ),
      (
        "prompt_buckets",
        bool(lengths) and ascend,
        "be ascending lengths in tokens",
        (128, 512),
      ),
      (
        "preference_kinds",
        bool(self.preference_kinds),
        "hold at least one kind",
        completions.DEFAULT_KINDS,
      ),
      (
        "system_prompt",
        bool(self.system_prompt.strip()) or not self.system_prompt,
        "hold more than white space",
        "''",
      ),
      (
        "shuffle_options",
        not (self.shuffle_options and self.preference_file),
        "be False with a data.preference_file, whose completions name options "
        "by their published letters",
        False,
      ),
    )


@dataclass(frozen=True)
class ModelInputs:
  """The inputs of a model.

  Attributes:
    name: The setting `model.name`.
    weights: The setting `model.weights`.
    hub_name: The released model on Hugging Face; "" for no released one.
    vocab_size: Rows of the embedding.
    image_size: Side of an image in pixels; 0 for a model without images.
    soft_tokens: Placeholders for each image.
    max_new_tokens: The setting `rollout.max_new_tokens`.
    rewards_unchecked: True if users' rewards, or labels, can judge completions
      of problems whose answer rules cannot check.
  """

  name: str
  weights: str
  hub_name: str
  vocab_size: int
  image_size: int
  soft_tokens: int
  max_new_tokens: int
  rewards_unchecked: bool = False


def recorded_dirs(
  settings: dict[str, Any], source: str
) -> tuple[str, tuple[tuple[str, float], ...]]:
  """`dir` and `dirs` in the `data` settings of a run's record.

  Raises:
    ValueError: The record, named `source`, holds something else.
  """
  dirs = untrusted.get_field({"dirs": [], **settings}, "dirs", list, source)
  untrusted.check_items(dirs, list, source)
  untrusted.check_items([folder for folder, _ in dirs], str, source)
  untrusted.check_items([weight for _, weight in dirs], float, source)
  folder = untrusted.get_field(settings, "dir", str, source)
  return folder, tuple((name, weight) for name, weight in dirs)
