"""From answers to figures: accuracy on a manifest, as training prints it, and the result of a
benchmark as text and as JSON."""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..command.table import N_LISTED, columns, listed
from ..data import Example
from ..errors import require
from ..training.files import write_whole
from . import scoring
from .answers import Answer
from .benchmarks import BENCHMARKS, BenchmarkQuestion, rows_of
from .scoring import WordErrors, normalise, word_errors

INCOMPLETE = "clips that end early or are damaged, used as far as they go"
EDITS = WordErrors._fields[:3]


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
    """All edits over all words of the references; not a number where there are none."""
    total = WordErrors(*map(sum, zip(*errors)))
    return total.total / total.words if total.words else float("nan")


def bootstrap(errors: list[WordErrors]) -> list[float]:
    """The 95 % interval of the word error rate, over 1,000 drawings of as many clips."""
    drawn = np.random.default_rng(0).integers(len(errors), size=(1000, len(errors)))
    *edits, n_words = np.array(errors)[drawn].sum(1).T  # [4, 1000]
    return np.percentile(sum(edits) / np.maximum(n_words, 1), [2.5, 97.5]).tolist()


@dataclass(frozen=True)
class Report:
    """Accuracy by (domain, type) of so many questions, and the figures that sum it up."""

    accuracy: dict[tuple[str, str], float]
    count: int
    figures: dict[str, float]


def report(examples: list[Example], answers: list[str]) -> Report:
    """Score answers. `open`, `lettered` and `caption` are means over types, `overall` is the mean
    over questions; `wer` is the word error rate of transcripts."""
    right, errors, groups = defaultdict(list), [], defaultdict(list)
    for example, text in zip(examples, answers, strict=True):
        right[example.domain, example.type].append(scoring.is_right(example, text))
        if example.type == "asr":
            errors.append(word_errors(example.answer, text))
    accuracy = {key: mean(values) for key, values in sorted(right.items())}
    for (_, type), value in accuracy.items():
        groups["lettered" if type.endswith("+abcd") else "open"].append(value)
        if type == "caption":
            groups["caption"].append(value)
    figures = {name: mean(groups[name]) for name in ("open", "lettered", "caption") if groups[name]}
    figures["overall"] = mean([each for values in right.values() for each in values])
    figures["worst_open"] = min(groups["open"], default=float("nan"))
    if errors:
        figures["wer"] = word_error_rate(errors)
    return Report(accuracy, len(examples), figures)


def table(result: Report) -> str:
    """The report as text: a line per type, a column per domain, and the figures below."""
    domains = sorted({domain for domain, _ in result.accuracy})
    types = {type for _, type in result.accuracy}
    lines = [f"{'question':14}" + "".join(f"{domain:>10}" for domain in domains)]
    for type in sorted(types, key=lambda type: (type.endswith("+abcd"), type)):
        values = [result.accuracy.get((domain, type)) for domain in domains]
        cells = ["" if value is None else f"{value:.2f}" for value in values]
        lines.append(f"{type:14}" + "".join(f"{cell:>10}" for cell in cells))
    figures = ", ".join(f"{name} {value:.3f}" for name, value in result.figures.items())
    return "\n".join([*lines, f"{result.count} questions: {figures}"])


def so_far(questions: list[BenchmarkQuestion], answers: dict[str, Answer]) -> str:
    """The figure of the questions that are answered up to now."""
    verdicts = [each.judge(answers[each.id].reply) for each in questions
                if each.id in answers and each.can_be_scored]
    if questions[0].rule is None:
        return f"word error rate {word_error_rate(verdicts):.3f}"
    return f"accuracy {mean(verdicts):.3f}"


def accuracy_of(verdicts: list[tuple[bool, bool]]) -> dict:
    """How many are right by the benchmark's rule, and, as a part of all, how many with bare letters
    mended. A verdict has both."""
    right, mended = zip(*verdicts)
    return {"count": len(right), "right": sum(right), "accuracy": sum(right) / len(right),
            "interval": wilson(sum(right), len(right)), "mended": sum(mended) / len(mended)}


def score_choices(name: str, questions: list[BenchmarkQuestion], replies: dict[str, str]) -> dict:
    """The accuracy of multiple choice. A question that cannot be scored is in no table; `overall`
    is None if none can. A reply that is not there is wrong, and not malformed."""
    verdicts, tables = [], defaultdict(lambda: defaultdict(list))
    for question in [each for each in questions if each.can_be_scored]:
        reply = replies.get(question.id, "")
        verdicts.append(
            (question.judge(reply), scoring.score_mended(reply, question.answer, question.choices)))
        for title in BENCHMARKS[name].tables:
            for row in rows_of(title, question.row):
                tables[title][row].append(verdicts[-1])
    return {"overall": accuracy_of(verdicts) if verdicts else None,
            "bare_letters": sum(map(scoring.is_bare_letter, replies.values())),
            "malformed": {q.id: replies[q.id] for q in questions
                          if q.id in replies and not q.rule.answers(replies[q.id], q.choices)},
            "tables": {title: {row: accuracy_of(rows[row]) for row in sorted(rows)}
                       for title, rows in tables.items()}}


def score_transcripts(questions: list[BenchmarkQuestion], replies: dict[str, str]) -> dict:
    """The word error rate of a corpus. A transcript that is missing has all its words left out."""
    said = {question.id: normalise(replies.get(question.id, "")) for question in questions}
    errors = [question.judge(said[question.id]) for question in questions]
    total = WordErrors(*map(sum, zip(*errors)))
    require(total.words, "expected transcripts with words, got none: there is no word error rate")
    worst = sorted(zip(questions, errors), key=lambda pair: -pair[1].total)[:N_LISTED]
    return {"clips": len(errors), **total._asdict(), "wer": total.total / total.words,
            "interval": bootstrap(errors), "empty": list(said.values()).count(""),
            "normalisation": scoring.NORMALISATION,
            "worst": [{"id": question.id, **found._asdict(),
                       "reference": normalise(question.answer), "hypothesis": said[question.id]}
                      for question, found in worst if found.total]}


def score(name: str, questions: list[BenchmarkQuestion], answers: dict[str, Answer]) -> dict:
    """The result of a benchmark, for JSON. Raises UserError if not one question has a reply."""
    answered = {q.id: answers[q.id] for q in questions if q.id in answers}
    broken = {id: each.error for id, each in answered.items() if each.error}
    replies = {id: each.reply for id, each in answered.items() if not each.error}
    reason = " ".join(next(iter(broken.values()), "not one is answered").split())
    require(replies, f"expected replies to {len(questions)} questions, got none ({reason})")
    scored = (score_transcripts(questions, replies) if name == "asr"
              else score_choices(name, questions, replies))
    return {
        "benchmark": name,
        "broken_audio": broken,
        "unanswered": [q.id for q in questions if q.id not in answered],
        "unscored": [q.id for q in questions if not q.can_be_scored],
        "cut": sum(each.cut for each in answered.values()),
        "incomplete": {id: each.incomplete for id, each in answered.items() if each.incomplete},
    } | scored


def percent(*values: float) -> str:
    return " to ".join(f"{100 * value:.1f}" for value in values)


def transcripts_as_text(result: dict) -> list[str]:
    """The lines on a corpus of transcripts."""
    edits = ", ".join(f"{result[name]} {name}" for name in EDITS)
    lines = [f"word error rate {percent(result['wer'])} % (95 % interval "
             f"{percent(*result['interval'])}): {edits} in {result['words']} words of "
             f"{result['clips']} clips", f"compared in {result['normalisation']}",
             f"transcripts that are empty or missing: {result['empty']}", "worst clips:"]
    for clip in result["worst"]:
        n_edits = sum(clip[name] for name in EDITS)
        lines += [f"  {clip['id']}: {n_edits} errors in {clip['words']} words",
                  f"    reference:  {clip['reference']}", f"    hypothesis: {clip['hypothesis']}"]
    return lines


def choices_as_text(result: dict) -> list[str]:
    """The lines on questions with choices: the tables, and the accuracy, if there is one."""
    lines, overall = [], result["overall"]
    for title, rows in result["tables"].items():
        cells = [(title, "questions", "right", "accuracy %", "95 % interval",
                  "by words, letters mended %")]
        cells += [(row, str(found["count"]), str(found["right"]), percent(found["accuracy"]),
                   percent(*found["interval"]), percent(found["mended"]))
                  for row, found in rows.items()]
        lines += [columns(cells), ""]
    figure = "no question can be scored, as none has an answer among its choices"
    if overall:
        figure = (f"{overall['right']} of {overall['count']} right by its rule, "
                  f"{percent(overall['accuracy'])} % (95 % interval "
                  f"{percent(*overall['interval'])}); by words, with letters mended: "
                  f"{percent(overall['mended'])} %")
    malformed = [f"{id}: {reply!r}" for id, reply in result["malformed"].items()]
    return [*lines, f"{result['benchmark']}: {figure}", "",
            f"replies that are only a letter: {result['bare_letters']}",
            *listed("malformed replies", malformed),
            *listed("questions whose answer is blank or none of their choices, not scored",
                    result["unscored"])]


def as_text(result: dict) -> str:
    """The result of a benchmark for people."""
    is_asr = result["benchmark"] == "asr"
    lines = transcripts_as_text(result) if is_asr else choices_as_text(result)
    wrong = "counted as wrong" + (" where they are scored" if result["unscored"] else "")
    broken = [f"{id}: {error}" for id, error in result["broken_audio"].items()]
    return "\n".join([
        *lines, *listed(f"clips that could not be read, {wrong}", broken),
        *listed(f"questions without a reply, {wrong}", result["unanswered"]),
        *listed(INCOMPLETE, [*result["incomplete"].values()]),
        f"clips longer than the model takes, cut to their beginning: {result['cut']}"])


def publish(name: str, questions: list[BenchmarkQuestion], answers: dict[str, Answer],
            file: Path) -> None:
    """Write the result of a benchmark as JSON beside the file of answers, and print it."""
    result, path = score(name, questions, answers), file.with_suffix(".result.json")
    text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(f"{as_text(result)}\nthe same as JSON: {path}")
