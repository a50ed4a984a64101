"""Factors of a response in; their strengths and order out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Objective = Literal["linear", "projected", "quadratic", "exponential"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Factors:
    """A shallow stand-in for a response: f(R theta) is about the sum over factors of
    strength * activation(<input, theta>) * output, for theta of length 1.
    """

    objective: Objective
    inputs: Float[Tensor, "factor input"]
    """Unit vectors at the source: what steers."""
    outputs: Float[Tensor, "factor output"]
    """Unit vectors at the target: what it does."""
    strengths: Float[Tensor, " factor"]
    """What the factor adds to the change, in units of the target's stream."""
    radius: float
    """R: the length at which an input is added."""

    def __len__(self) -> int:
        return len(self.inputs)

    def ranked(self) -> Factors:
        """The strongest first."""
        return self.chosen(self.strengths.abs().argsort(descending=True))

    def chosen(self, index: Tensor) -> Factors:
        return replace(self, inputs=self.inputs[index], outputs=self.outputs[index], strengths=self.strengths[index])


def fitted_strengths(
    inputs: Float[Tensor, "factor input"],
    outputs: Float[Tensor, "factor output"],
    reached: Float[Tensor, " factor"],
    objective: Objective,
) -> Float[Tensor, " factor"]:
    """The least-squares strengths for given factors: K alpha = reached.

    The objective sums the squared errors of the derivative tensors, R^k / k! each. Setting its gradient to 0 gives K,
    the Gram matrix of outputs times the activation of that of inputs.

    Args:
        reached: <output, tensor applied to the input>, factor by factor; for `exponential` the tensors of all orders
            together are the change f(R input) itself.
    """
    outs, ins = outputs.double() @ outputs.double().T, inputs.double() @ inputs.double().T
    power = {"quadratic": ins.square(), "exponential": torch.expm1(ins)}.get(objective, ins)
    # Two factors that ended up as one make K singular; the pseudo-inverse shares the strength between them.
    solved: Tensor = torch.linalg.pinv(outs * power, hermitian=True, rtol=1e-6) @ reached.double()
    return solved.to(inputs.dtype)


def orthonormal(rows: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
    """Gram-Schmidt from the first row on, which keeps each row's sense.

    LAPACK's QR may turn a row round. An even function does not mind; an exponential one does: v and -v do different
    things there.
    """
    basis, upper = torch.linalg.qr(rows.T)
    sense = torch.where(upper.diagonal() < 0, -1.0, 1.0).to(rows.dtype)
    turned: Tensor = basis * sense
    return turned.T
