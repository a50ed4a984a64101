"""A function of many vectors at once in; its values and its first and second derivatives, chunk by chunk, out.

Row i of the function's result depends on row i of its argument alone. So the derivatives of all rows come from one
pass, and no Jacobian is ever held unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp, vjp, vmap

from pilotfish.errors import SettingError

Inputs = Float[Tensor, "vector input"]
Outputs = Float[Tensor, "vector output"]


class Response:
    """A smooth function f with f(0) = 0, from perturbations to changes, and its derivatives by `torch.func`.

    Products with the derivatives at 0 share one pass at 0 between all vectors (`vmap` over the tangents alone); those
    at other places fold the vectors into the batch.

    Args:
        function: Rows "vector input" to rows "vector output", each row by itself; differentiable forwards, and twice
            backwards.
        rows_per_chunk: Vectors of one pass: what bounds the memory.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        num_inputs: int,
        num_outputs: int,
        *,
        rows_per_chunk: int = 256,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        if min(num_inputs, num_outputs, rows_per_chunk) < 1:
            raise SettingError(
                f"num_inputs {num_inputs}, num_outputs {num_outputs} and rows_per_chunk {rows_per_chunk} must be at "
                f"least 1"
            )
        self.function = function
        self.num_inputs = num_inputs
        self.num_outputs = num_outputs
        self.rows_per_chunk = rows_per_chunk
        self.dtype = dtype
        self.device = device or torch.device("cpu")

    def change(self, theta: Inputs) -> Outputs:
        """f of each row."""
        return self._rows(self.function, self._checked(theta))

    def jvp(self, tangent: Inputs, *, at: Inputs | None = None) -> Outputs:
        """J(at) times the tangent, row by row; at 0 by default."""
        zero = self._zero()

        def shared(along: Tensor) -> Tensor:
            moved: Tensor = jvp(self.function, (zero,), (along[None],))[1][0]
            return moved

        def folded(along: Tensor, base: Tensor) -> Tensor:
            moved: Tensor = jvp(self.function, (base,), (along,))[1]
            return moved

        tangent = self._checked(tangent)
        if at is None:
            return self._rows(vmap(shared), tangent)
        return self._rows(folded, tangent, self._checked(at))

    def vjp(self, cotangent: Outputs, *, at: Inputs | None = None) -> Inputs:
        """The transpose of J(at) times the cotangent, row by row; at 0 by default."""

        def shared(pulled: Tensor) -> Tensor:
            _, pull = self._pull(self._zero())
            return vmap(lambda row: pull(row[None])[0])(pulled)

        def folded(pulled: Tensor, base: Tensor) -> Tensor:
            _, pull = self._pull(base)
            return pull(pulled)

        cotangent = self._checked(cotangent, self.num_outputs)
        if at is None:
            return self._rows(shared, cotangent)
        return self._rows(folded, cotangent, self._checked(at))

    def climb(self, at: Inputs) -> tuple[Outputs, Inputs]:
        """The unit changes u = f(at) / |f(at)| and the gradients of |f| there, J(at) transposed times u; one pass."""

        def both(base: Tensor) -> Tensor:
            change, pull = self._pull(base)
            outward = unit(change)
            return torch.cat([outward, pull(outward)], dim=-1)

        joined = self._rows(both, self._checked(at))
        return joined[:, : self.num_outputs], joined[:, self.num_outputs :]

    def second(self, first: Inputs, other: Inputs) -> Outputs:
        """The second derivative at 0 applied to two vectors, row by row; symmetric in them."""
        zero = self._zero()

        def one(a: Tensor, b: Tensor) -> Tensor:
            # <u, T(a, b)> is linear in u, so its gradient in u, at any u, is T(a, b).
            anything = zero.new_zeros(1, self.num_outputs)
            curved: Tensor = vjp(lambda u: self._curved(u, a[None]), anything)[1](b[None])[0][0]
            return curved

        return self._rows(vmap(one), self._checked(first), self._checked(other))

    def second_vjp(self, cotangent: Outputs, tangent: Inputs) -> Inputs:
        """The second derivative at 0 applied to a direction of the change and to one vector: the Hessian of
        <cotangent, f> times the tangent, row by row.
        """

        def one(u: Tensor, v: Tensor) -> Tensor:
            return self._curved(u[None], v[None])[0]

        return self._rows(vmap(one), self._checked(cotangent, self.num_outputs), self._checked(tangent))

    def _curved(self, cotangent: Tensor, tangent: Tensor) -> Tensor:
        """The Hessian of <cotangent, f> at 0 times the tangent, backwards twice.

        Not forwards twice, nor backwards through forwards: PyTorch's layer norm then takes its mean and deviation for
        constants and is silently wrong (pytorch/pytorch issues 196700 and 198017), and SiLU's derivative has no forward
        mode.
        """
        curved: Tensor = vjp(lambda x: vjp(self.function, x)[1](cotangent)[0], self._zero())[1](tangent)[0]
        return curved

    def jacobian(self) -> Float[Tensor, "output input"]:
        """J(0) whole, by as many products as its smaller side is long."""
        if self.num_inputs <= self.num_outputs:
            return self.jvp(self._eye(self.num_inputs)).T
        return self.vjp(self._eye(self.num_outputs))

    def _pull(self, base: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """f(base), and what takes cotangents there to gradients at the base."""
        change, pull, *_ = vjp(self.function, base)
        return change, lambda cotangent: pull(cotangent)[0]

    def _rows(self, function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
        with torch.no_grad():  # the weights want no gradient; torch.func's own levels are not affected
            chunks = zip(*(torch.split(argument, self.rows_per_chunk) for argument in arguments), strict=True)
            return torch.cat([function(*chunk) for chunk in chunks])

    def _zero(self) -> Tensor:
        return torch.zeros(1, self.num_inputs, dtype=self.dtype, device=self.device)

    def _eye(self, size: int) -> Tensor:
        return torch.eye(size, dtype=self.dtype, device=self.device)

    def _checked(self, rows: Tensor, width: int | None = None) -> Tensor:
        width = width or self.num_inputs
        if rows.ndim != 2 or rows.shape[1] != width or rows.shape[0] < 1 or rows.dtype != self.dtype:
            raise SettingError(
                f"got vectors of shape {tuple(rows.shape)} and {rows.dtype}; give one or more rows of width {width} in "
                f"{self.dtype}"
            )
        return rows


def unit(rows: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
    """Each row at length 1; a row of zeros stays one."""
    return torch.nn.functional.normalize(rows, dim=-1)


def random_units(response: Response, count: int, *, generator: torch.Generator) -> Float[Tensor, "vector input"]:
    """Random directions of the perturbation, each of length 1."""
    drawn = torch.randn(count, response.num_inputs, generator=generator, dtype=response.dtype)
    return unit(drawn).to(response.device)
