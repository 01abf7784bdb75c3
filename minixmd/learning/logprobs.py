"""Log-probabilities of tokens as the sampler defines them: at its temperature and without suppressed ids."""
from typing import NamedTuple

import torch

from minixmd.inputs.batch import pack
from minixmd.kernels.logprob import split_suppressed, token_logprob
from minixmd.models.head import CHUNK
from minixmd.runs.heartbeat import beat


class SampledVocabulary(NamedTuple):
    """The ids that a policy can sample, and the temperature at which it does, as the kernels take them."""

    temperature: float
    suppressed_Z: torch.Tensor | None  # ids below vocab_limit that are never sampled, on the model's device
    vocab_limit: int  # ids from here on are never sampled either

    @classmethod
    def of(cls, model, processor, temperature):
        limit, listed = split_suppressed(processor.suppressed_ids, model.config.text.vocab_size)
        suppressed_Z = torch.tensor(listed, device=model.device) if listed else None
        return cls(temperature, suppressed_Z, limit)

    def log_softmax(self, logits_TV):
        """(T, vocab_limit) log-probabilities in nats. logits_TV: (T, V) fp32, which it overwrites."""
        logits_TV = logits_TV[:, :self.vocab_limit]
        logits_TV /= self.temperature
        if self.suppressed_Z is not None:
            logits_TV[:, self.suppressed_Z] = -torch.inf
        return logits_TV.log_softmax(-1)


@torch.no_grad()
def token_logprobs(model, hidden_ND, batch, vocabulary):
    """(T,) log-probabilities of a batch's targets, in nats. hidden_ND: what the model gave for it."""
    parts = []
    rows, ids = batch.target_row_T.split(CHUNK), batch.target_id_T.split(CHUNK)
    for row_T, id_T in zip(rows, ids, strict=True):
        parts.append(token_logprob(model.logits(hidden_ND[row_T]), id_T, *vocabulary, model.backend))
    return torch.cat(parts)


@torch.no_grad()
def top_logprobs(model, hidden_ND, batch, vocabulary, k):
    """The k likeliest ids at each of a batch's T targets, and their log-probabilities in nats: (T, k) both, on the CPU.
    hidden_ND: what the model gave for the batch."""
    ids, logprobs = [], []
    for row_T in batch.target_row_T.split(256):  # as many rows of logits as a step of 256 decode slots has
        best = vocabulary.log_softmax(model.logits(hidden_ND[row_T])).topk(k)
        ids.append(best.indices.cpu())
        logprobs.append(best.values.cpu())
    return torch.cat(ids), torch.cat(logprobs)


@torch.no_grad()
def reference_logprobs(reference, micro_batches, vocabulary):
    """(T,) log-probabilities of a rollout's tokens under the reference, log pi_ref, or any other policy."""
    parts = []
    for groups in micro_batches:
        beat()
        batch = pack(groups).to(reference.device)
        parts.append(token_logprobs(reference, reference(batch), batch, vocabulary))
    return torch.cat(parts)
