"""Rules of decoding from the literature that the package does not have, beside two that it has.

    python tutorials/other_decoders.py       # the toy, on ToyBench's questions without choices
    python tutorials/other_decoders.py --size small --file data/orders/test.json --type order

A response is one block, without a cache. The rules, with the numbers that are tried here:

* LocalLeap (arXiv 2510.07081): what is surer than .9 is an anchor; within 4 tokens of one .75 will
  do.
* CreditDecoding (arXiv 2510.06133): a token that is the likeliest of its place, in this or an
  earlier step, has credit, which fades by half a step; log(1 + credit) is added to its logit.
* Prophet (arXiv 2508.19982): all is committed at once when the two best logits are, on average over
  the masks, further apart than 5.
* WINO (arXiv 2507.18578): what is surer than .6 is committed; what it then thinks of a committed
  token, asked at a mask in the same place that does not see it, masks it again below .9.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that this file runs as a script

from diffa2_mini.command.script import begin, run_script

begin(__name__)  # Ctrl-C while the rest is imported

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from diffa2_mini.bench.decoders import questions_of
from diffa2_mini.command.script import Parser
from diffa2_mini.command.table import columns
from diffa2_mini.config import SIZES, DecodeConfig
from diffa2_mini.decode import above_threshold, factor_based, finished, most_confident
from diffa2_mini.evaluate import scoreboard
from diffa2_mini.evaluate.answers import Respondent
from diffa2_mini.fast.device import choose_device
from diffa2_mini.fast.state import DecodingState
from diffa2_mini.listen import Diffa2
from diffa2_mini.model import Diffa2Model
from diffa2_mini.tokenizer import Prompt, Tokenizer
from diffa2_mini.training.features import FeatureCache
from diffa2_mini.training.model_source import find_source

AT_ONCE = 64  # questions
# from logits [B, R, V] and candidates, bool [B, R]: predicted [B, R], and what is committed of it;
# the dictionary keeps what a rule remembers of earlier steps
Rule = Callable[[Tensor, Tensor, dict], tuple[Tensor, Tensor]]


def by_confidence(commit: Callable, logits: Tensor, candidates: Tensor, memory: dict
                  ) -> tuple[Tensor, Tensor]:
    """A rule of the package, which looks at the confidence alone."""
    confidence, predicted = logits.softmax(-1).max(-1)
    return predicted, commit(confidence, candidates)


def local_leap(logits: Tensor, candidates: Tensor, memory: dict, anchor: float = 0.9,
               near: float = 0.75, radius: int = 4) -> tuple[Tensor, Tensor]:
    confidence, predicted = logits.softmax(-1).max(-1)
    anchors = candidates & (confidence > anchor)
    around = F.max_pool1d(anchors.float(), 2 * radius + 1, 1, radius) > 0  # [B, R]
    return predicted, (anchors | candidates & around & (confidence > near)
                       | most_confident(confidence, candidates, 1))


def credit_decoding(logits: Tensor, candidates: Tensor, memory: dict, fade: float = 0.5,
                    weight: float = 1.0, threshold: float = 0.9) -> tuple[Tensor, Tensor]:
    best, likeliest = logits.softmax(-1).max(-1, keepdim=True)
    credit = fade * memory.get("credit", torch.zeros_like(logits))
    memory["credit"] = credit.scatter_add(-1, likeliest, best.sqrt())
    return by_confidence(partial(above_threshold, threshold=threshold),
                         logits + weight * memory["credit"].log1p(), candidates, memory)


def prophet(logits: Tensor, candidates: Tensor, memory: dict, gap: float = 5.0
            ) -> tuple[Tensor, Tensor]:
    """Otherwise one token a step."""
    first, second = logits.topk(2).values.unbind(-1)  # [B, R] each
    mean = ((first - second) * candidates).sum(1) / candidates.sum(1).clamp_min(1)  # [B]
    predicted, one = by_confidence(partial(most_confident, k=1), logits, candidates, memory)
    return predicted, one | candidates & (mean > gap)[:, None]


def fill(state: DecodingState, rule: Rule, eos_id: int) -> tuple[Tensor, Tensor]:
    """Responses [B, R] decoded by a rule, and the number of passes of each [B]."""
    tokens, memory = torch.full_like(state.positions[:, state.n_before:], state.mask_id), {}
    passes = torch.zeros_like(tokens[:, 0])
    while (is_open := ~finished(tokens, state.mask_id, eos_id)).any():  # [B]
        candidates = (tokens == state.mask_id) & is_open[:, None]
        if not candidates.any():
            break  # a response without an end
        passes += candidates.any(1)
        logits = state.logits(state.forward_all(tokens)).float()
        logits[..., state.mask_id] = -torch.inf
        predicted, committed = rule(logits, candidates, memory)
        tokens = torch.where(committed, predicted, tokens)
    return tokens, passes


def beside(state: DecodingState, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, R, V] of the tokens [B, R], and of masks in the same places, which see all but the
    token in their own; nothing sees these masks."""
    P, R = state.n_before, tokens.shape[1]
    masks = torch.full_like(tokens, state.mask_id)
    x = torch.cat([state.before, state.model.llada.wte(torch.cat([tokens, masks], 1))], dim=1)
    positions = torch.cat([state.positions, state.positions[:, P:]], dim=1)  # [B, P + 2R]
    valid = state.valid if state.valid is not None else torch.ones_like(state.positions).bool()
    sees = valid[:, None].repeat(1, P + 2 * R, 1)  # [B, P + 2R, P + R]
    own = torch.eye(R, dtype=torch.bool, device=tokens.device)
    sees[:, P + R:, P:] &= ~own
    of_masks = F.pad(own, (0, 0, P + R, 0)).expand(len(sees), -1, -1)  # [B, P + 2R, R]
    hidden = state.model.llada(x, torch.cat([sees, of_masks], 2), positions)
    logits = state.logits(hidden[:, P:]).float()
    logits[..., state.mask_id] = -torch.inf
    return logits[:, :R], logits[:, R:]


def wino(state: DecodingState, eos_id: int, wide: float = 0.6, narrow: float = 0.9
         ) -> tuple[Tensor, Tensor]:
    """As `fill`. Fewer tokens are masked again than are committed, so that it ends."""
    tokens = torch.full_like(state.positions[:, state.n_before:], state.mask_id)
    passes = torch.zeros_like(tokens[:, 0])
    while (candidates := (tokens == state.mask_id)
           & ~finished(tokens, state.mask_id, eos_id)[:, None]).any():
        passes += candidates.any(1)
        logits, asked = beside(state, tokens)
        confidence, predicted = logits.softmax(-1).max(-1)
        committed = above_threshold(confidence, candidates, wide)
        kept = asked.softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)  # [B, R]
        doubted = (tokens != state.mask_id) & candidates.any(1, keepdim=True) & (kept < narrow)
        most = (committed.sum(1) - 1).clamp_min(0)  # [B]
        rank = kept.masked_fill(~doubted, 2).argsort(1).argsort(1)  # of the least sure, 0
        tokens = torch.where(committed, predicted, tokens)
        tokens = tokens.masked_fill(doubted & (rank < most[:, None]), state.mask_id)
    return tokens, passes


RULES = {
    "factor 0.5": partial(fill, rule=partial(by_confidence, partial(factor_based, factor=0.5))),
    "threshold 0.9": partial(fill, rule=partial(by_confidence,
                                                partial(above_threshold, threshold=0.9))),
    "LocalLeap": partial(fill, rule=local_leap),
    "CreditDecoding": partial(fill, rule=credit_decoding),
    "Prophet": partial(fill, rule=prophet),
    "WINO": wino,
}


@torch.no_grad()
def counted(decoder: Callable, counts: Counter, model: Diffa2Model, tokenizer: Tokenizer,
            audio_embeddings: list[Tensor], prompts: list[Prompt], decode: DecodeConfig,
            numbers: Sequence[int]) -> tuple[Tensor, int]:
    """As `generate_responses`; adds tokens, up to the end of each response, and passes."""
    lengths = [decode.gen_length] * len(prompts)
    state = DecodingState(model, audio_embeddings, prompts, lengths, tokenizer.mask_id)
    tokens, passes = decoder(state, eos_id=tokenizer.eos_id)
    ends = ((tokens == tokenizer.eot_id) | (tokens == tokenizer.eos_id)).long()
    counts["tokens"] += int((ends.cumsum(1) - ends == 0).sum())
    counts["passes"] += int(passes.sum())
    return tokens, int(passes.max())


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--size", choices=list(SIZES), help="default: that of the checkpoint, or toy")
    add("--checkpoint", type=Path, help="what train.py wrote (default: the size's own)")
    for part in ("whisper", "llada"):
        add(f"--{part}", help="as of train.py")
    add("--file", type=Path, help="a manifest (default: ToyBench)")
    add("--type", nargs="+", default=[], help="of its questions (default: all)")
    add("--limit", type=int, help="ask at most so many questions, evenly spread")
    add("--device", default="auto", help="as of train.py")
    args = parser.parse_args(argv)
    source = find_source(args.size, args.checkpoint, {"whisper": args.whisper, "llada": args.llada})
    asked = questions_of(args.file, args.type, args.limit, source.config.size)
    diffa2 = Diffa2.load(source, *choose_device(args.device)[:2])
    features = FeatureCache(diffa2.model, diffa2.device, diffa2.dtype, keep=True)
    rows = [(f"{len(asked)} answers", "tokens per forward pass", "right")]
    for name, decoder in RULES.items():
        counts = Counter()
        respondent = Respondent(features, diffa2.tokenizer, diffa2.parts, source.config.decode,
                                partial(counted, decoder, counts))
        right = scoreboard.report(asked, respondent.answer(asked, AT_ONCE)[0]).figures["overall"]
        rows.append((name, f"{counts['tokens'] / counts['passes']:.2f}", f"{right:.3f}"))
    print(columns(rows))


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
