"""What is known of the eight published pairs, each with its source."""

from dataclasses import dataclass

REPOSITORY = "nics-efc/C2C_Fuser"
PAPER = "arXiv 2510.03215 v2"


@dataclass(frozen=True)
class PublishedPair:
    """One folder of the authors' repository.

    Attributes:
        folder: Its name there.
        receiver: Hub id of the model that answers.
        sharer: Hub id of the model that only reads.
        parameters: Of the fuser; computed from the shapes of both caches.
        aligned: Whether tokens are re-encoded; the folder's own ``config.json`` decides when it is loaded.
        authors: What the authors print, with where.
        others: What third parties measured, with who.
    """

    folder: str
    receiver: str
    sharer: str
    parameters: int
    aligned: bool
    authors: str
    others: str = "nothing known"

    def __str__(self) -> str:
        size = f"{self.parameters:,} parameters, {2 * self.parameters / 1e6:,.0f} MB"
        tokens = "tokens re-encoded for the sharer" if self.aligned else "the sharer reads the receiver's tokens"
        return f"\n{self.folder}\n  {self.sharer} -> {self.receiver}; {size}; {tokens}\n  authors: {self.authors}\n  others:  {self.others}"


PUBLISHED_PAIRS = (
    PublishedPair(
        "qwen3_0.6b+qwen2.5_0.5b_Fuser",
        "Qwen/Qwen3-0.6B",
        "Qwen/Qwen2.5-0.5B-Instruct",
        477_848_056,
        False,
        f"MMLU-Redux 42.92, OpenBookQA 52.60, ARC-C 54.52, C-Eval 41.77; receiver 35.53, 39.20, 41.04, 32.04 ({PAPER}, table 4)",
        "OpenBookQA 51.5, receiver 34.0 (audit, n=200); by option logits 47.9, receiver 38.4, receiver without its letter bias 48.2, "
        "a sharer that read another question gives 97.3% the same answers (audit, n=2000)",
    ),
    PublishedPair(
        "qwen3_0.6b+llam3.2_1b_Fuser",
        "Qwen/Qwen3-0.6B",
        "meta-llama/Llama-3.2-1B-Instruct",
        499_868_152,
        True,
        f"MMLU-Redux 44.42, OpenBookQA 47.80, ARC-C 53.39, C-Eval 40.77; receiver as above ({PAPER}, table 4)",
    ),
    PublishedPair(
        "qwen3_0.6b+qwen2.5_1.5b_math_Fuser",
        "Qwen/Qwen3-0.6B",
        "Qwen/Qwen2.5-Math-1.5B",
        485_188_088,
        False,
        f"MMLU-Redux 46.13, receiver 35.53, sharer 39.86 ({PAPER}, table 7)",
    ),
    PublishedPair(
        "qwen3_0.6b+qwen3_4b_Fuser",
        "Qwen/Qwen3-0.6B",
        "Qwen/Qwen3-4B",
        529_228_280,
        False,
        f"MMLU-Redux 45.92, OpenBookQA 55.20, ARC-C 60.17, C-Eval 44.40; sharer 71.38, 79.40, 87.48, 68.09 ({PAPER}, table 9)",
        "OpenBookQA 55.5, receiver 35.0, sharer 77.5; by option logits 51.8, of which 5.4 [4.3, 6.4] need the sharer to have read "
        "this question; GSM8K 40.7, receiver 46.9 (audit)",
    ),
    PublishedPair(
        "qwen3_0.6b+qwen3_4b_base_Fuser",
        "Qwen/Qwen3-0.6B",
        "Qwen/Qwen3-4B-Base",
        529_228_280,
        False,
        f"MMLU-Redux 43.95, OpenBookQA 53.20, ARC-C 55.39, C-Eval 42.79 ({PAPER}, table 4)",
    ),
    PublishedPair(
        "qwen3_1.7b+qwen2.5_1.5b_Fuser",
        "Qwen/Qwen3-1.7B",
        "Qwen/Qwen2.5-1.5B-Instruct",
        485_188_088,
        False,
        f"MMLU-Redux 61.43, receiver 58.26, sharer 58.79 ({PAPER}, figure 6; perhaps another training run)",
        "receiver 66.6, fused 61.2, mismatched sharer 60.7 (audit; its config.json names 5,000 samples)",
    ),
    PublishedPair(
        "qwen3_8b+qwen2.5_7b_Fuser",
        "Qwen/Qwen3-8B",
        "Qwen/Qwen2.5-7B-Instruct",
        642_687_624,
        False,
        f"MMLU-Redux 75.83, receiver 75.53, sharer 72.25 ({PAPER}, figure 6; perhaps another training run)",
    ),
    PublishedPair(
        "qwen3_0.6b+qwen3_4b_gsm8k_Fuser",
        "Qwen/Qwen3-0.6B",
        "Qwen/Qwen3-4B",
        529_228_280,
        False,
        f"GSM8K 62.55 alone, 78.01 together with text; receiver 41.17, text 61.18 ({PAPER}, table 15; issues 13 and 15 of their code)",
    ),
)
