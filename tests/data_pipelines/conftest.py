"""Completions of eight models, read once."""

import gzip
import json
from typing import Any

import pytest


@pytest.fixture(scope="session")
def responses(fixtures) -> list[dict[str, Any]]:
  """Each model's completions of all of testmini; tests must not change them."""
  path = fixtures / "mathvista_responses" / "responses.jsonl.gz"
  with gzip.open(path, "rt") as file:
    return [json.loads(line) for line in file]
