"""Checkpoints of the gemma library, nested or flat."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from grpo_tpu.distributed import sharding
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import weights
from tests.grpo_tpu.models.gemma3 import one_device

CONFIG = gemma3_config.ModelConfig(
  vocab_size=300,
  num_layers=7,
  embed_dim=32,
  hidden_dim=48,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  sliding_window=6,
  query_scale=16**-0.5,
  local_rope_base=10_000.0,
  global_rope_base=1_000_000.0,
  global_rope_factor=8.0,
  vision=gemma3_config.VisionConfig(
    image_size=32,
    patch_size=8,
    width=24,
    depth=2,
    mlp_dim=40,
    num_heads=2,
    soft_tokens=4,
  ),
)


@pytest.fixture(scope="module")
def params():
  """Random leaves, norms included, so that no factor goes unnoticed."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32),
    weights.abstract_params(CONFIG, jnp.float32),
  )


def nested(config, params):
  """Our stacked tree with the names of the library's modules."""
  vision, embedder = params["vision_encoder"], params["embedder"]

  def layer(i):
    p = jax.tree.map(lambda x: x[i], params["layers"])
    attn = p.pop("attn")
    return {
      **p,
      "attn": {
        **{
          name: {"w": attn[name]}
          for name in ("q_einsum", "kv_einsum", "attn_vec_einsum")
        },
        "_query_norm": attn["query_norm"],
        "_key_norm": attn["key_norm"],
      },
    }

  def block(i):
    p = jax.tree.map(lambda x: x[i], vision["layers"])
    return {
      "LayerNorm_0": p["attention_norm"],
      "MultiHeadDotProductAttention_0": {
        name: p[name] for name in ("query", "key", "value", "out")
      },
      "LayerNorm_1": p["mlp_norm"],
      "MlpBlock_0": {"Dense_0": p["mlp_in"], "Dense_1": p["mlp_out"]},
    }

  return {
    "embedder": {
      "input_embedding": embedder["input_embedding"],
      "mm_soft_embedding_norm": embedder["mm_soft_embedding_norm"],
      "mm_input_projection": {"w": embedder["mm_input_projection"]},
    },
    "final_norm": params["final_norm"],
    "vision_encoder": {
      "siglip_encoder": {
        "embedding": vision["embedding"],
        "pos_embedding": vision["pos_embedding"],
        "Transformer": {
          "encoder_norm": vision["norm"],
          **{f"encoderblock_{i}": block(i) for i in range(config.vision.depth)},
        },
      }
    },
    **{f"layer_{i}": layer(i) for i in range(config.num_layers)},
  }


def flat(tree):
  """The released layout: flat paths, and a `w` under those of the MLP."""
  out = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if "/mlp/" in name:
      name += "/w"
    name = (
      name.replace("vision_encoder/", "SigLiPFromPatches_0/", 1)
      if name.startswith("vision_encoder/")
      else f"transformer/{name}"
    )
    group, last = name.rsplit("/", 1)
    out.setdefault(group, {})[last] = leaf
  return out


def save(path, tree):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, tree)
  return path


def load(path, config=CONFIG):
  """The tree of a checkpoint in fp32, on one device."""
  abstract = weights.abstract_params(config, jnp.dtype(jnp.float32))
  opened = weights.open_files("gemma", config, path)
  return opened.load(one_device.on_one_device(abstract))


def assert_trees_equal(actual, expected):
  def check(path, got, want):
    name = jax.tree_util.keystr(path)
    np.testing.assert_array_equal(np.asarray(got), want, err_msg=name)

  jax.tree_util.tree_map_with_path(check, actual, expected)


@pytest.mark.parametrize("layout", ["nested", "flat"])
def test_every_tensor_comes_back(params, tmp_path, layout):
  tree = nested(CONFIG, params)
  path = save(tmp_path / layout, tree if layout == "nested" else flat(tree))
  assert_trees_equal(load(path), params)


def test_weights_have_the_requested_dtype_and_sharding(params, tmp_path):
  """Saved in bf16, loaded in fp32, sharded over fsdp and tensor."""
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  path = save(tmp_path / "bf16", flat(nested(CONFIG, rounded)))
  mesh = sharding.make_mesh(replica=1, fsdp=4, tensor=2)

  tree = weights.abstract_params(CONFIG, jnp.float32)
  want = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    sharding.param_shardings(mesh, tree),
  )
  loaded = weights.open_files("gemma", CONFIG, path).load(want)
  same = jax.tree.map(
    lambda x, w: (
      x.dtype == w.dtype and x.sharding.is_equivalent_to(w.sharding, x.ndim)
    ),
    loaded,
    want,
  )
  assert all(jax.tree.leaves(same))
  assert_trees_equal(
    loaded, jax.tree.map(lambda x: x.astype(np.float32), rounded)
  )


def test_every_wrong_tensor_is_listed(params, tmp_path):
  tree = nested(CONFIG, params)
  del tree["layer_3"]["attn"]["_key_norm"]
  tree["layer_0"]["mlp"]["linear"] = tree["layer_0"]["mlp"]["linear"].T
  tree["embedder"]["audio"] = np.zeros(3, np.float32)
  path = save(tmp_path / "bad", flat(tree))
  with pytest.raises(ValueError) as error:
    load(path)
  text = str(error.value)
  assert "bad must hold" in text and "3 tensors differ" in text
  assert "  layer_3/attn/_key_norm/scale: missing, wanted [16]" in text
  assert "  layer_0/mlp/linear: [32,48], wanted [48,32]" in text
  assert "  embedder/audio: extra, [3]" in text


def test_another_size_is_refused_by_its_sizes(params, tmp_path):
  path = save(tmp_path / "other", nested(CONFIG, params))
  found = "7 layers, 300 embeddings of width 32 and an image tower"
  wider = dataclasses.replace(CONFIG, vocab_size=512)
  with pytest.raises(ValueError, match=f"{found}.*7 layers, 512 embeddings"):
    load(path, wider)


@pytest.mark.parametrize("content", [None, "", "{}"])
def test_a_folder_without_a_checkpoint_is_refused(content, tmp_path):
  if content is not None:
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "_METADATA").write_text(content)
  with pytest.raises(ValueError, match="none must be the folder of an Orbax"):
    load(tmp_path / "none")


def entry(*names):
  return {"key_metadata": [{"key": name} for name in names]}


@pytest.mark.parametrize(
  ("metadata", "rule"),
  [
    ([], "must be an object"),
    ({"tree_metadata": [1]}, "'tree_metadata' in _METADATA must be an object"),
    (
      {"tree_metadata": {"a": 3}},
      "an entry of tree_metadata must be an object",
    ),
    ({"tree_metadata": {"a": {}}}, "must have a field 'key_metadata'"),
    ({"tree_metadata": {"a": {"key_metadata": [3]}}}, "item 0 of key_metadata"),
    ({"tree_metadata": {"a": entry("a", ["b"])}}, "must be names of a tensor"),
    ({"tree_metadata": {"a": {"key_metadata": [{}]}}}, "must be names of"),
    ({"tree_metadata": {"a": entry("..", "b")}}, "must lie in the checkpoint"),
    ({"tree_metadata": {"a": entry("a/../b")}}, "must lie in the checkpoint"),
    ({"tree_metadata": {"a": entry("\ud800")}}, "must lie in the checkpoint"),
    ({"tree_metadata": "nested"}, "nests too deeply"),
  ],
)
def test_metadata_of_something_else_is_refused(tmp_path, metadata, rule):
  text = json.dumps(metadata).replace('"nested"', "[" * 10**6)
  (tmp_path / "_METADATA").write_text(text)
  with pytest.raises(ValueError, match=f"but there is none: .*{rule}") as error:
    load(tmp_path)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("header", "rule"),
  [
    ({}, "must have a field 'shape'"),
    ([], "the header of a.b must be an object"),
    ({"shape": 3}, "'shape' in the header of a.b must be a list"),
    ({"shape": [3, "4"]}, "item 1 of the shape in the header of a.b must be"),
  ],
)
def test_an_array_of_something_else_is_refused(tmp_path, header, rule):
  metadata = {"tree_metadata": {"a": entry("a", "b")}}
  (tmp_path / "_METADATA").write_text(json.dumps(metadata))
  (tmp_path / "a.b").mkdir()
  (tmp_path / "a.b" / ".zarray").write_text(json.dumps(header))
  with pytest.raises(ValueError, match=f"but there is none: .*{rule}"):
    load(tmp_path)


def test_a_checkpoint_with_one_folder_per_array_is_read(params, tmp_path):
  """As old versions of Orbax wrote them, with either version of Zarr."""
  for name, is_third in (("second", False), ("third", True)):
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=is_third)
    with ocp.Checkpointer(handler) as checkpointer:
      checkpointer.save(
        tmp_path / name,
        args=ocp.args.PyTreeSave(flat(nested(CONFIG, params))),
      )
    assert_trees_equal(load(tmp_path / name), params)


def test_an_array_that_is_named_but_not_stored_is_missing(params, tmp_path):
  handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(
      tmp_path / "lost", args=ocp.args.PyTreeSave(nested(CONFIG, params))
    )
  shutil.rmtree(tmp_path / "lost" / "layer_2.mlp.linear")
  with pytest.raises(ValueError, match="layer_2/mlp/linear: missing, wanted"):
    load(tmp_path / "lost")


def test_a_checkpoint_is_checked_before_any_device(params, tmp_path):
  """Once a backend has started, it cannot join other processes."""
  tree = nested(CONFIG, params)
  del tree["final_norm"]
  path = save(tmp_path / "bad", tree)
  sizes = json.dumps(dataclasses.asdict(CONFIG))
  code = (
    "import json, jax\n"
    "from jax._src import xla_bridge\n"
    "from grpo_tpu.models.gemma3 import config, weights\n"
    f"sizes = json.loads({sizes!r})\n"
    "sizes['vision'] = config.VisionConfig(**sizes['vision'])\n"
    "try:\n"
    "  weights.open_files(\n"
    f"    'gemma', config.ModelConfig(**sizes), {str(path)!r}\n"
    "  )\n"
    "except ValueError as error:\n"
    "  assert 'final_norm/scale: missing' in str(error)\n"
    "else:\n"
    "  raise AssertionError('not refused')\n"
    "assert not xla_bridge.backends_are_initialized()\n"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_neither_the_library_nor_tensorflow_is_imported(params, tmp_path):
  path = save(tmp_path / "tiny", nested(CONFIG, params))
  sizes = json.dumps(dataclasses.asdict(CONFIG))
  code = (
    "import json, sys\n"
    "from grpo_tpu.models.gemma3 import config, weights\n"
    "from tests.grpo_tpu.models.gemma3 import one_device\n"
    f"sizes = json.loads({sizes!r})\n"
    "sizes['vision'] = config.VisionConfig(**sizes['vision'])\n"
    "config = config.ModelConfig(**sizes)\n"
    "tree = weights.abstract_params(config, 'float32')\n"
    "tree = one_device.on_one_device(tree)\n"
    f"weights.open_files('gemma', config, {str(path)!r}).load(tree)\n"
    "assert {'gemma', 'kauldron', 'tensorflow'}.isdisjoint(sys.modules)\n"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
