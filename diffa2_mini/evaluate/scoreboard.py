"""From verdicts to tables: accuracy on a manifest, as training prints it, and the result of a
benchmark as text and as JSON."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from ..command.table import N_LISTED, columns, listed
from ..data import Example
from ..errors import require
from ..training.files import write
from .answers import Answer
from .benchmarks import BENCHMARKS, Question, can_be_scored
from .scoring import (
    NORMALISATION,
    WordErrors,
    is_bare_letter,
    is_right,
    normalise,
    score_mended,
    word_errors,
)

INCOMPLETE = "clips that end early or are damaged, of which what there is was heard"


# --------------------------------------------------------------------------------------- a manifest


@dataclass
class Report:
    """Accuracy by (domain, type), and the figures that sum it up."""

    accuracy: dict[tuple[str, str], float]
    count: dict[tuple[str, str], int]
    figures: dict[str, float] = field(default_factory=dict)


def report(examples: list[Example], answers: list[str]) -> Report:
    """Score answers. `open`, `lettered` and `caption` are means over types, `overall` is the mean
    over questions."""
    hits = {}
    for example, text in zip(examples, answers, strict=True):
        hits.setdefault((example.domain, example.type), []).append(is_right(example, text))
    accuracy = {key: float(np.mean(values)) for key, values in sorted(hits.items())}
    groups = {
        "open": [a for (_, type), a in accuracy.items() if not type.endswith("+abcd")],
        "lettered": [a for (_, type), a in accuracy.items() if type.endswith("+abcd")],
        "caption": [a for (_, type), a in accuracy.items() if type == "caption"],
    }
    figures = {name: float(np.mean(values)) for name, values in groups.items() if values}
    figures["overall"] = float(np.mean(sum(hits.values(), [])))
    figures["worst_open"] = min(groups["open"], default=float("nan"))
    errors = [
        word_errors(example.answer, text)
        for example, text in zip(examples, answers)
        if example.type == "asr"]
    if errors:
        figures["wer"] = word_error_rate(errors)
    return Report(accuracy, {key: len(values) for key, values in hits.items()}, figures)


def table(result: Report) -> str:
    """The report as text: a line per type of question, a column per domain, and the figures
    below."""
    domains = sorted({domain for domain, _ in result.accuracy})
    types = sorted({type
                    for _, type in result.accuracy}, key=lambda type:
                   (type.endswith("+abcd"), type))
    lines = ["".join([f"{'question':14}", *(f"{domain:>10}" for domain in domains)])]
    for type in types:
        cells = [result.accuracy.get((domain, type)) for domain in domains]
        lines.append("".join(
            [f"{type:14}", *(f"{'' if cell is None else f'{cell:.2f}':>10}" for cell in cells)]))
    figures = ", ".join(f"{name} {value:.3f}" for name, value in result.figures.items())
    return "\n".join([*lines, f"{sum(result.count.values())} questions: {figures}"])


# -------------------------------------------------------------------------------------- a benchmark


def wilson(right: int, count: int) -> list[float]:
    """The 95 % interval of a share (Wilson's, which holds near 0 and 1 too)."""
    z = 1.96
    share, spread = right / count, z * z / count
    middle, half = share + spread / 2, z * (share * (1 - share) / count + spread / (4 * count))**0.5
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
    return np.percentile(edits[drawn].sum(1) / np.maximum(n_words[drawn].sum(1), 1),
                         [2.5, 97.5]).tolist()


def share(right: list[bool], mended: list[bool]) -> dict | None:
    """How many are right, and the shares; None of no questions."""
    if not right:
        return None
    return {"count": len(right), "right": sum(right), "accuracy": sum(right) / len(right),
            "interval": wilson(sum(right), len(right)), "mended": sum(mended) / len(mended)}


def common(name: str, questions: list[Question], answers: dict[str, Answer]) -> dict:
    """What the results of all benchmarks tell of audio and of answers that are not there."""
    answered = {q.id: answers[q.id] for q in questions if q.id in answers}
    return {
        "benchmark": name, "broken_audio": {
            id: answer.error
            for id, answer in answered.items()
            if answer.error
        }, "unanswered": [q.id for q in questions if q.id not in answered],
        "unscored": [q.id for q in questions if not can_be_scored(name, q)], "cut": sum(
            answer.cut for answer in answered.values()), "incomplete": {
                id: answer.incomplete
                for id, answer in answered.items()
                if answer.incomplete}}


def reply_to(question: Question, answers: dict[str, Answer]) -> str:
    """The reply to a question; empty where there is none."""
    return answers[question.id].reply if question.id in answers else ""


def score_choices(name: str, questions: list[Question], answers: dict[str, Answer]) -> dict:
    """The result of a benchmark of multiple choice. A question that was not answered is wrong, and
    no malformed reply; one that cannot be scored is in no table; `overall` is None if none can."""
    benchmark, result = BENCHMARKS[name], common(name, questions, answers)
    scored = [q for q in questions if can_be_scored(name, q)]
    replies = [reply_to(q, answers) for q in questions]
    right = [benchmark.is_right(reply_to(q, answers), q) for q in scored]
    mended = [score_mended(reply_to(q, answers), q.answer, q.choices) for q in scored]
    tables = {}
    for i, question in enumerate(scored):
        for title, rows in question.groups.items():
            for row in rows:
                tables.setdefault(title, {}).setdefault(row, []).append(i)
    silent = {*result["broken_audio"], *result["unanswered"]}
    malformed = {
        q.id: r
        for q, r in zip(questions, replies)
        if q.id not in silent and not benchmark.answers(r, q)}
    return result | {
        "overall": share(right, mended), "bare_letters": sum(map(is_bare_letter, replies)),
        "malformed": malformed, "tables": {
            title: {
                row: share([right[i]
                            for i in at], [mended[i]
                                           for i in at])
                for row, at in sorted(rows.items())}
            for title, rows in tables.items()}}


def score_transcripts(questions: list[Question], answers: dict[str, Answer]) -> dict:
    """The word error rate of a corpus. A transcript that is missing has all its words left out."""
    pairs = [(normalise(q.answer), normalise(reply_to(q, answers))) for q in questions]
    errors = [word_errors(*pair) for pair in pairs]
    worst = sorted(range(len(errors)), key=lambda i: -errors[i].total)
    total = sum(errors, WordErrors())
    require(total.words, "expected transcripts with words, got none: there is no word error rate")
    return common("asr", questions, answers) | {
        "clips": len(questions), **asdict(total), "wer": word_error_rate(errors),
        "interval": bootstrap(errors), "empty": sum(
            not audio_embeddings
            for _, audio_embeddings in pairs), "normalisation": NORMALISATION, "worst": [{
                "id": questions[i].id, **asdict(errors[i]), "reference": pairs[i][0],
                "hypothesis": pairs[i][1]
            } for i in worst[:N_LISTED] if errors[i].total]}


def score(name: str, questions: list[Question], answers: dict[str, Answer]) -> dict:
    """The result of a benchmark, ready for JSON."""
    return score_transcripts(questions, answers) if name == "asr" else score_choices(
        name, questions, answers)


class Tally:
    """How good the answers are so far."""

    def __init__(self, benchmark: str):
        self.benchmark, self.right, self.errors = benchmark, [], []

    def add(self, questions: list[Question], answers: dict[str, Answer]) -> str:
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
        figure = f"{sum(self.right) / len(self.right):.3f}" if self.right else "not known"
        return f"accuracy {figure}"


def percent(shares: list[float]) -> str:
    return " to ".join(f"{100 * s:.1f}" for s in shares)


def transcripts_as_text(result: dict) -> list[str]:
    """The lines on a corpus of transcripts."""
    edits = [f"{result[kind]} {kind}" for kind in ("substitutions", "deletions", "insertions")]
    lines = [f"word error rate {percent([result['wer']])} % "
             f"(95 % interval {percent(result['interval'])}): {', '.join(edits)} "
             f"in {result['words']} words of {result['clips']} clips",
             f"compared in {result['normalisation']}",
             f"transcripts that are empty or missing: {result['empty']}", "worst clips:"]
    for clip in result["worst"]:
        n_edits = clip["substitutions"] + clip["deletions"] + clip["insertions"]
        lines += [f"  {clip['id']}: {n_edits} errors in {clip['words']} words",
                  f"    said:  {clip['reference']}", f"    heard: {clip['hypothesis']}"]
    return lines


def choices_as_text(result: dict) -> list[str]:
    """The lines on questions with choices: the tables, and the share of right answers, if any."""
    lines, name, overall = [], result["benchmark"], result["overall"]
    for title, rows in result["tables"].items():
        cells = [(title, "questions", "right", "accuracy %", "95 % interval",
                  "by words, letters mended %")]
        cells += [(row, str(s["count"]), str(s["right"]), percent([s["accuracy"]]),
                   percent(s["interval"]), percent([s["mended"]])) for row, s in rows.items()]
        lines += [columns(cells), ""]
    if overall:
        lines += [f"{name}: {overall['right']} of {overall['count']} right by its rule, "
                  f"{percent([overall['accuracy']])} % (95 % interval "
                  f"{percent(overall['interval'])}); by words, with letters mended: "
                  f"{percent([overall['mended']])} %", ""]
    else:
        lines += [f"{name}: no question can be scored, as none has an answer among its choices", ""]
    malformed = [f"{id}: {reply!r}" for id, reply in result["malformed"].items()]
    return [*lines, f"replies that are only a letter: {result['bare_letters']}",
            *listed("malformed replies", malformed),
            *listed("questions whose answer is blank or none of their choices, not scored",
                    result["unscored"])]


def as_text(result: dict) -> str:
    """The result for people."""
    is_asr = result["benchmark"] == "asr"
    lines = transcripts_as_text(result) if is_asr else choices_as_text(result)
    wrong = "counted as wrong" + (" where they are scored" if result["unscored"] else "")
    unheard = [f"{id}: {error}" for id, error in result["broken_audio"].items()]
    lines += listed(f"clips that could not be heard, {wrong}", unheard)
    lines += listed(f"questions without a reply, {wrong}", result["unanswered"])
    lines += listed(INCOMPLETE, [*result["incomplete"].values()])
    return "\n".join([*lines, "clips longer than the model hears, of which it heard the beginning: "
                              f"{result['cut']}"])


def publish(result: dict, path: Path) -> None:
    """Write the result as JSON, and print it."""
    text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(f"{as_text(result)}\nthe same as JSON: {path}")
