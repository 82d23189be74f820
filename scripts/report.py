"""Reports on a folder of runs: tables, pictures, one HTML page, a record to commit. python -m scripts.report --help"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import UserError, run_main
from scripts.arguments import Parser
from scripts.reporting.recipes import apart, first_published_cells
from scripts.reporting.records import read_record, update_document, write_record
from scripts.reporting.tables import ABOUT_WELCH, TEST, comparison, log_table, page_tables, render, report
from scripts.runs import Run, by_table, order, read_runs


def main(arguments: list[str]) -> int:
    parser = Parser(
        prog="python -m scripts.report",
        description="Tables, pictures and a page of run folders, or of a committed record of them.",
    )
    parser.add_argument("folder", type=Path, nargs="*", help="a folder with run folders below it, or a record")
    parser.add_argument("--markdown", action="store_true", help="print tables as Markdown")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves (png, pdf, svg)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write tables, all pictures and their numbers there")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write everything as one page that needs no network")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write results and curves as JSON, to be committed")
    parser.add_argument("--reference", type=Path, metavar="RECORD", help="say which runs leave the band of a record's")
    parser.add_argument(
        "--update", type=Path, nargs="+", metavar="FILE", help="write the tables in Markdown files anew"
    )
    parser.add_argument("--bundle", type=Path, metavar="RUN", help="write RUN's results and weights, for a release")
    options = parser.parse_args(arguments)
    if options.bundle:
        from scripts.reporting.bundle import write_bundle

        print(f"bundle: {write_bundle(options.bundle, options.out or Path('bundles'))}")
        return 0
    if not options.folder and not options.update:
        parser.error("the following arguments are required: folder")
    status = report_on(*read(options.folder), options) if options.folder else 0
    for path in options.update or ():  # whose record may be the one just written
        print(f"{path}: {update_document(path, render)} tables written")
    return status


def read(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Runs of folders and records, and a line for each unusable file. UserError for nothing at all."""
    runs, problems = read_runs(*(path for path in paths if not path.is_file()))
    runs += [run for path in paths if path.is_file() for run in read_record(path)]
    if not runs and not problems:
        raise UserError(f"{' '.join(map(str, paths))}: no runs below this folder; a run folder holds a config.yaml")
    return apart(sorted(runs, key=order)), problems


def report_on(runs: list[Run], problems: list[str], options: Any) -> int:
    """Do what `options` ask for. Returns 1 if a run leaves the reference's band, else 0."""
    tested = False
    for table, of_table in by_table(runs).items():
        print(report(table, of_table, first_published_cells(table), options.markdown), end="\n\n")
        if compared := comparison(of_table, options.markdown):
            print(compared, end="\n\n")
            tested = tested or TEST in compared
        if log := log_table(table, of_table, options.markdown):
            print(log, end="\n\n")
    if tested:
        print(ABOUT_WELCH, end="\n\n")
    panels, status = [], 0
    if options.reference:
        from scripts.reporting.reference import compare

        lines, left, panels = compare(runs, apart(read_record(options.reference)))
        print(*lines, sep="\n", end="\n\n")
        status = int(left)
    if options.plot:
        from scripts.plot import plot_curves  # importing matplotlib takes a second

        plot_curves([run for run in runs if not run.trial], options.plot)
        print(f"curves: {options.plot}")
    if options.out or options.html:
        from scripts.reporting.pictures import pictures

        panels = pictures(runs) + panels
    if options.out:
        from scripts.reporting.drawing import draw_all

        draw_all(panels, options.out)
        tables = "\n\n".join(render(runs, kind) for kind in ("results", "comparison"))
        (options.out / "tables.md").write_text(tables + "\n", encoding="utf-8")
        print(f"tables, pictures and their numbers: {options.out}")
    if options.html:
        from scripts.reporting.page import write_page

        write_page(options.html, page_tables(runs), panels, runs, problems)
        print(f"page: {options.html}")
    if options.record:
        print(f"record: {options.record}, {write_record(options.record, runs)} runs")
    for problem in dict.fromkeys(problems):
        print(f"skipped: {problem}")
    return status


if __name__ == "__main__":
    run_main(main)
