"""Log-probabilities of tokens as the sampler defines them: at its temperature and without suppressed ids."""
from dataclasses import dataclass

import torch

from minixmd.inputs.batch import pack
from minixmd.kernels.logprob import split_suppressed
from minixmd.models.head import TokenLogprob


@dataclass(frozen=True)
class SampledVocabulary:
    """The ids that a policy can sample, and the temperature at which it does."""

    temperature: float
    suppressed_Z: torch.Tensor | None  # ids below vocab_limit that are never sampled, on the model's device
    vocab_limit: int  # ids from here on are never sampled either

    @classmethod
    def of(cls, model, processor, temperature):
        limit, listed = split_suppressed(processor.suppressed_ids, model.config.text.vocab_size)
        suppressed_Z = torch.tensor(listed, dtype=torch.long, device=model.device) if listed else None
        return cls(temperature, suppressed_Z, limit)


@torch.no_grad()
def token_logprobs(model, hidden_ND, batch, vocabulary):
    """(T,) log-probabilities of a batch's targets, in nats. hidden_ND: what the model gave for it."""
    row_loss = TokenLogprob(batch.target_id_T, vocabulary.temperature, vocabulary.suppressed_Z, vocabulary.vocab_limit,
                            model.backend)
    return model.head_loss(hidden_ND, batch.target_row_T, row_loss)[1]["logp"]


@torch.no_grad()
def reference_logprobs(reference, micro_batches, vocabulary):
    """(T,) log-probabilities of a rollout's tokens under the reference, log pi_ref, or any other policy."""
    parts = []
    for groups in micro_batches:
        batch = pack(groups).to(reference.device)
        parts.append(token_logprobs(reference, reference(batch), batch, vocabulary))
    return torch.cat(parts)
