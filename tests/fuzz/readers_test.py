"""Readers of weights, tokenizers and the files of a run, on damaged copies.

For a second each, or for as long as FUZZ_SECONDS says; nightly for minutes.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from data_pipelines.text import sentencepiece_import, tokenizer
from grpo_tpu.checkpoint import manifest, reader
from grpo_tpu.config import defaults
from grpo_tpu.config import schema as run_config
from grpo_tpu.evaluation import rescore
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import weights
from grpo_tpu.models.gemma3.convert import huggingface
from grpo_tpu.observability import (
  event_files,
  goodput,
  json_lines,
  run_record,
  sample_files,
)
from tests.fuzz import harness
from tests.grpo_tpu.models.gemma3 import one_device

TINY = dataclasses.replace(
  gemma3_config.CONFIGS["tiny"], vocab_size=300, num_layers=6
)
ROOT = pathlib.Path(__file__).resolve().parents[2]
ROWS = [
  {"step": step, "train/loss": 0.5, "text": "a"}
  | dict.fromkeys(goodput._TIMES, 0.5)
  for step in range(6)
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """A Hugging Face folder of the tiny model, in several files."""
  folder = tmp_path_factory.mktemp("huggingface")
  params = weights.random_params(TINY, 0, np.dtype(np.float32))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(huggingface, "_SHARD_BYTES", 40_000)
    huggingface.save(TINY, params, folder)
  return folder


def open_checkpoint(folder):
  opened = weights.open_files("hf", TINY, folder)
  first = next(iter(opened._tensors.values()))
  first.start_read(0, 1)()


@harness.both_durations
def test_a_hugging_face_config_is_read_or_refused(
  checkpoint, tmp_path, seconds
):
  path = tmp_path / "config.json"

  def read(content):
    path.write_bytes(content)
    huggingface.huggingface_config.read(tmp_path)
    huggingface.huggingface_config.check(tmp_path, TINY)
    path.with_name("model.safetensors").unlink(missing_ok=True)
    one_device.from_hf(tmp_path)  # There are no tensors.

  with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read"):
    read((checkpoint / "config.json").read_bytes())

  def refuse(content):
    try:
      read(content)
    except ValueError as error:
      assert len(str(error)) < 100_000

  harness.fuzz(refuse, [(checkpoint / "config.json").read_bytes()], seconds)


@harness.both_durations
def test_an_index_is_read_or_refused(checkpoint, tmp_path, seconds):
  for path in checkpoint.iterdir():
    (tmp_path / path.name).symlink_to(path)
  index = tmp_path / huggingface._INDEX
  whole = index.read_bytes()
  index.unlink()

  def read(content):
    index.write_bytes(content)
    open_checkpoint(tmp_path)

  harness.fuzz(read, [whole], seconds)


@harness.both_durations
def test_safetensors_are_read_or_refused(checkpoint, tmp_path, seconds):
  """The header is damaged as JSON and as bytes."""
  for path in checkpoint.iterdir():
    (tmp_path / path.name).symlink_to(path)
  file = sorted(tmp_path.glob("*.safetensors"))[0]
  whole = file.read_bytes()
  length = int.from_bytes(whole[:8], "little")
  file.unlink()

  def read(content):
    file.write_bytes(content)
    open_checkpoint(tmp_path)

  def read_header(content):
    read(len(content).to_bytes(8, "little") + content + whole[8 + length :])

  harness.fuzz(read, [whole], seconds / 2)
  harness.fuzz(read_header, [whole[8 : 8 + length]], seconds / 2)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
  """A GGUF file with the keys of a model, a vocabulary and some tensors."""
  gguf = pytest.importorskip("gguf", reason="the extra export is missing")
  path = tmp_path_factory.mktemp("gguf") / "x.gguf"
  writer = gguf.GGUFWriter(path, "gemma3")
  for name in ("block_count", "embedding_length", "feed_forward_length"):
    writer.add_uint32(f"gemma3.{name}", 6)
  for name in ("head_count", "head_count_kv", "key_length", "sliding_window"):
    writer.add_uint32(f"gemma3.attention.{name}", 2)
  writer.add_float32("gemma3.attention.layer_norm_rms_epsilon", 1e-6)
  writer.add_float32("gemma3.rope.freq_base", 1e6)
  writer.add_string("gemma3.rope.scaling.type", "none")
  writer.add_tokenizer_model("llama")
  writer.add_token_list(["<pad>", "<eos>", "<bos>", "<unk>", "a"])
  writer.add_token_scores([0.0] * 5)
  writer.add_token_types([3, 3, 3, 2, 1])
  writer.add_tensor("token_embd.weight", np.ones((5, 64), np.float32))
  kind = gguf.GGMLQuantizationType.Q8_0
  quantized = gguf.quantize(np.ones((2, 64), np.float32), kind)
  writer.add_tensor("output_norm.weight", quantized, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@harness.both_durations
def test_a_gguf_file_is_read_or_refused(gguf_file, tmp_path, seconds):
  path = tmp_path / "x.gguf"
  whole = gguf_file.read_bytes()

  def read(content):
    path.write_bytes(content)
    sentencepiece_import.from_gguf(path)
    with pytest.raises(ValueError, match=r"x\.gguf"):
      weights.open_files("gguf", TINY, path)

  harness.fuzz(read, [whole, whole[:1500]], seconds, extra_bytes=1 << 30)


@pytest.fixture(scope="module")
def sentencepiece_models(tmp_path_factory):
  """A model as of Gemma, and one with tables of a normalizer."""
  folder = tmp_path_factory.mktemp("tokenizer")
  with pytest.MonkeyPatch.context() as patch:
    for name in ("identity", "nmt_nfkc"):
      options = tokenizer._TRAINER_OPTIONS | {"normalization_rule_name": name}
      patch.setattr(tokenizer, "_TRAINER_OPTIONS", options)
      texts = ["How many red circles? 3 or 4."] * 3
      tokenizer.train(texts, folder / f"{name}.model", vocab_size=450)
  return folder


@harness.both_durations
def test_a_tokenizer_json_is_read_or_refused(tmp_path, seconds):
  path = tmp_path / "tokenizer.json"
  names = ["<pad>", "<eos>", "<bos>", "<unk>", "a", "b", "ab", "<0x0A>"]
  document = {
    "added_tokens": [{"id": 8, "content": "  ", "special": True}],
    "model": {
      "type": "BPE",
      "byte_fallback": True,
      "vocab": {name: number for number, name in enumerate(names)},
      "merges": [["a", "b"]],
    },
  }

  def read(content):
    path.write_bytes(content)
    sentencepiece_import.from_tokenizer_json(content, str(path))
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
      tokenizer.Tokenizer(path)

  harness.fuzz(read, [json.dumps(document).encode()], seconds)


@harness.both_durations
def test_a_sentencepiece_model_is_used_or_refused(
  sentencepiece_models, seconds
):
  """In a process of its own, which a fault in C++ would end."""
  code = (
    "import pathlib, sys\n"
    "from data_pipelines.text import tokenizer\n"
    "from tests.fuzz import harness\n"
    "def read(content):\n"
    "  found = tokenizer.Tokenizer('x.model', content)\n"
    "  text = 'How many <end_of_turn> \\u2581é \\U0001f600\\n\\n'\n"
    "  found.decode(found.encode(text))\n"
    "files = sorted(pathlib.Path(sys.argv[1]).iterdir())\n"
    "valid = [path.read_bytes() for path in files]\n"
    "print(harness.fuzz(read, valid, float(sys.argv[2])))\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code, sentencepiece_models, str(seconds)],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  if done.returncode:
    pytest.fail(f"exit code {done.returncode}\n{done.stderr[-3000:]}")


@harness.both_durations
def test_a_manifest_is_whole_or_damage(tmp_path, seconds):
  folder = epath.Path(tmp_path / "00000007")
  (folder / "state").mkdir(parents=True)
  (folder / "state" / "d").write_bytes(b"1234")
  manifest.write(folder, {"score": 0.5})
  path = manifest.path_for(folder)
  whole = path.read_bytes()

  def check(content):
    path.write_bytes(content)
    assert isinstance(manifest.find_damage(folder), str)
    reader.newest_path(tmp_path)
    reader.best_path(tmp_path)

  def check_sealed(content):
    body = json.loads(content)
    seal = manifest._json_checksum(body)
    check(json.dumps({"crc32c": seal, "body": body}).encode())

  harness.fuzz(check, [whole], seconds / 2, allowed=())
  body = json.dumps(json.loads(whole)["body"]).encode()
  allowed = (json.JSONDecodeError, UnicodeDecodeError, RecursionError)
  harness.fuzz(check_sealed, [body], seconds / 2, allowed=allowed)


@harness.both_durations
def test_a_record_of_a_run_is_read_or_refused(tmp_path, seconds):
  values = defaults.get_config().to_dict()
  config = run_config.Config.from_config_dict(values).to_dict()
  record = run_record.RunRecord(str(tmp_path), config, values, {"data": "a"})
  record.write("random:0")
  path = tmp_path / "run.json"

  def read(content):
    path.write_bytes(content)
    record.check()
    run_record.close(tmp_path, {"exit_code": 0, "reason": "", "step": 1})

  harness.fuzz(read, [path.read_bytes()], seconds)


@harness.both_durations
def test_lines_of_metrics_are_kept_or_removed(tmp_path, seconds):
  path = tmp_path / "metrics.jsonl"

  def read(content):
    path.write_bytes(content)
    goodput.Clock().resume(path, 3)
    json_lines.JsonLines(path, resume_step=3).close()
    for line in path.read_bytes().splitlines():
      assert json.loads(line)["step"] <= 3

  lines = [json.dumps(row).encode() for row in ROWS]
  whole = [b"\n".join([*lines, b""]), b"\n".join([*lines[:3], lines[3][:20]])]
  harness.fuzz(read, whole, seconds / 2, allowed=())

  def read_line(content):
    read(b"\n".join([*lines[:2], content, *lines[2:], b""]))
    assert path.read_bytes().startswith(lines[0])

  harness.fuzz(read_line, lines, seconds / 2, allowed=())


@harness.both_durations
def test_samples_are_read_or_refused(tmp_path, seconds):
  path = tmp_path / "step_00000001.parquet"
  sample = {"pid": "p", "completion": "c", "reward": 1.0, "reward/a": 1.0}
  sample_files.write_rows(path, [sample] * 2)

  def read(content):
    path.write_bytes(content)
    rescore.read_samples(str(path))

  harness.fuzz(read, [path.read_bytes()], seconds)


@harness.both_durations
def test_event_files_are_rewound(tmp_path, seconds):
  import tensorflow as tf

  path = tmp_path / "events.out.tfevents.1"
  with tf.io.TFRecordWriter(str(path)) as file:
    for step in range(6):
      event = tf.compat.v1.Event(step=step, file_version="a" * 50)
      file.write(event.SerializeToString())
  whole = path.read_bytes()

  def read(content):
    path.write_bytes(content)
    event_files._rewind(path, 3)
    assert whole.startswith(path.read_bytes()[: len(whole) // 6])

  harness.fuzz(read, [whole], seconds, allowed=())


@harness.both_durations
def test_the_metadata_of_a_gemma_checkpoint_are_read_or_refused(
  tmp_path, seconds
):
  metadata = {
    "tree_metadata": {
      f"('{name}', 'w')": {
        "key_metadata": [
          {"key": name, "key_type": 2},
          {"key": "w", "key_type": 2},
        ],
        "value_metadata": {
          "value_type": "jax.Array",
          "skip_deserialize": False,
        },
      }
      for name in ("embedder", "final_norm")
    },
    "use_ocdbt": False,
  }
  header = {"shape": [3, 4], "dtype": "<f4", "chunks": [3, 4], "zarr_format": 2}
  array = tmp_path / "embedder.w" / ".zarray"
  array.parent.mkdir()

  def read(content):
    (tmp_path / "_METADATA").write_bytes(content)
    weights.open_files("gemma", TINY, tmp_path)

  def refuse(content):
    with pytest.raises(ValueError, match=str(tmp_path)):
      read(content)

  array.write_text(json.dumps(header))
  harness.fuzz(refuse, [json.dumps(metadata).encode()], seconds / 2)

  def refuse_header(content):
    array.write_bytes(content)
    refuse(json.dumps(metadata).encode())

  harness.fuzz(refuse_header, [json.dumps(header).encode()], seconds / 2)
