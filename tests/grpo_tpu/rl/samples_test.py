"""Samples are the same on every host; text and images arrive as they were."""

import contextlib
import hashlib
import types

import jax
import numpy as np
import pytest

from data_pipelines import records
from grpo_tpu.distributed import collectives, sharding
from grpo_tpu.rl import samples

ROWS = 4  # On each of two hosts.
SAMPLER = types.SimpleNamespace(
  mesh=None,
  tokenizer=types.SimpleNamespace(transcribe=lambda x: str(x)),
)
TEXT = 3  # The row of a text problem.
IMAGE_ID = f"sha256:{hashlib.sha256(b'image').hexdigest()}"


def pixels(row):
  rng = np.random.default_rng(row)
  return rng.integers(0, 256, (1, 3, 5, 3), dtype=np.uint8)


def prompts_of(rows):
  return types.SimpleNamespace(
    valid=np.array([row != 1 for row in rows]),
    problems=[
      records.Problem(
        pid=f"p{row}\ud800",
        question="",
        query=f"What is {row}?\r\u2028",
        answer=str(row),
        question_type="free_form",
        answer_type="integer",
        images=() if row == TEXT else (b"image",),
      )
      for row in rows
    ],
    images=np.stack([pixels(row) for row in rows]),
    prompt_index=np.array(rows),
    prompt_ids=np.full((len(rows), 4), 7),
    prompt_length=np.array([3] * len(rows)),
    sets={"odd": np.array([row % 2 == 1 for row in rows])},
  )


def scores_of(rows):
  # Thirds: they need every digit of a float.
  values = np.float32([(row + column) / 3 for row in rows for column in (0, 9)])
  return types.SimpleNamespace(total=values, components={"accuracy": -values})


@pytest.fixture
def collect(monkeypatch):
  """What both hosts get, as they exchange their bytes."""

  def collected(count):
    found, sent = [], []
    for host in (0, 1, 0, 1):  # First to see what each sends, then to get all.
      rows = range(host * ROWS, (host + 1) * ROWS)
      monkeypatch.setattr(
        sharding, "all_rows", lambda *_: prompts_of(range(2 * ROWS)).valid
      )
      monkeypatch.setattr(
        sharding,
        "process_rows",
        lambda mesh, count, index: range(index * ROWS, (index + 1) * ROWS),
      )
      monkeypatch.setattr(jax, "process_index", lambda host=host: host)
      monkeypatch.setattr(
        collectives, "is_first_process", lambda host=host: host == 0
      )

      def gather(data):
        sent.append(data)
        return (sent * 2)[:2]

      monkeypatch.setattr(collectives, "gather_bytes", gather)
      texts = [[f"text {row}\x1b", "other"] for row in rows]
      with contextlib.suppress(KeyError):  # Until both have sent.
        found.append(
          samples.first_samples(
            SAMPLER, prompts_of(rows), texts, scores_of(rows), count=count
          )
        )
    return found[-2:]

  return collected


def test_every_host_gets_the_first_valid_rows_of_all(collect):
  first, second = collect(5)
  chosen = [0, 2, 3, 4, 5]
  assert [x.columns for x in first] == [x.columns for x in second]
  assert [x.question for x in first] == [x.question for x in second]
  assert [x.columns for x in first] == [
    {
      "group": row,
      "generation": 0,
      "pid": f"p{row}\ud800",
      "set": "odd" if row % 2 else "",
      "image": "" if row == TEXT else IMAGE_ID,
      "prompt": "[7, 7, 7]",
      "prompt_tokens": 3,
      "answer": str(row),
      "completion": f"text {row}\x1b",
      "reward": np.float32(row / 3),
      "reward/accuracy": -np.float32(row / 3),
    }
    for row in chosen
  ]


def test_the_host_that_writes_has_all_images(collect):
  first, _ = collect(5)
  for sample, row in zip(first, [0, 2, 3, 4, 5], strict=True):
    if row == TEXT:  # Not the empty slot beside other rows' images.
      assert sample.image is None
      continue
    assert sample.image is not None and sample.image.dtype == np.uint8
    np.testing.assert_array_equal(sample.image, pixels(row)[0])


def test_hosts_that_share_rows_give_each_sample_once(monkeypatch):
  """The own one, which alone is sure to have an image."""
  keys = [(group, generation) for group in (3, 1) for generation in (1, 0)]

  def made(image):
    return [
      samples.Sample({"group": x, "generation": y}, "question", image)
      for x, y in keys
    ]

  sent = []
  monkeypatch.setattr(
    collectives, "gather_bytes", lambda data: sent.append(data) or [data] * 2
  )
  monkeypatch.setattr(collectives, "is_first_process", lambda: True)
  for host in (0, 1):
    monkeypatch.setattr(jax, "process_index", lambda host=host: host)
    image = np.full((2, 2, 3), 7, np.uint8)
    found = samples.gather(made(image))
    assert [tuple(x.columns.values()) for x in found] == sorted(keys)
    assert all(x.image is image for x in found)
