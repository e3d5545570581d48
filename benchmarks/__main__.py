"""Train the runs of a study, or of a group of them, and write its report: ``python -m benchmarks main``.

Results are kept in ``OUTPUT/STUDY.json``: what is there already is not trained again, so an interrupted study goes on
where it stopped, and more seeds or learning rates train only what is new.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import torch

from benchmarks.pages.report import report
from benchmarks.studies import GROUPS, SIZES, STUDIES, Study
from benchmarks.studies.decoder import Shape
from benchmarks.studies.setting import Device
from benchmarks.studies.store import Store
from benchmarks.studies.sweep import sweep, visible_gpus


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("study", choices=[*STUDIES, *GROUPS])
    parser.add_argument(
        "--data",
        type=Path,
        help="text to train on, or .jsonl with questions and answers; plain or .xz; default: Python's own sources",
    )
    parser.add_argument(
        "--pretrain-on",
        type=Path,
        metavar="FILE",
        help="text of the weights that a study of finetuning starts from; default: Python's own sources",
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", help="of the files in OUTPUT; default: the study's")
    parser.add_argument("--seeds", type=int, help="seeds 0 to SEEDS - 1; default: the study's")
    parser.add_argument("--lr", type=float, nargs="+", help="default: the study's")
    parser.add_argument("--only", nargs="+", metavar="LABEL", help="variants to run; default: all")
    parser.add_argument("--size", choices=SIZES, help="a GPT-2-like model of this size; default: the study's model")
    parser.add_argument("--steps", type=int, help="default: the study's")
    parser.add_argument("--batch", type=int, help="default: the study's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--jobs", type=int, help="processes, each with one thread; default: one, or one per GPU")
    parser.add_argument("--stack", type=int, default=1, help="seeds that train side by side in one process")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model (large ones gain)")
    parser.add_argument("--no-graph", action="store_true", help="do not record CUDA graphs")
    parser.add_argument("--time-limit", type=float, help="seconds after which nothing is running any more")
    parser.add_argument("--report-only", action="store_true", help="train nothing; write the .md and the plot")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="add the runs in these; train nothing")
    args = parser.parse_args()
    args.report_only |= bool(args.merge)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here; leave it out to train on the CPU")
    args.jobs = args.jobs or max(1, len(visible_gpus()) if args.device == "cuda" else 1)
    args.studies = GROUPS.get(args.study, (args.study,))
    if args.data is None and any(STUDIES[name].needs_data for name in args.studies) and not args.report_only:
        parser.error(f"{args.study} trains on another text than Python's sources; name one with --data FILE")
    if args.compile and args.stack > 1:
        parser.error("--compile goes with --stack 1")
    if len(args.studies) > 1 and (args.name or args.only or args.merge):
        parser.error(f"--name, --merge and --only go with one study; {args.study} is {', '.join(args.studies)}")
    if args.size and not all(is_gpt2(STUDIES[name]) for name in args.studies):
        parser.error(f"--size names a GPT-2-like model, and {args.study} trains another; leave it out")
    if args.pretrain_on and not all(STUDIES[name].pretrained for name in args.studies):
        parser.error(f"--pretrain-on: {args.study} starts from random weights; leave it out")
    if absent := [str(file) for file in args.merge or () if not file.is_file()]:
        parser.error(f"--merge: {', '.join(absent)} does not exist; name STUDY.json of another machine's --output")
    unknown = set(args.only or ()) - set(STUDIES[args.studies[0]].variants)
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))} not in {', '.join(STUDIES[args.studies[0]].variants)}")
    return args


def is_gpt2(study: Study) -> bool:
    shape = study.setting.shape
    return isinstance(shape, Shape) and not shape.llama


def chosen(study: Study, args: argparse.Namespace) -> Study:
    """The study with what the command line changes of it."""
    fields = {key: value for key in ("steps", "batch") if (value := getattr(args, key)) is not None}
    if args.size:
        fields["shape"] = SIZES[args.size]
    return dataclasses.replace(
        study,
        setting=dataclasses.replace(study.setting, **fields),
        seeds=args.seeds or study.seeds,
        lrs=tuple(args.lr or study.lrs),
        edge=() if args.lr else study.edge,
        rates={} if args.lr else study.rates,
        first=() if args.lr or args.seeds else study.first,
        variants={key: value for key, value in study.variants.items() if not args.only or key in args.only},
    )


def main() -> None:
    began = time.time()
    args = parse()
    names = {name: args.name or "-".join(filter(None, (name, args.size))) for name in args.studies}
    studies = {name: chosen(STUDIES[name], args) for name in names}
    files = {name: args.output / f"{names[name]}.json" for name in names}
    if not args.report_only:
        deadline = began + args.time_limit if args.time_limit else float("inf")
        device = Device(args.device, args.compile, not args.no_graph)
        stores = [(studies[name], Store(files[name])) for name in names]
        sweep(stores, args.data, device, args.jobs, args.stack, deadline, args.pretrain_on)
    for file in args.merge or ():
        print(f"{file}: {Store(files[args.study]).merge(file)} new runs")
    for name, study in studies.items():
        report(names[name], dataclasses.replace(study, variants=STUDIES[name].variants), Store(files[name]))


if __name__ == "__main__":
    main()
