"""From answers to figures: accuracy on a manifest, as training prints it, and the result of a
benchmark as text and as JSON."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..command.table import N_LISTED, columns, listed
from ..data import Example
from ..errors import require
from ..training.files import write_whole
from .answers import Answer
from .benchmarks import BENCHMARKS, BenchmarkQuestion, can_be_scored
from .scoring import (
    NORMALISATION,
    WordErrors,
    is_bare_letter,
    is_right,
    normalise,
    score_mended,
    word_errors,
)

INCOMPLETE = "clips that end early or are damaged, used as far as they go"


# ----------------------------------------------------------------------------------------- figures


def mean(values: list[float]) -> float:
    """Not a number where there are none."""
    return float(np.mean(values)) if values else float("nan")


def wilson(right: int, count: int) -> list[float]:
    """The 95 % interval of a proportion (Wilson's, which holds near 0 and 1 too)."""
    z = 1.96
    p, spread = right / count, z * z / count
    middle, half = p + spread / 2, z * (p * (1 - p) / count + spread / (4 * count))**0.5
    return [max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))]


def word_error_rate(errors: list[WordErrors]) -> float:
    """Of a corpus: all edits over all words of the references; not a number where there are no
    words."""
    total = sum(errors, WordErrors())
    return total.total / total.words if total.words else float("nan")


def bootstrap(errors: list[WordErrors]) -> list[float]:
    """The 95 % interval of the word error rate, over 1,000 drawings of as many clips."""
    edits, n_words = np.array([[e.total, e.words] for e in errors]).T
    drawn = np.random.default_rng(0).integers(len(errors), size=(1000, len(errors)))
    rates = edits[drawn].sum(1) / np.maximum(n_words[drawn].sum(1), 1)
    return np.percentile(rates, [2.5, 97.5]).tolist()


# --------------------------------------------------------------------------------------- a manifest


@dataclass(frozen=True)
class Report:
    """Accuracy by (domain, type), and the figures that sum it up."""

    accuracy: dict[tuple[str, str], float]
    count: dict[tuple[str, str], int]
    figures: dict[str, float]


def report(examples: list[Example], answers: list[str]) -> Report:
    """Score answers. `open`, `lettered` and `caption` are means over types, `overall` is the mean
    over questions; `wer` is the word error rate of transcripts."""
    right, errors = {}, []
    for example, text in zip(examples, answers, strict=True):
        right.setdefault((example.domain, example.type), []).append(is_right(example, text))
        if example.type == "asr":
            errors.append(word_errors(example.answer, text))
    accuracy = {key: mean(values) for key, values in sorted(right.items())}
    groups = {"open": [], "lettered": [], "caption": []}
    for (_, type), value in accuracy.items():
        groups["lettered" if type.endswith("+abcd") else "open"].append(value)
        if type == "caption":
            groups["caption"].append(value)
    figures = {name: mean(values) for name, values in groups.items() if values}
    figures["overall"] = mean([each for values in right.values() for each in values])
    figures["worst_open"] = min(groups["open"], default=float("nan"))
    if errors:
        figures["wer"] = word_error_rate(errors)
    return Report(accuracy, {key: len(values) for key, values in right.items()}, figures)


def table(result: Report) -> str:
    """The report as text: a line per type of question, a column per domain, and the figures
    below."""
    domains = sorted({domain for domain, _ in result.accuracy})
    types = {type for _, type in result.accuracy}
    lines = [f"{'question':14}" + "".join(f"{domain:>10}" for domain in domains)]
    for type in sorted(types, key=lambda type: (type.endswith("+abcd"), type)):
        line = f"{type:14}"
        for domain in domains:
            value = result.accuracy.get((domain, type))
            line += f"{'' if value is None else f'{value:.2f}':>10}"
        lines.append(line)
    figures = ", ".join(f"{name} {value:.3f}" for name, value in result.figures.items())
    return "\n".join([*lines, f"{sum(result.count.values())} questions: {figures}"])


# -------------------------------------------------------------------------------------- a benchmark


def reply_to(question: BenchmarkQuestion, answers: dict[str, Answer]) -> str:
    """The reply to a question; empty where there is none."""
    return answers[question.id].reply if question.id in answers else ""


def about_clips(name: str, questions: list[BenchmarkQuestion], answers: dict[str, Answer]) -> dict:
    """What the results of all benchmarks tell of clips, and of answers that are not there."""
    answered = {q.id: answers[q.id] for q in questions if q.id in answers}
    return {
        "benchmark": name,
        "broken_audio": {id: each.error for id, each in answered.items() if each.error},
        "unanswered": [q.id for q in questions if q.id not in answered],
        "unscored": [q.id for q in questions if not can_be_scored(name, q)],
        "cut": sum(each.cut for each in answered.values()),
        "incomplete": {id: each.incomplete for id, each in answered.items() if each.incomplete},
    }


def accuracy_of(verdicts: list[tuple[bool, bool]]) -> dict | None:
    """How many are right by the benchmark's rule, and, as a part of all, how many with bare letters
    mended; None of no questions. A verdict has both."""
    if not verdicts:
        return None
    right, mended = zip(*verdicts)
    return {"count": len(right), "right": sum(right), "accuracy": sum(right) / len(right),
            "interval": wilson(sum(right), len(right)), "mended": sum(mended) / len(mended)}


def score_choices(name: str, questions: list[BenchmarkQuestion],
                  answers: dict[str, Answer]) -> dict:
    """The result of a benchmark of multiple choice. A question that was not answered is wrong, and
    no malformed reply; one that cannot be scored is in no table; `overall` is None if none can."""
    benchmark, result = BENCHMARKS[name], about_clips(name, questions, answers)
    verdicts, rows_of = [], {}  # of each table, the verdicts in each of its rows
    for question in questions:
        if not can_be_scored(name, question):
            continue
        reply = reply_to(question, answers)
        verdict = (benchmark.is_right(reply, question),
                   score_mended(reply, question.answer, question.choices))
        verdicts.append(verdict)
        for title, rows in question.groups.items():
            for row in rows:
                rows_of.setdefault(title, {}).setdefault(row, []).append(verdict)
    tables = {title: {row: accuracy_of(found) for row, found in sorted(rows.items())}
              for title, rows in rows_of.items()}
    without_reply = {*result["broken_audio"], *result["unanswered"]}
    replies = {q.id: reply_to(q, answers) for q in questions}
    malformed = {q.id: replies[q.id] for q in questions
                 if q.id not in without_reply and not benchmark.answers(replies[q.id], q)}
    n_letters = sum(is_bare_letter(reply) for reply in replies.values())
    return result | {"overall": accuracy_of(verdicts), "bare_letters": n_letters,
                     "malformed": malformed, "tables": tables}


def score_transcripts(questions: list[BenchmarkQuestion], answers: dict[str, Answer]) -> dict:
    """The word error rate of a corpus. A transcript that is missing has all its words left out."""
    pairs = [(normalise(q.answer), normalise(reply_to(q, answers))) for q in questions]
    errors = [word_errors(*pair) for pair in pairs]
    total = sum(errors, WordErrors())
    require(total.words, "expected transcripts with words, got none: there is no word error rate")
    clips = [{"id": question.id, **asdict(error), "reference": reference, "hypothesis": hypothesis}
             for question, error, (reference, hypothesis) in zip(questions, errors, pairs)]
    order = sorted(range(len(errors)), key=lambda i: -errors[i].total)
    return about_clips("asr", questions, answers) | {
        "clips": len(questions), **asdict(total), "wer": word_error_rate(errors),
        "interval": bootstrap(errors), "empty": sum(not said for _, said in pairs),
        "normalisation": NORMALISATION,
        "worst": [clips[i] for i in order[:N_LISTED] if errors[i].total]}


def score(name: str, questions: list[BenchmarkQuestion], answers: dict[str, Answer]) -> dict:
    """The result of a benchmark, ready for JSON."""
    if name == "asr":
        return score_transcripts(questions, answers)
    return score_choices(name, questions, answers)


class Tally:
    """How good the answers to a benchmark are so far."""

    def __init__(self, benchmark: str):
        self.benchmark, self.right, self.errors = benchmark, [], []

    def add(self, questions: list[BenchmarkQuestion], answers: dict[str, Answer]) -> str:
        """Count more answers; returns the figure of all."""
        for question in questions:
            reply = answers[question.id].reply
            if not can_be_scored(self.benchmark, question):
                continue
            if self.benchmark == "asr":
                self.errors.append(word_errors(normalise(question.answer), normalise(reply)))
            else:
                self.right.append(BENCHMARKS[self.benchmark].is_right(reply, question))
        if self.benchmark == "asr":
            return f"word error rate {word_error_rate(self.errors):.3f}"
        return f"accuracy {mean(self.right):.3f}" if self.right else "accuracy not known"


# ------------------------------------------------------------------------------- a result as text


def percent(*values: float) -> str:
    return " to ".join(f"{100 * value:.1f}" for value in values)


def transcripts_as_text(result: dict) -> list[str]:
    """The lines on a corpus of transcripts."""
    edits = [f"{result[kind]} {kind}" for kind in ("substitutions", "deletions", "insertions")]
    lines = [f"word error rate {percent(result['wer'])} % "
             f"(95 % interval {percent(*result['interval'])}): {', '.join(edits)} "
             f"in {result['words']} words of {result['clips']} clips",
             f"compared in {result['normalisation']}",
             f"transcripts that are empty or missing: {result['empty']}", "worst clips:"]
    for clip in result["worst"]:
        n_edits = clip["substitutions"] + clip["deletions"] + clip["insertions"]
        lines += [f"  {clip['id']}: {n_edits} errors in {clip['words']} words",
                  f"    reference:  {clip['reference']}",
                  f"    hypothesis: {clip['hypothesis']}"]
    return lines


def choices_as_text(result: dict) -> list[str]:
    """The lines on questions with choices: the tables, and the accuracy, if there is one."""
    lines, name, overall = [], result["benchmark"], result["overall"]
    for title, rows in result["tables"].items():
        cells = [(title, "questions", "right", "accuracy %", "95 % interval",
                  "by words, letters mended %")]
        for row, found in rows.items():
            cells.append((row, str(found["count"]), str(found["right"]),
                          percent(found["accuracy"]), percent(*found["interval"]),
                          percent(found["mended"])))
        lines += [columns(cells), ""]
    if overall:
        lines += [f"{name}: {overall['right']} of {overall['count']} right by its rule, "
                  f"{percent(overall['accuracy'])} % (95 % interval "
                  f"{percent(*overall['interval'])}); by words, with letters mended: "
                  f"{percent(overall['mended'])} %", ""]
    else:
        lines += [f"{name}: no question can be scored, as none has an answer among its choices", ""]
    malformed = [f"{id}: {reply!r}" for id, reply in result["malformed"].items()]
    return [*lines, f"replies that are only a letter: {result['bare_letters']}",
            *listed("malformed replies", malformed),
            *listed("questions whose answer is blank or none of their choices, not scored",
                    result["unscored"])]


def as_text(result: dict) -> str:
    """The result of a benchmark for people."""
    is_asr = result["benchmark"] == "asr"
    lines = transcripts_as_text(result) if is_asr else choices_as_text(result)
    wrong = "counted as wrong" + (" where they are scored" if result["unscored"] else "")
    broken = [f"{id}: {error}" for id, error in result["broken_audio"].items()]
    lines += listed(f"clips that could not be read, {wrong}", broken)
    lines += listed(f"questions without a reply, {wrong}", result["unanswered"])
    lines += listed(INCOMPLETE, [*result["incomplete"].values()])
    lines.append(f"clips longer than the model takes, cut to their beginning: {result['cut']}")
    return "\n".join(lines)


def publish(result: dict, path: Path) -> None:
    """Write the result as JSON, and print it."""
    text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(f"{as_text(result)}\nthe same as JSON: {path}")
