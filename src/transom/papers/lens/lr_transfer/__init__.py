"""Why learning rates transfer: sharpness along training, and parametrisations that hold it still.

A learning rate found on a narrow network serves a wide one where the sharpness, the largest
eigenvalue of the Hessian of the training loss, takes the same course at every width. With all
weights ~ N(0, 1), width N, depth L:

    h_1 = W_in x / sqrt(D)      h_{l+1} = h_l + W_l phi(h_l) / (L^a sqrt(N))
    f = w_out . phi(h_{L+1}) / (gamma sqrt(N))               step size eta_0 gamma^2

NTK: gamma = 1, a = 0. muP: gamma = sqrt(N), a = 0. Depth-muP: gamma = sqrt(N), a = 1/2. What is
compared over widths is gamma^2 lambda_max; training rises to step size x lambda_max of about 2.
The non-zero spectrum of the Gauss-Newton part of the Hessian is that of K = J J^T / n.

`Curvature` is the Hessian of any model, loss and batch as a linear map (double backward through
plain attention kernels), `top_eigenvalues` and `trace` read it, `tangent_kernel` is K. For networks
with ordinary initialisation, `rescale` and `groups` are the muP rules for Adam and SGD against a
narrow base model, with `Readout` as the last layer. `sweep` trains over rates and
widths or depths, in networks that are the same where they are narrowest.

Source: Why do Learning Rates Transfer? Reconciling Optimization and Scaling Limits for Deep
Learning, 2024 (later: Super Consistency of Neural Network Landscapes and Learning Rate Transfer);
no official code was found. Checked: outputs, gradients, spectra and a step against dense Hessians
and Jacobians; the muP rules with two steps of Adam and of SGD against microsoft/mup@1981497. Not
checked: the paper's networks and data sets. The exponents above follow the literature on muP.

With heads that grow wider instead of more numerous, muP also asks for scores scaled by 1/d instead
of 1/sqrt(d); `rescale` leaves attention as it is.
"""

from __future__ import annotations

from transom.papers.lens.lr_transfer.curvature import (
    Curvature,
    spectrum,
    tangent_kernel,
    top_eigenvalues,
    trace,
)
from transom.papers.lens.lr_transfer.lab import Sweep, picture, sweep
from transom.papers.lens.lr_transfer.mup import Readout, groups, rescale, width_ratios
from transom.papers.lens.lr_transfer.network import ResidualNet, half_squared_error
from transom.registry import Offer

__all__ = [
    "OFFERS",
    "Curvature",
    "Readout",
    "ResidualNet",
    "Sweep",
    "groups",
    "half_squared_error",
    "picture",
    "rescale",
    "spectrum",
    "sweep",
    "tangent_kernel",
    "top_eigenvalues",
    "trace",
    "width_ratios",
]

OFFERS = (
    Offer("lens", "curvature", Curvature),
    Offer("lens", "sharpness", top_eigenvalues),
    Offer("lens", "hessian-trace", trace),
    Offer("lens", "tangent-kernel", tangent_kernel),
    Offer("lens", "residual-net", ResidualNet),
    Offer("lens", "mup-rescale", rescale),
    Offer("lens", "mup-groups", groups),
    Offer("lens", "learning-rate-sweep", sweep),
)
