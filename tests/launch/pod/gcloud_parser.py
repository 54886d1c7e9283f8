"""Parses calls with gcloud's own parser, in one process of gcloud's Python.

    gcloud_parser.py SDK < calls.json

Prints a line with the flags of each call. A call that gcloud rejects ends the
process as in gcloud.
"""

import json
import sys

sdk = sys.argv[1]
sys.path[:0] = [f"{sdk}/lib", f"{sdk}/lib/third_party"]

from googlecloudsdk import gcloud_main  # noqa: E402

parser = vars(gcloud_main.CreateCLI([]))["_CLI__parser"]
for words in json.load(sys.stdin):
  found = parser.parse_args(words)
  sys.stdout.write(json.dumps(sorted(found.GetSpecifiedArgNames())) + "\n")
