"""A context in the cache of a policy: what the evaluation asks its questions of."""

from functools import cached_property

from torch import Tensor

from minipyramid import LLM, Conversation, Policy, SamplingParams


class HeldContext:
    """Some tokens, computed and pruned once. Any number of questions read them, and nothing of one is left.

    Args:
        llm: under the policy `full`, so that nothing of a question is dropped.
        policy: what the context is pruned by.
        ids: the context.
    """

    def __init__(self, llm: LLM, policy: Policy, ids: list[int]) -> None:
        self.llm, self.policy, self.ids = llm, policy, ids

    @cached_property
    def conversation(self) -> Conversation:
        """Its first turn is the context, and it has no other. Computed when the first question is asked."""
        conversation = Conversation()
        self.llm.under(self.policy).prefill(self.ids, conversation)
        return conversation

    @property
    def kv_bytes(self) -> int:
        """Keys and values that are held of the context."""
        held = self.conversation.held
        return held.bytes if held else 0

    @property
    def computed(self) -> int:
        """Tokens of the context that were computed, over all layers and passes."""
        sizes = len(self.ids), self.llm.config.num_hidden_layers
        return self.policy.computed_by_look_over(*sizes) + sum(self.policy.computed(*sizes))

    def follow(self, ids: list[int], continuation: list[int]) -> Tensor:
        """Log-probabilities behind the context and `ids`, and then behind each token of a continuation.

        Returns [1 + len(continuation), vocab_size].
        """
        return self.llm.logits(ids, continuation, self.conversation).log_softmax(-1)

    def write(self, new_tokens: int) -> list[int]:
        """The greedy text that follows, up to its end; the policy drops of what is generated as well."""
        params = SamplingParams(max_new_tokens=new_tokens)
        (completion,) = self.llm.under(self.policy).generate([self.ids], params)
        return completion.token_ids
