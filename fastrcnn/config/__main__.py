"""``python -m fastrcnn.config [FILE] [KEY VALUE ...]``: print the effective configuration."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from fastrcnn.config import ConfigError, dump_config, load_config
from fastrcnn.config.describe import markdown


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fastrcnn.config",
        description="Print the effective configuration: the defaults, then FILE, then the KEY VALUE pairs.",
        epilog='example: python -m fastrcnn.config configs/e2e_mask_rcnn_R_50_FPN_1x.yaml SOLVER.STEPS "(100, 200)"',
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help="YAML file; without it, the defaults")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="keys to change")
    parser.add_argument("--markdown", action="store_true", help="print the table of all keys (docs/configuration.md)")
    arguments = parser.parse_args(argv)
    if arguments.markdown:
        sys.stdout.write(markdown())
        return 0
    path, overrides = arguments.file, arguments.overrides
    if path is not None and re.fullmatch(r"[A-Za-z0-9_.]+(=.*)?", path) and not path.endswith((".yaml", ".yml")):
        path, overrides = None, [path, *overrides]
    try:
        sys.stdout.write(dump_config(load_config(path, overrides)))
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
