"""Arguments that several commands have."""

import argparse


def add_mount_options(parser: argparse.ArgumentParser, help_text: str = "mount options") -> None:
    """Declare ``-o``, as mount(8) has it; ``options.parse_options`` reads what it collects."""
    parser.add_argument(
        "-o", dest="options", action="append", default=[], metavar="OPTIONS", help=help_text
    )
