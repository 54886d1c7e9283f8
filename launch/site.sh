#!/usr/bin/env bash
# Builds the site of the documents and the API, on a machine that has Python and
# nothing else:
#
#   bash launch/site.sh
#
# Open build/site/index.html. The search needs a server:
# `python3 -m http.server --directory build/site`. A dead link, or a page that is
# in no menu, ends the build with an error. Further arguments go to `mkdocs build`.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
ensure_venv
cd "$root"
# The theme names its successor at each build.
export NO_MKDOCS_2_WARNING=1
exec "$venv/bin/python" -m mkdocs build --strict "$@"
