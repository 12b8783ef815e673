"""The Hessian of a loss as a linear map, its largest eigenvalues, its trace; the tangent kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from transom.errors import SettingsError


class Curvature:
    """The Hessian of a loss by the parameters, at the point where they stand.

    The graph of the gradient is kept, so each product costs one backward pass through it. Attention
    runs on the plain kernel meanwhile: fused ones have no second derivative.

    Args:
        loss: called once; a forward pass on a fixed batch.
        parameters: those that require gradients count.
        steps: relative step sizes, one for each of them. Parameters then count in units of the
            root of theirs, in which gradient descent has one step size: what has to stay below 2
            over it is the largest eigenvalue in these units.

    Attributes:
        loss: its value.
        gradient: (P,), all parameters after each other.
        size: P.

    Raises:
        SettingsError: no parameter requires gradients, the loss is not a number, or there are
            more or fewer steps than parameters.
    """

    def __init__(
        self,
        loss: Callable[[], Tensor],
        parameters: Iterable[Tensor],
        steps: Sequence[float] | None = None,
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        if not self.parameters:
            raise SettingsError("no parameter requires gradients; the Hessian is empty")
        self._units: Tensor | float = 1.0
        if steps is not None:
            if len(steps) != len(self.parameters):
                raise SettingsError(
                    f"got {len(steps)} steps for {len(self.parameters)} parameters; expected one "
                    "for each"
                )
            roots = [
                p.detach().new_full((p.numel(),), r**0.5)
                for p, r in zip(self.parameters, steps, strict=True)
            ]
            self._units = torch.cat(roots)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            value = loss()
            if value.ndim:
                raise SettingsError(f"loss has shape {tuple(value.shape)}; expected a number")
            grads = torch.autograd.grad(
                value, self.parameters, create_graph=True, materialize_grads=True
            )
            self._gradient = torch.cat([g.flatten() for g in grads]) * self._units
        self.loss = value.detach()
        self.gradient = self._gradient.detach()
        self.size = len(self.gradient)

    def __call__(self, v: Tensor) -> Tensor:
        """The Hessian times v, (P,) -> (P,)."""
        if not self._gradient.requires_grad:  # the loss is linear
            return torch.zeros_like(v)
        products = torch.autograd.grad(
            self._gradient, self.parameters, v, retain_graph=True, materialize_grads=True
        )
        return torch.cat([p.flatten() for p in products]) * self._units


@torch.no_grad()
def spectrum(
    matrix: Callable[[Tensor], Tensor],
    like: Tensor,
    steps: int,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Eigenvalues of a symmetric map after so many Lanczos steps, the largest first.

    Every new direction is made orthogonal to all before, twice. Where the space of one start is
    used up, a fresh random direction continues, so that P steps give the whole spectrum with
    multiplicities. The ends of the spectrum are right long before that.

    Args:
        matrix: (P,) -> (P,).
        like: (P,), for size, dtype and device.
        steps: products to make, at most P.
        generator: of the start, on the CPU.

    Returns:
        (min(steps, P),).

    Raises:
        SettingsError: `steps` is below 1.
    """
    if steps < 1:
        raise SettingsError(f"steps is {steps}; expected 1 or more")
    size = len(like)
    steps = min(steps, size)
    basis = like.new_zeros(steps, size)
    projected = like.new_zeros(steps, steps)
    tiny = 100 * torch.finfo(like.dtype).eps
    fresh, found = _direction(like, basis[:0], generator), 0
    scale = 0.0
    for i in range(steps):
        basis[i] = fresh
        with torch.enable_grad():
            image = matrix(fresh)
        along = basis[: i + 1] @ image
        projected[i, : i + 1] = projected[: i + 1, i] = along
        found = i + 1
        scale = max(scale, float(image.norm()))
        for _ in range(2):
            image = image - basis[:found].T @ (basis[:found] @ image)
        left = image.norm()
        if found < steps:
            used_up = float(left) <= tiny * scale
            fresh = _direction(like, basis[:found], generator) if used_up else image / left
    return torch.linalg.eigvalsh(projected.double()).flip(0).to(like.dtype)


def _direction(like: Tensor, basis: Tensor, generator: torch.Generator | None) -> Tensor:
    """A random unit vector that is orthogonal to the rows of the basis."""
    v = torch.randn(len(like), generator=generator, dtype=torch.float64).to(like)
    for _ in range(2):
        v = v - basis.T @ (basis @ v)
        v = v / v.norm()
    return v


def top_eigenvalues(
    curvature: Curvature,
    count: int = 1,
    *,
    tolerance: float = 1e-3,
    most: int = 100,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The largest eigenvalues of the Hessian, the sharpness first.

    Lanczos steps double until no wanted eigenvalue moves by more than the tolerance.

    Args:
        curvature: of a model, loss and batch.
        count: eigenvalues wanted.
        tolerance: relative to the largest; 0 makes `most` steps.
        most: Lanczos steps at most; as many as parameters are exact.
        generator: of the start; by default one with a fixed seed.

    Returns:
        (count,), or fewer where there are fewer parameters.

    Raises:
        SettingsError: `count` is below 1 or above `most`.
    """
    if not 1 <= count <= most:
        raise SettingsError(f"count is {count}; expected from 1 to most = {most}")
    generator = generator or torch.Generator().manual_seed(0)
    most = min(most, curvature.size)
    steps = most if tolerance == 0 else min(most, max(10, 2 * count))
    state, before = generator.get_state(), None
    while True:
        generator.set_state(state)
        values = spectrum(curvature, curvature.gradient, steps, generator=generator)[:count]
        if steps >= most:
            return values
        if before is not None and len(before) == len(values):
            moved = (values - before).abs().max()
            if moved <= tolerance * values.abs().max():
                return values
        before, steps = values, min(2 * steps, most)


def trace(
    curvature: Curvature, probes: int | None = 32, *, generator: torch.Generator | None = None
) -> Tensor:
    """The trace of the Hessian.

    Args:
        curvature: of a model, loss and batch.
        probes: random signs to average v . H v over (Hutchinson); None takes every axis: exact, at
            as many products as there are parameters.
        generator: of the signs; by default one with a fixed seed.

    Returns:
        A number.

    Raises:
        SettingsError: `probes` is below 1.
    """
    like = curvature.gradient
    if probes is None:
        axes = torch.eye(curvature.size, dtype=like.dtype, device=like.device)
        return torch.stack([curvature(v)[i] for i, v in enumerate(axes)]).sum()
    if probes < 1:
        raise SettingsError(f"probes is {probes}; expected 1 or more, or None")
    generator = generator or torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (probes, curvature.size), generator=generator).to(like) * 2 - 1
    return torch.stack([v @ curvature(v) for v in signs]).mean()


def tangent_kernel(
    outputs: Callable[[], Tensor], parameters: Iterable[Tensor], *, softmax: bool = False
) -> Tensor:
    """K = J J^T / n, with the non-zero spectrum of the Gauss-Newton part of the Hessian.

    Args:
        outputs: called once; (n,) or (n, C) of a batch.
        parameters: those that require gradients count.
        softmax: the loss is the cross-entropy of (n, C) logits: J is weighted on both sides by
            the root of diag(p) - p p^T of each row. Otherwise half the squared error.

    Returns:
        (n C, n C).

    Raises:
        SettingsError: `softmax` is asked for outputs that are not (n, C).
    """
    wanted = [p for p in parameters if p.requires_grad]
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        f = outputs()
        if softmax and f.ndim != 2:
            raise SettingsError(f"outputs are {tuple(f.shape)}; softmax needs logits (n, C)")
        rows = []
        for value in f.flatten():
            grads = torch.autograd.grad(value, wanted, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([g.flatten() for g in grads]))
    jacobian = torch.stack(rows)
    if softmax:
        p = f.detach().softmax(-1)
        hessians = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        values, vectors = torch.linalg.eigh(hessians)
        roots = vectors * values.clamp_min(0).sqrt()[:, None] @ vectors.mT
        jacobian = (roots @ jacobian.unflatten(0, f.shape)).flatten(0, 1)
    return jacobian @ jacobian.T / len(f)
