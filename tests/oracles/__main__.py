"""``make oracles``: trace what the archives lack, every family."""

from __future__ import annotations

import sys

from tests.oracles import o1

sys.exit(o1.main(["--all", *sys.argv[1:]]))
