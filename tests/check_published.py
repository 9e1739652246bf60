"""The check on the real weights, run by hand by whoever has them: hashes, every tensor, Whisper and
LLaDA against transformers, and a transcript.

    pip install huggingface_hub
    hf download openai/whisper-large-v3 model.safetensors config.json \
        --local-dir weights/openai/whisper-large-v3
    hf download GSAI-ML/LLaDA-8B-Instruct --local-dir weights/GSAI-ML/LLaDA-8B-Instruct
    hf download zhoujiaming777/DIFFA-2 --local-dir weights/zhoujiaming777/DIFFA-2
    pip install -e ".[reference]" "transformers==4.57.*"
    python tests/check_published.py speech.wav --says "what is said"

The code that comes with LLaDA does not run on transformers 5. With the comparison two LLaDAs are
there at once, 36 GB on the device; --no-reference leaves it out, and needs 19 GB. Each step prints
what it found; the first that is wrong ends it with exit code 1.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffa2_mini.command.script import begin, run_script

begin(__name__)  # Ctrl-C while the rest is imported

import hashlib

import torch

import sample
from diffa2_mini import weights
from diffa2_mini.audio import log_mel
from diffa2_mini.command.script import Parser
from diffa2_mini.config import ACOUSTIC_AND_SEMANTIC, SIZES
from diffa2_mini.errors import require
from diffa2_mini.evaluate.scoring import normalise, word_errors
from diffa2_mini.fast.device import choose_device
from diffa2_mini.listen import Diffa2
from diffa2_mini.model import part_of
from diffa2_mini.published.sources import load_tokenizer, locate_all
from diffa2_mini.weights import trained_tensors

# of DIFFA-2
SHA256 = {"pytorch_model.bin": "6e7053e74ffc9631fffa321ff0f3a26a009b20aa95fecf173631bd79947f2818"}
COUNTS = {"whisper": 636_968_960, "semantic": 36_392_448, "acoustic": 47_892_992, "prompts": 81_920,
          "llada": 8_015_581_184, "lora": 14_680_064}
SPECIAL = (126_081, 126_336)
CLOSE = 2e-2  # relative, in bfloat16


def check(right: bool, what: str) -> None:
    print(f"{'ok   ' if right else 'WRONG'}  {what}", flush=True)
    if not right:
        sys.exit(1)


def compare(what: str, expected: torch.Tensor, found: torch.Tensor) -> None:
    gap = float((expected.float() - found.float()).abs().max() / expected.float().abs().max())
    check(gap <= CLOSE,
          f"{what}: the largest difference is {gap:.2g} of the largest value, at most {CLOSE}")


@torch.no_grad()
def against_references(model, tokenizer, paths: dict[str, Path], mel: torch.Tensor,
                       device: torch.device) -> None:
    """Tokenizer, encoder and backbone, which has no LoRA yet, against the libraries that people
    trust."""
    import transformers
    from tokenizers import Tokenizer as Reference

    require(int(transformers.__version__.split(".")[0]) < 5,
            f"expected transformers 4, got {transformers.__version__}, on which LLaDA's code does "
            "not run; pip install 'transformers==4.57.*'")
    reference = Reference.from_file(str(paths["llada"] / "tokenizer.json"))
    reference.encode_special_tokens = True
    texts = [
        Path(__file__).read_text(), __doc__, "Ünïcödé 漢字 🙂 12345  \n\t x",
        "<|eot_id|> typed by a user"]
    right = [
        reference.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
        for text in texts]
    check(all(right), "the tokenizer against the tokenizers library")

    dtype = mel.dtype
    whisper = transformers.WhisperModel.from_pretrained(str(
        paths["whisper"]), torch_dtype=dtype).encoder.to(device).eval()
    compare("Whisper's last hidden state", whisper(mel).last_hidden_state, model.whisper(mel)[0])
    del whisper
    llada = transformers.AutoModel.from_pretrained(
        str(paths["llada"]), trust_remote_code=True, torch_dtype=dtype)
    ids = tokenizer.prompt("You are helpful.", "Name a colour.").ids + [tokenizer.mask_id] * 32
    ids = torch.tensor([ids], device=device)
    expected = llada.to(device).eval()(ids).logits[0, -32:]
    del llada
    compare("LLaDA's logits", expected,
            model.llada.logits(model.llada(model.llada.wte(ids)))[0, -32:])


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("clip", type=Path, help="a recording of English speech")
    parser.add_argument("--says", required=True, help="what is said in it")
    parser.add_argument("--no-reference", action="store_true",
                        help="leave out the comparison with transformers")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    args = parser.parse_args(argv)
    device, dtype, why = choose_device(args.device, "bfloat16")
    print(why)
    config = SIZES["full"][0]
    samples = sample.parts_of_clip(args.clip, config.audio, chunk=False)[0].samples
    paths = locate_all({"whisper": None, "llada": None, "diffa2": None}, "full")
    for name, known in SHA256.items():
        require((paths["diffa2"] / name).is_file(),
                f"{paths['diffa2']}: expected {name}, found none; download it again")
        digest = hashlib.sha256((paths["diffa2"] / name).read_bytes()).hexdigest()
        check(digest == known, f"SHA-256 of {name}: {digest}")
    tokenizer = load_tokenizer(config)
    special = (tokenizer.eos_id, tokenizer.mask_id)
    check(special == SPECIAL, f"EOS and [MASK]: {special}")

    # strict, as all loading is
    model = weights.build(config, paths, device, dtype)
    if not args.no_reference:
        mel = log_mel(samples, config.audio)[None].to(device, dtype)
        against_references(model, tokenizer, paths, mel, device)
    parts = weights.load_diffa2(model, paths["diffa2"])
    check(parts == ACOUSTIC_AND_SEMANTIC, f"spliced into the prompt: {parts}")
    counts = dict.fromkeys(COUNTS, 0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        counts[part_of(name)] += tensor.numel()
    check(all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values()),
          "all weights are finite")
    check(counts == COUNTS, f"parameters: {counts}")
    file = weights.renamed(weights.read_weights(paths["diffa2"], "diffa2"), "diffa2")
    ours = trained_tensors(model)
    same = all(torch.equal(ours[name].cpu(), tensor.float()) for name, tensor in file.items())
    check(same and len(ours) == len(file), "DIFFA-2's tensors, bit for bit")

    model.eval().to(device)
    diffa2 = Diffa2(model, parts, tokenizer, device, dtype)
    (answer,) = diffa2.answer([samples], [config.text.instruction], config.decode)
    errors = word_errors(normalise(args.says), normalise(answer.text))
    check(errors.total <= 0.2 * errors.words,
          f"transcript: {answer.text!r}; {errors.total} errors in {errors.words} words")
    print("all is as it should be")


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
