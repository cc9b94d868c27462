r"""Transformations of SDEs: each function takes an SDE and returns an SDE.

Time is the forward time of the original process. A reversed SDE has a reversed span, so its steps
h are negative and dw has variance |h|. With D = GGᵀ, and any noise scale lambda in [0, 1], the
backward process that keeps the marginals p_t is

.. math:: dx = [f - \tfrac{1 + \lambda^2}{2} (\nabla \cdot D + D \nabla \log p_t)] dt
               + \lambda G \, d\bar w .

The divergence (∇·D)_i = Σ_j ∂_j D_ij is there for every form of G, and zero for additive noise.
Texts that let time increase along the reverse process flip the sign of the whole drift; this
module does not.

References:
    Reverse-time diffusion equation models (Anderson, 1982), doi 10.1016/0304-4149(82)90051-5
    Score-based generative modeling through SDEs (Song et al., 2021)
"""

from kakusan.core.operators import Operator, Zero
from kakusan.core.types import Field, State, Time
from kakusan.errors import KakusanError
from kakusan.processes.sde import SDE


class Reverse(SDE):
    """What `reverse` returns."""

    def __init__(self, sde: SDE, score: Field, noise: float) -> None:
        self.sde, self.score, self.noise = sde, score, noise
        self.span = (sde.span[1], sde.span[0])

    def drift(self, x: State, t: Time) -> State:  # noqa: D102
        pull = self.sde.gram_divergence(x, t) + self.sde.diffusion(x, t).gram(self.score(x, t))
        # a process that is itself reversed counts time downwards, which flips the correction
        return self.sde.drift(x, t) - self.sde.direction * (1 + self.noise**2) / 2 * pull

    def diffusion(self, x: State, t: Time) -> Operator:  # noqa: D102
        return self.sde.diffusion(x, t).scaled(self.noise) if self.noise else Zero()

    def noise_shape(self, x: State) -> tuple[int, ...]:  # noqa: D102
        return self.sde.noise_shape(x)

    def gram_divergence(self, x: State, t: Time) -> State:  # noqa: D102
        return self.noise**2 * self.sde.gram_divergence(x, t)


def reverse(sde: SDE, score: Field, noise: float = 1.0) -> Reverse:
    r"""Runs `sde` backwards in time, keeping its marginals p_t.

    Arguments:
        sde: The process to reverse, with any form of G.
        score: The field (x, t) -> grad log p_t(x), with the shape of x.
        noise: The scale lambda >= 0. 1 is Anderson's reverse, 0 the probability-flow ODE.

    Example:
        >>> from kakusan.processes.linear import VP
        >>> reverse(VP(), lambda x, t: -x).span
        (1.0, 0.001)
    """
    if not 0 <= noise < float("inf"):
        raise KakusanError(f"the noise scale of a reverse process must be >= 0, got {noise}")
    return Reverse(sde, score, noise)


def probability_flow(sde: SDE, score: Field) -> Reverse:
    """The ODE with the marginals of `sde`: `reverse` without noise. It runs both ways."""
    return reverse(sde, score, noise=0.0)


class Tilted(SDE):
    """What `tilt` returns."""

    def __init__(self, sde: SDE, u: Field) -> None:
        self.sde, self.u, self.span = sde, u, sde.span

    def drift(self, x: State, t: Time) -> State:  # noqa: D102
        G = self.sde.diffusion(x, t)
        if G.deterministic:
            raise TypeError("a tilt moves an SDE by its noise, and an ODE has none: "
                            "add the tilt to its score")  # fmt: skip
        return self.sde.drift(x, t) + self.sde.direction * G.gram(self.u(x, t))

    def diffusion(self, x: State, t: Time) -> Operator:  # noqa: D102
        return self.sde.diffusion(x, t)

    def noise_shape(self, x: State) -> tuple[int, ...]:  # noqa: D102
        return self.sde.noise_shape(x)

    def gram_divergence(self, x: State, t: Time) -> State:  # noqa: D102
        return self.sde.gram_divergence(x, t)


def tilt(sde: SDE, u: Field) -> Tilted:
    r"""Doob's transform: adds GGᵀ u to the drift along the SDE's own time, with u = ∇log h.

    Tilting the reverse process by u equals reversing with the score `score + u`.

    Arguments:
        sde: A process with noise.
        u: The field (x, t) -> grad log h(x, t), with the shape of x.
    """
    if isinstance(sde, Reverse) and not sde.noise:
        raise TypeError("a tilt moves an SDE by its noise, and an ODE has none: "
                        "add the tilt to its score")  # fmt: skip
    return Tilted(sde, u)
