"""The tokenizer: Gemma's ids, exact round trips, no controls in text."""

import io
import pickle
import string

import hypothesis
import pytest
import sentencepiece
from hypothesis import strategies

from data_pipelines.text import tokenizer as tokens
from data_pipelines.text.chat_format import GEMMA3

TEXTS = [
  f"Question: How many {colour} {shape} are there?\n\nI see {n}. "
  f"<answer>{n}</answer>"
  for colour in ("red", "blue", "green")
  for shape in ("circles", "squares", "bars")
  for n in range(12)
]
CONTROL_NAMES = [
  "<pad>",
  "<eos>",
  "<bos>",
  "<mask>",
  "[multimodal]",
  "<unused7>",
  "<start_of_turn>",
  "<end_of_turn>",
  "<start_of_image>",
  "<end_of_image>",
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
  tokens.train(TEXTS, path, vocab_size=512)
  return path


@pytest.fixture(scope="module")
def tokenizer(path):
  return tokens.Tokenizer(path)


def sentencepiece_file(path, **options):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.Train(
    sentence_iterator=iter(TEXTS),
    model_writer=model,
    model_type="bpe",
    vocab_size=600,
    hard_vocab_limit=False,
    minloglevel=2,
    **options,
  )
  path.write_bytes(model.getvalue())
  return path


def gemma_pieces():
  return [
    "<mask>",
    "[multimodal]",
    *(f"<unused{i}>" for i in range(99)),
    "<start_of_turn>",
    "<end_of_turn>",
    "\n",
    "\n\n",
  ]


GEMMA_IDS = dict(
  pad_id=0,
  eos_id=1,
  bos_id=2,
  unk_id=3,
  pad_piece="<pad>",
  eos_piece="<eos>",
  bos_piece="<bos>",
)


def test_the_same_texts_give_the_same_file(path, tmp_path):
  tokens.train(iter(TEXTS), tmp_path / "again.model", vocab_size=512)
  assert (tmp_path / "again.model").read_bytes() == path.read_bytes()
  assert list(tmp_path.iterdir()) == [tmp_path / "again.model"]


def test_other_texts_have_another_fingerprint(tokenizer, tmp_path):
  tokens.train(TEXTS[1:], tmp_path / "other.model", vocab_size=512)
  other = tokens.Tokenizer(tmp_path / "other.model")
  assert other.fingerprint != tokenizer.fingerprint
  assert len(other.fingerprint) == 64


def test_image_tokens_follow_gemmas_own_layout(tokenizer):
  assert tokenizer.start_of_image == 109
  assert tokenizer.end_of_image == 110
  assert tokenizer.encode("\n") == [107]
  assert tokenizer.encode("\n\n") == [108]
  assert tokenizer.vocab_size <= 512


def test_image_tokens_are_found_by_name(tmp_path):
  """Gemma's own vocabulary has them at 255999 and 256000."""
  fillers = [f"<filler{i}>" for i in range(40)]
  images = ["<start_of_image>", "<end_of_image>"]
  tokenizer = tokens.Tokenizer(
    sentencepiece_file(
      tmp_path / "gemma.model",
      user_defined_symbols=gemma_pieces() + fillers + images,
      **GEMMA_IDS,
    )
  )
  assert tokenizer.start_of_image == 109 + 40
  assert tokenizer.end_of_image == 110 + 40
  assert tokenizer.start_of_image not in tokenizer.encode("<start_of_image>")


@pytest.mark.parametrize(
  "options",
  [
    {},
    dict(GEMMA_IDS, user_defined_symbols=gemma_pieces()[1:]),
    dict(GEMMA_IDS, user_defined_symbols=gemma_pieces()),
    dict(
      GEMMA_IDS,
      eos_id=2,
      bos_id=1,
      user_defined_symbols=[
        *gemma_pieces(),
        "<start_of_image>",
        "<end_of_image>",
      ],
    ),
  ],
  ids=["plain", "shifted", "no images", "eos and bos swapped"],
)
def test_a_file_with_another_layout_is_refused(options, tmp_path):
  path = sentencepiece_file(tmp_path / "other.model", **options)
  with pytest.raises(ValueError, match="other.model has .*Gemma 3's"):
    tokens.Tokenizer(path)


def test_a_file_of_noise_is_refused(tmp_path):
  (tmp_path / "noise.model").write_bytes(b"not a model")
  with pytest.raises(ValueError, match="not a SentencePiece model"):
    tokens.Tokenizer(tmp_path / "noise.model")


# SentencePiece writes a space as this character, and decodes it as one.
@hypothesis.given(
  strategies.text(
    strategies.characters(codec="utf-8", exclude_characters="\u2581\0")
  )
)
@hypothesis.settings(deadline=None, derandomize=True)
def test_text_survives_a_round_trip(tokenizer, text):
  assert tokenizer.decode(tokenizer.encode(text)) == text


@hypothesis.given(
  strategies.lists(
    strategies.sampled_from([*CONTROL_NAMES, "<", "[", "a", " ", "\n"])
  ).map("".join)
)
@hypothesis.settings(deadline=None, derandomize=True)
def test_no_text_turns_into_control_ids(tokenizer, text):
  ids = tokenizer.encode(text)
  assert all(i > 108 or i == 107 or i == 108 for i in ids)
  assert tokenizer.start_of_image not in ids
  assert tokenizer.end_of_image not in ids
  assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("stop", GEMMA3.stop_ids)
def test_decoding_ends_at_the_first_stop_id(tokenizer, stop):
  five, six = tokenizer.encode("5"), tokenizer.encode("6")
  assert tokenizer.decode([*five, stop, *six]) == "5"


def test_decoding_drops_controls_and_image_placeholders(tokenizer):
  five = tokenizer.encode("5")
  noise = [
    GEMMA3.pad,
    GEMMA3.bos,
    GEMMA3.start_of_turn,
    GEMMA3.image_placeholder,
    tokenizer.start_of_image,
    tokenizer.end_of_image,
    50,
    tokenizer.vocab_size,
  ]
  assert tokenizer.decode([*noise, *five, *noise]) == "5"


def test_the_answer_tag_is_one_piece(tokenizer):
  assert len(tokenizer.encode("<answer>")) == 1
  assert len(tokenizer.encode("</answer>")) == 1


def test_digits_stand_alone(tokenizer):
  assert len(tokenizer.encode("11")) == 2


def test_words_of_the_texts_are_few_pieces(tokenizer):
  """A tiny model pays for every piece of the template in every prompt."""
  assert len(tokenizer.encode("Question: How many red")) <= 6


def test_more_characters_than_the_vocabulary_holds_still_train(tmp_path):
  texts = [chr(0x4E00 + i) + string.ascii_letters for i in range(3000)]
  tokens.train(texts, tmp_path / "many.model", vocab_size=512)
  tokenizer = tokens.Tokenizer(tmp_path / "many.model")
  assert tokenizer.vocab_size <= 512
  assert tokenizer.decode(tokenizer.encode(texts[-1])) == texts[-1]


def test_a_vocabulary_without_room_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"vocab_size \(300\) must be at least"):
    tokens.train(TEXTS, tmp_path / "tiny.model", vocab_size=300)


def test_no_text_is_refused(tmp_path):
  with pytest.raises(ValueError, match="no text"):
    tokens.train(["", " "], tmp_path / "none.model", vocab_size=512)


def test_a_tokenizer_can_be_sent_to_another_process(tokenizer):
  copy = pickle.loads(pickle.dumps(tokenizer))
  assert copy.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
