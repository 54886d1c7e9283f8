"""GGUF files are read back exactly, or refused with every fault."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_tpu.distributed import sharding
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import weights
from tests.grpo_tpu.models.gemma3 import one_device

gguf = pytest.importorskip("gguf", reason="the extra export is not installed")

# No two sizes alike; quantized types take rows of a multiple of 32.
CONFIG = gemma3_config.ModelConfig(
  vocab_size=40,
  num_layers=7,
  embed_dim=64,
  hidden_dim=96,
  num_heads=6,
  num_kv_heads=2,
  head_dim=16,
  sliding_window=5,
  query_scale=16**-0.5,
  local_rope_base=10_000.0,
  global_rope_base=1_000_000.0,
  global_rope_factor=8.0,
  vision=None,
)


@pytest.fixture(scope="module")
def params():
  """Every leaf random, in 1/1024, so that norms plus one lose nothing."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: rng.integers(-999, 999, x.shape).astype(np.float32) / 1024,
    weights.abstract_params(CONFIG, jnp.float32),
  )


def metadata(config, **changes):
  """The keys of llama.cpp's converter, by name; None leaves a key out."""
  keys = {
    "context_length": 128,
    "embedding_length": config.embed_dim,
    "block_count": config.num_layers,
    "feed_forward_length": config.hidden_dim,
    "attention.head_count": config.num_heads,
    "attention.head_count_kv": config.num_kv_heads,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "attention.key_length": config.head_dim,
    "attention.value_length": config.head_dim,
    "rope.freq_base": config.global_rope_base,
    "rope.scaling.type": "linear",
    "rope.scaling.factor": config.global_rope_factor,
    "attention.sliding_window": config.sliding_window,
  }
  return {k: v for k, v in (keys | changes).items() if v is not None}


def tensors_of(config, params):
  """The file's tensors, made by plain loops."""
  layers, d = params["layers"], config.embed_dim
  out = {
    "token_embd.weight": params["embedder"]["input_embedding"],
    "output_norm.weight": params["final_norm"]["scale"] + 1,
  }
  for i in range(config.num_layers):
    p = jax.tree.map(lambda x, i=i: x[i], layers)
    attn, mlp = p["attn"], p["mlp"]

    def rows(heads):
      """Row `head * H + h` makes element h of that head's vector."""
      return np.concatenate([head.T for head in heads])

    out |= {
      f"blk.{i}.{name}.weight": x
      for name, x in {
        "attn_q": rows(attn["q_einsum"]),
        "attn_k": rows(attn["kv_einsum"][0]),
        "attn_v": rows(attn["kv_einsum"][1]),
        "attn_output": np.concatenate(list(attn["attn_vec_einsum"])).T,
        "attn_q_norm": attn["query_norm"]["scale"] + 1,
        "attn_k_norm": attn["key_norm"]["scale"] + 1,
        "attn_norm": p["pre_attention_norm"]["scale"] + 1,
        "post_attention_norm": p["post_attention_norm"]["scale"] + 1,
        "ffn_norm": p["pre_ffw_norm"]["scale"] + 1,
        "post_ffw_norm": p["post_ffw_norm"]["scale"] + 1,
        "ffn_gate": mlp["gating_einsum"][0],
        "ffn_up": mlp["gating_einsum"][1],
        "ffn_down": mlp["linear"].T,
      }.items()
    }
  assert out["blk.0.ffn_down.weight"].shape[0] == d
  return out


def write(path, keys, tensors, *, kind="F32", architecture="gemma3"):
  writer = gguf.GGUFWriter(path, architecture)
  for name, value in keys.items():
    match value:
      case str():
        writer.add_string(f"{architecture}.{name}", value)
      case bool():
        writer.add_bool(f"{architecture}.{name}", value)
      case int():
        writer.add_uint32(f"{architecture}.{name}", value)
      case float():
        writer.add_float32(f"{architecture}.{name}", value)
  kind = gguf.GGMLQuantizationType[kind]
  for name, x in tensors.items():
    x = np.ascontiguousarray(x)
    if x.ndim == 1:  # Norms stay in fp32 in every file.
      writer.add_tensor(name, x)
    else:
      writer.add_tensor(name, gguf.quantize(x, kind), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def load(path, config=CONFIG, dtype=jnp.float32):
  """The tree of a file, on one device."""
  abstract = weights.abstract_params(config, jnp.dtype(dtype))
  opened = weights.open_files("gguf", config, path)
  return opened.load(one_device.on_one_device(abstract))


def assert_trees_equal(actual, expected):
  def check(path, got, want):
    name = jax.tree_util.keystr(path)
    np.testing.assert_array_equal(np.asarray(got), want, err_msg=name)

  jax.tree_util.tree_map_with_path(check, actual, expected)


def test_a_file_in_fp32_gives_every_tensor_back(params, tmp_path):
  path = write(
    tmp_path / "tiny.gguf", metadata(CONFIG), tensors_of(CONFIG, params)
  )
  assert_trees_equal(load(path), params)


def test_a_quantized_file_is_within_half_a_step(params, tmp_path):
  """Q8_0 keeps 127 steps to the largest of 32 numbers in a row."""
  path = write(
    tmp_path / "q8.gguf",
    metadata(CONFIG),
    tensors_of(CONFIG, params),
    kind="Q8_0",
  )
  loaded = load(path)
  assert_trees_equal(loaded["final_norm"], params["final_norm"])
  error = np.abs(
    loaded["embedder"]["input_embedding"]
    - params["embedder"]["input_embedding"]
  )
  assert 0 < error.max() < 0.51 / 127
  error = jax.tree.map(
    lambda a, b: np.abs(np.asarray(a) - b).max(), loaded, params
  )
  assert max(jax.tree.leaves(error)) < 0.51 / 127


def test_a_large_tensor_is_read_in_blocks(params, tmp_path, monkeypatch):
  monkeypatch.setattr(
    "grpo_tpu.models.gemma3.convert.blocks._BLOCK_BYTES", 3 * 64
  )
  path = write(
    tmp_path / "tiny.gguf", metadata(CONFIG), tensors_of(CONFIG, params)
  )
  loaded = load(path)
  assert_trees_equal(loaded, params)


def test_weights_have_the_requested_dtype_and_sharding(params, tmp_path):
  """Sharded over fsdp and tensor, in bf16, with the same values."""
  path = write(
    tmp_path / "tiny.gguf", metadata(CONFIG), tensors_of(CONFIG, params)
  )
  mesh = sharding.make_mesh(replica=1, fsdp=4, tensor=2)

  tree = weights.abstract_params(CONFIG, jnp.bfloat16)
  want = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    sharding.param_shardings(mesh, tree),
  )
  loaded = weights.open_files("gguf", CONFIG, path).load(want)
  same = jax.tree.map(
    lambda x, w: (
      x.dtype == w.dtype and x.sharding.is_equivalent_to(w.sharding, x.ndim)
    ),
    loaded,
    want,
  )
  assert all(jax.tree.leaves(same))
  assert not loaded["layers"]["attn"]["q_einsum"].is_fully_replicated
  # Rounded once: norms are taken off one before they are rounded.
  assert_trees_equal(
    loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  )


def test_every_wrong_tensor_is_listed(params, tmp_path):
  tensors = tensors_of(CONFIG, params)
  del tensors["blk.2.attn_v.weight"]
  tensors["output.weight"] = tensors["token_embd.weight"]
  tensors["blk.6.ffn_up.weight"] = tensors["blk.6.ffn_up.weight"][:-32]
  path = write(tmp_path / "bad.gguf", metadata(CONFIG), tensors)
  with pytest.raises(ValueError) as error:
    load(path)
  text = str(error.value)
  assert "bad.gguf must hold" in text and "3 tensors differ" in text
  assert "  blk.2.attn_v.weight: missing, wanted [32,64]" in text
  assert "  output.weight: extra, [40,64]" in text
  assert "  blk.6.ffn_up.weight: [64,64], wanted [96,64]" in text


def test_a_type_that_cannot_be_dequantized_is_listed(params, tmp_path):
  tensors = tensors_of(CONFIG, params)
  path = tmp_path / "wide.gguf"
  tensors["output_norm.weight"] = tensors["output_norm.weight"].astype(
    np.float64
  )
  write(path, metadata(CONFIG), tensors)
  with pytest.raises(
    ValueError, match=r"output_norm.weight: of type F64.*cannot dequantize"
  ):
    load(path)


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"block_count": None}, "must say gemma3.block_count"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0.*0.0"),
    ({"attention.sliding_window_pattern": 2}, "sliding_window_pattern 2.*6"),
    ({"attention.value_length": 8}, "attention.value_length 8.*16"),
    ({"attention.layer_norm_rms_epsilon": 1e-5}, "rms_epsilon .*1e-06"),
    ({"rope.scaling.type": "yarn"}, "rope.scaling.type 'yarn'"),
    ({"rope.scaling.type": "none"}, "rope.scaling.type 'none'"),
    ({"expert_count": 8}, r"gemma3.expert_count 8"),
  ],
)
def test_a_key_with_other_arithmetic_is_refused_by_name(
  params, tmp_path, changes, match
):
  path = write(
    tmp_path / "other.gguf",
    metadata(CONFIG, **changes),
    tensors_of(CONFIG, params),
  )
  with pytest.raises(ValueError, match=match):
    load(path)


def test_another_architecture_is_refused(params, tmp_path):
  path = write(
    tmp_path / "llama.gguf",
    metadata(CONFIG),
    tensors_of(CONFIG, params),
    architecture="llama",
  )
  with pytest.raises(ValueError, match="general.architecture 'llama'"):
    load(path)


def test_a_model_of_another_size_is_refused_field_by_field(params, tmp_path):
  path = write(
    tmp_path / "tiny.gguf", metadata(CONFIG), tensors_of(CONFIG, params)
  )
  other = dataclasses.replace(CONFIG, num_layers=12, sliding_window=64)
  with pytest.raises(
    ValueError, match=r"num_layers \(7, not 12\), sliding_window \(5, not 64"
  ):
    load(path, other)


def test_only_27b_scales_queries_by_its_width(params, tmp_path):
  """62 layers: 64 / 6 per head instead of the head's 16."""
  deep = dataclasses.replace(CONFIG, num_layers=62)
  path = write(tmp_path / "deep.gguf", metadata(deep), {})
  with pytest.raises(ValueError, match=r"query_scale \(0\.306.*, not 0\.25"):
    load(path, deep)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"noise" * 100])
def test_a_file_of_noise_is_refused(content, tmp_path):
  (tmp_path / "noise.gguf").write_bytes(content)
  with pytest.raises(ValueError, match="noise.gguf must be a whole GGUF file"):
    load(tmp_path / "noise.gguf")


def test_a_file_cut_short_is_refused(params, tmp_path):
  path = write(
    tmp_path / "cut.gguf", metadata(CONFIG), tensors_of(CONFIG, params)
  )
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(ValueError, match=r"blk.6.ffn_down.weight: ends at byte"):
    load(path)


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"attention.head_count": 0}, "head_count 0.*integer of at least 1"),
    ({"attention.head_count_kv": 0}, "head_count_kv 0.*at least 1"),
    ({"attention.head_count_kv": 4}, "head_count_kv 4.*a divisor of .* 6"),
    ({"attention.key_length": 0}, "key_length 0.*at least 1"),
    ({"block_count": 0}, "block_count 0.*at least 1"),
    ({"block_count": 2**32 - 1}, r"num_layers \(4294967295, not 7\)"),
    ({"block_count": "7"}, "block_count '7'.*integer"),
    ({"embedding_length": 64.0}, r"embedding_length 64\.0.*integer"),
    ({"rope.freq_base": "1e6"}, "rope.freq_base '1e6'.*finite number above 0"),
    ({"rope.freq_base": float("nan")}, "freq_base nan.*finite number above 0"),
    ({"rope.scaling.factor": -8.0}, r"factor -8\.0.*finite number above 0"),
    ({"attention.layer_norm_rms_epsilon": "1e-6"}, "epsilon '1e-6'.*number"),
    ({"attention.value_length": "\x1b" * 999}, r"'(\\x1b)+\.\.\., which"),
  ],
)
def test_a_size_that_is_none_is_refused_by_name(tmp_path, changes, match):
  """At once: a refusal never takes time or memory by what the file claims."""
  path = write(tmp_path / "lies.gguf", metadata(CONFIG, **changes), {})
  with pytest.raises(ValueError, match=match):
    load(path)


def test_a_tensor_larger_than_the_file_is_refused(params, tmp_path):
  """The file claims 2**40 rows of a tensor that has 40."""
  path = write(
    tmp_path / "large.gguf", metadata(CONFIG), tensors_of(CONFIG, params)
  )
  content = path.read_bytes()
  entry = (2).to_bytes(4, "little") + (64).to_bytes(8, "little")
  rows = (40).to_bytes(8, "little")
  assert content.count(entry + rows) == 1
  path.write_bytes(
    content.replace(entry + rows, entry + (2**40).to_bytes(8, "little"))
  )
  with pytest.raises(ValueError, match=r"vocab_size \(1099511627776, not 40"):
    load(path)


def test_no_file_is_refused(tmp_path):
  with pytest.raises(ValueError, match="none.gguf must be a whole GGUF file"):
    load(tmp_path / "none.gguf")


def test_without_the_package_its_extra_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "gguf", None)
  with pytest.raises(ValueError, match=r"pip install \"grpo_tpu\[export\]\""):
    load(tmp_path / "any.gguf")
