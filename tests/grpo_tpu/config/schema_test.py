"""Settings: each is required, typed and checked, and errors name it."""

import ast
import dataclasses
import operator
import re
import typing

import jax
import pytest

from data_pipelines.text import chat_prompts
from grpo_tpu.config import defaults
from grpo_tpu.config import schema as run_config
from grpo_tpu.distributed import compile_cache
from grpo_tpu.rewards import accuracy
from grpo_tpu.rl.settings import PRESETS


def section_of(values, name):
  """The section of a dotted name, and the name within it."""
  *sections, last = name.split(".")
  for part in sections:
    values = values[part]
  return values, last


def built(changes=None):
  """The default config with changes, by dotted name."""
  # Plain dicts, because a ConfigDict checks types itself.
  values = defaults.get_config().to_dict()
  for name, value in (changes or {}).items():
    section, last = section_of(values, name)
    section[last] = value
  return run_config.Config.from_config_dict(values)


def names_of_fields(cls, where=""):
  hints = typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    if dataclasses.is_dataclass(hints[field.name]):
      yield from names_of_fields(hints[field.name], f"{where}{field.name}.")
    else:
      yield f"{where}{field.name}"


def names_of_values(values, where=""):
  for name, value in values.items(preserve_field_references=False):
    if hasattr(value, "items"):
      yield from names_of_values(value, f"{where}{name}.")
    else:
      yield f"{where}{name}"


FIELDS = sorted(names_of_fields(run_config.Config))


def test_the_defaults_have_every_setting_and_no_other():
  assert sorted(names_of_values(defaults.get_config())) == FIELDS


@pytest.mark.parametrize("name", FIELDS)
def test_a_missing_setting_is_named(name):
  values = defaults.get_config()
  section, last = section_of(values, name)
  del section[last]
  with pytest.raises(
    ValueError, match="is missing.*defaults.get_config"
  ) as caught:
    run_config.Config.from_config_dict(values)
  assert str(caught.value).startswith(f"{name} ")


@pytest.mark.parametrize(
  ("name", "meant"),
  [
    ("sed", "seed"),
    ("train.num_stepz", "train.num_steps"),
    ("data.synthetic.image_sise", "data.synthetic.image_size"),
    ("objective.betta", "objective.beta"),
    ("shaping.entropy_bonuss", "shaping.entropy_bonus"),
    ("rewards.acuracy", "rewards.accuracy"),
  ],
)
def test_a_misspelt_setting_is_named_with_a_similar_one(name, meant):
  with pytest.raises(ValueError) as caught:
    built({name: 7})
  message = str(caught.value)
  section = name.rpartition(".")[0] or "a config"
  assert message.startswith(f"{name} is not a setting: {section} has ")
  assert message.endswith(f"; did you mean {meant}?")
  assert f" {meant.rpartition('.')[2]}" in message


def test_an_unknown_setting_gets_the_names_of_its_section():
  with pytest.raises(ValueError) as caught:
    built({"optimizer.lr": 1e-3})
  assert str(caught.value) == (
    "optimizer.lr is not a setting: optimizer has learning_rate, schedule, "
    "warmup_steps, end_fraction, b1, b2, eps, weight_decay, max_grad_norm."
  )


WRONG_TYPES = {
  "seed": ["0", 0.0, True, None],
  "train.num_steps": [1e3, "10", True],
  "rollout.temperature": ["1", True, None],
  "data.dir": [3, None],
  "data.kind": [("online",), None],
  "data.prompt_buckets": [64, "64", (64.0,), ("a",), (True,)],
  "data.synthetic.kinds": ["color", (3,)],
  "model.remat": [1, True, None],
  "model.image_size": ["448", 448.0, True],
  "rollout.prompts_at_a_time": ["8", 8.0, True],
  "model.lora.rank": [8.0, "8", True, None],
  "model.lora.alpha": ["32", True, None],
  "model.lora.targets": ["q", (3,), None],
  "rewards.accuracy": ["1", False],
  "rewards.gate_heuristics": [0, "no"],
  "objective.beta": ["0.1", True],
  "objective.preset": [None, 3],
  "objective.max_completion_length": [8.0, True],
  "data.preference_completions": [2.0, True, None],
  "data.preference_file": [None, 3],
  "data.preference_kinds": [(3,), "refusal"],
  "data.prompt_template": [None, 3],
  "data.shuffle_options": [1, "True"],
  "data.pan_and_scan.enabled": [1, None],
  "data.pan_and_scan.max_num_crops": [4.0, True],
  "shaping.soft_tokens": [2.0, True],
  "shaping.advantage_clip": ["1", True],
  "shaping.top_entropy_share": [None, "1"],
  "optimizer.learning_rate": ["1e-3", None],
}


@pytest.mark.parametrize(
  ("name", "value"),
  [(k, v) for k, values in WRONG_TYPES.items() for v in values],
)
def test_a_value_of_another_type_is_refused(name, value):
  with pytest.raises(ValueError, match="must be of type .*, not ") as caught:
    built({name: value})
  wrong = (
    value[0] if isinstance(value, tuple) and name != "data.kind" else value
  )
  assert str(caught.value).startswith(f"{name} ({wrong!r})")
  assert str(caught.value).endswith("; write it like its default.")


PATHS = sorted(
  name
  for name in FIELDS
  if re.search(r"(dir|file|tokenizer|model\.weights)$", name)
)


def test_settings_that_are_paths_are_known():
  """A new one gets `is_path` as its metadata, and a line here."""
  assert PATHS == [
    *("compilation_cache_dir", "data.dir", "data.preference_file"),
    *("data.tokenizer", "export.tokenizer_dir", "model.weights"),
  ]


@pytest.mark.parametrize("name", PATHS)
def test_a_leading_tilde_is_the_home_in_every_path(name, monkeypatch, tmp_path):
  """Also where a shell does not expand it, as after an equals sign."""
  monkeypatch.setenv("HOME", str(tmp_path))

  def parsed(value):
    config = built({name: value})
    if name == "compilation_cache_dir":
      monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
      compile_cache.enable_persistent_cache(config.compilation_cache_dir)
      return jax.config.jax_compilation_cache_dir
    return operator.attrgetter(name)(config)

  before = jax.config.jax_compilation_cache_dir
  try:
    prefix = "run:" if name == "model.weights" else ""
    assert parsed(f"{prefix}~/a b") == f"{prefix}{tmp_path}/a b"
    assert parsed(f"{prefix}x/~/y") == f"{prefix}x/~/y"
    for wrong in (" ", "~no_such_user/x", "n" * 300, "a\0b"):
      with pytest.raises(ValueError, match=rf"^{name} \(.*must name a file"):
        parsed(f"{prefix}{wrong}")
  finally:
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_path_in_a_bucket_stays():
  named = "gs://my-bucket/t.model"
  assert built({"data.tokenizer": named}).data.tokenizer == named


@pytest.mark.parametrize(
  "value",
  [10**400, -(10**400), 2**31, 10**5000],
  ids=["400", "-400", "10", "5000 digits"],
)
@pytest.mark.parametrize(
  "name", ["rollout.temperature", "train.num_steps", "objective.beta"]
)
def test_an_integer_that_no_number_can_hold_is_refused(name, value):
  with pytest.raises(
    ValueError, match=rf"^{name} \(.*fits in 32 bits"
  ) as error:
    built({name: value})
  assert len(str(error.value)) < 150


def test_a_remedy_leads_out():
  """Done again and again, remedies end, and never with the same error."""
  count = 0
  for name, values in BROKEN_RULES.items():
    for value in values:
      changes, seen = {name: value}, set()
      while (error := refusal(changes)) and (
        remedy := re.search(r"; set ([\w.]+)=([^;]+?)(, or .*)?\.$", error)
      ):
        assert error not in seen, error
        seen.add(error)
        try:
          changes[remedy[1]] = ast.literal_eval(remedy[2])
        except (SyntaxError, ValueError):
          changes[remedy[1]] = remedy[2]
      count += not error
  assert count > 70


def refusal(changes):
  try:
    built(changes)
  except ValueError as error:
    return str(error)
  return ""


@pytest.mark.parametrize("name", ["data", "data.synthetic", "optimizer"])
def test_a_value_in_place_of_a_section_is_refused(name):
  with pytest.raises(ValueError, match=rf"^{name} \(3\) must be a section"):
    built({name: 3})


BROKEN_RULES = {
  "seed": [-1, 2**31],
  "data.kind": ["onlin", ""],
  "data.prompts_per_step": [0, -8],
  "data.prompt_buckets": [(), (0,), (64, 64), (64, 32), (-1, 3)],
  "data.preference_completions": [0, 1],
  "data.preference_kinds": [
    (), ("refusals",), ("refusal", "conflict", "refusal"),
  ],
  "data.preference_rewards": ["label", ""],
  "data.prompt_template": ["tag", ""],
  "data.pan_and_scan.max_num_crops": [0, 1],
  "data.pan_and_scan.min_crop_size": [0, 3],
  "data.pan_and_scan.min_ratio_to_activate": [0.9, float("inf")],
  "data.synthetic_eval_fraction": [0.0, 1.0, -0.1, float("nan")],
  "data.synthetic.difficulty": [0, 6],
  "data.synthetic.kinds": [(), ("colour",), ("color", "color")],
  "data.synthetic.image_size": [8],
  "data.synthetic.num_problems": [0],
  "data.synthetic.max_options": [9],
  "model.name": ["gemma3_5b"],
  "model.weights": [
    "random", "random:", "random:x", "random:-1", "run:", "hub:x", ":3",
    "hf:", "hf:/no/such", "gemma:", "gguf:", "gguf",
    "gemma:/no/such", "gguf:/no/such",
  ],
  "export.dtype": ["float16"],
  "export.step": ["-1", "", "newest", "٣"],
  "model.param_dtype": ["float16"],
  "model.compute_dtype": ["bf16"],
  "model.attention": ["flash", ""],
  "model.remat": ["nothing", "ful", ""],
  "model.vision_remat": ["fulll"],
  "model.lora.rank": [-1],
  "model.lora.alpha": [0.0, -1.0, float("inf"), float("nan")],
  "model.lora.targets": [(), ("attention",), ("q", "kv", "q")],
  "model.reference_dtype": ["float16"],
  "model.reference_memory": ["host", ""],
  "model.logits_chunk": [0],
  "model.image_size": [0, 20, -24],
  "mesh.replica": [0],
  "mesh.fsdp": [0],
  "mesh.tensor": [-1],
  "rollout.num_generations": [0, 1],
  "rollout.max_new_tokens": [0],
  "rollout.prompts_at_a_time": [0, -8, 5, 128],
  "rollout.temperature": [0.0, -1.0, float("inf"), float("nan")],
  "rewards.accuracy": [float("nan"), float("inf")],
  "objective.preset": ["ppo", "dapoo"],
  "objective.advantage_scale": ["std"],
  "objective.advantage_baseline": ["median"],
  "objective.aggregation": ["mean"],
  "objective.surrogate": ["clipped"],
  "objective.kl_estimator": ["k4"],
  "objective.epsilon_low": [0.0, 1.5],
  "objective.beta": [-0.1],
  "objective.dual_clip": [1.0],
  "objective.tis_cap": [0.0],
  "objective.max_completion_length": [0],
  "shaping.truncated": ["penalize", ""],
  "shaping.soft_tokens": [0],
  "shaping.zero_variance": ["resampled"],
  "shaping.max_batches": [0],
  "shaping.advantage_clip": [0.0, -1.0, float("nan")],
  "shaping.top_entropy_share": [0.0, 1.5, float("nan")],
  "shaping.entropy_bonus": [-0.1, float("inf"), float("nan")],
  "shaping.sampler_correction": ["row"],
  "optimizer.learning_rate": [-1e-6],
  "optimizer.schedule": ["cosin"],
  "optimizer.warmup_steps": [-1, 1000],
  "train.num_steps": [0],
  "train.num_iterations": [0],
  "train.microbatch_bundles": [0, 5, 128],
  "train.stop_when": [
    "eval/accuracy", "eval/accuracy > 0.5", "eval/accuracy >= nan",
    "eval/acuracy >= 0.5", "rollout/reward >= 1", "eval/pass_at_2 >= 0.5",
  ],
  "checkpoint.every_steps": [0],
  "checkpoint.every_minutes": [-1.0, float("inf"), float("nan")],
  "checkpoint.keep": [0],
  "checkpoint.best_metric": ["rollout/reward", "eval/acuracy"],
  "checkpoint.best_mode": ["most"],
  "checkpoint.keep_best": [0],
  "checkpoint.max_failures": [0],
  "checkpoint.timeout_seconds": [0],
  "eval.every_steps": [-1],
  "eval.sets": [
    (("a/b", "D", "eval"),), (("a", "", "eval"),), (("a", "D", ""),),
    (("integer", "D", "eval"),), (("samples", "D", "eval"),),
    (("a", "D", "eval"), ("a", "E", "eval")), (("..", "D", "eval"),),
  ],
  "eval.num_problems": [0],
  "eval.batch_size": [0],
  "eval.num_samples": [-1],
  "eval.temperature": [0.0, -1.0, float("inf"), float("nan")],
  "eval.ks": [(0,), (2, 1), (1, 1), (-1, 2)],
  "eval.ablations": [("blurred",), ("removed", "removed")],
  "eval.num_examples": [-1],
  "profile.steps": [(1,), (0, 2), (3, 2), (1, 2, 3), (1, 1001)],
  "samples.every_steps": [-1],
  "samples.count": [-1],
}  # fmt: skip


@pytest.mark.parametrize(
  ("name", "value"),
  [(k, v) for k, values in BROKEN_RULES.items() for v in values],
)
def test_a_value_that_breaks_a_rule_is_refused(name, value):
  with pytest.raises(ValueError, match="must ") as caught:
    built({name: value})
  message = str(caught.value)
  assert message.startswith(f"{name} (")
  assert repr(value) in message or str(value) in message


@pytest.mark.parametrize(
  ("name", "value", "question"),
  [
    ("data.kind", "preferences", r"; did you mean preference\?$"),
    # SAPO is a surrogate and no preset; GSPO is another algorithm.
    ("objective.preset", "sapo", r"; did you mean gspo\?$"),
    ("objective.preset", "ppo_and_more", r"cispo, distill, bradley_terry\.$"),
  ],
)
def test_an_error_never_tells_to_set_a_value_by_its_spelling(
  name, value, question
):
  with pytest.raises(ValueError, match=question) as caught:
    built({name: value})
  assert "; set " not in str(caught.value)


def test_adapters_leave_the_tower_frozen_and_need_a_target():
  on = {"model.lora.rank": 8}
  assert built().lora is None
  adapted = built(on).lora
  assert adapted is not None and adapted.scale == 32.0 / 8
  with pytest.raises(
    ValueError, match=r"^model.train_vision \(True\).*model.lora.rank=8"
  ):
    built(on | {"model.train_vision": True})
  built({"model.train_vision": True})
  for name, value in (
    ("model.reference_dtype", "bfloat16"),
    ("model.reference_memory", "pinned_host"),
  ):
    built({name: value})
    with pytest.raises(ValueError, match=f"^{name} .*no copy"):
      built(on | {name: value})
  projector = on | {"model.lora.targets": ("projector",)}
  built(projector)
  with pytest.raises(ValueError, match=r"^model.lora.targets \(.*no projector"):
    built(projector | {"model.name": "gemma3_270m"})


def test_options_are_not_shuffled_with_a_file_of_completions():
  kind = {"data.kind": "preference", "data.preference_file": "replies.jsonl"}
  built(kind)
  with pytest.raises(
    ValueError, match=r"^data.shuffle_options \(True\).*preference_file"
  ):
    built(kind | {"data.shuffle_options": True})
  built({"data.kind": "preference", "data.shuffle_options": True})


def test_a_text_model_cannot_have_crops():
  crops = {"data.pan_and_scan.enabled": True}
  built(crops)
  built({"model.name": "gemma3_1b"})
  with pytest.raises(
    ValueError, match=r"^data.pan_and_scan.enabled \(True\) must be False"
  ):
    built(crops | {"model.name": "gemma3_1b"})


def test_a_plan_has_no_more_images_than_fit_into_a_prompt():
  many = {"data.images_per_prompt": 4, "data.prompt_buckets": (512, 1024)}
  built(many | {"model.name": "gemma3_4b"})
  for name, changes in (
    ("gemma3_4b", {"data.images_per_prompt": 5}),
    ("gemma3_1b", {"data.images_per_prompt": 2}),
  ):
    with pytest.raises(ValueError, match="^data.images_per_prompt .* at most"):
      built(many | {"model.name": name} | changes)


@pytest.mark.parametrize("template", chat_prompts.TEMPLATES)
def test_the_answer_tag_is_rewarded_only_if_the_prompt_asks_for_it(template):
  """The rule holds for sampled completions, and it fits the reward itself."""
  completion = chat_prompts.with_answer(
    "", "5", template=chat_prompts.TEMPLATES[template]
  )
  changes = {"data.prompt_template": template}
  if accuracy.well_formed(completion):
    built(changes)
  else:
    with pytest.raises(
      ValueError, match=rf"^rewards.format \(0.1\).*'{template}'.*=0.0"
    ):
      built(changes)
  built(changes | {"rewards.format": 0})
  built(changes | {"data.kind": "demonstrations"})


def test_the_answer_tag_may_be_asked_for_by_a_file(tmp_path):
  path = tmp_path / "mine.jinja"
  changes = {"data.prompt_template": str(path)}
  built(changes)  # A machine that checks a command may lack the file.
  path.write_text("{{ question }} Use <answer>.")
  built(changes)
  path.write_text("{{ question }}")
  with pytest.raises(ValueError, match=r"^rewards.format \(0.1\).*mine.jinja"):
    built(changes)
  built(changes | {"rewards.format": 0})


@pytest.mark.parametrize(
  ("changes", "name"),
  [
    ({"mesh.fsdp": 3}, "data.prompts_per_step"),
    ({"mesh.fsdp": 16}, "train.microbatch_bundles"),
    ({"mesh.replica": 2, "mesh.fsdp": 4, "eval.batch_size": 12},
     "eval.batch_size"),
  ],
)  # fmt: skip
def test_batches_must_divide_into_shards(changes, name):
  with pytest.raises(ValueError, match=r"multiple of mesh.replica \* mesh.fs"):
    try:
      built(changes)
    except ValueError as error:
      assert str(error).startswith(name)
      raise


@pytest.mark.parametrize(
  ("name", "value", "said"),
  [
    ("truncated", "cut", "must be one of keep, mask, penalise."),
    ("advantage_clip", 0.0, "must be above 0; set {}=None."),
    ("max_batches", 0, "must be at least 1; set {}=1."),
  ],
)  # fmt: skip
def test_an_error_says_setting_value_rule_and_remedy_once(name, value, said):
  name = f"shaping.{name}"
  with pytest.raises(ValueError) as caught:
    built({name: value})
  assert str(caught.value) == f"{name} ({value!r}) " + said.format(name)


def test_the_length_penalty_must_fit_into_a_completion():
  settings = {"rollout.max_new_tokens": 100, "shaping.truncated": "penalise"}
  for soft_tokens in (1, 100):
    built(settings | {"shaping.soft_tokens": soft_tokens})
  with pytest.raises(ValueError) as caught:
    built(settings | {"shaping.soft_tokens": 101})
  assert str(caught.value) == (
    "shaping.soft_tokens (101) must be at most rollout.max_new_tokens (100); "
    "set shaping.soft_tokens=25."
  )
  # Without the penalty its length does not matter.
  built(settings | {"shaping.soft_tokens": 101, "shaping.truncated": "mask"})


@pytest.mark.parametrize("kind", ["preference", "demonstrations"])
def test_completions_of_the_data_cannot_be_resampled(kind):
  resample = {"shaping.zero_variance": "resample"}
  built(resample)
  with pytest.raises(ValueError) as caught:
    built(resample | {"data.kind": kind})
  assert str(caught.value) == (
    "shaping.zero_variance ('resample') must not be resample if "
    "completions come with the data; set shaping.zero_variance=drop."
  )
  built({"shaping.zero_variance": "drop", "data.kind": kind})


def test_ks_are_at_most_the_number_of_samples():
  for settings in (
    {"eval.num_samples": 8, "eval.ks": (1, 8)},
    {"eval.num_samples": 0, "eval.ks": (1, 99)},
    {"eval.num_samples": 4, "eval.ks": ()},
  ):
    built(settings)
  with pytest.raises(ValueError) as caught:
    built({"eval.num_samples": 4, "eval.ks": (1, 5)})
  assert str(caught.value) == (
    "eval.ks ((1, 5)) must ascend from at least 1 to at most eval.num_samples "
    "(4); set eval.ks=(1, 4)."
  )


def test_tensor_shards_do_not_divide_the_batch():
  odd = {
    "data.prompts_per_step": 7,
    "train.microbatch_bundles": 7,
    "eval.batch_size": 5,
  }
  assert built({"mesh.tensor": 2} | odd).mesh.tensor == 2


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"mesh.tensor": 4},
      r"mesh\.tensor \(4\) must divide axis 1 of .*of 2: .*mesh\.tensor=2\.",
    ),
    (
      {"mesh.fsdp": 24, "data.prompts_per_step": 24}
      | {"train.microbatch_bundles": 24, "eval.batch_size": 24},
      r"mesh\.fsdp \(24\) must divide axis \d of .*of 64: .*mesh\.fsdp=16\.",
    ),
  ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused(changes, message):
  """Two heads by four, a width of 64 by 24; the devices need not exist."""
  with pytest.raises(ValueError, match=message):
    built(changes)


def test_one_completion_is_enough_if_none_is_sampled():
  one = {"rollout.num_generations": 1, "data.kind": "demonstrations"}
  assert built(one).rollout.num_generations == 1


def test_an_int_serves_as_a_float_and_a_list_as_a_tuple():
  config = built({"rollout.temperature": 1, "data.prompt_buckets": [32, 64]})
  assert type(config.rollout.temperature) is float
  assert config.data.prompt_buckets == (32, 64)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_none_takes_the_value_of_the_preset(preset):
  teacher = "random:0" if preset == "distill" else ""
  config = built({"objective.preset": preset, "objective.teacher": teacher})
  wanted = dataclasses.replace(
    PRESETS[preset],
    max_completion_length=config.rollout.max_new_tokens,
  )
  assert config.objective_config == wanted
  scale = "none" if preset == "dr_grpo" else "group"
  assert config.objective.scale == scale


def test_a_value_overrides_the_preset():
  config = built(
    {
      "objective.preset": "dr_grpo",
      "objective.beta": 0.25,
      "objective.epsilon_high": 0.5,
      "objective.max_completion_length": 77,
      "objective.advantage_scale": "batch",
    }
  )
  assert config.objective.scale == "batch"
  assert config.objective_config == dataclasses.replace(
    PRESETS["dr_grpo"],
    beta=0.25,
    epsilon_high=0.5,
    max_completion_length=77,
  )


def test_the_resolved_settings_are_those_that_run():
  """No preset is left to look up, and they build the same run."""
  changes = {"objective.preset": "gspo", "rewards.preset": "full"}
  config = built(changes | {"objective.beta": 0.1, "rewards.format": 0.0})
  shown = config.to_resolved_dict()
  assert shown["objective"]["epsilon_high"] == 4e-4
  assert shown["objective"]["beta"] == 0.1
  assert shown["objective"]["advantage_scale"] == "group"
  assert shown["rewards"]["coherence"] == shown["rewards"]["accuracy"] == 1.0
  assert shown["rewards"]["format"] == 0.0
  assert shown["rewards"]["gate_heuristics"] is True
  again = run_config.Config.from_config_dict(shown)
  assert again.objective_config == config.objective_config
  assert again.rewards.weights == config.rewards.weights
  # A resume compares what the user set.
  assert config.to_dict()["objective"]["epsilon_high"] is None


def test_an_override_of_zero_is_not_taken_for_none():
  config = built({"objective.preset": "dapo", "objective.beta": 0.0})
  assert config.objective.beta == 0.0
  assert config.objective_config.beta == 0.0


def test_the_schedule_counts_every_update_of_every_step():
  config = built({"train.num_steps": 30, "train.num_iterations": 3})
  assert config.optimizer_config.num_steps == 90


def test_microbatches_divide_a_step():
  sizes = {"data.prompts_per_step": 48, "train.microbatch_bundles": 16}
  assert built(sizes).num_microbatches == 3


def test_a_config_is_frozen_down_to_its_sections():
  config = built()
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.seed = 1
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.data.dir = "x"


def test_a_config_can_be_rebuilt_from_its_dict():
  config = built({"objective.beta": 0.1, "data.synthetic.image_size": 64})
  assert run_config.Config.from_config_dict(config.to_dict()) == config


def test_image_size_overrides_the_towers_size():
  tower = built().model_config.vision
  assert tower.shown_size == tower.image_size == 48
  assert built({"model.image_size": 24}).model_config.vision.shown_size == 24
  text_model = {"model.name": "gemma3_270m", "model.image_size": 448}
  with pytest.raises(ValueError, match="model.image_size.*a text model"):
    built(text_model)


def test_prompts_at_a_time_divide_a_step_into_rollouts():
  assert built().num_rollouts == 1
  assert built({"rollout.prompts_at_a_time": 16}).num_rollouts == 4


OWN = {"rewards.custom": ("tests.grpo_tpu.rewards.user_rewards:without_none",)}


@pytest.mark.parametrize(
  ("changes", "pays"),
  [
    ({}, False),
    (OWN | {"rewards.custom_weights": (0.0,)}, False),
    (OWN | {"rewards.custom_weights": (0.5,)}, True),
    ({"data.preference_rewards": "labels"}, False),
    (
      {
        "data.kind": "preference",
        "data.preference_rewards": "labels",
      },
      True,
    ),
  ],
)
def test_own_rewards_and_labels_pay_without_answers(changes, pays):
  assert built(changes).model_inputs.rewards_unchecked == pays
