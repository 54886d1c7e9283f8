"""The examples of the guides work as they stand."""

import http.server
import json
import pathlib
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import records
from data_pipelines.sources import build, stored
from grpo_tpu.rewards import scoring
from tests.data_pipelines.sources import build_test
from tests.grpo_tpu.rewards import custom_test

EXAMPLES = pathlib.Path(__file__).parents[1] / "docs" / "examples"


class Stub(http.server.ThreadingHTTPServer):
  """A server of chat completions that grades, and often has no time."""

  daemon_threads = True
  request_queue_size = 64

  def __init__(self):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.lock, self.seen, self.in_flight, self.most = threading.Lock(), {}, 0, 0
    self.together = threading.Barrier(4)


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  server: Stub

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers["content-length"])))
    assert self.path == "/v1/chat/completions" and body["model"] == "stub"
    assert self.headers["authorization"] == "Bearer secret"
    text = body["messages"][0]["content"]
    with self.server.lock:
      tries = self.server.seen[text] = self.server.seen.get(text, 0) + 1
    status = 200
    if "busy" in text and tries < 3:
      status = (429, 500)[tries - 1]
    elif "down" in text:
      status = 500
    elif tries == 1 and "together" in text:
      self.server.together.wait(30)  # Four calls must be in flight.
    grade = "10" if "kind" in text else "no idea" if "odd" in text else "4/10"
    answer = {"choices": [{"message": {"content": f" {grade}\n"}}]}
    document = json.dumps(answer).encode()
    self.send_response(status)
    self.send_header("retry-after", "0")
    self.send_header("content-length", str(len(document)))
    self.end_headers()
    self.wfile.write(document)

  def log_message(self, *_):
    pass


@pytest.fixture
def stub(monkeypatch):
  with Stub() as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}/v1"
    monkeypatch.setenv("JUDGE_URL", address)
    monkeypatch.setenv("JUDGE_MODEL", "stub")
    monkeypatch.setenv("JUDGE_KEY", "secret")
    monkeypatch.syspath_prepend(EXAMPLES)
    yield server
    scoring.close()
    server.shutdown()
    thread.join()


def config_of(**changes):
  return custom_test.config_of(
    custom=("http_judge:Judge",),
    custom_weights=(1.0,),
    num_workers=1,
    max_concurrent=4,
    **changes,
  )


def test_the_http_judge_pays_grades_of_a_server_that_is_often_busy(stub):
  def problem(rubric):
    made = custom_test.make_problem()
    return records.Problem(**vars(made) | {"metadata": {"rubric": rubric}})

  rubrics = ["kind, together", "short, together", "busy", "down", "odd"]
  rubrics += ["busy, together", "together"]
  asked = [problem(rubric) for rubric in rubrics]
  found = scoring.score(["a {b}"] * len(asked), asked, config_of())
  assert found.failed["Judge"].tolist() == [
    x in ("down", "odd") for x in rubrics
  ]
  grades = [1.0, 0.4, 0.4, 0, 0, 0.4, 0.4]
  np.testing.assert_array_equal(found.components["Judge"], np.float32(grades))
  assert found.errors["Judge"] == 2


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_column_of_the_users_own_reaches_the_reward(tmp_path, suffix):
  """From the file through a data dir to `problem.metadata`, in a worker."""
  rubrics = ["be kind", {"points": [1, 2.5], "say": "π"}, ["a", "b"], 3]
  rows = [
    {"question": f"Which word is {i}?", "answer": "red", "rubric": rubrics[i]}
    for i in range(4)
  ]
  source = tmp_path / f"words.{suffix}"
  if suffix == "jsonl":
    source.write_text("\n".join(map(json.dumps, rows)))
  else:
    rows = [{**row, "rubric": {"points": [1], "say": "π"}} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), source)
  request = build_test.request(tmp_path / "data", source=str(source))
  build.build_data_dir(request)
  found = [*stored.sources(tmp_path / "data").values()]
  problems = [problem for split in found for problem in split]
  assert len(problems) == 4
  # The reward is 1 where the completion is the JSON of the rubric.
  by_question = {row["question"]: row["rubric"] for row in rows}
  texts = [json.dumps(by_question[x.question]) for x in problems]
  config = custom_test.config_of(
    custom=("tests.grpo_tpu.rewards.async_rewards:rubric",),
    custom_weights=(1.0,),
  )
  paid = scoring.score(texts, problems, config).components["rubric"]
  assert paid.tolist() == [1.0] * 4
