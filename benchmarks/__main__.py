"""Train the runs of a study and write its report: ``python -m benchmarks main``.

Results are kept in ``OUTPUT/STUDY.json``: what is there already is not trained again, so an interrupted study goes on
where it stopped, and more seeds or learning rates train only what is new.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import torch

from benchmarks.report import report
from benchmarks.store import Store
from benchmarks.studies import STUDIES, Study
from benchmarks.sweep import sweep
from benchmarks.training import Device


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", type=Path, help="text to train on, .xz or plain; default: Python's own sources")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", help="of the files in OUTPUT; default: the study's")
    parser.add_argument("--seeds", type=int, help="seeds 0 to SEEDS - 1; default: the study's")
    parser.add_argument("--lr", type=float, nargs="+", help="default: the study's")
    parser.add_argument("--only", nargs="+", metavar="LABEL", help="variants to run; default: all")
    parser.add_argument("--steps", type=int, help="default: the study's")
    parser.add_argument("--batch", type=int, help="default: the study's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with one thread")
    parser.add_argument("--stack", type=int, default=1, help="seeds that train side by side in one process")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model (large ones gain)")
    parser.add_argument("--no-graph", action="store_true", help="do not record CUDA graphs")
    parser.add_argument("--time-limit", type=float, help="seconds after which nothing is running any more")
    parser.add_argument("--report-only", action="store_true", help="train nothing; write the .md and the plot")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here; leave it out to train on the CPU")
    if args.data is None and STUDIES[args.study].needs_data and not args.report_only:
        parser.error(f"{args.study} trains on another text than Python's sources; name one with --data FILE")
    if args.compile and args.stack > 1:
        parser.error("--compile goes with --stack 1")
    unknown = set(args.only or ()) - set(STUDIES[args.study].variants)
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))} not in {', '.join(STUDIES[args.study].variants)}")
    return args


def chosen(study: Study, args: argparse.Namespace) -> Study:
    """The study with what the command line changes of it."""
    sizes = {key: value for key in ("steps", "batch") if (value := getattr(args, key)) is not None}
    return dataclasses.replace(
        study,
        setting=dataclasses.replace(study.setting, **sizes),
        seeds=args.seeds or study.seeds,
        lrs=tuple(args.lr or study.lrs),
        edge=() if args.lr else study.edge,
        variants={key: value for key, value in study.variants.items() if not args.only or key in args.only},
    )


def main() -> None:
    began = time.time()
    args = parse()
    study = chosen(STUDIES[args.study], args)
    store = Store(args.output / f"{args.name or args.study}.json")
    if not args.report_only:
        deadline = began + args.time_limit if args.time_limit else float("inf")
        device = Device(args.device, args.compile, not args.no_graph)
        sweep(study, store, args.data, device, args.jobs, args.stack, deadline)
    report(args.name or args.study, dataclasses.replace(study, variants=STUDIES[args.study].variants), store)


if __name__ == "__main__":
    main()
