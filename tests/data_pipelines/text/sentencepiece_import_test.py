"""A rebuilt vocabulary encodes like its original file."""

import json
import os
import sys

import hypothesis
import pytest
import sentencepiece
from hypothesis import strategies
from sentencepiece import sentencepiece_model_pb2

from data_pipelines.text import sentencepiece_import
from data_pipelines.text import tokenizer as tokens

TEXTS = [
  f"Question:  How many {colour} {shape} are there?\n\nI see {n}. "
  f"<answer>{n}</answer>"
  for colour in ("red", "blue", "green")
  for shape in ("circles", "squares", "bars")
  for n in range(12)
]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SPACE = "\u2581"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
  tokens.train(TEXTS, path, vocab_size=512)
  return path


@pytest.fixture(scope="module")
def pieces(path):
  """Text, score and type of each piece of the SentencePiece file."""
  proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
  return [(piece.piece, piece.score, piece.type) for piece in proto.pieces]


@pytest.fixture(scope="module")
def gguf_path(pieces, tmp_path_factory):
  """A GGUF file like llama.cpp's: turns are controls, spaces plain."""
  gguf = pytest.importorskip("gguf", reason="the extra export is missing")
  path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
  writer = gguf.GGUFWriter(path, "gemma3")
  writer.add_tokenizer_model("llama")
  writer.add_token_list(
    [
      text.replace(SPACE, " ") if kind == USER_DEFINED else text
      for text, _, kind in pieces
    ]
  )
  writer.add_token_scores([score for _, score, _ in pieces])
  writer.add_token_types(
    [
      CONTROL if number in (3, 105, 106) else kind
      for number, (_, _, kind) in enumerate(pieces)
    ]
  )
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def tokenizer_json(pieces):
  """A tokenizer.json like transformers': merges in the order of results."""
  ids = {text: number for number, (text, _, _) in enumerate(pieces)}
  normal = {text: score for text, score, kind in pieces if kind == NORMAL}
  merges = [
    (-score, ids[text[:at]], ids[text[at:]], text[:at], text[at:])
    for text, score in normal.items()
    for at in range(1, len(text))
    if text[:at] in ids and text[at:] in ids
  ]
  return {
    "added_tokens": [
      {"id": number, "content": text.replace(SPACE, " "), "special": False}
      for number, (text, _, kind) in enumerate(pieces)
      if kind not in (NORMAL, BYTE)
    ],
    "model": {
      "type": "BPE",
      "byte_fallback": True,
      "vocab": ids,
      "merges": [[left, right] for *_, left, right in sorted(merges)],
    },
  }


@pytest.fixture(scope="module")
def json_path(pieces, tmp_path_factory):
  path = tmp_path_factory.mktemp("json") / "tokenizer.json"
  path.write_text(json.dumps(tokenizer_json(pieces)))
  return path


@pytest.fixture(scope="module", params=["gguf_path", "json_path"])
def both(request, path):
  """The tokenizer of the file, and the rebuilt one."""
  again = request.getfixturevalue(request.param)
  return tokens.Tokenizer(path), tokens.Tokenizer(again)


@hypothesis.given(
  strategies.lists(
    strategies.sampled_from(
      [*"Qhowred 0123?\n<>/é", "  ", "\n\n", *TEXTS[5].split(" "), "<unused7>"]
    )
  ).map("".join)
)
@hypothesis.settings(deadline=None, derandomize=True)
def test_a_rebuilt_vocabulary_encodes_and_decodes_as_the_file(both, text):
  file, again = both
  ids = file.encode(text)
  assert again.encode(text) == ids
  assert again.decode(ids) == file.decode(ids)


def test_a_rebuilt_vocabulary_has_every_piece_at_its_id(both):
  file, again = both
  assert again.vocab_size == file.vocab_size
  assert again.start_of_image == file.start_of_image
  pieces = [t._processor.IdToPiece(list(range(512))) for t in both]
  assert pieces[0] == pieces[1]
  kinds = [t._processor.IsByte(list(range(512))) for t in both]
  assert kinds[0] == kinds[1]


def test_two_spaces_that_are_a_piece_stay_one():
  """Converters write plain spaces; SentencePiece has its own sign."""
  pieces = [
    sentencepiece_import.Piece(f"<{n}>", 0.0, USER_DEFINED) for n in range(4)
  ]
  pieces += [
    sentencepiece_import.Piece(f"<0x{n:02X}>", 0.0, BYTE) for n in range(256)
  ]
  content = {
    "added_tokens": [
      *({"id": n, "content": p.text} for n, p in enumerate(pieces[:4])),
      {"id": 260, "content": "  "},
    ],
    "model": {
      "type": "BPE",
      "byte_fallback": True,
      "vocab": {p.text: n for n, p in enumerate(pieces)} | {"x": 261},
      "merges": [],
    },
  }
  model = sentencepiece_import.from_tokenizer_json(
    json.dumps(content).encode(), "name"
  )
  processor = sentencepiece.SentencePieceProcessor(model_proto=model)
  assert processor.Encode("x  x") == [261, 260, 261]
  # One space is no piece here, and is encoded as bytes.
  assert processor.Encode("x x") == [261, *(4 + b for b in SPACE.encode()), 261]


def test_older_merges_of_one_string_are_read_alike(pieces):
  new = tokenizer_json(pieces)
  old = json.loads(json.dumps(new))
  old["model"]["merges"] = [" ".join(pair) for pair in new["model"]["merges"]]
  models = [
    sentencepiece_import.from_tokenizer_json(json.dumps(x).encode(), "name")
    for x in (new, old)
  ]
  assert models[0] == models[1]


def test_the_soft_token_of_transformers_is_no_piece(pieces, tmp_path):
  content = tokenizer_json(pieces)
  soft = {"id": len(pieces), "content": "<image_soft_token>"}
  content["added_tokens"].append(soft)
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  tokenizer = tokens.Tokenizer(tmp_path / "tokenizer.json")
  assert tokenizer.vocab_size == len(pieces)


def test_a_gap_among_the_ids_is_refused(pieces, tmp_path):
  content = tokenizer_json(pieces)
  content["added_tokens"].append({"id": 9999, "content": "<far>"})
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  with pytest.raises(ValueError, match="ids from 0 on, each once"):
    tokens.Tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
  ("content", "match"),
  [
    (b"{", "must be a tokenizer.json"),
    (b"[]", "must be a tokenizer.json"),
    (b'{"model": {"vocab": {}}, "added_tokens": []}', "must be a tokenizer"),
    (
      b'{"model": {"type": "WordPiece", "vocab": {}, "merges": []},'
      b' "added_tokens": []}',
      "type 'WordPiece'",
    ),
  ],
)
def test_a_json_of_something_else_is_refused(content, match, tmp_path):
  (tmp_path / "tokenizer.json").write_bytes(content)
  with pytest.raises(ValueError, match=match):
    tokens.Tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
  ("change", "match"),
  [
    ({"merges": [["a", 2]]}, "item 1 of a merge must be a string"),
    ({"merges": ["a b c"]}, "must have two halves"),
    ({"merges": 3}, "'merges' in its model must be a list"),
    ({"vocab": {"a": 0, "b": "1"}}, "item 1 of its ids must be an integer"),
    ({"vocab": {"a": 0, "b": [1]}}, "item 1 of its ids must be an integer"),
    ({"vocab": {"a": 10**400}}, "must give its 2 pieces the ids from 0"),
    ({"vocab": {"\ud800": 1}}, "piece 1 must be text"),
    ({"vocab": [["a", 0]]}, "'vocab' in its model must be an object"),
    ({"added": [{"id": 0, "content": 3}]}, "'content' in an added token must"),
    ({"added": [3]}, "item 0 of its added_tokens must be an object"),
    ({"added": {}}, "'added_tokens' in it must be a list"),
    ({"merges": "nested"}, "nests too deeply"),
  ],
)
def test_a_tokenizer_json_of_other_types_is_refused(change, match, tmp_path):
  model = {"type": "BPE", "byte_fallback": True, "vocab": {}, "merges": []}
  added = change.pop("added", [{"id": 0, "content": "<pad>"}])
  text = json.dumps({"model": model | change, "added_tokens": added})
  text = text.replace('"nested"', "[" * 10**6)
  (tmp_path / "tokenizer.json").write_text(text)
  match = f"tokenizer.json must be a tokenizer.json of.*{match}"
  with pytest.raises(ValueError, match=match):
    tokens.Tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("text", ["", "a\0b", "\x7f\x7f"])
def test_a_piece_that_would_end_the_process_is_refused(path, tmp_path, text):
  """SentencePiece itself aborts where a piece holds a zero byte."""
  proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
  proto.pieces.add(piece=text, score=0.0, type=USER_DEFINED)
  content = proto.SerializeToString().replace(b"\x7f\x7f", b"\xff\xff")
  (tmp_path / "bad.model").write_bytes(content)
  with pytest.raises(ValueError, match=r"not a SentencePiece .*piece \d+ is"):
    tokens.Tokenizer(tmp_path / "bad.model")


@pytest.mark.parametrize("name", ["t.model", "tokenizer.json", "t.gguf"])
def test_a_pipe_is_no_tokenizer(name, tmp_path):
  os.mkfifo(tmp_path / name)
  with pytest.raises(ValueError, match=f"{name} must be .* a regular file"):
    tokens.Tokenizer(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"noise" * 99])
def test_a_gguf_of_noise_is_refused(content, tmp_path):
  (tmp_path / "noise.gguf").write_bytes(content)
  with pytest.raises(ValueError, match="noise.gguf must be a GGUF file with"):
    tokens.Tokenizer(tmp_path / "noise.gguf")


def test_a_vocabulary_of_a_gguf_file_needs_no_package(gguf_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "gguf", None)
  assert tokens.Tokenizer(gguf_path).vocab_size == 512


@pytest.mark.parametrize(
  ("change", "match"),
  [
    (lambda w: w.add_token_list(["a", "b"]), "2 tokens, 5 scores and 5 types"),
    (lambda w: w.add_string("tokenizer.ggml.tokens", "a"), "must be a list"),
    (
      lambda w: w.add_array("tokenizer.ggml.tokens", [1]),
      "item 0 of its .*str",
    ),
    (lambda w: w.add_array("tokenizer.ggml.scores", ["a"]), "finite number"),
    (lambda w: w.add_token_types([99] * 5), "piece 4 must be text of one of"),
  ],
)
def test_a_gguf_vocabulary_of_other_types_is_refused(tmp_path, change, match):
  gguf = pytest.importorskip("gguf", reason="the extra export is missing")
  path = tmp_path / "bad.gguf"
  writer = gguf.GGUFWriter(path, "gemma3")
  writer.add_tokenizer_model("llama")
  writer.add_token_list(list("abcde"))
  writer.add_token_scores([0.0] * 5)
  writer.add_token_types([NORMAL] * 5)
  change(writer)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  with pytest.raises(ValueError, match=f"bad.gguf must be a GGUF.*{match}"):
    tokens.Tokenizer(path)


def test_the_librarys_own_file_is_found_in_its_cache(
  path, tmp_path, monkeypatch
):
  monkeypatch.setenv("GEMMA_CACHE_DIR", str(tmp_path))
  with pytest.raises(ValueError, match="tokenizer_gemma3.model must be a file"):
    tokens.Tokenizer("gemma")
  (tmp_path / "tokenizer").mkdir()
  file = tmp_path / "tokenizer" / "tokenizer_gemma3.model"
  file.write_bytes(path.read_bytes())
  assert tokens.Tokenizer("gemma").fingerprint == (
    tokens.Tokenizer(path).fingerprint
  )


@pytest.mark.parametrize("shift", [0, 1])
def test_gemmas_image_tokens_have_gemmas_ids(tmp_path, shift):
  """Only a vocabulary as large as Gemma's must have these ids."""
  named = {
    0: "<pad>",
    1: "<eos>",
    2: "<bos>",
    3: "<unk>",
    105: "<start_of_turn>",
  }
  named |= {106: "<end_of_turn>", 107: "\n", 108: "\n\n"}
  named |= {
    255_999 + shift: "<start_of_image>",
    256_000 + shift: "<end_of_image>",
  }
  named |= {200 + n: f"<0x{n:02X}>" for n in range(256)}
  texts = [named.get(n, f"piece {n}") for n in range(256_100)]
  pieces = [
    sentencepiece_import.Piece(
      text.replace(" ", SPACE), 0.0, BYTE if text.startswith("<0x") else NORMAL
    )
    for text in texts
  ]
  (tmp_path / "large.model").write_bytes(
    sentencepiece_import._serialize(pieces)
  )
  if shift:
    with pytest.raises(
      ValueError, match="'<start_of_image>' at id 256000, .*255"
    ):
      tokens.Tokenizer(tmp_path / "large.model")
  else:
    tokenizer = tokens.Tokenizer(tmp_path / "large.model")
    assert (tokenizer.start_of_image, tokenizer.end_of_image) == (
      255_999,
      256_000,
    )
