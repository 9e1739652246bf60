"""From answers to figures: accuracy on a manifest, and a benchmark's result as text and as JSON."""

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..command.table import N_LISTED, columns, listed
from ..data import Example
from ..errors import require
from ..training.files import write_whole
from . import scoring
from .answers import Reply
from .benchmarks import BenchmarkQuestion, rows_of
from .scoring import WordErrors, normalise, word_errors

INCOMPLETE = "clips that end early or are damaged, used as far as they go"
Scores = tuple[dict, list[str]]  # figures for JSON, and lines that tell them to people
COLUMNS = ("questions", "right", "accuracy %", "95 % interval", "by words, letters mended %")


def wilson(right: int, count: int) -> list[float]:
    """The 95 % interval of a proportion (Wilson's, which holds near 0 and 1 too)."""
    z = 1.96
    p, spread = right / count, z * z / count
    middle, half = p + spread / 2, z * (p * (1 - p) / count + spread / (4 * count))**0.5
    return [max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))]


def word_error_rate(errors: list[WordErrors]) -> float:
    """All edits over all words of the references; not a number where there are none."""
    total = WordErrors(*map(sum, zip(*errors)))
    return total.total / total.words if total.words else math.nan


def bootstrap(errors: list[WordErrors]) -> list[float]:
    """The 95 % interval of the word error rate, over 1,000 drawings of as many clips."""
    drawn = np.random.default_rng(0).integers(len(errors), size=(1000, len(errors)))
    *edits, n_words = np.array(errors)[drawn].sum(1).T  # [4, 1000]
    return np.percentile(sum(edits) / np.maximum(n_words, 1), [2.5, 97.5]).tolist()


class Report(NamedTuple):
    """Accuracy by (domain, type), the figures that sum it up, and both as text."""

    accuracy: dict[tuple[str, str], float]
    figures: dict[str, float]
    table: str


def report(examples: list[Example], answers: list[str]) -> Report:
    """Score answers. `open`, `lettered` and `caption` are means over types, `overall` over
    questions; `wer` is the word error rate of transcripts."""
    right, errors, groups = defaultdict(list), [], {"open": [], "lettered": [], "caption": []}
    for example, text in zip(examples, answers, strict=True):
        right[example.domain, example.type].append(scoring.is_right(example, text))
        if example.type == "asr":
            errors.append(word_errors(example.answer, text))
    accuracy = {key: float(np.mean(values)) for key, values in sorted(right.items())}
    for (_, type), value in accuracy.items():
        groups["lettered" if type.endswith("+abcd") else "open"].append(value)
        if type == "caption":
            groups["caption"].append(value)
    figures = {name: float(np.mean(values)) for name, values in groups.items() if values}
    figures["overall"] = float(np.mean(sum(right.values(), [])))
    figures |= {"worst_open": min(groups["open"])} if groups["open"] else {}
    figures |= {"wer": word_error_rate(errors)} if errors else {}
    domains, types = (sorted({*names}) for names in zip(*accuracy))
    cells = {key: f"{value:.2f}" for key, value in accuracy.items()}
    lines = [f"{'question':14}" + "".join(f"{domain:>10}" for domain in domains)]
    for type in sorted(types, key=lambda type: type.endswith("+abcd")):
        row = (cells.get((domain, type), "") for domain in domains)
        lines.append(f"{type:14}" + "".join(f"{cell:>10}" for cell in row))
    summary = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
    return Report(accuracy, figures, "\n".join([*lines, f"{len(examples)} questions: {summary}"]))


def judged(questions: list[BenchmarkQuestion], answers: dict[str, Reply]) -> list:
    """What `judge` says of each question that is answered and can be scored."""
    return [each.judge(answers[each.id].text) for each in questions
            if each.id in answers and each.can_be_scored]


def so_far(verdicts: list) -> str:
    """The figure of the questions that are `judged` up to now, if there is one."""
    if verdicts and isinstance(verdicts[0], WordErrors):
        return f"word error rate {word_error_rate(verdicts):.3f}"
    return f"accuracy {np.mean(verdicts):.3f}" if verdicts else ""


def accuracy_of(verdicts: list[tuple[bool, bool]]) -> dict:
    """Counts and shares of (right by the benchmark's rule, right with bare letters mended)."""
    n, (right, mended) = len(verdicts), map(sum, zip(*verdicts))
    return {"count": n, "right": right, "accuracy": right / n, "interval": wilson(right, n),
            "mended": mended / n}


def percent(*values: float) -> str:
    return " to ".join(f"{100 * value:.1f}" for value in values)


def as_cells(accuracy: dict) -> tuple[str, ...]:
    """What `accuracy_of` has found as text, below COLUMNS."""
    *counts, share, interval, mended = accuracy.values()
    return (*map(str, counts), percent(share), percent(*interval), percent(mended))


def score_choices(name: str, questions: list[BenchmarkQuestion], replies: dict[str, str]) -> Scores:
    """The accuracy of multiple choice. A question that cannot be scored is in no table; `overall`
    is None if none can. A reply that is not there is wrong, and not malformed."""
    verdicts, rows = [], defaultdict(lambda: defaultdict(list))
    for question in [each for each in questions if each.can_be_scored]:
        reply = replies.get(question.id, "")
        mended = scoring.score_mended(reply, question.answer, question.choices)
        verdicts.append((question.judge(reply), mended))
        for title in question.benchmark.tables:
            for row in rows_of(title, question.row):
                rows[title][row].append(verdicts[-1])
    tables = {title: {row: accuracy_of(found) for row, found in sorted(table.items())}
              for title, table in rows.items()}
    result = {
        "overall": accuracy_of(verdicts) if verdicts else None,
        "bare_letters": sum(map(scoring.is_bare_letter, replies.values())),
        "malformed": {q.id: replies[q.id] for q in questions if q.id in replies
                      and q.benchmark.choice_of(replies[q.id], q.choices) is None},
        "tables": tables}
    lines = [columns([(title, *COLUMNS), *((row, *as_cells(each)) for row, each in table.items())])
             + "\n" for title, table in tables.items()]
    figure = "no question can be scored, as none has an answer among its choices"
    if verdicts:
        count, right, share, interval, mended = as_cells(result["overall"])
        figure = (f"{right} of {count} right by its rule, {share} % (95 % interval {interval}); "
                  f"by words, with letters mended: {mended} %")
    lines += [f"{name}: {figure}\n", f"replies that are only a letter: {result['bare_letters']}"]
    malformed = [f"{id}: {reply!r}" for id, reply in result["malformed"].items()]
    return result, [*lines, *listed("malformed replies", malformed)]


def score_transcripts(questions: list[BenchmarkQuestion], replies: dict[str, str]) -> Scores:
    """The word error rate of a corpus. A transcript that is missing has all its words left out."""
    said = {question.id: normalise(replies.get(question.id, "")) for question in questions}
    errors = [question.judge(said[question.id]) for question in questions]
    total = WordErrors(*map(sum, zip(*errors)))
    require(total.words, "expected transcripts with words, got none: there is no word error rate")
    worst = sorted(zip(questions, errors), key=lambda pair: -pair[1].total)[:N_LISTED]
    result = {"clips": len(errors), **total._asdict(), "wer": total.total / total.words,
              "interval": bootstrap(errors), "empty": [*said.values()].count(""),
              "normalisation": scoring.NORMALISATION,
              "worst": [{"id": question.id, **found._asdict(),
                         "reference": normalise(question.answer), "hypothesis": said[question.id]}
                        for question, found in worst if found.total]}
    rate = f"{percent(result['wer'])} % (95 % interval {percent(*result['interval'])})"
    lines = ["word error rate {rate}: {substitutions} substitutions, {deletions} deletions, "
             "{insertions} insertions in {words} words of {clips} clips\ncompared in "
             "{normalisation}\ntranscripts that are empty or missing: {empty}\n"
             "worst clips:".format(rate=rate, **result)]
    lines += ["  {id}: {n} errors in {words} words\n    reference:  {reference}\n"
              "    hypothesis: {hypothesis}".format(n=found.total, **clip)
              for clip, (_, found) in zip(result["worst"], worst)]
    return result, lines


def publish(name: str, questions: list[BenchmarkQuestion], answers: dict[str, Reply],
            file: Path) -> None:
    """Print a benchmark's result and write it as JSON beside the answers; UserError without any."""
    answered = {q.id: answers[q.id] for q in questions if q.id in answers}
    broken = {id: each.error for id, each in answered.items() if each.error}
    replies = {id: each.text for id, each in answered.items() if not each.error}
    reason = " ".join([*broken.values(), "not one is answered"][0].split())
    require(replies, f"expected replies to {len(questions)} questions, got none ({reason})")
    result = {
        "benchmark": name, "broken_audio": broken,
        "unanswered": [q.id for q in questions if q.id not in answered],
        "unscored": [q.id for q in questions if not q.can_be_scored],
        "cut": sum(each.cut for each in answered.values()),
        "incomplete": {id: each.incomplete for id, each in answered.items() if each.incomplete}}
    if name == "asr":
        scored, lines = score_transcripts(questions, replies)
    else:
        scored, lines = score_choices(name, questions, replies)
        lines += listed("questions whose answer is blank or none of their choices, not scored",
                        result["unscored"])
    wrong = "counted as wrong" + (" where they are scored" if result["unscored"] else "")
    lines += [*listed(f"clips that could not be read, {wrong}", [*map(": ".join, broken.items())]),
              *listed(f"questions without a reply, {wrong}", result["unanswered"]),
              *listed(INCOMPLETE, [*result["incomplete"].values()]),
              f"clips longer than the model takes, cut to their beginning: {result['cut']}"]
    path = file.with_name(re.sub(r"\.jsonl?$", "", file.name) + ".result.json")
    text = json.dumps(result | scored, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, "utf-8", "backslashreplace"))
    print("\n".join([*lines, f"the same as JSON: {path}"]))
