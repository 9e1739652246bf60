"""Ask a model all questions of a benchmark, and score its answers as the benchmark does.

    python -m diffa2_mini.evaluate --benchmark toy      # after python data/toybench.py
    python -m diffa2_mini.evaluate --benchmark mmau --file mmau-test-mini.json --audio-root MMAU \\
        --size full --out mmau.jsonl
    python -m diffa2_mini.evaluate --benchmark mmau --file mmau-test-mini.json \\
        --score made_elsewhere.json

Each answer is written to --out when it is there; started again, the same command goes on where it
was, unless weights, settings, questions or clips have changed since. The result is printed, and
written as JSON beside the answers. A clip that cannot be read counts as a wrong answer; a question
whose answer is blank or none of its choices is asked, and not scored.
"""

from ..command.script import begin, progress, run_script

begin(__name__)  # Ctrl-C while the rest is imported

import argparse
import dataclasses
import sys
from pathlib import Path

from ..command import flags
from ..command.script import Parser
from ..data import read_manifest
from ..errors import require
from ..listen import Diffa2
from ..training import files
from . import scoreboard
from .answers import answer_questions, expect_clips, match, questions_in, resume, to_line
from .benchmarks import BENCHMARKS, BenchmarkQuestion, load_questions


def ask_all(args: argparse.Namespace, every: list[BenchmarkQuestion]) -> None:
    """Ask those of the first --limit questions that are not answered yet, and score these. The file
    of answers, which is locked meanwhile, may have answers to `every` question."""
    questions = every[:args.limit]
    expect_clips(questions)
    source = flags.model_source(args)
    config, decode, length = source.config, source.config.decode, BENCHMARKS[args.benchmark].length
    if length and not config.from_scratch:  # the authors' way: one block
        decode = dataclasses.replace(decode, gen_length=length, block_length=length, steps=length)
    decode = flags.decode_config(args, decode)
    device, dtype = flags.device_and_dtype(args, config)
    by = flags.identify_model(source, decode, dtype, args.merge_lora, args.quantize)
    with files.lock(args.out.parent, args.out.name):
        answers = resume(args.out, args.benchmark, by, every)
        left = [(i, each) for i, each in enumerate(questions) if each.id not in answers]
        n_known = len(questions) - len(left)
        print(f"{len(questions):,} questions, of which {n_known:,} are answered in {args.out}")
        how = (device, dtype, args.merge_lora, args.quantize)
        diffa2 = Diffa2.load(source, *how) if left else None
        verdicts = scoreboard.judged(questions, answers)
        with progress(total=len(questions), initial=n_known, unit="question") as bar:
            for start in range(0, len(left), args.batch_size):
                batch = left[start:start + args.batch_size]
                for (_, question), reply in zip(batch, answer_questions(diffa2, decode, batch)):
                    files.append(args.out, to_line(args.benchmark, by, question, reply))
                    answers[question.id] = reply
                verdicts += scoreboard.judged([question for _, question in batch], answers)
                bar.set_postfix_str(scoreboard.so_far(verdicts), refresh=False)
                bar.update(len(batch))
        scoreboard.publish(args.benchmark, questions, answers, args.out)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--benchmark", required=True, choices=list(BENCHMARKS))
    add("--file", type=Path, help="as published; asr: a manifest "
        "(default of toy: data/toy/toybench.json in a clone)")
    add("--audio-root", type=Path, metavar="DIR", help="of the file's paths (default: its folder)")
    add("--score", type=Path, metavar="ANSWERS",
        help="score answers made elsewhere; without --file they bring their questions")
    add("--out", type=Path,
        help="where answers go (default: runs/evaluate/BENCHMARK.jsonl); the result is beside them")
    add("--limit", type=int, help="ask the first so many questions alone")
    add("--batch-size", type=int, default=8, help="clips at a time (default: 8)")
    add("--shuffle-options", type=int, metavar="SEED",
        help="show the choices in an order that SEED and the question's id decide")
    flags.add_model_flags(add)
    args = parser.parse_args(argv)
    require(args.file or args.score or args.benchmark == "toy",
            f"--benchmark {args.benchmark} needs its --file")
    require(not (args.score and args.out), "--score writes beside ANSWERS; leave --out out")
    args.out = args.out or Path("runs", "evaluate", f"{args.benchmark}.jsonl")
    return args


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    rows = read_manifest(args.score) if args.score else []
    if args.score and not args.file:
        every = questions_in(rows, args.score, args.benchmark)
    else:
        every = load_questions(args.benchmark, args.file, args.audio_root, args.shuffle_options)
    if args.score:
        answers = match(rows, every, args.score, args.benchmark)
        scoreboard.publish(args.benchmark, every[:args.limit], answers, args.score)
        return
    try:
        ask_all(args, every)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; the same command goes on from {args.out}") from None


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
