"""Divides problems into train and eval so that no picture is in both.

A pure function of the picture's hash: it holds no list, so adding or removing
records never moves another record. What `intake` makes of twins stands in
docs/adr/0006.
"""

import hashlib


def split_of(group: str, *, salt: str, eval_fraction: float) -> str:
  """The side that every problem of one picture falls on.

  Args:
    group: What must not be divided, such as `images.pixel_hash`.
    salt: Another salt is another, independent division.
    eval_fraction: Expected share of groups on the eval side, 0 to 1.

  Returns:
    "train" or "eval".
  """
  digest = hashlib.sha256(f"{salt}|{group}".encode()).digest()
  position = int.from_bytes(digest[:8]) / 2**64
  return "eval" if position < eval_fraction else "train"
