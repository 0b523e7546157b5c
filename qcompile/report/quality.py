"""How far a quantized model is from its float original: perplexity, KL divergence, cosine. Pure maths on tensors."""

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from qcompile.errors import CalibrationError


def token_windows(tokens: Tensor, size: int = 512, count: int | None = None) -> Tensor:
    """The whole windows of the second half of `tokens`: the first half is for calibration.

    tokens: integer [T].  Returns int64 [windows, size], the first `count` of them.
    Raises CalibrationError if not one window fits.
    """
    half = tokens[tokens.numel() // 2 :]
    whole = half.numel() // size
    if whole == 0:
        raise CalibrationError(
            f"the second half of {tokens.numel()} tokens holds no window of {size}; give at least {2 * size} tokens"
        )
    return half[: whole * size].view(whole, size)[:count].long()


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood in nats of every token but the first of a window.

    logits: [B, T, V].  tokens: int64 [B, T].  Returns float64 [B, T - 1].
    """
    scores = logits[:, :-1].float().transpose(1, 2)
    return F.cross_entropy(scores, tokens[:, 1:], reduction="none").double()


def token_divergences(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || logits) in nats for each prediction.  Both: [..., V].  Returns float64 [...]."""
    expected = F.log_softmax(reference.float(), -1)
    return F.kl_div(F.log_softmax(logits.float(), -1), expected, log_target=True, reduction="none").sum(-1).double()


def cosines(reference: Tensor, approximation: Tensor) -> Tensor:
    """Cosine of the angle between rows.  Both: [B, D].  Returns float64 [B]."""
    return F.cosine_similarity(reference.double(), approximation.double(), dim=-1)


@dataclass(kw_only=True)
class LanguageQuality:
    """Running means over windows; `add` each window's logits once."""

    losses: float = 0.0
    predictions: int = 0
    divergence: float = 0.0
    agreements: int = 0

    def add(self, reference: Tensor, logits: Tensor, tokens: Tensor) -> None:
        """reference, logits: [B, T, V] of the float and the quantized model.  tokens: int64 [B, T]."""
        losses = token_losses(logits, tokens)
        self.losses += float(losses.sum())
        self.predictions += losses.numel()
        # the last position predicts a token outside the window, which perplexity does not see either
        reference, logits = reference[:, :-1], logits[:, :-1]
        self.divergence += float(token_divergences(reference, logits).sum())
        self.agreements += int((reference.argmax(-1) == logits.argmax(-1)).sum())

    @property
    def perplexity(self) -> float:
        return math.exp(self.losses / self.predictions)

    @property
    def kl(self) -> float:
        """Mean KL(float || quantized), nats a token."""
        return self.divergence / self.predictions

    @property
    def top1(self) -> float:
        """Share of predictions whose most likely token is the float model's."""
        return self.agreements / self.predictions


@dataclass(kw_only=True)
class EmbeddingQuality:
    """Cosines between embeddings of the float and the quantized model, over all texts added."""

    cosines: list[float]

    def add(self, reference: Tensor, approximation: Tensor) -> None:
        """Both: [B, D]."""
        self.cosines += cosines(reference, approximation).tolist()

    @property
    def mean(self) -> float:
        return sum(self.cosines) / len(self.cosines)

    @property
    def lowest(self) -> float:
        return min(self.cosines)


def mean_pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Sentence embeddings: the mean over real tokens, unit length.  hidden: [B, T, D].  mask: [B, T], 1 where real."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * weights).sum(1) / weights.sum(1).clamp(min=1), dim=-1)
