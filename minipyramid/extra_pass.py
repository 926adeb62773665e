"""A pass over a prompt before it is computed, for a policy that looks it over (`Policy.look_over`)."""

from torch import Tensor

from minipyramid.cache import Row, Span
from minipyramid.errors import RequestError
from minipyramid.model import Model
from minipyramid.policy import Policy
from minipyramid.request import Sequence


def run_extra(model: Model, sequence: Sequence, row: Row, ids: Tensor, policy: Policy) -> None:
    """Run tokens [T] through the layers in the sequence's row; what the policy holds of them is let go.

    Raises:
        RequestError: they are more than the model's context.
    """
    total, context = row.position + len(ids), model.config.max_position_embeddings
    if total > context:
        told = f"{sequence.request.name} is looked over, which takes {total} tokens of a context of {context}"
        raise RequestError(f"{told}; shorten it or take a policy that reads it once")
    model.extend(ids, [Span(row, len(ids), policy)])
    row.adopt(sequence.earlier)
