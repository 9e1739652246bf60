"""Every number of DIFFA-2 in one place: frozen dataclasses, and the table of sizes.

Sources are sections of the paper (arXiv 2601.23161) unless another is named. "The release", in this
file and wherever a file says what differs, is the authors' code (github.com/NKU-HLT/DIFFA, folder
DIFFA-2). `toy` has the architecture of `full` with other numbers; `small` too, but for what
`only_sound` and `fitted` say.

Letters used in shape comments everywhere:
    B batch                 M mel frames         T encoder frames     E encoder width
    N taps of the encoder   Q acoustic queries   A audio embeddings   L tokens of a prompt's text
    P prompt with audio     R response tokens    S = P + R            n samples per response
    D backbone width        H heads              V vocabulary         K masked tokens of a batch
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .errors import require
from .ranges import Ranged

ASSETS = Path(__file__).resolve().parent / "assets"  # the small files that the package ships
DATA = Path(__file__).resolve().parent.parent / "data"  # in a clone: what makes data, and its data


@dataclass(frozen=True)
class AudioConfig(Ranged):
    """Whisper's log-mel front end (arXiv 2212.04356, section 2.2)."""

    sample_rate: int = 16_000  # Hz
    n_fft: int = 400  # samples: a window of 25 ms
    hop_length: int = 160  # samples: 10 ms, so 100 mel frames a second
    n_mels: int = 128
    max_seconds: int = 30  # shorter clips are padded with silence, longer ones cut

    @property
    def max_samples(self) -> int:
        return self.max_seconds * self.sample_rate

    @property
    def max_frames(self) -> int:
        return self.max_samples // self.hop_length


@dataclass(frozen=True)
class WhisperConfig(Ranged):
    """The encoder of Whisper-large-v3. `taps` are numbered as Hugging Face's hidden states: 0 is
    the input of block 1, i the output of block i, and the last one that of the final LayerNorm."""

    n_mels: int = 128
    n_positions: int = 1500  # encoder frames, 50 a second
    width: int = 1280
    n_layers: int = 32
    n_heads: int = 20
    taps: tuple[int, ...] = (3, 7, 11, 15, 19, 23, 27, 31)  # what the acoustic adapter reads


@dataclass(frozen=True)
class AdapterConfig(Ranged):
    """The adapters (section 3.2), and the prompt embeddings: learned vectors, a soft prompt, that
    stage 1 has in place of acoustic embeddings."""

    n_queries: int = 64  # acoustic embeddings per clip
    only_sound: bool = False  # whether the acoustic adapter passes over frames of padding
    fitted: bool = False  # whether both start as data/pretraining/fit.py says, on scaled taps
    qformer_layers: int = 2
    qformer_hidden: int = 3072  # inner width of the Q-Former's feed-forward
    semantic_stride: int = 4  # encoder frames per semantic embedding: 50 Hz -> 12.5 Hz
    n_prompts: int = 20  # prompt embeddings


@dataclass(frozen=True)
class LladaConfig(Ranged):
    """LLaDA-8B, the mask predictor (arXiv 2502.09992)."""

    vocab_size: int = 126_464
    width: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    hidden: int = 12_288
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5


@dataclass(frozen=True)
class LoraConfig(Ranged):
    """Low-rank adaptation of the backbone, from stage 3 on (arXiv 2106.09685)."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "ff_proj", "up_proj")


@dataclass(frozen=True)
class TextConfig(Ranged):
    """The words around the audio, and how long a response is."""

    tokenizer: str = "tokenizer.json"  # beside the backbone's weights; or a rank file in assets/
    train_system: str = (  # as released: other words than at inference
        "You are a helpful voice assistant. Imagine you can hear the audio clips. "
        "Focus on the audios and respond directly to the prompts.")
    system: str = "You are a helpful voice assistant."  # at inference
    instruction: str = "Please transcribe the audio to text."  # the default question
    response_multiple: int = 32  # EOS fill a response, and are learned, up to a multiple of this


@dataclass(frozen=True)
class DecodeConfig(Ranged):
    """The reverse process, see decode.py. With a `factor` (arXiv 2505.22618) or a `threshold`,
    confident steps commit many tokens; with neither, the schedule is fixed: `steps` steps."""

    gen_length: int = 128  # response tokens
    block_length: int = 32  # tokens per block, filled in from left to right
    steps: int = 128  # in all, shared equally between the blocks (fixed schedule)
    factor: float | None = 1.0  # f: commit while (n + 1)(1 - c_n) <= f
    threshold: float | None = None  # commit what is more confident than this
    eos_threshold: float | None = None  # an EOS of a higher confidence ends the response at once
    revise: float | None = None  # mask once more what was committed with a lower confidence
    temperature: float = 0.0
    cfg: float = 0.0  # classifier-free guidance scale s: uncond + (s + 1)(cond - uncond)
    remasking: Literal["confidence", "random"] = "confidence"  # what to commit first
    cache: Literal["none", "prefix", "dual"] = "none"  # of keys and values
    refresh: int | None = None  # steps after which the cache is renewed; None: once a block
    capture: bool = False  # record the cached step as a CUDA graph; no effect on other devices
    compile: bool = False  # and have torch.compile fuse its operations
    seed: int = 0

    @property
    def is_scheduled(self) -> bool:
        return self.factor is None and self.threshold is None

    @property
    def steps_per_block(self) -> int:
        """Exact for a fixed schedule; else the most there can be, one each time that a token is
        committed: once, or twice if it is revised."""
        if not self.is_scheduled:
            return self.block_length * (1 if self.revise is None else 2)
        return min(self.steps * self.block_length // self.gen_length, self.block_length)

    def __post_init__(self):
        super().__post_init__()
        n_blocks, left_over = divmod(self.gen_length, self.block_length)
        require(left_over == 0, "--gen-length must be a multiple of --block-length, "
                                f"got {self.gen_length} and {self.block_length}")
        require(self.steps % n_blocks == 0,
                f"--steps must be a multiple of the {n_blocks} blocks, got {self.steps}")
        require(self.factor is None or self.threshold is None,
                "--factor and --threshold exclude each other; choose one")
        require(self.remasking == "confidence" or self.is_scheduled,
                "--remasking random needs a fixed schedule, without --factor and --threshold")
        require(self.revise is None or not self.is_scheduled,
                "--revise needs --factor or --threshold, not a fixed schedule")
        require(self.cache != "none" or not (self.refresh or self.capture),
                "--refresh and --capture need --cache prefix or dual")
        require(self.capture or not self.compile, "--compile needs --capture")


# The forward process: two of the same bound (diffusion.py), and two that are biased (data.py).
MASKINGS = ("published", "low-variance", "half-masked", "all-masked")
# Parts of the model, spliced in or trained; "prompts" are prompt embeddings, not chat prompts.
PROMPTS_AND_SEMANTIC, ACOUSTIC_AND_SEMANTIC = ("prompts", "semantic"), ("acoustic", "semantic")


@dataclass(frozen=True)
class StageConfig(Ranged):
    """One row of the curriculum (section 3.3)."""

    title: str
    number: int  # decides, with the seed, the order of the examples and the noise
    trains: tuple[str, ...]  # parts of the model; all else is frozen
    data: str  # the manifest's name in a data folder
    batch_size: int  # examples per step, over all processes and accumulated gradients
    audio: tuple[str, ...] = ACOUSTIC_AND_SEMANTIC  # what is spliced into the prompt, in order
    lr: float = 5e-5
    schedule: Literal["cosine", "linear"] = "cosine"  # to zero, after the warm-up
    micro_batch: int | None = None  # examples per forward pass; None: all of them
    steps: int | None = None  # None: `epochs` decides
    epochs: int = 10
    preference: bool = False  # VRPO instead of the masked diffusion loss
    masking: Literal[MASKINGS] = "published"  # stage 4 has "all-masked" or published samples
    lora_dropout: float = 0.0  # of LoRA's inputs
    adapter_dropout: float = 0.0  # in the Q-Former; the release has BERT's default, 0.1
    warmup: int = 1000  # steps
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: float = 1.0
    max_tokens: int = 2048  # of text in an example: prompt and answer, without the audio
    vrpo_beta: float = 0.2
    vrpo_samples: int = 4

    def __post_init__(self):
        super().__post_init__()
        require(not self.preference or self.lora_dropout == self.adapter_dropout == 0,
                "preference optimisation has no dropout: the reference would not share it")


@dataclass(frozen=True)
class Config:
    """A size: everything that a checkpoint must carry to be loaded again."""

    size: str = "full"
    audio: AudioConfig = AudioConfig()
    whisper: WhisperConfig = WhisperConfig()
    adapter: AdapterConfig = AdapterConfig()
    llada: LladaConfig = LladaConfig()
    lora: LoraConfig = LoraConfig()
    text: TextConfig = TextConfig()
    decode: DecodeConfig = DecodeConfig()

    @property
    def from_scratch(self) -> bool:
        """Whether stage 0 makes the backbone; else it is published, as the encoder of small is."""
        return self.text.tokenizer.endswith(".bpe")


def from_dict(values: dict, cls: type = Config) -> Config:
    """The inverse of `dataclasses.asdict`, after JSON has turned tuples into lists. Raises
    UserError unless each field is there, and no other; but what is off may be missing."""
    types = {f.name: f.type for f in dataclasses.fields(cls)}
    off = {f.name for f in dataclasses.fields(cls) if f.default is False or f.default is None}
    require(isinstance(values, dict) and types.keys() - off <= values.keys() <= types.keys(),
            f"this is not the {cls.__name__} of this version")
    values = {name: tuple(value) if isinstance(value, list) else value
              for name, value in values.items()}
    parts = {name: from_dict(values[name], part) for name, part in types.items()
             if dataclasses.is_dataclass(part)}
    return cls(**values | parts)


FULL_STAGES = {
    # what was said: transcripts, with prompt embeddings in the acoustic adapter's place
    1: StageConfig("semantic alignment", 1, trains=PROMPTS_AND_SEMANTIC, data="stage1",
                   audio=PROMPTS_AND_SEMANTIC, lr=1e-4, schedule="linear", batch_size=1280,
                   micro_batch=8, epochs=20),
    # how it sounded, too: questions about speech, sound and music
    2: StageConfig("joint alignment", 2, trains=ACOUSTIC_AND_SEMANTIC, data="sft", batch_size=192,
                   micro_batch=8, adapter_dropout=0.1),
    # the backbone as well, by LoRA, on the same questions
    3: StageConfig("backbone fine-tuning", 3, trains=(*ACOUSTIC_AND_SEMANTIC, "lora"), data="sft",
                   batch_size=192, micro_batch=4, lora_dropout=0.05, adapter_dropout=0.1),
    # which of two answers is right
    4: StageConfig("preference optimisation", 4, trains=(*ACOUSTIC_AND_SEMANTIC, "lora"),
                   data="preference", batch_size=16, micro_batch=1, preference=True),
}


def scaled(*changes: dict) -> dict[int, StageConfig]:
    """The curriculum of `full` with `changes` for each stage; as many stages as there are."""
    return {number: dataclasses.replace(FULL_STAGES[number], **changed)
            for number, changed in zip(FULL_STAGES, changes)}


TOY = Config(  # its last tap is the final state, which is normalised
    size="toy",
    audio=AudioConfig(max_seconds=4),
    whisper=WhisperConfig(n_positions=200, width=96, n_layers=4, n_heads=4, taps=(1, 2, 3, 4)),
    adapter=AdapterConfig(n_queries=12, qformer_hidden=256), lora=LoraConfig(rank=32, alpha=64.0),
    llada=LladaConfig(vocab_size=628, width=128, n_layers=6, n_heads=4, hidden=384, rope_theta=1e4),
    text=TextConfig(tokenizer="toy.bpe", train_system=TextConfig.system, response_multiple=16),
    decode=DecodeConfig(gen_length=16, block_length=16, steps=16, factor=0.5))
SMALL = Config(  # its encoder is whisper-tiny.en, whose taps in the release are (0, 1, 2, 3)
    size="small", audio=AudioConfig(n_mels=80, max_seconds=13),
    whisper=WhisperConfig(n_mels=80, n_positions=650, width=384, n_layers=4, n_heads=6,
                          taps=(2, 4)),
    adapter=AdapterConfig(n_queries=16, only_sound=True, fitted=True, qformer_hidden=768),
    lora=LoraConfig(rank=32, alpha=64.0),
    llada=LladaConfig(vocab_size=2048, width=192, n_layers=6, n_heads=6, hidden=576,
                      rope_theta=1e4),
    text=TextConfig(tokenizer="small.bpe", train_system=TextConfig.system),
    decode=DecodeConfig(gen_length=32, steps=32, factor=0.5))
DIFFA1 = Config(  # arXiv 2507.18452, on Whisper-small
    size="diffa1", audio=AudioConfig(n_mels=80),
    whisper=WhisperConfig(n_mels=80, width=768, n_layers=12, n_heads=12, taps=(2, 5, 8, 11)))
HALF = dict(masking="half-masked", lora_dropout=0.0, adapter_dropout=0.0)
PAIRS = dict(masking="all-masked", batch_size=16, micro_batch=4, vrpo_beta=0.5, vrpo_samples=1)
SIZES = {  # a config and the stages by number
    "toy": (TOY, scaled(  # on a CPU 8 sequences at once are faster than more
        dict(HALF, lr=1.5e-3, batch_size=4, micro_batch=4, steps=1200, warmup=60),
        dict(HALF, lr=1.1e-3, batch_size=4, micro_batch=4, steps=1200, warmup=60),
        dict(HALF, lr=5e-4, batch_size=4, micro_batch=4, steps=2600, warmup=60),
        dict(PAIRS, lr=1.4e-4, micro_batch=8, steps=430, warmup=30))),
    "small": (SMALL, scaled(
        dict(HALF, lr=1.5e-3, batch_size=8, micro_batch=8, steps=1800, warmup=60),
        dict(masking="all-masked", lr=4e-4, batch_size=8, micro_batch=8, steps=1400, warmup=60),
        dict(masking="half-masked", lr=4e-4, batch_size=8, micro_batch=8, steps=4200, warmup=60),
        dict(PAIRS, lr=5e-5, steps=120, warmup=20))),
    "diffa1": (DIFFA1, scaled({}, {})),  # it has no LoRA
    "full": (Config(), FULL_STAGES)}
