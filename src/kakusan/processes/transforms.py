r"""Transformations of SDEs: each function takes an SDE and returns an SDE.

Time is the forward time of the original process. A reversed SDE has a reversed span, so its steps
h are negative and dw has variance |h|. With D = GGᵀ, and any noise scale lambda in [0, 1], the
backward process that keeps the marginals p_t is

.. math:: dx = [f - \tfrac{1 + \lambda^2}{2} (\nabla \cdot D + D \nabla \log p_t)] dt
               + \lambda G \, d\bar w .

The divergence (∇·D)_i = Σ_j ∂_j D_ij is there for every form of G, and zero for additive noise.
Texts that let time increase along the reverse process flip the sign of the whole drift; this
module does not.

An SDE is read in the sense of Itô. `Stratonovich(sde)` reads its coefficients in the other sense,
`ito` and `stratonovich` write one process in either: their drifts differ by ½ Σ_j (∂G_j) G_j.

References:
    Reverse-time diffusion equation models (Anderson, 1982), doi 10.1016/0304-4149(82)90051-5
    Score-based generative modeling through SDEs (Song et al., 2021)
"""

from torch import Tensor

from kakusan.core import calculus
from kakusan.core.operators import Operator, Zero
from kakusan.core.types import Field, State, Time
from kakusan.errors import KakusanError
from kakusan.processes.sde import SDE


class Reverse(SDE):
    """What `reverse` returns."""

    def __init__(self, sde: SDE, score: Field, noise: float) -> None:
        self.sde, self.score, self.noise = sde, score, noise
        self.span, self.domain = (sde.span[1], sde.span[0]), sde.domain

    def inside(self, x: State) -> Tensor:  # noqa: D102
        return self.sde.inside(x)

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
    return Reverse(ito(sde), score, noise)


def probability_flow(sde: SDE, score: Field) -> Reverse:
    """The ODE with the marginals of `sde`: `reverse` without noise. It runs both ways."""
    return reverse(sde, score, noise=0.0)


class Tilted(SDE):
    """What `tilt` returns."""

    def __init__(self, sde: SDE, u: Field) -> None:
        self.sde, self.u, self.span, self.domain = sde, u, sde.span, sde.domain

    def inside(self, x: State) -> Tensor:  # noqa: D102
        return self.sde.inside(x)

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
    return Tilted(ito(sde), u)


class Stratonovich(SDE):
    """The coefficients of `sde`, read in the sense of Stratonovich: dx = f dt + G ∘ dw.

    `solve` knows the sense of a process, and every method converges to the solution of the
    process it is given; `ito` gives the same process in the sense of Itô.

    Arguments:
        sde: Holds f and G.

    Example:
        >>> from kakusan.core.operators import Diagonal
        >>> growth = SDE.of(lambda x, t: 0 * x, lambda x, t: Diagonal(2 * x))
        >>> ito(Stratonovich(growth)).drift(torch.tensor([[3.0]]), torch.tensor(0.0))
        tensor([[6.]])
    """

    def __init__(self, sde: SDE) -> None:
        if isinstance(sde, Stratonovich):
            raise KakusanError("this process is in the sense of Stratonovich already")
        self.sde, self.span, self.domain = sde, sde.span, sde.domain

    def drift(self, x: State, t: Time) -> State:  # noqa: D102
        return self.sde.drift(x, t)

    def diffusion(self, x: State, t: Time) -> Operator:  # noqa: D102
        return self.sde.diffusion(x, t)

    def noise_shape(self, x: State) -> tuple[int, ...]:  # noqa: D102
        return self.sde.noise_shape(x)

    def gram_divergence(self, x: State, t: Time) -> State:  # noqa: D102
        return self.sde.gram_divergence(x, t)

    def inside(self, x: State) -> Tensor:  # noqa: D102
        return self.sde.inside(x)


class _Shifted(SDE):
    """A process with `sign` / 2 Σ_j (∂G_j) G_j added to its drift."""

    def __init__(self, sde: SDE, sign: int) -> None:
        self.sde, self.sign = sde, sign
        self.span, self.domain = sde.span, sde.domain

    def drift(self, x: State, t: Time) -> State:
        shift = calculus.noise_drift(self.sde.diffusion, x, t, self.sde.noise_shape(x))
        return self.sde.drift(x, t) + self.sign * self.sde.direction / 2 * shift

    def diffusion(self, x: State, t: Time) -> Operator:
        return self.sde.diffusion(x, t)

    def noise_shape(self, x: State) -> tuple[int, ...]:
        return self.sde.noise_shape(x)

    def gram_divergence(self, x: State, t: Time) -> State:
        return self.sde.gram_divergence(x, t)

    def inside(self, x: State) -> Tensor:
        return self.sde.inside(x)


def ito(sde: SDE) -> SDE:
    r"""The same process in the sense of Itô: the drift f° + ½ Σ_j (∂G_j) G_j.

    G_j are the columns of G, and the sum has one forward-mode derivative a column. A process that
    is in the sense of Itô is returned as it is.
    """
    if not isinstance(sde, Stratonovich):
        return sde
    held = sde.sde
    return held.sde if isinstance(held, _Shifted) and held.sign < 0 else _Shifted(held, 1)


def stratonovich(sde: SDE) -> Stratonovich:
    r"""The same process in the sense of Stratonovich: the drift f - ½ Σ_j (∂G_j) G_j.

    Example:
        >>> from kakusan.core.operators import Diagonal
        >>> growth = SDE.of(lambda x, t: 2 * x, lambda x, t: Diagonal(2 * x))
        >>> stratonovich(growth).drift(torch.tensor([[3.0]]), torch.tensor(0.0))
        tensor([[0.]])
        >>> ito(stratonovich(growth)) is growth
        True
    """
    return sde if isinstance(sde, Stratonovich) else Stratonovich(_Shifted(sde, -1))
