"""The harness itself catches what it is there to catch."""

import json

import pytest

from tests.fuzz import harness

VALID = [json.dumps({"size": 3, "names": ["a", "b"]}).encode(), b"\x00" * 64]


def test_inputs_depend_on_their_number_alone():
  first = [harness.damage(VALID, i) for i in range(200)]
  assert first == [harness.damage(VALID, i) for i in range(200)]
  assert len(set(first)) > 100
  assert any(x.startswith(b"[[[[") or b"[[[[" in x for x in first)


def test_a_refusal_is_no_fault():
  def refuse(content):
    if content not in VALID:
      raise ValueError("damaged")

  assert harness.fuzz(refuse, VALID, 0.1) > 10


@pytest.mark.parametrize("error", [KeyError, TypeError, RecursionError])
def test_another_exception_is_a_fault_and_names_the_input(error):
  def fail(content):
    if content not in VALID:
      raise error("x")

  with pytest.raises(error) as caught:
    harness.fuzz(fail, VALID, 5)
  assert caught.value.__notes__[0].startswith("Input ")


def test_an_endless_loop_is_a_fault():
  def loop(content):
    while content not in VALID:
      pass

  with pytest.raises(BaseException, match=r"more than 0\.2 seconds"):
    harness.fuzz(loop, VALID, 5, call_seconds=0.2)


def test_a_large_allocation_is_a_fault():
  def allocate(content):
    return content in VALID or bytearray(1 << 33)

  with pytest.raises(MemoryError):
    harness.fuzz(allocate, VALID, 5)
