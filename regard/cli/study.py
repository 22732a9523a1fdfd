"""`regard study`: test a paper's claim small, and say whether it held."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from regard.cli.command import Parser, say
from regard.errors import RegardError

if TYPE_CHECKING:
    from regard.studies import Outcome

OUT = "regard-studies"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = Parser(
        prog="regard study",
        description=__doc__,
        epilog="Without a SLUG the studies are listed, with what came out.",
    )
    parser.add_argument("slugs", nargs="*", metavar="SLUG", help="a study, or several")
    parser.add_argument("--all", action="store_true", help="run every study there is")
    parser.add_argument("--quick", action="store_true", help="run at the size for a try, in seconds")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="what all chance comes from (0)")
    parser.add_argument("--out", metavar="DIR", help=f"folder to write to (default: {OUT})")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on after the steps that an earlier run finished (default)",
    )
    parser.add_argument("--table", metavar="DIR", help="only tabulate the outcomes in DIR, as DIR/README.md")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """List, tabulate or run studies."""
    if options.table is not None:
        return _tabulate(options)
    if options.all and options.slugs:
        raise RegardError("--all runs every study; give it or names, not both.")
    if not (options.all or options.slugs):
        return _list(options.out)
    from regard.studies import all_studies, find_study
    from regard.studies.running import require_scipy

    slugs = list(all_studies()) if options.all else list(dict.fromkeys(options.slugs))
    for slug in slugs:
        find_study(slug)
    require_scipy()
    if len(slugs) == 1 and not options.all:
        _run_one(slugs[0], options)
        return 0
    return _run_many(slugs, options)


def _tabulate(options: argparse.Namespace) -> int:
    from regard.studies.table import write_page

    if options.all or options.slugs or options.quick:
        raise RegardError("--table runs nothing; give it without a study, --all or --quick.")
    say(f"wrote {write_page(options.table)}\n")
    return 0


def _run_one(slug: str, options: argparse.Namespace) -> Outcome:
    from regard.studies import run as run_study

    out = Path(OUT if options.out is None else options.out)
    try:
        outcome = run_study(slug, quick=options.quick, seed=options.seed, out=out, resume=options.resume)
    except KeyboardInterrupt:
        print(f"The steps that {slug} finished are kept; the same command goes on.", file=sys.stderr)
        raise
    say("\n".join(outcome.lines()) + "\n")
    picture = out / f"{outcome.name}.png"
    if picture.is_file():
        say(f"wrote {out / outcome.name}.json and {picture.name}\n")
    else:
        say(f'wrote {out / outcome.name}.json; no picture: run `pip install "regard[study]"`, then again.\n')
    return outcome


def _run_many(slugs: Sequence[str], options: argparse.Namespace) -> int:
    """Run one after the other; a failure is reported, and the rest go on."""
    failed = []
    for slug in slugs:
        try:
            _run_one(slug, options)
        except RegardError as error:
            failed.append(slug)
            print(f"regard: {slug}: {error}", file=sys.stderr)
        except Exception:
            failed.append(slug)
            print(f"regard: {slug} failed:\n{traceback.format_exc()}", file=sys.stderr)
        say("\n")
    say(f"{len(slugs) - len(failed)} of {len(slugs)} studies ran")
    say(f"; these failed: {', '.join(failed)}.\n" if failed else ".\n")
    return 1 if failed else 0


def _list(out: str | None) -> int:
    from regard.runtime.table import Table
    from regard.studies import all_studies, outcomes_in

    if out is not None and not Path(out).is_dir():
        raise RegardError(f"--out: there is no folder {out} to read outcomes from.")
    outcomes: dict[str, Outcome] = {}
    for folder in _outcome_folders() if out is None else [Path(out)]:
        outcomes |= outcomes_in(folder)
    known = all_studies()
    told = {slug: outcomes.get(slug) for slug in known}
    columns = {
        "study": list(known),
        "paper": [kind.paper for kind in known.values()],
        "outcome": [f"{o.verdict} ({o.held})" if o else "not run" for o in told.values()],
    }
    say(f"{Table(columns)}\n")
    say("`regard study SLUG --quick` tries one in seconds; `regard study SLUG` runs it in full.\n")
    return 0


def _outcome_folders() -> list[Path]:
    """Where outcomes are: those that come with regard's source, then those of runs in the present folder."""
    import regard

    return [Path(regard.__file__).parent.parent / "docs" / "results", Path(OUT)]
