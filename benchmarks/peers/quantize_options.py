"""The command line that both quantizing peers share. They run it in their own environments, without moepress."""

import argparse
from pathlib import Path


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """MODEL OUT --bits --group-size --tokens-file --keep --dtype; a peer adds its own options."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--tokens-file", type=Path, required=True)
    parser.add_argument("--keep", nargs="*", default=[], help="regular expressions of modules that stay")
    parser.add_argument("--dtype", default="auto", help="what the model computes in; auto: as it is stored")
    return parser
