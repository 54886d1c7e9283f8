"""Hugging Face checkpoints: loading, saving, and what is refused."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

from grpo_tpu.distributed import sharding
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import weights
from grpo_tpu.models.gemma3.convert import huggingface, huggingface_config
from tests.grpo_tpu.models.gemma3 import one_device

ROOT = pathlib.Path(__file__).resolve().parents[5]


@pytest.fixture(scope="module")
def params(tiny):
  """Random leaves, all different from each other and within themselves."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: rng.standard_normal(x.shape, np.float32),
    weights.abstract_params(tiny.config, jnp.float32),
  )


@pytest.fixture(scope="module")
def whole(tiny, params, tmp_path_factory):
  folder = tmp_path_factory.mktemp("huggingface")
  huggingface.save(tiny.config, params, folder)
  return folder


@pytest.fixture
def changed(whole, tmp_path):
  """Makes a copy of the checkpoint with other tensors or config."""

  def change(tensors=lambda x: x, values=lambda x: x):
    config = json.loads((whole / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values(config)))
    held = safetensors.load_file(whole / "model.safetensors")
    safetensors.save_file(tensors(held), tmp_path / "model.safetensors")
    return tmp_path

  return change


def assert_equal(actual, expected):
  for (path, got), want in zip(
    jax.tree_util.tree_leaves_with_path(actual),
    jax.tree.leaves(expected),
    strict=True,
  ):
    assert got.dtype == want.dtype
    name = jax.tree_util.keystr(path)
    np.testing.assert_array_equal(got, want, err_msg=name)


def placed(config, mesh, dtype):
  tree = weights.abstract_params(config, dtype)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    sharding.param_shardings(mesh, tree),
  )


def test_a_saved_checkpoint_loads_as_it_was(tiny, params, whole):
  config, again = one_device.from_hf(whole)
  assert config == tiny.config
  assert_equal(again, params)


def test_a_checkpoint_in_shards_is_the_same(
  tiny, params, tmp_path, monkeypatch
):
  monkeypatch.setattr(huggingface, "_SHARD_BYTES", 20_000)
  huggingface.save(tiny.config, params, tmp_path)
  files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
  assert len(files) > 2
  assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  sizes = [(tmp_path / name).stat().st_size for name in files]
  assert max(sizes) < 30_000
  assert index["metadata"]["total_size"] < sum(sizes)
  assert_equal(one_device.from_hf(tmp_path)[1], params)


def test_each_device_gets_the_part_that_the_rules_give_it(tiny, params, whole):
  mesh = sharding.make_mesh(replica=1, fsdp=4, tensor=2)
  wanted = placed(tiny.config, mesh, jnp.bfloat16)
  got = weights.open_files("hf", tiny.config, whole).load(wanted)
  for x, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    assert x.sharding == w.sharding
  expected = jax.tree.map(lambda x, w: x.astype(w.dtype), params, wanted)
  assert_equal(got, expected)


def test_no_row_is_read_twice(tiny, whole, monkeypatch):
  read = []
  original = huggingface.Tensor._read_local

  def counted(tensor, start, stop):
    part = original(tensor, start, stop)
    read.append(part.size)
    return part

  monkeypatch.setattr(huggingface.Tensor, "_read_local", counted)
  mesh = sharding.make_mesh(replica=2, fsdp=2, tensor=2)
  wanted = placed(tiny.config, mesh, jnp.float32)
  checkpoint = weights.open_files("hf", tiny.config, whole)
  assert not read
  checkpoint.load(wanted)
  assert sum(read) == sum(x.size for x in jax.tree.leaves(wanted))


def test_one_error_lists_every_fault_of_the_tensors(tiny, changed):
  layer = "language_model.model.layers.2."

  def spoil(tensors):
    del tensors[layer + "mlp.up_proj.weight"]
    del tensors["vision_tower.vision_model.post_layernorm.bias"]
    tensors["one.too.many"] = np.ones((2, 3), np.float32)
    name = layer + "self_attn.q_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T[:3])
    name = layer + "input_layernorm.weight"
    tensors[name] = tensors[name].astype(np.int8)
    return tensors

  folder = changed(spoil)
  with pytest.raises(ValueError) as error:
    weights.open_files("hf", tiny.config, folder)
  lines = str(error.value).splitlines()[1:-1]
  assert [line.strip() for line in sorted(lines)] == [
    f"{layer}input_layernorm.weight: of type I8, wanted F32, BF16, F16",
    f"{layer}mlp.up_proj.weight: missing, wanted [24,16]",
    f"{layer}self_attn.q_proj.weight: [3,16], wanted [16,16]",
    "one.too.many: extra, [2,3]",
    "vision_tower.vision_model.post_layernorm.bias: missing, wanted [16]",
  ]


def test_damaged_and_missing_files_are_named(
  tiny, params, changed, tmp_path, monkeypatch
):
  folder = changed()
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-100])
  with pytest.raises(ValueError, match="model.safetensors: cannot be read"):
    one_device.from_hf(folder)
  sharded = tmp_path / "sharded"
  monkeypatch.setattr(huggingface, "_SHARD_BYTES", 40_000)
  huggingface.save(tiny.config, params, sharded)
  next(sharded.glob("model-00002-*")).unlink()
  with pytest.raises(ValueError, match="model-00002-.*cannot be read"):
    one_device.from_hf(sharded)


@pytest.mark.parametrize(
  ("old", "new"),
  [
    ("vision_tower.vision_model.", "vision_tower."),
    ("language_model.model.", "model.language_model."),
    ("vision_tower.vision_model.", "model.vision_tower.vision_model."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
  ],
)
def test_names_of_all_transformers_versions_are_read(params, changed, old, new):
  folder = changed(lambda x: {k.replace(old, new): v for k, v in x.items()})
  assert_equal(one_device.from_hf(folder)[1], params)


def test_a_head_must_be_tied(params, changed):
  name = "language_model.lm_head.weight"
  embedding = params["embedder"]["input_embedding"]
  folder = changed(lambda x: x | {name: embedding.copy()})
  assert_equal(one_device.from_hf(folder)[1], params)
  folder = changed(lambda x: x | {name: embedding + 1})
  with pytest.raises(ValueError, match=f"{name}: differs from the embedding"):
    one_device.from_hf(folder)


def test_rows_from_the_placeholder_on_are_written_and_left_unread(
  tiny, params, tmp_path
):
  """As in the released sizes, whose placeholder is not in the tokenizer."""
  vision = dataclasses.replace(tiny.config.vision, image_token=130)
  config = dataclasses.replace(tiny.config, vision=vision)
  huggingface.save(config, params, tmp_path)
  assert one_device.from_hf(tmp_path)[0].vocab_size == 130 + 64
  mesh = sharding.make_mesh(replica=1, fsdp=8, tensor=1)
  checkpoint = weights.open_files("hf", config, tmp_path)
  assert_equal(checkpoint.load(placed(config, mesh, jnp.float32)), params)


def test_an_export_can_be_of_another_type_and_bring_files(
  tiny, params, tmp_path
):
  """All are as readable as any new file, and the ids in them are ours."""
  there = tmp_path / "to"
  files = {"tokenizer.model": b"pieces"}
  files["generation_config.json"] = {"top_k": 64, "eos_token_id": 1}
  huggingface.save(tiny.config, params, there, dtype=jnp.bfloat16, files=files)
  assert (there / "tokenizer.model").read_bytes() == b"pieces"
  generation = json.loads((there / "generation_config.json").read_text())
  assert generation["top_k"] == 64 and generation["eos_token_id"] == [1, 106]
  (tmp_path / "new").touch()
  wanted = (tmp_path / "new").stat().st_mode
  modes = {path.name: path.stat().st_mode for path in there.iterdir()}
  names = ["config.json", "model.safetensors", *files]
  assert modes == dict.fromkeys(names, wanted)
  _, again = one_device.from_hf(tmp_path / "to")
  expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  got = again["layers"]["mlp"]["gating_einsum"]
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, expected["layers"]["mlp"]["gating_einsum"])


def test_a_checkpoint_is_never_written_over_another(tiny, params, whole):
  with pytest.raises(ValueError, match="must not hold a checkpoint yet"):
    huggingface.save(tiny.config, params, whole)


# What the released files say, and no more: the rest is transformers' defaults.
RELEASED = {
  "gemma3_1b": {
    "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
    "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 262144,
    "sliding_window": 512, "sliding_window_pattern": 6, "rope_scaling": None,
    "rope_theta": 1000000, "rope_local_base_freq": 10000,
    "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"],
  },
  "gemma3_4b": {
    "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
  },
  "gemma3_12b": {
    "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48,
    "num_attention_heads": 16, "num_key_value_heads": 8,
  },
  "gemma3_27b": {
    "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62,
    "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128,
    "query_pre_attn_scalar": 168,
  },
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs_are_those_of_the_sizes(tmp_path, name):
  values = RELEASED[name]
  if "architectures" not in values:
    values = {
      "architectures": ["Gemma3ForConditionalGeneration"],
      "model_type": "gemma3",
      "text_config": values | {
        "model_type": "gemma3_text", "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
      },
      "vision_config": {
        "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
        "model_type": "siglip_vision_model", "num_attention_heads": 16,
        "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
      },
    }  # fmt: skip
  (tmp_path / "config.json").write_text(json.dumps(values))
  config = gemma3_config.CONFIGS[name]
  huggingface_config.check(tmp_path, config)
  rows = 262_208 if config.vision else 262_144
  assert huggingface_config.read(tmp_path).vocab_size == rows
  assert huggingface_config.num_rows(config) == rows


@pytest.mark.parametrize("name", gemma3_config.CONFIGS)
def test_a_written_config_reads_as_itself(tmp_path, name):
  config = gemma3_config.CONFIGS[name]
  values = huggingface_config.to_json(config, "bfloat16")
  (tmp_path / "config.json").write_text(json.dumps(values))
  huggingface_config.check(tmp_path, config)
  other = gemma3_config.CONFIGS["gemma3_4b" if name == "tiny" else "tiny"]
  with pytest.raises(ValueError, match="but differs in"):
    huggingface_config.check(tmp_path, other)


@pytest.mark.parametrize(
  ("field", "value", "named"),
  [
    ("architectures", ["Gemma2ForCausalLM"], "architectures"),
    ("model_type", "gemma3n", "model_type"),
    ("quantization_config", {"bits": 4}, "quantization_config"),
    ("tie_word_embeddings", False, "tie_word_embeddings"),
    ("text_config.rms_norm_eps", 1e-5, "text_config.rms_norm_eps"),
    ("text_config.hidden_activation", "silu", "text_config.hidden_activation"),
    ("text_config.final_logit_softcapping", 30.0, "final_logit_softcapping"),
    ("text_config.attn_logit_softcapping", 50.0, "attn_logit_softcapping"),
    ("text_config.attention_bias", True, "text_config.attention_bias"),
    ("text_config.use_bidirectional_attention", True, "use_bidirectional"),
    ("text_config.sliding_window_pattern", 5, "sliding_window_pattern"),
    ("text_config.layer_types", ["full_attention"] * 6, "layer_types"),
    ("text_config.rope_scaling", {"rope_type": "yarn", "factor": 8}, "'yarn'"),
    ("text_config.rope_scaling", {"rope_type": "linear"}, "factor"),
    ("text_config.num_hidden_layers", "6", "num_hidden_layers"),
    ("text_config.sliding_window", 3, "sliding_window"),
    ("vision_config.hidden_act", "relu", "vision_config.hidden_act"),
    ("vision_config.layer_norm_eps", 1e-5, "vision_config.layer_norm_eps"),
    ("mm_tokens_per_image", 3, "soft_tokens"),
  ],
)
def test_a_config_of_other_arithmetic_is_refused_by_field(
  changed, field, value, named
):
  """One case is an image block of 4 with a window of 3."""

  def spoil(values):
    section, _, name = field.rpartition(".")
    (values[section] if section else values)[name] = value
    return values

  with pytest.raises(ValueError, match=f"config.json.*{named}"):
    one_device.from_hf(changed(values=spoil))


@pytest.mark.parametrize(
  ("field", "value", "rule"),
  [
    ("architectures", {"a": 1}, "architectures must be a list"),
    ("architectures", 3, "architectures must be a list"),
    ("architectures", [["a"]], r"architectures \(\[\[.a.\]\]\) must be one"),
    ("text_config", "x", "text_config must be an object"),
    ("vision_config", [1], "vision_config must be an object"),
    ("text_config.num_hidden_layers", 10**9, "an integer of 1 to 1000"),
    ("vision_config.num_hidden_layers", 10**9, "an integer of 1 to 1000"),
    ("text_config.hidden_size", 10**400, "hidden_size .* integer of 1 to 2147"),
    ("text_config.vocab_size", True, "vocab_size .* must be an integer"),
    ("text_config.rope_parameters", [1], "rope_parameters must be an object"),
    (
      "text_config.rope_parameters",
      {"full_attention": 3},
      "full_attention must be an object",
    ),
    ("text_config.rope_scaling", "x", "rope_scaling must be an object"),
    ("text_config.rope_theta", float("nan"), "rope_theta must be a finite"),
    ("text_config.rope_theta", 10**400, "rope_theta must be a finite"),
    ("text_config.rope_theta", 0, r"rope_theta \(0\) must be above 0"),
    ("text_config.rope_theta", "1e6", "rope_theta must be a finite number"),
    ("text_config.rope_local_base_freq", -1.0, "must be above 0"),
    (
      "text_config.rope_scaling",
      {"rope_type": "linear", "factor": -8.0},
      r"factor \(-8\.0\) must be above 0",
    ),
    (
      "text_config.rope_scaling",
      {"rope_type": "linear", "factor": float("inf")},
      "factor must be a finite number",
    ),
    ("text_config.quantization_config", {"bits": 4}, "quantization_config"),
    ("text_config.hidden_activation", "a" * 10**6, r"'aa.*\.\.\.\) must be"),
  ],
)
def test_a_value_of_another_type_or_size_is_refused_by_field(
  changed, field, value, rule
):
  def spoil(values):
    section, _, name = field.rpartition(".")
    (values[section] if section else values)[name] = value
    return values

  with pytest.raises(ValueError, match=f"config.json.*{rule}") as error:
    one_device.from_hf(changed(values=spoil))
  assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", ["Gemma3ForCausalLM", "Gemma3ForCond"])
def test_quantized_weights_of_any_architecture_are_refused(tmp_path, name):
  """Their tensors would be refused too, but without the reason."""
  text = RELEASED["gemma3_1b"] | {"quantization_config": {"bits": 4}}
  (tmp_path / "config.json").write_text(json.dumps(text))
  with pytest.raises(ValueError, match="quantization_config .* must be None"):
    huggingface_config.read(tmp_path)


@pytest.mark.parametrize(
  ("text", "rule"),
  [
    ("[]", "must be an object, not"),
    ("null", "must be an object, not None"),
    ('{"text_config": ' + "[" * 10**6, "nests too deeply"),
    ('{"text_config": ' + "1" * 5000 + "}", "is not JSON"),
    ("\xff", "is not JSON"),
  ],
)
def test_a_config_of_something_else_is_refused(tmp_path, text, rule):
  (tmp_path / "config.json").write_text(text, encoding="latin-1")
  with pytest.raises(ValueError, match=f"config.json {rule}"):
    huggingface_config.read(tmp_path)


@pytest.mark.parametrize(
  ("index", "rule"),
  [
    ({}, "must have a field 'weight_map'"),
    ([], "must be an object"),
    (None, "must be an object"),
    ({"weight_map": ["a"]}, "must be an object"),
    ({"weight_map": {}}, "must name the files"),
    ({"weight_map": {"a": 1}}, "item 0 of the weight_map .* a string"),
    ({"weight_map": {"a": "x", "b": ["x"]}}, "item 1 of the weight_map"),
    ({"weight_map": {"a": "../../etc/passwd"}}, "must name files beside it"),
    ({"weight_map": {"a": "/dev/zero"}}, "must name files beside it"),
    ({"weight_map": {"a": ""}}, "must name files beside it"),
    ({"weight_map": {"a": ".."}}, "must name files beside it"),
    ({"weight_map": {"a": "pipe.safetensors"}}, "must be a regular file"),
    ({"weight_map": {"a": "\0.safetensors"}}, r"\\x00.* cannot be read"),
    ({"weight_map": {"a": "\x1b[.safetensors"}}, r"\\x1b\[.* cannot be read"),
  ],
)
def test_an_index_of_something_else_is_refused(whole, tmp_path, index, rule):
  (tmp_path / "config.json").write_text((whole / "config.json").read_text())
  (tmp_path / huggingface._INDEX).write_text(json.dumps(index))
  os.mkfifo(tmp_path / "pipe.safetensors")
  with pytest.raises(ValueError, match=rule) as error:
    one_device.from_hf(tmp_path)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("kind", "shape", "fault"),
  [
    ("F32", [], r": \[\], wanted \[130,16\]"),
    ("F32", [4, 0], r": \[4,0\], wanted \[130,16\]"),
    ("F8_E4M3", [130, 16], "of type F8_E4M3, wanted F32, BF16, F16"),
  ],
)
def test_an_embedding_and_head_of_any_shape_and_type_are_refused(
  tiny, whole, tmp_path, kind, shape, fault
):
  """Comparing such a head with its embedding once ended in a traceback."""
  (tmp_path / "config.json").write_text((whole / "config.json").read_text())
  size = math.prod(shape) * (1 if kind == "F8_E4M3" else 4)
  entries = {
    name: {"dtype": kind, "shape": shape, "data_offsets": [0, 0]}
    for name in ("model.embed_tokens.weight", "lm_head.weight")
  }
  for index, entry in enumerate(entries.values()):
    entry["data_offsets"] = [index * size, (index + 1) * size]
  text = json.dumps(entries).encode()
  (tmp_path / "model.safetensors").write_bytes(
    len(text).to_bytes(8, "little") + text + bytes(2 * size)
  )
  with pytest.raises(ValueError, match=f"embed_tokens.weight.*{fault}"):
    one_device.from_hf(tmp_path)


def test_a_list_of_faults_ends(whole, tmp_path):
  (tmp_path / "config.json").write_text((whole / "config.json").read_text())
  tensors = {f"t{i}": np.zeros(1, np.float32) for i in range(3000)}
  safetensors.save_file(tensors, tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match=r"and \d+ more") as error:
    one_device.from_hf(tmp_path)
  assert len(str(error.value)) < 20_000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_adds_less_than_the_largest_tensor_to_the_memory(
  tmp_path, dtype
):
  """Beyond the parameters themselves, measured in its own process.

  At a quarter of the size that `benchmarks/load_memory.py` measures.
  """
  tiny = gemma3_config.CONFIGS["tiny"]
  small = dataclasses.replace(tiny, vision=None)
  width = 512 if dtype == "float32" else 1024
  large = dataclasses.replace(
    small, vocab_size=65_536, embed_dim=width, hidden_dim=4096, num_layers=6
  )
  for name, config in (("small", small), ("large", large)):
    abstract = weights.abstract_params(config, jnp.dtype(dtype))
    ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), abstract)
    huggingface.save(config, ones, tmp_path / name, dtype=dtype)
  script = ROOT / "benchmarks" / "load_memory.py"
  found = subprocess.run(
    [
      *(sys.executable, script, "--measure"),
      *(tmp_path / "large", tmp_path / "small"),
    ],
    check=True, capture_output=True, text=True,
  )  # fmt: skip
  memory = json.loads(found.stdout)
  assert memory["largest"] == 65_536 * 512 * 4
  assert memory["params"] > 1.2 * memory["largest"]
  assert memory["added"] < 1.3 * memory["largest"]
