"""python -m internjax.hf convert SRC DST | check DIR"""

import argparse
import sys
from typing import get_args


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit code. What a person can mend is one line on stderr, not a traceback."""
    options = _parser().parse_args(arguments)
    from internjax.hf.convert import check, convert
    from internjax.hf.hub import check_push, push

    try:
        if options.command == "convert":
            if options.push is not None:
                check_push(options.push)
            elif options.public:
                raise ValueError("--public is for a repository that --push makes; name it, or leave --public out")
            proof = convert(
                options.source,
                options.folder,
                layout=options.layout,
                dtype=options.dtype,
                shard_size=options.shard_size,
                overwrite=options.overwrite,
                merge_adapters=options.merge_adapter,
                allow_unknown=tuple(options.allow_unknown),
            )
            print(
                f"{options.folder}: written and read back, largest logit difference {proof.max_logit_difference:.3g} "
                f"(to the source: {proof.max_logit_difference_to_source:.3g})"
            )
            if options.push is not None:
                print(f"pushed to {push(options.folder, options.push, private=not options.public)}")
        else:
            checked = check(options.folder)
            print(
                f"{options.folder}: {checked.num_files} files as written, largest logit difference "
                f"{checked.max_logit_difference:.3g}"
            )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    from internjax.hf.families import Layout

    parser = argparse.ArgumentParser(
        prog="python -m internjax.hf", description="Write and verify Hugging Face folders."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser(
        "convert",
        help="write any MODEL as a Hugging Face folder",
        description="MODEL: a Hugging Face folder, an adapter folder, BASE+ADAPTER (merged), a run, RUN@STEP, "
        "hf:ORG/NAME or modelscope:ORG/NAME.",
    )
    convert.add_argument("source", metavar="MODEL")
    convert.add_argument("folder", metavar="FOLDER")
    convert.add_argument(
        "--layout",
        choices=get_args(Layout),
        help="names of the tensors (default: the first that holds the model; llama for InternLM2)",
    )
    convert.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as in the source")
    convert.add_argument("--shard-size", default="5GB", help="largest weight file (default: 5GB)")
    convert.add_argument(
        "--merge-adapter",
        metavar="ADAPTER",
        nargs="+",
        default=[],
        help="adapter folders to merge on top of those that MODEL names",
    )
    convert.add_argument("--push", metavar="ORG/NAME", help="upload FOLDER to the Hugging Face hub (private) when done")
    convert.add_argument("--public", action="store_true", help="a repository that --push makes is public")
    convert.add_argument("--overwrite", action="store_true", help="replace FOLDER if it is a model folder")
    convert.add_argument(
        "--allow-unknown", metavar="FIELD", nargs="+", default=[], help="fields of config.json to read as absent"
    )
    check = commands.add_parser("check", help="verify a folder that convert (or a run) has written")
    check.add_argument("folder", metavar="FOLDER")
    return parser


if __name__ == "__main__":
    sys.exit(main())
