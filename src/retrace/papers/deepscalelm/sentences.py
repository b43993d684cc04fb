"""The package's own text: sentences in which most words follow from others, and a model must read to know them.

A text is of one topic and about one name. Its sentences have the slots of TEMPLATE: the name; a verb of the topic in
the form that agrees with the name; objects of the topic and common words, both Zipf-distributed. So a masked
name, verb or topic is known from the rest of the text, and a model that has not learned to look at it stays at the
entropy of single words, which is known exactly, as is that of a reader who knows topic and name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrace.core.data import generator
from retrace.papers.deepscalelm.config import NUM_SPECIAL, ProceduralText

NAME, VERB, OBJECT, COMMON = range(4)
TEMPLATE = (NAME, VERB, COMMON, OBJECT, COMMON, OBJECT, VERB, OBJECT)


class World:
    """The words of a corpus and their distribution."""

    def __init__(self, config: ProceduralText) -> None:
        self.config = c = config
        order_W = NUM_SPECIAL + torch.randperm(
            c.vocab_size - NUM_SPECIAL, generator=generator(c.world_seed, "words of the world")
        )
        sizes = [c.num_names, c.num_topics * c.num_verbs, c.num_topics * c.num_objects, c.num_common]
        names, verbs, objects, self.common_C = order_W.split(sizes)
        self.names_N = names
        self.verbs_KF, self.objects_KO = verbs.view(c.num_topics, -1), objects.view(c.num_topics, -1)

    def texts(self, count: int, *, length: int, seed: int, purpose: str) -> Tensor:
        """`count` texts of `length` tokens (count, length), int64; the last sentence may be cut."""
        c, rng = self.config, generator(seed, purpose, "texts")
        topic_B = torch.randint(c.num_topics, (count,), generator=rng)
        name_B = torch.randint(c.num_names, (count,), generator=rng)
        return self.sentences(topic_B, name_B, length=length, rng=rng)

    def sentences(self, topic_B: Tensor, name_B: Tensor, *, length: int, rng: torch.Generator) -> Tensor:
        """Texts (B, length) of given topics and names."""
        count = len(topic_B)
        slots_L = torch.tensor([TEMPLATE[i % len(TEMPLATE)] for i in range(length)])
        objects_BL = zipf(self.config.num_objects, (count, length), rng)
        columns = {
            NAME: self.names_N[name_B][:, None].expand(-1, length),
            VERB: self.verbs_KF[topic_B, name_B % self.config.num_verbs][:, None].expand(-1, length),
            OBJECT: self.objects_KO[topic_B[:, None], objects_BL],
            COMMON: self.common_C[zipf(self.config.num_common, (count, length), rng)],
        }
        ids_BL = torch.zeros(count, length, dtype=torch.long)
        for slot, words_BL in columns.items():
            ids_BL = torch.where(slots_L == slot, words_BL, ids_BL)
        return ids_BL

    def probabilities(self) -> Tensor:
        """Of each token at a random place of a random text (V)."""
        c = self.config
        share = {slot: TEMPLATE.count(slot) / len(TEMPLATE) for slot in range(4)}
        probs_V = torch.zeros(c.vocab_size, dtype=torch.float64)
        probs_V[self.names_N] = share[NAME] / c.num_names
        forms_F = torch.bincount(torch.arange(c.num_names) % c.num_verbs, minlength=c.num_verbs) / c.num_names
        probs_V[self.verbs_KF] = share[VERB] * forms_F.double() / c.num_topics
        probs_V[self.objects_KO] = share[OBJECT] * zipf_weights(c.num_objects) / c.num_topics
        probs_V[self.common_C] = share[COMMON] * zipf_weights(c.num_common)
        return probs_V

    def entropies(self) -> dict[str, float]:
        """In nats a token: `unigram` without any context, `floor` with topic, name and slot known."""
        sizes = {OBJECT: self.config.num_objects, COMMON: self.config.num_common}
        floor = sum(TEMPLATE.count(slot) * entropy(zipf_weights(size)) for slot, size in sizes.items())
        return {"unigram": entropy(self.probabilities()), "floor": floor / len(TEMPLATE)}


def zipf_weights(size: int, *, exponent: float = 1.0) -> Tensor:
    """Probabilities of `size` ranks, proportional to rank^-exponent; float64."""
    weights = torch.arange(1, size + 1, dtype=torch.float64) ** -exponent
    return weights / weights.sum()


def zipf(size: int, shape: tuple[int, ...], rng: torch.Generator, *, exponent: float = 1.0) -> Tensor:
    """Ranks from 0 of a Zipf distribution."""
    uniform = torch.rand(shape, generator=rng, dtype=torch.float64)
    return torch.searchsorted(zipf_weights(size, exponent=exponent).cumsum(0), uniform).clamp(max=size - 1)


def entropy(probs: Tensor) -> float:
    """In nats."""
    return float(torch.special.entr(probs).sum())
