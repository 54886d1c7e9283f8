"""peft computes from exported adapters the change that merging makes."""

import dataclasses
import json
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

from grpo_tpu.models.gemma3 import lora, weights
from grpo_tpu.models.gemma3.convert import peft
from grpo_tpu.models.settings import LORA_TARGETS, LoraConfig

pytestmark = pytest.mark.usefixtures("quick_compile")
LORA = LoraConfig(rank=3, alpha=5.0, targets=LORA_TARGETS, init="")
# Of a process with torch, which meets ours through files alone.
ADAPTED = """
import json, sys
sys.modules["torchvision"] = None  # Of no use here, and slow to import.
import numpy as np, torch, transformers
from peft import PeftModel

folder = sys.argv[1]
sizes = json.load(open(f"{folder}/sizes.json"))
torch.manual_seed(0)
if "vision_config" in sizes:
  config = transformers.Gemma3Config(**sizes)
  model = transformers.Gemma3ForConditionalGeneration(config)
  inputs = {
    "input_ids": torch.tensor([[2, 5, *[129] * 4, 6, 7]]),
    "token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0]]),
    "pixel_values": torch.randn(1, 3, 16, 16),
  }
else:
  config = transformers.Gemma3TextConfig(**sizes)
  model = transformers.Gemma3ForCausalLM(config)
  inputs = {"input_ids": torch.arange(2, 12)[None]}
model.eval()
before = {k: v.clone() for k, v in model.state_dict().items()}
with torch.no_grad():
  base = model(**inputs).logits
  model = PeftModel.from_pretrained(model, folder)
  adapted = model(**inputs).logits
  model = model.merge_and_unload()
  merged = model(**inputs).logits
after = model.state_dict()
changes = {k: (after[k] - v).numpy() for k, v in before.items()}
np.savez(
  f"{folder}/changes.npz",
  **{k: v for k, v in changes.items() if v.any()},
)
np.savez(
  f"{folder}/logits.npz",
  **{"base": base, "adapted": adapted, "merged": merged},
)
"""


def sizes_of(config):
  """The sizes in the terms of transformers' configs."""
  text = {
    "vocab_size": config.vocab_size,
    "hidden_size": config.embed_dim,
    "intermediate_size": config.hidden_dim,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "sliding_window": config.sliding_window,
  }
  if config.vision is None:
    return text
  vision = {
    "image_size": config.vision.image_size,
    "patch_size": config.vision.patch_size,
    "hidden_size": config.vision.width,
    "num_hidden_layers": config.vision.depth,
    "intermediate_size": config.vision.mlp_dim,
    "num_attention_heads": config.vision.num_heads,
  }
  return {
    "text_config": text,
    "vision_config": vision,
    "mm_tokens_per_image": config.vision.soft_tokens,
    "image_token_index": 129,
    "image_token_id": 129,
  }


def expected_changes(config, adapters):
  """The change by merging, with transformers' names and axes."""
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    weights.abstract_params(config, jnp.float32),
  )
  change = jax.device_get(
    lora.merge_adapters(lora.with_adapters(zeros, adapters, LORA))
  )
  attn, mlp = change["layers"]["attn"], change["layers"]["mlp"]
  head = "model.language_model." if config.vision else "model."

  def heads(weight):  # [heads, D, H] -> [heads * H, D]
    return weight.transpose(0, 2, 1).reshape(-1, weight.shape[1])

  found = {}
  for i in range(config.num_layers):
    for name, value in {
      "self_attn.q_proj": heads(attn["q_einsum"][i]),
      "self_attn.k_proj": heads(attn["kv_einsum"][i, 0]),
      "self_attn.v_proj": heads(attn["kv_einsum"][i, 1]),
      "self_attn.o_proj": attn["attn_vec_einsum"][i]
      .reshape(-1, config.embed_dim)
      .T,
      "mlp.gate_proj": mlp["gating_einsum"][i, 0],
      "mlp.up_proj": mlp["gating_einsum"][i, 1],
      "mlp.down_proj": mlp["linear"][i].T,
    }.items():
      found[f"{head}layers.{i}.{name}.weight"] = value
  if config.vision:
    found["model.multi_modal_projector.mm_input_projection_weight"] = change[
      "embedder"
    ]["mm_input_projection"]
  return found


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["text", "vision"])
def test_peft_agrees_with_merging(tiny, peers_python, tmp_path, kind):
  """Matrices of the same names in the image tower do not change."""
  config = tiny.config
  # Two key-value heads, so that a mix-up of heads shows.
  config = dataclasses.replace(
    config,
    num_heads=4,
    num_kv_heads=2,
    vision=config.vision if kind == "vision" else None,
  )
  rng = np.random.default_rng(0)
  adapters = jax.tree.map(
    lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32),
    lora.abstract_adapters(config, LORA),
  )
  peft.save(config, LORA, adapters, tmp_path, base_model="tiny")
  (tmp_path / "sizes.json").write_text(json.dumps(sizes_of(config)))
  done = subprocess.run(
    [peers_python, "-c", ADAPTED, str(tmp_path)], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-4000:]
  expected = expected_changes(config, adapters)
  with np.load(tmp_path / "changes.npz") as actual:
    assert set(actual) == set(expected)
    for name, change in actual.items():
      np.testing.assert_allclose(
        change, expected[name], rtol=1e-5, atol=2e-6, err_msg=name
      )
  with np.load(tmp_path / "logits.npz") as logits:
    np.testing.assert_allclose(
      logits["adapted"], logits["merged"], rtol=1e-4, atol=1e-4
    )
    assert np.abs(logits["adapted"] - logits["base"]).max() > 1e-3


@pytest.fixture
def adapter(tiny, tmp_path):
  """Adapters and their folder, as `model.lora.init` names it."""
  rng = np.random.default_rng(1)
  adapters = jax.tree.map(
    lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32),
    lora.abstract_adapters(tiny.config, LORA),
  )
  peft.save(tiny.config, LORA, adapters, tmp_path)
  return adapters, dataclasses.replace(LORA, init=f"peft:{tmp_path}")


def test_adapters_come_back_as_they_went_out(tiny, adapter):
  adapters, settings = adapter
  drawn = lora.initial_adapters(tiny.config, LORA, 0)
  again = peft.load(tiny.config, settings, drawn)
  jax.tree.map(np.testing.assert_array_equal, again, adapters)


def test_a_head_goes_with_adapters_to_reward_models_alone(tiny, tmp_path):
  config = dataclasses.replace(tiny.config, has_score=True)
  settings = dataclasses.replace(LORA, init=f"peft:{tmp_path}")
  drawn = lora.initial_adapters(config, LORA, 0)
  assert not drawn["score"]["w"].any()
  saved = drawn | {"score": {"w": drawn["score"]["w"] + 0.5}}
  peft.save(config, LORA, saved, tmp_path)
  again = peft.load(config, settings, drawn)
  jax.tree.map(np.testing.assert_array_equal, again, saved)
  path = tmp_path / "adapter_config.json"
  fields = json.loads(path.read_text())
  assert fields["task_type"] == "SEQ_CLS"
  assert fields["modules_to_save"] == ["score"]
  path.write_text(json.dumps(fields | {"modules_to_save": [{}]}))
  with pytest.raises(ValueError, match="modules_to_save"):
    peft.check(config, settings)
  path.write_text(json.dumps(fields))
  with pytest.raises(
    ValueError, match="(?s)score.weight: extra.*bradley_terry"
  ):
    peft.check(tiny.config, settings)


def test_other_settings_are_refused_with_those_to_use(tiny, adapter):
  _, settings = adapter
  for change, remedy in (
    (
      {"rank": 0, "alpha": 1.0},
      r"model.lora.rank=3 and model.lora.alpha=5.0\.",
    ),
    (
      {"targets": ("q",)},
      r"set model.lora.targets=\('q', 'kv', .*'projector'\)",
    ),
  ):
    with pytest.raises(ValueError, match=remedy):
      peft.check(tiny.config, dataclasses.replace(settings, **change))


@pytest.mark.parametrize(
  "change, fault",
  [
    ({"use_rslora": True}, r"use_rslora \(True\) must be absent"),
    ({"use_dora": True}, r"use_dora \(True\) must be absent"),
    ({"bias": "all"}, r"bias \('all'\) must be none"),
    ({"modules_to_save": ["lm_head"]}, r"modules_to_save \(\['lm_head'\]\)"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ({"peft_type": "IA3"}, r"peft_type \('IA3'\) must be LORA"),
    ({"init_lora_weights": "pissa"}, "has changed the base model too"),
    ({"r": "3"}, "'r' in .* must be an integer"),
    ({"r": 10**9}, "must be above 0"),
    ({"lora_alpha": -1}, "must be above 0"),
    ({"r": 4}, "3,16.*wanted"),
  ],
)
def test_adapters_of_another_kind_are_refused_by_name(
  tiny, adapter, change, fault
):
  _, settings = adapter
  path = pathlib.Path(
    settings.init.removeprefix("peft:"), "adapter_config.json"
  )
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(
    ValueError, match=rf"(?s)model.lora.init \('peft:.*{fault}"
  ):
    peft.check(tiny.config, settings)


@pytest.mark.parametrize("damage", ["tower", "half", "nan", "cut", "gone"])
def test_damaged_tensors_are_refused(tiny, adapter, damage):
  _, settings = adapter
  file = pathlib.Path(
    settings.init.removeprefix("peft:"), "adapter_model.safetensors"
  )
  tensors = safetensors.load_file(file)
  first = next(iter(tensors))
  if damage == "tower":
    name = "base_model.model.model.vision_tower.encoder.q_proj.lora_A.weight"
    tensors[name] = tensors[first]
  elif damage == "half":
    del tensors[first]
  elif damage == "nan":
    tensors[first] = tensors[first] * np.nan
  safetensors.save_file(tensors, file)
  if damage == "cut":
    file.write_bytes(file.read_bytes()[:-9])
  elif damage == "gone":
    file.unlink()
  with pytest.raises(ValueError, match="model.lora.init"):
    peft.load(
      tiny.config, settings, lora.initial_adapters(tiny.config, LORA, 0)
    )
