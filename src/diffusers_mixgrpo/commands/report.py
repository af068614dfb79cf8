"""Writes one HTML page of a run, also of an unfinished one, from its folder.

    diffusers-mixgrpo report outputs/toy

With two folders it compares two runs:

    diffusers-mixgrpo report outputs/toy outputs/other
"""

import argparse

from ..reports.html_report import write_report


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the `output_dir` of a run")
    parser.add_argument("other", nargs="?", help="the `output_dir` of another run, to compare with")
    args = parser.parse_args(argv)
    try:
        print(f"Written: {write_report(args.folder, args.other)}")
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
