"""An export answers questions greedily, in transformers or in vLLM.

`export_chat.py transformers|vllm EXPORT QUESTIONS.json REPLIES.json`, by the
Python of the peers' venv, or of one with vLLM. QUESTIONS holds objects with a
`text` and an `image`, a file or null. REPLIES gets, for each, the `text`, and
the `ids` that the export's tokenizer gives the question.
"""

import json
import sys

from PIL import Image

MAX_NEW_TOKENS = 8


def parts(question: dict, kind: str) -> list[dict]:
  """The user's turn as a chat template takes it."""
  text = {"type": "text", "text": question["text"]}
  if question["image"] is None:
    return [text]
  return [{"type": kind, kind: Image.open(question["image"])}, text]


def ids_of(tokenizer, question: dict) -> list[int]:
  return tokenizer(question["text"], add_special_tokens=False).input_ids


def with_transformers(folder: str, questions: list[dict]) -> list[dict]:
  # Nothing here needs one, and one that does not match torch breaks the import.
  sys.modules["torchvision"] = None
  import transformers

  processor = transformers.AutoProcessor.from_pretrained(folder)
  model = transformers.AutoModelForImageTextToText.from_pretrained(
    folder, dtype="float32"
  ).eval()
  replies = []
  for question in questions:
    inputs = processor.apply_chat_template(
      [{"role": "user", "content": parts(question, "image")}],
      add_generation_prompt=True,
      tokenize=True,
      return_dict=True,
      return_tensors="pt",
    )
    output = model.generate(
      **inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS
    )
    new = output[0, inputs["input_ids"].shape[1] :]
    text = processor.decode(new, skip_special_tokens=True)
    ids = ids_of(processor.tokenizer, question)
    replies.append({"text": text, "ids": ids})
  return replies


def with_vllm(folder: str, questions: list[dict]) -> list[dict]:
  import vllm

  model = vllm.LLM(
    folder,
    dtype="float32",
    enforce_eager=True,
    max_model_len=512,
    limit_mm_per_prompt={"image": 1},
  )
  outputs = model.chat(
    [[{"role": "user", "content": parts(x, "image_pil")}] for x in questions],
    vllm.SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS),
  )
  tokenizer = model.get_tokenizer()
  return [
    {"text": output.outputs[0].text, "ids": ids_of(tokenizer, question)}
    for output, question in zip(outputs, questions, strict=True)
  ]


def main(library: str, folder: str, questions_path: str, replies: str) -> None:
  answer = {"transformers": with_transformers, "vllm": with_vllm}[library]
  with open(questions_path) as file:
    questions = json.load(file)
  found = answer(folder, questions)
  with open(replies, "w") as file:
    json.dump(found, file)


if __name__ == "__main__":
  main(*sys.argv[1:])
