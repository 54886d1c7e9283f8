"""Divides problems into train and eval so that no image is in both.

The split is a pure function of the image's hash, so adding or removing records
never moves another record. docs/adr/0006 explains the rule for near-duplicates.
"""

import hashlib


def split_of(group: str, *, salt: str, eval_fraction: float) -> str:
  """The split of every problem that shows one image.

  Args:
    group: The hash of what must not be divided, such as `images.pixel_hash`.
    salt: Another salt is another, independent division.
    eval_fraction: Expected share of groups in eval, 0 to 1.

  Returns:
    "train" or "eval".
  """
  digest = hashlib.sha256(f"{salt}|{group}".encode()).digest()
  position = int.from_bytes(digest[:8]) / 2**64
  return "eval" if position < eval_fraction else "train"
