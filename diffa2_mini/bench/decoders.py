"""Every rule of decoding on the same questions: how many answers are right, and how many tokens a
forward pass brings. Passes are those of each answer alone; its tokens are those up to its end."""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from torch import Tensor

from ..config import SIZES
from ..data import Example, load_examples, read_manifest
from ..errors import require
from ..evaluate import scoreboard
from ..evaluate.answers import Respondent
from ..evaluate.benchmarks import FREE, load_questions
from ..fast.generate import generate
from ..fast.measure import now
from ..fast.state import DecodingState
from ..listen import Diffa2, decode_settings
from ..training.features import FeatureCache
from .timing import Row


def rules(length: int) -> list[dict]:
    """What each row changes in a size's way to decode responses of this length; the first nothing.
    The last have one block and renew its cache, as Fast-dLLM (arXiv 2505.22618) does for images."""
    one_by_one, early = {"steps": length}, {"eos_threshold": 0.9}
    sure = [*({"factor": f} for f in (0.25, 0.5, 1.0, 2.0)),
            *({"threshold": t} for t in (0.95, 0.9, 0.7))]
    revised = [each | {"revise": p} for each in (sure[3], sure[6]) for p in (0.5, 0.7, 0.9)]
    short = [{"block_length": length // 4, "cache": cache} for cache in ("none", "prefix", "dual")]
    renewed = [{"block_length": length, "cache": "dual", "refresh": n} for n in (1, 2, 4, 8)]
    return [{}, one_by_one, {"steps": length // 2}, {"steps": length // 4}, *sure,
            *(each | early for each in (one_by_one, *sure, revised[1], revised[4])), *revised,
            *short, *renewed]


def questions_of(file: Path | None, types: list[str], limit: int | None, size: str
                 ) -> list[Example]:
    """Questions of ToyBench (None: where data/toybench.py makes it) that show no choices, or of a
    manifest; if `types` are named, of these. At most `limit`, evenly spread. Raises UserError."""
    first = {"choices": []} if file is None else read_manifest(file)[0]
    if isinstance(first, dict) and "choices" in first:
        free = [each for each in load_questions("toy", file) if each.row.get("difficulty") == FREE]
        asked = [Example(each.audio, each.prompt, each.answer, "", FREE, "") for each in free
                 if not types or each.row.get("sub-category") in types]
    else:
        asked = [each for each in load_examples(file, SIZES[size][1][2], SIZES[size][0])
                 if not types or each.type in types]
    require(asked, f"{file}: expected questions {'without choices' if not types else 'of type '}"
                   f"{' or '.join(types)}, found none")
    return asked[::-(-len(asked) // (limit or len(asked)))]


def counted(counts: Counter, model, tokenizer, audio_embeddings, prompts, decode, numbers
            ) -> tuple[Tensor, int]:
    """As `generate_responses`; adds tokens, passes and seconds to the counts."""
    start, lengths = now(audio_embeddings[0].device), [decode.gen_length] * len(prompts)
    state = DecodingState(model, audio_embeddings, prompts, lengths, tokenizer.mask_id)
    steps = list(generate(state, decode, tokenizer.eos_id, numbers=numbers))
    tokens = steps[-1].tokens  # [B, R]
    ends = ((tokens == tokenizer.eot_id) | (tokens == tokenizer.eos_id)).long()
    counts["tokens"] += int((ends.cumsum(1) - ends == 0).sum())
    counts["passes"] += sum(int(step.committed.any(1).sum()) for step in steps)
    counts["seconds"] += now(tokens.device) - start
    return tokens, len(steps)


def decoders(diffa2: Diffa2, asked: list[Example]) -> Iterator[Row]:
    """A row for each rule; its seconds are those of decoding all the answers, 64 at once."""
    features = FeatureCache(diffa2.model, diffa2.device, diffa2.dtype, keep=True)
    for changes in rules(diffa2.config.decode.gen_length):
        counts, decode = Counter(), decode_settings(diffa2.config.decode, **changes)
        respondent = Respondent(features, diffa2.tokenizer, diffa2.parts, decode,
                                partial(counted, counts))
        figures = scoreboard.report(asked, respondent.answer(asked, 64)[0]).figures
        right = ", ".join(f"{name} {figures[name]:.3f}" for name in ("overall", "wer")
                          if name in figures)
        name = ", ".join(f"{name} {value}" for name, value in changes.items()) or "as it is"
        yield Row(f"{len(asked)} answers", name, [counts["seconds"]],
                  counts["tokens"] / counts["passes"], f"tokens per forward pass, {right}")
