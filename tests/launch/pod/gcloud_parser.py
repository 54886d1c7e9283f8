"""Parses calls with gcloud's own parser, all in one process of gcloud's Python.

    gcloud_parser.py SDK < calls.json

For each call, a list of words, a line: the flags that were given; or the
process ends as gcloud does where one is not accepted.
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
