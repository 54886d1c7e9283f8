"""Real data sets' files, with content of our own, each prepared in one go.

The names of columns and the kinds of values are the published ones.
"""

import base64
import io
import json
import tarfile

import datasets
import pandas as pd
import pytest
from PIL import Image

from data_pipelines.sources import build, stored

NUM_RECORDS = 12


def png(i: int) -> bytes:
  file = io.BytesIO()
  Image.new("RGB", (32, 32), (20 * i, 255 - 20 * i, 40)).save(file, "PNG")
  return file.getvalue()


def struct(i: int) -> dict:
  return {"bytes": png(i), "path": f"{i}.png"}


def write_pictures(folder, name="images"):
  (folder / name).mkdir(parents=True)
  for i in range(NUM_RECORDS):
    (folder / name / f"{i}.png").write_bytes(png(i))


def write_parquet(folder, rows, name="train-00000-of-00001.parquet"):
  (folder / "data").mkdir(parents=True)
  pd.DataFrame(rows).to_parquet(folder / "data" / name)
  return folder


def write_lines(folder, rows, name="train.jsonl"):
  folder.mkdir(parents=True, exist_ok=True)
  lines = (json.dumps(row, ensure_ascii=False) for row in rows)
  (folder / name).write_text("\n".join(lines) + "\n")
  return folder


def prepared(tmp_path, source, **options):
  """The problems of each split by pid, and the manifest."""
  request = build.Request(
    **{
      "source": str(source),
      "data_dir": str(tmp_path / "prepared"),
      "seed": 0,
      "eval_fraction": 0.0,
      "vocab_size": 512,
      "max_reject_fraction": 0.0,
      **options,
    }
  )
  manifest = build.build_data_dir(request)
  problems = {
    problem.pid: problem
    for source in stored.sources(tmp_path / "prepared").values()
    for problem in (source[i] for i in range(len(source)))
  }
  return problems, manifest


def check(problems, i, pid=None, **expected):
  problem = problems[str(i) if pid is None else pid]
  assert {name: getattr(problem, name) for name in expected} == expected
  return problem


# The triangles of geometry3k: a side, by Pythagoras.
SIDES = ["5", "13", "2 \\sqrt { 13 }", "12.5"] * 3


def test_geometry3k(tmp_path):
  rows = [
    {"images": [struct(i)], "problem": f"<image>Find x{i}.", "answer": SIDES[i]}
    for i in range(NUM_RECORDS)
  ]
  problems, manifest = prepared(tmp_path, write_parquet(tmp_path / "g", rows))
  assert manifest["counts"] == {"train": NUM_RECORDS}
  check(
    problems,
    0,
    question="<image>Find x0.",
    query="<image>Find x0.",
    answer="5",
    answer_type="integer",
    images=(png(0),),
  )
  check(problems, 2, answer="2 \\sqrt { 13 }", answer_type="expression")
  check(problems, 3, answer="12.5", answer_type="float", precision=1)


def test_multimodal_open_r1(tmp_path):
  solution = "<think>\nBars are {0} and {0}.\n</think>\n\n<answer>{1}</answer>"
  rows = [
    {
      "image": struct(i),
      "problem": (
        f"Which bar is tallest in plot {i}?\nChoices:\nA. red\nB. blue\nC. gray"
        if i % 3 == 0
        else f"How many bars has plot {i}?"
      ),
      "solution": solution.format(i, "B" if i % 3 == 0 else f"${i}$"),
      "original_question": f"plot {i}",
      "original_answer": "B" if i % 3 == 0 else str(i),
    }
    for i in range(NUM_RECORDS)
  ]
  problems, manifest = prepared(tmp_path, write_parquet(tmp_path / "g", rows))
  assert manifest["counts"] == {"train": NUM_RECORDS}
  check(
    problems,
    3,
    question="Which bar is tallest in plot 3?",
    choices=("red", "blue", "gray"),
    answer="blue",
    question_type="multi_choice",
  )
  last = check(problems, 4, answer="4", answer_type="integer", choices=())
  assert last.solution == "Bars are 4 and 4.\n\n\n$4$"
  assert last.metadata == {
    "original_question": "plot 4",
    "original_answer": "4",
  }
  check(problems, 11, answer="11", images=(png(11),))


def test_mmk12(tmp_path):
  answers = ["B", "6", "\\frac{3}{4}", "\\sqrt{2}"]
  rows = [
    {
      "id": f"k12-{i}",
      "question": f"<image>如图 {i}，求值。",
      "answer": answers[i % 4],
      "subject": "math",
      "image": struct(i),
    }
    for i in range(NUM_RECORDS)
  ]
  rows[0]["question"] = "<image>下列哪项正确？\nA. 3\nB. 4\nC. 5\nD. 6"
  problems, manifest = prepared(tmp_path, write_parquet(tmp_path / "g", rows))
  assert manifest["counts"] == {"train": NUM_RECORDS}
  check(problems, 0, "k12-0", answer="4", choices=("3", "4", "5", "6"))
  check(problems, 1, "k12-1", answer="6", metadata={"subject": "math"})
  check(problems, 2, "k12-2", answer="\\frac{3}{4}", answer_type="expression")


def test_mm_eureka(tmp_path):
  write_pictures(tmp_path / "g")
  system = {"role": "system", "content": "Think in <think> first."}
  rows = [
    {
      "id": str(i),
      "conversations": json.dumps(
        [system, {"role": "user", "content": f"<image>What is {i} + 1?"}]
      ),
      "answer": f"${i + 1}$",
      "image_urls": [f"file:///data/mm/images/{i}.png"],
    }
    for i in range(NUM_RECORDS)
  ]
  problems, manifest = prepared(
    tmp_path, write_lines(tmp_path / "g", rows, "dataset.jsonl")
  )
  assert manifest["counts"] == {"train": NUM_RECORDS}
  for i in (0, 5, 11):
    check(
      problems,
      i,
      question=f"<image>What is {i} + 1?",
      answer=str(i + 1),
      images=(png(i),),
      metadata={"system": "Think in <think> first."},
    )


def test_mm_math(tmp_path):
  write_pictures(tmp_path / "g")
  rows = [
    {
      "question": f"In figure {i}, find AB.",
      "file_name": f"{i}.png",
      "solution": f"Since BC = {i}, $AB = \\boxed{{{i}\\sqrt{{3}}}}$ holds.",
      "year": "grade 8",
      "difficult": "medium",
      "knowledge": "triangles",
    }
    for i in range(1, NUM_RECORDS)
  ]
  problems, manifest = prepared(
    tmp_path, write_lines(tmp_path / "g", rows, "MM_Math.jsonl")
  )
  assert manifest["counts"] == {"train": NUM_RECORDS - 1}
  for i in (0, 1, 10):
    problem = check(
      problems,
      i,
      answer=f"{i + 1}\\sqrt{{3}}",
      answer_type="expression",
      images=(png(i + 1),),
      image_path=f"{i + 1}.png",
    )
    assert problem.solution.startswith(f"Since BC = {i + 1}, ")


def official(problem):
  """The name of the set's rule, and the gold as the set has it."""
  fields = problem.metadata
  return fields["official_rule"], fields["official_answer"]


def test_we_math(tmp_path):
  write_pictures(tmp_path / "g", "testmini")
  rows = [
    {
      "ID": str(i // 3),  # One for all steps of a problem.
      "split": "testmini",
      "knowledge concept": "Area of circles",
      "question": f"What is the area of circle {i}? ( )",
      "option": "A. 2π; B. 4π cm; C. 6π; D. 8π; E. No correct answer",
      "answer": "ABCDE"[i % 5],
      "image_path": f"testmini/{i}.png",
      "key": f"2steps_{i % 3}",
      "question number": str(i),
      "knowledge concept description": "",
    }
    for i in range(NUM_RECORDS)
  ]
  (tmp_path / "g/testmini.json").write_text(json.dumps(rows))
  problems, manifest = prepared(tmp_path, tmp_path / "g/testmini.json")
  assert sum(manifest["counts"].values()) == NUM_RECORDS
  options = ("2π", "4π cm", "6π", "8π", "No correct answer")
  check(problems, 0, choices=options, answer="2π", images=(png(0),))
  check(problems, 1, answer="4π cm", question_type="multi_choice")
  problem = check(problems, 4, answer="No correct answer")
  assert problem.metadata["ID"] == "1"
  assert official(problem) == ("wemath", "E")


def test_mathverse(tmp_path):
  rows = [
    {
      "sample_index": str(i),
      "problem_index": str(i // 2),
      "problem_version": "Text Dominant",
      "question": (
        f"AB = {i}. Find the angle.\nChoices:\nA:30°\nB:45°\nC:60°\nD:90°"
        if i % 2 == 0
        else f"AB = {i}. Find the length of BC."
      ),
      "image": struct(i),
      "answer": "C" if i % 2 == 0 else f"{i}.5",
      "question_type": "multi-choice" if i % 2 == 0 else "free-form",
      "metadata": {"split": "testmini", "source": "GeoQA", "subfield": "Angle"},
      "query_wo": "Answer the question in the image.",
      "query_cot": "Please first conduct reasoning",
      "question_for_eval": "q",
    }
    for i in range(NUM_RECORDS)
  ]
  # The version "Vision Only" has its question in the picture.
  rows[4]["question"] = rows[6]["question"] = ""
  problems, manifest = prepared(
    tmp_path, write_parquet(tmp_path / "g", rows, "testmini.parquet")
  )
  assert sum(manifest["counts"].values()) == NUM_RECORDS
  options = ("30°", "45°", "60°", "90°")
  check(problems, 0, choices=options, answer="60°", images=(png(0),))
  problem = check(problems, 3, answer="3.5", answer_type="float", precision=1)
  assert problem.metadata["problem_version"] == "Text Dominant"
  assert official(problem) == ("mathverse", "3.5")
  assert official(problems["0"]) == ("mathverse", "C")
  check(problems, 2, question="AB = 2. Find the angle.")
  check(problems, 4, question="Answer the question in the image.", answer="C")


def test_mathvision(tmp_path):
  rows = [
    {
      "id": str(i),
      "question": f"Which block fits? {i}\n<image1>",
      "options": ["A", "B", "C", "D", "E"] if i % 2 else [],
      "image": f"images/{i}.jpg",
      "decoded_image": struct(i),
      "answer": "D" if i % 2 else str(i),
      "solution": None,
      "level": 2,
      "subject": "solid geometry",
    }
    for i in range(NUM_RECORDS)
  ]
  # One picture that was put together from two.
  rows[4]["question"] = "Anna has <image1>. What can she not build?\n<image2>"
  problems, manifest = prepared(
    tmp_path, write_parquet(tmp_path / "g", rows, "test-00000-of-00001.parquet")
  )
  assert sum(manifest["counts"].values()) == NUM_RECORDS
  check(
    problems,
    1,
    question="Which block fits? 1\n<image>",
    choices=("A", "B", "C", "D", "E"),
    answer="D",
    images=(png(1),),
  )
  check(
    problems,
    4,
    question="Anna has image 1. What can she not build?\nimage 2",
    answer="4",
  )
  check(
    problems,
    6,
    metadata={"level": 2, "subject": "solid geometry"}
    | {"image": "images/6.jpg"}
    | {"official_rule": "mathvision", "official_answer": "6"},
  )


def test_chartqa(tmp_path):
  labels = [["14.5"], ["Yes"], ["2019"], ["[Red, Blue]"]]
  rows = [
    {
      "image": struct(i),
      "query": f"What is the value of bar {i}?",
      "label": labels[i % 4],
      "human_or_machine": i % 2,
    }
    for i in range(NUM_RECORDS)
  ]
  problems, manifest = prepared(tmp_path, write_parquet(tmp_path / "g", rows))
  assert manifest["counts"] == {"train": NUM_RECORDS}
  check(problems, 0, answer="14.5", precision=1, tolerance=0.05)
  check(problems, 1, answer="Yes", answer_type="text", tolerance=0.0)
  check(problems, 2, answer="2019", answer_type="integer", tolerance=0.05)
  assert official(problems["3"]) == ("chartqa", "[Red, Blue]")


def test_a_set_is_what_the_user_says(tmp_path):
  rows = [
    {"question": f"What is bar {i}?", "answer": "14 %", "image": struct(i)}
    | {"type": "human_test" if i else "human"}
    for i in range(NUM_RECORDS)
  ]
  source = write_parquet(tmp_path / "g", rows)
  problems, _ = prepared(tmp_path, source)
  assert "official_rule" not in problems["0"].metadata
  columns = {"official_rule": "chartqa"}
  problems, _ = prepared(tmp_path / "b", source, columns=columns)
  problem = check(problems, 0, answer="14", unit="%", tolerance=0.05)
  assert official(problem) == ("chartqa", "14 %")
  rows[0]["type"] = "augmented_test"
  source = write_parquet(tmp_path / "h", rows)
  problems, _ = prepared(tmp_path / "c", source)
  assert official(problems["0"])[0] == "chartqa"
  problems, _ = prepared(tmp_path / "d", source, columns={"official_rule": ""})
  assert "official_rule" not in problems["0"].metadata
  with pytest.raises(ValueError, match="quiz is none of mathvista, chartqa"):
    prepared(tmp_path / "e", source, columns={"official_rule": "quiz"})


def test_clevr_70k(tmp_path):
  rows = [
    {
      "image": struct(i),
      "problem": f"How many items are there in the image? {i}",
      "solution": f"<answer> {i} </answer>",
    }
    for i in range(NUM_RECORDS)
  ]
  problems, manifest = prepared(tmp_path, write_parquet(tmp_path / "g", rows))
  assert manifest["counts"] == {"train": NUM_RECORDS}
  for i in (0, 7, 11):
    check(
      problems,
      i,
      answer=str(i),
      answer_type="integer",
      solution="",
      images=(png(i),),
    )


def test_gsm8k(tmp_path):
  rows = [
    {
      "question": f"Tom has {i} bags of 1000 nuts. How many nuts?",
      "answer": f"{i}*1000=<<{i}*1000={i}000>>{i}000 nuts.\n#### {i},000",
    }
    for i in range(1, NUM_RECORDS)
  ]
  write_lines(tmp_path / "g", rows, "train.jsonl")
  write_lines(tmp_path / "g", [{**rows[0], "question": "Else?"}], "test.jsonl")
  problems, manifest = prepared(tmp_path, tmp_path / "g")
  assert manifest["counts"] == {"train": NUM_RECORDS - 1, "eval": 1}
  by_question = {each.question: each.pid for each in problems.values()}
  for i in (0, 5, 10):
    check(
      problems,
      i,
      by_question[rows[i]["question"]],
      answer=f"{i + 1}000",
      answer_type="integer",
      images=(),
      solution=rows[i]["answer"],
    )


def test_llava_conversations(tmp_path):
  write_pictures(tmp_path / "g")
  replies = ["4", "The bar is red.", "B", "A long description. " * 20]
  rows = [
    {
      "id": f"{i:03d}",
      "image": f"{i}.png",
      "conversations": [
        {"from": "human", "value": f"<image>\nWhat is in {i}?"},
        {"from": "gpt", "value": replies[i % 4]},
      ],
    }
    for i in range(NUM_RECORDS)
  ]
  rows[1]["conversations"] += rows[0]["conversations"]
  rows[2]["conversations"][0]["value"] += "\nA. cat\nB. dog\nAnswer by letter."
  (tmp_path / "g/llava.json").write_text(json.dumps(rows))
  problems, manifest = prepared(tmp_path, tmp_path / "g")
  assert manifest["counts"] == {"train": NUM_RECORDS}
  check(problems, 0, "000", question="<image>\nWhat is in 0?", answer="4")
  check(problems, 1, "001", answer="The bar is red", images=(png(1),))
  check(
    problems,
    2,
    "002",
    question="<image>\nWhat is in 2?\nAnswer by letter.",
    choices=("cat", "dog"),
    answer="dog",
    completions=(),
  )
  problem = check(problems, 3, "003", answer="", answer_type="unchecked")
  assert problem.completions == ((replies[3].strip(), 1.0),)


def test_preference_pairs(tmp_path):
  """RLAIF-V's columns."""
  rows = [
    {
      "ds_name": "mine",
      "image": struct(i),
      "question": f"What is in picture {i}?",
      "chosen": f"A square of color {i}.",
      "rejected": "A cat.",
      "idx": i,
      "image_path": f"{i}.jpg",
    }
    for i in range(NUM_RECORDS)
  ]
  problems, manifest = prepared(tmp_path, write_parquet(tmp_path / "g", rows))
  assert manifest["counts"] == {"train": NUM_RECORDS}
  for i in (0, 4, 11):
    pair = ((f"A square of color {i}.", 1.0), ("A cat.", 0.0))
    check(problems, i, answer="", completions=pair, images=(png(i),))


def test_vlm_r1(tmp_path):
  write_pictures(tmp_path / "g")
  rows = [
    {
      "id": i,
      "image": f"images/{i}.png",
      "conversations": [
        {"from": "human", "value": f"<image>How many balls? {i}"},
        {"from": "gpt", "value": f"<answer>{i}</answer>"},
      ],
    }
    for i in range(NUM_RECORDS)
  ]
  rows[5] = {
    "id": 5,
    "image": "images/5.png",
    "problem": "What number is it?",
    "solution": "The number is <answer> 55 </answer>",
  }
  problems, manifest = prepared(tmp_path, write_lines(tmp_path / "g", rows[:5]))
  assert manifest["counts"] == {"train": 5}
  check(problems, 3, question="<image>How many balls? 3", answer="3")
  write_lines(tmp_path / "g", [rows[5] | {"id": i} for i in range(5)])
  problems, _ = prepared(tmp_path / "again", tmp_path / "g")
  check(problems, 0, answer="55", solution="The number is  55")
  check(problems, 4, images=(png(5),), image_path="images/5.png")


def test_verl(tmp_path):
  rows = [
    {
      "data_source": "hiyouga/geometry3k",
      "prompt": [{"content": f"<image>Find x{i}. Think.", "role": "user"}],
      "images": [struct(i)],
      "ability": "math",
      "reward_model": {"ground_truth": SIDES[i], "style": "rule"},
      "extra_info": {
        "answer": SIDES[i],
        "index": i,
        "question": f"<image>Find x{i}.",
        "split": "train",
      },
    }
    for i in range(NUM_RECORDS)
  ]
  (tmp_path / "g").mkdir()
  pd.DataFrame(rows).to_parquet(tmp_path / "g/train.parquet")
  problems, manifest = prepared(tmp_path, tmp_path / "g")
  assert manifest["counts"] == {"train": NUM_RECORDS}
  check(
    problems,
    0,
    question="<image>Find x0. Think.",
    answer="5",
    images=(png(0),),
  )
  check(problems, 2, answer="2 \\sqrt { 13 }", answer_type="expression")
  problem = check(problems, 3, answer="12.5", precision=1)
  assert problem.metadata["extra_info"] == rows[3]["extra_info"]
  assert problem.metadata["data_source"] == "hiyouga/geometry3k"
  assert problem.metadata["reward_model"]["style"] == "rule"


def test_webdataset(tmp_path):
  (tmp_path / "g").mkdir()
  with tarfile.open(tmp_path / "g/train-000000.tar", "w") as tar:
    for i in range(NUM_RECORDS):
      answers = {"question": f"Which color? {i}", "answer": f"{i} cm"}
      for suffix, content in (
        ("png", png(i)),
        ("json", json.dumps(answers | {"page": i}).encode()),
      ):
        member = tarfile.TarInfo(f"sample{i:03d}.{suffix}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
  problems, manifest = prepared(tmp_path, tmp_path / "g")
  assert manifest["counts"] == {"train": NUM_RECORDS}
  for i in (0, 4, 11):
    problem = check(
      problems,
      i,
      pid=f"train-000000/sample{i:03d}",
      answer=str(i),
      unit="cm",
      images=(png(i),),
    )
    assert problem.metadata["page"] == i


def test_save_to_disk(tmp_path):
  rows = {
    "image": [struct(i) for i in range(NUM_RECORDS)],
    "problem": [f"How long is {i}?" for i in range(NUM_RECORDS)],
    "final": [f"{i}.25" for i in range(NUM_RECORDS)],
  }
  features = datasets.Features(
    image=datasets.Image(),
    problem=datasets.Value("string"),
    final=datasets.Value("string"),
  )
  table = datasets.Dataset.from_dict(rows, features=features)
  datasets.DatasetDict(train=table).save_to_disk(tmp_path / "g")
  columns = {"question": "problem", "answer": "final"}
  problems, manifest = prepared(tmp_path, tmp_path / "g", columns=columns)
  assert manifest["counts"] == {"train": NUM_RECORDS}
  for i in (0, 4, 11):
    check(
      problems,
      i,
      question=f"How long is {i}?",
      answer=f"{i}.25",
      precision=2,
      images=(png(i),),
    )


@pytest.mark.parametrize("separator, name", [(",", "a.csv"), ("\t", "a.tsv")])
def test_csv(tmp_path, separator, name):
  write_pictures(tmp_path / "g")
  rows = [
    {
      "index": 100 + i,
      "image": base64.b64encode(png(i)).decode(),
      "question": f"Which one, {i}?\nLook closely.",
      "A": f"cat {i}",
      "B": "dog",
      "C": "cow",
      "answer": "ABC"[i % 3],
      "category": "animals",
    }
    for i in range(NUM_RECORDS)
  ]
  pd.DataFrame(rows).to_csv(tmp_path / "g" / name, sep=separator, index=False)
  problems, manifest = prepared(tmp_path, tmp_path / "g" / name)
  assert manifest["counts"] == {"train": NUM_RECORDS}
  check(
    problems,
    100,
    question="Which one, 0?\nLook closely.",
    choices=("cat 0", "dog", "cow"),
    answer="cat 0",
    images=(png(0),),
    metadata={"category": "animals"},
  )
  check(problems, 101, answer="dog")
  check(problems, 111, answer="cow", images=(png(11),))
